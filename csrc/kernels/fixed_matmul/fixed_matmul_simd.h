// What the vector levels share: the walk over tiles, and conversions. Local to the including file.
//
// A level gives Longs, kLanes sums of 64 bits in a register, which Nearest and Drawn round and narrow where the
// conversion's scale is 1. And, for int8 and for int16, a struct Numbers: Register, of sums of 32 bits, kRegisters for
// the 16 rows of a panel; kPanels and kSamples that a tile has at most; X(p), a word of a sample for every row; W(p,
// j), the weights of register j; Add(sums, x, w); and Widen(sums, from, to), to[16] = from[16] + the sums of the rows.
#pragma once

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/philox.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {
namespace {

constexpr Index kPanelBytes = kFixedPanel * kFixedWord;  // of a word of 16 rows

// Words of a tile that stay in the first cache level while several tiles of samples are multiplied with them.
constexpr Index kCachedWords = 128;

template <typename Numbers>
struct Multiplication {
  using Register = typename Numbers::Register;
  static constexpr int kRegisters = Numbers::kRegisters, kSamples = Numbers::kSamples, kPanels = Numbers::kPanels;

  // Words [begin, end) of a tile: kRows panels from w on, kCount samples from n on. Their sums, of 32 bits, are added
  // to what stands in `from`, whose samples lie from_stride apart.
  template <int kRows, int kCount>
  static void Tile(const Multiplication& m, const char* w, Index n, Index begin, Index end, const Index* from,
                   Index from_stride, Index panel) {
    constexpr int kAll = kRows * kRegisters;
    // An addition waits for the one before: of few registers there are several of each.
    constexpr int kPhases = kAll * kCount >= 8 ? 1 : kAll * kCount >= 4 ? 2 : 4;
    const FixedMatmulArgs& a = m.a;
    Register sums[kPhases][kCount][kAll];
#pragma GCC unroll 4
    for (int p = 0; p < kPhases; ++p) {
#pragma GCC unroll 6
      for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 8
        for (int r = 0; r < kAll; ++r) sums[p][s][r] = Register{};
      }
    }
    // One offset beside the addresses, which stay in registers.
    const char *x[kCount], *of_w = w + begin * kPanelBytes;
#pragma GCC unroll 6
    for (int s = 0; s < kCount; ++s) x[s] = static_cast<const char*>(a.x) + a.sample_at[n + s];
    const Index panel_bytes = m.panel_bytes;
    while (begin < end) {
      const Index segment = begin / a.segment_words, first = begin - segment * a.segment_words;
      const Index left = a.segment_words - first, count = end - begin < left ? end - begin : left;
      Index at = a.segment_at[segment] + first * kFixedWord;
      const Index stop = at + count * kFixedWord;
      const auto add = [&](int p, Register(&to)[kCount][kAll]) __attribute__((always_inline)) {
        Register weights[kAll];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < kRegisters; ++j) {
            weights[r * kRegisters + j] = Numbers::W(of_w + r * panel_bytes + p * kPanelBytes, j);
          }
        }
#pragma GCC unroll 6
        for (int s = 0; s < kCount; ++s) {
          const Register number = Numbers::X(x[s] + at + p * kFixedWord);
#pragma GCC unroll 8
          for (int r = 0; r < kAll; ++r) to[s][r] = Numbers::Add(to[s][r], number, weights[r]);
        }
      };
      for (; at + kPhases * kFixedWord <= stop; at += kPhases * kFixedWord) {
#pragma GCC unroll 4
        for (int p = 0; p < kPhases; ++p) add(p, sums[p]);
        of_w += kPhases * kPanelBytes;
      }
      if constexpr (kPhases > 1) {
        for (; at < stop; at += kFixedWord, of_w += kPanelBytes) add(0, sums[0]);
      }
      begin += count;
    }
#pragma GCC unroll 6
    for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        Register whole[kRegisters];
#pragma GCC unroll 4
        for (int j = 0; j < kRegisters; ++j) {
          whole[j] = sums[0][s][r * kRegisters + j];
#pragma GCC unroll 4
          for (int p = 1; p < kPhases; ++p) whole[j] = Numbers::Sum(whole[j], sums[p][s][r * kRegisters + j]);
        }
        const Index at = (panel + r) * kFixedPanel;
        Numbers::Widen(whole, from + s * from_stride + at, a.sums + (n + s) * kFixedTile + at);
      }
    }
  }

  using TileFunction = void (*)(const Multiplication&, const char*, Index, Index, Index, const Index*, Index, Index);

  template <int kRows>
  static TileFunction ForSamples(Index count) {
    switch (count) {
      case 1:
        return &Tile<kRows, 1>;
      case 2:
        return &Tile<kRows, 2>;
      case 3:
        return &Tile<kRows, 3>;
      default:
        if constexpr (kSamples > 3) {
          if (count == 4) return &Tile<kRows, 4>;
          if (count == 5) return &Tile<kRows, 5>;
          return &Tile<kRows, 6>;
        }
        return &Tile<kRows, 3>;
    }
  }

  static TileFunction Of(Index panels, Index samples) {
    if constexpr (kPanels >= 4) {
      if (panels == 4) return ForSamples<4>(samples);
    }
    if constexpr (kPanels >= 2) {
      if (panels == 2) return ForSamples<2>(samples);
    }
    return ForSamples<1>(samples);
  }

  // Words [begin, end) of `panels` panels, a number that Tile takes, and all samples.
  void Chunk(const char* w, Index panel, Index panels, Index begin, Index end) const {
    const Index tiles = (a.samples + kSamples - 1) / kSamples;
    for (Index t = 0, n = 0; t < tiles; ++t) {
      const Index count = (a.samples - n + tiles - t - 1) / (tiles - t);
      const Index* from = begin == 0 ? start : a.sums + n * kFixedTile;
      Of(panels, count)(*this, w, n, begin, end, from, begin == 0 ? 0 : kFixedTile, panel);
      n += count;
    }
  }

  void Run(Index panel, Index panels) {
    const char* packed = static_cast<const char*>(a.packed) + panel * panel_bytes;
    for (Index r = 0; r < panels * kFixedPanel; ++r) {
      const char* sums_of_rows = packed + (r / kFixedPanel + 1) * panel_bytes - kPanelBytes;
      start[r] = a.wide ? 0 : -128 * Index{LoadAt<std::int32_t>(sums_of_rows, r % kFixedPanel, 4)};
    }
    const Index cached = a.samples > kSamples && a.chunk_words > kCachedWords ? kCachedWords : a.chunk_words;
    for (Index p = 0; p < panels;) {
      const Index left = panels - p, taken = left >= kPanels ? kPanels : left >= 2 && kPanels > 2 ? 2 : 1;
      Index begin = 0;
      do {  // once where there are no words
        const Index end = words - begin < cached ? words : begin + cached;
        Chunk(packed + p * panel_bytes, p, taken, begin, end);
        begin = end;
      } while (begin < words);
      p += taken;
    }
  }

  const FixedMatmulArgs& a;
  const Index words = a.segments * a.segment_words, panel_bytes = (words + 1) * kPanelBytes;
  Index start[kFixedTile] = {};  // by how much raised x makes the sums of the rows too large, less
};

// ---- conversions

// To values of this type, whole numbers or float.
template <typename Longs, typename Number>
struct Conversion {
  static constexpr Index kLanes = Longs::kLanes, kBytes = sizeof(Number);
  typedef Number Numbers __attribute__((vector_size(kLanes * kBytes)));
  typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

  // Values of sample n, rows [r, end), of which u are the random bits, if any.
  void Rows(Index n, Index r, Index end, const std::uint32_t* u) const {
    const Index* from = a.sums + (a.split ? 2 * n : n) * a.sums_stride;
    char* y = static_cast<char*>(a.y) + n * a.y_stride * kBytes;
    if (conversion.scale == 1 && end - r >= kLanes) {
      for (const Index first = r; r < end; r += kLanes) {
        if (r + kLanes > end) r = end - kLanes;  // some once more
        auto sums = Longs::Load(from + r);
        if (a.split) sums = Longs::Add(Longs::Times256(sums), Longs::Load(from + a.sums_stride + r));
        if (a.added != nullptr) sums = Longs::Add(sums, Longs::Load(a.added + r));
        const auto k = conversion.random ? longs.Drawn(sums, u + (r - first)) : longs.Nearest(sums);
        Numbers numbers = __builtin_convertvector((Ints)k, Numbers);
        if constexpr (static_cast<Number>(0.5) != 0) numbers *= step;
        Store(y + r * kBytes, numbers);
      }
    }
    for (; r < end; ++r, ++u) {
      Index sum = LoadAt<Index>(from, r, 8);
      if (a.split) sum = 256 * sum + LoadAt<Index>(from, a.sums_stride + r, 8);
      if (a.added != nullptr) sum += LoadAt<Index>(a.added, r, 8);
      PutFixed(y, r, conversion.Of(sum, conversion.random ? *u : 0), a.fraction_bits, a.as);
    }
  }

  // random(block, u) gives the bits of a block.
  template <typename Random>
  void Run(Index begin, Index end, const Random& random) const {
    alignas(64) std::uint32_t u[kRandomBlock] = {};
    for (Index n = begin; n < end; ++n) {
      for (Index r = 0; r < a.rows;) {
        const std::uint64_t number = a.offset + static_cast<std::uint64_t>(n * a.y_stride + r);
        const auto first = conversion.random ? static_cast<Index>(number % kRandomBlock) : 0;
        const Index room = kRandomBlock - first, left = a.rows - r, stop = r + (left < room ? left : room);
        if (conversion.random) random(number / kRandomBlock, u);
        Rows(n, r, stop, u + first);
        r = stop;
      }
    }
  }

  const FixedConvertArgs& a;
  const FixedConversion& conversion;
  const Longs longs{conversion};
  const float step = StepOf(a.fraction_bits);
};

template <typename Longs, typename Random>
void ConvertBlocks(const FixedConvertArgs& a, Index begin, Index end, const Random& random) {
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  switch (a.as) {
    case FixedAs::kFloats:
      return Conversion<Longs, float>{a, conversion}.Run(begin, end, random);
    case FixedAs::kInt8:
      return Conversion<Longs, signed char>{a, conversion}.Run(begin, end, random);
    case FixedAs::kInt16:
      return Conversion<Longs, std::int16_t>{a, conversion}.Run(begin, end, random);
    case FixedAs::kInt32:
      return Conversion<Longs, std::int32_t>{a, conversion}.Run(begin, end, random);
  }
}

}  // namespace
}  // namespace tersetorch
