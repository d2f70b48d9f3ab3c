// A random product of signs and its results by definition, for the tests of both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/xnor_matmul/xnor_matmul.h"

namespace tersetorch::test {

enum class XnorOutput { kDots, kFloats, kBits };

struct XnorProblem {
  XnorProblem(Index rows, Index columns, Index samples, std::mt19937& rng)
      : rows(rows),
        columns(columns),
        samples(samples),
        words((columns + 63) / 64),
        x(samples * words),
        packed(XnorTiles(rows) * words * kXnorRows),
        scale(Random(rows, rng)),
        bias(Random(rows, rng)) {
    std::vector<std::uint64_t> weight(rows * words);
    const std::uint64_t last = columns % 64 == 0 ? ~std::uint64_t{0} : (std::uint64_t{1} << columns % 64) - 1;
    const auto fill = [&](std::vector<std::uint64_t>& bits) {
      for (Index i = 0; i < static_cast<Index>(bits.size()); ++i) {
        bits[i] = (std::uint64_t{rng()} << 32 | rng()) & (i % words == words - 1 ? last : ~std::uint64_t{0});
      }
    };
    fill(weight);
    fill(x);
    // A row that equals a sample, and one that is its opposite: the largest and the smallest products.
    for (Index i = 0; rows > 1 && samples > 0 && i < words; ++i) {
      weight[i] = x[i];
      weight[words + i] = ~x[i] & (i == words - 1 ? last : ~std::uint64_t{0});
    }
    for (Index r = 0; r < rows; ++r) {
      for (Index i = 0; i < words; ++i) {
        packed[(r / kXnorRows * words + i) * kXnorRows + r % kXnorRows] = weight[r * words + i];
      }
      thresholds.push_back(static_cast<std::int32_t>(static_cast<Index>(rng() % (2 * columns + 3)) - columns - 1));
    }
    bits.resize(samples * ((rows + 63) / 64));
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < rows; ++r) {
        std::int32_t dot = 0;
        for (Index c = 0; c < columns; ++c) {
          const bool same = ((weight[r * words + c / 64] ^ x[n * words + c / 64]) >> c % 64 & 1) == 0;
          dot += same ? 1 : -1;
        }
        if (n % 2 == 1) thresholds[r] = thresholds[r] == dot + 1 ? dot : thresholds[r];  // more ties
        dots.push_back(dot);
        floats.push_back(std::fmaf(static_cast<float>(dot), scale[r], bias[r]));
      }
    }
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < rows; ++r) {
        if (dots[n * rows + r] < thresholds[r]) {
          bits[n * ((rows + 63) / 64) + r / 64] |= std::uint64_t{1} << r % 64;
        }
      }
    }
  }

  void SetOutput(XnorMatmulArgs& args, XnorOutput output, void* y) const {
    if (output == XnorOutput::kDots) args.dots = static_cast<std::int32_t*>(y);
    if (output == XnorOutput::kFloats) args.floats = static_cast<float*>(y);
    if (output == XnorOutput::kBits) args.bits = static_cast<std::uint64_t*>(y);
  }

  Index rows, columns, samples, words;
  std::vector<std::uint64_t> x, packed;
  std::vector<float> scale, bias;
  std::vector<std::int32_t> thresholds;
  std::vector<std::int32_t> dots;
  std::vector<float> floats;
  std::vector<std::uint64_t> bits;
};

}  // namespace tersetorch::test
