#include <immintrin.h>

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_simd.h"

namespace tersetorch {
namespace {

// 24 sums in registers: of intrinsics GCC 12 keeps some in memory, hence the products in assembly.
struct Tiles {
  using Register = __m512i;
  static constexpr int kRegisters = 1, kPanels = 4, kSamples = 6;

  static __m512i X(const char* p) { return _mm512_set1_epi32(LoadAt<std::int32_t>(p, 0, 0)); }
  static __m512i W(const char* p, int) { return _mm512_loadu_si512(p); }
  static __m512i Sum(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static void Widen(const __m512i (&sums)[1], const Index* from, Index* to) {
    const __m256i half[] = {_mm512_castsi512_si256(sums[0]), _mm512_extracti64x4_epi64(sums[0], 1)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Store(to + 8 * i, _mm512_add_epi64(_mm512_cvtepi32_epi64(half[i]), LoadAt<__m512i>(from, 8 * i, 8)));
    }
  }
};

struct Words : Tiles {
  static __m512i Add(__m512i sums, __m512i x, __m512i w) {
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
  }
};

struct Bytes : Tiles {
  static __m512i Add(__m512i sums, __m512i x, __m512i w) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    return sums;
  }
};

void Multiply(const FixedMatmulArgs& a, Index panel, Index panels) noexcept {
  a.wide ? Multiplication<Words>{a}.Run(panel, panels) : Multiplication<Bytes>{a}.Run(panel, panels);
}

struct Longs {
  static constexpr Index kLanes = 8;

  explicit Longs(const FixedConversion& c)
      : half(_mm512_set1_epi64(c.half)),
        lowest(_mm256_set1_epi32(static_cast<std::int32_t>(c.lowest))),
        highest(_mm256_set1_epi32(static_cast<std::int32_t>(c.highest))),
        down(_mm_cvtsi32_si128(c.down)),
        less(_mm_cvtsi32_si128(c.less)),
        last(_mm_cvtsi32_si128(c.last)) {}
  static __m512i Load(const Index* p) { return _mm512_loadu_si512(p); }
  static __m512i Add(__m512i a, __m512i b) { return _mm512_add_epi64(a, b); }
  static __m512i Times256(__m512i a) { return _mm512_slli_epi64(a, 8); }
  __m512i Shifted(__m512i sums) const { return _mm512_sra_epi64(_mm512_add_epi64(sums, half), down); }
  __m256i Kept(__m512i k) const {
    return _mm256_min_epi32(_mm256_max_epi32(_mm512_cvtsepi64_epi32(k), lowest), highest);
  }
  __m256i Nearest(__m512i sums) const { return Kept(Shifted(sums)); }
  __m256i Drawn(__m512i sums, const std::uint32_t* u) const {
    const __m512i bits = _mm512_srl_epi64(_mm512_cvtepu32_epi64(LoadAt<__m256i>(u, 0, 0)), less);
    return Kept(_mm512_sra_epi64(_mm512_add_epi64(Shifted(sums), bits), last));
  }

  __m512i half;
  __m256i lowest, highest;
  __m128i down, less, last;
};

void Convert(const FixedConvertArgs& a, Index begin, Index end) noexcept {
  const PhiloxKeys keys(a.seed);
  ConvertBlocks<Longs>(a, begin, end, [&](std::uint64_t block, std::uint32_t* u) {
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
