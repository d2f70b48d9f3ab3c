// What the vector levels share: the walk over tiles, how long 32 bits last, and conversions. Local to the including
// file.
//
// A level gives, for int8 and for int16, a struct Numbers: Register, of sums of 32 bits; kColumns that it multiplies at
// once, of kSamples samples with kRows rows, kBytes each. X(p, count) and W(p, count) load the first count columns,
// then zeros; Add(sums, x, w) multiplies them, and Raised(w, columns) is how much larger than it should be that makes a
// row's sum. Sum(four, sums) adds the lanes of four registers. Where kFew, a chunk of columns never overflows 32 bits;
// elsewhere Largest(p, count), the largest |number|, says how many steps do not, then Accumulate(total, sums) adds them
// to a Wide of 64 bits, and Sum(four, flushes, sums) adds the lanes of four of these.
#pragma once

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {
namespace {

// How many vectors of products 32 bits can add up: sums s keep to |s| < 2^31, and a single one to -2^31 < s <= 2^31,
// since the two products of a pair are both 2^30 at most where they are positive. Raised by this, s fits 32 bits.
constexpr std::int32_t kSumRaised = 0x7fffffff;

inline Index StepsOf(Index largest_x, Index largest_w) {
  const Index pair = 2 * largest_x * largest_w;
  const Index steps = pair == 0 ? 0x7fffffff : 0x7fffffff / pair;
  return steps < 1 ? 1 : steps;
}

// Bytes of a row that are multiplied with all samples before the next ones: the rows of a tile stay in the first cache
// level, the samples stream from the second.
constexpr Index kChunkBytes = 2048;

// Marks all columns of a vector: a load that leaves some out takes one of the ports that multiply.
struct All {};

// kRows rows times kSamples samples, some of which may be the same.
template <typename Numbers, int kRows, int kSamples>
struct Products {
  static constexpr Index kColumns = Numbers::kColumns, kBytes = Numbers::kBytes;

  // Columns [c, end), which 32 bits last for.
  void Multiply(Index c, Index end) {
    typename Numbers::Register of_rows[kSamples][kRows];
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) of_rows[n][r] = typename Numbers::Register{};
    }
    const auto add = [&](auto within) __attribute__((always_inline)) {
      typename Numbers::Register of_x[kSamples];
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) of_x[n] = Numbers::X(x[n] + c * kBytes, within);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto of_w = Numbers::W(w[r] + c * kBytes, within);
#pragma GCC unroll 4
        for (int n = 0; n < kSamples; ++n) of_rows[n][r] = Numbers::Add(of_rows[n][r], of_x[n], of_w);
      }
    };
    for (; c + kColumns <= end; c += kColumns) {
      __asm__("" : "+r"(c));  // an index beside eleven addresses, or each of these takes two operations a step
      add(All{});
    }
    if (c < end) add(Numbers::First(end - c));
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[n][r] = of_rows[n][r];
    }
  }

  // result[n][r] of columns [0, columns), of which `steps` vectors never overflow 32 bits.
  void Sum(Index columns, Index steps, Index (&result)[kSamples][kRows]) {
    if (columns <= steps * kColumns) {
      Multiply(0, columns);
      for (int n = 0; n < kSamples; ++n) {
        for (int r = 0; r < kRows; r += 4) Numbers::Sum(sums[n] + r, result[n] + r);
      }
      return;
    }
    if constexpr (!Numbers::kFew) {
      typename Numbers::Wide totals[kSamples][kRows] = {};
      Index flushes = 0;
      for (Index c = 0; c < columns; c += steps * kColumns, ++flushes) {
        Multiply(c, columns - c < steps * kColumns ? columns : c + steps * kColumns);
        for (int n = 0; n < kSamples; ++n) {
          for (int r = 0; r < kRows; ++r) Numbers::Accumulate(totals[n][r], sums[n][r]);
        }
      }
      for (int n = 0; n < kSamples; ++n) {
        for (int r = 0; r < kRows; r += 4) Numbers::Sum(totals[n] + r, flushes, result[n] + r);
      }
    }
  }

  const char *x[kSamples], *w[kRows];
  typename Numbers::Register sums[kSamples][kRows];
};

template <typename Numbers>
struct Multiplication {
  static constexpr Index kBytes = Numbers::kBytes, kChunk = kChunkBytes / kBytes;
  static constexpr int kRows = Numbers::kRows;

  const char* RowOfX(Index n) const { return static_cast<const char*>(a.x) + n * a.columns * kBytes; }
  const char* RowOfWeight(Index r) const { return static_cast<const char*>(a.weight) + r * a.columns * kBytes; }

  // Columns [c, c + columns) of up to kRows rows from r on and kSamples samples from n on, added to their sums, or to
  // `added` where they are the first.
  template <int kSamples>
  void Tile(Index r, Index rows, const Index (&added)[kRows], Index n, Index c, Index columns, Index steps) const {
    Products<Numbers, kRows, kSamples> products;
    const Index samples = a.samples - n < kSamples ? a.samples - n : kSamples;
    for (Index i = 0; i < kSamples; ++i) products.x[i] = RowOfX(n + (i < samples ? i : 0)) + c * kBytes;
    for (Index i = 0; i < kRows; ++i) products.w[i] = RowOfWeight(r + (i < rows ? i : 0)) + c * kBytes;
    Index sums[kSamples][kRows] = {};
    products.Sum(columns, steps, sums);
    for (Index m = 0; m < samples; ++m) {
      char* to = reinterpret_cast<char*>(a.sums) + 8 * ((n + m) * a.rows + r);
      for (Index i = 0; i < rows; ++i) Store(to + 8 * i, (c == 0 ? added[i] : LoadAt<Index>(to, i, 8)) + sums[m][i]);
    }
  }

  // Up to kRows rows of all samples.
  void Rows(Index r, Index rows, Index largest_x) const {
    Index added[kRows] = {}, steps = kChunk;
    for (Index i = 0; i < rows; ++i) {
      const Index bias = a.bias == nullptr ? 0 : LoadAt<Index>(a.bias, r + i, 8);
      const Index kept = bias < -kMostBias ? -kMostBias : bias > kMostBias ? kMostBias : bias;
      added[i] = kept - Numbers::Raised(RowOfWeight(r + i), a.columns);
    }
    if constexpr (!Numbers::kFew) {
      // A pass over the weights pays for several samples.
      const Index largest_w = a.samples > 1 ? Numbers::Largest(RowOfWeight(r), rows * a.columns) : 32768;
      steps = StepsOf(largest_x, largest_w);
    }
    constexpr int kSamples = Numbers::kSamples;
    Index c = 0;
    do {  // once where there are no columns
      const Index columns = a.columns - c < kChunk ? a.columns - c : kChunk;
      Index n = 0;
      for (; n + 1 < a.samples; n += kSamples) Tile<kSamples>(r, rows, added, n, c, columns, steps);
      if (n < a.samples) Tile<1>(r, rows, added, n, c, columns, steps);
      c += kChunk;
    } while (c < a.columns);
  }

  void Run(Index row_begin, Index row_end) const {
    Index largest_x = 0;
    if constexpr (!Numbers::kFew) largest_x = Numbers::Largest(a.x, a.samples * a.columns);
    for (Index r = row_begin; r < row_end; r += kRows) Rows(r, row_end - r < kRows ? row_end - r : kRows, largest_x);
  }

  const FixedMatmulArgs& a;
};

// y of values [begin, end), at most a block of random bits, of which u are theirs.
inline void ConvertSome(const FixedConvertArgs& a, const FixedConversion& conversion, Index begin, Index end,
                        const std::uint32_t* u) {
  const float step = __builtin_bit_cast(float, static_cast<std::uint32_t>(127 - a.fraction_bits) << 23);
  char* y = static_cast<char*>(a.y);
  std::int32_t k[kRandomBlock];
  const Index count = end - begin;
  // In registers, so that the loop becomes one of vectors.
  const FixedConversion local = conversion;
  for (Index i = 0; i < count; ++i) k[i] = local.Of(LoadAt<Index>(a.sums, begin + i, 8), u[i]);
  switch (a.as) {
    case FixedAs::kFloats:
      for (Index i = 0; i < count; ++i) Store(y + 4 * (begin + i), static_cast<float>(k[i]) * step);
      break;
    case FixedAs::kInt8:
      for (Index i = 0; i < count; ++i) Store(y + begin + i, static_cast<signed char>(k[i]));
      break;
    case FixedAs::kInt16:
      for (Index i = 0; i < count; ++i) Store(y + 2 * (begin + i), static_cast<std::int16_t>(k[i]));
      break;
    case FixedAs::kInt32:
      for (Index i = 0; i < count; ++i) Store(y + 4 * (begin + i), k[i]);
      break;
  }
}

// random(block, u) gives the bits of a block.
template <typename Random>
void ConvertBlocks(const FixedConvertArgs& a, Index begin, Index end, const Random& random) {
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  alignas(64) std::uint32_t u[kRandomBlock] = {};
  while (begin < end) {
    const std::uint64_t number = a.offset + static_cast<std::uint64_t>(begin);
    const auto first = static_cast<Index>(number % kRandomBlock);
    const Index stop = end - begin < kRandomBlock - first ? end : begin + kRandomBlock - first;
    if (conversion.random) random(number / kRandomBlock, u);
    ConvertSome(a, conversion, begin, stop, u + first);
    begin = stop;
  }
}

}  // namespace
}  // namespace tersetorch
