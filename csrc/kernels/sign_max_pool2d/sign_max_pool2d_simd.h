// What the vector levels of sign_max_pool2d share: all but the vectors of words.
#pragma once

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d.h"

namespace tersetorch {
namespace {

// Taps [begin, end) of an axis that lie inside the image, for a window that begins at `origin`.
struct TapsInside {
  TapsInside(Index origin, Index size, Index kernel, Index dilation)
      : begin(origin < 0 ? (dilation - 1 - origin) / dilation : 0),
        end(origin >= size ? 0 : (size - origin + dilation - 1) / dilation) {
    if (end > kernel) end = kernel;
  }
  Index begin, end;
};

// Level::kWords words are a Level::Vector.
template <typename Level>
void PoolRows(const SignMaxPool2dArgs& a, Index row_begin, Index row_end) noexcept {
  const char* flips = reinterpret_cast<const char*>(a.flips);
  char* y = reinterpret_cast<char*>(a.y) + 8 * row_begin * a.out_width * a.words;
  for (Index r = row_begin; r < row_end; ++r) {
    const Index first_row = r % a.out_height * a.stride_h - a.pad_h;
    const TapsInside rows(first_row, a.height, a.kernel_h, a.dilation_h);
    const Index image_row = r / a.out_height * a.height + first_row;
    for (Index j = 0; j < a.out_width; ++j, y += 8 * a.words) {
      const Index column = j * a.stride_w - a.pad_w;
      const TapsInside columns(column, a.width, a.kernel_w, a.dilation_w);
      for (Index k = 0; k < a.words; k += Level::kWords) {
        const Index count = a.words - k < Level::kWords ? a.words - k : Level::kWords;
        auto signs = Level::Ones();
        for (Index kh = rows.begin; kh < rows.end; ++kh) {
          for (Index kw = columns.begin; kw < columns.end; ++kw) {
            const Index pixel = (image_row + kh * a.dilation_h) * a.width + column + kw * a.dilation_w;
            signs = signs & Level::Load(reinterpret_cast<const char*>(a.x) + 8 * (pixel * a.words + k), count);
          }
        }
        if (flips != nullptr) signs = signs ^ Level::Load(flips + 8 * k, count);
        Level::Store(y + 8 * k, signs, count);
      }
    }
  }
}

}  // namespace
}  // namespace tersetorch
