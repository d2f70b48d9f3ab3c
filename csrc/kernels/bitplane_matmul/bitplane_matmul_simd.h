// What the vector levels share: reading x, and what becomes of a dot. Local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/common/sign_tiles.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

constexpr Index kTableBytes = 32;
constexpr Index kExactWords = 2;  // whose sums fit 16 bits

// The 16 sums of four numbers that signs can make: entry e subtracts number j where its bit j is set.
inline __m256i SignedSums(const std::int16_t* v) {
  // Signs of two numbers, in 32 bits; the halves of a pack are entries 0 to 7 and 8 to 15, by fours of either operand.
  constexpr int kPlus = 0x00010001, kFirst = 0x0001ffff, kSecond = static_cast<int>(0xffff0001), kMinus = -1;
  const __m256i low = _mm256_setr_epi32(kPlus, kFirst, kSecond, kMinus, kPlus, kFirst, kSecond, kMinus);
  const __m256i early = _mm256_setr_epi32(kPlus, kPlus, kPlus, kPlus, kSecond, kSecond, kSecond, kSecond);
  const __m256i late = _mm256_setr_epi32(kFirst, kFirst, kFirst, kFirst, kMinus, kMinus, kMinus, kMinus);
  const __m256i first = _mm256_madd_epi16(_mm256_set1_epi32(LoadAt<std::int32_t>(v, 0, 4)), low);
  const __m256i second = _mm256_set1_epi32(LoadAt<std::int32_t>(v, 1, 4));
  return _mm256_packs_epi32(_mm256_add_epi32(first, _mm256_madd_epi16(second, early)),
                            _mm256_add_epi32(first, _mm256_madd_epi16(second, late)));
}

inline __m256i LowBytesThenHigh(__m256i numbers) {
  const __m256i low = _mm256_and_si256(numbers, _mm256_set1_epi16(255)), high = _mm256_srli_epi16(numbers, 8);
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
}

// Where a word's columns of the patches of images are.
struct PatchColumns {
  void Set(const BitplaneImages& i, Index begin, Index columns) {
    count = columns;
    Index kx = begin % i.kernel_width, ky = begin / i.kernel_width % i.kernel_height;
    Index channel = begin / (i.kernel_width * i.kernel_height);
    for (Index c = 0; c < count; ++c) {
      y[c] = ky * i.dilation_y;
      x[c] = kx * i.dilation_x;
      offset[c] = channel * i.channel_stride + y[c] * i.row_stride + x[c] * i.column_stride;
      if (++kx < i.kernel_width) continue;
      kx = 0;
      if (++ky < i.kernel_height) continue;
      ky = 0;
      ++channel;
    }
  }
  Index count = 0, offset[64], y[64], x[64];
};

// The patch of a sample: its place in an image, and whether all of it is inside.
struct Patch {
  void Set(const BitplaneTablesArgs& a, Index n) {
    const BitplaneImages& i = *a.images;
    const Index position = a.first + n, image = position / (i.out_height * i.out_width);
    const Index in_image = position - image * i.out_height * i.out_width, row = in_image / i.out_width;
    top = row * i.stride_y - i.padding_y;
    left = (in_image - row * i.out_width) * i.stride_x - i.padding_x;
    const Index bottom = top + (i.kernel_height - 1) * i.dilation_y, right = left + (i.kernel_width - 1) * i.dilation_x;
    inside = top >= 0 && left >= 0 && bottom < i.height && right < i.width;
    first = image * i.image_stride + top * i.row_stride + left * i.column_stride;
  }
  // Two at a time, as the sums read them: a load that waits for two stores would hold everything up.
  template <bool kInside>
  void Numbers(const BitplaneTablesArgs& a, const PatchColumns& columns, std::int16_t* v) const {
    const auto number = [&](Index c) {
      const Index y = top + columns.y[c], x = left + columns.x[c];
      if (!kInside && (y < 0 || y >= a.images->height || x < 0 || x >= a.images->width)) return 0;
      return a.step * a.x[first + columns.offset[c]] - a.zero;
    };
    for (Index c = 0; c < columns.count; c += 2) {
      const int second = c + 1 < columns.count ? number(c + 1) : 0;
      Store(v + c, static_cast<std::uint32_t>(number(c) & 0xffff) | static_cast<std::uint32_t>(second) << 16);
    }
  }
  Index top, left, first;
  bool inside;
};

// Calls store(tables of a word and sample, g, sums) for each four columns of words [word_begin, word_end), with 0 past
// the last up to half a word.
template <typename StoreTable>
void ForFours(const BitplaneTablesArgs& a, Index word_begin, Index word_end, const StoreTable& store) {
  Patch patches[kBitplaneSamples];
  PatchColumns columns;
  for (Index n = 0; a.images != nullptr && n < a.samples; ++n) patches[n].Set(a, n);
  for (Index i = word_begin; i < word_end; ++i) {
    const Index left = a.columns - i * 64, count = left < 64 ? left : 64;
    if (a.images != nullptr) columns.Set(*a.images, i * 64, count);
    for (Index n = 0; n < a.samples; ++n) {
      alignas(64) std::int16_t v[64] = {};
      if (a.images == nullptr) {
        const std::uint8_t* x = a.x + (a.first + n) * a.columns + i * 64;
        for (Index c = 0; c < count; ++c) v[c] = static_cast<std::int16_t>(a.step * x[c] - a.zero);
      } else if (patches[n].inside) {
        patches[n].Numbers<true>(a, columns, v);
      } else {
        patches[n].Numbers<false>(a, columns, v);
      }
      char* tables = reinterpret_cast<char*>(a.tables) + (i * a.samples + n) * kWordTables * kTableBytes;
      for (Index g = 0; g < (count + 31) / 32 * 8; ++g) store(tables, g, SignedSums(v + 4 * g));
    }
  }
}

// Where the tables of a last word are, and how many of its fours have columns.
struct TablesEnd {
  Index Fours(const char* tables) const { return tables == last ? fours : kWordTables; }
  Index fours;
  const char* last;
};

inline TablesEnd EndOf(const BitplaneMatmulArgs& a) {
  const Index last = a.words > 0 ? a.words - 1 : 0;
  return {(a.columns - last * 64 + 3) / 4,
          reinterpret_cast<const char*>(a.tables) + last * a.samples * kWordTables * kTableBytes};
}

// y of a tile's rows for a sample.
void FinishSample(const BitplaneMatmulArgs& a, Index tile, Index n, const std::int32_t (&dots)[kTileRows],
                  const float (&scale)[kTileRows], const float (&bias)[kTileRows],
                  const std::int32_t (&thresholds)[kTileRows]) {
  const Index row = tile * kTileRows, rows = a.rows - row < kTileRows ? a.rows - row : kTileRows;
  std::uint32_t bits = 0;
  for (Index r = 0; r < rows; r += 8) {
    const auto dot = LoadAt<__m256i>(dots, r, 4);
    const Index at = 4 * (n * a.rows + row + r);
    if (a.bits != nullptr) {
      const __m256i below = _mm256_cmpgt_epi32(LoadAt<__m256i>(thresholds, r, 4), dot);
      bits |= static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)below)) << r;
      continue;
    }
    const __m256 scaled =
        _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), LoadAt<__m256>(scale, r, 4), LoadAt<__m256>(bias, r, 4));
    const __m256i y = a.dots != nullptr ? dot : (__m256i)scaled;
    char* to = a.dots != nullptr ? reinterpret_cast<char*>(a.dots) : reinterpret_cast<char*>(a.floats);
    if (r + 8 <= rows) {
      Store(to + at, y);
    } else {
      for (Index i = 0; r + i < rows; ++i) Store(to + at + 4 * i, ((Int8)y)[i]);
    }
  }
  if (a.bits == nullptr) return;
  if (rows < kTileRows) bits &= (std::uint32_t{1} << rows) - 1;
  char* word = reinterpret_cast<char*>(a.bits) + 8 * (n * ((a.rows + 63) / 64) + tile / 2);
  Store(word + tile % 2 * 4, bits);
  // The second half of the last word, where no tile has it.
  if (tile % 2 == 0 && row + kTileRows >= a.rows) Store(word + 4, std::uint32_t{0});
}

template <int kSamples>
void FinishTile(const BitplaneMatmulArgs& a, Index tile, const std::int32_t (&dots)[kSamples][kTileRows]) {
  float scale[kTileRows], bias[kTileRows] = {};
  std::int32_t thresholds[kTileRows] = {};
  for (float& one : scale) one = 1.0f;
  const Index row = tile * kTileRows, bytes = 4 * (a.rows - row < kTileRows ? a.rows - row : kTileRows);
  if (a.scale != nullptr) __builtin_memcpy(scale, reinterpret_cast<const char*>(a.scale) + 4 * row, bytes);
  if (a.bias != nullptr) __builtin_memcpy(bias, reinterpret_cast<const char*>(a.bias) + 4 * row, bytes);
  if (a.thresholds != nullptr) {
    __builtin_memcpy(thresholds, reinterpret_cast<const char*>(a.thresholds) + 4 * row, bytes);
  }
  for (Index n = 0; n < a.samples; ++n) FinishSample(a, tile, n, dots[n], scale, bias, thresholds);
}

}  // namespace
}  // namespace tersetorch
