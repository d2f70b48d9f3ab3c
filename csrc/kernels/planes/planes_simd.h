// Words of channels at every vector level, written once. Everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/planes/planes.h"

namespace tersetorch {
namespace {

struct Pairs {
  static constexpr Index kChannels = 2;
  explicit Pairs(const WordPlanesArgs&) {}

  Bits8 Numbers(Float8 x) const { return __builtin_convertvector(ToBFloat16(x), Bits8); }
  // The 8 words of 16 consecutive numbers.
  Float8 Words(const void* x, FloatDtype stored_as, Index i) const {
    if (stored_as == FloatDtype::kBFloat16) return LoadAt<Float8>(x, i, 2);
    const Halves8 halves[] = {ToBFloat16(LoadAt<Float8>(x, i, 4)), ToBFloat16(LoadAt<Float8>(x, i + 8, 4))};
    return LoadAt<Float8>(halves, 0, 0);
  }
};

struct Quads {
  static constexpr Index kChannels = 4;
  explicit Quads(const WordPlanesArgs& a)
      : inverse(Splat<8>(a.inverse)), offset(static_cast<std::uint32_t>(a.offset)), none(a.inverse == 0) {}

  __m256i Rounded(Float8 x) const { return none ? __m256i{} : _mm256_cvtps_epi32((__m256)(x * inverse)); }
  Bits8 Numbers(Float8 x) const { return ((Bits8)Rounded(x) + offset) & 0xff; }
  // The 8 words of 32 consecutive numbers.
  Float8 Words(const void* x, FloatDtype stored_as, Index i) const {
    __m256i q[4];
    for (Index j = 0; j < 4; ++j) q[j] = Rounded(LoadFloats(x, stored_as, i + 8 * j));
    // Packing works in halves of a register and leaves words 0 2 4 6 and 1 3 5 7 beside each other.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i words = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return (Float8)_mm256_add_epi8(words, _mm256_set1_epi8(static_cast<char>(offset)));
  }

  Float8 inverse;
  std::uint32_t offset;
  bool none;
};

// Word w of pixel i, from the channels of its group that there are.
template <typename Words>
std::uint32_t WordOf(const WordPlanesArgs& a, const Words& words, Index first, Index channels, Index i) {
  std::uint32_t word = 0;
  for (Index j = 0; j < Words::kChannels; ++j) {
    const Index at = a.channels_last ? i * a.channels + first + j : (first + j) * a.pixels + i;
    const float x = j < channels ? LoadFloat(a.x, a.stored_as, at) : 0.0f;
    word |= words.Numbers(Splat<8>(x))[0] << (32 / Words::kChannels * j);
  }
  return word;
}

template <typename Words>
void Planes(const WordPlanesArgs& args, Index begin, Index end) noexcept {
  constexpr Index kChannels = Words::kChannels;
  const WordPlanesArgs a = args;
  const Words words(a);
  const Index of_group = a.channels / a.groups, per_group = (of_group + kChannels - 1) / kChannels;
  for (Index g = 0; g < a.groups; ++g) {
    std::uint32_t* const planes = a.planes + g * per_group * a.pixels;
    Index transposed = 0;
    if (a.channels_last) {
      // Pixels innermost: they fill the planes' cache lines, and their own lines come back from the first cache level.
      transposed = of_group / kChannels / 8 * 8;
      for (Index i = begin; i < end; i += 16) {
        for (Index w = 0; w < transposed; w += 8) {
          for (Index half = i; half < i + 16 && half < end; half += 8) {
            Float8 block[8];
            for (Index j = 0; j < 8; ++j) {
              const Index pixel = half + j < end ? half + j : end - 1;
              block[j] = words.Words(a.x, a.stored_as, pixel * a.channels + g * of_group + w * kChannels);
            }
            Transpose(block);
            for (Index j = 0; j < 8; ++j) {
              std::uint32_t* to = planes + (w + j) * a.pixels + half;
              __builtin_memcpy(to, &block[j], 4 * static_cast<std::size_t>(half + 8 <= end ? 8 : end - half));
            }
          }
        }
      }
    }
    for (Index w = transposed; w < per_group; ++w) {
      const Index first = g * of_group + w * kChannels;
      const Index channels = of_group - w * kChannels < kChannels ? of_group - w * kChannels : kChannels;
      Index i = begin;
      for (; !a.channels_last && i + 8 <= end; i += 8) {
        Bits8 word{};
        for (Index j = 0; j < kChannels; ++j) {
          const Float8 x = j < channels ? LoadFloats(a.x, a.stored_as, (first + j) * a.pixels + i) : Float8{};
          word |= words.Numbers(x) << static_cast<std::uint32_t>(32 / kChannels * j);
        }
        Store(planes + w * a.pixels + i, word);
      }
      for (; i < end; ++i) Store(planes + w * a.pixels + i, WordOf(a, words, first, channels, i));
    }
  }
}

}  // namespace
}  // namespace tersetorch
