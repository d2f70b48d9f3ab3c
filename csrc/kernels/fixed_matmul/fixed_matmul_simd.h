// What the vector levels share: the walk over tiles, how long 32 bits last, and conversions. Local to the including
// file.
//
// A level gives, for int8 and for int16, a struct Numbers: Register, of kLanes sums of 32 bits; kColumns that it
// multiplies at once, of kSamples samples with 4 rows, kBytes each; kSteps that never overflow, 0 where that depends on
// Largest(p, count), the largest |number|. X(p, count) and W(p, count) load the first count columns, then zeros;
// Add(sums, x, w) multiplies them, and Raised(w, columns) is how much larger than it should be that makes a row's sum.
// Wide is of 64 bits: Widened(sums) - 1 for each lane, Sum(a, b, c, d, sums) four of them.
#pragma once

#include <cstdint>

#include "kernels/common/fixed_sums.h"
#include "kernels/common/vectors.h"
#include "kernels/fixed_matmul/fixed_matmul.h"

namespace tersetorch {
namespace {

// How many vectors of products 32 bits can add up: sums s keep to |s| < 2^31, and a single one to -2^31 < s <= 2^31,
// since the two products of a pair are both 2^30 at most where they are positive. So s - 1 always fits.
inline Index StepsOf(Index largest_x, Index largest_w) {
  const Index pair = 2 * largest_x * largest_w;
  const Index steps = pair == 0 ? 0x7fffffff : 0x7fffffff / pair;
  return steps < 1 ? 1 : steps;
}

// kRows rows times kSamples samples, some of which may be the same.
template <typename Numbers, int kRows, int kSamples>
void MultiplyTile(const char* const (&x)[kSamples], const char* const (&w)[kRows], Index columns, Index steps,
                  typename Numbers::Wide (&totals)[kRows][kSamples], Index* flushes) {
  constexpr Index kColumns = Numbers::kColumns, kBytes = Numbers::kBytes;
  for (auto& row : totals) {
    for (auto& total : row) total = typename Numbers::Wide{};
  }
  for (Index c = 0; c < columns;) {
    typename Numbers::Register sums[kRows][kSamples];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) sums[r][n] = Numbers::Zero();
    }
    const auto add = [&](Index count) {
      typename Numbers::Register of_x[kSamples];
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) of_x[n] = Numbers::X(x[n] + c * kBytes, count);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto of_w = Numbers::W(w[r] + c * kBytes, count);
#pragma GCC unroll 4
        for (int n = 0; n < kSamples; ++n) sums[r][n] = Numbers::Add(sums[r][n], of_x[n], of_w);
      }
    };
    const Index left = columns - c,
                end = left / kColumns < steps ? c + left / kColumns * kColumns : c + steps * kColumns;
    const bool tail = end < columns && columns - end < kColumns && (end - c) / kColumns < steps;
    for (; c < end; c += kColumns) add(kColumns);
    if (tail) {
      add(columns - c);
      c = columns;
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) totals[r][n] += Numbers::Widened(sums[r][n]);
    }
    ++*flushes;
  }
}

template <typename Numbers>
struct Multiplication {
  static constexpr Index kBytes = Numbers::kBytes;

  const char* RowOfX(Index n) const { return static_cast<const char*>(a.x) + n * a.columns * kBytes; }
  const char* RowOfWeight(Index r) const { return static_cast<const char*>(a.weight) + r * a.columns * kBytes; }

  template <int kRows, int kSamples>
  void Tile(Index r, Index row_end, const Index (&added)[kRows], Index n, Index steps) const {
    const char *x[kSamples], *w[kRows];
    const Index rows = row_end - r < kRows ? row_end - r : kRows;
    const Index samples = a.samples - n < kSamples ? a.samples - n : kSamples;
    for (Index i = 0; i < kSamples; ++i) x[i] = RowOfX(n + (i < samples ? i : 0));
    for (Index i = 0; i < kRows; ++i) w[i] = RowOfWeight(r + (i < rows ? i : 0));
    typename Numbers::Wide totals[kRows][kSamples];
    Index flushes = 0;
    MultiplyTile<Numbers, kRows, kSamples>(x, w, a.columns, steps, totals, &flushes);
    static_assert(kRows % 4 == 0);
    for (int m = 0; m < samples; ++m) {
      Index sums[kRows];
      for (int i = 0; i < kRows; i += 4) {
        Numbers::Sum(totals[i][m], totals[i + 1][m], totals[i + 2][m], totals[i + 3][m], sums + i);
      }
      for (int i = 0; i < rows; ++i) {
        Store(reinterpret_cast<char*>(a.sums) + 8 * ((n + m) * a.rows + r + i),
              sums[i] + flushes * Numbers::kLanes + added[i]);
      }
    }
  }

  // A few rows of all samples.
  template <int kRows>
  void Rows(Index r, Index row_end, Index largest_x) const {
    Index added[kRows] = {}, largest_w = 32768;
    for (Index i = 0; i < kRows && r + i < row_end; ++i) {
      const Index bias = a.bias == nullptr ? 0 : LoadAt<Index>(a.bias, r + i, 8);
      added[i] = (bias < -kMostBias  ? -kMostBias
                  : bias > kMostBias ? kMostBias
                                     : bias) -
                 Numbers::Raised(RowOfWeight(r + i), a.columns);
    }
    // A pass over the weights pays for several samples.
    if (Numbers::kSteps == 0 && a.samples > 1) {
      const Index rows = row_end - r < kRows ? row_end - r : kRows;
      largest_w = Numbers::Largest(RowOfWeight(r), rows * a.columns);
    }
    const Index steps = Numbers::kSteps == 0 ? StepsOf(largest_x, largest_w) : Numbers::kSteps;
    Index n = 0;
    for (; n + 1 < a.samples; n += Numbers::kSamples) Tile<kRows, Numbers::kSamples>(r, row_end, added, n, steps);
    if (n < a.samples) Tile<kRows, 1>(r, row_end, added, n, steps);
  }

  void Run(Index row_begin, Index row_end) const {
    const Index largest_x = Numbers::kSteps == 0 ? Numbers::Largest(a.x, a.samples * a.columns) : 0;
    for (Index r = row_begin; r < row_end; r += 4) Rows<4>(r, row_end, largest_x);
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
  for (Index i = 0; i < count; ++i) k[i] = conversion.Of(LoadAt<Index>(a.sums, begin + i, 8), u[i]);
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
