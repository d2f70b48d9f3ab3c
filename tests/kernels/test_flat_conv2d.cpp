// Every level against sums in double precision, straight from the formula of flat_conv2d.h: chains of stages, all and
// some of the rows and panels, every memory format and dtype.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/flat_conv2d/flat_conv2d.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const FlatKernels& kernels;
};

struct Sizes {
  Index out_channels, rank, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
};

struct Case {
  Index channels, height, width;
  std::vector<Sizes> stages;
};

// A plane stack [channels, height, width] and the magnitudes that its rounding errors grow with.
struct Planes {
  Index channels, height, width;
  std::vector<double> values, sizes;
  Index terms = 0;
};

std::vector<FlatStage> StagesOf(const Case& c, std::vector<std::vector<float>>& packed, std::mt19937& rng) {
  std::vector<FlatStage> stages;
  Index channels = c.channels, height = c.height, width = c.width;
  for (const Sizes& s : c.stages) {
    FlatStage stage{nullptr,    channels, s.out_channels, s.rank, s.kernel_h, s.kernel_w, s.stride_h,
                    s.stride_w, s.pad_h,  s.pad_w,        height, width,      0,          0};
    stage.out_height = (height + 2 * s.pad_h - s.kernel_h) / s.stride_h + 1;
    stage.out_width = (width + 2 * s.pad_w - s.kernel_w) / s.stride_w + 1;
    packed.push_back(Random(stage.Vectors() * kFlatLanes, rng));
    // Sums of channels of size 1.
    for (Index i = 0; i < s.rank * stage.Panels() * channels * kFlatLanes; ++i) {
      packed.back()[i] /= static_cast<float>(std::sqrt(static_cast<double>(channels)));
    }
    stages.push_back(stage);
    channels = s.out_channels, height = stage.out_height, width = stage.out_width;
  }
  return stages;
}

Planes Expected(const FlatStage& s, const std::vector<float>& packed, const Planes& x) {
  const Index lanes = s.rank * s.Panels() * kFlatLanes;
  const auto at = [&](Index array, Index n, Index r, Index f, Index k) {
    return static_cast<double>(
        packed[array + ((r * s.Panels() + f / kFlatLanes) * n + k) * kFlatLanes + f % kFlatLanes]);
  };
  const Index lateral = 0, lateral_bias = lanes * s.in_channels, vertical = lateral_bias + lanes,
              vertical_bias = vertical + lanes * s.kernel_h, horizontal = vertical_bias + lanes,
              bias = horizontal + lanes * s.kernel_w;
  Planes y{s.out_channels, s.out_height, s.out_width, {}, {}, x.terms + s.in_channels + s.kernel_h + s.kernel_w + 3};
  for (Index f = 0; f < s.out_channels; ++f) {
    std::vector<double> sums(s.out_height * s.out_width, at(bias, 1, 0, f, 0)), sizes;
    for (const double v : sums) sizes.push_back(std::fabs(v));
    for (Index r = 0; r < s.rank; ++r) {
      std::vector<double> l(s.height * s.width, at(lateral_bias, 1, r, f, 0)), of_l(l);
      for (double& v : of_l) v = std::fabs(v);
      for (Index c = 0; c < s.in_channels; ++c) {
        for (Index i = 0; i < s.height * s.width; ++i) {
          l[i] += at(lateral, s.in_channels, r, f, c) * x.values[c * s.height * s.width + i];
          of_l[i] += std::fabs(at(lateral, s.in_channels, r, f, c)) * x.sizes[c * s.height * s.width + i];
        }
      }
      std::vector<double> v(s.out_height * s.width, at(vertical_bias, 1, r, f, 0)), of_v(v);
      for (double& n : of_v) n = std::fabs(n);
      for (Index i = 0; i < s.out_height * s.width; ++i) {
        for (Index k = 0; k < s.kernel_h; ++k) {
          const Index h = i / s.width * s.stride_h - s.pad_h + k;
          if (h < 0 || h >= s.height) continue;
          v[i] += at(vertical, s.kernel_h, r, f, k) * l[h * s.width + i % s.width];
          of_v[i] += std::fabs(at(vertical, s.kernel_h, r, f, k)) * of_l[h * s.width + i % s.width];
        }
      }
      for (Index i = 0; i < s.out_height * s.out_width; ++i) {
        for (Index k = 0; k < s.kernel_w; ++k) {
          const Index w = i % s.out_width * s.stride_w - s.pad_w + k;
          if (w < 0 || w >= s.width) continue;
          sums[i] += at(horizontal, s.kernel_w, r, f, k) * v[i / s.out_width * s.width + w];
          sizes[i] += std::fabs(at(horizontal, s.kernel_w, r, f, k)) * of_v[i / s.out_width * s.width + w];
        }
      }
    }
    y.values.insert(y.values.end(), sums.begin(), sums.end());
    y.sizes.insert(y.sizes.end(), sizes.begin(), sizes.end());
  }
  return y;
}

// Index of channel c of pixel i.
Index Place(bool channels_last, Index channels, Index pixels, Index c, Index i) {
  return channels_last ? i * channels + c : c * pixels + i;
}

void TestOne(const Variant& variant, const Case& c, bool channels_last, FloatDtype stored_as, bool relu, Index bands,
             Index cut, std::mt19937& rng) {
  std::vector<std::vector<float>> packed;
  std::vector<FlatStage> stages = StagesOf(c, packed, rng);
  const auto x = Random(c.channels * c.height * c.width, rng);
  Planes expected{c.channels, c.height, c.width, {x.begin(), x.end()}, {}};
  for (const float v : x) expected.sizes.push_back(std::fabs(v));
  for (std::size_t s = 0; s < stages.size(); ++s) expected = Expected(stages[s], packed[s], expected);

  const FlatStage& last = stages.back();
  const Index in_pixels = c.height * c.width, out_pixels = last.out_height * last.out_width;
  std::vector<float> laid(x.size());
  std::vector<std::uint16_t> narrow(x.size());
  for (Index channel = 0; channel < c.channels; ++channel) {
    for (Index i = 0; i < in_pixels; ++i) {
      const Index at = Place(channels_last, c.channels, in_pixels, channel, i);
      laid[at] = x[channel * in_pixels + i];
      narrow[at] = Truncated(laid[at]);
    }
  }
  Unaligned<float> floats(laid);
  Unaligned<std::uint16_t> halves(narrow);
  std::vector<Unaligned<float>> weights;
  for (const auto& p : packed) weights.emplace_back(p);
  Output y(last.out_channels * out_pixels, stored_as);

  FlatConvArgs args{};
  args.count = static_cast<Index>(stages.size());
  for (Index s = 0; s < args.count; ++s) {
    args.stages[s] = stages[s];
    args.stages[s].packed = weights[s].data();
  }
  const bool wide = stored_as == FloatDtype::kFloat32;
  args.x = {wide ? static_cast<const void*>(floats.data()) : halves.data(), stored_as, channels_last,
            channels_last ? c.channels : in_pixels};
  args.y = {y.data(), stored_as, channels_last, channels_last ? last.out_channels : out_pixels};
  args.relu = relu;
  const Index parts = args.count == 1 ? std::min(cut, last.Panels()) : 1;
  InParts(bands * parts / 2, bands * parts, [&](Index begin, Index end) {
    std::vector<char> scratch(FlatScratchBytes(args) + 64, 'x');
    char* aligned = scratch.data() + (64 - reinterpret_cast<std::uintptr_t>(scratch.data()) % 64) % 64;
    for (Index task = end; task-- > begin;) {
      const Index band = task / parts, part = task % parts;
      FlatConv2d(variant.kernels, args, last.out_height * band / bands, last.out_height * (band + 1) / bands,
                 last.Panels() * part / parts, last.Panels() * (part + 1) / parts, aligned);
    }
  });

  const std::vector<float> got = y.Values();
  for (Index f = 0; f < last.out_channels; ++f) {
    for (Index i = 0; i < out_pixels; ++i) {
      const float value = got[Place(channels_last, last.out_channels, out_pixels, f, i)];
      double want = expected.values[f * out_pixels + i];
      const double half = wide ? 0 : std::ldexp(std::fabs(want), -8);
      if (relu) want = std::max(want, 0.0);
      const double bound = std::ldexp((expected.terms + 1) * expected.sizes[f * out_pixels + i], -24) + half;
      Expect(std::fabs(value - want) <= bound,
             "%s: %ld x %ld x %ld, %ld stages, last %ld maps, last %d, float32 %d, bands %ld, map %ld, pixel %ld: %g "
             "not %g",
             variant.name, long{c.channels}, long{c.height}, long{c.width}, long{args.count}, long{last.out_channels},
             channels_last, wide, long{bands}, long{f}, long{i}, value, want);
      if (Failures() > 20) return;
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kFlatScalar},
                              {"avx2", CpuIsa::kAvx2, kFlatAvx2},
                              {"avx512", CpuIsa::kAvx512, kFlatAvx512}};
  const Case cases[] = {
      {1, 1, 1, {{1, 1, 1, 1, 1, 1, 0, 0}}},
      {3, 7, 9, {{5, 1, 3, 3, 1, 1, 1, 1}}},
      {16, 14, 14, {{16, 1, 5, 5, 1, 1, 2, 2}}},
      {17, 5, 31, {{33, 1, 3, 5, 1, 1, 2, 4}}},  // the paper's full mode
      {8, 9, 8, {{80, 1, 7, 9, 2, 3, 3, 4}}},
      {20, 6, 17, {{100, 1, 2, 4, 1, 1, 0, 1}}},
      {5, 4, 300, {{32, 1, 1, 3, 1, 1, 0, 1}}},
      {4, 40, 3, {{96, 1, 11, 1, 3, 1, 5, 0}}},
      {6, 8, 8, {{24, 3, 3, 3, 1, 1, 1, 1}}},
      {7, 5, 6, {{48, 2, 3, 3, 2, 2, 1, 1}}},
      {9, 13, 100, {{16, 1, 3, 3, 1, 2, 6, 6}}},  // more padding than taps
      {3, 2, 2, {{16, 1, 2, 2, 5, 5, 0, 0}}},
      {12, 14, 14, {{64, 1, 5, 5, 1, 1, 2, 2}, {64, 1, 5, 5, 1, 1, 2, 2}}},
      {3, 11, 23, {{13, 2, 3, 3, 2, 2, 1, 1}, {21, 1, 3, 3, 1, 1, 2, 2}, {9, 1, 2, 1, 1, 1, 0, 0}}},
      {2, 30, 40, {{16, 1, 5, 5, 1, 1, 4, 4}, {32, 1, 3, 3, 3, 1, 0, 0}}},
  };
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Case& c : cases) {
      for (const bool channels_last : {false, true}) {
        for (const auto stored_as : kFloats) {
          TestOne(variant, c, channels_last, stored_as, false, 1, 1, rng);
          TestOne(variant, c, channels_last, stored_as, true, 3, 2, rng);
        }
      }
    }
  }
  return Failures() != 0;
}
