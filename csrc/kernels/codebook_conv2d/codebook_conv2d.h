// Windows of images as samples of codebook_matmul: y = relu?(conv2d(x, W) + bias) for a dense weight W kept as codes.
//
// Math:   y[n][o][i][j] = sum over c, kh, kw of W[o][(c * kernel_h + kh) * kernel_w + kw] * x[n][c of o's group]
//         [i * stride_h + kh * dilation_h - pad_h][j * stride_w + kw * dilation_w - pad_w] + bias[o], x being 0
//         outside. A window is one output's share of x, in the order of W's columns; W times 64 windows is
//         codebook_matmul, whose modes these are. In int8 an image has one scale; in BFloat16 windows are rounded but
//         stay float32, for a product in mode Exact with rounded tables.
// Method: CodebookPad gives an image its border, splits its columns by what they leave when divided by the stride, and
//         rounds it for int8: then a tap of neighbouring outputs is neighbouring numbers, and no border needs a test.
//         CodebookPackWindows copies them into a panel in codebook_matmul's order, for up to 64 outputs, which may lie
//         in several rows and images. Images that have no border and a stride of 1 are read as they are. In mode Exact
//         with a stride of 1 and large images no windows are made: CodebookMatmulArgs::offsets says where columns lie.
// Layout: padded images [channels][height + 2 pad_h][stride_w][columns of a phase], float32 or int8; number j of phase
//         p is column stride_w * j + p of the image with its border. Rows and phases that no tap reads may be left
//         alone.
// Limits: for 64 outputs a column of W costs 2 cycles of FMA for each filter (half a cycle in int8) and, to be copied
//         into a panel in the second cache level, 30 to 40 cycles (17 in int8): 256 filters lose a fifteenth, 64 a
//         quarter, and 1 filter, as of a depthwise convolution, nearly all. What codebook_matmul loses to decoding
//         comes to it. A weight of 512 x 512 x 3 x 3 takes 1.2 MB at 4 bits where float32 takes 9.4, read once for each
//         64 outputs; at 7 x 7 outputs it does 231 million operations, 1.2 ms at 196 a nanosecond, while float32's
//         bytes alone take 0.9 ms at 10 GB/s. Measured there, on one core: 1.55 ms, 76 % of the FMA limit, for
//         oneDNN's 2.2; at 14 x 14 of 256 channels 1.50 ms for 1.39, at 28 x 28 of 128 1.60 for 1.25, at 56 x 56 of
//         64 1.69 for 1.29, all at an eighth of the memory. int8: 0.49 ms for torch's quantised 0.53 at 7 x 7, 0.76 for
//         0.36 at 56 x 56, where rounding and copying the images is most of it.
// Source: Chellapilla et al., High performance convolutional neural networks (2006), for windows as a matrix; Han et
//         al., Deep Compression (2016), section 3.2, for shared weights.
//
// Single-threaded, and a number does not depend on how the caller splits the work. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/export.h"
#include "kernels/common/float_dtype.h"

namespace tersetorch {

// Bytes past the last padded image that CodebookPackWindows may read, of int8.
inline constexpr std::int64_t kCodebookWindowSlack = 64;

struct CodebookWindowShape {
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
};

struct CodebookPadArgs {
  const void* x;  // [channels, height, width]
  FloatDtype stored_as;
  std::int64_t channels, height, width, pad_h, pad_w;
  CodebookWindowShape shape;
  bool integer;
  float inverse;  // for integer only: of SampleScales of the image
  void* padded;   // [channels, height + 2 pad_h, stride_w * CodebookPhaseColumns]
};

struct CodebookWindowsArgs {
  const void* images;  // of the group's first channel; float32, or int8 for int8
  // From one image, channel and row to the next, and from one phase; in numbers.
  std::int64_t image_step, channel_step, row_step, phase_step;
  CodebookWindowShape shape;
  std::int64_t channels;  // of a group
  std::int64_t out_height, out_width;
  std::int64_t first, count;  // outputs of all images, counted through; count <= width
  std::int64_t column_block;
  int bits;
  CodebookMode mode;
  void* panel;  // CodebookPanelBytes
  std::int64_t width;
  std::int32_t* sums;  // [width], for int8 only: the sum of a window's numbers is added to it, atomically
};

namespace {

[[maybe_unused]] std::int64_t CodebookPhaseColumns(std::int64_t width, std::int64_t pad_w, std::int64_t stride_w) {
  return (width + 2 * pad_w + stride_w - 1) / stride_w;
}

}  // namespace

// Channels [channel_begin, channel_end) of one image.
TERSETORCH_API void CodebookPad(const CodebookPadArgs& args, std::int64_t channel_begin,
                                std::int64_t channel_end) noexcept;

// Chunks [chunk_begin, chunk_end) of the panel, of those that a row of W has. What is left over of a block's last chunk
// is 0, or for more than kCodebookFewSamples windows of floats not written, since CodebookMatmul does not read it.
TERSETORCH_API void CodebookPackWindows(const CodebookWindowsArgs& args, std::int64_t chunk_begin,
                                        std::int64_t chunk_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
struct CodebookConvKernels {
  void (*pad)(const CodebookPadArgs&, std::int64_t, std::int64_t) noexcept;
  void (*pack_windows)(const CodebookWindowsArgs&, std::int64_t, std::int64_t) noexcept;
};
extern const CodebookConvKernels kCodebookConvScalar;
extern const CodebookConvKernels kCodebookConvAvx2;
extern const CodebookConvKernels kCodebookConvAvx512;

}  // namespace tersetorch
