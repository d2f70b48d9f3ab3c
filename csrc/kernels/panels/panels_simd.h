// Packing at every vector level, written once. Everything here is local to the including file.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/common/vectors.h"
#include "kernels/panels/panels.h"

namespace tersetorch {
namespace {

// Samples [n, n + 8) of features [c, c + 8).
template <int kWidth>
void PackBlock(const PanelPackArgs& a, Index n, Index c) {
  Float8 block[8];
  for (Index j = 0; j < 8; ++j) {
    block[j] = n + j < a.samples ? LoadFloats(a.x, a.stored_as, (n + j) * a.features + c) : Float8{};
  }
  Transpose(block);
  for (Index j = 0; j < 8; ++j) Store(a.panel + (c + j) * kWidth + n, block[j]);
}

template <int kWidth>
void Pack(const PanelPackArgs& a, Index feature_begin, Index feature_end) {
  constexpr Index kBlock = 64;  // features whose part of the panel stays in the first cache level
  for (Index begin = feature_begin; begin < feature_end; begin += kBlock) {
    const Index end = begin + kBlock < feature_end ? begin + kBlock : feature_end;
    Index full = begin;
    if constexpr (kWidth >= 8) {
      full += (end - begin) / 8 * 8;
      Index n = 0;
#ifdef __AVX512F__
      for (; kWidth >= 16 && a.stored_as == FloatDtype::kFloat32 && n + 16 <= a.samples; n += 16) {
        Index c = begin;
        for (; c + 16 <= full; c += 16) {
          Vector<16> block[16];
          for (Index j = 0; j < 16; ++j) block[j] = LoadAt<Vector<16>>(a.x, (n + j) * a.features + c, 4);
          Transpose(block);
          for (Index j = 0; j < 16; ++j) Store(a.panel + (c + j) * kWidth + n, block[j]);
        }
        if (c < full) {
          PackBlock<kWidth>(a, n, c);
          PackBlock<kWidth>(a, n + 8, c);
        }
      }
#endif
      for (; n < kWidth; n += 8) {
        for (Index c = begin; c < full; c += 8) PackBlock<kWidth>(a, n, c);
      }
    }
    for (Index c = full; c < end; ++c) {
      for (Index n = 0; n < kWidth; ++n) {
        Store(a.panel + c * kWidth + n, n < a.samples ? LoadFloat(a.x, a.stored_as, n * a.features + c) : 0.0f);
      }
    }
  }
}

void PackForWidth(const PanelPackArgs& a, Index feature_begin, Index feature_end) noexcept {
  switch (a.width) {
    case 1:
      return Pack<1>(a, feature_begin, feature_end);
    case 8:
      return Pack<8>(a, feature_begin, feature_end);
    case 16:
      return Pack<16>(a, feature_begin, feature_end);
    case 32:
      return Pack<32>(a, feature_begin, feature_end);
    default:
      return Pack<64>(a, feature_begin, feature_end);
  }
}

// ---- words of two or four features

struct Pairs {
  static constexpr Index kFeatures = 2;
  explicit Pairs(const WordPanelArgs& args) : a(args) {}

  // The words [c, c + 8) of sample n, all of whose features exist.
  Float8 Words(Index n, Index c) const {
    const Index i = n * a.features + 2 * c;
    if (a.stored_as == FloatDtype::kBFloat16) return LoadAt<Float8>(a.x, i, 2);
    const Halves8 halves[] = {ToBFloat16(LoadAt<Float8>(a.x, i, 4)), ToBFloat16(LoadAt<Float8>(a.x, i + 8, 4))};
    return LoadAt<Float8>(halves, 0, 0);
  }
  std::uint32_t Feature(Index n, Index c) const {
    return ToBFloat16(Splat<8>(LoadFloat(a.x, a.stored_as, n * a.features + c)))[0];
  }
  std::uint32_t Nothing() const { return 0; }
  bool Has(Index n) const { return n < a.samples; }

  const WordPanelArgs& a;
};

struct Quads {
  static constexpr Index kFeatures = 4;
  explicit Quads(const WordPanelArgs& args) : a(args) {}

  Float8 Words(Index n, Index c) const {
    const Float8 inverse = Splat<8>(LoadAt<float>(a.inverses, n, 4));
    __m256i q[4];
    for (Index j = 0; j < 4; ++j) {
      q[j] = _mm256_cvtps_epi32((__m256)(LoadFloats(a.x, a.stored_as, n * a.features + 4 * c + 8 * j) * inverse));
    }
    // Packing works in halves of a register and leaves words 0 2 4 6 and 1 3 5 7 beside each other.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    const __m256i words = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    return (Float8)_mm256_add_epi8(words, _mm256_set1_epi8(static_cast<char>(a.offset)));
  }
  std::uint32_t Feature(Index n, Index c) const {
    const float value = LoadFloat(a.x, a.stored_as, n * a.features + c) * LoadAt<float>(a.inverses, n, 4);
    return static_cast<std::uint8_t>(_mm_cvt_ss2si(_mm_set_ss(value)) + a.offset);
  }
  std::uint32_t Nothing() const { return static_cast<std::uint32_t>(a.offset) * 0x01010101; }
  bool Has(Index n) const { return n < a.samples && LoadAt<float>(a.inverses, n, 4) != 0; }

  const WordPanelArgs& a;
};

template <typename Words>
void PackWords(const WordPanelArgs& a, Index word_begin, Index word_end) noexcept {
  constexpr Index kBlock = 64;  // words whose part of the panel stays in the first cache level
  constexpr int kBits = 32 / Words::kFeatures;
  const Words words(a);
  const Float8 nothing = (Float8)(Bits8{} + words.Nothing());
  for (Index begin = word_begin; begin < word_end; begin += kBlock) {
    const Index end = begin + kBlock < word_end ? begin + kBlock : word_end;
    const Index whole = a.features / Words::kFeatures < end ? a.features / Words::kFeatures : end;
    const Index full = whole < begin ? begin : begin + (whole - begin) / 8 * 8;
    for (Index n = 0; n < a.width; n += 8) {
      for (Index c = begin; c < full; c += 8) {
        Float8 block[8];
        for (Index j = 0; j < 8; ++j) block[j] = words.Has(n + j) ? words.Words(n + j, c) : nothing;
        Transpose(block);
        for (Index j = 0; j < 8; ++j) Store(a.panel + (c + j) * a.width + n, block[j]);
      }
    }
    for (Index c = full; c < end; ++c) {
      for (Index n = 0; n < a.width; ++n) {
        std::uint32_t word = words.Nothing();
        for (int j = 0; j < Words::kFeatures && words.Has(n) && Words::kFeatures * c + j < a.features; ++j) {
          const std::uint32_t mask = (std::uint32_t{1} << kBits) - 1;
          word = (word & ~(mask << kBits * j)) | words.Feature(n, Words::kFeatures * c + j) << kBits * j;
        }
        Store(a.panel + c * a.width + n, word);
      }
    }
  }
}

void Scales(const SampleScalesArgs& a, Index sample_begin, Index sample_end) noexcept {
  for (Index n = sample_begin; n < sample_end; ++n) {
    // Bits without the sign order as the numbers do, NaN last. Four of them: a maximum waits for the one before.
    Bits8 largest[4] = {};
    const Index first = n * a.features, end = first + a.features;
    Index i = first;
    for (; i + 32 <= end; i += 32) {
      for (Index j = 0; j < 4; ++j) {
        const Bits8 bits = (Bits8)LoadFloats(a.x, a.stored_as, i + 8 * j) & 0x7fffffff;
        largest[j] = bits > largest[j] ? bits : largest[j];
      }
    }
    std::uint32_t result = 0;
    for (; i < end; ++i) {
      const auto bits = __builtin_bit_cast(std::uint32_t, LoadFloat(a.x, a.stored_as, i)) & 0x7fffffff;
      result = bits > result ? bits : result;
    }
    for (const Bits8& lanes : largest) {
      for (int j = 0; j < 8; ++j) result = lanes[j] > result ? lanes[j] : result;
    }
    const SampleScale of_sample = ScaleOf(result);
    Store(a.scales + n, of_sample.scale);
    Store(a.inverses + n, of_sample.inverse);
  }
}

}  // namespace
}  // namespace tersetorch
