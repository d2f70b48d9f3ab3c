#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {
namespace {

constexpr int kVectors = 8;   // of 4 rows
constexpr int kTogether = 2;  // vectors whose counts stay in registers, for each of 2 samples
constexpr Index kSteps = 31;  // of at most 8 that a byte surely holds

__m256i Splat(const char* x, Index i) { return _mm256_set1_epi64x(LoadAt<std::int64_t>(x, i, 8)); }

// The bits of each byte.
__m256i CountBytes(__m256i bits) {
  const __m256i counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibbles = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(bits, nibbles)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi32(bits, 4), nibbles)));
}

__m256i SumBytes(__m256i bytes) { return _mm256_sad_epu8(bytes, _mm256_setzero_si256()); }

// How many bits differ, of kSamples samples with kTogether vectors of rows, as int64 [kSamples][kTogether][4].
template <int kSamples>
void Count(const char* weight, const char* x, Index words, __m256i (&counts)[kSamples][kTogether]) {
  __m256i sums[kSamples][kTogether] = {};
  for (auto& of_sample : counts) {
    for (__m256i& count : of_sample) count = _mm256_setzero_si256();
  }
  Index i = 0;
  while (i + 2 <= words) {
    __m256i carries[kSamples][kTogether] = {};
    const Index end = i + 2 * kSteps < words - 1 ? i + 2 * kSteps : words - 1;
    for (; i < end; i += 2) {
#pragma GCC unroll 2
      for (int v = 0; v < kTogether; ++v) {
        const __m256i w_first = LoadAt<__m256i>(weight, i * kVectors + v, 32);
        const __m256i w_second = LoadAt<__m256i>(weight, (i + 1) * kVectors + v, 32);
#pragma GCC unroll 2
        for (int m = 0; m < kSamples; ++m) {
          const __m256i s = sums[m][v];
          const __m256i first = _mm256_xor_si256(w_first, Splat(x, m * words + i));
          const __m256i second = _mm256_xor_si256(w_second, Splat(x, m * words + i + 1));
          const __m256i q = _mm256_xor_si256(s, first);
          const __m256i carry = _mm256_or_si256(_mm256_and_si256(s, first), _mm256_and_si256(q, second));
          carries[m][v] = _mm256_add_epi8(carries[m][v], CountBytes(carry));
          sums[m][v] = _mm256_xor_si256(q, second);
        }
      }
    }
    for (int m = 0; m < kSamples; ++m) {
      for (int v = 0; v < kTogether; ++v) {
        counts[m][v] = _mm256_add_epi64(counts[m][v], _mm256_slli_epi64(SumBytes(carries[m][v]), 1));
      }
    }
  }
  for (int m = 0; m < kSamples; ++m) {
    for (int v = 0; v < kTogether; ++v) {
      __m256i bytes = CountBytes(sums[m][v]);
      if (i < words) {
        const __m256i last = LoadAt<__m256i>(weight, i * kVectors + v, 32);
        bytes = _mm256_add_epi8(bytes, CountBytes(_mm256_xor_si256(last, Splat(x, m * words + i))));
      }
      counts[m][v] = _mm256_add_epi64(counts[m][v], SumBytes(bytes));
    }
  }
}

// y of 32 rows from `row` on for sample n, of which as many bits differ.
void StoreTile(const XnorMatmulArgs& a, Index n, Index row, const std::int64_t (&counts)[kXnorRows]) {
  const Index left = a.rows - row < kXnorRows ? a.rows - row : kXnorRows;
  std::uint32_t bits = 0;
  for (Index r = 0; r < left; ++r) {
    const auto dot = static_cast<std::int32_t>(a.columns - 2 * counts[r]);
    const Index at = 4 * (n * a.rows + row + r);
    if (a.dots != nullptr) {
      Store(reinterpret_cast<char*>(a.dots) + at, dot);
    } else if (a.floats != nullptr) {
      const float scale = a.scale == nullptr ? 1.0f : LoadAt<float>(a.scale, row + r, 4);
      const float bias = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, row + r, 4);
      Store(reinterpret_cast<char*>(a.floats) + at, __builtin_fmaf(static_cast<float>(dot), scale, bias));
    } else {
      bits |= std::uint32_t{dot < LoadAt<std::int32_t>(a.thresholds, row + r, 4)} << r;
    }
  }
  if (a.bits != nullptr) Store(reinterpret_cast<char*>(a.bits) + (n * ((a.rows + 63) / 64) * 64 + row) / 8, bits);
}

template <int kSamples>
void MultiplyTile(const XnorMatmulArgs& a, const char* weight, Index tile, Index n) {
  std::int64_t counts[kSamples][kXnorRows];
  for (int v = 0; v < kVectors; v += kTogether) {
    __m256i part[kSamples][kTogether];
    Count<kSamples>(weight + 32 * v, reinterpret_cast<const char*>(a.x) + 8 * n * a.words, a.words, part);
    for (int m = 0; m < kSamples; ++m) {
      for (int k = 0; k < kTogether; ++k) Store(counts[m] + 4 * (v + k), part[m][k]);
    }
  }
  for (int m = 0; m < kSamples; ++m) StoreTile(a, n + m, tile * kXnorRows, counts[m]);
}

void Multiply(const XnorMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
  // The second half of the last word of bits, where no tile has it.
  const bool odd = a.bits != nullptr && tile_end == XnorTiles(a.rows) && tile_end % 2 == 1;
  for (Index tile = tile_begin; tile < tile_end; ++tile) {
    const char* weight = reinterpret_cast<const char*>(a.weight) + 8 * tile * a.words * kXnorRows;
    Index n = 0;
    for (; n + 2 <= a.samples; n += 2) MultiplyTile<2>(a, weight, tile, n);
    if (n < a.samples) MultiplyTile<1>(a, weight, tile, n);
  }
  for (Index n = 0; odd && n < a.samples; ++n) {
    Store(reinterpret_cast<char*>(a.bits) + 8 * ((n + 1) * ((a.rows + 63) / 64)) - 4, std::uint32_t{0});
  }
}

}  // namespace

const XnorMatmulVariant kXnorMatmulAvx2 = &Multiply;

}  // namespace tersetorch
