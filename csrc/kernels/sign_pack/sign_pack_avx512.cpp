#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sign_pack/sign_pack.h"

namespace tersetorch {
namespace {

// Of 16 numbers, those that `within` marks; the others are not read.
std::uint64_t SignsOf(const void* x, FloatDtype stored_as, Index i, __mmask16 within) {
  __m512 floats;
  if (stored_as == FloatDtype::kFloat32) {
    floats = _mm512_maskz_loadu_ps(within, static_cast<const char*>(x) + 4 * i);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(within, static_cast<const char*>(x) + 2 * i);
    floats = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  return _mm512_mask_cmp_ps_mask(within, floats, _mm512_setzero_ps(), _CMP_GE_OQ);
}

void Pack(const SignPackArgs& a, Index word_begin, Index word_end) noexcept {
  const Index words = SignWords(a.columns);
  for (Index i = word_begin; i < word_end; ++i) {
    const Index first = i % words * kSignBits, begin = i / words * a.columns + first;
    const Index count = a.columns - first < kSignBits ? a.columns - first : kSignBits;
    const std::uint64_t within = ~std::uint64_t{0} >> (kSignBits - count);
    std::uint64_t bits = 0;
#pragma GCC unroll 4
    for (int c = 0; c < kSignBits; c += 16) {
      bits |= SignsOf(a.x, a.stored_as, begin + c, static_cast<__mmask16>(within >> c)) << c;
    }
    Store(reinterpret_cast<char*>(a.bits) + 8 * i, bits);
  }
}

}  // namespace

const SignPackVariant kSignPackAvx512 = &Pack;

}  // namespace tersetorch
