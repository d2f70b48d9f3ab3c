#include "kernels/fixed_matmul/fixed_images.h"

#include <utility>

#include "kernels/fixed_matmul/fixed_numbers.h"

namespace tersetorch {
namespace {

// 16 bytes, which every x86-64 has a register for.
template <typename T>
struct Square {
  static constexpr std::int64_t kSize = 16 / sizeof(T);
  typedef T Row __attribute__((vector_size(16)));

  // Rows i and i + size / 2 interleaved, as often as the size has bits, are the columns.
  void Transpose() {
    for (std::int64_t bits = kSize; bits > 1; bits /= 2) {
      Row next[kSize];
#pragma GCC unroll 8
      for (std::int64_t i = 0; i < kSize / 2; ++i) {
        next[2 * i] = Interleaved<0>(row[i], row[i + kSize / 2], Places());
        next[2 * i + 1] = Interleaved<kSize / 2>(row[i], row[i + kSize / 2], Places());
      }
#pragma GCC unroll 16
      for (std::int64_t i = 0; i < kSize; ++i) row[i] = next[i];
    }
  }

  Row row[kSize];

 private:
  using Places = std::make_integer_sequence<int, kSize>;

  // Of the halves of a and b from `first` on, number by number.
  template <int first, int... i>
  static Row Interleaved(Row a, Row b, std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * static_cast<int>(kSize))...);
  }
};

// Places that cover [0, count) in steps of `size`, the last of which may cover some twice; none where count is less.
template <typename Run>
void Cover(std::int64_t count, std::int64_t size, const Run& run) {
  for (std::int64_t i = 0; count >= size && i < count; i += size) run(i + size <= count ? i : count - size);
}

// Pixels of planes put together: to[p][c] = change(x[c][p]), planes of `pixels`.
template <typename From, typename To, typename Change>
void Gather(const void* x, std::int64_t first, std::int64_t pixels, std::int64_t channels, std::int64_t width, char* to,
            const Change& change) {
  using Numbers = Square<To>;
  constexpr std::int64_t kSize = Numbers::kSize, kTo = sizeof(To);
  typedef From Some __attribute__((vector_size(kSize * sizeof(From))));
  const auto square = [&](std::int64_t c, std::int64_t p, std::int64_t planes) {
    Numbers numbers{};
    for (std::int64_t i = 0; i < planes; ++i) {
      Some of_plane;
      __builtin_memcpy(&of_plane, static_cast<const char*>(x) + (first + (c + i) * pixels + p) * sizeof(From),
                       sizeof of_plane);
      numbers.row[i] = change(__builtin_convertvector(of_plane, typename Numbers::Row));
    }
    numbers.Transpose();
    for (std::int64_t i = 0; i < kSize; ++i) {
      __builtin_memcpy(to + ((p + i) * channels + c) * kTo, &numbers.row[i], sizeof numbers.row[i]);
    }
  };
  std::int64_t p = 0;
  if (channels >= kSize) {
    Cover(width, kSize, [&](std::int64_t place) {
      Cover(channels, kSize, [&](std::int64_t c) { square(c, place, kSize); });
      p = place + kSize;
    });
  } else {
    // What a row of a square has too much, the next pixel overwrites.
    for (; (p + kSize - 1) * channels + kSize <= width * channels; p += kSize) square(0, p, channels);
  }
  for (; p < width; ++p) {
    for (std::int64_t c = 0; c < channels; ++c) {
      Put(to, p * channels + c, NumberOf<From, To>(x, first + c * pixels + p, change));
    }
  }
}

template <typename Value>
void Planes(const void* values, std::int64_t stride, std::int64_t windows, std::int64_t rows, void* y,
            std::int64_t pixels) {
  using Values = Square<Value>;
  constexpr std::int64_t kSize = Values::kSize, kBytes = sizeof(Value);
  if (rows < kSize || windows < kSize) {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t n = 0; n < windows; ++n) Put(y, r * pixels + n, At<Value>(values, n * stride + r));
    }
    return;
  }
  Cover(windows, kSize, [&](std::int64_t n) {
    Cover(rows, kSize, [&](std::int64_t r) {
      Values square;
      for (std::int64_t i = 0; i < kSize; ++i) {
        __builtin_memcpy(&square.row[i], static_cast<const char*>(values) + ((n + i) * stride + r) * kBytes, 16);
      }
      square.Transpose();
      for (std::int64_t i = 0; i < kSize; ++i) {
        __builtin_memcpy(static_cast<char*>(y) + ((r + i) * pixels + n) * kBytes, &square.row[i], 16);
      }
    });
  });
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
      for (std::int64_t i = 0; i < count; ++i) Put(to, i, static_cast<To>(change(To{0})));
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
