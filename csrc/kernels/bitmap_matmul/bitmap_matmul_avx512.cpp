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

// Hints; the address may lie outside the array. The hardware prefetcher stops at the end of a page.
template <typename T, int kCount>
void PrefetchAll(T* const (&arrays)[kCount], Index offset) {
  constexpr std::uintptr_t kAhead = 1024;
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) {
    const auto address = reinterpret_cast<std::uintptr_t>(arrays[i]) + static_cast<std::uintptr_t>(offset) + kAhead;
    _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0);
  }
}

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
  static constexpr bool kCodes = false;
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

// Each kernel's Run adds `words` words of kCount rows to their sums, and moves `values` past those it took.

template <int kSamples>
struct Float32Kernel : FloatKernelBase<kSamples> {
  using Value = float;
  using Base = FloatKernelBase<kSamples>;
  explicit Float32Kernel(const BitmapWeight&) {}

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const float* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      std::uint64_t word[kCount];
      for (int r = 0; r < kCount; ++r) word[r] = LoadAt<std::uint64_t>(bits[r], i, 8);
      if (i % 8 == 0) PrefetchAll(bits, i * 8);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        if (p % 2 == 0) PrefetchAll(values, 0);
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
};

template <int kSamples>
struct BFloat16Kernel : FloatKernelBase<kSamples> {
  using Value = std::uint16_t;
  using Base = FloatKernelBase<kSamples>;
  explicit BFloat16Kernel(const BitmapWeight&) {}

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::uint16_t* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      if (i % 8 == 0) PrefetchAll(bits, i * 8);
      PrefetchAll(values, 0);
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
};

// Codes below 32.
template <int kSamples>
struct CodeKernel : FloatKernelBase<kSamples> {
  using Value = std::uint8_t;
  using Base = FloatKernelBase<kSamples>;
  static constexpr bool kCodes = true;
  static constexpr Index kMaxEntries = 32;
  explicit CodeKernel(const BitmapWeight& w)
      : low(_mm512_maskz_loadu_ps(First(w.entries), w.codebook)),
        high(_mm512_maskz_loadu_ps(First(w.entries - 16), w.codebook + 16)) {}

  static __mmask16 First(Index count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::uint8_t* (&values)[kCount], const void* panel,
                                          FloatSums<kSamples> (&sums)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      if (i % 8 == 0) PrefetchAll(bits, i * 8);
      PrefetchAll(values, 0);
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

  __m512 low, high;
};

template <int kSamples>
struct Int8Kernel {
  using Value = std::int8_t;
  using Sum = std::int32_t;
  static constexpr int kRows = 2;  // a product takes 5 cycles, and each row's wait for the last
  static constexpr bool kCodes = false;
  static constexpr Index kPanelWordBytes = 64 * kSamples;
  struct Accumulators {
    __m512i products[kSamples], weights;
  };
  explicit Int8Kernel(const BitmapWeight&) {}

  // The instruction takes x without a sign, so the panel holds q + 128, and 128 times the row's sum comes off again.
  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::int8_t* (&values)[kCount], const void* panel,
                                          Accumulators (&sums)[kCount]) const {
    const auto* x = static_cast<const char*>(panel);
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      if (i % 8 == 0) PrefetchAll(bits, i * 8);
      if (i % 2 == 0) PrefetchAll(values, 0);
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

  static void Finish(const Accumulators& sums, std::int32_t* out) {
    const __m512i offset = _mm512_slli_epi32(sums.weights, 7);
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) out[n] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sums.products[n], offset));
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

}  // namespace

const BitmapKernels kBitmapAvx512{PackSamples, Matmul};

}  // namespace tersetorch
