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
  using Stored = float;
  static constexpr bool kChecked = false;

  explicit Float32Values(const CsrWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadAt<float>(values, k, 4); }
  bool Inside(Index, Index) const { return true; }
  bool EightInside(Index) const { return true; }

  const void* values;
};

struct BFloat16Values {
  using Stored = std::uint16_t;
  static constexpr bool kChecked = false;

  explicit BFloat16Values(const CsrWeight& w) : values(w.values) {}
  float At(Index k) const { return LoadFloat(values, FloatDtype::kBFloat16, k); }
  bool Inside(Index, Index) const { return true; }
  bool EightInside(Index) const { return true; }

  const void* values;
};

struct CodeValues {
  using Stored = std::uint8_t;
  static constexpr bool kChecked = true;

  explicit CodeValues(const CsrWeight& w)
      : codes(static_cast<const std::uint8_t*>(w.values)), codebook(w.codebook), entries(w.entries) {
#ifdef __AVX512F__
    low = _mm512_maskz_loadu_ps(entries >= 16 ? 0xffff : (1u << entries) - 1, codebook);
    high = _mm512_maskz_loadu_ps(entries >= 32   ? 0xffff
                                 : entries <= 16 ? 0
                                                 : (1u << (entries - 16)) - 1,
                                 codebook + 16);
#endif
  }
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
#ifdef __AVX512F__
  __m512 low, high;  // the first 32 entries
#endif
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

// A column; as an unsigned number, so that a negative one is too large.
template <typename Stored>
std::uint64_t ColumnAt(const CsrWeight& w, Index k) {
  return LoadAt<Stored>(w.col_indices, k, sizeof(Stored));
}

// Eight columns from k on.
template <typename Stored>
Bits8 ColumnsAt(const CsrWeight& w, Index k) {
  if constexpr (sizeof(Stored) == 4) {
    return LoadAt<Bits8>(w.col_indices, k, 4);
  } else {
    return __builtin_convertvector(LoadAt<Halves8>(w.col_indices, k, 2), Bits8);
  }
}

template <typename Stored>
bool ColumnsInside(const CsrWeight& w, Index begin, Index end) {
  Bits8 parts[2]{};  // of the largest column
  Index k = begin;
  for (; k + 16 <= end; k += 16) {
    for (int i = 0; i < 2; ++i) {
      const Bits8 column = ColumnsAt<Stored>(w, k + 8 * i);
      parts[i] = column > parts[i] ? column : parts[i];
    }
  }
  std::uint64_t largest = Largest(parts[0] > parts[1] ? parts[0] : parts[1]);
  for (; k < end; ++k) largest = ColumnAt<Stored>(w, k) > largest ? ColumnAt<Stored>(w, k) : largest;
  return begin == end || largest < static_cast<std::uint64_t>(w.columns);
}

// Checks rows ahead of their use, several at once: a loop over one row is short, and its end surprises the processor.
// For the gradients, whose loops take single non-zeros.
template <typename Stored, typename Values>
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
    if (!ColumnsInside<Stored>(w_, begin, end)) return CsrStatus::kBadColumn;
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
template <int kLanes, int kVectors, int kCount, typename Stored, typename Values>
void AddNonZeros(const CsrWeight& w, const Values& values, const float* panel, Index k,
                 Vector<kLanes> (*sums)[kVectors]) {
#pragma GCC unroll 8
  for (int chain = 0; chain < kCount; ++chain) {
    const float* x = panel + ColumnAt<Stored>(w, k + chain) * (kLanes * kVectors);
    const Vector<kLanes> value = Splat<kLanes>(values.At(k + chain));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[chain][v] += value * Load<Vector<kLanes>>(x + v * kLanes);
  }
}

// Whether non-zeros [k, k + 8) may be used. Checked right before they are, because the panel's lines drive the columns
// that a pass ahead has read out of the first cache level again, and its bursts of reads wait for the memory.
template <typename Stored, typename Values>
CsrStatus CheckEight(const CsrWeight& w, const Values& values, Index k) {
  const Bits8 outside = (Bits8)(ColumnsAt<Stored>(w, k) >= static_cast<std::uint32_t>(w.columns));
  if (_mm256_movemask_ps((__m256)outside) != 0) return CsrStatus::kBadColumn;
  return values.EightInside(k) ? CsrStatus::kOk : CsrStatus::kBadCode;
}

// The same for [k, end), fewer than eight.
template <typename Stored, typename Values>
CsrStatus CheckTail(const CsrWeight& w, const Values& values, Index k, Index end) {
  bool inside = true;
  for (Index i = k; i < end; ++i) inside &= ColumnAt<Stored>(w, i) < static_cast<std::uint64_t>(w.columns);
  if (!inside) return CsrStatus::kBadColumn;
  return values.Inside(k, end) ? CsrStatus::kOk : CsrStatus::kBadCode;
}

// One row of a tile: w[row] * panel + bias.
template <int kLanes, int kVectors, typename Stored, typename Values>
CsrStatus MultiplyRow(const CsrWeight& w, const Values& values, Row row, const float* panel, float bias, float* out) {
  constexpr int kChains = 8 / kVectors;  // eight sums hide the latency of a fused multiply-add
  Vector<kLanes> sums[kChains][kVectors] = {};
  Index k = row.begin;
  for (; k + 8 <= row.end; k += 8) {
    if (const CsrStatus status = CheckEight<Stored>(w, values, k); status != CsrStatus::kOk) return status;
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += kChains) AddNonZeros<kLanes, kVectors, kChains, Stored>(w, values, panel, k + i, sums);
  }
  if (const CsrStatus status = CheckTail<Stored>(w, values, k, row.end); status != CsrStatus::kOk) return status;
  if constexpr (kChains < 8) {
    for (; k + kChains <= row.end; k += kChains)
      AddNonZeros<kLanes, kVectors, kChains, Stored>(w, values, panel, k, sums);
  }
  if constexpr (kChains > 4) {
    if (k + 4 <= row.end) {
      AddNonZeros<kLanes, kVectors, 4, Stored>(w, values, panel, k, sums);
      k += 4;
    }
  }
  if constexpr (kChains > 2) {
    if (k + 2 <= row.end) {
      AddNonZeros<kLanes, kVectors, 2, Stored>(w, values, panel, k, sums);
      k += 2;
    }
  }
  if (k < row.end) AddNonZeros<kLanes, kVectors, 1, Stored>(w, values, panel, k, sums);
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

// ---- y of one sample: a vector's lanes take the non-zeros in turn, lane i the (i + n * kLanes)-th of its row

#ifdef __AVX512F__
struct Gather {
  static constexpr Index kLanes = 16;
  using Floats = __m512;
  using Words = __m512i;
  using Mask = __mmask16;

  static Mask First(Index count) { return count >= kLanes ? 0xffff : (1u << count) - 1; }
  static Mask And(Mask a, Mask b) { return _kand_mask16(a, b); }
  static Mask Below(Mask of, Words words, std::uint32_t bound) {
    return _mm512_mask_cmplt_epu32_mask(of, words, _mm512_set1_epi32(static_cast<int>(bound)));
  }
  static bool Holds(Mask needed, Mask got) { return needed == got; }
  static Words Widen(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  static Words Widen(const std::uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Words Widen(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Floats HighHalves(Words words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); }
  static Floats At(const float* from, Mask of, Words words) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), of, words, from, 4);
  }
  static Floats AddProducts(Mask of, Floats a, Floats b, Floats sums) { return _mm512_mask3_fmadd_ps(a, b, sums, of); }
  static float Sum(Floats sums) { return _mm512_reduce_add_ps(sums); }
};
#else
struct Gather {
  static constexpr Index kLanes = 8;
  using Floats = __m256;
  using Words = __m256i;
  using Mask = __m256i;

  static Mask First(Index count) {
    return (Mask)(Int8{0, 1, 2, 3, 4, 5, 6, 7} < static_cast<std::int32_t>(count < kLanes ? count : kLanes));
  }
  static Mask And(Mask a, Mask b) { return _mm256_and_si256(a, b); }
  static Mask Below(Mask of, Words words, std::uint32_t bound) { return And(of, (Mask)((Bits8)words < bound)); }
  static bool Holds(Mask needed, Mask got) { return _mm256_testc_si256(got, needed) != 0; }
  static Words Widen(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Words Widen(const std::uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Words Widen(const std::uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Floats HighHalves(Words words) { return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)); }
  static Floats At(const float* from, Mask of, Words words) {
    return _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, words, _mm256_castsi256_ps(of), 4);
  }
  static Floats AddProducts(Mask of, Floats a, Floats b, Floats sums) {
    return _mm256_fmadd_ps(_mm256_and_ps(a, _mm256_castsi256_ps(of)), b, sums);
  }
  static float Sum(Floats sums) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};
#endif

// kLanes stored values as floats; codes below their bound are noted in `inside`.
inline Gather::Floats Widen(const Float32Values&, const float* p, Gather::Mask, Gather::Mask&) {
  return __builtin_bit_cast(Gather::Floats, Gather::Widen(reinterpret_cast<const std::uint32_t*>(p)));
}

inline Gather::Floats Widen(const BFloat16Values&, const std::uint16_t* p, Gather::Mask, Gather::Mask&) {
  return Gather::HighHalves(Gather::Widen(p));
}

inline Gather::Floats Widen(const CodeValues& values, const std::uint8_t* p, Gather::Mask of, Gather::Mask& inside) {
  const Gather::Words codes = Gather::Widen(p);
  const Gather::Mask known = Gather::Below(of, codes, static_cast<std::uint32_t>(values.entries));
  inside = Gather::And(inside, known);
#ifdef __AVX512F__
  if (values.entries <= 32) return _mm512_permutex2var_ps(values.low, codes, values.high);
#endif
  return Gather::At(values.codebook, known, codes);
}

// kLanes non-zeros of a row, of which those in `of` count.
template <typename Stored, typename Values>
Gather::Floats AddGathered(const CsrWeight& w, const Values& values, const Stored* columns,
                           const typename Values::Stored* p, const float* x, Gather::Mask of, Gather::Floats sums,
                           Gather::Mask& columns_inside, Gather::Mask& codes_inside) {
  const Gather::Words words = Gather::Widen(columns);
  const Gather::Mask known = Gather::Below(of, words, static_cast<std::uint32_t>(w.columns));
  columns_inside = Gather::And(columns_inside, known);
  return Gather::AddProducts(of, Widen(values, p, of, codes_inside), Gather::At(x, known, words), sums);
}

// A hint; the address may lie outside the array.
inline void Prefetch(const void* p, std::uintptr_t ahead) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + ahead));
}

template <typename Stored, typename Values>
CsrStatus GatherRow(const CsrWeight& w, const Values& values, Row row, const float* x, float bias, float* out) {
  using Value = typename Values::Stored;
  constexpr Index kLanes = Gather::kLanes;
  // The hardware prefetcher stops at the end of a page.
  constexpr std::uintptr_t kAhead = 512;
  const auto* columns = static_cast<const Stored*>(w.col_indices);
  const auto* stored = static_cast<const Value*>(w.values);
  const Gather::Mask all = Gather::First(kLanes);
  Gather::Mask columns_inside = all, codes_inside = all;
  Gather::Floats sums{};
  Index k = row.begin;
  for (; k + kLanes <= row.end; k += kLanes) {
    Prefetch(columns + k, kAhead * sizeof(Stored));
    Prefetch(stored + k, kAhead * sizeof(Value));
    sums = AddGathered(w, values, columns + k, stored + k, x, all, sums, columns_inside, codes_inside);
  }
  if (!Gather::Holds(all, columns_inside)) return CsrStatus::kBadColumn;
  if (!Gather::Holds(all, codes_inside)) return CsrStatus::kBadCode;
  if (k < row.end) {
    const Gather::Mask rest = Gather::First(row.end - k);
    if (k + kLanes <= w.nnz) {  // what follows belongs to other rows
      sums = AddGathered(w, values, columns + k, stored + k, x, rest, sums, columns_inside, codes_inside);
    } else {
      Stored last_columns[kLanes] = {};
      Value last_values[kLanes] = {};
      __builtin_memcpy(last_columns, columns + k, (row.end - k) * sizeof(Stored));
      __builtin_memcpy(last_values, stored + k, (row.end - k) * sizeof(Value));
      sums = AddGathered(w, values, last_columns, last_values, x, rest, sums, columns_inside, codes_inside);
    }
    if (!Gather::Holds(rest, columns_inside)) return CsrStatus::kBadColumn;
    if (Values::kChecked && !Gather::Holds(rest, codes_inside)) return CsrStatus::kBadCode;
  }
  *out = Gather::Sum(sums) + bias;
  return CsrStatus::kOk;
}

// The same sums by plain loads, for processors whose gathers are slow (a mitigation made them so on several).
template <typename Stored, typename Values>
CsrStatus LoadRow(const CsrWeight& w, const Values& values, Row row, const float* x, float bias, float* out) {
  constexpr Index kLanes = Gather::kLanes;
  const auto add = [&](Index k, __m128 sum) {
    return _mm_fmadd_ss(_mm_set_ss(values.At(k)), _mm_set_ss(Load<float>(x + ColumnAt<Stored>(w, k))), sum);
  };
  __m128 sums[kLanes] = {};
  Index k = row.begin;
  for (; k + kLanes <= row.end; k += kLanes) {
#pragma GCC unroll 2
    for (int i = 0; i < kLanes; i += 8) {
      if (const CsrStatus status = CheckEight<Stored>(w, values, k + i); status != CsrStatus::kOk) return status;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sums[i] = add(k + i, sums[i]);
  }
  if (!ColumnsInside<Stored>(w, k, row.end)) return CsrStatus::kBadColumn;
  if (!values.Inside(k, row.end)) return CsrStatus::kBadCode;
  float lanes[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = _mm_cvtss_f32(k + i < row.end ? add(k + i, sums[i]) : sums[i]);
  }
  *out = Gather::Sum(__builtin_bit_cast(Gather::Floats, lanes)) + bias;
  return CsrStatus::kOk;
}

// Whether gathering from the first cache level takes hardly more time than plain loads: asked once, of the clock.
__attribute__((noinline)) bool GathersAreFast() {
#ifdef TERSETORCH_CSR_WITHOUT_GATHERS
  return false;
#else
  static const bool fast = [] {
    constexpr Index kLanes = Gather::kLanes, kCount = 16 * kLanes;
    float x[kCount], sink[1];
    std::uint32_t columns[kCount];
    for (Index i = 0; i < kCount; ++i) {
      x[i] = 1.0f;
      columns[i] = static_cast<std::uint32_t>(i * 37 % kCount);
    }
    const CsrWeight w{nullptr, columns, CsrIndices::kInt32, x, CsrValues::kFloat32, nullptr, 0, 1, kCount, kCount};
    const Float32Values values(w);
    std::uint64_t gathers = ~std::uint64_t{0}, loads = gathers;
    for (int round = 0; round < 8; ++round) {  // the fastest: an interrupt slows some
      const std::uint64_t start = __rdtsc();
      GatherRow<std::uint32_t>(w, values, {0, kCount}, x, 0.0f, sink);
      asm volatile("" : : "r"(sink) : "memory");  // or the compiler drops what nobody reads
      const std::uint64_t middle = __rdtsc();
      LoadRow<std::uint32_t>(w, values, {0, kCount}, x, 0.0f, sink);
      asm volatile("" : : "r"(sink) : "memory");
      const std::uint64_t end = __rdtsc();
      gathers = middle - start < gathers ? middle - start : gathers;
      loads = end - middle < loads ? end - middle : loads;
    }
    return 4 * gathers < 5 * loads;  // outside the first cache level the gathers gain more
  }();
  return fast;
#endif
}

template <int kLanes, int kWidth, typename Stored, typename Values>
CsrStatus MultiplyPanel(const CsrMatmulArgs& a, Index row_begin, Index row_end) {
  constexpr Index kTileRows = 64;
  alignas(64) float tile[kTileRows * kWidth];
  const CsrWeight& w = a.weight;
  const Values values(w);
  [[maybe_unused]] const bool gathers = kWidth == 1 && GathersAreFast();
  for (Index begin = row_begin; begin < row_end; begin += kTileRows) {
    const Index count = row_end - begin < kTileRows ? row_end - begin : kTileRows;
    for (Index i = 0; i < count; ++i) {
      const Row row = RowAt(w, begin + i);
      if (row.begin < 0 || row.end < row.begin || row.end > w.nnz) return CsrStatus::kBadRowOffsets;
      const float bias = a.bias == nullptr ? 0.0f : LoadAt<float>(a.bias, begin + i, 4);
      CsrStatus status;
      if constexpr (kWidth == 1) {
        status = gathers ? GatherRow<Stored>(w, values, row, a.panel, bias, tile + i)
                         : LoadRow<Stored>(w, values, row, a.panel, bias, tile + i);
      } else {
        status = MultiplyRow<kLanes, kWidth / kLanes, Stored>(w, values, row, a.panel, bias, tile + i * kWidth);
      }
      if (status != CsrStatus::kOk) return status;
    }
    if (a.relu) {
      for (Index i = 0; i < count * kWidth; i += 8) {
        const Float8 sums = Load<Float8>(tile + i);
        Store(tile + i, sums < 0 ? Float8{} : sums);  // keeps NaN
      }
    }
    StoreTransposed<kWidth>(tile, count, a.samples, a.y, a.y_stored_as, w.rows, begin);
  }
  return CsrStatus::kOk;
}

// ---- gradients

template <int kLanes, int kWidth, typename Stored, typename Values>
CsrStatus ScatterPanel(const CsrGradXArgs& a, Index, Index) {
  constexpr int kVectors = kWidth / kLanes;
  const CsrWeight& w = a.weight;
  const Values values(w);
  RowChecker<Stored, Values> checker(w, values, 0, w.rows);
  for (Index i = 0; i < w.columns * kWidth; ++i) a.sums[i] = 0;
  for (Index r = 0; r < w.rows; ++r) {
    if (const CsrStatus status = checker.Check(r); status != CsrStatus::kOk) return status;
    const Row row = RowAt(w, r);
    Vector<kLanes> grad[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) grad[v] = Load<Vector<kLanes>>(a.grad_panel + r * kWidth + v * kLanes);
    for (Index k = row.begin; k < row.end; ++k) {
      float* sum = a.sums + ColumnAt<Stored>(w, k) * kWidth;
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

template <int kLanes, int kWidth, typename Stored, typename Values>
CsrStatus SamplePanel(const CsrGradValuesArgs& a, Index row_begin, Index row_end) {
  constexpr int kVectors = kWidth / kLanes;
  const CsrWeight& w = a.weight;
  const Values values(w);
  RowChecker<Stored, Values> checker(w, values, row_begin, row_end);
  for (Index r = row_begin; r < row_end; ++r) {
    if (const CsrStatus status = checker.Check(r); status != CsrStatus::kOk) return status;
    const Row row = RowAt(w, r);
    const float* grad = a.grad_panel + r * kWidth;
    if constexpr (kLanes == 1) {
      for (Index k = row.begin; k < row.end; ++k) {
        const float product = Load<float>(grad) * Load<float>(a.x_panel + ColumnAt<Stored>(w, k));
        a.grad_values[k] = a.add ? a.grad_values[k] + product : product;
      }
    } else {
      for (Index k = row.begin; k < row.end; k += 8) {
        const Index count = row.end - k < 8 ? row.end - k : 8;
        Float8 products[8] = {};
        for (Index i = 0; i < count; ++i) {
          const float* x = a.x_panel + ColumnAt<Stored>(w, k + i) * kWidth;
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
    if (a.weight.indexed_by == CsrIndices::kInt32)
      return MultiplyPanel<kLanes, kWidth, std::uint32_t, Values>(a, begin, end);
    return MultiplyPanel<kLanes, kWidth, std::uint16_t, Values>(a, begin, end);
  }
};

template <int kLanes, int kWidth, typename Values>
struct Scatter {
  static CsrStatus Run(const CsrGradXArgs& a, Index begin, Index end) {
    if (a.weight.indexed_by == CsrIndices::kInt32)
      return ScatterPanel<kLanes, kWidth, std::uint32_t, Values>(a, begin, end);
    return ScatterPanel<kLanes, kWidth, std::uint16_t, Values>(a, begin, end);
  }
};

template <int kLanes, int kWidth, typename>
struct Sample {
  static CsrStatus Run(const CsrGradValuesArgs& a, Index begin, Index end) {
    if (a.weight.indexed_by == CsrIndices::kInt32)
      return SamplePanel<kLanes, kWidth, std::uint32_t, NoValues>(a, begin, end);
    return SamplePanel<kLanes, kWidth, std::uint16_t, NoValues>(a, begin, end);
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
