#include <immintrin.h>

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_simd.h"

namespace tersetorch {
namespace {

// 8 sums in registers.
struct Tiles {
  using Register = __m256i;
  static constexpr int kRows = 4, kSamples = 2;
  static constexpr Index kColumns = 16;

  static __m256i Add(__m256i sums, __m256i x, __m256i w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
  static Index First(Index count) { return count; }
  static Index Raised(const char*, Index) { return 0; }
};

struct Words : Tiles {
  static constexpr Index kBytes = 2;
  static constexpr bool kFew = false;

  template <typename Within>
  static __m256i X(const char* p, Within within) {
    return W(p, within);
  }
  static __m256i W(const char* p, All) { return LoadAt<__m256i>(p, 0, 0); }
  static __m256i W(const char* p, Index count) {
    if (count >= kColumns) return W(p, All{});
    alignas(32) std::int16_t some[kColumns] = {};
    __builtin_memcpy(some, p, 2 * count);
    return LoadAt<__m256i>(some, 0, 0);
  }

  static Index Largest(const void* numbers, Index count) {
    const char* p = static_cast<const char*>(numbers);
    __m256i largest = _mm256_setzero_si256();
    for (Index i = 0; i < count; i += kColumns) {
      largest = _mm256_max_epu16(largest, _mm256_abs_epi16(W(p + 2 * i, count - i)));
    }
    std::uint16_t of_lane[16], most = 0;
    Store(of_lane, largest);
    for (const std::uint16_t one : of_lane) most = one > most ? one : most;
    return most;
  }

  // Sums of 32 bits, raised to be positive: pairs of them as they stand, modulo 2^64, and the upper ones.
  struct Wide {
    __m256i pairs, upper;
  };
  static void Accumulate(Wide& total, __m256i sums) {
    const __m256i positive = _mm256_add_epi32(sums, _mm256_set1_epi32(kSumRaised));
    total.pairs = _mm256_add_epi64(total.pairs, positive);
    total.upper = _mm256_add_epi64(total.upper, _mm256_srli_epi64(positive, 32));
  }
  static __m256i Lanes(const Wide& total) {
    const __m256i lower = _mm256_sub_epi64(total.pairs, _mm256_slli_epi64(total.upper, 32));
    return _mm256_add_epi64(lower, total.upper);
  }
  static void Sum(const Wide* four, Index flushes, Index* sums) {
    const __m256i all = Add4(Lanes(four[0]), Lanes(four[1]), Lanes(four[2]), Lanes(four[3]));
    Store(sums, _mm256_sub_epi64(all, _mm256_set1_epi64x(8 * flushes * kSumRaised)));
  }

  // One alone may be 2^31, which - 1 makes fit.
  static __m256i Widened(__m256i sums) {
    const __m256i less = _mm256_sub_epi32(sums, _mm256_set1_epi32(1));
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(less)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(less, 1)));
  }
  static void Sum(const __m256i* four, Index* sums) {
    const __m256i all = Add4(Widened(four[0]), Widened(four[1]), Widened(four[2]), Widened(four[3]));
    Store(sums, _mm256_add_epi64(all, _mm256_set1_epi64x(8)));
  }

  static __m256i Add4(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i ab = _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    const __m256i cd = _mm256_add_epi64(_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d));
    return _mm256_add_epi64(_mm256_permute2x128_si256(ab, cd, 0x20), _mm256_permute2x128_si256(ab, cd, 0x31));
  }
};

struct Bytes : Tiles {
  static constexpr Index kBytes = 1;
  static constexpr bool kFew = true;

  template <typename Within>
  static __m256i X(const char* p, Within within) {
    return W(p, within);
  }
  static __m256i W(const char* p, All) { return _mm256_cvtepi8_epi16(LoadAt<__m128i>(p, 0, 0)); }
  static __m256i W(const char* p, Index count) {
    alignas(16) char some[kColumns] = {};
    __builtin_memcpy(some, p, count);
    return _mm256_cvtepi8_epi16(LoadAt<__m128i>(some, 0, 0));
  }

  static void Sum(const __m256i* four, Index* sums) {
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(four[0], four[1]), _mm256_hadd_epi32(four[2], four[3]));
    const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    Store(sums, _mm256_cvtepi32_epi64(whole));
  }
};

void Multiply(const FixedMatmulArgs& a, Index row_begin, Index row_end) noexcept {
  if (a.wide) {
    Multiplication<Words>{a}.Run(row_begin, row_end);
  } else {
    Multiplication<Bytes>{a}.Run(row_begin, row_end);
  }
}

void Convert(const FixedConvertArgs& a, Index begin, Index end) noexcept {
  const PhiloxKeys keys(a.seed);
  ConvertBlocks(a, begin, end, [&](std::uint64_t block, std::uint32_t* u) {
    __m256i words[2][2];
    RandomWords(keys, block, words);
    for (int v = 0; v < 8; ++v) {
      const __m256i word = words[v / 4][v % 2];
      Store(u + 8 * v,
            v / 2 % 2 == 0 ? _mm256_and_si256(word, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(word, 16));
    }
  });
}

}  // namespace

const FixedMatmulKernels kFixedMatmulAvx2 = {&Multiply, &Convert};

}  // namespace tersetorch
