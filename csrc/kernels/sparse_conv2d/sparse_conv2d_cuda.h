// The convolution of sparse_conv2d.h on a CUDA device, directly from a weight in compressed sparse rows: no layout of
// its own.
//
// Layout: row o of the weight is filter o, flattened: column (c * kernel_h + kh) * kernel_w + kw, with c counted from
//         the first channel of the filter's group. x and y lie as their steps say; every pointer is to the device's
//         memory and aligned to its element.
// Method: images in batches go to tensor cores, where products are exact there (conv_fragments_cuda.h). Else a block
//         takes a tile of outputs, some filters of a group and some of its channels. Channel block after channel block
//         it copies the inputs that the tile needs into shared memory, zeros for padding, rounded as the mode says. A
//         warp takes a few filters in turn: its lanes decode 32 non-zeros into places in that copy, then every non-zero
//         is read by all lanes, each of which multiplies it for up to 8 outputs. Lane after lane reads word after word:
//         with steps of 1 a tile's outputs are numbered as its inputs lie, row ends included, so that no banks conflict
//         but for lanes past the last output, which read the first one: 8 cycles for 7 at 14 x 14 and 3 x 3. Where
//         there are few outputs, several blocks share a filter's channels and leave their sums in scratch, which a last
//         kernel adds. Tiles that do not fit take one output a thread and read x where it lies.
// Cost:   a multiply-add costs a word of shared memory, of which a multiprocessor has 32 a cycle: a quarter of what it
//         could multiply. Row ends are lost: 2 of 16 at 14 columns and 3 x 3. int8 scales come from a kernel before.
//         256 x 256 channels, 3 x 3, at 14 x 14 and 32 images, 20 %, took 288 us on an H100, of 114 for these words.
// Safety: offsets, columns and codes are compared with their bounds before they are used, and nothing outside the
//         arrays is touched. A kernel cannot return a status without making the caller wait, so damage becomes NaN: all
//         outputs, in every image, of a filter whose offsets, columns or codes are damaged. Where columns do not rise,
//         a filter may be NaN, or each of its non-zeros counts once. In mode int8 an image with infinity or NaN is NaN,
//         and a filter with them.
// Order:  every sum has one order of summation, that of the row.
#pragma once

#include <cstdint>

#include "kernels/common/float_dtype.h"
#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace tersetorch {

// Elements from one image, channel, row and column to the next.
struct ConvSteps {
  std::int64_t image, channel, row, column;
};

// Of an image or a filter: number q stands for q * scale, and number x becomes round(x * inverse).
struct ConvScale {
  float scale, inverse;
};

// How a convolution is cut up for the device's blocks.
struct ConvCudaPlan {
  bool tiled;                      // in tiles, a product for each non-zero
  bool fragments;                  // in tiles on tensor cores; else every output by itself
  int numbers;                     // of outputs in a tile of fragments: 128 or 256
  int columns, rows, images;       // of y in a tile
  int pitch;                       // from an output's number to that of the one below
  int outputs;                     // numbers of a tile's outputs in one image
  int in_pitch, in_rows, in_size;  // of an image's copy of a channel
  int lane_outputs;                // of a lane: 2, 4, 6, 7 or 8
  int channels;                    // of a channel block
  int warp_filters;                // 1, 2 or 4
  int splits;                      // blocks that share a filter's channels
};

struct ConvCudaArgs {
  CsrWeight weight;  // [out_channels, in_channels / groups * kernel_h * kernel_w]
  ConvShape shape;
  std::int64_t images, height, width, out_height, out_width, pad_h, pad_w;
  const void* x;  // [images, in_channels, height, width]
  ConvSteps x_steps;
  FloatDtype stored_as;
  const float* bias;  // [out_channels] or null
  bool relu;
  void* y;  // [images, out_channels, out_height, out_width], stored as x is
  ConvSteps y_steps;
  ConvMode mode;
  ConvScale* scales;  // [images + out_channels], uninitialised, for int8 only
  ConvCudaPlan plan;  // by ConvPlanCuda
  void* scratch;      // uninitialised, of ConvScratchBytes, aligned to 16 bytes; null for none
};

// All of args but plan, scratch and pointers count, for the current device.
ConvCudaPlan ConvPlanCuda(const ConvCudaArgs& args) noexcept;
std::int64_t ConvScratchBytes(const ConvCudaArgs& args) noexcept;

// Enqueues on `stream`, a cudaStream_t, and returns the cudaError_t of that.
int ConvCuda(const ConvCudaArgs& args, void* stream) noexcept;

}  // namespace tersetorch
