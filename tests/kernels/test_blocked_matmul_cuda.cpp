// The CUDA kernels against sums in double, and quads to the bit against their formula, on shapes around their tiles and
// on damaged weights.
#include <algorithm>
#include <bit>
#include <cmath>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/blocked_weight.h"
#include "kernels/check.h"
#include "kernels/common/scalars.h"
#include "kernels/device.h"
#include "kernels/panels/panels.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

std::vector<float> Multiply(const RandomBlocked& w, BlockedValues values_as, FloatDtype floats_as, Index samples,
                            const std::vector<float>& x_numbers, const std::vector<float>* bias_numbers, bool relu) {
  DeviceArray<std::int32_t> offsets("block_offsets", w.block_offsets), segments("segments", w.segments);
  DeviceArray<std::uint16_t> indices("indices", w.indices), halves("values", w.halves);
  DeviceArray<float> codebook("codebook", w.codebook), values("values", w.values);
  DeviceArray<std::uint8_t> codes("codes", w.codes);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * w.rows);
  const void* chosen = values_as == BlockedValues::kFloat32    ? static_cast<const void*>(values.data())
                       : values_as == BlockedValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                               : codes.data();
  const BlockedWeight weight{offsets.data(),
                             segments.data(),
                             indices.data(),
                             chosen,
                             values_as,
                             codebook.data(),
                             static_cast<Index>(w.codebook.size()),
                             w.rows,
                             w.columns,
                             static_cast<Index>(w.indices.size()),
                             w.column_block};
  DeviceArray<std::uint32_t> panels("panels", (samples + 7) / 8 * 8 * w.columns);
  ExpectLaunched(BlockedMatmulCuda({weight, x.data(), floats_as, bias_numbers == nullptr ? nullptr : bias.data(), relu,
                                    y.data(), samples, nullptr, nullptr, panels.data()},
                                   nullptr),
                 "BlockedMatmulCuda");
  return y.Values();
}

void TestOne(const RandomBlocked& w, BlockedValues values_as, FloatDtype floats_as, Index samples, bool with_bias,
             bool relu, std::mt19937& rng) {
  const auto x = Random(samples * w.columns, rng), bias = Random(w.rows, rng);
  const auto got = Multiply(w, values_as, floats_as, samples, x, with_bias ? &bias : nullptr, relu);
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < w.rows; ++r) {
      Sum want;
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        want.Add(double{w.csr_values[k]} * x[n * w.columns + w.col_indices[k]]);
      }
      if (with_bias) want.Add(bias[r]);
      const float y = got[n * w.rows + r];
      right &= relu && y == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                              : want.Near(y, floats_as) && !(relu && y < 0);
    }
  }
  Expect(right, "%ld x %ld in blocks of %ld, %ld samples, values %d, floats %d, relu %d", long{w.rows}, long{w.columns},
         long{w.column_block}, long{samples}, static_cast<int>(values_as), static_cast<int>(floats_as), int{relu});
}

void TestShapes() {
  std::mt19937 rng(1234);
  const struct {
    Index rows, columns, column_block;
    double density;
  } shapes[] = {{1, 1, 1, 1.0},      {7, 9, 4, 0.5},      {33, 37, 16, 0.3},  {255, 5, 3, 0.2},
                {256, 64, 64, 0.02}, {257, 65, 64, 0.02}, {3, 257, 300, 1.0}, {20, 50, 16, 0.0},
                {5, 0, 16, 0.0},     {0, 5, 16, 0.0},     {515, 31, 8, 0.05}, {34, 33, 40, 1.0}};
  int turn = 0;
  for (const auto& shape : shapes) {
    const RandomBlocked w(shape.rows, shape.columns, shape.column_block, shape.density, rng);
    // One way of storing values after the other: each comes with every number of samples and both floats.
    for (const Index samples : {0, 1, 8, 9}) {
      constexpr BlockedValues kValues[] = {BlockedValues::kFloat32, BlockedValues::kBFloat16, BlockedValues::kCodes};
      TestOne(w, kValues[turn % 3], kFloats[turn / 4 % 2], samples, turn % 5 != 0, turn % 7 < 3, rng);
      ++turn;
    }
  }
}

// ---- words

template <typename T>
constexpr bool kQuads = sizeof(T) == 1;

// Samples rounded to words, and what they were rounded with, by the scalar level.
template <typename T>
struct Rounded {
  Rounded(const std::vector<float>& x, Index samples, Index features)
      : columns((features + Words<T>::kGroup - 1) / Words<T>::kGroup),
        words(samples * columns),
        scales(samples),
        inverses(samples) {
    if (kQuads<T>) {
      kWordPanelsScalar.scales({x.data(), FloatDtype::kFloat32, features, scales.data(), inverses.data()}, 0, samples);
    }
    constexpr Index kWidth = 8;
    std::vector<std::uint32_t> panel(columns * kWidth);
    for (Index first = 0; first < samples; first += kWidth) {
      const Index count = std::min(kWidth, samples - first);
      const WordPanelArgs args{x.data() + first * features,
                               FloatDtype::kFloat32,
                               count,
                               features,
                               panel.data(),
                               kWidth,
                               inverses.data() + first,
                               0};
      (kQuads<T> ? kWordPanelsScalar.quads : kWordPanelsScalar.pairs)(args, 0, columns);
      for (Index n = 0; n < count; ++n) {
        for (Index c = 0; c < columns; ++c) words[(first + n) * columns + c] = panel[c * kWidth + n];
      }
    }
  }

  Index columns;
  std::vector<std::uint32_t> words;
  std::vector<float> scales, inverses;
};

bool Same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// y; the words must be those of the scalar level.
template <typename T>
std::vector<float> MultiplyWords(const Words<T>& w, FloatDtype floats_as, Index samples, Index features,
                                 const std::vector<float>& x_numbers, const std::vector<float>* bias_numbers,
                                 const std::vector<float>& row_scale_numbers, bool relu) {
  DeviceArray<std::int32_t> offsets("block_offsets", w.block_offsets), segments("segments", w.segments);
  DeviceArray<std::uint16_t> indices("indices", w.indices);
  std::vector<std::uint32_t> stored;
  for (const auto& word : w.values) stored.push_back(std::bit_cast<std::uint32_t>(word));
  DeviceArray<std::uint32_t> values("values", stored), words("words", samples * w.columns);
  DeviceArray<float> row_scales("row_scales", row_scale_numbers), scales("sample_scales", samples);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * w.rows);
  const BlockedWordsCudaArgs round{x.data(), floats_as, samples, features, words.data(), scales.data()};
  ExpectLaunched((kQuads<T> ? BlockedQuadsCuda : BlockedPairsCuda)(round, nullptr), "rounding to words");
  const Rounded<T> want(x_numbers, samples, features);
  bool same = words.Values() == want.words;
  if (kQuads<T>) {
    const auto got = scales.Values();
    for (Index n = 0; n < samples; ++n) same &= Same(got[n], want.scales[n]);
  }
  Expect(same, "words of %ld: %ld samples of %ld features, floats %d", long{Words<T>::kGroup}, long{samples},
         long{features}, static_cast<int>(floats_as));
  const BlockedWeight weight{offsets.data(),
                             segments.data(),
                             indices.data(),
                             values.data(),
                             kQuads<T> ? BlockedValues::kInt8Quads : BlockedValues::kBFloat16Pairs,
                             nullptr,
                             0,
                             w.rows,
                             w.columns,
                             static_cast<Index>(w.indices.size()),
                             w.column_block};
  BlockedMatmulCudaArgs args{weight, words.data(), floats_as, bias_numbers == nullptr ? nullptr : bias.data(),
                             relu,   y.data(),     samples};
  if (kQuads<T>) {
    args.sample_scales = scales.data();
    args.row_scales = row_scales.data();
  }
  DeviceArray<std::uint32_t> panels("panels", (samples + 7) / 8 * 8 * w.columns);
  args.panels = panels.data();
  ExpectLaunched(BlockedMatmulCuda(args, nullptr), "BlockedMatmulCuda of words");
  return y.Values();
}

template <typename T>
void TestWords(Index rows, Index features, Index column_block, double density, FloatDtype floats_as, Index samples,
               bool with_bias, bool relu, std::mt19937& rng) {
  const Words<T> w(rows, features, column_block, density, rng);
  auto x = Random(samples * features, rng);
  if (kQuads<T> && features != 0) {
    // Samples that have no scale.
    const float odd[] = {NAN, INFINITY, -INFINITY, 1e-38f};
    for (Index n = 2; n < samples; n += 3) {
      if (n % 4 == 3) std::fill_n(x.begin() + n * features, features, 0.0f);
      x[n * features + rng() % features] = odd[n % 4];
    }
  }
  const auto bias = Random(rows, rng), row_scales = RowScales(rows, rng), *chosen = with_bias ? &bias : nullptr;
  const auto got = MultiplyWords(w, floats_as, samples, features, x, chosen, row_scales, relu);
  const Rounded<T> rounded(x, samples, features);
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < rows; ++r) {
      Sum want;
      std::int32_t integer = 0;
      for (Index c = 0; c < features; ++c) {
        const float value = w.dense[r * features + c];
        if (value == 0) continue;
        want.Add(double{value} * x[n * features + c]);
        if (!kQuads<T>) continue;
        const std::uint32_t word = rounded.words[n * rounded.columns + c / 4];
        integer += static_cast<int>(value) * static_cast<std::int8_t>(word >> c % 4 * 8);
      }
      if (with_bias) want.Add(bias[r]);
      const float y = got[n * rows + r];
      if (kQuads<T>) {
        const float exact = Scaled(integer, row_scales[r], rounded.scales[n], with_bias ? bias[r] : 0.0f);
        const float stored = floats_as == FloatDtype::kFloat32 ? exact : FromBFloat16(ToBFloat16(exact));
        right &= Same(y, relu && exact < 0 ? 0 : stored);
      } else {
        right &= relu && y == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -23)
                                : want.Near(y, floats_as, 2) && !(relu && y < 0);
      }
    }
  }
  Expect(right, "words of %ld: %ld x %ld in blocks of %ld, %ld samples, floats %d, relu %d", long{Words<T>::kGroup},
         long{rows}, long{features}, long{column_block}, long{samples}, static_cast<int>(floats_as), int{relu});
}

void TestWordShapes() {
  std::mt19937 rng(4321);
  const struct {
    Index rows, features, column_block;
    double density;
  } shapes[] = {{1, 1, 1, 1.0},      {7, 9, 1, 0.5},      {33, 37, 4, 0.3},  {255, 5, 2, 0.2}, {256, 64, 16, 0.02},
                {257, 67, 16, 0.02}, {3, 1027, 300, 1.0}, {20, 50, 16, 0.0}, {5, 0, 16, 0.0},  {0, 5, 16, 0.0}};
  int turn = 0;
  for (const auto& shape : shapes) {
    for (const Index samples : {0, 1, 8, 9}) {
      const FloatDtype floats_as = kFloats[turn % 2];
      const bool with_bias = turn % 5 != 0, relu = turn % 3 == 0;
      TestWords<std::int8_t>(shape.rows, shape.features, shape.column_block, shape.density, floats_as, samples,
                             with_bias, relu, rng);
      TestWords<std::uint16_t>(shape.rows, shape.features, shape.column_block, shape.density, floats_as, samples,
                               with_bias, relu, rng);
      ++turn;
    }
  }
}

// Damage becomes NaN in its row or its row block, though integers have no NaN.
template <typename T>
void TestDamagedWords() {
  std::mt19937 rng(77);
  const Index samples = 9, features = 58, rows = 260;
  const Words<T> good(rows, features, 4, 0.2, rng);
  const auto x = Random(samples * features, rng), row_scales = Random(rows, rng);
  const auto multiply = [&](const Words<T>& w) {
    return MultiplyWords(w, FloatDtype::kFloat32, samples, features, x, nullptr, row_scales, true);
  };
  const auto want = multiply(good);
  const auto expect = [&](const Words<T>& bad, Index row_begin, Index row_end, const char* what) {
    const auto got = multiply(bad);
    bool right = true;
    for (Index i = 0; i < samples * rows; ++i) {
      const Index r = i % rows;
      right &= row_begin <= r && r < row_end ? std::isnan(got[i]) : got[i] == want[i];
    }
    Expect(right, "words of %ld: %s in rows %ld to %ld", long{Words<T>::kGroup}, what, long{row_begin}, long{row_end});
  };
  const Index blocks = (good.columns + 3) / 4;
  for (const Index part : {0, 1}) {
    const Index begin = part * kBlockedRows, end = part == 0 ? kBlockedRows : rows;
    for (const Index j : {Index{0}, Index{1}, blocks - 1}) {
      const Index first = begin * blocks + j * (end - begin);
      Words<T> bad = good;
      bad.block_offsets[part * blocks + j + (j == 0 ? 1 : 0)] = -1;
      expect(bad, begin, end, "an offset outside");
      bad = good;
      bad.segments[first + 1] = bad.segments[first];
      expect(bad, begin, end, "a row twice");
      bad = good;
      const Index row = begin + (good.segments[first] >> 16);
      bad.indices[good.block_offsets[part * blocks + j]] = 4;
      expect(bad, row, row + 1, "an index outside");
    }
  }
}

// Pairs are rounded as on the CPU: ties, the largest numbers, NaN of all bits.
void TestRounding() {
  const std::vector<std::uint32_t> bits = {0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0xbf808000, 0xbf818000,
                                           0x7f7fffff, 0x00018000, 0x7f800000, 0x7fffffff, 0x7f800001};
  const auto features = static_cast<Index>(bits.size());
  DeviceArray<std::uint32_t> x("x", bits), words("words", bits.size() / 2 + 1);
  ExpectLaunched(BlockedPairsCuda({x.data(), FloatDtype::kFloat32, 1, features, words.data(), nullptr}, nullptr),
                 "BlockedPairsCuda");
  const auto got = words.Values();
  for (Index c = 0; c < features; ++c) {
    const auto want = ToBFloat16(std::bit_cast<float>(bits[c]));
    Expect(static_cast<std::uint16_t>(got[c / 2] >> c % 2 * 16) == want, "%x rounded to words %x", bits[c], got[c / 2]);
  }
}

// NaN and infinity reach the rows whose stored weights meet them, and no others; relu keeps NaN.
void TestInfinities() {
  std::mt19937 rng(5);
  const RandomBlocked w(40, 30, 8, 0.3, rng);
  for (const float odd : {INFINITY, NAN}) {
    auto x = Random(2 * w.columns, rng);
    x[w.columns + 11] = odd;
    const auto got = Multiply(w, BlockedValues::kFloat32, FloatDtype::kFloat32, 2, x, nullptr, std::isnan(odd));
    bool right = true;
    for (Index r = 0; r < w.rows; ++r) {
      bool uses = false;
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) uses |= w.col_indices[k] == 11;
      right &= std::isfinite(got[r]) && std::isfinite(got[w.rows + r]) == !uses;
    }
    Expect(right, "%g in x", double{odd});
  }
}

// Damage becomes NaN where the contract says, and changes nothing else.
void TestDamage() {
  std::mt19937 rng(99);
  const Index samples = 9;
  // Row blocks of 256 and 4 rows, four column blocks.
  const RandomBlocked good(260, 29, 8, 0.2, rng);
  const auto x = Random(samples * good.columns, rng);
  const auto want = Multiply(good, BlockedValues::kCodes, FloatDtype::kFloat32, samples, x, nullptr, true);
  const auto expect = [&](const RandomBlocked& bad, Index row_begin, Index row_end, const char* what) {
    const auto got = Multiply(bad, BlockedValues::kCodes, FloatDtype::kFloat32, samples, x, nullptr, true);
    bool right = true;
    for (Index i = 0; i < samples * good.rows; ++i) {
      const Index r = i % good.rows;
      right &= row_begin <= r && r < row_end ? std::isnan(got[i]) : got[i] == want[i];
    }
    Expect(right, "%s in rows %ld to %ld", what, long{row_begin}, long{row_end});
  };
  const auto nnz = static_cast<std::int32_t>(good.indices.size());
  for (const Index part : {0, 1}) {
    const Index begin = part * kBlockedRows, end = part == 0 ? kBlockedRows : good.rows, rows = end - begin;
    for (const Index j : {0, 1, 3}) {
      const Index block = part * 4 + j, first = begin * 4 + j * rows;
      for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX, nnz + 1}) {
        RandomBlocked bad = good;
        bad.block_offsets[block + (j == 0 ? 1 : 0)] = offset;
        expect(bad, begin, end, "an offset outside");
      }
      RandomBlocked bad = good;
      bad.segments[first + 1] = bad.segments[first];
      expect(bad, begin, end, "a row twice");
      bad = good;
      bad.segments[first + 2] = (bad.segments[first + 2] & 0xffff) | static_cast<std::int32_t>(rows << 16);
      expect(bad, begin, end, "a row outside");
      bad.segments[first + 2] = -1;
      expect(bad, begin, end, "all bits of a segment");
      bad = good;
      ++bad.segments[first];
      expect(bad, begin, end, "a non-zero too many");
      // The last non-zero of the block's first segment.
      const Index row = begin + (good.segments[first] >> 16);
      const Index k = good.block_offsets[block] + (good.segments[first] & 0xffff) - 1;
      bad = good;
      bad.indices[k] = j == 3 ? 5 : 8;
      expect(bad, row, row + 1, "an index outside");
      bad.indices[k] = 0xffff;
      expect(bad, row, row + 1, "an index outside");
      bad = good;
      bad.codes[k] = j == 0 ? 7 : 255;
      expect(bad, row, row + 1, "a code outside");
    }
  }
}

// A block that begins one late and ends one past the non-zeros has as many as its segments say.
void TestShiftedBlock() {
  std::mt19937 rng(101);
  const Index samples = 9;
  RandomBlocked w(40, 8, 8, 0.4, rng);
  w.block_offsets = {1, static_cast<std::int32_t>(w.indices.size()) + 1};
  const auto x = Random(samples * w.columns, rng);
  for (const BlockedValues values_as : {BlockedValues::kFloat32, BlockedValues::kBFloat16, BlockedValues::kCodes}) {
    bool right = true;
    for (const float y : Multiply(w, values_as, FloatDtype::kFloat32, samples, x, nullptr, true)) {
      right &= std::isnan(y);
    }
    Expect(right, "a block past the non-zeros, values %d", static_cast<int>(values_as));
  }
}

// More samples than the grid's y axis is given.
[[maybe_unused]] void TestLargeGrids() {
  std::mt19937 rng(7);
  TestOne(RandomBlocked(1, 1, 1, 1, rng), BlockedValues::kFloat32, FloatDtype::kBFloat16, 8192 * 8 + 9, true, false,
          rng);
}

}  // namespace

// A block for each sample: more than a grid has are refused, not taken for their lower 32 bits.
void TestTooManyBlocks() {
  const Index many = (Index{1} << 32) + 3;
  for (const auto launch : {BlockedPairsCuda, BlockedQuadsCuda}) {
    const int error = launch({nullptr, FloatDtype::kFloat32, many, 1, nullptr, nullptr}, nullptr);
    Expect(error == cudaErrorInvalidValue, "%ld samples: error %d", static_cast<long>(many), error);
  }
}

int main() {
  return RunOnDevice([&] {
    TestShapes();
    TestWordShapes();
    TestDamagedWords<std::int8_t>();
    TestDamagedWords<std::uint16_t>();
    TestInfinities();
    TestRounding();
    TestDamage();
    TestShiftedBlock();
    TestTooManyBlocks();
#ifndef TERSETORCH_CUDA_EMULATOR  // some of its schedules grant one or two blocks on that axis
    TestLargeGrids();
#endif
  });
}
