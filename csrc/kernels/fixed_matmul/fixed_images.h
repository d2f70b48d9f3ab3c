// Images as samples of FixedMatmul: every window of an image is one, and no window is copied.
//
// Layout: an image padded on all sides, the channels of a pixel together: a window's rows of pixels are segments of a
//         sample, or, where groups or a dilation keep pixels apart, its pixels are.
//
// Single-threaded. No pointer needs to be aligned.
#pragma once

#include <cstdint>

#include "kernels/common/everywhere.h"
#include "kernels/common/export.h"

namespace tersetorch {

struct FixedImages {
  std::int64_t count = 0, channels = 0, height = 0, width = 0;
  std::int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0;
  std::int64_t dilation_h = 1, dilation_w = 1, groups = 1;
  std::int64_t out_height = 0, out_width = 0;
  bool channels_last = false;

  std::int64_t PaddedHeight() const { return height + 2 * pad_h; }
  std::int64_t PaddedWidth() const { return width + 2 * pad_w; }
  TERSETORCH_EVERYWHERE std::int64_t Windows() const { return out_height * out_width; }
  TERSETORCH_EVERYWHERE bool RowsAreSegments() const { return groups == 1 && dilation_w == 1; }
  TERSETORCH_EVERYWHERE std::int64_t Segments() const { return RowsAreSegments() ? kernel_h : kernel_h * kernel_w; }
};

struct FixedImageArgs {
  const void* x;  // the images
  bool x_wide, wide, split;
  const FixedImages& images;
  void* to;  // [images, padded rows, padded columns, channels] or, split, [images, 2, ...], high before low
};

// Padded rows [begin, end) of the images, one after the other.
TERSETORCH_API void FixedImageRows(const FixedImageArgs& args, std::int64_t begin, std::int64_t end) noexcept;

// values [windows, stride] of 1, 2 or 4 bytes as planes [rows, pixels] in y: y[r][n] = values[n][r].
TERSETORCH_API void FixedPlanes(const void* values, std::int64_t stride, std::int64_t windows, std::int64_t rows,
                                std::int64_t bytes, void* y, std::int64_t pixels) noexcept;

}  // namespace tersetorch
