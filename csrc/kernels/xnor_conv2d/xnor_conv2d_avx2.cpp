#include <immintrin.h>

#include <cstdint>

#include "kernels/common/sign_counts.h"
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

  // A pixel at a time, which needs no vectors of nibbles.
  static void Multiply(const XnorConv2dArgs& a, const XnorTile& tile, const XnorTaps& taps, const Filters& filters,
                       const char* const (&x)[1], const Index (&y)[1]) {
    Counts counts;
    for (int v = 0; v < kVectors; ++v) {
      __m256i sum = _mm256_setzero_si256(), bytes = sum, count = sum;
      Index steps = 0;
      for (Index r = 0; r < taps.rows; ++r) {
        for (Index u = 0; u < taps.runs; ++u) {
          const char* w = taps.weight + r * taps.weight_row + u * taps.weight_run + 32 * v;
          const char* from = x[0] + r * taps.x_row + u * taps.x_run;
          for (Index i = 0; i < taps.words; ++i, w += kTileWordBytes) {
            const auto splat = [&](Index half) { return _mm256_set1_epi32(LoadAt<std::int32_t>(from, half, 4)); };
            const __m256i first = _mm256_xor_si256(LoadAt<__m256i>(w, 0, 0), splat(2 * i));
            const __m256i second = _mm256_xor_si256(LoadAt<__m256i>(w, kVectors, 32), splat(2 * i + 1));
            const __m256i q = _mm256_xor_si256(sum, first);
            const __m256i carry = _mm256_or_si256(_mm256_and_si256(sum, first), _mm256_and_si256(q, second));
            bytes = _mm256_add_epi8(bytes, CountBytes(carry));
            sum = _mm256_xor_si256(q, second);
            if (++steps == kSteps) {
              count = _mm256_add_epi32(count, SumBytes(bytes));
              bytes = _mm256_setzero_si256();
              steps = 0;
            }
          }
        }
      }
      count = _mm256_add_epi32(count, SumBytes(bytes));
      counts[v] = _mm256_add_epi32(_mm256_slli_epi32(count, 1), SumBytes(CountBytes(sum)));
    }
    StorePixel(a, tile, filters, y[0], counts);
  }

  static void StorePixel(const XnorConv2dArgs& a, const XnorTile& tile, const Filters& filters, Index pixel,
                         const Counts& counts) {
    std::uint32_t bits = 0;
    for (int v = 0; v < kVectors; ++v) {
      const __m256i dot = _mm256_sub_epi32(filters.most[v], _mm256_slli_epi32(counts[v], 1));
      const Index at = 4 * (pixel * tile.outputs + tile.first + 8 * v);
      if (a.dots != nullptr) {
        _mm256_maskstore_epi32(reinterpret_cast<int*>(reinterpret_cast<char*>(a.dots) + at), filters.within[v], dot);
      } else if (a.floats != nullptr) {
        const __m256 number = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), filters.scale[v], filters.bias[v]);
        _mm256_maskstore_ps(reinterpret_cast<float*>(reinterpret_cast<char*>(a.floats) + at), filters.within[v],
                            number);
      } else {
        const __m256i ones = _mm256_and_si256(_mm256_cmpgt_epi32(filters.threshold[v], dot), filters.within[v]);
        bits |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(ones))) << 8 * v;
      }
    }
    if (a.bits != nullptr) StoreBits(a, tile, pixel, bits);
  }
};

// Where the next words of taps are, in bytes from their first.
struct Words {
  explicit Words(const XnorTaps& taps_of) : taps(taps_of), left(taps.rows * taps.runs * taps.words) {}
  void Next() {
    for (count = 0; count < kCountWords && left > 0; ++count, --left) {
      x[count] = row * taps.x_row + run * taps.x_run + word * kWordBytes;
      weight[count] = row * taps.weight_row + run * taps.weight_run + word * kTileWordBytes;
      if (++word < taps.words) continue;
      word = 0;
      if (++run < taps.runs) continue;
      run = 0;
      ++row;
    }
  }
  const XnorTaps& taps;
  Index left, count = 0, row = 0, run = 0, word = 0;
  Index x[kCountWords], weight[kCountWords];
};

// The next pixels of a rectangle, at most kCountSamples, with `tiles` tiles of a group, at most kCountTiles.
void ConvolveTogether(const XnorConv2dArgs& a, Index tile, Index tiles, const XnorSpan& rows, const XnorSpan& columns,
                      XnorPixels& pixels, Index count) {
  const XnorTaps taps(a, XnorTile(a, tile), rows, columns);
  const Index of_tile = a.kernel_h * a.kernel_w * a.words * kTileWordBytes;
  TileNibbles nibbles;
  PairCodes codes;
  PairCounts counts[kCountSamples / 2][kCountTiles];
  Index x[kCountSamples + 1], y[kCountSamples];
  for (Index m = 0; m < count; ++m, pixels.Next()) x[m] = x[m + 1] = pixels.x, y[m] = pixels.y;
  for (Index m = 0; m < count; m += 2) {
    for (PairCounts& of_pair : counts[m / 2]) of_pair = {};
  }
  Words words(taps);
  for (words.Next(); words.count > 0; words.Next()) {
    for (Index t = 0; t < tiles; ++t) {
      for (Index i = 0; i < words.count; ++i) {
        nibbles.Set<kVectors>(t, i, taps.weight + t * of_tile + words.weight[i]);
      }
      nibbles.End(t, words.count);
    }
    codes.End(words.count);
    for (Index m = 0; m < count; m += 2) {
      const char* first = reinterpret_cast<const char*>(a.x) + x[m];
      const char* second = reinterpret_cast<const char*>(a.x) + x[m + 1];
      for (Index i = 0; i < words.count; ++i) codes.Set(i, first + words.x[i], second + words.x[i]);
      AddDiffering(codes, nibbles, tiles, words.count, counts[m / 2]);
    }
  }
  for (Index t = 0; t < tiles; ++t) {
    const XnorTile of_filters(a, tile + t);
    const Avx2::Filters filters(a, of_filters, taps);
    for (Index m = 0; m < count; ++m) {
      Counts in_order;
      counts[m / 2][t].InOrder<kVectors>(m % 2, in_order);
      Avx2::StorePixel(a, of_filters, filters, y[m], in_order);
    }
  }
}

void Convolve(const XnorConv2dArgs& a, const XnorConvPart& p) noexcept {
  const Index of_group = XnorConvTiles(a.filters, 1);
  const auto least = [](Index i, Index j) { return i < j ? i : j; };
  for (Index tile = p.tile_begin, tiles; tile < p.tile_end; tile += tiles) {
    tiles = least(kCountTiles, least(p.tile_end - tile, of_group - tile % of_group));
    ForRectangles(a, p, [&](const XnorSpan& rows, const XnorSpan& columns, Index begin, Index end) {
      const XnorTile first(a, tile);
      const XnorTaps taps(a, first, rows, columns);
      XnorPixels pixels(a, taps, first.group, p.image, begin, end, columns);
      if (pixels.left > 1 && taps.rows * taps.runs * taps.words <= kMostCountWords) {
        for (Index parts = (pixels.left + kCountSamples - 1) / kCountSamples; parts > 0; --parts) {
          ConvolveTogether(a, tile, tiles, rows, columns, pixels, (pixels.left + parts - 1) / parts);
        }
        return;
      }
      for (Index t = tile; t < tile + tiles; ++t) {
        const XnorTile of_filters(a, t);
        const XnorTaps its(a, of_filters, rows, columns);
        XnorPixels each = pixels;
        ConvolvePixels<Avx2, 1>(a, of_filters, its, Avx2::Filters(a, of_filters, its), each);
      }
    });
  }
}

}  // namespace

const XnorConv2dVariant kXnorConv2dAvx2 = &Convolve;

}  // namespace tersetorch
