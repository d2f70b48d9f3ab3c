#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"
#include "kernels/xnor_conv2d/xnor_conv2d_simd.h"

namespace tersetorch {
namespace {

constexpr int kVectors = 2;  // of 16 filters

// Adds the bits that differ in two half words u = low ^ x[0] and v = high ^ x[1] to the one bit `sum` that each lane
// keeps of earlier ones, and counts the carry: with q = sum ^ u and t = q ^ v, carry = majority(sum, u, v). By hand,
// because GCC 12 spends as many copies of registers as operations and spills some; a broadcast into a register that
// vpternlogd may overwrite saves one.
inline void Add(const char* x, __m512i low, __m512i high, __m512i& sum, __m512i& carries) {
  __m512i q, t;
  asm("vpbroadcastd %[first], %[q]\n\t"
      "vpbroadcastd %[second], %[t]\n\t"
      "vpternlogd $0x96, %[low], %[sum], %[q]\n\t"
      "vpternlogd $0x96, %[high], %[q], %[t]\n\t"
      "vpternlogd $0x74, %[t], %[q], %[sum]\n\t"
      "vpopcntd %[sum], %[sum]\n\t"
      "vpaddd %[sum], %[carries], %[carries]\n\t"
      "vmovdqa64 %[t], %[sum]"
      : [sum] "+v"(sum), [carries] "+v"(carries), [q] "=&v"(q), [t] "=&v"(t)
      : [low] "v"(low), [high] "v"(high), [first] "m"(x[0]), [second] "m"(x[4]));
}

struct Avx512 {
  static constexpr int kPixels = 4;

  // What the outputs of a rectangle share, for each filter of a tile.
  struct Filters {
    Filters(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps) {
      __m512i outside[kVectors] = {};
      Index seen = (taps.row_end - taps.row_begin) * (taps.end - taps.begin);
      if (a.outside != 0) {
        seen = a.kernel_h * a.kernel_w;
        CountOutside(a, tile, taps, outside);
      }
      const __m512i columns = _mm512_set1_epi32(static_cast<std::int32_t>(seen * a.channels));
      for (int v = 0; v < kVectors; ++v) {
        const Index left = tile.count - 16 * v, first = 4 * (tile.first + 16 * v);
        within[v] = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
        const auto numbers = [&](const float* array, float otherwise) {
          return array == nullptr ? _mm512_set1_ps(otherwise)
                                  : _mm512_maskz_loadu_ps(within[v], reinterpret_cast<const char*>(array) + first);
        };
        scale[v] = numbers(a.scale, 1);
        bias[v] = numbers(a.bias, 0);
        most[v] = _mm512_sub_epi32(columns, _mm512_slli_epi32(outside[v], 1));
        if (a.thresholds == nullptr) continue;
        // dot >= threshold where count <= (most - threshold) / 2, rounded down, of numbers whose difference may not
        // fit.
        const __m512i threshold =
            _mm512_maskz_loadu_epi32(within[v], reinterpret_cast<const char*>(a.thresholds) + first);
        const __m512i odd = _mm512_and_si512(_mm512_andnot_si512(most[v], threshold), _mm512_set1_epi32(1));
        limit[v] =
            _mm512_sub_epi32(_mm512_sub_epi32(_mm512_srai_epi32(most[v], 1), _mm512_srai_epi32(threshold, 1)), odd);
      }
    }
    __mmask16 within[kVectors];
    __m512 scale[kVectors], bias[kVectors];
    __m512i most[kVectors], limit[kVectors];  // the dot where no bit differs; as many bits as leave a sign of +1
  };

  // How many bits of the taps outside the image differ.
  static void CountOutside(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps,
                           __m512i (&counts)[kVectors]) {
    const char* w = tile.weight;
    for (Index kh = 0; kh < a.kernel_h; ++kh) {
      for (Index kw = 0; kw < a.kernel_w; ++kw) {
        if (taps.Has(kh, kw)) {
          w += a.words * kTileWordBytes;
          continue;
        }
        for (Index i = 0; i < a.words; ++i, w += kTileWordBytes) {
          const std::uint64_t x = OutsideWord(a, i);
          for (int half = 0; half < 2; ++half) {
            const __m512i bits = _mm512_set1_epi32(static_cast<std::int32_t>(x >> 32 * half));
            for (int v = 0; v < kVectors; ++v) {
              const __m512i differ = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * (kVectors * half + v)), bits);
              counts[v] = _mm512_add_epi32(counts[v], _mm512_popcnt_epi32(differ));
            }
          }
        }
      }
    }
  }

  // How many bits of the taps differ, for some pixels. A function of its own, whose loop has the registers to itself.
  template <int kPixels>
  __attribute__((noinline)) static void Count(const XnorTaps& taps, const char* const (&x)[kPixels],
                                              __m512i (&counts)[kPixels][kVectors]) {
    __m512i sums[kPixels][kVectors] = {}, carries[kPixels][kVectors] = {};
    const char* row_weight = taps.weight;
    const Index rows = taps.rows, runs = taps.runs, words = taps.words;
    for (Index r = 0; r < rows; ++r) {
      for (Index u = 0; u < runs; ++u) {
        const char* w = row_weight + u * taps.weight_run;
        Index at = r * taps.x_row + u * taps.x_run;
        for (const char* end = w + words * kTileWordBytes; w < end; w += kTileWordBytes, at += kWordBytes) {
          __m512i low[kVectors], high[kVectors];
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) {
            low[v] = _mm512_loadu_si512(w + 64 * v);
            high[v] = _mm512_loadu_si512(w + 64 * (kVectors + v));
          }
#pragma GCC unroll 4
          for (int m = 0; m < kPixels; ++m) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
              Add(x[m] + at, low[v], high[v], sums[m][v], carries[m][v]);
            }
          }
        }
      }
      row_weight += taps.weight_row;
    }
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const __m512i ones = _mm512_popcnt_epi32(sums[m][v]);
        counts[m][v] = _mm512_add_epi32(_mm512_add_epi32(carries[m][v], carries[m][v]), ones);
      }
    }
  }

  template <int kPixels>
  static void Multiply(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps, const Filters& filters,
                       const char* const (&x)[kPixels], const Index (&y)[kPixels]) {
    __m512i counts[kPixels][kVectors];
    Count(taps, x, counts);
    for (int m = 0; m < kPixels; ++m) StorePixel(a, tile, filters, y[m], counts[m]);
  }

  static void StorePixel(const XnorConv2dArgs& a, const XnorTile& tile, const Filters& filters, Index pixel,
                         const __m512i (&counts)[kVectors]) {
    if (a.bits != nullptr) {
      const std::uint32_t low = _mm512_mask_cmpgt_epi32_mask(filters.within[0], counts[0], filters.limit[0]);
      const std::uint32_t high = _mm512_mask_cmpgt_epi32_mask(filters.within[1], counts[1], filters.limit[1]);
      return StoreBits(a, tile, pixel, low | high << 16);
    }
    for (int v = 0; v < kVectors; ++v) {
      const __m512i dot = _mm512_sub_epi32(filters.most[v], _mm512_slli_epi32(counts[v], 1));
      const Index at = 4 * (pixel * tile.outputs + tile.first + 16 * v);
      if (a.dots != nullptr) {
        _mm512_mask_storeu_epi32(reinterpret_cast<char*>(a.dots) + at, filters.within[v], dot);
      } else {
        const __m512 number = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), filters.scale[v], filters.bias[v]);
        _mm512_mask_storeu_ps(reinterpret_cast<char*>(a.floats) + at, filters.within[v], number);
      }
    }
  }
};

}  // namespace

const XnorConv2dVariant kXnorConv2dAvx512 = &ConvolveTiles<Avx512>;

}  // namespace tersetorch
