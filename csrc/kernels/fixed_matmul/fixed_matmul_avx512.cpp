#include <immintrin.h>

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_simd.h"

namespace tersetorch {
namespace {

// 16 sums in registers: of intrinsics GCC 12 keeps some in memory, hence the products in assembly; with 24 of them it
// puts addresses into vector registers.
struct Tiles {
  using Register = __m512i;
  static constexpr int kRows = 8, kSamples = 2;
};

struct Words : Tiles {
  static constexpr Index kColumns = 32, kBytes = 2;
  static constexpr bool kFew = false;

  static __mmask32 First(Index count) { return ~__mmask32{0} >> (count < kColumns ? kColumns - count : 0); }
  template <typename Within>
  static __m512i X(const char* p, Within within) {
    return W(p, within);
  }
  static __m512i W(const char* p, All) { return _mm512_loadu_si512(p); }
  static __m512i W(const char* p, __mmask32 within) { return _mm512_maskz_loadu_epi16(within, p); }
  static __m512i Add(__m512i sums, __m512i x, __m512i w) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
  }
  static Index Raised(const char*, Index) { return 0; }

  static Index Largest(const void* numbers, Index count) {
    const char* p = static_cast<const char*>(numbers);
    __m512i largest = _mm512_setzero_si512();
    for (Index i = 0; i < count; i += kColumns) {
      largest = _mm512_max_epu16(largest, _mm512_abs_epi16(W(p + 2 * i, First(count - i))));
    }
    std::uint16_t of_lane[32], most = 0;
    Store(of_lane, largest);
    for (const std::uint16_t one : of_lane) most = one > most ? one : most;
    return most;
  }

  // Sums of 32 bits, raised to be positive: pairs of them as they stand, modulo 2^64, and the upper ones.
  struct Wide {
    __m512i pairs, upper;
  };
  static void Accumulate(Wide& total, __m512i sums) {
    const __m512i positive = _mm512_add_epi32(sums, _mm512_set1_epi32(kSumRaised));
    total.pairs = _mm512_add_epi64(total.pairs, positive);
    total.upper = _mm512_add_epi64(total.upper, _mm512_srli_epi64(positive, 32));
  }
  static __m512i Lanes(const Wide& total) {
    const __m512i lower = _mm512_sub_epi64(total.pairs, _mm512_slli_epi64(total.upper, 32));
    return _mm512_add_epi64(lower, total.upper);
  }
  static void Sum(const Wide* four, Index flushes, Index* sums) {
    const __m256i all = Add4(Lanes(four[0]), Lanes(four[1]), Lanes(four[2]), Lanes(four[3]));
    Store(sums, _mm256_sub_epi64(all, _mm256_set1_epi64x(16 * flushes * kSumRaised)));
  }

  // One alone may be 2^31, which - 1 makes fit.
  static __m512i Widened(__m512i sums) {
    const __m512i less = _mm512_sub_epi32(sums, _mm512_set1_epi32(1));
    const __m512i lower = _mm512_srai_epi64(_mm512_slli_epi64(less, 32), 32);
    return _mm512_add_epi64(lower, _mm512_srai_epi64(less, 32));
  }
  static void Sum(const __m512i* four, Index* sums) {
    const __m256i all = Add4(Widened(four[0]), Widened(four[1]), Widened(four[2]), Widened(four[3]));
    Store(sums, _mm256_add_epi64(all, _mm256_set1_epi64x(16)));
  }

  static __m256i Add4(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m512i cd = _mm512_add_epi64(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
    const __m512i both = _mm512_add_epi64(_mm512_shuffle_i64x2(ab, cd, 0x44), _mm512_shuffle_i64x2(ab, cd, 0xee));
    const __m512i whole = _mm512_add_epi64(both, _mm512_shuffle_i64x2(both, both, 0xb1));
    return _mm512_castsi512_si256(_mm512_shuffle_i64x2(whole, whole, 0x08));
  }
};

struct Bytes : Tiles {
  static constexpr Index kColumns = 64, kBytes = 1;
  static constexpr bool kFew = true;

  static __mmask64 First(Index count) { return ~__mmask64{0} >> (count < kColumns ? kColumns - count : 0); }
  template <typename Within>
  static __m512i X(const char* p, Within within) {
    return _mm512_xor_si512(W(p, within), _mm512_set1_epi8(-128));
  }
  static __m512i W(const char* p, All) { return _mm512_loadu_si512(p); }
  static __m512i W(const char* p, __mmask64 within) { return _mm512_maskz_loadu_epi8(within, p); }
  static __m512i Add(__m512i sums, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
  }
  // x is raised by 128.
  static Index Raised(const char* w, Index columns) {
    __m512i sums = _mm512_setzero_si512();
    for (Index c = 0; c < columns; c += kColumns) {
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), W(w + c, First(columns - c)));
    }
    return Index{128} * _mm512_reduce_add_epi32(sums);
  }

  static void Sum(const __m512i* four, Index* sums) {
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(four[0], four[1]), _mm512_unpackhi_epi32(four[0], four[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(four[2], four[3]), _mm512_unpackhi_epi32(four[2], four[3]));
    const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    const __m128i whole = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
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
    __m512i words[2];
    RandomWords(keys, block, words);
    for (int v = 0; v < 4; ++v) {
      const __m512i word = words[v / 2];
      Store(u + 16 * v, v % 2 == 0 ? _mm512_and_si512(word, _mm512_set1_epi32(0xffff)) : _mm512_srli_epi32(word, 16));
    }
  });
}

}  // namespace

const FixedMatmulKernels kFixedMatmulAvx512 = {&Multiply, &Convert};

}  // namespace tersetorch
