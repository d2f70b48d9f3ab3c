#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

// v of columns [begin, begin + count) of sample n.
void Numbers(const BitplaneTablesArgs& a, std::int64_t n, std::int64_t begin, std::int64_t count, std::int16_t* v) {
  if (a.images == nullptr) {
    const std::uint8_t* x = a.x + (a.first + n) * a.columns + begin;
    for (std::int64_t c = 0; c < count; ++c) v[c] = static_cast<std::int16_t>(a.step * x[c] - a.zero);
    return;
  }
  const BitplaneImages& i = *a.images;
  const std::int64_t position = a.first + n, in_image = position % (i.out_height * i.out_width);
  const std::uint8_t* image = a.x + position / (i.out_height * i.out_width) * i.image_stride;
  const std::int64_t top = in_image / i.out_width * i.stride_y - i.padding_y;
  const std::int64_t left = in_image % i.out_width * i.stride_x - i.padding_x;
  std::int64_t kx = begin % i.kernel_width, ky = begin / i.kernel_width % i.kernel_height;
  std::int64_t channel = begin / (i.kernel_width * i.kernel_height);
  for (std::int64_t c = 0; c < count; ++c) {
    const std::int64_t y = top + ky * i.dilation_y, x = left + kx * i.dilation_x;
    const bool inside = y >= 0 && y < i.height && x >= 0 && x < i.width;
    const std::uint8_t* from = image + channel * i.channel_stride + y * i.row_stride + x * i.column_stride;
    v[c] = inside ? static_cast<std::int16_t>(a.step * *from - a.zero) : std::int16_t{0};
    if (++kx == i.kernel_width) {
      kx = 0;
      if (++ky == i.kernel_height) {
        ky = 0;
        ++channel;
      }
    }
  }
}

// The numbers themselves, 64 of a word, instead of their sums.
void Tables(const BitplaneTablesArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  for (std::int64_t i = word_begin; i < word_end; ++i) {
    const std::int64_t left = a.columns - i * 64;
    for (std::int64_t n = 0; n < a.samples; ++n) {
      std::int16_t* numbers = a.tables + (i * a.samples + n) * kBitplaneWordTables;
      for (std::int64_t c = 0; c < 64; ++c) numbers[c] = 0;
      Numbers(a, n, i * 64, left < 64 ? left : 64, numbers);
    }
  }
}

std::int32_t Dot(const BitplaneMatmulArgs& a, std::int64_t n, std::int64_t r) {
  std::int32_t dot = 0;
  for (std::int64_t i = 0; i < a.words; ++i) {
    const auto w = At<std::uint64_t>(a.weight, (r / kXnorRows * a.words + i) * kXnorRows + r % kXnorRows);
    const std::int16_t* v = a.tables + (i * a.samples + n) * kBitplaneWordTables;
    for (std::int64_t c = 0; c < 64; ++c) dot += (w >> c & 1) != 0 ? -v[c] : v[c];
  }
  return dot;
}

void Store(const BitplaneMatmulArgs& a, std::int64_t n, std::int64_t r, std::int32_t dot) {
  if (a.dots != nullptr) return Put(a.dots, n * a.rows + r, dot);
  if (a.floats != nullptr) {
    const float scale = a.scale == nullptr ? 1.0f : At<float>(a.scale, r);
    const float bias = a.bias == nullptr ? 0.0f : At<float>(a.bias, r);
    return Put(a.floats, n * a.rows + r, __builtin_fmaf(static_cast<float>(dot), scale, bias));
  }
  const std::int64_t word = n * ((a.rows + 63) / 64) + r / 64;
  const std::uint64_t bit = dot < At<std::int32_t>(a.thresholds, r);
  Put(a.bits, word, (r % 64 == 0 ? 0 : At<std::uint64_t>(a.bits, word)) | bit << r % 64);
}

void Multiply(const BitplaneMatmulArgs& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = tile_begin * kXnorRows; r < tile_end * kXnorRows && r < a.rows; ++r) {
      Store(a, n, r, Dot(a, n, r));
    }
  }
}

}  // namespace

const BitplaneMatmulKernels kBitplaneMatmulScalar = {&Tables, &Multiply};

}  // namespace tersetorch
