// The convolution of images of signs with a weight of signs, by exclusive or and population count.
//
// Math:   for w and x of +1 and -1, dot[n][o][i][j] = sum over c, kh, kw of w[o][c][kh][kw] * x[n][c of o's group]
//         [i * stride_h + kh * dilation_h - pad_h][j * stride_w + kw * dilation_w - pad_w], exact. Outside the image x
//         is 0, +1 or -1. y = dot (int32), fma(dot, scale[o], bias[o]) (float32), or a bit that is 0, for +1, where
//         dot >= thresholds[o], else 1: the sign that a batch norm behind the convolution leaves, and the x of the
//         next one.
// Method: positions outside the image are left out. Outputs that see the same taps make rectangles, so that no tap is
//         tested; a rectangle's dot is taps * channels - 2 * (the bits that differ), and where x is +1 or -1 outside,
//         what those taps give is one number for each of its filters, counted once.
// Layout: x [images, height, width, pixel_words] as kernels/sign_pack lays out the channels of a pixel; those of group
//         g begin at word g * words. weight int32 [tiles][kernel_h][kernel_w][2 * words][32]: the half words of a
//         tile's 32 filters side by side, those past the last of its group all 0. Bits past the channels are 0 in both,
//         so they never differ. y with the channels last: [images, out_height, out_width, filters], or bits
//         [..., ceil(filters / 64)] as x has them.
// Limits: the full adder of vpternlogd takes both halves of a word for 16 filters and a sum of earlier ones, and hands
//         on one carry to count: 5 vector operations for 1,024 products, 2.5 cycles on Intel's two 512-bit ports,
//         where xor, vpopcntq and addition of each word take 3. Lanes of 32 bits are filters, so that nothing crosses
//         lanes, and a single word of channels fills an adder. 4 pixels and 2 vectors of filters are 8 such chains;
//         loads, 12 for 40 operations, stay behind. Leaving out what lies outside saves a tenth of 3 x 3 on 14 x 14.
//         AVX2 has no vpternlogd: lookups of kernels/common/sign_counts.h count 256 products a cycle of three ports;
//         a single pixel, which would not repay the vectors of nibbles, goes through the adder, 110 a cycle.
// Source: Rastegari et al., XNOR-Net (2016), section 3.2; Courbariaux et al., Binarized Neural Networks (2016), section
//         1.4; Harley and Seal's counter (Warren, Hacker's Delight, section 5-1) for the adder.
//
// Single-threaded, and a number does not depend on how the caller splits the work; the same bits at every level. No
// pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"

namespace tersetorch {

inline constexpr std::int64_t kXnorFilters = 32;  // of a tile

// Outputs [begin, end) of one axis, all of which see taps [tap_begin, tap_end); the others lie outside the image.
struct XnorSpan {
  std::int64_t begin, end, tap_begin, tap_end;
};

struct XnorConv2dArgs {
  const std::uint64_t* x;      // [images, height, width, pixel_words]
  const std::int32_t* weight;  // [tiles, kernel_h, kernel_w, 2 * words, 32]
  std::int64_t images, height, width, pixel_words;
  std::int64_t channels, words, filters;  // of one group
  std::int64_t groups, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t out_height, out_width;
  int outside;  // what x is there: 0, 1 or -1
  // XnorSpans of both axes, for the vector levels.
  const XnorSpan* row_spans;
  const XnorSpan* column_spans;
  std::int64_t row_span_count, column_span_count;
  const float* scale;              // [groups * filters] or null for 1
  const float* bias;               // [groups * filters] or null for 0
  const std::int32_t* thresholds;  // [groups * filters], or null where y is no bits
  // Exactly one of these. Bits are 0 before the first call.
  std::int32_t* dots;
  float* floats;
  std::uint64_t* bits;
};

static inline std::int64_t XnorConvTiles(std::int64_t filters, std::int64_t groups) {
  return groups * ((filters + kXnorFilters - 1) / kXnorFilters);
}

// Whether tiles hold whole halves of words of bits, so that calls for different pairs of tiles may run at once.
static inline bool XnorWholeTiles(const XnorConv2dArgs& a) { return a.groups == 1 || a.filters % kXnorFilters == 0; }

// Cuts the outputs of one axis into spans, at most one for each; returns how many.
TERSETORCH_API std::int64_t XnorSpans(std::int64_t outputs, std::int64_t size, std::int64_t kernel, std::int64_t stride,
                                      std::int64_t padding, std::int64_t dilation, XnorSpan* spans) noexcept;

// What a call computes: of one image, the outputs of some rows and the filters of some tiles.
struct XnorConvPart {
  std::int64_t image, row_begin, row_end, tile_begin, tile_end;
};

TERSETORCH_API void XnorConv2d(const XnorConv2dArgs& args, const XnorConvPart& part) noexcept;

// Channels of groups that do not begin with a word, laid out so that they do: pixels [begin, end) of x
// [pixels, ceil(groups * channels / 64)] to [pixels, groups * words].
TERSETORCH_API void XnorSplitGroups(const std::uint64_t* x, std::int64_t groups, std::int64_t channels,
                                    std::uint64_t* split, std::int64_t begin, std::int64_t end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using XnorConv2dVariant = void (*)(const XnorConv2dArgs&, const XnorConvPart&) noexcept;
extern const XnorConv2dVariant kXnorConv2dScalar;
extern const XnorConv2dVariant kXnorConv2dAvx2;
extern const XnorConv2dVariant kXnorConv2dAvx512;

}  // namespace tersetorch
