// A random convolution of signs and its results by definition, for the tests of both devices.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"
#include "kernels/xnor_problem.h"

namespace tersetorch::test {

struct XnorConvCase {
  Index images, channels, height, width;  // channels and filters of all groups
  Index filters, kernel_h, kernel_w;
  Index stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1, groups = 1;
  int outside = 0;
};

inline std::vector<XnorConvCase> XnorConvCases() {
  std::vector<XnorConvCase> cases;
  // Around the words of channels and the filters of a tile; borders of each kind.
  for (const Index channels : {0, 1, 64, 65, 130}) {
    for (const Index filters : {1, 31, 33, 64, 70}) {
      cases.push_back({1, channels, 5, 4, filters, 3, 3, 1, 1, 1, 1, 1, 1, 1, static_cast<int>(filters % 3) - 1});
    }
  }
  for (const int outside : {0, 1, -1}) {
    cases.push_back({2, 70, 6, 7, 40, 3, 2, 2, 1, 1, 2, 1, 2, 1, outside});
    cases.push_back({1, 64, 9, 8, 33, 5, 3, 1, 3, 4, 1, 2, 1, 1, outside});
    cases.push_back({1, 20, 3, 3, 5, 1, 1, 1, 1, 2, 3, 1, 1, 1, outside});  // outputs that see no input at all
    cases.push_back({1, 20, 2, 3, 5, 2, 2, 1, 1, 5, 4, 3, 2, 1, outside});
    // Groups: of whole words and tiles, of neither, and depthwise.
    cases.push_back({1, 128, 4, 5, 64, 3, 3, 1, 1, 1, 1, 1, 1, 2, outside});
    cases.push_back({2, 192, 4, 3, 60, 3, 3, 1, 1, 1, 1, 1, 1, 3, outside});
    cases.push_back({1, 210, 4, 3, 111, 2, 3, 1, 2, 1, 1, 1, 1, 3, outside});
    cases.push_back({1, 37, 5, 6, 37, 3, 3, 1, 1, 1, 1, 1, 1, 37, outside});
    cases.push_back({1, 66, 4, 4, 132, 3, 3, 2, 2, 1, 1, 1, 1, 66, outside});
  }
  cases.push_back({0, 64, 5, 5, 32, 3, 3});
  cases.push_back({2, 64, 1, 1, 96, 1, 1});
  cases.push_back({1, 64, 3, 50, 0, 3, 3});
  // More than a byte of bits holds at the AVX2 level, and rows of all remainders of pixels.
  cases.push_back({1, 320, 8, 9, 36, 5, 5, 1, 1, 2, 2});
  // More pixels and tiles than that level counts together, and more words than its 16 bits hold.
  cases.push_back({1, 64, 24, 13, 170, 1, 1});
  cases.push_back({1, 1, 33, 34, 5, 33, 32});
  return cases;
}

// Rows of packed signs [rows, ceil(columns / 64)].
inline std::vector<std::uint64_t> RandomSigns(Index rows, Index columns, std::mt19937& rng) {
  const Index words = (columns + 63) / 64;
  const std::uint64_t last = columns % 64 == 0 ? ~std::uint64_t{0} : (std::uint64_t{1} << columns % 64) - 1;
  std::vector<std::uint64_t> bits(rows * words);
  for (Index i = 0; i < static_cast<Index>(bits.size()); ++i) {
    bits[i] = (std::uint64_t{rng()} << 32 | rng()) & (i % words == words - 1 ? last : ~std::uint64_t{0});
  }
  return bits;
}

struct XnorConvProblem {
  XnorConvProblem(const XnorConvCase& c, std::mt19937& rng)
      : scale(Random(c.filters, rng)), bias(Random(c.filters, rng)) {
    const Index channels = c.channels / c.groups, words = (channels + 63) / 64, taps = c.kernel_h * c.kernel_w;
    const bool apart = c.groups > 1 && channels % 64 != 0;
    args.images = c.images, args.height = c.height, args.width = c.width;
    args.channels = channels, args.words = words, args.filters = c.filters / c.groups, args.groups = c.groups;
    args.pixel_words = apart ? c.groups * words : (c.channels + 63) / 64;
    args.kernel_h = c.kernel_h, args.kernel_w = c.kernel_w, args.stride_h = c.stride_h, args.stride_w = c.stride_w;
    args.pad_h = c.pad_h, args.pad_w = c.pad_w, args.dilation_h = c.dilation_h, args.dilation_w = c.dilation_w;
    args.out_height = (c.height + 2 * c.pad_h - c.dilation_h * (c.kernel_h - 1) - 1) / c.stride_h + 1;
    args.out_width = (c.width + 2 * c.pad_w - c.dilation_w * (c.kernel_w - 1) - 1) / c.stride_w + 1;
    args.outside = c.outside;
    char text[200];
    std::snprintf(text, sizeof text,
                  "%ld x %ld x %ld x %ld, %ld filters %ld x %ld, %ld groups, pad %ld %ld, outside %d", long{c.images},
                  long{c.channels}, long{c.height}, long{c.width}, long{c.filters}, long{c.kernel_h}, long{c.kernel_w},
                  long{c.groups}, long{c.pad_h}, long{c.pad_w}, c.outside);
    name = text;

    const Index pixels = c.images * c.height * c.width;
    x = RandomSigns(pixels, c.channels, rng);
    split = x;
    if (apart) {
      split.resize(pixels * args.pixel_words);
      XnorSplitGroups(x.data(), c.groups, channels, split.data(), 0, pixels / 2);
      XnorSplitGroups(x.data(), c.groups, channels, split.data(), pixels / 2, pixels);
    }
    const std::vector<std::uint64_t> weight = RandomSigns(c.filters * taps, channels, rng);
    const Index tiles_of_group = XnorConvTiles(args.filters, 1);
    packed.resize(XnorConvTiles(args.filters, c.groups) * taps * 2 * words * kXnorFilters);
    for (Index o = 0; o < c.filters; ++o) {
      const Index in_group = o % args.filters, tile = o / args.filters * tiles_of_group + in_group / kXnorFilters;
      for (Index k = 0; k < taps * words; ++k) {
        for (Index half = 0; half < 2; ++half) {
          packed[((tile * taps * words + k) * 2 + half) * kXnorFilters + in_group % kXnorFilters] =
              static_cast<std::int32_t>(weight[o * taps * words + k] >> 32 * half);
        }
      }
    }
    const Index most = taps * channels;
    for (Index o = 0; o < c.filters; ++o) {
      thresholds.push_back(static_cast<std::int32_t>(static_cast<Index>(rng() % (2 * most + 3)) - most - 1));
    }
    if (c.filters > 2) thresholds[1] = INT32_MIN, thresholds[2] = INT32_MAX;

    const auto bit = [](const std::vector<std::uint64_t>& bits, Index row, Index columns, Index at) {
      return (bits[row * ((columns + 63) / 64) + at / 64] >> at % 64 & 1) != 0;
    };
    const Index y_words = (c.filters + 63) / 64;
    bits.resize(c.images * args.out_height * args.out_width * y_words);
    for (Index pixel = 0; pixel < c.images * args.out_height * args.out_width; ++pixel) {
      const Index n = pixel / (args.out_height * args.out_width);
      const Index i = pixel / args.out_width % args.out_height, j = pixel % args.out_width;
      for (Index o = 0; o < c.filters; ++o) {
        std::int32_t dot = 0;
        for (Index tap = 0; tap < taps; ++tap) {
          const Index row = i * c.stride_h + tap / c.kernel_w * c.dilation_h - c.pad_h;
          const Index column = j * c.stride_w + tap % c.kernel_w * c.dilation_w - c.pad_w;
          const bool inside = row >= 0 && row < c.height && column >= 0 && column < c.width;
          if (!inside && c.outside == 0) continue;
          for (Index k = 0; k < channels; ++k) {
            const bool negative =
                inside ? bit(x, (n * c.height + row) * c.width + column, c.channels, o / args.filters * channels + k)
                       : c.outside < 0;
            dot += negative == bit(weight, o * taps + tap, channels, k) ? 1 : -1;
          }
        }
        if (pixel % 3 == 1 && thresholds[o] == dot + 1) thresholds[o] = dot;  // more ties
        dots.push_back(dot);
        floats.push_back(std::fmaf(static_cast<float>(dot), scale[o], bias[o]));
      }
    }
    for (Index i = 0; i < static_cast<Index>(dots.size()); ++i) {
      const Index pixel = i / c.filters, o = i % c.filters;
      if (dots[i] < thresholds[o]) bits[pixel * y_words + o / 64] |= std::uint64_t{1} << o % 64;
    }
  }

  Index OutputSize(XnorOutput output) const {
    return static_cast<Index>(output == XnorOutput::kBits ? bits.size() : dots.size());
  }
  static void SetOutput(XnorConv2dArgs& args, XnorOutput output, const float* scale, const float* bias,
                        const std::int32_t* thresholds, void* y) {
    if (output == XnorOutput::kDots) args.dots = static_cast<std::int32_t*>(y);
    if (output == XnorOutput::kFloats) {
      args.floats = static_cast<float*>(y);
      args.scale = scale;
      args.bias = bias;
    }
    if (output == XnorOutput::kBits) {
      args.bits = static_cast<std::uint64_t*>(y);
      args.thresholds = thresholds;
    }
  }
  static void SetSpans(XnorConv2dArgs& a, std::vector<XnorSpan>& rows, std::vector<XnorSpan>& columns) {
    a.row_span_count = XnorSpans(a.out_height, a.height, a.kernel_h, a.stride_h, a.pad_h, a.dilation_h, rows.data());
    a.column_span_count =
        XnorSpans(a.out_width, a.width, a.kernel_w, a.stride_w, a.pad_w, a.dilation_w, columns.data());
    a.row_spans = rows.data();
    a.column_spans = columns.data();
  }

  XnorConv2dArgs args{};
  std::string name;
  std::vector<std::uint64_t> x, split;
  std::vector<std::int32_t> packed;
  std::vector<float> scale, bias;
  std::vector<std::int32_t> thresholds;
  std::vector<std::int32_t> dots;
  std::vector<float> floats;
  std::vector<std::uint64_t> bits;
};

}  // namespace tersetorch::test
