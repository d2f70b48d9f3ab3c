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
  using Register = __m512i;
  using Wide = __m512i;  // of 64 bits: + adds those
  static constexpr Index kLanes = 16;
  static constexpr int kSamples = 4;

  static Register Zero() { return _mm512_setzero_si512(); }

  // What sums - 1 are in 64 bits, two lanes of 32 in one.
  static Wide Widened(Register sums) {
    const __m512i less = _mm512_sub_epi32(sums, _mm512_set1_epi32(1));
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(less)),
                            _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(less, 1)));
  }

  static void Sum(Wide a, Wide b, Wide c, Wide d, Index* sums) {
    const __m512i ab = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m512i cd = _mm512_add_epi64(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
    const __m512i low = _mm512_shuffle_i64x2(ab, cd, 0x44), high = _mm512_shuffle_i64x2(ab, cd, 0xee);
    const __m512i both = _mm512_add_epi64(low, high);  // ab, ab, cd, cd
    const __m512i other = _mm512_shuffle_i64x2(both, both, 0xb1), whole = _mm512_add_epi64(both, other);
    Store(sums, _mm512_castsi512_si256(_mm512_shuffle_i64x2(whole, whole, 0x08)));
  }
};

struct Words : Sums {
  static constexpr Index kColumns = 32, kBytes = 2, kSteps = 0;

  static Index Raised(const char*, Index) { return 0; }
  static __mmask32 First(Index count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }
  static __m512i X(const char* p, Index count) { return W(p, count); }
  static __m512i W(const char* p, Index count) {
    return count >= kColumns ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(First(count), p);
  }
  static __m512i Add(__m512i sums, __m512i x, __m512i w) { return _mm512_dpwssd_epi32(sums, x, w); }

  static Index Largest(const void* numbers, Index count) {
    const char* p = static_cast<const char*>(numbers);
    __m512i largest = _mm512_setzero_si512();
    for (Index i = 0; i < count; i += kColumns) {
      largest = _mm512_max_epu16(largest, _mm512_abs_epi16(W(p + 2 * i, count - i)));
    }
    std::uint16_t of_lane[32], most = 0;
    Store(of_lane, largest);
    for (const std::uint16_t one : of_lane) most = one > most ? one : most;
    return most;
  }
};

struct Bytes : Sums {
  // A lane adds 4 products of at most 255 * 128 a step.
  static constexpr Index kColumns = 64, kBytes = 1, kSteps = 16000;

  static __mmask64 First(Index count) { return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1; }
  static __m512i X(const char* p, Index count) { return _mm512_xor_si512(W(p, count), _mm512_set1_epi8(-128)); }
  static __m512i W(const char* p, Index count) {
    return count >= kColumns ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(First(count), p);
  }
  static __m512i Add(__m512i sums, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sums, x, w); }
  static Index Largest(const void*, Index) { return 0; }
  static Index Raised(const char* w, Index columns) {
    __m512i sums = Zero();
    for (Index c = 0; c < columns; c += kColumns) {
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), W(w + c, columns - c));
    }
    return Index{128} * _mm512_reduce_add_epi32(sums);
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
