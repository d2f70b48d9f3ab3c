// What the products in fixed point share: their packed weight, the conversion of sums, and the split of a product.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels/fixed_matmul/fixed_matmul.h"
#include "torch/fixed.h"

namespace tersetorch {

inline void CheckWhole(const char* op, Place place, const Tensor& t, const char* name) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Char || t.scalar_type() == ScalarType::Short, op, ": ", name,
                  " must be int8 or int16, got ", torch::headeronly::toString(t.scalar_type()),
                  "; pass what fixed_round_whole returns");
}

// Samples are as wide as the weight, or int8.
inline void CheckFits(const char* op, const Tensor& x, bool wide) {
  STD_TORCH_CHECK(wide || x.scalar_type() == ScalarType::Char, op,
                  ": x must be int8 like the packed weight, got int16; pack the weight as int16");
}

struct FixedWeightArgs {
  std::optional<Tensor> tensor;
  const void* packed = nullptr;
  bool wide = false;
  std::int64_t groups = 1, rows = 0, panels = 0, words = 0, segments = 1;  // rows and panels of a group
};

// A weight [rows, columns] as fixed_pack lays it out, group by group.
inline FixedWeightArgs FixedWeightOf(const char* op, Place place, const Tensor& packed, std::int64_t rows,
                                     std::int64_t columns, std::int64_t segments, std::int64_t groups = 1) {
  CheckWhole(op, place, packed, "packed");
  FixedWeightArgs weight;
  weight.wide = packed.scalar_type() == ScalarType::Short;
  weight.groups = groups;
  weight.rows = rows / groups;
  weight.panels = Blocks(std::max<std::int64_t>(0, weight.rows), kFixedPanel);
  weight.segments = segments;
  const std::int64_t of_word = FixedNumbersOfWord(weight.wide);
  weight.words = segments * Blocks(columns / segments, of_word);
  STD_TORCH_CHECK(rows >= 0, op, ": rows must be at least 0, got ", rows, "; pass those of the weight");
  STD_TORCH_CHECK(columns <= kFixedMaxColumns, op, ": the weight must have fewer than 2^24 columns, got ", columns,
                  "; split it");
  STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == groups * weight.panels && packed.size(1) == weight.words + 1 &&
                      packed.size(2) == kFixedPanel && packed.size(3) == of_word,
                  op, ": packed must be [", groups * weight.panels, ", ", weight.words + 1, ", ", kFixedPanel, ", ",
                  of_word, "] for ", rows, " rows and ", columns, " columns, got ", packed.dim(), "-D with ",
                  packed.dim() > 0 ? packed.size(0) : 0, " panels of ", packed.dim() > 1 ? packed.size(1) : 0,
                  "; pass what fixed_pack returns, and x with as many features as the weight has columns");
  weight.tensor = Usable(place, packed, 4 * of_word);
  weight.packed = weight.tensor->const_data_ptr();
  return weight;
}

struct FixedConversionArgs {
  std::optional<Tensor> tensor;
  const std::int64_t* bias = nullptr;
  FixedConvertArgs args{};
};

inline std::int64_t FixedBytes(FixedAs as) { return as == FixedAs::kInt8 ? 1 : as == FixedAs::kInt16 ? 2 : 4; }

// Converts to the values from number `first` on of y.
inline void ConvertFrom(FixedConvertArgs args, std::int64_t first, std::int64_t samples) {
  args.offset += static_cast<std::uint64_t>(first);
  args.y = static_cast<char*>(args.y) + first * FixedBytes(args.as);
  FixedConvert(args, 0, samples);
}

// To the nearest, until the caller says otherwise.
inline FixedConversionArgs FixedConversionOf(const char* op, Place place, const std::optional<Tensor>& bias,
                                             std::int64_t rows, std::int64_t sum_fraction_bits,
                                             std::int64_t integer_bits, std::int64_t fraction_bits, ScalarType dtype,
                                             bool relu) {
  constexpr std::int64_t kMostSumBits = 2 * 15;  // the fraction bits of two int16
  STD_TORCH_CHECK(sum_fraction_bits >= 0 && sum_fraction_bits <= kMostSumBits, op,
                  ": sum_fraction_bits must lie in [0, ", kMostSumBits, "], got ", sum_fraction_bits,
                  "; pass the fraction bits of x and of weight together");
  CheckFixed(op, integer_bits, fraction_bits);
  FixedConversionArgs conversion;
  if (bias.has_value()) {
    CheckOn(place, op, *bias, "bias");
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Long && bias->dim() == 1 && bias->numel() == rows, op,
                    ": bias must be int64 [", rows, "], got ", torch::headeronly::toString(bias->scalar_type()), " of ",
                    bias->dim(), "-D with ", bias->numel(), " elements; pass one for each row, in units of the sums");
    conversion.tensor = Usable(place, *bias);
    conversion.bias = conversion.tensor->const_data_ptr<std::int64_t>();
  }
  conversion.args.rows = rows;
  conversion.args.sum_fraction_bits = static_cast<int>(sum_fraction_bits);
  conversion.args.integer_bits = static_cast<int>(integer_bits);
  conversion.args.fraction_bits = static_cast<int>(fraction_bits);
  conversion.args.relu = relu;
  conversion.args.as = dtype == ScalarType::Float ? FixedAs::kFloats : WholeAs(op, dtype, integer_bits + fraction_bits);
  return conversion;
}

// Samples that a task multiplies with a tile of rows: their sums are 32 KiB.
inline constexpr std::int64_t kFixedBlock = 64;

// A product with a packed weight on the CPU.
class FixedProduct {
 public:
  // largest: at least every |x|, 128 or less where x is int8.
  FixedProduct(const FixedWeightArgs& weight, std::int64_t largest) : weight_(weight) {
    constexpr std::int64_t kLanes = 0x7fffffff, kMostWords = kLanes / (255 * 128 * 4);
    chunk_words_ = kMostWords;
    if (!weight.wide) return;
    std::int64_t largest_w = 1;
    for (std::int64_t panel = 0; panel < weight.groups * weight.panels; ++panel) {
      const auto* last =
          static_cast<const char*>(weight.packed) + ((panel + 1) * (weight.words + 1) - 1) * kFixedPanel * kFixedWord;
      for (std::int64_t r = 0; r < kFixedPanel; ++r) {
        std::int32_t of_row;
        __builtin_memcpy(&of_row, last + 4 * r, sizeof of_row);
        largest_w = std::max<std::int64_t>(largest_w, std::min(of_row, 1 << 15));
      }
    }
    const auto words = [&](std::int64_t largest_x) {
      return kLanes / (2 * std::max<std::int64_t>(1, largest_x) * largest_w);
    };
    split = words(largest) < std::min(kFixedFewWords, weight.words);
    chunk_words_ = words(split ? 128 : largest);
  }

  // Samples of kernels for each of x's.
  std::int64_t Copies() const { return split ? 2 : 1; }

  // Calls put(first, count, row, conversion) for every block of samples and every tile of rows: its sums, ready to be
  // converted. Of sample n the Copies() lie at sample_at from x on, those of a group group_bytes after those before.
  template <typename Put>
  void Run(const void* x, const std::int64_t* sample_at, const std::int64_t* segment_at, std::int64_t group_bytes,
           std::int64_t samples, const FixedConversionArgs& conversion, const Put& put) const {
    const std::int64_t tiles = Blocks(weight_.panels, kFixedTilePanels), blocks = Blocks(samples, kFixedBlock);
    const std::int64_t grain = GrainItems(std::min(samples, kFixedBlock) * Copies() * (4 * weight_.words + 32));
    ParallelRanges(
        blocks, weight_.groups * tiles, grain, [&](std::int64_t block, std::int64_t begin, std::int64_t end) {
          const std::int64_t first = block * kFixedBlock, count = std::min(kFixedBlock, samples - first);
          Scratch scratch(8 * kFixedTile * Copies() * count);
          for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t group = item / tiles, panel = item % tiles * kFixedTilePanels;
            const std::int64_t in_group = panel * kFixedPanel, row = group * weight_.rows + in_group;
            const FixedMatmulArgs args{static_cast<const char*>(x) + group * group_bytes,
                                       weight_.wide,
                                       Copies() * count,
                                       weight_.segments,
                                       weight_.words / weight_.segments,
                                       chunk_words_,
                                       sample_at + Copies() * first,
                                       segment_at,
                                       weight_.packed,
                                       scratch.Data<std::int64_t>()};
            FixedMatmul(args, group * weight_.panels + panel, std::min(kFixedTilePanels, weight_.panels - panel));
            FixedConvertArgs convert = conversion.args;
            convert.sums = args.sums;
            convert.sums_stride = kFixedTile;
            convert.split = split;
            convert.rows = std::min(kFixedTile, weight_.rows - in_group);
            std::int64_t added[kFixedTile];
            for (std::int64_t r = 0; conversion.bias != nullptr && r < convert.rows; ++r) {
              added[r] = std::clamp(conversion.bias[row + r], -kFixedMostBias, kFixedMostBias);
            }
            convert.added = conversion.bias == nullptr ? nullptr : added;
            put(first, count, row, convert);
          }
        });
  }

  bool split = false;

 private:
  const FixedWeightArgs& weight_;
  std::int64_t chunk_words_;
};

}  // namespace tersetorch
