#include <immintrin.h>

#include <cstdint>

#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/bitmap_matmul/bitmap_matmul_simd.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

// Expansion by permutation: for each byte of the bitmap, where its eight weights come from among the next values.
struct Tables {
  // The sign tells that a weight is present.
  alignas(32) std::uint32_t floats[256][8];
  // [1] counts from 8 on, for the upper half of a register; 0x80 makes a 0.
  alignas(64) std::uint8_t bytes[2][256][8];
};

constexpr Tables MakeTables() {
  Tables tables{};
  for (int byte = 0; byte < 256; ++byte) {
    std::uint8_t next = 0;
    for (int i = 0; i < 8; ++i) {
      const bool present = byte >> i & 1;
      tables.floats[byte][i] = present ? 0x80000000u | next : 0;
      tables.bytes[0][byte][i] = present ? next : 0x80;
      tables.bytes[1][byte][i] = present ? 8 + next : 0x80;
      next += present;
    }
  }
  return tables;
}

constexpr Tables kTables = MakeTables();

// A hint; the address may lie outside the array. The hardware prefetcher stops at the end of a page. Always inline: the
// compiler takes a function of hints alone for one without effect, and leaves its calls out.
inline __attribute__((always_inline)) void Prefetch(const void* p) {
  constexpr std::uintptr_t kAhead = 1024;
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + kAhead), _MM_HINT_T0);
}

// Eight weights, those that a byte of the bitmap has.
__m256 Expand(std::uint64_t byte, const float* values) {
  const __m256i from = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTables.floats[byte]));
  const __m256 permuted = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), from);
  return _mm256_and_ps(permuted, _mm256_castsi256_ps(_mm256_srai_epi32(from, 31)));
}

// Each kernel's Run adds `words` words of a row to its sums, and moves `values` past those it took; Revisit may have
// the row's values once more.

template <int kSamples>
struct Float32Kernel {
  using Value = float;
  using Sum = float;
  static constexpr int kRows = 1;
  static constexpr Index kPanelWordBytes = 64 * kSamples * 4;
  static constexpr int kChains = kSamples == 4 ? 2 : 4;
  struct Accumulators {
    __m256 sums[kSamples][kChains];
  };
  explicit Float32Kernel(const BitmapWeight&) {}

  static bool AreInside(const void*, Index) { return true; }
  static bool Revisit(const void*, Index, Accumulators&) { return true; }

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const float* (&values)[kCount], const void* panel,
                                          Accumulators (&into)[kCount]) const {
    const auto* x = static_cast<const float*>(panel);
    const float* v = values[0];
    Accumulators a = into[0];
    for (Index i = 0; i < words; ++i, x += 64 * kSamples) {
      std::uint64_t word = LoadAt<std::uint64_t>(bits[0], i, 8);
      Prefetch(v);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j, word >>= 8) {
        const std::uint64_t byte = word & 0xff;
        const __m256 weights = Expand(byte, v);
        v += __builtin_popcountll(byte);
#pragma GCC unroll 4
        for (int n = 0; n < kSamples; ++n) {
          const __m256 samples = _mm256_loadu_ps(x + (j / 2 * kSamples + n) * 16 + j % 2 * 8);
          a.sums[n][j % kChains] = _mm256_fmadd_ps(weights, samples, a.sums[n][j % kChains]);
        }
      }
    }
    into[0] = a;
    values[0] = v;
  }

  static void Finish(const Accumulators& a, float* out) {
    for (int n = 0; n < kSamples; ++n) {
      __m256 sum = _mm256_add_ps(a.sums[n][0], a.sums[n][1]);
      if constexpr (kChains == 4) sum = _mm256_add_ps(sum, _mm256_add_ps(a.sums[n][2], a.sums[n][3]));
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      out[n] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
  }
};

template <int kSamples>
struct Int8Kernel {
  using Value = std::int8_t;
  using Sum = std::int32_t;
  static constexpr int kRows = 1;
  static constexpr Index kPanelWordBytes = 64 * kSamples;
  struct Accumulators {
    __m256i sums[kSamples][2];
  };
  explicit Int8Kernel(const BitmapWeight&) {}

  static bool Revisit(const void*, Index, Accumulators&) { return true; }

  template <int kCount>
  __attribute__((always_inline)) void Run(const void* const (&bits)[kCount], Index words,
                                          const std::int8_t* (&values)[kCount], const void* panel,
                                          Accumulators (&into)[kCount]) const {
    const auto* x = static_cast<const char*>(panel);
    const std::int8_t* v = values[0];
    Accumulators a = into[0];
    // 16 weights from two bytes of the bitmap.
    const auto expand = [&](std::uint64_t low, std::uint64_t high) {
      const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(v));
      v += __builtin_popcountll(low);
      const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(v));
      v += __builtin_popcountll(high);
      const __m128i from =
          _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.bytes[0][low])),
                             _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.bytes[1][high])));
      return _mm_shuffle_epi8(_mm_unpacklo_epi64(first, second), from);
    };
    for (Index i = 0; i < words; ++i) {
      std::uint64_t word = LoadAt<std::uint64_t>(bits[0], i, 8);
      Prefetch(v);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half, word >>= 32) {
        const __m128i low = expand(word & 0xff, word >> 8 & 0xff);
        const __m128i high = expand(word >> 16 & 0xff, word >> 24 & 0xff);
        const __m256i weights = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        const __m256i magnitudes = _mm256_abs_epi8(weights);
#pragma GCC unroll 4
        for (int n = 0; n < kSamples; ++n) {
          const __m256i q =
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (i * kSamples + n) * 64 + half * 32));
          // At most 2 * 128 * 127: no pair saturates.
          const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(q, weights));
          a.sums[n][half] = _mm256_add_epi32(a.sums[n][half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
      }
    }
    into[0] = a;
    values[0] = v;
  }

  static void Finish(const Accumulators& a, std::int32_t* out) {
    for (int n = 0; n < kSamples; ++n) {
      const auto sum = (Int8)_mm256_add_epi32(a.sums[n][0], a.sums[n][1]);
      out[n] = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  }
};

struct Float32Columns : Float32Kernel<1> {
  using Float32Kernel<1>::Float32Kernel;
  static constexpr Order kOrder = Order::kNatural;

  template <int kCount>
  __attribute__((always_inline)) void Add(const void* const (&bits)[kCount], Index words,
                                          const float* (&values)[kCount], const float (&x)[kCount],
                                          const Ahead (&ahead)[kCount], float* sums) const {
    for (Index i = 0; i < 8 * words; ++i, sums += 8) {
      if (i % 8 == 0) PrefetchWord(ahead, i / 8);
      __m256 sum = _mm256_loadu_ps(sums);
#pragma GCC unroll 2
      for (int r = 0; r < kCount; ++r) {
        const auto byte = LoadAt<std::uint8_t>(bits[r], i, 1);
        sum = _mm256_fmadd_ps(Expand(byte, values[r]), _mm256_set1_ps(x[r]), sum);
        values[r] += __builtin_popcount(byte);
      }
      _mm256_storeu_ps(sums, sum);
    }
  }
};

bool PackSamples(const BitmapSamplesArgs& a) noexcept {
  return a.quantized ? PackQuantized(a, 0) : PackFloats(a, Order::kNatural);
}

BitmapStatus Matmul(const BitmapMatmulArgs& a, Index row_begin, Index row_end) noexcept {
  if (a.plain) return kBitmapScalar.matmul(a, row_begin, row_end);
  if (a.quantized) return ForSamples<Int8Kernel>(a, false, row_begin, row_end);
  return ForSamples<Float32Kernel>(a, a.weight.stored_as != BitmapValues::kFloat32, row_begin, row_end);
}

BitmapStatus Columns(const BitmapColumnsArgs& a, Index word_begin, Index word_end) noexcept {
  if (a.plain) return kBitmapScalar.columns(a, word_begin, word_end);
  return AddColumns<Float32Columns>(a, a.weight.stored_as != BitmapValues::kFloat32, word_begin, word_end);
}

}  // namespace

const BitmapKernels kBitmapAvx2{PackSamples, Matmul, Columns};

}  // namespace tersetorch
