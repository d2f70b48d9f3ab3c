#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch {
namespace {

constexpr int kVectors = 4;  // of 8 rows
constexpr int kXor = 0x96;   // of three
// Of two words u and v, added to s: where q = s ^ u and t = q ^ v, the majority of s, u and v.
constexpr int kCarry = 0x74;

__m512i Splat(const char* x, Index i) { return _mm512_set1_epi64(LoadAt<std::int64_t>(x, i, 8)); }

// How many bits differ, of kSamples samples with a tile's rows, as int32 [kSamples][32].
template <int kSamples>
void CountTile(const char* weight, const char* x, Index words, __m512i (&counts)[kSamples][2]) {
  __m512i sums[kSamples][kVectors] = {}, carries[kSamples][kVectors] = {};
  Index i = 0;
  for (; i + 2 <= words; i += 2) {
    __m512i first[kSamples], second[kSamples];
#pragma GCC unroll 2
    for (int m = 0; m < kSamples; ++m) {
      first[m] = Splat(x, m * words + i);
      second[m] = Splat(x, m * words + i + 1);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const char* w = weight + (i * kVectors + v) * 64;
      const __m512i w_first = _mm512_loadu_si512(w), w_second = _mm512_loadu_si512(w + kVectors * 64);
      // A single sample waits for memory; the hardware's own prefetching ends at every page.
      if (kSamples == 1) {
        _mm_prefetch(w + 4096, _MM_HINT_T0);
        _mm_prefetch(w + 4096 + kVectors * 64, _MM_HINT_T0);
      }
#pragma GCC unroll 2
      for (int m = 0; m < kSamples; ++m) {
        const __m512i s = sums[m][v];
        const __m512i q = _mm512_ternarylogic_epi64(s, w_first, first[m], kXor);
        const __m512i t = _mm512_ternarylogic_epi64(q, w_second, second[m], kXor);
        const __m512i carry = _mm512_ternarylogic_epi64(s, q, t, kCarry);
        carries[m][v] = _mm512_add_epi64(carries[m][v], _mm512_popcnt_epi64(carry));
        sums[m][v] = t;
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < kSamples; ++m) {
    __m256i halves[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      __m512i count = _mm512_add_epi64(_mm512_slli_epi64(carries[m][v], 1), _mm512_popcnt_epi64(sums[m][v]));
      if (i < words) {
        const __m512i last = _mm512_loadu_si512(weight + (i * kVectors + v) * 64);
        count = _mm512_add_epi64(count, _mm512_popcnt_epi64(_mm512_xor_si512(last, Splat(x, m * words + i))));
      }
      halves[v] = _mm512_cvtepi64_epi32(count);
    }
    counts[m][0] = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
    counts[m][1] = _mm512_inserti64x4(_mm512_castsi256_si512(halves[2]), halves[3], 1);
  }
}

// The rows of one half of a tile, for one sample.
struct Half {
  Index row;  // the first
  __mmask16 within;
  __m512 scale, bias;
  __m512i thresholds;
};

Half HalfAt(const XnorMatmulArgs& a, Index row) {
  const Index left = a.rows - row;
  Half half{row, static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1), {}, {}, {}};
  const auto numbers = [&](const float* array, float otherwise) {
    return array == nullptr ? _mm512_set1_ps(otherwise)
                            : _mm512_maskz_loadu_ps(half.within, reinterpret_cast<const char*>(array) + 4 * row);
  };
  half.scale = numbers(a.scale, 1);
  half.bias = numbers(a.bias, 0);
  if (a.thresholds != nullptr) {
    half.thresholds = _mm512_maskz_loadu_epi32(half.within, reinterpret_cast<const char*>(a.thresholds) + 4 * row);
  }
  return half;
}

void StoreHalf(const XnorMatmulArgs& a, const Half& half, Index n, __m512i count) {
  const __m512i dot =
      _mm512_sub_epi32(_mm512_set1_epi32(static_cast<std::int32_t>(a.columns)), _mm512_slli_epi32(count, 1));
  const Index at = 4 * (n * a.rows + half.row);
  if (a.dots != nullptr) {
    _mm512_mask_storeu_epi32(reinterpret_cast<char*>(a.dots) + at, half.within, dot);
  } else if (a.floats != nullptr) {
    const __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), half.scale, half.bias);
    _mm512_mask_storeu_ps(reinterpret_cast<char*>(a.floats) + at, half.within, y);
  } else {
    const std::uint16_t bits = _mm512_mask_cmplt_epi32_mask(half.within, dot, half.thresholds);
    Store(reinterpret_cast<char*>(a.bits) + (n * ((a.rows + 63) / 64) * 64 + half.row) / 8, bits);
  }
}

template <int kSamples>
void MultiplyTile(const XnorMatmulArgs& a, const char* weight, const Half (&halves)[2], Index n) {
  __m512i counts[kSamples][2];
  CountTile<kSamples>(weight, reinterpret_cast<const char*>(a.x) + 8 * n * a.words, a.words, counts);
  for (int m = 0; m < kSamples; ++m) {
    for (int h = 0; h < 2; ++h) StoreHalf(a, halves[h], n + m, counts[m][h]);
  }
}

void Multiply(const XnorMatmulArgs& a, Index tile_begin, Index tile_end) noexcept {
  // The second half of the last word of bits, where no tile has it.
  const bool odd = a.bits != nullptr && tile_end == XnorTiles(a.rows) && tile_end % 2 == 1;
  for (Index tile = tile_begin; tile < tile_end; ++tile) {
    const char* weight = reinterpret_cast<const char*>(a.weight) + 8 * tile * a.words * kXnorRows;
    const Half halves[2] = {HalfAt(a, tile * kXnorRows), HalfAt(a, tile * kXnorRows + 16)};
    Index n = 0;
    for (; n + 2 <= a.samples; n += 2) MultiplyTile<2>(a, weight, halves, n);
    if (n < a.samples) MultiplyTile<1>(a, weight, halves, n);
  }
  for (Index n = 0; odd && n < a.samples; ++n) {
    Store(reinterpret_cast<char*>(a.bits) + 8 * ((n + 1) * ((a.rows + 63) / 64)) - 4, std::uint32_t{0});
  }
}

}  // namespace

const XnorMatmulVariant kXnorMatmulAvx512 = &Multiply;

}  // namespace tersetorch
