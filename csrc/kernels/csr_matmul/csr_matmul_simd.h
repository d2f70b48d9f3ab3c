// The algorithm of every vector level, written once over vectors of `kLanes` floats: the compiler turns `a + b * c`
// into one fused instruction of the level that the including file is built for. Everything here is local to that file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/csr_matmul/csr_matmul.h"

namespace tersetorch {
namespace {

// ---- weights

// The largest of v's elements.
template <typename V>
std::uint32_t Largest(V v) {
  std::uint32_t largest = 0;
  for (unsigned i = 0; i < sizeof v / sizeof v[0]; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

struct Float32Values {
  explicit Float32Values(const CsrWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadAt<float>(values, k, 4); }
  bool Inside(Index, Index) const { return true; }
  bool EightInside(Index) const { return true; }

  const void* values;
};

struct BFloat16Values {
  explicit BFloat16Values(const CsrWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadFloat(values, FloatDtype::kBFloat16, k); }
  bool Inside(Index, Index) const { return true; }
  bool EightInside(Index) const { return true; }

  const void* values;
};

struct CodeValues {
  explicit CodeValues(const CsrWeight& w)
      : codes(static_cast<const std::uint8_t*>(w.values)), codebook(w.codebook), entries(w.entries) {}
  float At(Index k) const { return LoadAt<float>(codebook, codes[k], 4); }
  bool Inside(Index begin, Index end) const {
    if (entries == kCsrMaxEntries) return true;
    Bytes32 parts{};  // of the largest code
    Index k = begin;
    for (; k + 32 <= end; k += 32) {
      const Bytes32 code = LoadAt<Bytes32>(codes, k, 1);
      parts = code > parts ? code : parts;
    }
    Index largest = Largest(parts);
    for (; k < end; ++k) largest = codes[k] > largest ? codes[k] : largest;
    return begin == end || largest < entries;
  }
  bool EightInside(Index k) const {
    if (entries == kCsrMaxEntries) return true;
    const Bytes8 outside = (Bytes8)(LoadAt<Bytes8>(codes, k, 1) >= static_cast<std::uint8_t>(entries));
    return __builtin_bit_cast(std::uint64_t, outside) == 0;
  }

  const std::uint8_t* codes;
  const float* codebook;
  Index entries;
};

// Where only the positions count.
struct NoValues {
  explicit NoValues(const CsrWeight&) {}
  bool Inside(Index, Index) const { return true; }
};

struct Row {
  Index begin, end;  // its non-zeros
};

Row RowAt(const CsrWeight& w, Index r) {
  return {LoadAt<std::int32_t>(w.row_offsets, r, 4), LoadAt<std::int32_t>(w.row_offsets, r + 1, 4)};
}

// A checked column.
std::uint64_t ColumnAt(const CsrWeight& w, Index k) { return LoadAt<std::uint32_t>(w.col_indices, k, 4); }

bool ColumnsInside(const CsrWeight& w, Index begin, Index end) {
  Bits8 parts[2]{};  // of the largest column; as unsigned numbers, negative columns are too large
  Index k = begin;
  for (; k + 16 <= end; k += 16) {
    for (int i = 0; i < 2; ++i) {
      const Bits8 column = LoadAt<Bits8>(w.col_indices, k + 8 * i, 4);
      parts[i] = column > parts[i] ? column : parts[i];
    }
  }
  std::uint64_t largest = Largest(parts[0] > parts[1] ? parts[0] : parts[1]);
  for (; k < end; ++k) largest = ColumnAt(w, k) > largest ? ColumnAt(w, k) : largest;
  return begin == end || largest < static_cast<std::uint64_t>(w.columns);
}

// Checks rows ahead of their use, several at once: a loop over one row is short, and its end surprises the processor.
// For the gradients, whose loops take single non-zeros.
template <typename Values>
class RowChecker {
 public:
  RowChecker(const CsrWeight& w, const Values& values, Index row_begin, Index row_end)
      : w_(w), values_(values), checked_(row_begin), row_end_(row_end) {}

  // Whether `row` may be used; rows come in order.
  CsrStatus Check(Index row) {
    if (row < checked_) return CsrStatus::kOk;
    const Index begin = RowAt(w_, checked_).begin;
    Index end = begin;
    if (begin < 0) return CsrStatus::kBadRowOffsets;
    do {
      const Row next = RowAt(w_, checked_);
      if (next.end < next.begin || next.end > w_.nnz) return CsrStatus::kBadRowOffsets;
      end = next.end;
      ++checked_;
    } while (checked_ < row_end_ && end - begin < kAhead);
    if (!ColumnsInside(w_, begin, end)) return CsrStatus::kBadColumn;
    return values_.Inside(begin, end) ? CsrStatus::kOk : CsrStatus::kBadCode;
  }

 private:
  static constexpr Index kAhead = 1024;  // non-zeros, few enough to stay in the first cache level until they are used

  const CsrWeight& w_;
  const Values& values_;
  Index checked_, row_end_;  // rows before checked_ are sound
};

// ---- y

// Adds kCount non-zeros from k on, each to a chain of its own, so that none waits for another's sum.
template <int kLanes, int kVectors, int kCount, typename Values>
void AddNonZeros(const CsrWeight& w, const Values& values, const float* panel, Index k,
                 Vector<kLanes> (*sums)[kVectors]) {
#pragma GCC unroll 8
  for (int chain = 0; chain < kCount; ++chain) {
    const float* x = panel + ColumnAt(w, k + chain) * (kLanes * kVectors);
    const Vector<kLanes> value = Splat<kLanes>(values.At(k + chain));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[chain][v] += value * Load<Vector<kLanes>>(x + v * kLanes);
  }
}

// Whether non-zeros [k, k + 8) may be used. Checked right before they are, because the panel's lines drive the columns
// that a pass ahead has read out of the first cache level again, and its bursts of reads wait for the memory.
template <typename Values>
CsrStatus CheckEight(const CsrWeight& w, const Values& values, Index k) {
  const Bits8 outside = (Bits8)(LoadAt<Bits8>(w.col_indices, k, 4) >= static_cast<std::uint32_t>(w.columns));
  if (_mm256_movemask_ps((__m256)outside) != 0) return CsrStatus::kBadColumn;
  return values.EightInside(k) ? CsrStatus::kOk : CsrStatus::kBadCode;
}

// The same for [k, end), fewer than eight.
template <typename Values>
CsrStatus CheckTail(const CsrWeight& w, const Values& values, Index k, Index end) {
  const auto left = static_cast<std::int32_t>(end - k);
  const Int8 taken = Int8{0, 1, 2, 3, 4, 5, 6, 7} < left;
  const auto columns = (Bits8)_mm256_maskload_epi32(w.col_indices + k, (__m256i)taken);
  const Bits8 outside = (Bits8)(columns >= static_cast<std::uint32_t>(w.columns)) & (Bits8)taken;
  if (_mm256_movemask_ps((__m256)outside) != 0) return CsrStatus::kBadColumn;
  return values.Inside(k, end) ? CsrStatus::kOk : CsrStatus::kBadCode;
}

// One row of a tile: w[row] * panel + bias.
template <int kLanes, int kVectors, typename Values>
CsrStatus MultiplyRow(const CsrWeight& w, const Values& values, Row row, const float* panel, float bias, float* out) {
  constexpr int kChains = 8 / kVectors;  // eight sums hide the latency of a fused multiply-add
  Vector<kLanes> sums[kChains][kVectors] = {};
  Index k = row.begin;
  for (; k + 8 <= row.end; k += 8) {
    if (const CsrStatus status = CheckEight(w, values, k); status != CsrStatus::kOk) return status;
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += kChains) AddNonZeros<kLanes, kVectors, kChains>(w, values, panel, k + i, sums);
  }
  if (const CsrStatus status = CheckTail(w, values, k, row.end); status != CsrStatus::kOk) return status;
  if constexpr (kChains < 8) {
    for (; k + kChains <= row.end; k += kChains) AddNonZeros<kLanes, kVectors, kChains>(w, values, panel, k, sums);
  }
  if constexpr (kChains > 4) {
    if (k + 4 <= row.end) {
      AddNonZeros<kLanes, kVectors, 4>(w, values, panel, k, sums);
      k += 4;
    }
  }
  if constexpr (kChains > 2) {
    if (k + 2 <= row.end) {
      AddNonZeros<kLanes, kVectors, 2>(w, values, panel, k, sums);
      k += 2;
    }
  }
  if (k < row.end) AddNonZeros<kLanes, kVectors, 1>(w, values, panel, k, sums);
#pragma GCC unroll 3
  for (int half = kChains / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
    for (int chain = 0; chain < half; ++chain) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[chain][v] += sums[chain + half][v];
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) Store(out + v * kLanes, sums[0][v] + Splat<kLanes>(bias));
  return CsrStatus::kOk;
}

// The same for one sample. Intrinsics, because the compiler would gather the eight chains into a vector piece by piece.
template <typename Values>
CsrStatus MultiplyRow(const CsrWeight& w, const Values& values, Row row, const float* x, float bias, float* out) {
  constexpr int kChains = 8;
  const auto add = [&](Index k, __m128 sum) {
    return _mm_fmadd_ss(_mm_set_ss(values.At(k)), _mm_set_ss(Load<float>(x + ColumnAt(w, k))), sum);
  };
  __m128 sums[kChains] = {};
  Index k = row.begin;
  for (; k + kChains <= row.end; k += kChains) {
    if (const CsrStatus status = CheckEight(w, values, k); status != CsrStatus::kOk) return status;
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = add(k + chain, sums[chain]);
  }
  if (const CsrStatus status = CheckTail(w, values, k, row.end); status != CsrStatus::kOk) return status;
  for (; k + 2 <= row.end; k += 2) {
    sums[0] = add(k, sums[0]);
    sums[1] = add(k + 1, sums[1]);
  }
  if (k < row.end) sums[2] = add(k, sums[2]);
  const __m128 total = _mm_add_ss(_mm_add_ss(_mm_add_ss(sums[0], sums[1]), _mm_add_ss(sums[2], sums[3])),
                                  _mm_add_ss(_mm_add_ss(sums[4], sums[5]), _mm_add_ss(sums[6], sums[7])));
  *out = _mm_cvtss_f32(total) + bias;
  return CsrStatus::kOk;
}

template <int kLanes, int kWidth, typename Values>
CsrStatus MultiplyPanel(const CsrMatmulArgs& a, Index row_begin, Index row_end) {
  constexpr Index kTileRows = 64;
  alignas(64) float tile[kTileRows * kWidth];
  const CsrWeight& w = a.weight;
  const Values values(w);
  for (Index begin = row_begin; begin < row_end; begin += kTileRows) {
    const Index count = row_end - begin < kTileRows ? row_end - begin : kTileRows;
    for (Index i = 0; i < count; ++i) {
      const Row row = RowAt(w, begin + i);
      if (row.begin < 0 || row.end < row.begin || row.end > w.nnz) return CsrStatus::kBadRowOffsets;
      const float bias = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, begin + i, 4);
      CsrStatus status;
      if constexpr (kWidth == 1) {
        status = MultiplyRow(w, values, row, a.panel, bias, tile + i);
      } else {
        status = MultiplyRow<kLanes, kWidth / kLanes>(w, values, row, a.panel, bias, tile + i * kWidth);
      }
      if (status != CsrStatus::kOk) return status;
    }
    StoreTransposed<kWidth>(tile, count, a.samples, a.y, a.y_stored_as, w.rows, begin);
  }
  return CsrStatus::kOk;
}

// ---- gradients

template <int kLanes, int kWidth, typename Values>
CsrStatus ScatterPanel(const CsrGradXArgs& a, Index, Index) {
  constexpr int kVectors = kWidth / kLanes;
  const CsrWeight& w = a.weight;
  const Values values(w);
  RowChecker<Values> checker(w, values, 0, w.rows);
  for (Index i = 0; i < w.columns * kWidth; ++i) a.sums[i] = 0;
  for (Index r = 0; r < w.rows; ++r) {
    if (const CsrStatus status = checker.Check(r); status != CsrStatus::kOk) return status;
    const Row row = RowAt(w, r);
    Vector<kLanes> grad[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) grad[v] = Load<Vector<kLanes>>(a.grad_panel + r * kWidth + v * kLanes);
    for (Index k = row.begin; k < row.end; ++k) {
      float* sum = a.sums + ColumnAt(w, k) * kWidth;
      const Vector<kLanes> value = Splat<kLanes>(values.At(k));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v, sum += kLanes) Store(sum, Load<Vector<kLanes>>(sum) + value * grad[v]);
    }
  }
  StoreTransposed<kWidth>(a.sums, w.columns, a.samples, a.grad_x, a.grad_x_stored_as, w.columns, 0);
  return CsrStatus::kOk;
}

// The sums of eight vectors' lanes.
Float8 SumLanes(Float8 (&m)[8]) {
  Transpose(m);
  return ((m[0] + m[1]) + (m[2] + m[3])) + ((m[4] + m[5]) + (m[6] + m[7]));
}

template <int kLanes>
Float8 FoldToEight(const Vector<kLanes>& v) {
  Float8 parts[kLanes / 8];
  __builtin_memcpy(parts, &v, sizeof v);
  return kLanes == 8 ? parts[0] : parts[0] + parts[kLanes / 8 - 1];
}

template <int kLanes, int kWidth, typename Values>
CsrStatus SamplePanel(const CsrGradValuesArgs& a, Index row_begin, Index row_end) {
  constexpr int kVectors = kWidth / kLanes;
  const CsrWeight& w = a.weight;
  const Values values(w);
  RowChecker<Values> checker(w, values, row_begin, row_end);
  for (Index r = row_begin; r < row_end; ++r) {
    if (const CsrStatus status = checker.Check(r); status != CsrStatus::kOk) return status;
    const Row row = RowAt(w, r);
    const float* grad = a.grad_panel + r * kWidth;
    if constexpr (kLanes == 1) {
      for (Index k = row.begin; k < row.end; ++k) {
        const float product = Load<float>(grad) * Load<float>(a.x_panel + ColumnAt(w, k));
        a.grad_values[k] = a.add ? a.grad_values[k] + product : product;
      }
    } else {
      for (Index k = row.begin; k < row.end; k += 8) {
        const Index count = row.end - k < 8 ? row.end - k : 8;
        Float8 products[8] = {};
        for (Index i = 0; i < count; ++i) {
          const float* x = a.x_panel + ColumnAt(w, k + i) * kWidth;
          Vector<kLanes> sum{};
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sum += Load<Vector<kLanes>>(grad + v * kLanes) * Load<Vector<kLanes>>(x + v * kLanes);
          }
          products[i] = FoldToEight<kLanes>(sum);
        }
        const Float8 sums = SumLanes(products);
        if (count == 8) {
          Store(a.grad_values + k, a.add ? Load<Float8>(a.grad_values + k) + sums : sums);
        } else {
          for (Index i = 0; i < count; ++i) {
            a.grad_values[k + i] = a.add ? a.grad_values[k + i] + sums[i] : sums[i];
          }
        }
      }
    }
  }
  return CsrStatus::kOk;
}

// ---- from the arguments to the template

// Kernel<lanes, width, Values>::Run for the panel's width and the way the values are stored.
template <int kMaxLanes, int kWidth, template <int, int, typename> typename Kernel, typename Args>
CsrStatus ForValues(const Args& a, CsrValues stored_as, Index begin, Index end) {
  constexpr int kLanes = kWidth < kMaxLanes ? kWidth : kMaxLanes;
  switch (stored_as) {
    case CsrValues::kFloat32:
      return Kernel<kLanes, kWidth, Float32Values>::Run(a, begin, end);
    case CsrValues::kBFloat16:
      return Kernel<kLanes, kWidth, BFloat16Values>::Run(a, begin, end);
    case CsrValues::kCodes:
      break;
  }
  return Kernel<kLanes, kWidth, CodeValues>::Run(a, begin, end);
}

template <int kMaxLanes, template <int, int, typename> typename Kernel, typename Args>
CsrStatus ForWidth(const Args& a, CsrValues stored_as, Index begin, Index end) {
  switch (a.width) {
    case 1:
      return ForValues<kMaxLanes, 1, Kernel>(a, stored_as, begin, end);
    case 8:
      return ForValues<kMaxLanes, 8, Kernel>(a, stored_as, begin, end);
    case 16:
      return ForValues<kMaxLanes, 16, Kernel>(a, stored_as, begin, end);
    default:
      return ForValues<kMaxLanes, 32, Kernel>(a, stored_as, begin, end);
  }
}

template <int kLanes, int kWidth, typename Values>
struct Multiply {
  static CsrStatus Run(const CsrMatmulArgs& a, Index begin, Index end) {
    return MultiplyPanel<kLanes, kWidth, Values>(a, begin, end);
  }
};

template <int kLanes, int kWidth, typename Values>
struct Scatter {
  static CsrStatus Run(const CsrGradXArgs& a, Index begin, Index end) {
    return ScatterPanel<kLanes, kWidth, Values>(a, begin, end);
  }
};

template <int kLanes, int kWidth, typename>
struct Sample {
  static CsrStatus Run(const CsrGradValuesArgs& a, Index begin, Index end) {
    return SamplePanel<kLanes, kWidth, NoValues>(a, begin, end);
  }
};

template <int kMaxLanes>
CsrStatus MatmulWithLanes(const CsrMatmulArgs& a, Index row_begin, Index row_end) noexcept {
  return ForWidth<kMaxLanes, Multiply>(a, a.weight.stored_as, row_begin, row_end);
}

template <int kMaxLanes>
CsrStatus GradXWithLanes(const CsrGradXArgs& a) noexcept {
  return ForWidth<kMaxLanes, Scatter>(a, a.weight.stored_as, 0, a.weight.rows);
}

template <int kMaxLanes>
CsrStatus GradValuesWithLanes(const CsrGradValuesArgs& a, Index row_begin, Index row_end) noexcept {
  return ForWidth<kMaxLanes, Sample>(a, CsrValues::kFloat32, row_begin, row_end);
}

template <int kMaxLanes>
inline constexpr CsrKernels kKernelsWithLanes{MatmulWithLanes<kMaxLanes>, GradXWithLanes<kMaxLanes>,
                                              GradValuesWithLanes<kMaxLanes>};

}  // namespace
}  // namespace tersetorch
