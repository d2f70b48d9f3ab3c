#include "kernels/common/scalars.h"
#include "kernels/sign_matmul/sign_matmul.h"

namespace tersetorch {
namespace {

// The numbers themselves, 64 of a word, instead of their sums.
void Tables(const SignTablesArgs& a, std::int64_t word_begin, std::int64_t word_end) noexcept {
  for (std::int64_t i = word_begin; i < word_end; ++i) {
    for (std::int64_t n = 0; n < a.samples; ++n) {
      for (std::int64_t c = 0; c < 64; ++c) {
        const std::int64_t column = i * 64 + c;
        const float x = column < a.columns ? Load(a.x, a.stored_as, n * a.columns + column) : 0;
        a.tables[(i * a.samples + n) * kSignMatmulTableFloats + c] = x;
      }
    }
  }
}

float Signed(std::uint64_t bits, std::int64_t c, const float* x) { return (bits >> c & 1) != 0 ? -x[c] : x[c]; }

float Dot(const SignMatmulArgs& a, std::int64_t n, std::int64_t r) {
  float dot = 0;
  for (std::int64_t i = 0; i < a.words; ++i) {
    const auto w = At<std::uint64_t>(a.weight, (r / kXnorRows * a.words + i) * kXnorRows + r % kXnorRows);
    const float* x = a.tables + (i * a.samples + n) * kSignMatmulTableFloats;
    for (std::int64_t c = 0; c < 64; c += 4) {
      dot += (Signed(w, c, x) + Signed(w, c + 1, x)) + (Signed(w, c + 2, x) + Signed(w, c + 3, x));
    }
  }
  return dot;
}

void Multiply(const SignMatmulArgs& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  for (std::int64_t n = 0; n < a.samples; ++n) {
    for (std::int64_t r = tile_begin * kXnorRows; r < tile_end * kXnorRows && r < a.rows; ++r) {
      const float scale = a.scale == nullptr ? 1.0f : At<float>(a.scale, r);
      const float y = __builtin_fmaf(Dot(a, n, r), scale, a.bias == nullptr ? 0.0f : At<float>(a.bias, r));
      Store(a.y, a.y_stored_as, n * a.rows + r, a.relu && y < 0 ? 0 : y);  // keeps NaN
    }
  }
}

}  // namespace

const SignMatmulKernels kSignMatmulScalar = {&Tables, &Multiply};

}  // namespace tersetorch
