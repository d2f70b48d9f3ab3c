#include <immintrin.h>

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_simd.h"

namespace tersetorch {
namespace {

// 12 sums in registers.
struct Tiles {
  using Register = __m256i;
  static constexpr int kPanels = 1;

  static __m256i Add(__m256i sums, __m256i x, __m256i w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }
  static __m256i Sum(__m256i a, __m256i b) { return _mm256_add_epi32(a, b); }
  // 8 rows.
  static void Widen8(__m256i sums, const Index* from, Index* to) {
    const __m128i half[] = {_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Store(to + 4 * i, _mm256_add_epi64(_mm256_cvtepi32_epi64(half[i]), LoadAt<__m256i>(from, 4 * i, 8)));
    }
  }
};

struct Words : Tiles {
  static constexpr int kRegisters = 2, kSamples = 6;

  static __m256i X(const char* p) { return _mm256_set1_epi32(LoadAt<std::int32_t>(p, 0, 0)); }
  static __m256i W(const char* p, int j) { return LoadAt<__m256i>(p, 32 * j, 1); }
  static void Widen(const __m256i (&sums)[2], const Index* from, Index* to) {
    Widen8(sums[0], from, to);
    Widen8(sums[1], from + 8, to + 8);
  }
};

// Widened to 16 bits: a register has 4 rows, of each of which 2 lanes are added at the end.
struct Bytes : Tiles {
  static constexpr int kRegisters = 4, kSamples = 3;

  static __m256i X(const char* p) { return _mm256_cvtepu8_epi16(_mm_set1_epi32(LoadAt<std::int32_t>(p, 0, 0))); }
  static __m256i W(const char* p, int j) { return _mm256_cvtepi8_epi16(LoadAt<__m128i>(p, 16 * j, 1)); }
  static void Widen(const __m256i (&sums)[4], const Index* from, Index* to) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i rows = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[2 * i], sums[2 * i + 1]), 0xd8);
      Widen8(rows, from + 8 * i, to + 8 * i);
    }
  }
};

void Multiply(const FixedMatmulArgs& a, Index panel, Index panels) noexcept {
  a.wide ? Multiplication<Words>{a}.Run(panel, panels) : Multiplication<Bytes>{a}.Run(panel, panels);
}

struct Longs {
  static constexpr Index kLanes = 4;

  explicit Longs(const FixedConversion& c)
      : half(_mm256_set1_epi64x(c.half)),
        lowest(_mm256_set1_epi64x(c.lowest)),
        highest(_mm256_set1_epi64x(c.highest)),
        down(c.down),
        last(c.last),
        less(_mm_cvtsi32_si128(c.less)) {}
  static __m256i Load(const Index* p) { return LoadAt<__m256i>(p, 0, 0); }
  static __m256i Add(__m256i a, __m256i b) { return _mm256_add_epi64(a, b); }
  static __m256i Times256(__m256i a) { return _mm256_slli_epi64(a, 8); }
  __m256i Shifted(__m256i sums) const { return down(_mm256_add_epi64(sums, half)); }
  __m128i Kept(__m256i k) const {
    k = _mm256_blendv_epi8(k, lowest, _mm256_cmpgt_epi64(lowest, k));
    k = _mm256_blendv_epi8(k, highest, _mm256_cmpgt_epi64(k, highest));
    return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(k, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6)));
  }
  __m128i Nearest(__m256i sums) const { return Kept(Shifted(sums)); }
  __m128i Drawn(__m256i sums, const std::uint32_t* u) const {
    const __m256i bits = _mm256_srl_epi64(_mm256_cvtepu32_epi64(LoadAt<__m128i>(u, 0, 0)), less);
    return Kept(last(_mm256_add_epi64(Shifted(sums), bits)));
  }

  // AVX2 shifts unsigned numbers only: signed ones raised by 2^63.
  struct Shift {
    explicit Shift(int bits) : by(_mm_cvtsi32_si128(bits)), zero(_mm256_srl_epi64(Raised(), by)) {}
    static __m256i Raised() { return _mm256_set1_epi64x(Index{-1} - 0x7fffffffffffffff); }
    __m256i operator()(__m256i k) const {
      return _mm256_sub_epi64(_mm256_srl_epi64(_mm256_xor_si256(k, Raised()), by), zero);
    }
    __m128i by;
    __m256i zero;
  };

  __m256i half, lowest, highest;
  Shift down, last;
  __m128i less;
};

void Convert(const FixedConvertArgs& a, Index begin, Index end) noexcept {
  const PhiloxKeys keys(a.seed);
  ConvertBlocks<Longs>(a, begin, end, [&](std::uint64_t block, std::uint32_t* u) {
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
