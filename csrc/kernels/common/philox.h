// The random bits of stochastic rounding: 16 for each value, by the value's number alone, so that they depend on
// neither the threads, the vectors, the device nor how a tensor is split.
//
// Math:   Philox4x32-10 turns a counter of 128 bits under a key of 64 into four words of 32; the key is the seed, its
//         lower half first. Value number n belongs to block b = n / 64, there to vector v = n / 16 % 4 and lane
//         l = n % 16. Its bits are those of the counter 8 b + l / 2 (the upper 64 bits of a counter are 0), of whose
//         words they take word 2 (v / 2) + l % 2, the lower half of it where v is even, the upper where it is odd.
//         So the words 0 and 1 of eight counters side by side are a vector of 16 words, whose halves serve 32
//         neighbouring values: no bit is moved.
// Source: Salmon, Moraes, Dror, Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
//
// Local to the including file, as vectors.h is.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstdint>

#ifdef __CUDACC__
#define TERSETORCH_ON_BOTH __host__ __device__
#else
#define TERSETORCH_ON_BOTH
#endif

namespace tersetorch {
namespace {

constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kPhiloxFactor0 = 0xd2511f53, kPhiloxFactor1 = 0xcd9e8d57;
constexpr std::uint32_t kPhiloxStep0 = 0x9e3779b9, kPhiloxStep1 = 0xbb67ae85;
constexpr std::int64_t kRandomBlock = 64;  // values that eight counters serve

struct PhiloxWords {
  std::uint32_t word[4];
};

TERSETORCH_ON_BOTH inline PhiloxWords Philox(std::uint64_t seed, std::uint64_t counter) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(counter), c1 = static_cast<std::uint32_t>(counter >> 32), c2 = 0,
                c3 = 0;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{kPhiloxFactor0} * c0, p1 = std::uint64_t{kPhiloxFactor1} * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(p1);
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(p0);
    k0 += kPhiloxStep0;
    k1 += kPhiloxStep1;
  }
  return {{c0, c1, c2, c3}};
}

// The bits of value number n.
TERSETORCH_ON_BOTH inline std::uint32_t RandomBits(std::uint64_t seed, std::uint64_t n) {
  const auto v = static_cast<int>(n / 16 % 4), l = static_cast<int>(n % 16);
  const std::uint32_t word = Philox(seed, n / 64 * 8 + l / 2).word[v / 2 * 2 + l % 2];
  return v % 2 == 0 ? word & 0xffff : word >> 16;
}

#ifdef __AVX2__

// The keys of all rounds, in every 64 bits of a vector's operand.
struct PhiloxKeys {
  explicit PhiloxKeys(std::uint64_t seed) {
    for (std::uint32_t r = 0; r < kPhiloxRounds; ++r) {
      of_round[r][0] = static_cast<std::uint32_t>(seed) + r * kPhiloxStep0;
      of_round[r][1] = static_cast<std::uint32_t>(seed >> 32) + r * kPhiloxStep1;
    }
  }
  std::int64_t of_round[kPhiloxRounds][2];
};

#endif

#if defined(__AVX512F__)

// The words of a block: words[0] serves vectors 0 and 1, words[1] the others. Every counter has 64 bits of a register
// for each of its words, in the upper half of which anything may stand: a product reads the lower one only, and is the
// next word as it stands. So a round of eight counters is 2 products, 2 shifts and 2 operations on bits.
inline void RandomWords(const PhiloxKeys& keys, std::uint64_t block, __m512i (&words)[2]) {
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i factor0 = _mm512_set1_epi64(kPhiloxFactor0), factor1 = _mm512_set1_epi64(kPhiloxFactor1);
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<std::int64_t>(block * 8)), lanes);
  // The first round, whose third and fourth words are 0.
  const __m512i first = _mm512_mul_epu32(c0, factor0);
  __m512i c2 = _mm512_xor_si512(_mm512_srli_epi64(first, 32), _mm512_set1_epi64(keys.of_round[0][1]));
  __m512i c3 = first, c1 = _mm512_setzero_si512();
  c0 = _mm512_xor_si512(_mm512_srli_epi64(c0, 32), _mm512_set1_epi64(keys.of_round[0][0]));
#pragma GCC unroll 9
  for (int r = 1; r < kPhiloxRounds; ++r) {
    const __m512i p0 = _mm512_mul_epu32(c0, factor0), p1 = _mm512_mul_epu32(c2, factor1);
    constexpr int kXor = 0x96;
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1, _mm512_set1_epi64(keys.of_round[r][0]), kXor);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3, _mm512_set1_epi64(keys.of_round[r][1]), kXor);
    c1 = p1;
    c3 = p0;
  }
  words[0] = _mm512_mask_shuffle_epi32(c0, 0xaaaa, c1, _MM_PERM_CCAA);
  words[1] = _mm512_mask_shuffle_epi32(c2, 0xaaaa, c3, _MM_PERM_CCAA);
}

#elif defined(__AVX2__)

// The same for four counters: words[v / 2][i] serves lanes [8 i, 8 i + 8).
inline void RandomWords(const PhiloxKeys& keys, std::uint64_t block, __m256i (&words)[2][2]) {
  const __m256i factor0 = _mm256_set1_epi64x(kPhiloxFactor0), factor1 = _mm256_set1_epi64x(kPhiloxFactor1);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const auto counter = static_cast<std::int64_t>(block * 8 + 4 * i);
    __m256i c0 = _mm256_add_epi64(_mm256_set1_epi64x(counter), _mm256_setr_epi64x(0, 1, 2, 3));
    __m256i c1 = _mm256_srli_epi64(c0, 32), c2 = _mm256_setzero_si256(), c3 = c2;
#pragma GCC unroll 10
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const __m256i p0 = _mm256_mul_epu32(c0, factor0), p1 = _mm256_mul_epu32(c2, factor1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(keys.of_round[r][0]));
      c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(keys.of_round[r][1]));
      c1 = p1;
      c3 = p0;
    }
    words[0][i] = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xaa);
    words[1][i] = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xaa);
  }
}

#endif

}  // namespace
}  // namespace tersetorch
