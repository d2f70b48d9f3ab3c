#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

// The panel of this level: x as it is, float32 [samples, columns]; or q, int8 [samples, columns].
bool PackSamples(const BitmapSamplesArgs& a) noexcept {
  for (std::int64_t n = 0; n < a.samples; ++n) {
    const std::int64_t begin = n * a.columns;
    if (!a.quantized) {
      for (std::int64_t c = 0; c < a.columns; ++c) Put(a.panel, begin + c, Load(a.x, a.x_stored_as, begin + c));
      continue;
    }
    // Compared as integers: infinities are above all numbers, and NaN above them.
    std::uint32_t largest = 0;
    for (std::int64_t c = 0; c < a.columns; ++c) {
      const auto bits = __builtin_bit_cast(std::uint32_t, Load(a.x, a.x_stored_as, begin + c)) & 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    const BitmapScale scale = BitmapScaleOf(__builtin_bit_cast(float, largest));
    a.x_scales[n] = scale.scale;
    for (std::int64_t c = 0; c < a.columns; ++c) {
      const float q = scale.inverse == 0 ? 0.0f : Load(a.x, a.x_stored_as, begin + c) * scale.inverse;
      Put(a.panel, begin + c, static_cast<std::int8_t>(__builtin_lrintf(q)));
    }
  }
  return true;
}

float Value(const BitmapWeight& w, std::int64_t k) {
  switch (w.stored_as) {
    case BitmapValues::kFloat32:
      return At<float>(w.values, k);
    case BitmapValues::kBFloat16:
      return FromBFloat16(At<std::uint16_t>(w.values, k));
    case BitmapValues::kCodes:
      return At<float>(w.codebook, At<std::uint8_t>(w.values, k));
    case BitmapValues::kInt8:
      break;
  }
  return At<std::int8_t>(w.values, k);
}

BitmapStatus Check(const BitmapWeight& w, std::int64_t r) {
  const std::int64_t words = BitmapWords(w.columns), begin = At<std::int32_t>(w.row_offsets, r);
  const std::int64_t end = At<std::int32_t>(w.row_offsets, r + 1);
  if (begin < 0 || end < begin || end > w.nnz) return BitmapStatus::kBadRowOffsets;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < words; ++i) count += __builtin_popcountll(At<std::uint64_t>(w.bitmap, r * words + i));
  if (count != end - begin) return BitmapStatus::kBadBitmap;
  if (w.columns % 64 != 0 && At<std::uint64_t>(w.bitmap, (r + 1) * words - 1) >> w.columns % 64 != 0) {
    return BitmapStatus::kBadBitmap;
  }
  if (w.stored_as == BitmapValues::kCodes) {
    for (std::int64_t k = begin; k < end; ++k) {
      if (At<std::uint8_t>(w.values, k) >= w.entries) return BitmapStatus::kBadCode;
    }
  }
  return BitmapStatus::kOk;
}

BitmapStatus Matmul(const BitmapMatmulArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const BitmapWeight& w = a.weight;
  const std::int64_t words = BitmapWords(w.columns);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    if (const BitmapStatus status = Check(w, r); status != BitmapStatus::kOk) return status;
    const float scale = w.stored_as == BitmapValues::kInt8 ? At<float>(w.scales, r) : 1.0f;
    const float bias = a.bias == nullptr ? 0.0f : At<float>(a.bias, r);
    for (std::int64_t n = 0; n < a.samples; ++n) {
      float sum = 0;
      std::int32_t integer_sum = 0;
      std::int64_t k = At<std::int32_t>(w.row_offsets, r);
      for (std::int64_t i = 0; i < words; ++i) {
        for (auto bits = At<std::uint64_t>(w.bitmap, r * words + i); bits != 0; bits &= bits - 1, ++k) {
          const std::int64_t x = n * w.columns + i * 64 + __builtin_ctzll(bits);
          if (a.quantized) {
            integer_sum += At<std::int8_t>(w.values, k) * At<std::int8_t>(a.panel, x);
          } else {
            sum += Value(w, k) * At<float>(a.panel, x);
          }
        }
      }
      // Fused at every level, so that all of them give the same bits.
      const float y = a.quantized ? __builtin_fmaf(static_cast<float>(integer_sum), scale * a.x_scales[n], bias)
                                  : __builtin_fmaf(sum, scale, bias);
      Store(a.y, a.y_stored_as, n * w.rows + r, a.relu && y < 0 ? 0.0f : y);
    }
  }
  return BitmapStatus::kOk;
}

BitmapStatus Columns(const BitmapColumnsArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  const BitmapWeight& w = a.weight;
  const std::int64_t words = BitmapWords(w.columns), begin = word_begin * 64;
  const std::int64_t end = word_end * 64 < w.columns ? word_end * 64 : w.columns;
  for (std::int64_t c = begin; c < end; ++c) a.sums[c] = 0.0f;
  for (std::int64_t t = 0; t < a.count; ++t) {
    if (const BitmapStatus status = Check(w, a.active[t]); status != BitmapStatus::kOk) return status;
    std::int64_t k = At<std::int32_t>(w.row_offsets, a.active[t]);
    for (std::int64_t i = 0; i < word_end; ++i) {
      for (auto bits = At<std::uint64_t>(w.bitmap, a.active[t] * words + i); bits != 0; bits &= bits - 1, ++k) {
        if (i >= word_begin) a.sums[i * 64 + __builtin_ctzll(bits)] += Value(w, k) * a.x[t];
      }
    }
  }
  for (std::int64_t c = begin; c < end; ++c) {
    const float y = a.sums[c] + (a.bias == nullptr ? 0.0f : At<float>(a.bias, c));
    Store(a.y, a.y_stored_as, c, a.relu && y < 0 ? 0.0f : y);
  }
  return BitmapStatus::kOk;
}

}  // namespace

const BitmapKernels kBitmapScalar{PackSamples, Matmul, Columns};

}  // namespace tersetorch
