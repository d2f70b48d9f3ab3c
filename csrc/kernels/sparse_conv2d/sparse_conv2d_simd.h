// The algorithm of every vector level, written once over vectors of `kLanes` floats. Everything here is local to the
// including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace tersetorch {
namespace {

inline Index Smaller(Index a, Index b) { return a < b ? a : b; }
inline Index Larger(Index a, Index b) { return a < b ? b : a; }

// ---- weights

struct Float32Values {
  explicit Float32Values(const ConvWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadAt<float>(values, k, 4); }

  const void* values;
};

struct BFloat16Values {
  explicit BFloat16Values(const ConvWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadFloat(values, FloatDtype::kBFloat16, k); }

  const void* values;
};

struct CodeValues {
  explicit CodeValues(const ConvWeight& w) : codes(static_cast<const std::uint8_t*>(w.values)), codebook(w.codebook) {}
  float At(Index k) const { return LoadAt<float>(codebook, codes[k], 4); }

  const std::uint8_t* codes;
  const float* codebook;
};

// Two bfloat16 in a word, the first channel in the lower half.
struct BFloat16PairValues {
  explicit BFloat16PairValues(const ConvWeight& w) : values(w.values) {}

  const void* values;
};

// Four int8 in a word, the first channel in the lowest byte.
struct Int8QuadValues {
  explicit Int8QuadValues(const ConvWeight& w) : values(w.values) {}

  const void* values;
};

#ifdef __AVX512VNNI__
constexpr std::int32_t kQuadOffset = 128;
#else
constexpr std::int32_t kQuadOffset = 0;
#endif

// What stands outside an image: the number 0, or a quad of them.
constexpr std::uint32_t kZeroQuad = static_cast<std::uint32_t>(kQuadOffset) * 0x01010101;

struct Block {
  Block(const ConvWeight& w, Index i)
      : segment(LoadAt<std::int32_t>(w.blocks, 2 * i, 4)),
        segment_end(LoadAt<std::int32_t>(w.blocks, 2 * i + 2, 4)),
        begin(LoadAt<std::int32_t>(w.blocks, 2 * i + 1, 4)),
        end(LoadAt<std::int32_t>(w.blocks, 2 * i + 3, 4)) {}

  Index segment, segment_end, begin, end;
};

Index RowBlocks(const ConvWeight& w) { return (w.shape.out_channels + kConvRows - 1) / kConvRows; }

// The largest of array[begin, end), 0 for none; V is a vector of unsigned numbers.
template <typename V>
std::uint32_t LargestOf(const void* array, Index begin, Index end) {
  constexpr Index kSize = sizeof(V{}[0]), kCount = sizeof(V) / kSize;
  V largest{};
  Index k = begin;
  for (; k + kCount <= end; k += kCount) {
    const V values = LoadAt<V>(array, k, kSize);
    largest = values > largest ? values : largest;
  }
  if (k < end) {
    V values{};
    __builtin_memcpy(&values, static_cast<const char*>(array) + k * kSize, static_cast<std::size_t>((end - k) * kSize));
    largest = values > largest ? values : largest;
  }
  std::uint32_t result = 0;
  for (Index i = 0; i < kCount; ++i) result = largest[i] > result ? largest[i] : result;
  return result;
}

ConvStatus Check(const ConvWeight& w) noexcept {
  const ConvShape& s = w.shape;
  const Index row_blocks = RowBlocks(w), per_channel = s.kernel_w * ConvSlots(s).Count();
  const Index channel_blocks = (s.in_channels + w.channel_block - 1) / w.channel_block;
  for (Index i = 0; i < channel_blocks * row_blocks; ++i) {
    const Block b(w, i);
    if (b.segment < 0 || b.segment_end < b.segment || b.segment_end > w.segment_count || b.begin < 0 ||
        b.end < b.begin || b.end > w.nnz) {
      return ConvStatus::kBadBlock;
    }
    const Index rows = Smaller(kConvRows, s.out_channels - i % row_blocks * kConvRows);
    const Index channels = Smaller(w.channel_block, s.in_channels - i / row_blocks * w.channel_block);
    Index count = 0;
    std::uint32_t last = 0;
    for (Index j = b.segment; j < b.segment_end; ++j) {
      const auto segment = LoadAt<std::uint32_t>(w.segments, j, 4);
      count += segment & 0xffff;
      last = segment > last ? segment : last;
    }
    if (count != b.end - b.begin || last >> 16 >= static_cast<std::uint32_t>(rows)) return ConvStatus::kBadSegment;
    if (count == 0) continue;
    if (LargestOf<Halves16>(w.indices, b.begin, b.end) > channels * per_channel - kConvTileRows) {
      return ConvStatus::kBadIndex;
    }
    if (w.stored_as == ConvValues::kCodes && LargestOf<Bytes32>(w.values, b.begin, b.end) >= w.entries) {
      return ConvStatus::kBadCode;
    }
  }
  return ConvStatus::kOk;
}

// ---- images

void Planes(const ConvPlanesArgs& args, Index begin, Index end) noexcept {
  const ConvPlanesArgs a = args;
  if (!a.channels_last) {
    for (Index c = 0; c < a.channels; ++c) {
      const Index from = c * a.pixels;
      Index i = begin;
      for (; i + 8 <= end; i += 8) Store(a.planes + from + i, LoadFloats(a.x, a.stored_as, from + i));
      for (; i < end; ++i) a.planes[from + i] = LoadFloat(a.x, a.stored_as, from + i);
    }
    return;
  }
  const Index whole_channels = a.channels / 8 * 8;
  Index i = begin;
  for (; i + 16 <= end; i += 16) {  // a cache line of each plane
    for (Index c = 0; c < whole_channels; c += 8) {
      for (Index half = 0; half < 16; half += 8) {
        Float8 m[8];
        for (int j = 0; j < 8; ++j) m[j] = LoadFloats(a.x, a.stored_as, (i + half + j) * a.channels + c);
        Transpose(m);
        for (int j = 0; j < 8; ++j) Store(a.planes + (c + j) * a.pixels + i + half, m[j]);
      }
    }
  }
  for (Index c = 0; c < a.channels; ++c) {
    for (Index j = c < whole_channels ? i : begin; j < end; ++j) {
      a.planes[c * a.pixels + j] = LoadFloat(a.x, a.stored_as, j * a.channels + c);
    }
  }
}

// ---- tiles

template <int kLanes>
struct IntsOf {
  typedef std::int32_t Type __attribute__((vector_size(4 * kLanes)));
};
template <int kLanes>
using Ints = typename IntsOf<kLanes>::Type;

template <int kWidth, std::uint32_t kZero>
Vector<kWidth> Zeros() {
  return (Vector<kWidth>)(static_cast<std::int32_t>(kZero) - Ints<kWidth>{});
}

// The first outputs of a tile.
struct Tile {
  Tile(const ConvPlan& p, Index tile)
      : row(p.line ? 0 : tile / p.tiles_across * p.parts * p.tile_rows),
        column(p.line ? tile * p.tile_rows * p.lanes : tile % p.tiles_across * p.columns) {}

  Index row, column;
};

// Reads and writes kWidth numbers, of which only [begin, end) are there; the others are kZero, or left alone.
template <int kWidth>
struct Masked {
  Masked(Index begin, Index end) {
    const Int8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
    mask = (lanes >= static_cast<std::int32_t>(begin)) & (lanes < static_cast<std::int32_t>(end));
  }
  template <std::uint32_t kZero>
  Vector<kWidth> Load(const float* p) const {
    Vector<kWidth> v;
    if constexpr (kWidth == 4) {
      v = (Vector<kWidth>)_mm_maskload_ps(p, _mm256_castsi256_si128((__m256i)mask));
    } else {
      v = (Vector<kWidth>)_mm256_maskload_ps(p, (__m256i)mask);
    }
    if constexpr (kZero != 0) {
      const Int8 rest = ~mask & static_cast<std::int32_t>(kZero);
      Ints<kWidth> of_width;
      __builtin_memcpy(&of_width, &rest, sizeof of_width);
      v = (Vector<kWidth>)((Ints<kWidth>)v | of_width);
    }
    return v;
  }
  void Store(float* p, Vector<kWidth> v) const {
    if constexpr (kWidth == 4) {
      _mm_maskstore_ps(p, _mm256_castsi256_si128((__m256i)mask), (__m128)v);
    } else {
      _mm256_maskstore_ps(p, (__m256i)mask, (__m256)v);
    }
  }

  Int8 mask;
};

#ifdef __AVX512F__
template <>
struct Masked<16> {
  Masked(Index begin, Index end) : mask(static_cast<__mmask16>(begin < end ? (1u << end) - (1u << begin) : 0)) {}
  template <std::uint32_t kZero>
  Vector<16> Load(const float* p) const {
    if constexpr (kZero == 0) return (Vector<16>)_mm512_maskz_loadu_ps(mask, p);
    return (Vector<16>)_mm512_mask_loadu_ps((__m512)Zeros<16, kZero>(), mask, p);
  }
  void Store(float* p, Vector<16> v) const { _mm512_mask_storeu_ps(p, mask, (__m512)v); }

  __mmask16 mask;
};
#endif

template <int kWidth>
Masked<kWidth> MaskFor(Index begin, Index end) {
  return Masked<kWidth>(Smaller(Larger(begin, 0), kWidth), Smaller(Larger(end, 0), kWidth));
}

// Numbers 0, 2, 4, ... of what two vectors hold.
template <int kWidth>
Vector<kWidth> Even(Vector<kWidth> low, Vector<kWidth> high) {
  decltype(low < high) places;
  for (int i = 0; i < kWidth; ++i) places[i] = 2 * i;
  return __builtin_shuffle(low, high, places);
}

// The rows that the slots of one class and one part of the lanes hold, those outside the image apart.
struct SlotRows {
  SlotRows(Index row, Index step, Index height, Index count) {
    const Index first = row < 0 ? (-row + step - 1) / step : 0, last = (height - row + step - 1) / step;
    before = Smaller(first, count);
    inside = Larger(Smaller(last, count) - before, 0);
    after = count - before - inside;
    from = row + before * step;
  }

  Index before, inside, after;
  Index from;  // the first row inside
};

template <int kLanes, int kColumns, std::uint32_t kZero, typename Read>
void PackSlots(float* to, const float* from, Index pitch, const SlotRows& rows, const Read& read) {
  for (Index i = rows.before; i > 0; --i, to += kLanes) Store(to, Zeros<kColumns, kZero>());
  Index i = rows.inside;
  for (; i >= 4; i -= 4, from += 4 * pitch, to += 4 * kLanes) {
    const Vector<kColumns> v[4] = {read(from), read(from + pitch), read(from + 2 * pitch), read(from + 3 * pitch)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) Store(to + j * kLanes, v[j]);
  }
  for (; i > 0; --i, from += pitch, to += kLanes) Store(to, read(from));
  for (i = rows.after; i > 0; --i, to += kLanes) Store(to, Zeros<kColumns, kZero>());
}

// Channels [first, first + channels), straight from the planes; columns of a grid at most two apart, of a line one.
template <int kLanes, int kColumns, std::uint32_t kZero>
void PackRows(const ConvArgs& a, const Tile& tile, Index first, Index channels) {
  // Copies, since the compiler cannot know that no store changes the arguments.
  const ConvShape s = a.weight.shape;
  const ConvPlan p = a.plan;
  const Index width = a.width, plane = a.height * width, vector_pitch = ConvSlots(s).Count() * kLanes;
  const float* const x = a.planes + first * plane;
  const auto whole = [](const float* from) { return Load<Vector<kColumns>>(from); };
  if (p.line) {
    for (Index kw = 0; kw < s.kernel_w; ++kw) {
      const Index column = tile.column + kw * s.dilation_w - a.pad_w;
      float* to = a.buffer + kw * vector_pitch;
      if (0 <= column && column + p.tile_rows * kLanes <= width) {
        const SlotRows rows(0, 1, p.tile_rows, p.tile_rows);
        for (Index c = 0; c < channels; ++c, to += s.kernel_w * vector_pitch) {
          PackSlots<kLanes, kLanes, kZero>(to, x + c * plane + column, kLanes, rows,
                                           [](const float* from) { return Load<Vector<kLanes>>(from); });
        }
        continue;
      }
      for (Index v = 0; v < p.tile_rows; ++v) {
        const Index from = column + v * kLanes;
        const auto mask = MaskFor<kLanes>(-from, width - from);
        for (Index c = 0; c < channels; ++c) {
          Store(to + v * kLanes + c * s.kernel_w * vector_pitch, mask.template Load<kZero>(x + c * plane + from));
        }
      }
    }
    return;
  }
  const ConvSlots slots(s);
  for (Index of_class = 0, base = 0; of_class < slots.period; ++of_class) {
    for (Index part = 0; part < p.parts; ++part) {
      const Index row = (tile.row + part * p.tile_rows) * s.stride_h + of_class * s.dilation_h - a.pad_h;
      const SlotRows rows(row, s.stride_h, a.height, slots.Rows(of_class, p.tile_rows));
      for (Index kw = 0; kw < s.kernel_w; ++kw) {
        const Index column = tile.column * s.stride_w + kw * s.dilation_w - a.pad_w;
        float* to = a.buffer + kw * vector_pitch + base + part * kColumns;
        const float* from = x + rows.from * width + column;
        const auto mask = MaskFor<kColumns>(-column, width - column);
        const auto next = MaskFor<kColumns>(-column - kColumns, width - column - kColumns);
        const bool inside = 0 <= column && column + kColumns <= width;
        for (Index c = 0; c < channels; ++c, to += s.kernel_w * vector_pitch, from += plane) {
          if (s.stride_w == 2) {
            PackSlots<kLanes, kColumns, kZero>(to, from, s.stride_h * width, rows, [&](const float* at) {
              return Even<kColumns>(mask.template Load<kZero>(at), next.template Load<kZero>(at + kColumns));
            });
          } else if (inside) {
            PackSlots<kLanes, kColumns, kZero>(to, from, s.stride_h * width, rows, whole);
          } else {
            PackSlots<kLanes, kColumns, kZero>(to, from, s.stride_h * width, rows,
                                               [&](const float* at) { return mask.template Load<kZero>(at); });
          }
        }
      }
    }
    base += slots.Rows(of_class, kConvTileRows) * kLanes;
  }
}

// line[q % stride][q / stride] = input column `column` + q of a row, zero outside the image, for q in [0, span).
void FillLine(const float* row, Index width, Index column, Index span, Index stride, Index pitch, std::uint32_t zero,
              float* line) {
  for (Index phase = 0; phase < stride; ++phase, line += pitch) {
    for (Index q = phase, i = 0; q < span; q += stride, ++i) {
      const bool there = 0 <= column + q && column + q < width;
      Store(line + i, there ? LoadAt<std::uint32_t>(row, column + q, 4) : zero);
    }
  }
}

// Any stride: through one line at a time, its columns sorted by their remainder.
template <int kLanes, int kColumns, std::uint32_t kZero>
void PackLines(const ConvArgs& a, const Tile& tile, Index first, Index channels) {
  const ConvShape s = a.weight.shape;
  const ConvPlan p = a.plan;
  const ConvSlots slots(s);
  const Index reach = (s.kernel_w - 1) * s.dilation_w, height = a.height, width = a.width;
  const Index span = (kColumns - 1) * s.stride_w + reach + 1, pitch = kColumns + reach / s.stride_w + 1;
  float* const line = a.line;
  // The vector `to` of every kw, from a row's columns from `column` on.
  const auto pack = [&](float* to, const float* plane, Index row, Index column) {
    const bool there = 0 <= row && row < height;
    if (there) FillLine(plane + row * width, width, column, span, s.stride_w, pitch, kZero, line);
    for (Index kw = 0; kw < s.kernel_w; ++kw, to += slots.Count() * kLanes) {
      const Index q = kw * s.dilation_w;
      const float* from = line + q % s.stride_w * pitch + q / s.stride_w;
      Store(to, there ? Load<Vector<kColumns>>(from) : Zeros<kColumns, kZero>());
    }
  };
  const Index column = tile.column * s.stride_w - a.pad_w;
  for (Index c = 0; c < channels; ++c) {
    const float* plane = a.planes + (first + c) * height * width;
    float* to = a.buffer + c * s.kernel_w * slots.Count() * kLanes;
    if (p.line) {
      for (Index v = 0; v < p.tile_rows; ++v) pack(to + v * kLanes, plane, 0, column + v * kLanes * s.stride_w);
      continue;
    }
    for (Index of_class = 0; of_class < slots.period; ++of_class) {
      for (Index i = 0; i < slots.Rows(of_class, p.tile_rows); ++i) {
        for (Index part = 0; part < p.parts; ++part) {
          const Index row = (tile.row + part * p.tile_rows + i) * s.stride_h + of_class * s.dilation_h - a.pad_h;
          pack(to + i * kLanes + part * kColumns, plane, row, column);
        }
      }
      to += slots.Rows(of_class, kConvTileRows) * kLanes;
    }
  }
}

// ---- sums

template <int kLanes, typename Values>
struct SumOf {
  using Type = Vector<kLanes>;
};
template <int kLanes>
struct SumOf<kLanes, Int8QuadValues> {
  using Type = Ints<kLanes>;
};

// Adds non-zero k times the vectors from x on.
template <int kLanes, int kVectors, typename Values>
  requires requires { &Values::At; }
inline __attribute__((always_inline)) void Add(const Values& values, Index k, const float* x,
                                               Vector<kLanes> (&sums)[kVectors]) {
  const Vector<kLanes> value = Splat<kLanes>(values.At(k));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[v] += value * Load<Vector<kLanes>>(x + v * kLanes);
}

template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const BFloat16PairValues& values, Index k, const float* x,
                                               Vector<kLanes> (&sums)[kVectors]) {
#ifdef __AVX512BF16__
  static_assert(kLanes == 16);
  const Ints<kLanes> pair = LoadAt<std::int32_t>(values.values, k, 4) - Ints<kLanes>{};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<Ints<kLanes>>(x, v * kLanes, 4);
    sums[v] = (Vector<kLanes>)_mm512_dpbf16_ps((__m512)sums[v], (__m512bh)of_x, (__m512bh)pair);
  }
#else
  const auto pair = LoadAt<std::uint32_t>(values.values, k, 4);
  const Vector<kLanes> low = Splat<kLanes>(__builtin_bit_cast(float, pair << 16));
  const Vector<kLanes> high = Splat<kLanes>(__builtin_bit_cast(float, pair & 0xffff0000));
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<Ints<kLanes>>(x, v * kLanes, 4);
    sums[v] += low * (Vector<kLanes>)(of_x << 16);
    sums[v] += high * (Vector<kLanes>)(of_x & static_cast<std::int32_t>(0xffff0000));
  }
#endif
}

template <int kLanes, int kVectors>
inline __attribute__((always_inline)) void Add(const Int8QuadValues& values, Index k, const float* x,
                                               Ints<kLanes> (&sums)[kVectors]) {
#ifdef __AVX512VNNI__
  static_assert(kLanes == 16);
  const Ints<kLanes> quad = LoadAt<std::int32_t>(values.values, k, 4) - Ints<kLanes>{};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const auto of_x = LoadAt<Ints<kLanes>>(x, v * kLanes, 4);
    sums[v] = (Ints<kLanes>)_mm512_dpbusd_epi32((__m512i)sums[v], (__m512i)of_x, (__m512i)quad);
  }
#else
  // |w| * (q with w's sign): two such products are at most 2 * 128 * 127 < 2^15, so that none saturates.
  static_assert(kLanes == 8);
  const __m256i quad = _mm256_set1_epi32(LoadAt<std::int32_t>(values.values, k, 4)), magnitude = _mm256_abs_epi8(quad);
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(LoadAt<__m256i>(x, v * kLanes, 4), quad));
    sums[v] += (Ints<kLanes>)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
  }
#endif
}

// Adds kCount non-zeros from k on; places holds their indices, the first in the lowest 16 bits.
template <int kLanes, int kVectors, int kChains, int kCount, typename Values, typename Sum>
void AddSome(const Values& values, const float* buffer, std::uint64_t places, Index k, Sum (*sums)[kVectors]) {
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    const float* x = buffer + (places >> 16 * i & 0xffff) * kLanes;
    __asm__("" : "+r"(x));  // one addition here, or a base and an index in every multiply-add: two operations each
    Add<kLanes>(values, k + i, x, sums[i % kChains]);
  }
}

// Adds a segment's non-zeros [k, end) to its sums.
template <int kLanes, int kVectors, typename Values>
[[gnu::always_inline]] inline void AddRow(const ConvWeight& w, const Values& values, const float* buffer, Index k,
                                          Index end, float* row_sums) {
  // Against the latency of a fused multiply-add, or of VNNI, which is longer.
  constexpr int kEnough = kLanes == 16 && requires(typename SumOf<kLanes, Values>::Type sum) { sum & sum; } ? 9 : 6;
  constexpr int kChains = kVectors >= kEnough ? 1 : kVectors >= 3 ? 2 : 4;
  using Sum = typename SumOf<kLanes, Values>::Type;
  Sum sums[kChains][kVectors] = {};
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sums[0][v] = Load<Sum>(row_sums + v * kLanes);
  for (; k + 4 <= end; k += 4) {
    AddSome<kLanes, kVectors, kChains, 4>(values, buffer, LoadAt<std::uint64_t>(w.indices, k, 2), k, sums);
  }
  for (; k < end; ++k)
    AddSome<kLanes, kVectors, kChains, 1>(values, buffer, LoadAt<std::uint16_t>(w.indices, k, 2), k, sums);
#pragma GCC unroll 2
  for (int half = kChains / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
    for (int chain = 0; chain < half; ++chain) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[chain][v] += sums[chain + half][v];
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) Store(row_sums + v * kLanes, sums[0][v]);
}

// Adds the non-zeros of one channel block in filter blocks [row_begin, row_end).
template <int kLanes, int kVectors, typename Values>
void AddBlocks(const ConvArgs& a, Index blocks, Index row_begin, Index row_end) {
  const ConvWeight& w = a.weight;
  const Values values(w);
  for (Index row_block = row_begin; row_block < row_end; ++row_block) {
    const Block b(w, blocks + row_block);
    float* sums = a.sums + (row_block - row_begin) * kConvRows * kVectors * kLanes;
    Index k = b.begin;
    for (Index i = b.segment; i < b.segment_end; ++i) {
      const auto segment = LoadAt<std::uint32_t>(w.segments, i, 4);
      const Index end = k + (segment & 0xffff);
      AddRow<kLanes, kVectors>(w, values, a.buffer, k, end, sums + (segment >> 16) * kVectors * kLanes);
      k = end;
    }
  }
}

template <int kLanes, typename Values>
void ForRows(const ConvArgs& a, Index blocks, Index row_begin, Index row_end) {
  switch (a.plan.tile_rows) {
    case 1:
      return AddBlocks<kLanes, 1, Values>(a, blocks, row_begin, row_end);
    case 2:
      return AddBlocks<kLanes, 2, Values>(a, blocks, row_begin, row_end);
    case 3:
      return AddBlocks<kLanes, 3, Values>(a, blocks, row_begin, row_end);
    case 4:
      return AddBlocks<kLanes, 4, Values>(a, blocks, row_begin, row_end);
    case 5:
      return AddBlocks<kLanes, 5, Values>(a, blocks, row_begin, row_end);
    case 6:
      return AddBlocks<kLanes, 6, Values>(a, blocks, row_begin, row_end);
    case 7:
      return AddBlocks<kLanes, 7, Values>(a, blocks, row_begin, row_end);
    default:
      return AddBlocks<kLanes, 8, Values>(a, blocks, row_begin, row_end);
  }
}

// ---- outputs

// Integer sums become numbers.
template <int kLanes>
void Rescale(const ConvArgs& a, Index filter, Index filters, Index size) {
  const Vector<kLanes> image_scale = Splat<kLanes>(a.image_scale);
  for (Index r = 0; r < filters; ++r) {
    const Vector<kLanes> scale = Splat<kLanes>(LoadAt<float>(a.row_scales, filter + r, 4));
    const Vector<kLanes> bias = Splat<kLanes>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, filter + r, 4));
    for (float *at = a.sums + r * size, *end = at + size; at < end; at += kLanes) {
      Store(at, __builtin_convertvector(Load<Ints<kLanes>>(at), Vector<kLanes>) * scale * image_scale + bias);
    }
  }
}

// What sums are at least.
float Floor(bool relu) { return relu ? 0.0f : -__builtin_inff(); }

template <typename V>
V AtLeast(V floor, V sums) {
  return sums < floor ? floor : sums;  // keeps NaN
}

// Rows of kColumns sums, kLanes apart, to rows of y, of which `columns` are there.
template <int kLanes, int kColumns>
void StoreRows(void* y, FloatDtype stored_as, Index to, Index pitch, const float* from, Index rows, Index columns,
               float floor) {
  if (stored_as == FloatDtype::kFloat32) {
    const Vector<kColumns> floors = Splat<kColumns>(floor);
    float* out = static_cast<float*>(y) + to;
    if (columns == kColumns) {
      for (; rows > 0; --rows, out += pitch, from += kLanes) Store(out, AtLeast(floors, Load<Vector<kColumns>>(from)));
      return;
    }
    const auto mask = MaskFor<kColumns>(0, columns);
    for (; rows > 0; --rows, out += pitch, from += kLanes) {
      mask.Store(out, AtLeast(floors, Load<Vector<kColumns>>(from)));
    }
    return;
  }
  for (; rows > 0; --rows, to += pitch, from += kLanes) {
    Index j = 0;
    for (; j + 8 <= columns; j += 8) {
      StoreFloats(y, stored_as, to + j, AtLeast(Splat<8>(floor), Load<Float8>(from + j)));
    }
    for (; j < columns; ++j) StoreFloat(y, stored_as, to + j, AtLeast(floor, from[j]));
  }
}

template <int kLanes, int kColumns>
void StoreByChannels(const ConvArgs& a, const Tile& tile, Index filter, Index filters) {
  const ConvPlan p = a.plan;
  const Index width = a.out_width, plane = a.out_height * width;
  const FloatDtype stored_as = a.stored_as;
  const float floor = Floor(a.relu);
  void* const y = a.y;
  const Index columns = Smaller(kColumns, width - tile.column);
  for (Index r = 0; r < filters; ++r) {
    const float* from = a.sums + r * p.tile_rows * kLanes;
    const Index to = (filter + r) * plane + tile.row * width + tile.column;
    if (p.line) {
      const Index count = Smaller(width - tile.column, p.tile_rows * kLanes), whole = count / kLanes * kLanes;
      StoreRows<kLanes, kLanes>(y, stored_as, to, kLanes, from, whole / kLanes, kLanes, floor);
      StoreRows<kLanes, kLanes>(y, stored_as, to + whole, kLanes, from + whole, whole < count, count - whole, floor);
      continue;
    }
    for (Index part = 0; part < p.parts; ++part) {
      const Index row = part * p.tile_rows, rows = Smaller(p.tile_rows, a.out_height - tile.row - row);
      StoreRows<kLanes, kColumns>(y, stored_as, to + row * width, width, from + part * kColumns, rows, columns, floor);
    }
  }
}

template <int kLanes, int kColumns>
void StoreChannelsLast(const ConvArgs& a, const Tile& tile, Index filter, Index filters) {
  const ConvPlan p = a.plan;
  const Index row_sums = p.tile_rows * kLanes;
  const FloatDtype stored_as = a.stored_as;
  const float floor = Floor(a.relu);
  void* const y = a.y;
  for (Index v = 0; v < p.tile_rows; ++v) {
    for (Index lane = 0; lane < kLanes; lane += 8) {
      Index places[8];  // in y, of the filter's output at each lane; -1 for none
      for (Index j = 0; j < 8; ++j) {
        const Index part = (lane + j) / kColumns, column_in_part = (lane + j) % kColumns;
        const Index row = p.line ? 0 : tile.row + part * p.tile_rows + v;
        const Index column = tile.column + column_in_part + (p.line ? v * kLanes : 0);
        const bool there = row < a.out_height && column < a.out_width;
        places[j] = there ? (row * a.out_width + column) * a.weight.shape.out_channels + filter : -1;
      }
      const float* from = a.sums + v * kLanes + lane;
      Index r = 0;
      for (; r + 8 <= filters; r += 8) {
        Float8 m[8];
        for (int j = 0; j < 8; ++j) m[j] = Load<Float8>(from + (r + j) * row_sums);
        Transpose(m);
        for (int j = 0; j < 8; ++j) {
          if (places[j] >= 0) StoreFloats(y, stored_as, places[j] + r, AtLeast(Splat<8>(floor), m[j]));
        }
      }
      for (; r < filters; ++r) {
        for (int j = 0; j < 8; ++j) {
          if (places[j] >= 0) StoreFloat(y, stored_as, places[j] + r, AtLeast(floor, from[r * row_sums + j]));
        }
      }
    }
  }
}

template <int kLanes, int kColumns>
void ForColumns(const ConvArgs& a, Index tile_index, Index row_begin, Index row_end) {
  const ConvWeight& w = a.weight;
  const ConvShape& s = w.shape;
  const Tile tile(a.plan, tile_index);
  const Index filter = row_begin * kConvRows, filters = Smaller(row_end * kConvRows, s.out_channels) - filter;
  const Index size = a.plan.tile_rows * kLanes, row_blocks = RowBlocks(w);
  const bool quads = w.stored_as == ConvValues::kInt8Quads;
  for (Index r = 0; r < filters; ++r) {
    Vector<kLanes> start;  // the bias, or what takes the offset of a quad's bytes back
    if (quads) {
      const std::uint32_t sum = LoadAt<std::uint32_t>(a.row_sums, filter + r, 4);
      start =
          (Vector<kLanes>)(static_cast<std::int32_t>(-static_cast<std::uint32_t>(kQuadOffset) * sum) - Ints<kLanes>{});
    } else {
      start = Splat<kLanes>(a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, filter + r, 4));
    }
    for (Index i = 0; i < size; i += kLanes) Store(a.sums + r * size + i, start);
  }
  const bool rows = s.stride_w == 1 || (s.stride_w == 2 && !a.plan.line);
  for (Index first = 0, blocks = 0; first < s.in_channels; first += w.channel_block, blocks += row_blocks) {
    if (Block(w, blocks + row_begin).begin == Block(w, blocks + row_end - 1).end) continue;
    const Index channels = Smaller(w.channel_block, s.in_channels - first);
    if (quads) {
      (rows ? PackRows<kLanes, kColumns, kZeroQuad> : PackLines<kLanes, kColumns, kZeroQuad>)(a, tile, first, channels);
    } else {
      (rows ? PackRows<kLanes, kColumns, 0> : PackLines<kLanes, kColumns, 0>)(a, tile, first, channels);
    }
    switch (w.stored_as) {
      case ConvValues::kFloat32:
        ForRows<kLanes, Float32Values>(a, blocks, row_begin, row_end);
        break;
      case ConvValues::kBFloat16:
        ForRows<kLanes, BFloat16Values>(a, blocks, row_begin, row_end);
        break;
      case ConvValues::kCodes:
        ForRows<kLanes, CodeValues>(a, blocks, row_begin, row_end);
        break;
      case ConvValues::kBFloat16Pairs:
        ForRows<kLanes, BFloat16PairValues>(a, blocks, row_begin, row_end);
        break;
      case ConvValues::kInt8Quads:
        ForRows<kLanes, Int8QuadValues>(a, blocks, row_begin, row_end);
    }
  }
  if (quads) Rescale<kLanes>(a, filter, filters, size);
  (a.channels_last ? StoreChannelsLast<kLanes, kColumns> : StoreByChannels<kLanes, kColumns>)(a, tile, filter, filters);
}

// ---- from the arguments to the template

template <int kLanes>
void Convolve(const ConvArgs& a, Index tile, Index row_begin, Index row_end) noexcept {
  if (a.plan.columns == kLanes) return ForColumns<kLanes, kLanes>(a, tile, row_begin, row_end);
  if (a.plan.columns == 8) return ForColumns<kLanes, 8>(a, tile, row_begin, row_end);
  return ForColumns<kLanes, 4>(a, tile, row_begin, row_end);
}

}  // namespace
}  // namespace tersetorch
