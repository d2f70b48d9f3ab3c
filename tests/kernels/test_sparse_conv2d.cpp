// The packing against its description, every variant against sums in double on awkward shapes and unaligned memory,
// the words of its modes against the formula, damaged weights, and the planes of an image.
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/parts.h"
#include "kernels/planes/planes.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const ConvKernels& kernels;
};

Index Blocks(Index size, Index block) { return (size + block - 1) / block; }

struct Weight {
  Weight(const ConvShape& shape, Index channel_block, double density, std::mt19937& rng)
      : shape(shape), channel_block(channel_block), columns(shape.in_channels / shape.groups * Taps()) {
    dense.assign(shape.out_channels * columns, 0.0f);
    codebook = Random(7, rng);
    for (Index r = 0; r < shape.out_channels; ++r) {
      // Filters of very different lengths, some of them empty and some full.
      std::bernoulli_distribution kept(r % 7 == 3 ? 0 : r % 11 == 5 ? 1 : density);
      for (Index c = 0; c < columns; ++c) {
        if (!kept(rng)) continue;
        col_indices.push_back(static_cast<std::int32_t>(c));
        csr_codes.push_back(static_cast<std::uint8_t>(rng() % codebook.size()));
        dense[r * columns + c] = codebook[csr_codes.back()];
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
    Pack();
  }

  Index Taps() const { return shape.kernel_h * shape.kernel_w; }
  Index RowBlocks() const { return Blocks(shape.out_channels, kConvRows); }
  Index ChannelBlocks() const { return Blocks(shape.in_channels, channel_block); }

  void Pack() {
    const std::size_t nnz = col_indices.size();
    blocks.assign(2 * (RowBlocks() * ChannelBlocks() + 1), -1);
    segments.assign(ChannelBlocks() * shape.out_channels, -1);
    indices.assign(nnz, 0xffff);
    std::vector<std::int32_t> sources(nnz, -1), scratch(ChannelBlocks() * shape.out_channels + shape.kernel_h);
    ConvPack({shape, row_offsets.data(), col_indices.data(), channel_block, blocks.data(), segments.data(),
              indices.data(), sources.data(), scratch.data()});
    segments.resize(blocks[blocks.size() - 2]);
    for (const std::int32_t source : sources) {
      codes.push_back(csr_codes[source]);
      values.push_back(codebook[csr_codes[source]]);
      halves.push_back(Truncated(values.back()));
    }
  }

  ConvShape shape;
  Index channel_block, columns;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> dense, codebook;
  std::vector<std::uint8_t> csr_codes;

  std::vector<std::int32_t> blocks, segments;
  std::vector<std::uint16_t> indices;
  std::vector<float> values;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

// A weight's arrays in unaligned memory.
struct Stored {
  Stored(const Weight& w, ConvValues stored_as)
      : blocks(w.blocks),
        segments(w.segments),
        indices(w.indices),
        codebook(w.codebook),
        values(w.values),
        halves(w.halves),
        codes(w.codes) {
    const void* chosen = stored_as == ConvValues::kFloat32    ? static_cast<const void*>(values.data())
                         : stored_as == ConvValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                              : codes.data();
    args = {blocks.data(),
            segments.data(),
            indices.data(),
            chosen,
            stored_as,
            codebook.data(),
            static_cast<Index>(w.codebook.size()),
            static_cast<Index>(w.segments.size()),
            static_cast<Index>(w.indices.size()),
            w.channel_block,
            w.shape};
  }

  Unaligned<std::int32_t> blocks, segments;
  Unaligned<std::uint16_t> indices;
  Unaligned<float> codebook, values;
  Unaligned<std::uint16_t> halves;
  Unaligned<std::uint8_t> codes;
  ConvWeight args;
};

class Aligned {
 public:
  explicit Aligned(Index floats) : memory_(floats + 16, NAN) {}
  float* data() { return memory_.data() + (16 - reinterpret_cast<std::uintptr_t>(memory_.data()) / 4 % 16); }

 private:
  std::vector<float> memory_;
};

// Every non-zero once, in the block of its filter and channel, longer segments first and none empty.
void TestPacking(const Weight& w) {
  const ConvSlots slots(w.shape);
  const ConvShape& s = w.shape;
  std::vector<float> packed(w.dense.size(), 0.0f);
  bool ordered = true, inside = true;
  for (Index b = 0; b < w.RowBlocks() * w.ChannelBlocks(); ++b) {
    Index k = w.blocks[2 * b + 1], last = kConvMaxIndex;
    for (Index i = w.blocks[2 * b]; i < w.blocks[2 * b + 2]; ++i) {
      const Index filter = b % w.RowBlocks() * kConvRows + (w.segments[i] >> 16), count = w.segments[i] & 0xffff;
      ordered &= 0 < count && count <= last;
      last = count;
      const Index first = filter / (s.out_channels / s.groups) * (s.in_channels / s.groups);
      for (const Index stop = k + count; k < stop; ++k) {
        const Index slot = w.indices[k] % slots.Count(), rest = w.indices[k] / slots.Count();
        const Index c = b / w.RowBlocks() * w.channel_block + rest / s.kernel_w - first, kw = rest % s.kernel_w;
        Index kh = 0;
        while (kh < s.kernel_h && slots.Slot(kh) != slot) ++kh;
        inside &= kh < s.kernel_h && 0 <= c && c < s.in_channels / s.groups;
        if (inside) packed[filter * w.columns + (c * s.kernel_h + kh) * s.kernel_w + kw] = w.values[k];
      }
    }
    ordered &= k == w.blocks[2 * b + 3];
  }
  Expect(ordered && inside && packed == w.dense,
         "packing: %ld -> %ld channels, kernel %ld x %ld, ordered %d, inside %d", long{s.in_channels},
         long{s.out_channels}, long{s.kernel_h}, long{s.kernel_w}, static_cast<int>(ordered), static_cast<int>(inside));
}

struct Image {
  Index height, width, pad_h, pad_w;
};

void TestOne(const Variant& variant, const Weight& w, const Image& image, ConvValues values_as, FloatDtype floats_as,
             bool channels_last, bool relu, Index chunks, std::mt19937& rng) {
  const ConvShape& s = w.shape;
  Stored stored(w, values_as);
  const Index out_height = (image.height + 2 * image.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  const Index out_width = (image.width + 2 * image.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  const auto x = Random(s.in_channels * image.height * image.width, rng), bias = Random(s.out_channels, rng);
  Unaligned<float> planes(x), stored_bias(bias);
  Output y(s.out_channels * out_height * out_width, floats_as);
  ConvArgs args{};
  args.weight = stored.args;
  args.height = image.height, args.width = image.width, args.pad_h = image.pad_h, args.pad_w = image.pad_w;
  args.out_height = out_height, args.out_width = out_width;
  args.planes = planes.data();
  args.y = y.data();
  args.stored_as = floats_as;
  args.channels_last = channels_last;
  args.bias = stored_bias.data();
  args.relu = relu;
  args.plan = ConvPlanFor(s, stored.args.nnz, image.pad_h, out_height, out_width, variant.kernels.lanes);
  const ConvScratchSizes sizes = ConvScratch(stored.args, args.plan);
  const Index rows = Blocks(w.RowBlocks(), chunks);
  bool right = variant.kernels.check(stored.args) == ConvStatus::kOk;
  const Index of_tile = Blocks(w.RowBlocks(), rows), tasks = args.plan.tiles_across * args.plan.tiles_down * of_tile;
  InParts(tasks / 2, tasks, [&](Index begin, Index end) {
    Aligned buffer(sizes.buffer), line(sizes.line), sums(sizes.sums * rows);
    ConvArgs part = args;
    part.buffer = buffer.data(), part.line = line.data(), part.sums = sums.data();
    for (Index task = end; task-- > begin;) {
      const Index row = task % of_tile * rows;
      variant.kernels.conv(part, task / of_tile, row, std::min(row + rows, w.RowBlocks()));
    }
  });
  const auto y_values = y.Values();
  for (Index o = 0; o < s.out_channels; ++o) {
    const Index first = o / (s.out_channels / s.groups) * (s.in_channels / s.groups);
    for (Index i = 0; i < out_height; ++i) {
      for (Index j = 0; j < out_width; ++j) {
        Sum want;
        want.Add(bias[o]);
        for (Index k = w.row_offsets[o]; k < w.row_offsets[o + 1]; ++k) {
          const Index column = w.col_indices[k], c = first + column / w.Taps(), tap = column % w.Taps();
          const Index row = i * s.stride_h + tap / s.kernel_w * s.dilation_h - image.pad_h;
          const Index at = j * s.stride_w + tap % s.kernel_w * s.dilation_w - image.pad_w;
          const bool there = 0 <= row && row < image.height && 0 <= at && at < image.width;
          want.Add(there ? double{w.dense[o * w.columns + column]} * x[(c * image.height + row) * image.width + at]
                         : 0);
        }
        const Index place = i * out_width + j;
        const float got = y_values[channels_last ? place * s.out_channels + o : o * out_height * out_width + place];
        right &= relu && got == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                                  : want.Near(got, floats_as) && !(relu && got < 0);
      }
    }
  }
  Expect(right,
         "%s: %ld -> %ld channels in %ld groups, kernel %ld x %ld, stride %ld x %ld, image %ld x %ld, values %d, "
         "floats %d, channels last %d, relu %d",
         variant.name, long{s.in_channels}, long{s.out_channels}, long{s.groups}, long{s.kernel_h}, long{s.kernel_w},
         long{s.stride_h}, long{s.stride_w}, long{image.height}, long{image.width}, static_cast<int>(values_as),
         static_cast<int>(floats_as), static_cast<int>(channels_last), static_cast<int>(relu));
}

void TestShapes(const std::vector<Variant>& variants) {
  std::mt19937 rng(1234);
  const struct {
    ConvShape shape;
    Index channel_block;
    Image image;
    double density;
  } cases[] = {
      {{1, 1, 1, 1, 1, 1, 1, 1, 1}, 1, {1, 1, 0, 0}, 1.0},    {{5, 7, 1, 3, 3, 1, 1, 1, 1}, 2, {7, 7, 1, 1}, 0.5},
      {{9, 66, 1, 3, 3, 1, 1, 1, 1}, 4, {9, 16, 1, 1}, 0.3},  {{3, 65, 1, 3, 3, 1, 1, 1, 1}, 8, {17, 29, 1, 1}, 0.3},
      {{4, 130, 1, 1, 1, 1, 1, 1, 1}, 3, {8, 17, 0, 0}, 0.4}, {{4, 5, 1, 1, 1, 1, 1, 1, 1}, 3, {1, 259, 0, 0}, 0.4},
      {{3, 5, 1, 1, 5, 1, 1, 1, 1}, 2, {1, 131, 0, 2}, 0.4},  {{3, 5, 1, 1, 5, 1, 3, 1, 2}, 2, {1, 140, 0, 4}, 0.4},
      {{3, 5, 1, 3, 3, 2, 2, 1, 1}, 2, {15, 33, 1, 1}, 0.5},  {{2, 5, 1, 5, 4, 3, 4, 1, 1}, 1, {30, 37, 2, 1}, 0.5},
      {{2, 5, 1, 3, 3, 1, 1, 9, 10}, 1, {24, 27, 3, 3}, 0.5}, {{2, 5, 1, 4, 3, 2, 3, 3, 2}, 1, {24, 27, 3, 0}, 0.5},
      {{12, 8, 4, 3, 3, 1, 1, 1, 1}, 5, {9, 8, 1, 1}, 0.5},   {{40, 80, 40, 3, 3, 1, 1, 1, 1}, 16, {5, 4, 1, 1}, 0.5},
      {{3, 5, 1, 1, 3, 3, 1, 1, 1}, 2, {1, 37, 1, 1}, 0.6},   {{3, 5, 1, 3, 3, 1, 1, 1, 1}, 2, {1, 21, 1, 1}, 0.6},
      {{6, 70, 1, 3, 3, 1, 1, 1, 1}, 4, {9, 9, 0, 0}, 0.0},   {{2, 3, 1, 2, 3, 1, 1, 1, 1}, 2, {2, 3, 30, 30}, 1.0}};
  for (const auto& test : cases) {
    const Weight w(test.shape, test.channel_block, test.density, rng);
    TestPacking(w);
    for (const Variant& variant : variants) {
      for (const ConvValues values_as : {ConvValues::kFloat32, ConvValues::kBFloat16, ConvValues::kCodes}) {
        for (const FloatDtype floats_as : kFloats) {
          for (const bool last : {false, true}) {
            const bool relu = values_as == ConvValues::kCodes;
            TestOne(variant, w, test.image, values_as, floats_as, last, relu, last ? w.RowBlocks() : 1, rng);
          }
        }
      }
    }
  }
}

// Each number of rows that a tile may have, at each width of its parts.
void TestTiles(const std::vector<Variant>& variants) {
  std::mt19937 rng(5);
  const Weight w({3, 4, 1, 3, 3, 1, 1, 1, 1}, 2, 0.6, rng);
  for (const Variant& variant : variants) {
    for (Index height = 1; height <= 18; ++height) {
      for (const Index width : {1, 3, 4, 5, 7, 8, 12, 13, 16, 20, 24}) {
        TestOne(variant, w, {height, width, 1, 1}, ConvValues::kFloat32, FloatDtype::kFloat32, width % 2 == 0, false, 1,
                rng);
      }
    }
  }
}

// A weight whose non-zeros are words of several channels at one tap; T: std::uint16_t for pairs of bfloat16,
// std::int8_t for quads.
template <typename T>
struct WordWeight {
  static constexpr Index kGroup = 4 / sizeof(T);

  WordWeight(const ConvShape& of_x, Index channel_block, double density, std::mt19937& rng)
      : of_x(of_x), shape(ConvWordShape(of_x, kGroup)), channel_block(channel_block) {
    const Index group_channels = of_x.in_channels / of_x.groups, group_words = shape.in_channels / shape.groups;
    const Index taps = shape.kernel_h * shape.kernel_w;
    dense.assign(of_x.out_channels * group_channels * taps, 0.0f);
    std::vector<std::int32_t> offsets{0}, columns;
    std::vector<std::array<T, kGroup>> words;
    for (Index r = 0; r < of_x.out_channels; ++r) {
      std::bernoulli_distribution kept(r % 7 == 3 ? 0 : r % 11 == 5 ? 1 : density);
      row_sums.push_back(0);
      for (Index column = 0; column < group_words * taps; ++column) {
        std::array<T, kGroup> word{};
        bool any = false;
        for (Index j = 0; j < kGroup; ++j) {
          const Index c = column / taps * kGroup + j;
          if (c >= group_channels || !kept(rng)) continue;
          any = true;
          float& value = dense[(r * group_channels + c) * taps + column % taps];
          if constexpr (sizeof(T) == 1) {
            word[j] = static_cast<T>(static_cast<int>(rng() % 255) - 127);
            value = word[j];
            row_sums[r] += word[j];
          } else {
            word[j] = Truncated(std::normal_distribution<float>()(rng));
            value = Widened(word[j]);
          }
        }
        if (!any) continue;
        columns.push_back(static_cast<std::int32_t>(column));
        words.push_back(word);
      }
      offsets.push_back(static_cast<std::int32_t>(columns.size()));
    }
    const Index row_blocks = Blocks(shape.out_channels, kConvRows);
    const Index channel_blocks = Blocks(shape.in_channels, channel_block);
    blocks.resize(2 * (row_blocks * channel_blocks + 1));
    segments.resize(channel_blocks * shape.out_channels);
    indices.resize(columns.size());
    std::vector<std::int32_t> sources(columns.size()), scratch(channel_blocks * shape.out_channels + shape.kernel_h);
    ConvPack({shape, offsets.data(), columns.data(), channel_block, blocks.data(), segments.data(), indices.data(),
              sources.data(), scratch.data()});
    segments.resize(blocks[blocks.size() - 2]);
    for (const std::int32_t source : sources) values.push_back(words[source]);
  }

  ConvShape of_x, shape;
  Index channel_block;
  std::vector<float> dense;
  std::vector<std::int32_t> row_sums, blocks, segments;
  std::vector<std::uint16_t> indices;
  std::vector<std::array<T, kGroup>> values;
};

// Quads give the same bits as the formula at every level, pairs a sum within its rounding.
template <typename T>
void TestWords(const Variant& variant, const WordWeight<T>& w, const Image& image, FloatDtype floats_as,
               bool channels_last, bool relu, std::mt19937& rng) {
  constexpr bool kQuads = sizeof(T) == 1;
  const ConvShape& s = w.of_x;
  const Index out_height = (image.height + 2 * image.pad_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
  const Index out_width = (image.width + 2 * image.pad_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
  const Index pixels = image.height * image.width, group_channels = s.in_channels / s.groups;
  const auto x = Random(s.in_channels * pixels, rng), bias = Random(s.out_channels, rng);
  const auto row_scales = Random(s.out_channels, rng);
  constexpr float kInverse = 20.5f, kScale = 1 / 20.5f;
  std::vector<std::uint32_t> words(w.shape.in_channels * pixels, 0xdeadbeef);
  const WordPlanesArgs planes_args{
      x.data(), FloatDtype::kFloat32,       false, s.in_channels, s.groups, pixels, words.data(),
      kInverse, variant.kernels.quad_offset};
  (kQuads ? kWordPlanesScalar.quads : kWordPlanesScalar.pairs)(planes_args, 0, pixels);
  std::vector<float> word_floats(words.size());
  if (!words.empty()) std::memcpy(word_floats.data(), words.data(), 4 * words.size());
  Unaligned<float> planes(word_floats), stored_bias(bias), stored_scales(row_scales);
  Unaligned<std::int32_t> blocks(w.blocks), segments(w.segments), row_sums(w.row_sums);
  Unaligned<std::uint16_t> indices(w.indices);
  Unaligned<std::array<T, WordWeight<T>::kGroup>> values(w.values);
  Output y(s.out_channels * out_height * out_width, floats_as);
  ConvArgs args{};
  args.weight = {blocks.data(),
                 segments.data(),
                 indices.data(),
                 values.data(),
                 kQuads ? ConvValues::kInt8Quads : ConvValues::kBFloat16Pairs,
                 nullptr,
                 0,
                 static_cast<Index>(w.segments.size()),
                 static_cast<Index>(w.indices.size()),
                 w.channel_block,
                 w.shape};
  args.height = image.height, args.width = image.width, args.pad_h = image.pad_h, args.pad_w = image.pad_w;
  args.out_height = out_height, args.out_width = out_width;
  args.planes = planes.data();
  args.y = y.data();
  args.stored_as = floats_as;
  args.channels_last = channels_last;
  args.bias = stored_bias.data();
  args.relu = relu;
  args.row_scales = stored_scales.data();
  args.row_sums = row_sums.data();
  args.image_scale = kScale;
  args.plan = ConvPlanFor(w.shape, args.weight.nnz, image.pad_h, out_height, out_width, variant.kernels.lanes);
  const ConvScratchSizes sizes = ConvScratch(args.weight, args.plan);
  const Index row_blocks = Blocks(s.out_channels, kConvRows);
  bool right = variant.kernels.check(args.weight) == ConvStatus::kOk;
  const Index tiles = args.plan.tiles_across * args.plan.tiles_down;
  InParts(tiles / 2, tiles, [&](Index begin, Index end) {
    Aligned buffer(sizes.buffer), line(sizes.line), sums(sizes.sums * row_blocks);
    ConvArgs part = args;
    part.buffer = buffer.data(), part.line = line.data(), part.sums = sums.data();
    for (Index tile = end; tile-- > begin;) variant.kernels.conv(part, tile, 0, row_blocks);
  });
  const auto y_values = y.Values();
  for (Index o = 0; o < s.out_channels; ++o) {
    const Index first = o / (s.out_channels / s.groups) * group_channels;
    for (Index i = 0; i < out_height; ++i) {
      for (Index j = 0; j < out_width; ++j) {
        Sum want;
        std::int32_t integer = 0;
        want.Add(bias[o]);
        for (Index k = 0; k < group_channels * s.kernel_h * s.kernel_w; ++k) {
          const float value = w.dense[o * group_channels * s.kernel_h * s.kernel_w + k];
          const Index c = first + k / s.kernel_w / s.kernel_h;
          const Index row = i * s.stride_h + k / s.kernel_w % s.kernel_h * s.dilation_h - image.pad_h;
          const Index at = j * s.stride_w + k % s.kernel_w * s.dilation_w - image.pad_w;
          if (value == 0 || row < 0 || row >= image.height || at < 0 || at >= image.width) continue;
          const float of_x = x[c * pixels + row * image.width + at];
          want.Add(double{value} * of_x);
          integer += static_cast<int>(value) * static_cast<int>(std::rint(of_x * kInverse));
        }
        const Index place = i * out_width + j;
        const float got = y_values[channels_last ? place * s.out_channels + o : o * out_height * out_width + place];
        if (kQuads) {
          const float exact = std::fma(static_cast<float>(integer) * row_scales[o], kScale, bias[o]);
          const float stored = floats_as == FloatDtype::kFloat32 ? exact : FromBFloat16(ToBFloat16(exact));
          right &= got == (relu && exact < 0 ? 0 : stored);
        } else {
          right &= relu && got == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -22)
                                    : want.Near(got, floats_as, 4) && !(relu && got < 0);
        }
      }
    }
  }
  Expect(right,
         "%s: words of %ld, %ld -> %ld channels in %ld groups, kernel %ld x %ld, stride %ld x %ld, image %ld x %ld, "
         "floats %d, channels last %d, relu %d",
         variant.name, long{WordWeight<T>::kGroup}, long{s.in_channels}, long{s.out_channels}, long{s.groups},
         long{s.kernel_h}, long{s.kernel_w}, long{s.stride_h}, long{s.stride_w}, long{image.height}, long{image.width},
         static_cast<int>(floats_as), static_cast<int>(channels_last), static_cast<int>(relu));
}

template <typename T>
void TestWordShapes(const std::vector<Variant>& variants) {
  std::mt19937 rng(77);
  const struct {
    ConvShape shape;
    Index channel_block;  // in words
    Image image;
    double density;
  } cases[] = {
      {{1, 1, 1, 1, 1, 1, 1, 1, 1}, 1, {1, 1, 0, 0}, 1.0},    {{5, 7, 1, 3, 3, 1, 1, 1, 1}, 1, {7, 7, 1, 1}, 0.5},
      {{19, 66, 1, 3, 3, 1, 1, 1, 1}, 2, {9, 16, 1, 1}, 0.3}, {{3, 65, 1, 3, 3, 1, 1, 1, 1}, 2, {17, 29, 1, 1}, 0.3},
      {{8, 130, 1, 1, 1, 1, 1, 1, 1}, 1, {8, 17, 0, 0}, 0.4}, {{4, 5, 1, 1, 1, 1, 1, 1, 1}, 3, {1, 259, 0, 0}, 0.4},
      {{3, 5, 1, 1, 5, 1, 1, 1, 1}, 2, {1, 131, 0, 2}, 0.4},  {{3, 5, 1, 1, 5, 1, 3, 1, 2}, 2, {1, 140, 0, 4}, 0.4},
      {{3, 5, 1, 1, 3, 3, 1, 1, 1}, 2, {1, 37, 1, 1}, 0.6},   {{3, 5, 1, 3, 3, 1, 1, 1, 1}, 2, {1, 21, 1, 1}, 0.6},
      {{6, 5, 1, 3, 3, 2, 2, 1, 1}, 1, {15, 33, 1, 1}, 0.5},  {{2, 5, 1, 5, 4, 3, 4, 1, 1}, 1, {30, 37, 2, 1}, 0.5},
      {{2, 5, 1, 3, 3, 1, 1, 9, 10}, 1, {24, 27, 3, 3}, 0.5}, {{12, 8, 4, 3, 3, 1, 1, 1, 1}, 3, {9, 8, 1, 1}, 0.5},
      {{40, 80, 8, 3, 3, 1, 1, 1, 1}, 5, {5, 4, 1, 1}, 0.5},  {{6, 70, 1, 3, 3, 1, 1, 1, 1}, 1, {9, 9, 0, 0}, 0.0},
      {{2, 3, 1, 2, 3, 1, 1, 1, 1}, 1, {2, 3, 30, 30}, 1.0}};
  for (const auto& test : cases) {
    const WordWeight<T> w(test.shape, test.channel_block, test.density, rng);
    for (const Variant& variant : variants) {
      for (const FloatDtype floats_as : kFloats) {
        for (const bool last : {false, true}) {
          TestWords(variant, w, test.image, floats_as, last, last == (floats_as == FloatDtype::kFloat32), rng);
        }
      }
    }
  }
}

void TestPlanes(const Variant& variant) {
  std::mt19937 rng(7);
  for (const Index channels : {1, 7, 8, 19}) {
    for (const Index pixels : {1, 15, 16, 50}) {
      const auto x = Random(channels * pixels, rng);
      std::vector<float> last(x.size());
      std::vector<std::uint16_t> halves, last_halves;
      for (Index i = 0; i < pixels; ++i) {
        for (Index c = 0; c < channels; ++c) last[i * channels + c] = x[c * pixels + i];
      }
      for (const float value : x) halves.push_back(Truncated(value));
      for (const float value : last) last_halves.push_back(Truncated(value));
      Unaligned<float> floats(x), last_floats(last);
      Unaligned<std::uint16_t> stored(halves), last_stored(last_halves);
      const struct {
        const void* x;
        FloatDtype stored_as;
        bool channels_last;
      } images[] = {{floats.data(), FloatDtype::kFloat32, false},
                    {stored.data(), FloatDtype::kBFloat16, false},
                    {last_floats.data(), FloatDtype::kFloat32, true},
                    {last_stored.data(), FloatDtype::kBFloat16, true}};
      for (const auto& image : images) {
        std::vector<float> planes(x.size(), NAN);
        const ConvPlanesArgs args{image.x, image.stored_as, image.channels_last, channels, pixels, planes.data()};
        InParts(pixels / 3, pixels, [&](Index begin, Index end) { variant.kernels.planes(args, begin, end); });
        Expect(planes == x, "%s: planes of %ld channels, %ld pixels, stored %d, channels last %d", variant.name,
               long{channels}, long{pixels}, static_cast<int>(image.stored_as), static_cast<int>(image.channels_last));
      }
    }
  }
}

// Each damage must be met by its status, wherever it lies.
void TestDamage(const Variant& variant) {
  std::mt19937 rng(99);
  const Weight good({20, 70, 1, 3, 3, 1, 1, 1, 1}, 8, 0.4, rng);
  const auto expect = [&](const Weight& w, Index nnz, ConvStatus want, const char* what) {
    Stored stored(w, want == ConvStatus::kBadCode ? ConvValues::kCodes : ConvValues::kFloat32);
    stored.args.nnz = nnz;
    const ConvStatus got = variant.kernels.check(stored.args);
    Expect(got == want, "%s: %s, got %d", variant.name, what, static_cast<int>(got));
  };
  const auto nnz = static_cast<Index>(good.indices.size());
  expect(good, nnz, ConvStatus::kOk, "nothing");
  expect(good, nnz - 1, ConvStatus::kBadBlock, "more than there is");
  for (const std::size_t k : {std::size_t{0}, std::size_t{777}, good.indices.size() - 1}) {
    Weight bad = good;
    bad.indices[k] = 0xffff;
    expect(bad, nnz, ConvStatus::kBadIndex, "an index outside");
    for (const int code : {7, 255}) {
      Weight coded = good;
      coded.codes[k] = static_cast<std::uint8_t>(code);
      expect(coded, nnz, ConvStatus::kBadCode, "a code outside");
    }
  }
  Weight edge = good;  // the last block has 4 channels of 3 x 10 slots, of which a tap reads 8
  edge.indices.back() = 4 * 3 * 10 - 7;
  expect(edge, nnz, ConvStatus::kBadIndex, "an index past the last tap");
  for (const std::size_t i : {std::size_t{0}, good.segments.size() - 1}) {
    for (const std::int32_t segment : {good.segments[i] + 1, -1, INT32_MAX, INT32_MIN, 64 << 16}) {
      Weight bad = good;
      bad.segments[i] = segment;
      expect(bad, nnz, ConvStatus::kBadSegment, "a segment that lies");
    }
  }
  Weight row = good;
  row.segments.back() = 6 << 16 | (row.segments.back() & 0xffff);  // the last block has 6 filters
  expect(row, nnz, ConvStatus::kBadSegment, "a filter outside");
  for (const int part : {0, 1}) {
    for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX}) {
      Weight bad = good;
      bad.blocks[2 + part] = offset;
      expect(bad, nnz, ConvStatus::kBadBlock, "a block outside");
    }
  }
}

sigjmp_buf after_illegal_instruction;

// Whether this machine executes bfloat16 instructions, whatever it says of itself.
bool Executes(const Variant& variant) {
  struct sigaction before, during{};
  during.sa_handler = [](int) { siglongjmp(after_illegal_instruction, 1); };
  sigaction(SIGILL, &during, &before);
  bool executed = false;
  if (sigsetjmp(after_illegal_instruction, 1) == 0) {
    std::mt19937 rng(1);
    const WordWeight<std::uint16_t> w({2, 1, 1, 1, 1, 1, 1, 1, 1}, 1, 1.0, rng);
    TestWords(variant, w, {1, 1, 0, 0}, FloatDtype::kFloat32, false, false, rng);
    executed = true;
  }
  sigaction(SIGILL, &before, nullptr);
  return executed;
}

}  // namespace

int main() {
  const Variant all[] = {{"scalar", CpuIsa::kScalar, kConvScalar},
                         {"avx2", CpuIsa::kAvx2, kConvAvx2},
                         {"avx512", CpuIsa::kAvx512, kConvAvx512}};
  std::vector<Variant> variants;
  for (const Variant& variant : all) {
    if (variant.needs <= ProcessCpuIsa().detected) variants.push_back(variant);
  }
  const Variant bfloat16{"avx512bf16", CpuIsa::kAvx512Bf16, kConvAvx512Bf16};
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx512 && Executes(bfloat16)) variants.push_back(bfloat16);
  TestShapes(variants);
  TestTiles(variants);
  TestWordShapes<std::uint16_t>(variants);
  TestWordShapes<std::int8_t>(variants);
  for (const Variant& variant : variants) {
    TestPlanes(variant);
    TestDamage(variant);
    std::printf("tested %s\n", variant.name);
  }
  return Failures() != 0;
}
