#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"
#include "kernels/xnor_conv2d/xnor_conv2d_simd.h"

namespace tersetorch {
namespace {

constexpr int kVectors = 4;   // of 8 filters
constexpr Index kSteps = 31;  // of at most 8 that a byte surely holds
using Counts = __m256i[kVectors];

// The bits of each byte.
__m256i CountBytes(__m256i bits) {
  const __m256i counts =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibbles = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(counts, _mm256_and_si256(bits, nibbles)),
                         _mm256_shuffle_epi8(counts, _mm256_and_si256(_mm256_srli_epi32(bits, 4), nibbles)));
}

// The sum of the bytes of each lane.
__m256i SumBytes(__m256i bytes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

struct Avx2 {
  static constexpr int kPixels = 2;

  // What the outputs of a rectangle share, for each filter of a tile.
  struct Filters {
    Filters(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps) {
      Counts outside = {};
      Index seen = (taps.row_end - taps.row_begin) * (taps.end - taps.begin);
      if (a.outside != 0) {
        seen = a.kernel_h * a.kernel_w;
        CountOutside(a, tile, taps, outside);
      }
      const __m256i columns = _mm256_set1_epi32(static_cast<std::int32_t>(seen * a.channels));
      const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      for (int v = 0; v < kVectors; ++v) {
        const Index first = 4 * (tile.first + 8 * v);
        within[v] = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<std::int32_t>(tile.count) - 8 * v), lanes);
        const auto numbers = [&](const float* array, float otherwise) {
          if (array == nullptr) return _mm256_set1_ps(otherwise);
          return _mm256_maskload_ps(reinterpret_cast<const float*>(reinterpret_cast<const char*>(array) + first),
                                    within[v]);
        };
        scale[v] = numbers(a.scale, 1);
        bias[v] = numbers(a.bias, 0);
        most[v] = _mm256_sub_epi32(columns, _mm256_slli_epi32(outside[v], 1));
        threshold[v] = _mm256_castps_si256(numbers(reinterpret_cast<const float*>(a.thresholds), 0));
      }
    }
    Counts within, most, threshold;  // most: the dot where no bit differs
    __m256 scale[kVectors], bias[kVectors];
  };

  // How many bits of the taps outside the image differ.
  static void CountOutside(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps, Counts& counts) {
    const char* w = tile.weight;
    for (Index kh = 0; kh < a.kernel_h; ++kh) {
      for (Index kw = 0; kw < a.kernel_w; ++kw) {
        if (taps.Has(kh, kw)) {
          w += a.words * kTileWordBytes;
          continue;
        }
        for (Index i = 0; i < a.words; ++i) {
          const std::uint64_t x = OutsideWord(a, i);
          for (int half = 0; half < 2; ++half) {
            const __m256i bits = _mm256_set1_epi32(static_cast<std::int32_t>(x >> 32 * half));
            for (int v = 0; v < kVectors; ++v, w += 32) {
              const __m256i differ = _mm256_xor_si256(LoadAt<__m256i>(w, 0, 0), bits);
              counts[v] = _mm256_add_epi32(counts[v], SumBytes(CountBytes(differ)));
            }
          }
        }
      }
    }
  }

  template <int kPixels>
  static void Multiply(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps, const Filters& filters,
                       const char* const (&x)[kPixels], const Index (&y)[kPixels]) {
    Counts dots[kPixels];
    for (int v = 0; v < kVectors; ++v) {
      __m256i sums[kPixels] = {}, bytes[kPixels] = {}, counts[kPixels] = {};
      Index steps = 0;
      const auto empty = [&] {
        for (int m = 0; m < kPixels; ++m) {
          counts[m] = _mm256_add_epi32(counts[m], SumBytes(bytes[m]));
          bytes[m] = _mm256_setzero_si256();
        }
        steps = 0;
      };
      for (Index r = 0; r < taps.rows; ++r) {
        for (Index u = 0; u < taps.runs; ++u) {
          const char* w = taps.weight + r * taps.weight_row + u * taps.weight_run + 32 * v;
          const Index at = r * taps.x_row + u * taps.x_run;
          for (Index i = 0; i < taps.words; ++i, w += kTileWordBytes) {
            const __m256i low = LoadAt<__m256i>(w, 0, 0), high = LoadAt<__m256i>(w, kVectors, 32);
#pragma GCC unroll 2
            for (int m = 0; m < kPixels; ++m) {
              const __m256i s = sums[m];
              const __m256i first = _mm256_xor_si256(low, _mm256_set1_epi32(LoadAt<std::int32_t>(x[m] + at, 2 * i, 4)));
              const __m256i second =
                  _mm256_xor_si256(high, _mm256_set1_epi32(LoadAt<std::int32_t>(x[m] + at, 2 * i + 1, 4)));
              const __m256i q = _mm256_xor_si256(s, first);
              const __m256i carry = _mm256_or_si256(_mm256_and_si256(s, first), _mm256_and_si256(q, second));
              bytes[m] = _mm256_add_epi8(bytes[m], CountBytes(carry));
              sums[m] = _mm256_xor_si256(q, second);
            }
            if (++steps == kSteps) empty();
          }
        }
      }
      empty();
      for (int m = 0; m < kPixels; ++m) {
        const __m256i count = _mm256_add_epi32(_mm256_slli_epi32(counts[m], 1), SumBytes(CountBytes(sums[m])));
        dots[m][v] = _mm256_sub_epi32(filters.most[v], _mm256_slli_epi32(count, 1));
      }
    }
    for (int m = 0; m < kPixels; ++m) StorePixel(a, tile, filters, y[m], dots[m]);
  }

  static void StorePixel(const XnorConv2dArgs& a, const XnorTile& tile, const Filters& filters, Index pixel,
                         const Counts& dots) {
    std::uint32_t bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      const Index at = 4 * (pixel * tile.outputs + tile.first + 8 * v);
      if (a.dots != nullptr) {
        _mm256_maskstore_epi32(reinterpret_cast<int*>(reinterpret_cast<char*>(a.dots) + at), filters.within[v],
                               dots[v]);
      } else if (a.floats != nullptr) {
        const __m256 number = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[v]), filters.scale[v], filters.bias[v]);
        _mm256_maskstore_ps(reinterpret_cast<float*>(reinterpret_cast<char*>(a.floats) + at), filters.within[v],
                            number);
      } else {
        const __m256i ones = _mm256_and_si256(_mm256_cmpgt_epi32(filters.threshold[v], dots[v]), filters.within[v]);
        bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(ones))) << 8 * v;
      }
    }
    if (a.bits != nullptr) StoreBits(a, tile, pixel, bits);
  }
};

}  // namespace

const XnorConv2dVariant kXnorConv2dAvx2 = &ConvolveTiles<Avx2>;

}  // namespace tersetorch
