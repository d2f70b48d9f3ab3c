// Tables and sums at every vector level, written once. Everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/product_matmul/product_matmul.h"

namespace tersetorch {
namespace {

#ifdef __AVX512F__
constexpr int kFloats = 16;  // of the widest vector
#else
constexpr int kFloats = 8;
#endif

// Samples of a panel that one register holds.
template <int kLanes>
constexpr int kTogether = kLanes < kFloats ? kLanes : kFloats;

// ---- tables

// What a table is made from: its part of x and of the codebooks.
struct Segment {
  Segment(const ProductWeight& w, Index table) {
    const Index segment = table % w.segments, book = w.books == 1 ? 0 : segment;
    first = segment * w.width;
    width = w.columns - first < w.width ? w.columns - first : w.width;
    entries =
        reinterpret_cast<const char*>(w.codebooks) + 4 * (table / w.segments * w.books + book) * w.width * w.entries;
  }
  Index first, width;
  const char* entries;  // [width][entries]
};

// kVectors vectors of consecutive entries of one sample's table.
template <int kVectors, int kLanes>
void MakeEntries(const Segment& s, const float* x, Index entries, Index k, float* table) {
  Vector<kLanes> sums[kVectors] = {};
  for (Index j = 0; j < s.width; ++j) {
    const Vector<kLanes> number = Splat<kLanes>(LoadAt<float>(x, s.first + j, 4));
    for (int v = 0; v < kVectors; ++v) {
      sums[v] += number * LoadAt<Vector<kLanes>>(s.entries, j * entries + k + v * kLanes, 4);
    }
  }
  for (int v = 0; v < kVectors; ++v) Store(table + k + v * kLanes, sums[v]);
}

void MakeTablesOfOne(const ProductTablesArgs& a, Index table_begin, Index table_end) {
  const ProductWeight& w = a.weight;
  for (Index i = table_begin; i < table_end; ++i) {
    float* table = a.tables + i * ProductTableEntries(w);
    const Segment s(w, i);
    Index k = 0;
    for (; k + 4 * kFloats <= w.entries; k += 4 * kFloats) MakeEntries<4, kFloats>(s, a.panel, w.entries, k, table);
    for (; k + kFloats <= w.entries; k += kFloats) MakeEntries<1, kFloats>(s, a.panel, w.entries, k, table);
    for (; k < w.entries; ++k) {
      float sum = 0;
      for (Index j = 0; j < s.width; ++j) {
        const float number = LoadAt<float>(a.panel, s.first + j, 4);
        sum = __builtin_fmaf(number, LoadAt<float>(s.entries, j * w.entries + k, 4), sum);
      }
      Store(table + k, sum);
    }
  }
}

// kEntries entries of the tables of kLanes samples.
template <int kEntries, int kLanes>
void MakeLanes(const Segment& s, const float* panel, Index entries, Index k, float* table) {
  using Numbers = Vector<kTogether<kLanes>>;
  for (int part = 0; part < kLanes; part += kTogether<kLanes>) {
    Numbers sums[kEntries] = {};
    for (Index j = 0; j < s.width; ++j) {
      const auto numbers = Load<Numbers>(panel + (s.first + j) * kLanes + part);
      for (int e = 0; e < kEntries; ++e) sums[e] += numbers * LoadAt<float>(s.entries, j * entries + k + e, 4);
    }
    for (int e = 0; e < kEntries; ++e) Store(table + (k + e) * kLanes + part, sums[e]);
  }
}

template <int kLanes>
void MakeTablesOfMany(const ProductTablesArgs& a, Index table_begin, Index table_end) {
  constexpr int kEntries = 8;
  const ProductWeight& w = a.weight;
  for (Index i = table_begin; i < table_end; ++i) {
    float* table = a.tables + i * ProductTableEntries(w) * kLanes;
    const Segment s(w, i);
    Index k = 0;
    for (; k + kEntries <= w.entries; k += kEntries) MakeLanes<kEntries, kLanes>(s, a.panel, w.entries, k, table);
    for (; k < w.entries; ++k) MakeLanes<1, kLanes>(s, a.panel, w.entries, k, table);
  }
}

void MakeTables(const ProductTablesArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  const Index tables = w.stages * w.segments, end = table_end < tables ? table_end : tables;
  if (table_begin < end) {
    switch (a.lanes) {
      case 1:
        MakeTablesOfOne(a, table_begin, end);
        break;
      case 8:
        MakeTablesOfMany<8>(a, table_begin, end);
        break;
      default:
        MakeTablesOfMany<16>(a, table_begin, end);
    }
  }
  for (Index i = table_begin > tables ? table_begin : tables; i < table_end; ++i) {
    float* table = a.tables + i * ProductTableEntries(w) * a.lanes;
    for (Index k = 0; k < w.entries * a.lanes; ++k) table[k] = 0;
  }
}

// ---- sums

// Adds bias to a tile of sums and stores it.
template <int kLanes>
void StoreTile(const ProductMatmulArgs& a, Index tile, float* sums) {
  const Index first = tile * kProductRows, left = a.weight.rows - first;
  const Index count = left < kProductRows ? left : kProductRows;
  using Numbers = Vector<kTogether<kLanes>>;
  for (Index r = 0; r < count; ++r) {
    for (int part = 0; part < kLanes; part += kTogether<kLanes>) {
      auto sum = Load<Numbers>(sums + r * kLanes + part);
      if (a.bias != nullptr) sum += LoadAt<float>(a.bias, first + r, 4);
      if (a.relu) sum = sum < 0 ? Numbers{} : sum;
      Store(sums + r * kLanes + part, sum);
    }
  }
  StoreTransposed<kLanes>(sums, count, a.samples, a.y, a.y_stored_as, a.weight.rows, first);
}

// Adds to 8 rows' sums what 8 tables of 4-bit codes have for them.
template <int kLanes>
void AddGroup(const float* tables, const std::uint8_t* words, Vector<kTogether<kLanes>> (&sums)[8]) {
  constexpr Index kTable = kProductFew * kLanes;
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    const auto word = LoadAt<std::uint32_t>(words, r, 4);
#pragma GCC unroll 8
    for (int j = 0; j < kProductGroup; ++j) {
      sums[r] += Load<Vector<kTogether<kLanes>>>(tables + j * kTable + (word >> 4 * j & 15) * kLanes);
    }
  }
}

// The same for one table of 8-bit codes.
template <int kLanes>
void AddTable(const float* table, const std::uint8_t* codes, Vector<kTogether<kLanes>> (&sums)[8]) {
  const auto word = LoadAt<std::uint64_t>(codes, 0, 8);
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) sums[r] += Load<Vector<kTogether<kLanes>>>(table + (word >> 8 * r & 255) * kLanes);
}

// Tables of one pass over the rows: about half of a first-level cache, so that lookups hit it.
template <bool kNarrow, int kLanes>
constexpr Index BlockTables() {
  constexpr Index kBytes = 32 * 1024, kTable = (kNarrow ? kProductFew : kProductMany) * kLanes * 4;
  constexpr Index kUnit = kNarrow ? kProductGroup : 1;
  return kBytes / kTable / kUnit * kUnit < kUnit ? kUnit : kBytes / kTable / kUnit * kUnit;
}

// Adds to a tile's sums what `count` tables of 8-bit codes have for one sample; each level has its own.
void AddWideTile(const float* tables, const std::uint8_t* codes, Index count, float* sums);

template <bool kNarrow, int kLanes>
void MatmulOf(const ProductMatmulArgs& a, Index tile_begin, Index tile_end) {
  using Numbers = Vector<kTogether<kLanes>>;
  constexpr Index kBlock = BlockTables<kNarrow, kLanes>();
  constexpr Index kTable = (kNarrow ? kProductFew : kProductMany) * kLanes;
  const ProductWeight& w = a.weight;
  const Index tables = ProductTables(w), tile_bytes = ProductTileBytes(w);
  for (Index begin = 0; begin == 0 || begin < tables; begin += kBlock) {
    const Index end = begin + kBlock < tables ? begin + kBlock : tables;
    for (Index tile = tile_begin; tile < tile_end; ++tile) {
      const std::uint8_t* codes = w.codes + tile * tile_bytes;
      float* tile_sums = a.sums + tile * kProductRows * kLanes;
      if constexpr (!kNarrow && kLanes == 1) {
        for (Index r = 0; begin == 0 && r < kProductRows; ++r) tile_sums[r] = 0;
        AddWideTile(a.tables + begin * kTable, codes + begin * kProductRows, end - begin, tile_sums);
        if (end == tables) StoreTile<kLanes>(a, tile, tile_sums);
        continue;
      }
      for (Index r = 0; r < kProductRows; r += 8) {
        for (int part = 0; part < kLanes; part += kTogether<kLanes>) {
          Numbers sums[8] = {};
          float* row_sums = tile_sums + r * kLanes + part;
          for (int i = 0; begin != 0 && i < 8; ++i) sums[i] = Load<Numbers>(row_sums + i * kLanes);
          const float* products = a.tables + part;
          if constexpr (kNarrow) {
            for (Index t = begin; t < end; t += kProductGroup) {
              AddGroup<kLanes>(products + t * kTable, codes + t / kProductGroup * kProductRows * 4 + r * 4, sums);
            }
          } else {
            for (Index t = begin; t < end; ++t) {
              AddTable<kLanes>(products + t * kTable, codes + t * kProductRows + r, sums);
            }
          }
          for (int i = 0; i < 8; ++i) Store(row_sums + i * kLanes, sums[i]);
        }
      }
      if (end == tables) StoreTile<kLanes>(a, tile, tile_sums);
    }
  }
}

// One sample's sums of 4-bit codes, rows in lanes; each level has its own.
void SumNarrowTile(const float* tables, const std::uint8_t* words, Index groups, float* sums);

void Matmul(const ProductMatmulArgs& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  const ProductWeight& w = a.weight;
  const bool narrow = ProductIsNarrow(w);
  switch (a.lanes) {
    case 1:
      if (!narrow) return MatmulOf<false, 1>(a, tile_begin, tile_end);
      for (Index tile = tile_begin; tile < tile_end; ++tile) {
        float* sums = a.sums + tile * kProductRows;
        SumNarrowTile(a.tables, w.codes + tile * ProductTileBytes(w), ProductTables(w) / kProductGroup, sums);
        StoreTile<1>(a, tile, sums);
      }
      return;
    case 8:
      return narrow ? MatmulOf<true, 8>(a, tile_begin, tile_end) : MatmulOf<false, 8>(a, tile_begin, tile_end);
    default:
      return narrow ? MatmulOf<true, 16>(a, tile_begin, tile_end) : MatmulOf<false, 16>(a, tile_begin, tile_end);
  }
}

// ---- int8

float Least(Vector<kFloats> v) {
  float least = v[0];
  for (int i = 1; i < kFloats; ++i) least = v[i] < least ? v[i] : least;
  return least;
}

void MeasureTables(const ProductQuantizeArgs& a, std::int64_t table_begin, std::int64_t table_end) noexcept {
  const ProductWeight& w = a.weight;
  for (Index i = table_begin; i < table_end; ++i) {
    const float* table = a.tables + i * ProductTableEntries(w);
    // -(the largest), so that one reduction serves both.
    float low = table[0], high = -table[0], nothing = 0;
    Index k = 0;
    if (w.entries >= kFloats) {
      auto lows = Load<Vector<kFloats>>(table), highs = -lows, nothings = lows - lows;
      for (k = kFloats; k + kFloats <= w.entries; k += kFloats) {
        const auto products = Load<Vector<kFloats>>(table + k);
        lows = products < lows ? products : lows;
        highs = -products < highs ? -products : highs;
        nothings += products - products;
      }
      low = Least(lows);
      high = Least(highs);
      for (int lane = 0; lane < kFloats; ++lane) nothing += nothings[lane];
    }
    for (; k < w.entries; ++k) {
      low = table[k] < low ? table[k] : low;
      high = -table[k] < high ? -table[k] : high;
      nothing += table[k] - table[k];
    }
    Store(a.lows + i, low + nothing);
    Store(a.ranges + i, -high - low + nothing);
  }
}

// y = low + scale * sum + bias for the rows of a tile.
void StoreInt8Tile(const ProductInt8Args& a, Index tile, const std::uint32_t* sums) {
  const Index first = tile * kProductRows, left = a.weight.rows - first;
  const Index count = left < kProductRows ? left : kProductRows;
  for (Index r = 0; r < count; r += 8) {
    float y[8];
    Float8 sum = __builtin_convertvector(LoadAt<Int8>(sums, r, 4), Float8) * a.scale.scale + a.scale.low;
    const Index part = count - r < 8 ? count - r : 8;
    for (Index i = 0; a.bias != nullptr && i < part; ++i) sum[i] += LoadAt<float>(a.bias, first + r + i, 4);
    if (a.relu) sum = sum < 0 ? Float8{} : sum;
    Store(y, sum);
    if (part == 8) {
      StoreFloats(a.y, a.y_stored_as, first + r, sum);
    } else {
      for (Index i = 0; i < part; ++i) StoreFloat(a.y, a.y_stored_as, first + r + i, y[i]);
    }
  }
}

// Sums of a tile; each level has its own. Those of 8-bit codes are of `count` tables, at most 256, and are added.
void SumNarrowInt8Tile(const std::uint8_t* quantized, const std::uint8_t* words, Index groups, std::uint32_t* sums);
void AddWideInt8Tile(const std::uint8_t* quantized, const std::uint8_t* codes, Index count, std::uint32_t* sums);

void MatmulInt8(const ProductInt8Args& a, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  constexpr Index kBlock = 64;  // tables of one pass over the rows: a third of a first-level cache
  const ProductWeight& w = a.weight;
  const Index tables = ProductTables(w), tile_bytes = ProductTileBytes(w);
  if (ProductIsNarrow(w)) {
    for (Index tile = tile_begin; tile < tile_end; ++tile) {
      std::uint32_t* sums = a.sums + tile * kProductRows;
      SumNarrowInt8Tile(a.quantized, w.codes + tile * tile_bytes, tables / kProductGroup, sums);
      StoreInt8Tile(a, tile, sums);
    }
    return;
  }
  for (Index begin = 0; begin == 0 || begin < tables; begin += kBlock) {
    const Index count = tables - begin < kBlock ? tables - begin : kBlock;
    for (Index tile = tile_begin; tile < tile_end; ++tile) {
      std::uint32_t* sums = a.sums + tile * kProductRows;
      for (Index r = 0; begin == 0 && r < kProductRows; ++r) sums[r] = 0;
      AddWideInt8Tile(a.quantized + begin * kProductMany, w.codes + tile * tile_bytes + begin * kProductRows, count,
                      sums);
      if (begin + count == tables) StoreInt8Tile(a, tile, sums);
    }
  }
}

// ---- checks

bool CodesFit(const ProductWeight& w, std::int64_t tile_begin, std::int64_t tile_end) noexcept {
  const std::uint8_t* codes = w.codes;
  const Index end = tile_end * ProductTileBytes(w);
  const bool narrow = ProductIsNarrow(w);
  const auto most = static_cast<std::uint8_t>(w.entries - 1);
  Bytes32 largest = {};
  for (Index i = tile_begin * ProductTileBytes(w); i < end; i += 32) {  // a tile's bytes are a multiple of 32
    const auto bytes = LoadAt<Bytes32>(codes, i, 1);
    const Bytes32 low = narrow ? bytes & 15 : bytes, high = bytes >> 4;
    largest = low > largest ? low : largest;
    if (narrow) largest = high > largest ? high : largest;
  }
  for (int i = 0; i < 32; ++i) {
    if (largest[i] > most) return false;
  }
  return true;
}

}  // namespace
}  // namespace tersetorch
