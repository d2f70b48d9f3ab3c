// The largest sign in each window of images of signs.
//
// Math:   bit c of y[n][i][j] is 0, for +1, where it is in x[n][i * stride_h + kh * dilation_h - pad_h][j * stride_w +
//         kw * dilation_w - pad_w] for any tap (kh, kw); positions outside the image count as -1. Then it is turned
//         round where bit c of flips is 1: max(s x) of signs with s = -1 is a minimum, which batch norm may ask for.
//         A window that lies outside altogether has all bits 1, those past the last channel too: callers refuse it.
// Layout: x [images, height, width, words] as kernels/sign_pack lays out the channels of a pixel; y [images,
//         out_height, out_width, words]; flips [words], 0 past the last channel.
// Limits: each word of a window is read and joined by one and; memory of a 32nd of float32's.
// Source: Courbariaux et al., Binarized Neural Networks (2016), section 2.3, for pooling of signs; Umuroglu et al.,
//         FINN (2017), section 4.2.3, for pooling by one operation on bits.
//
// Single-threaded. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/export.h"

namespace tersetorch {

struct SignMaxPool2dArgs {
  const std::uint64_t* x;
  std::int64_t images, height, width, words;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  std::int64_t out_height, out_width;
  const std::uint64_t* flips;  // [words], or null for none
  std::uint64_t* y;
};

// Rows [row_begin, row_end) of the images * out_height there are.
TERSETORCH_API void SignMaxPool2d(const SignMaxPool2dArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept;

// The variants, hidden in the library; the kernel tests link them directly.
using SignMaxPool2dVariant = void (*)(const SignMaxPool2dArgs&, std::int64_t, std::int64_t) noexcept;
extern const SignMaxPool2dVariant kSignMaxPool2dScalar;
extern const SignMaxPool2dVariant kSignMaxPool2dAvx2;
extern const SignMaxPool2dVariant kSignMaxPool2dAvx512;

}  // namespace tersetorch
