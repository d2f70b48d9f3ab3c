// Codes into tables (kernels/common/codes.h) turned into vectors of weights, for every vector level. Everything here is
// local to the including file, which may use a part of it.
//
// A `Codes` has kVectors vectors in a chunk, each of 16 words, which are taken in pieces of kCodeLanes; kRows, how many
// rows whose tables fit the registers; a Table, made from the entries of one; and, for a piece's words, Begin and At,
// which give what Mac multiplies by words of x.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/codes.h"
#include "kernels/common/vectors.h"

namespace tersetorch {
namespace {

#ifdef __AVX512F__
constexpr int kCodeLanes = 16;
typedef std::uint32_t CodeWords __attribute__((vector_size(64)));
typedef std::int32_t CodeInts __attribute__((vector_size(64)));
#else
constexpr int kCodeLanes = 8;
typedef std::uint32_t CodeWords __attribute__((vector_size(32)));
typedef std::int32_t CodeInts __attribute__((vector_size(32)));
#endif
using CodeFloats = Vector<kCodeLanes>;

// The number of each lane.
inline CodeInts CodeLane() {
#ifdef __AVX512F__
  return CodeInts{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  return CodeInts{0, 1, 2, 3, 4, 5, 6, 7};
#endif
}

#define TERSETORCH_INLINE inline __attribute__((always_inline))

// The entries of a table, repeated up to 32 where there are fewer codes than that, 0 where a code has none.
struct CodeEntries {
  alignas(64) float values[kCodesMaxEntries];

  template <int kBits>
  void Fill(const float* table, Index entries, bool rounded) {
    constexpr Index kCodes = Index{1} << kBits, kFilled = kCodes < 32 ? 32 : kCodes;
    if (entries == kCodes) {  // many small tables are filled as often as they are used
      __builtin_memcpy(values, table, 4 * kCodes);
    } else {
      for (Index k = 0; k < kCodes; ++k) values[k] = k < entries ? LoadAt<float>(table, k, 4) : 0.0f;
    }
    for (Index k = kCodes; k < kFilled; ++k) values[k] = values[k - kCodes];
    if (!rounded) return;
    for (Index k = 0; k < kFilled; k += 8) {
      const Float8 narrow = FromBFloat16(ToBFloat16(Load<Float8>(values + k)));
      Store(values + k, narrow);
    }
  }
};

// ---- float32

template <int kBits>
struct FloatCodes {
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 32 / kBits, kRows = 4;
  using Sum = CodeFloats;
  using State = CodeWords;

  static State Begin(const auto&, CodeWords words) { return words; }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return sum + w * x; }

#ifdef __AVX512F__
  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) : values(Load<CodeFloats>(e.values)) {}
    CodeFloats values;
  };
  // A permutation looks at the low 4 bits of a word only, and the table is repeated where a code has fewer.
  static TERSETORCH_INLINE CodeFloats At(const Table& t, CodeWords words, int s) {
    return (CodeFloats)_mm512_permutexvar_ps((__m512i)(words >> kBits * s), (__m512)t.values);
  }
#else
  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) : low(Load<Float8>(e.values)), high(Load<Float8>(e.values + 8)) {}
    Float8 low, high;
  };
  // A permutation looks at the low 3 bits of a word only; the fourth chooses.
  static TERSETORCH_INLINE CodeFloats At(const Table& t, CodeWords words, int s) {
    const auto index = (__m256i)(words >> kBits * s);
    const __m256 low = _mm256_permutevar8x32_ps((__m256)t.low, index);
    if constexpr (kBits == 2) return (CodeFloats)low;
    const __m256 high = _mm256_permutevar8x32_ps((__m256)t.high, index);
    return (CodeFloats)_mm256_blendv_ps(low, high, (__m256)(words << (28 - kBits * s)));
  }
#endif
};

#ifdef __AVX512F__

// 8-bit codes of at most 32 entries: one permutation of two registers.
struct FloatFewCodes {
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 4, kRows = 2;
  using Sum = CodeFloats;
  using State = CodeWords;

  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) : low(Load<CodeFloats>(e.values)), high(Load<CodeFloats>(e.values + 16)) {}
    CodeFloats low, high;
  };
  static TERSETORCH_INLINE CodeFloats At(const Table& t, CodeWords words, int s) {
    return (CodeFloats)_mm512_permutex2var_ps((__m512)t.low, (__m512i)(words >> 8 * s), (__m512)t.high);
  }
  static State Begin(const Table&, CodeWords words) { return words; }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return sum + w * x; }
};

#ifdef __AVX512BF16__
TERSETORCH_INLINE CodeFloats MacPairs(CodeFloats sum, CodeFloats w, CodeFloats x) {
  return (CodeFloats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
}

// Pairs of bfloat16, for codes of at most 32 entries: word l of vector f has the columns 16 f + l and, in its upper
// half, 16 (f + kVectors) + l.
template <int kBits>
struct PairCodes {
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 16 / kBits, kRows = 4;
  using Sum = CodeFloats;
  using State = CodeWords;

  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) {
      alignas(64) std::uint16_t halves[32];
      for (int k = 0; k < 32; k += 8) Store(halves + k, ToBFloat16(Load<Float8>(e.values + k)));
      values = _mm512_load_si512(halves);
    }
    __m512i values;
  };
  static State Begin(const Table&, CodeWords words) { return words; }
  // A permutation looks at the low 5 bits of each half of a word only, and the table is repeated.
  static TERSETORCH_INLINE CodeFloats At(const Table& t, CodeWords words, int f) {
    return (CodeFloats)_mm512_permutexvar_epi16((__m512i)(words >> kBits * f), t.values);
  }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return MacPairs(sum, w, x); }
};
#endif

// 8-bit codes of at most 64 kRegisters entries: the bytes of the entries are looked up on their own, and then put
// together. All four of them make float32, the upper two pairs of bfloat16 as those of PairCodes.
template <int kRegisters, int kPlanes = 4>
struct PlaneCodes {
  static constexpr bool kInteger = false;
  static constexpr int kVectors = kPlanes, kRows = kRegisters == 1 ? 2 : 1;
  using Sum = CodeFloats;

  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) {
      for (int q = 0; q < kRegisters; ++q) {
        for (int b = 0; b < kPlanes; ++b) {
          alignas(64) char bytes[64];
          for (int i = 0; i < 4; ++i) {
            const auto words = _mm512_load_si512(e.values + 64 * q + 16 * i);
            _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16 * i),
                            _mm512_cvtepi32_epi8(_mm512_srl_epi32(words, _mm_cvtsi32_si128(8 * (b + 4 - kPlanes)))));
          }
          planes[b][q] = _mm512_load_si512(bytes);
        }
      }
    }
    __m512i planes[kPlanes][kRegisters];
  };
  struct State {
    __m512i vectors[kPlanes];
  };

  static TERSETORCH_INLINE State Begin(const Table& t, CodeWords words) {
    // A permutation looks at the low 6 bits of a byte only. The upper two choose the registers, each of which
    // overwrites what those before it gave: one operation, where a permutation of two registers takes three.
    const auto index = (__m512i)words;
    const __mmask64 upper = _mm512_movepi8_mask(index), lower = _mm512_movepi8_mask(_mm512_add_epi8(index, index));
    __m512i b[kPlanes];
#pragma GCC unroll 4
    for (int i = 0; i < kPlanes; ++i) {
      b[i] = _mm512_permutexvar_epi8(index, t.planes[i][0]);
      if constexpr (kRegisters == 4) {
        b[i] = _mm512_mask_permutexvar_epi8(b[i], lower, index, t.planes[i][1]);
        b[i] = _mm512_mask_permutexvar_epi8(b[i], upper, index, t.planes[i][2]);
        b[i] = _mm512_mask_permutexvar_epi8(b[i], upper & lower, index, t.planes[i][3]);
      }
    }
    // Byte s of each of the planes' words belongs to vector s: first pairs of bytes, then pairs of pairs.
    const __m512i low_bytes = _mm512_set1_epi16(0xff), low_halves = _mm512_set1_epi32(0xffff);
    const auto select = [](__m512i mask, __m512i a, __m512i b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); };
    const __m512i even01 = select(low_bytes, b[0], _mm512_slli_epi16(b[1], 8));
    const __m512i odd01 = select(low_bytes, _mm512_srli_epi16(b[0], 8), b[1]);
    if constexpr (kPlanes == 2) {
      return {{even01, odd01}};
    } else {
      const __m512i even23 = select(low_bytes, b[2], _mm512_slli_epi16(b[3], 8));
      const __m512i odd23 = select(low_bytes, _mm512_srli_epi16(b[2], 8), b[3]);
      return {{select(low_halves, even01, _mm512_slli_epi32(even23, 16)),
               select(low_halves, odd01, _mm512_slli_epi32(odd23, 16)),
               select(low_halves, _mm512_srli_epi32(even01, 16), even23),
               select(low_halves, _mm512_srli_epi32(odd01, 16), odd23)}};
    }
  }
  static TERSETORCH_INLINE CodeFloats At(const Table&, const State& state, int s) {
    return (CodeFloats)state.vectors[s];
  }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) {
#ifdef __AVX512BF16__
    if constexpr (kPlanes == 2) return MacPairs(sum, w, x);
#endif
    return sum + w * x;
  }
};

template <>
struct FloatCodes<8> : PlaneCodes<4> {};

#else

template <>
struct FloatCodes<8> {
  static constexpr bool kInteger = false;
  static constexpr int kVectors = 4, kRows = 1;
  using Sum = CodeFloats;
  using State = CodeWords;

  struct Table {
    Table() = default;
    explicit Table(const CodeEntries& e) : entries(e) {}
    CodeEntries entries;
  };
  static State Begin(const Table&, CodeWords words) { return words; }
  static TERSETORCH_INLINE CodeFloats At(const Table& t, CodeWords words, int s) {
    return (CodeFloats)_mm256_i32gather_ps(t.entries.values, (__m256i)(words >> 8 * s & 0xff), 4);
  }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return sum + w * x; }
};

#endif

// ---- int8

// kCount entries times `inverse`, to the nearest integer.
template <int kCount>
void RoundEntries(const CodeEntries& e, float inverse, char (&bytes)[kCount]) {
  for (int k = 0; k < kCount; k += 32) {
    __m256i q[4];
    for (int j = 0; j < 4; ++j) {
      const Float8 scaled = Load<Float8>(e.values + k + 8 * j) * Splat<8>(inverse);
      q[j] = inverse == 0 ? __m256i{} : _mm256_cvtps_epi32((__m256)scaled);  // 0 times infinity is NaN
    }
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    Store(bytes + k, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
  }
}

#ifdef __AVX512F__

// Weights are unsigned, 128 more than they stand for: the product of one unsigned and one signed byte is what there is.
constexpr std::int32_t kCodeByteOffset = 128;

TERSETORCH_INLINE CodeInts MacBytes(CodeInts sum, CodeInts w, CodeInts x) {
  return (CodeInts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}

template <int kBits, int kRegisters = kBits == 8 ? 4 : 1>
struct ByteCodes {
  static constexpr bool kInteger = true;
  static constexpr int kVectors = 8 / kBits, kRows = 4;
  using Sum = CodeInts;
  using State = CodeWords;

  struct Table {
    Table() = default;
    Table(const CodeEntries& e, float inverse) {
      alignas(64) char bytes[kBits == 8 ? 256 : 32];
      RoundEntries(e, inverse, bytes);
      const __m512i offset = _mm512_set1_epi8(static_cast<char>(kCodeByteOffset));
      for (int q = 0; q < kRegisters; ++q) {
        values[q] = kBits == 8 ? _mm512_load_si512(bytes + 64 * q)
                               : _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
        values[q] = _mm512_add_epi8(values[q], offset);
      }
    }
    __m512i values[kRegisters];
  };

  static State Begin(const Table&, CodeWords words) { return words; }
  // A permutation looks at the low 6 bits of a byte only, and the table is repeated where a code has fewer.
  static TERSETORCH_INLINE CodeInts At(const Table& t, CodeWords words, int f) {
    const auto index = (__m512i)(words >> kBits * f);
    if constexpr (kRegisters == 1) return (CodeInts)_mm512_permutexvar_epi8(index, t.values[0]);
    return (CodeInts)_mm512_mask_blend_epi8(_mm512_movepi8_mask(index),
                                            _mm512_permutex2var_epi8(t.values[0], index, t.values[1]),
                                            _mm512_permutex2var_epi8(t.values[2], index, t.values[3]));
  }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return MacBytes(sum, w, x); }
};

#else

constexpr std::int32_t kCodeByteOffset = 0;

// |w| * (q with w's sign): two such products are at most 2 * 127 * 127 < 2^15, so that none saturates.
TERSETORCH_INLINE CodeInts MacBytes(CodeInts sum, CodeInts w, CodeInts x) {
  const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), _mm256_sign_epi8((__m256i)x, (__m256i)w));
  return sum + (CodeInts)_mm256_madd_epi16(products, _mm256_set1_epi16(1));
}

template <int kBits>
struct ByteCodes {
  static constexpr bool kInteger = true;
  static constexpr int kVectors = 8 / kBits, kRows = kBits == 8 ? 1 : 2;
  using Sum = CodeInts;
  using State = CodeWords;

  struct Table {
    Table() = default;
    Table(const CodeEntries& e, float inverse) { RoundEntries(e, inverse, bytes); }
    alignas(32) char bytes[kBits == 8 ? 256 : 32];
  };

  static State Begin(const Table&, CodeWords words) { return words; }
  static TERSETORCH_INLINE CodeInts At(const Table& t, CodeWords words, int f) {
    const auto of_16 = [&](int k) {
      return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.bytes + 16 * k)));
    };
    if constexpr (kBits < 8) {
      const __m256i low = _mm256_set1_epi8((1 << kBits) - 1);
      return (CodeInts)_mm256_shuffle_epi8(of_16(0), _mm256_and_si256((__m256i)(words >> kBits * f), low));
    }
    // Of the 16 entries from 16 k on: bytes whose upper half is not k get the top bit, for which a shuffle gives 0.
    __m256i found = _mm256_setzero_si256();
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      const __m256i here = _mm256_xor_si256((__m256i)words, _mm256_set1_epi8(static_cast<char>(16 * k)));
      const __m256i index = _mm256_adds_epu8(here, _mm256_set1_epi8(0x70));
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(of_16(k), index));
    }
    return (CodeInts)found;
  }
  static TERSETORCH_INLINE Sum Mac(Sum sum, Sum w, Sum x) { return MacBytes(sum, w, x); }
};

#endif

// The largest code in `bytes` bytes, a whole number of CodeWords.
template <int kBits>
std::uint32_t LargestCode(const std::uint8_t* codes, Index bytes) {
  typedef std::uint8_t Bytes __attribute__((vector_size(sizeof(CodeWords))));
  constexpr int kFields = 8 / kBits;
  Bytes largest[kFields] = {};
  for (Index i = 0; i < bytes; i += sizeof(CodeWords)) {
    const auto words = LoadAt<CodeWords>(codes, i, 1);
#pragma GCC unroll 4
    for (int f = 0; f < kFields; ++f) {
      const Bytes here = (Bytes)(words >> kBits * f) & static_cast<std::uint8_t>((1 << kBits) - 1);
      largest[f] = here > largest[f] ? here : largest[f];
    }
  }
  std::uint32_t result = 0;
  for (const Bytes& of_field : largest) {
    for (std::size_t i = 0; i < sizeof of_field; ++i) result = of_field[i] > result ? of_field[i] : result;
  }
  return result;
}

}  // namespace
}  // namespace tersetorch
