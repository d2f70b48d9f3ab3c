// Random 8-bit rows or images, signs, and their products by definition, for the tests of both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/sign_tables_problem.h"

namespace tersetorch::test {

enum class BitplaneOutput { kDots, kFloats, kBits };

struct BitplaneProblem {
  // Rows; the first sample and row have the largest sum.
  BitplaneProblem(Index rows, Index columns, Index samples, std::int32_t step, std::int32_t zero, std::mt19937& rng)
      : signs(rows, columns, rng), samples(samples), step(step), zero(zero), x(samples * columns) {
    for (std::uint8_t& number : x) number = static_cast<std::uint8_t>(rng());
    for (Index c = 0; samples > 0 && c < columns; ++c) x[c] = 255;
    v.resize(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) v[i] = step * x[i] - zero;
    Solve(rng);
  }
  // Images of so many channels, one after the other; sizes but for the strides.
  BitplaneProblem(Index rows, Index channels, Index count, BitplaneImages sizes, std::int32_t step, std::int32_t zero,
                  std::mt19937& rng)
      : signs(rows, channels * sizes.kernel_height * sizes.kernel_width, rng), step(step), zero(zero), images(sizes) {
    BitplaneImages& i = images;
    i.out_height = (i.height + 2 * i.padding_y - i.dilation_y * (i.kernel_height - 1) - 1) / i.stride_y + 1;
    i.out_width = (i.width + 2 * i.padding_x - i.dilation_x * (i.kernel_width - 1) - 1) / i.stride_x + 1;
    if (i.column_stride == 0) i.column_stride = 1;
    i.row_stride = i.width * i.column_stride;
    i.channel_stride = i.height * i.row_stride;
    i.image_stride = channels * i.channel_stride;
    x.resize(count * i.image_stride);
    for (std::uint8_t& number : x) number = static_cast<std::uint8_t>(rng());
    samples = count * i.out_height * i.out_width;
    of_images = true;
    for (Index n = 0; n < samples; ++n) {
      const Index image = n / (i.out_height * i.out_width), at = n % (i.out_height * i.out_width);
      for (Index c = 0; c < channels; ++c) {
        for (Index ky = 0; ky < i.kernel_height; ++ky) {
          for (Index kx = 0; kx < i.kernel_width; ++kx) {
            const Index row = at / i.out_width * i.stride_y - i.padding_y + ky * i.dilation_y;
            const Index column = at % i.out_width * i.stride_x - i.padding_x + kx * i.dilation_x;
            const bool inside = row >= 0 && row < i.height && column >= 0 && column < i.width;
            const Index from = ((image * channels + c) * i.height + row) * i.row_stride + column * i.column_stride;
            v.push_back(inside ? step * x[from] - zero : 0);
          }
        }
      }
    }
    Solve(rng);
  }

  void Solve(std::mt19937& rng) {
    const Index rows = signs.rows, columns = signs.columns, words = (rows + 63) / 64;
    scale = Random(rows, rng);
    bias = Random(rows, rng);
    bits.resize(samples * words);
    for (Index r = 0; r < rows; ++r) thresholds.push_back(static_cast<std::int32_t>(rng() % 999) - 499);
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < rows; ++r) {
        std::int32_t dot = 0;
        for (Index c = 0; c < columns; ++c) dot += signs.At(r, c) * v[n * columns + c];
        if (n == 0 && r % 3 == 0) thresholds[r] = dot;  // ties
        dots.push_back(dot);
        floats.push_back(std::fmaf(static_cast<float>(dot), scale[r], bias[r]));
        bits[n * words + r / 64] |= std::uint64_t{dot < thresholds[r]} << r % 64;
      }
    }
  }

  BitplaneTablesArgs Tables(const std::uint8_t* from) const {
    return {from, of_images ? &images : nullptr, 0, samples, signs.columns, step, zero, nullptr};
  }
  Index Size(BitplaneOutput output) const {
    return output == BitplaneOutput::kBits ? static_cast<Index>(bits.size()) : samples * signs.rows;
  }
  static void SetOutput(BitplaneMatmulArgs& args, BitplaneOutput output, void* y) {
    if (output == BitplaneOutput::kDots) args.dots = static_cast<std::int32_t*>(y);
    if (output == BitplaneOutput::kFloats) args.floats = static_cast<float*>(y);
    if (output == BitplaneOutput::kBits) args.bits = static_cast<std::uint64_t*>(y);
  }

  Signs signs;
  Index samples;
  std::int32_t step, zero;
  std::vector<std::uint8_t> x;
  BitplaneImages images{};
  bool of_images = false;
  std::vector<std::int32_t> v;
  std::vector<float> scale, bias, floats;
  std::vector<std::int32_t> thresholds, dots;
  std::vector<std::uint64_t> bits;
};

// height, width, kernel, stride, padding, dilation.
inline BitplaneImages ImageSizes(Index height, Index width, Index kernel_h, Index kernel_w, Index stride, Index padding,
                                 Index dilation) {
  BitplaneImages i{};
  i.height = height, i.width = width, i.kernel_height = kernel_h, i.kernel_width = kernel_w;
  i.stride_y = stride, i.stride_x = 1, i.padding_y = padding, i.padding_x = 1;
  i.dilation_y = 1, i.dilation_x = dilation;
  return i;
}

}  // namespace tersetorch::test
