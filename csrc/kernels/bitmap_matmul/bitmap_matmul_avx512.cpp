#include <immintrin.h>

#include <cstdint>

#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/bitmap_matmul/bitmap_matmul_simd.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// The expansions with their destination zeroed first: some processors wait for what it held before.
__m512i ExpandBytes(std::uint64_t bits, __m512i values) {
  __m512i expanded;
  asm("vpxor %t0, %t0, %t0\n\tvpexpandb %1, %0%{%2%}%{z%}" : "=&v"(expanded) : "v"(values), "Yk"(bits));
  return expanded;
}

__m512i ExpandHalves(std::uint32_t bits, __m512i values) {
  __m512i expanded;
  asm("vpxor %t0, %t0, %t0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(expanded) : "v"(values), "Yk"(bits));
  return expanded;
}

__m512 ExpandFloats(std::uint16_t bits, __m512 values) {
  __m512 expanded;
  asm("vpxor %t0, %t0, %t0\n\tvexpandps %1, %0%{%2%}%{z%}" : "=&v"(expanded) : "v"(values), "Yk"(bits));
  return expanded;
}

// Hints to read on, because the hardware prefetcher stops at the end of a page. Rows multiplied at once lie one behind
// the other: a little ahead of one is where the next one already is, so that each asks for what its successor in the
// next group will read. The addresses may lie outside the arrays.
template <int kRows, typename Value>
struct Hints {
  static constexpr Index kBitsAhead = 1024, kValuesAhead = 1024 * sizeof(Value);  // bytes
  explicit Hints(const BitmapWeight& w)
      : bits_of_group(WholeGroups(kBitsAhead, BitmapWords(w.columns) * 8)),
        values_of_group(WholeGroups(kValuesAhead, (w.rows == 0 ? 0 : w.nnz / w.rows) * sizeof(Value))) {}

  static Index WholeGroups(Index least, Index row_bytes) {
    const Index group = kRows * row_bytes;
    return group == 0 ? least : (least + group - 1) / group * group;
  }

  // Row after row, as the rows' words are then read: in another order a word takes 3.8 cycles, in this one 3.5.
  template <int kCount>
  __attribute__((always_inline)) void Give(const void* const (&rows)[kCount], Index word,
                                           const Value* const (&next)[kCount]) const {
#pragma GCC unroll 2
    for (int r = 0; r < kCount; ++r) {
      const Index bits = kRows == 1 ? kBitsAhead : bits_of_group, values = kRows == 1 ? kValuesAhead : values_of_group;
      if (word % 8 == 0) _mm_prefetch(static_cast<const char*>(rows[r]) + word * 8 + bits, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(next[r]) + values, _MM_HINT_T0);
    }
  }

  Index bits_of_group, values_of_group;
};

// Sums of one row that float32 products are added to; a word's four vectors go to kChains sums in turn.
template <int kSamples>
struct FloatSums {
  static constexpr int kChains = 4 / kSamples;
  __m512 sums[kSamples][kChains];
};

// Kernels of float32 products: some rows at once, which share the reading of x.
template <int kSamples>
struct FloatKernelBase {
  using Sum = float;
  using Accumulators = FloatSums<kSamples>;
  static constexpr int kRows = kSamples == 1 ? 1 : 2;
  static constexpr Index kPanelWordBytes = 64 * kSamples * 4;

  // Adds vector p of a word times x.
  template <int kCount>
  static void Add(const __m512 (&weights)[kCount], const float* x, int p, Accumulators (&into)[kCount]) {
    constexpr int kChains = Accumulators::kChains;
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
      const __m512 samples = _mm512_loadu_ps(x + (p * kSamples + n) * 16);
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) {
        __m512& sum = into[i].sums[n][p % kChains];
        sum = _mm512_fmadd_ps(weights[i], samples, sum);
      }
    }
  }

  static bool AreInside(const void*, Index) { return true; }
  static bool Revisit(const void*, Index, Accumulators&) { return true; }

  static void Finish(const Accumulators& a, float* out) {
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
      __m512 sum = a.sums[n][0];
      if constexpr (Accumulators::kChains > 1) sum = _mm512_add_ps(sum, a.sums[n][1]);
      if constexpr (Accumulators::kChains > 2) sum = _mm512_add_ps(sum, _mm512_add_ps(a.sums[n][2], a.sums[n][3]));
      out[n] = _mm512_reduce_add_ps(sum);
    }
  }
};

// Each kernel's Run adds `words` words of kCount rows to their sums, and moves `values` past those it took. Revisit
// then has a row's values once more, while the first cache level still does; it returns whether they are sound.

template <int kSamples>
struct Float32Kernel : FloatKernelBase<kSamples> {
  using Value = float;
  using Base = FloatKernelBase<kSamples>;
  static constexpr Order kOrder = Order::kNatural;
  explicit Float32Kernel(const BitmapWeight& w) : hints(w) {}

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const float* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      std::uint64_t word[kCount];
      for (int r = 0; r < kCount; ++r) word[r] = LoadAt<std::uint64_t>(bits[r], i, 8);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        if (p % 2 == 0) hints.Give(bits, i, values);
        __m512 weights[kCount];
#pragma GCC unroll 2
        for (int r = 0; r < kCount; ++r) {
          const auto part = static_cast<std::uint16_t>(word[r] >> 16 * p);
          weights[r] = ExpandFloats(part, _mm512_loadu_ps(values[r]));
          values[r] += __builtin_popcount(part);
        }
        Base::Add(weights, x, p, sums);
      }
    }
  }

  Hints<Base::kRows, Value> hints;
};

template <int kSamples>
struct BFloat16Kernel : FloatKernelBase<kSamples> {
  using Value = std::uint16_t;
  using Base = FloatKernelBase<kSamples>;
  static constexpr Order kOrder = Order::kHalves;
  explicit BFloat16Kernel(const BitmapWeight& w) : hints(w) {}

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::uint16_t* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      hints.Give(bits, i, values);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512 even[kCount], odd[kCount];
#pragma GCC unroll 2
        for (int r = 0; r < kCount; ++r) {
          const auto part = LoadAt<std::uint32_t>(bits[r], 2 * i + half, 4);
          const __m512i pairs = ExpandHalves(part, _mm512_loadu_si512(values[r]));
          even[r] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
          odd[r] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
          values[r] += __builtin_popcount(part);
        }
        Base::Add(even, x, 2 * half, sums);
        Base::Add(odd, x, 2 * half + 1, sums);
      }
    }
  }

  Hints<Base::kRows, Value> hints;
};

// Codes below 32.
template <int kSamples>
struct CodeKernel : FloatKernelBase<kSamples> {
  using Value = std::uint8_t;
  using Base = FloatKernelBase<kSamples>;
  static constexpr Index kMaxEntries = 32;
  static constexpr Order kOrder = Order::kBytes;
  explicit CodeKernel(const BitmapWeight& w)
      : hints(w),
        entries(w.entries),
        low(_mm512_maskz_loadu_ps(First(w.entries), w.codebook)),
        high(_mm512_maskz_loadu_ps(First(w.entries - 16), w.codebook + 16)) {}

  static __mmask16 First(Index count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::uint8_t* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      hints.Give(bits, i, values);
      __m512i codes[kCount];
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto word = LoadAt<std::uint64_t>(bits[r], i, 8);
        codes[r] = ExpandBytes(word, _mm512_loadu_si512(values[r]));
        values[r] += __builtin_popcountll(word);
      }
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        __m512 weights[kCount];
#pragma GCC unroll 2
        for (int r = 0; r < kCount; ++r) {
          // An absent weight is code 0. The permutation sees only five bits of each code: a wrong one reads no memory.
          weights[r] = _mm512_permutex2var_ps(low, p == 0 ? codes[r] : _mm512_srli_epi32(codes[r], 8 * p), high);
        }
        Base::Add(weights, x, p, sums);
      }
    }
  }

  bool AreInside(const std::uint8_t* codes, Index count) const { return CodesInside(codes, count, entries); }
  bool Revisit(const std::uint8_t* codes, Index count, FloatSums<kSamples>&) const { return AreInside(codes, count); }

  Hints<Base::kRows, Value> hints;
  Index entries;
  __m512 low, high;
};

template <int kSamples>
struct Int8Kernel {
  using Value = std::int8_t;
  using Sum = std::int32_t;
  static constexpr int kRows = 2;  // a product takes 5 cycles, and each row's wait for the last
  static constexpr Index kPanelWordBytes = 64 * kSamples;
  struct Accumulators {
    __m512i products[kSamples], weights;
  };
  explicit Int8Kernel(const BitmapWeight& w) : hints(w) {}

  // The instruction takes x without a sign, so the panel holds q + 128, and 128 times the row's sum comes off again.
  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::int8_t* (&values)[kCount], const void* panel,
                                          Accumulators (&sums)[kCount]) const {
    const auto* x = static_cast<const char*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      hints.Give(bits, i, values);
      __m512i weights[kCount];
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto word = LoadAt<std::uint64_t>(bits[r], i, 8);
        weights[r] = ExpandBytes(word, _mm512_loadu_si512(values[r]));
        values[r] += __builtin_popcountll(word);
        sums[r].weights = _mm512_dpbusd_epi32(sums[r].weights, _mm512_set1_epi8(1), weights[r]);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) {
        const __m512i samples = _mm512_loadu_si512(x + n * 64);
#pragma GCC unroll 2
        for (int r = 0; r < kCount; ++r) {
          sums[r].products[n] = _mm512_dpbusd_epi32(sums[r].products[n], samples, weights[r]);
        }
      }
    }
  }

  static bool Revisit(const void*, Index, Accumulators&) { return true; }

  static void Finish(const Accumulators& sums, std::int32_t* out) {
    const __m512i offset = _mm512_slli_epi32(sums.weights, 7);
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) out[n] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sums.products[n], offset));
  }

  Hints<kRows, Value> hints;
};

// ---- columns: the same expansions, times one x for all of a column

// Adds kCount columns' vector p of a word to sums.
template <int kCount>
void AddTimes(const __m512 (&weights)[kCount], const __m512 (&x)[kCount], float* sums) {
  __m512 sum = _mm512_loadu_ps(sums);
#pragma GCC unroll 2
  for (int r = 0; r < kCount; ++r) sum = _mm512_fmadd_ps(weights[r], x[r], sum);
  _mm512_storeu_ps(sums, sum);
}

template <int kCount>
void Broadcast(const float (&x)[kCount], __m512 (&to)[kCount]) {
  for (int r = 0; r < kCount; ++r) to[r] = _mm512_set1_ps(x[r]);
}

struct Float32Columns : Float32Kernel<1> {
  using Float32Kernel<1>::Float32Kernel;

  template <int kCount>
  __attribute__((always_inline)) void Add(const void* const (&bits)[kCount], Index words,
                                          const float* (&values)[kCount], const float (&x)[kCount],
                                          const Ahead (&ahead)[kCount], float* sums) const {
    __m512 factors[kCount];
    Broadcast(x, factors);
    for (Index i = 0; i < 4 * words; ++i, sums += 16) {
      if (i % 4 == 0) PrefetchWord(ahead, i / 4);
      __m512 weights[kCount];
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto part = LoadAt<std::uint16_t>(bits[r], i, 2);
        weights[r] = ExpandFloats(part, _mm512_loadu_ps(values[r]));
        values[r] += __builtin_popcount(part);
      }
      AddTimes(weights, factors, sums);
    }
  }
};

struct BFloat16Columns : BFloat16Kernel<1> {
  using BFloat16Kernel<1>::BFloat16Kernel;

  template <int kCount>
  __attribute__((always_inline)) void Add(const void* const (&bits)[kCount], Index words,
                                          const std::uint16_t* (&values)[kCount], const float (&x)[kCount],
                                          const Ahead (&ahead)[kCount], float* sums) const {
    __m512 factors[kCount];
    Broadcast(x, factors);
    for (Index i = 0; i < 2 * words; ++i, sums += 32) {
      if (i % 2 == 0) PrefetchWord(ahead, i / 2);
      __m512 even[kCount], odd[kCount];
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto part = LoadAt<std::uint32_t>(bits[r], i, 4);
        const __m512i pairs = ExpandHalves(part, _mm512_loadu_si512(values[r]));
        even[r] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        odd[r] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
        values[r] += __builtin_popcount(part);
      }
      AddTimes(even, factors, sums);
      AddTimes(odd, factors, sums + 16);
    }
  }
};

struct CodeColumns : CodeKernel<1> {
  using CodeKernel<1>::CodeKernel;

  template <int kCount>
  __attribute__((always_inline)) void Add(const void* const (&bits)[kCount], Index words,
                                          const std::uint8_t* (&values)[kCount], const float (&x)[kCount],
                                          const Ahead (&ahead)[kCount], float* sums) const {
    __m512 factors[kCount];
    Broadcast(x, factors);
    for (Index i = 0; i < words; ++i, sums += 64) {
      PrefetchWord(ahead, i);
      __m512i codes[kCount];
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto word = LoadAt<std::uint64_t>(bits[r], i, 8);
        codes[r] = ExpandBytes(word, _mm512_loadu_si512(values[r]));
        values[r] += __builtin_popcountll(word);
      }
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        __m512 weights[kCount];
#pragma GCC unroll 2
        for (int r = 0; r < kCount; ++r) {
          weights[r] = _mm512_permutex2var_ps(low, p == 0 ? codes[r] : _mm512_srli_epi32(codes[r], 8 * p), high);
        }
        AddTimes(weights, factors, sums + 16 * p);
      }
    }
  }
};

bool InRegisters(BitmapValues stored_as, Index entries) {
  return stored_as == BitmapValues::kCodes && entries <= CodeKernel<1>::kMaxEntries;
}

bool PackSamples(const BitmapSamplesArgs& a) noexcept {
  if (a.quantized) return PackQuantized(a, 128);
  if (a.values_stored_as == BitmapValues::kBFloat16) return PackFloats(a, Order::kHalves);
  return PackFloats(a, InRegisters(a.values_stored_as, a.entries) ? Order::kBytes : Order::kNatural);
}

BitmapStatus Matmul(const BitmapMatmulArgs& a, Index row_begin, Index row_end) noexcept {
  const BitmapWeight& w = a.weight;
  if (a.plain) return kBitmapScalar.matmul(a, row_begin, row_end);
  if (a.quantized) return ForSamples<Int8Kernel>(a, false, row_begin, row_end);
  if (w.stored_as == BitmapValues::kBFloat16) return ForSamples<BFloat16Kernel>(a, false, row_begin, row_end);
  if (InRegisters(w.stored_as, w.entries)) return ForSamples<CodeKernel>(a, false, row_begin, row_end);
  return ForSamples<Float32Kernel>(a, w.stored_as != BitmapValues::kFloat32, row_begin, row_end);
}

BitmapStatus Columns(const BitmapColumnsArgs& a, Index word_begin, Index word_end) noexcept {
  const BitmapWeight& w = a.weight;
  if (a.plain) return kBitmapScalar.columns(a, word_begin, word_end);
  if (w.stored_as == BitmapValues::kBFloat16) return AddColumns<BFloat16Columns>(a, false, word_begin, word_end);
  if (InRegisters(w.stored_as, w.entries)) return AddColumns<CodeColumns>(a, false, word_begin, word_end);
  return AddColumns<Float32Columns>(a, w.stored_as != BitmapValues::kFloat32, word_begin, word_end);
}

}  // namespace

const BitmapKernels kBitmapAvx512{PackSamples, Matmul, Columns};

}  // namespace tersetorch
