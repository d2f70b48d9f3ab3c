#include "kernels/common/scalars.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {
namespace {

void Store(const XnorMatmulArgs& a, std::int64_t n, std::int64_t r, std::int32_t dot) {
  if (a.dots != nullptr) return Put(a.dots, n * a.rows + r, dot);
  if (a.floats != nullptr) {
    const float scale = a.scale == nullptr ? 1.0f : At<float>(a.scale, r);
    const float bias = a.bias == nullptr ? 0.0f : At<float>(a.bias, r);
    return Put(a.floats, n * a.rows + r, __builtin_fmaf(static_cast<float>(dot), scale, bias));
  }
  const std::int64_t words = (a.rows + 63) / 64, word = n * words + r / 64;
  const std::uint64_t bit = dot < At<std::int32_t>(a.thresholds, r);
  Put(a.bits, word, (r % 64 == 0 ? 0 : At<std::uint64_t>(a.bits, word)) | bit << r % 64);
}

void Multiply(const XnorMatmulArgs& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = tile_begin * kXnorRows; r < tile_end * kXnorRows && r < a.rows; ++r) {
      const std::int64_t first = r / kXnorRows * a.words * kXnorRows + r % kXnorRows;
      std::int64_t differ = 0;
      for (std::int64_t i = 0; i < a.words; ++i) {
        const auto w = At<std::uint64_t>(a.weight, first + i * kXnorRows), x = At<std::uint64_t>(a.x, n * a.words + i);
        differ += __builtin_popcountll(w ^ x);
      }
      Store(a, n, r, static_cast<std::int32_t>(a.columns - 2 * differ));
    }
  }
}

}  // namespace

const XnorMatmulVariant kXnorMatmulScalar = &Multiply;

}  // namespace tersetorch
