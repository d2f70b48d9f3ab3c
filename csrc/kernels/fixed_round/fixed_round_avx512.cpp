#include <immintrin.h>

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_round/fixed_round.h"
#include "kernels/fixed_round/fixed_round_simd.h"

namespace tersetorch {
namespace {

constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;

// floor(x * scale + 1/2) within the limits: rounded down, a sum has the floor of the exact one.
__m512i NextWhole(__m512 x, float scale, float lowest, float highest) {
  const __m512 sum = _mm512_fmadd_round_ps(x, _mm512_set1_ps(scale), _mm512_set1_ps(0.5f), kDown);
  const __m512 inside = _mm512_min_ps(_mm512_max_ps(sum, _mm512_set1_ps(lowest)), _mm512_set1_ps(highest));
  return _mm512_cvt_roundps_epi32(inside, kDown);
}

template <Way kWay>
__m512i Rounded(const Format& f, __m512 x, __m512i random) {
  if constexpr (kWay == Way::kNearest) return NextWhole(x, f.scale, f.lowest, f.highest);
  if constexpr (kWay == Way::kStochastic) {
    const __m512i sum = NextWhole(x, 65536 * f.scale, 65536 * f.lowest, 65536 * f.highest);
    return _mm512_srai_epi32(_mm512_add_epi32(sum, random), 16);
  }
  const __m512 scaled = _mm512_mul_ps(x, _mm512_set1_ps(f.scale));
  const __m512 s = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(f.lowest)), _mm512_set1_ps(f.highest));
  const __m512 near = _mm512_roundscale_ps(s, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512i rest = NextWhole(_mm512_sub_ps(s, near), 65536, -65536, 65536);  // at most 1/2 beside near: exact
  return _mm512_add_epi32(_mm512_cvtps_epi32(near), _mm512_srai_epi32(_mm512_add_epi32(rest, random), 16));
}

// The values that `within` marks of the 16 from i on; which of them are NaN.
template <Way kWay, FloatDtype kStoredAs>
__mmask16 RoundVector(const FixedRoundArgs& a, const Format& f, Index i, __m512i random, __mmask16 within) {
  __m512 x;
  if constexpr (kStoredAs == FloatDtype::kFloat32) {
    x = _mm512_maskz_loadu_ps(within, static_cast<const char*>(a.x) + 4 * i);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(within, static_cast<const char*>(a.x) + 2 * i);
    x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  const __m512i k = Rounded<kWay>(f, x, random);
  const __mmask16 ordered = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
  char* y = static_cast<char*>(a.y);
  if (a.as == FixedAs::kFloats) {
    const __m512 number = _mm512_mask_mul_ps(x, ordered, _mm512_cvtepi32_ps(k), _mm512_set1_ps(f.step));
    if constexpr (kStoredAs == FloatDtype::kFloat32) {
      _mm512_mask_storeu_ps(y + 4 * i, within, number);
    } else {
      // NaN comes from bfloat16: nothing below it carries.
      const __m512i bits = _mm512_castps_si512(number);
      const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
      _mm256_mask_storeu_epi16(y + 2 * i, within, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
    return 0;
  }
  const __m512i whole = _mm512_maskz_mov_epi32(ordered, k);
  if (a.as == FixedAs::kInt8) {
    _mm_mask_storeu_epi8(y + i, within, _mm512_cvtepi32_epi8(whole));
  } else if (a.as == FixedAs::kInt16) {
    _mm256_mask_storeu_epi16(y + 2 * i, within, _mm512_cvtepi32_epi16(whole));
  } else {
    _mm512_mask_storeu_epi32(y + 4 * i, within, whole);
  }
  return static_cast<__mmask16>(~ordered);
}

template <Way kWay, FloatDtype kStoredAs>
bool Values(const FixedRoundArgs& a, Index begin, Index end) {
  const Format f(a);
  const PhiloxKeys keys(a.seed);
  __mmask16 undefined = 0;
  const auto round = [&](Index i, std::uint64_t block, std::uint64_t within) {
    __m512i words[2] = {};
    if constexpr (kWay != Way::kNearest) RandomWords(keys, block, words);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512i word = words[v / 2];
      const __m512i random =
          v % 2 == 0 ? _mm512_and_si512(word, _mm512_set1_epi32(0xffff)) : _mm512_srli_epi32(word, 16);
      const auto of_vector = static_cast<__mmask16>(within >> 16 * v);
      undefined |= RoundVector<kWay, kStoredAs>(a, f, i + 16 * v, random, of_vector);
    }
  };
  ForBlocks(
      a, begin, end, [&](Index i, std::uint64_t block) { round(i, block, ~std::uint64_t{0}); },
      [&](Index i, std::uint64_t block, Index first, Index count) {
        round(i - first, block, ~std::uint64_t{0} >> (kRandomBlock - count) << first);
      });
  return undefined != 0;
}

template <Way kWay>
bool AnyDtype(const FixedRoundArgs& a, Index begin, Index end) {
  return a.stored_as == FloatDtype::kFloat32 ? Values<kWay, FloatDtype::kFloat32>(a, begin, end)
                                             : Values<kWay, FloatDtype::kBFloat16>(a, begin, end);
}

bool Round(const FixedRoundArgs& a, Index begin, Index end) noexcept {
  switch (Format(a).way) {
    case Way::kNearest:
      return AnyDtype<Way::kNearest>(a, begin, end);
    case Way::kStochastic:
      return AnyDtype<Way::kStochastic>(a, begin, end);
    case Way::kWideStochastic:
      break;
  }
  return AnyDtype<Way::kWideStochastic>(a, begin, end);
}

}  // namespace

const FixedRoundVariant kFixedRoundAvx512 = &Round;

}  // namespace tersetorch
