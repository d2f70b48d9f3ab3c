#include <immintrin.h>

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul/fixed_matmul_simd.h"

namespace tersetorch {
namespace {

struct Sums {
  using Register = __m256i;
  using Wide = __m256i;  // of 64 bits: + adds those
  static constexpr Index kColumns = 16, kLanes = 8;
  static constexpr int kSamples = 2;

  static Index Raised(const char*, Index) { return 0; }
  static Register Zero() { return _mm256_setzero_si256(); }
  static Register Add(Register sums, Register x, Register w) { return _mm256_add_epi32(sums, _mm256_madd_epi16(x, w)); }

  // What sums - 1 are in 64 bits, two lanes of 32 in one.
  static Wide Widened(Register sums) {
    const __m256i less = _mm256_sub_epi32(sums, _mm256_set1_epi32(1));
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(less)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(less, 1)));
  }

  static void Sum(Wide a, Wide b, Wide c, Wide d, Index* sums) {
    const __m256i ab = _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    const __m256i cd = _mm256_add_epi64(_mm256_unpacklo_epi64(c, d), _mm256_unpackhi_epi64(c, d));
    Store(sums, _mm256_add_epi64(_mm256_permute2x128_si256(ab, cd, 0x20), _mm256_permute2x128_si256(ab, cd, 0x31)));
  }
};

struct Words : Sums {
  static constexpr Index kBytes = 2, kSteps = 0;

  static __m256i X(const char* p, Index count) { return W(p, count); }
  static __m256i W(const char* p, Index count) {
    if (count >= kColumns) return LoadAt<__m256i>(p, 0, 0);
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
};

struct Bytes : Sums {
  // A lane adds 2 products of at most 128 * 128 a step.
  static constexpr Index kBytes = 1, kSteps = 65000;

  static __m256i X(const char* p, Index count) { return W(p, count); }
  static __m256i W(const char* p, Index count) {
    if (count >= kColumns) return _mm256_cvtepi8_epi16(LoadAt<__m128i>(p, 0, 0));
    alignas(16) char some[kColumns] = {};
    __builtin_memcpy(some, p, count);
    return _mm256_cvtepi8_epi16(LoadAt<__m128i>(some, 0, 0));
  }
  static Index Largest(const void*, Index) { return 0; }
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
