#include "kernels/fixed_matmul/fixed_images.h"

#include "kernels/fixed_matmul/fixed_numbers.h"

namespace tersetorch {
namespace {

// Pixels of planes put together: to[p][c] = change(x[c][p]), planes of `pixels`.
template <typename From, typename To, typename Change>
void Gather(const void* x, std::int64_t first, std::int64_t pixels, std::int64_t channels, std::int64_t width, char* to,
            const Change& change) {
  constexpr std::int64_t kBlock = 16 / sizeof(To), kTo = sizeof(To);
  std::int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    std::int64_t p = 0;
    for (; p + kBlock <= width; p += kBlock) {
      To planes[4][kBlock];
      for (std::int64_t i = 0; i < 4; ++i) {
        CopyNumbers<From, To>(x, first + (c + i) * pixels + p, kBlock, reinterpret_cast<char*>(planes[i]), change);
      }
      for (std::int64_t q = 0; q < kBlock; ++q) {
        const To of_pixel[] = {planes[0][q], planes[1][q], planes[2][q], planes[3][q]};
        __builtin_memcpy(to + ((p + q) * channels + c) * kTo, of_pixel, sizeof of_pixel);
      }
    }
    for (; p < width; ++p) {
      for (std::int64_t i = 0; i < 4; ++i) {
        Put(to, p * channels + c + i, static_cast<To>(change(int{At<From>(x, first + (c + i) * pixels + p)})));
      }
    }
  }
  for (; c < channels; ++c) {
    for (std::int64_t p = 0; p < width; ++p) {
      Put(to, p * channels + c, static_cast<To>(change(int{At<From>(x, first + c * pixels + p)})));
    }
  }
}

template <typename Value>
void Planes(const void* values, std::int64_t stride, std::int64_t windows, std::int64_t rows, void* y,
            std::int64_t pixels) {
  constexpr std::int64_t kBlock = 8;
  std::int64_t r = 0;
  for (; r + kBlock <= rows; r += kBlock) {
    std::int64_t n = 0;
    for (; n + kBlock <= windows; n += kBlock) {
      Value block[kBlock][kBlock];
      for (std::int64_t i = 0; i < kBlock; ++i) {
        for (std::int64_t j = 0; j < kBlock; ++j) block[j][i] = At<Value>(values, (n + i) * stride + r + j);
      }
      for (std::int64_t j = 0; j < kBlock; ++j) {
        __builtin_memcpy(static_cast<char*>(y) + ((r + j) * pixels + n) * static_cast<std::int64_t>(sizeof(Value)),
                         block[j], sizeof block[j]);
      }
    }
    for (; n < windows; ++n) {
      for (std::int64_t j = 0; j < kBlock; ++j) Put(y, (r + j) * pixels + n, At<Value>(values, n * stride + r + j));
    }
  }
  for (; r < rows; ++r) {
    for (std::int64_t n = 0; n < windows; ++n) Put(y, r * pixels + n, At<Value>(values, n * stride + r));
  }
}

}  // namespace

void FixedImageRows(const FixedImageArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const FixedImages& s = a.images;
  const std::int64_t pixels = s.height * s.width, padded = s.PaddedHeight();
  WithNumbers(a.x_wide, a.wide, a.split, [&](auto from, auto into, const auto& change, int copy) {
    using From = decltype(from);
    using To = decltype(into);
    constexpr std::int64_t kTo = sizeof(To);
    const std::int64_t of_row = s.PaddedWidth() * s.channels;
    const auto fill = [&](char* to, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) Put(to, i, static_cast<To>(change(0)));
    };
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t n = row / padded, high = row % padded - s.pad_h;
      char* to = static_cast<char*>(a.to) + ((a.split ? 2 * n + copy : n) * padded + row % padded) * of_row * kTo;
      if (high < 0 || high >= s.height) {
        fill(to, of_row);
        continue;
      }
      const std::int64_t side = s.pad_w * s.channels, image = n * pixels * s.channels;
      fill(to, side);
      fill(to + (of_row - side) * kTo, side);
      if (s.channels_last || s.channels == 1) {
        CopyNumbers<From, To>(a.x, image + high * s.width * s.channels, s.width * s.channels, to + side * kTo, change);
      } else {
        Gather<From, To>(a.x, image + high * s.width, pixels, s.channels, s.width, to + side * kTo, change);
      }
    }
  });
}

void FixedPlanes(const void* values, std::int64_t stride, std::int64_t windows, std::int64_t rows, std::int64_t bytes,
                 void* y, std::int64_t pixels) noexcept {
  if (bytes == 4) return Planes<std::int32_t>(values, stride, windows, rows, y, pixels);
  bytes == 2 ? Planes<std::int16_t>(values, stride, windows, rows, y, pixels)
             : Planes<std::int8_t>(values, stride, windows, rows, y, pixels);
}

}  // namespace tersetorch
