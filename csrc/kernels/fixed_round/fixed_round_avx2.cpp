#include <immintrin.h>

#include <cstdint>

#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_round/fixed_round.h"
#include "kernels/fixed_round/fixed_round_simd.h"

namespace tersetorch {
namespace {

__m256 Within(__m256 s, float lowest, float highest) {
  return _mm256_min_ps(_mm256_max_ps(s, _mm256_set1_ps(lowest)), _mm256_set1_ps(highest));
}

// floor(s + 1/2); the difference to the floor is exact where it is below 1/2.
__m256i NextWhole(__m256 s) {
  const __m256 floor = _mm256_floor_ps(s);
  const __m256 up = _mm256_cmp_ps(_mm256_sub_ps(s, floor), _mm256_set1_ps(0.5f), _CMP_GE_OQ);
  return _mm256_sub_epi32(_mm256_cvtps_epi32(floor), _mm256_castps_si256(up));
}

template <Way kWay>
__m256i Rounded(const Format& f, __m256 x, __m256i random) {
  if constexpr (kWay == Way::kStochastic) {
    const __m256 s = _mm256_mul_ps(x, _mm256_set1_ps(65536 * f.scale));
    const __m256i sum = NextWhole(Within(s, 65536 * f.lowest, 65536 * f.highest));
    return _mm256_srai_epi32(_mm256_add_epi32(sum, random), 16);
  }
  const __m256 s = Within(_mm256_mul_ps(x, _mm256_set1_ps(f.scale)), f.lowest, f.highest);
  if constexpr (kWay == Way::kNearest) return NextWhole(s);
  const __m256 near = _mm256_round_ps(s, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i rest = NextWhole(_mm256_mul_ps(_mm256_sub_ps(s, near), _mm256_set1_ps(65536)));
  return _mm256_add_epi32(_mm256_cvtps_epi32(near), _mm256_srai_epi32(_mm256_add_epi32(rest, random), 16));
}

// The lower halves of eight words.
__m128i Halves(__m256i words) {
  const __m256i low =
      _mm256_shuffle_epi8(words, _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5,
                                                  8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(low, 0x08));
}

// The 8 values from i on; a bit for each NaN.
template <Way kWay>
int RoundVector(const FixedRoundArgs& a, const Format& f, Index i, __m256i random) {
  const __m256 x = (__m256)LoadFloats(a.x, a.stored_as, i);
  const __m256i k = Rounded<kWay>(f, x, random);
  const __m256 ordered = _mm256_cmp_ps(x, x, _CMP_ORD_Q);
  char* y = static_cast<char*>(a.y);
  if (a.as == FixedAs::kFloats) {
    const __m256 number = _mm256_blendv_ps(x, _mm256_mul_ps(_mm256_cvtepi32_ps(k), _mm256_set1_ps(f.step)), ordered);
    if (a.stored_as == FloatDtype::kFloat32) {
      Store(y + 4 * i, number);
    } else {
      // NaN comes from bfloat16: nothing below it carries.
      const __m256i bits = _mm256_castps_si256(number);
      const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), even);
      Store(y + 2 * i, Halves(_mm256_srli_epi32(rounded, 16)));
    }
    return 0;
  }
  const __m256i whole = _mm256_and_si256(k, _mm256_castps_si256(ordered));
  if (a.as == FixedAs::kInt32) {
    Store(y + 4 * i, whole);
  } else if (a.as == FixedAs::kInt16) {
    Store(y + 2 * i, Halves(whole));
  } else {
    const __m128i halves = Halves(whole);
    Store(y + i, _mm_cvtsi128_si64(_mm_packs_epi16(halves, halves)));
  }
  return 0xff ^ _mm256_movemask_ps(ordered);
}

template <Way kWay>
bool Values(const FixedRoundArgs& a, Index begin, Index end) {
  const Format f(a);
  const PhiloxKeys keys(a.seed);
  int undefined = 0;
  const auto round = [&](const FixedRoundArgs& from, Index i, std::uint64_t block) {
    __m256i words[2][2] = {};
    if constexpr (kWay != Way::kNearest) RandomWords(keys, block, words);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const __m256i word = words[v / 4][v % 2];
      const __m256i random =
          v / 2 % 2 == 0 ? _mm256_and_si256(word, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(word, 16);
      undefined |= RoundVector<kWay>(from, f, i + 8 * v, random);
    }
  };
  ForBlocks(
      a, begin, end, [&](Index i, std::uint64_t block) { round(a, i, block); },
      [&](Index i, std::uint64_t block, Index first, Index count) {
        alignas(32) char x[4 * kRandomBlock] = {}, y[4 * kRandomBlock];
        const Index in = a.stored_as == FloatDtype::kFloat32 ? 4 : 2, out = OutputBytes(a);
        __builtin_memcpy(x + in * first, static_cast<const char*>(a.x) + in * i, in * count);
        FixedRoundArgs copied = a;
        copied.x = x;
        copied.y = y;
        round(copied, 0, block);
        __builtin_memcpy(static_cast<char*>(a.y) + out * i, y + out * first, out * count);
      });
  return undefined != 0;
}

bool Round(const FixedRoundArgs& a, Index begin, Index end) noexcept {
  switch (Format(a).way) {
    case Way::kNearest:
      return Values<Way::kNearest>(a, begin, end);
    case Way::kStochastic:
      return Values<Way::kStochastic>(a, begin, end);
    case Way::kWideStochastic:
      break;
  }
  return Values<Way::kWideStochastic>(a, begin, end);
}

}  // namespace

const FixedRoundVariant kFixedRoundAvx2 = &Round;

}  // namespace tersetorch
