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
void Prefetch(const void* p) {
  constexpr std::uintptr_t kAhead = 1024;
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + kAhead), _MM_HINT_T0);
}

// Sums that float32 products are added to; a word's four vectors go to kChains sums in turn.
template <int kSamples>
struct FloatSums {
  static constexpr int kChains = kSamples == 1 ? 4 : 2;

  // Vector p of a word times x.
  void Add(__m512 weights, const float* x, int p) {
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
      sums[n][p % kChains] =
          _mm512_fmadd_ps(weights, _mm512_loadu_ps(x + (p * kSamples + n) * 16), sums[n][p % kChains]);
    }
  }

  void Finish(float* out) const {
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
      __m512 sum = _mm512_add_ps(sums[n][0], sums[n][1]);
      if constexpr (kChains == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(sums[n][2], sums[n][3]));
      out[n] = _mm512_reduce_add_ps(sum);
    }
  }

  __m512 sums[kSamples][kChains];
};

template <int kSamples>
struct FloatKernelBase {
  using Sum = float;
  using Accumulators = FloatSums<kSamples>;
  static constexpr bool kCodes = false;
  static constexpr Index kPanelWordBytes = 64 * kSamples * 4;

  static void Finish(const Accumulators& accumulators, float* out) { accumulators.Finish(out); }
};

// Each kernel's Run adds `words` words to the sums and returns how many values they took.

template <int kSamples>
struct Float32Kernel : FloatKernelBase<kSamples> {
  using Value = float;
  explicit Float32Kernel(const BitmapWeight&) {}

  __attribute__((always_inline)) Index Run(const void* bits, Index words, const float* values, const void* panel,
                                           FloatSums<kSamples>& into) const {
    const auto* x = static_cast<const float*>(panel);
    const float* v = values;
    FloatSums<kSamples> sums = into;
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      std::uint64_t word = LoadAt<std::uint64_t>(bits, i, 8);
      Prefetch(v);
      if (i % 8 == 0) Prefetch(static_cast<const char*>(bits) + i * 8);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p, word >>= 16) {
        const auto part = static_cast<std::uint16_t>(word);
        if (p == 2) Prefetch(v);
        sums.Add(ExpandFloats(part, _mm512_loadu_ps(v)), x, p);
        v += __builtin_popcount(part);
      }
    }
    into = sums;
    return v - values;
  }
};

template <int kSamples>
struct BFloat16Kernel : FloatKernelBase<kSamples> {
  using Value = std::uint16_t;
  explicit BFloat16Kernel(const BitmapWeight&) {}

  __attribute__((always_inline)) Index Run(const void* bits, Index words, const std::uint16_t* values,
                                           const void* panel, FloatSums<kSamples>& into) const {
    const auto* x = static_cast<const float*>(panel);
    const std::uint16_t* v = values;
    FloatSums<kSamples> sums = into;
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      const std::uint64_t word = LoadAt<std::uint64_t>(bits, i, 8);
      Prefetch(v);
      if (i % 8 == 0) Prefetch(static_cast<const char*>(bits) + i * 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const auto part = static_cast<std::uint32_t>(word >> 32 * half);
        const __m512i pairs = ExpandHalves(part, _mm512_loadu_si512(v));
        sums.Add(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x, 2 * half);
        sums.Add(_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))), x, 2 * half + 1);
        v += __builtin_popcount(part);
      }
    }
    into = sums;
    return v - values;
  }
};

// Codes below 32.
template <int kSamples>
struct CodeKernel : FloatKernelBase<kSamples> {
  using Value = std::uint8_t;
  static constexpr bool kCodes = true;
  static constexpr Index kMaxEntries = 32;
  explicit CodeKernel(const BitmapWeight& w)
      : low(_mm512_maskz_loadu_ps(First(w.entries), w.codebook)),
        high(_mm512_maskz_loadu_ps(First(w.entries - 16), w.codebook + 16)) {}

  static __mmask16 First(Index count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

  __attribute__((always_inline)) Index Run(const void* bits, Index words, const std::uint8_t* values, const void* panel,
                                           FloatSums<kSamples>& into) const {
    const auto* x = static_cast<const float*>(panel);
    const std::uint8_t* v = values;
    FloatSums<kSamples> sums = into;
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      const std::uint64_t word = LoadAt<std::uint64_t>(bits, i, 8);
      Prefetch(v);
      if (i % 8 == 0) Prefetch(static_cast<const char*>(bits) + i * 8);
      const __m512i codes = ExpandBytes(word, _mm512_loadu_si512(v));
      v += __builtin_popcountll(word);
      // An absent weight is code 0. The permutations see only five bits of each code: a wrong one reads no memory.
      sums.Add(_mm512_permutex2var_ps(low, codes, high), x, 0);
      sums.Add(_mm512_permutex2var_ps(low, _mm512_srli_epi32(codes, 8), high), x, 1);
      sums.Add(_mm512_permutex2var_ps(low, _mm512_srli_epi32(codes, 16), high), x, 2);
      sums.Add(_mm512_permutex2var_ps(low, _mm512_srli_epi32(codes, 24), high), x, 3);
    }
    into = sums;
    return v - values;
  }

  __m512 low, high;
};

template <int kSamples>
struct Int8Kernel {
  using Value = std::int8_t;
  using Sum = std::int32_t;
  static constexpr bool kCodes = false;
  static constexpr Index kPanelWordBytes = 64 * kSamples;
  struct Accumulators {
    __m512i products[kSamples][2], weights[2];
  };
  explicit Int8Kernel(const BitmapWeight&) {}

  // The instruction takes x without a sign, so the panel holds q + 128, and 128 times the row's sum comes off again.
  __attribute__((always_inline)) Index Run(const void* bits, Index words, const std::int8_t* values, const void* panel,
                                           Accumulators& into) const {
    const auto* x = static_cast<const char*>(panel);
    const std::int8_t* v = values;
    Accumulators sums = into;
    Index i = 0;
    const auto add = [&](int chain) {
      const std::uint64_t word = LoadAt<std::uint64_t>(bits, i, 8);
      const __m512i weights = ExpandBytes(word, _mm512_loadu_si512(v));
      v += __builtin_popcountll(word);
#pragma GCC unroll 4
      for (int n = 0; n < kSamples; ++n) {
        const __m512i samples = _mm512_loadu_si512(x + (i * kSamples + n) * 64);
        sums.products[n][chain] = _mm512_dpbusd_epi32(sums.products[n][chain], samples, weights);
      }
      sums.weights[chain] = _mm512_dpbusd_epi32(sums.weights[chain], _mm512_set1_epi8(1), weights);
      ++i;
    };
    while (i + 2 <= words) {
      Prefetch(v);
      if (i % 8 == 0) Prefetch(static_cast<const char*>(bits) + i * 8);
      add(0);
      add(1);
    }
    if (i < words) add(0);
    into = sums;
    return v - values;
  }

  static void Finish(const Accumulators& sums, std::int32_t* out) {
    const __m512i offset = _mm512_slli_epi32(_mm512_add_epi32(sums.weights[0], sums.weights[1]), 7);
#pragma GCC unroll 4
    for (int n = 0; n < kSamples; ++n) {
      const __m512i sum = _mm512_add_epi32(sums.products[n][0], sums.products[n][1]);
      out[n] = _mm512_reduce_add_epi32(_mm512_sub_epi32(sum, offset));
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

}  // namespace

const BitmapKernels kBitmapAvx512{PackSamples, Matmul};

}  // namespace tersetorch
