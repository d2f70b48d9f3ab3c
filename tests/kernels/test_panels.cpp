// Every variant against the definition, on widths, odd feature counts, unaligned memory and split ranges.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/panels/panels.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

void TestVariant(const char* name, PackPanelFunction pack) {
  std::mt19937 rng(7);
  for (const Index features : {0, 1, 7, 8, 9, 63, 64, 65, 131}) {
    for (const Index width : {1, 8, 16, 32, 64}) {
      for (const Index samples : {Index{1}, width / 2 + 1, width}) {
        for (const FloatDtype stored_as : kFloats) {
          const auto x = Random(samples * features, rng);
          std::vector<std::uint16_t> halves;
          for (const float value : x) halves.push_back(Truncated(value));
          Unaligned<float> floats_in(x);
          Unaligned<std::uint16_t> halves_in(halves);
          const bool floats = stored_as == FloatDtype::kFloat32;
          Unaligned<float> panel(std::vector<float>(features * width, NAN));
          const PanelPackArgs args{floats ? static_cast<const void*>(floats_in.data()) : halves_in.data(),
                                   stored_as,
                                   samples,
                                   features,
                                   panel.data(),
                                   width};
          InParts(features / 3, features, [&](Index begin, Index end) { pack(args, begin, end); });
          const auto packed = panel.Values();
          bool right = true;
          for (Index c = 0; c < features; ++c) {
            for (Index n = 0; n < width; ++n) {
              right &= packed[c * width + n] == (n < samples ? x[n * features + c] : 0.0f);
            }
          }
          Expect(right, "%s: %ld features, %ld of %ld samples", name, long{features}, long{samples}, long{width});
        }
      }
    }
  }
}

struct WordVariant {
  const char* name;
  CpuIsa needs;
  const WordPanelFunctions& functions;
};

// Pairs and quads are the scalar ones to the bit; those are within half a step of x.
void TestWords(const WordVariant& variant) {
  std::mt19937 rng(8);
  for (const Index features : {0, 1, 3, 4, 31, 32, 33, 127, 128, 263, 517}) {
    for (const Index width : {8, 16, 32, 64}) {
      for (const Index samples : {Index{1}, width / 2 + 1, width}) {
        for (const FloatDtype stored_as : kFloats) {
          const bool floats = stored_as == FloatDtype::kFloat32;
          auto x = Random(samples * features, rng);
          for (Index c = 0; c < features; ++c) {
            if (samples > 3) x[3 * features + c] = 0;
            if (samples > 4) x[4 * features + c] *= std::ldexp(1.0f, -120);
          }
          if (samples > 5 && features != 0) x[5 * features + features / 2] = NAN;
          if (samples > 6 && features != 0) x[7 * features - 1] = -INFINITY;
          // Not representable in bfloat16, ties among them.
          for (Index i = 0; floats && i < samples * features; i += 3)
            x[i] *= 1 + std::ldexp(static_cast<float>(i % 3), -8);
          std::vector<std::uint16_t> halves;
          for (const float value : x) halves.push_back(Truncated(value));
          Unaligned<float> floats_in(x);
          Unaligned<std::uint16_t> halves_in(halves);
          const void* in = floats ? static_cast<const void*>(floats_in.data()) : halves_in.data();

          Unaligned<float> scales(std::vector<float>(samples, NAN)), inverses(std::vector<float>(samples, NAN));
          std::vector<float> want_scales(samples), want_inverses(samples);
          variant.functions.scales({in, stored_as, features, scales.data(), inverses.data()}, samples / 2, samples);
          variant.functions.scales({in, stored_as, features, scales.data(), inverses.data()}, 0, samples / 2);
          kWordPanelsScalar.scales({in, stored_as, features, want_scales.data(), want_inverses.data()}, 0, samples);
          bool right = true;
          for (Index n = 0; n < samples; ++n) {
            const float scale = scales.Values()[n], want = want_scales[n];
            right &=
                (scale == want || (std::isnan(scale) && std::isnan(want))) && inverses.Values()[n] == want_inverses[n];
            right &= features == 0 || (n == 5 || n == 6) == std::isnan(scale);
          }
          Expect(right, "%s: scales, %ld features, %ld samples", variant.name, long{features}, long{samples});

          for (const int offset : {0, 128}) {
            for (const Index group : {2, 4}) {
              const Index words = (features + group - 1) / group;
              Unaligned<std::uint32_t> panel(std::vector<std::uint32_t>(words * width, 0xdeadbeef));
              std::vector<std::uint32_t> want(words * width, 0xdeadbeef);
              WordPanelArgs args{in, stored_as, samples, features, panel.data(), width, inverses.data(), offset};
              const auto pack = group == 2 ? variant.functions.pairs : variant.functions.quads;
              InParts(words / 3, words, [&](Index begin, Index end) { pack(args, begin, end); });
              args.panel = want.data();
              (group == 2 ? kWordPanelsScalar.pairs : kWordPanelsScalar.quads)(args, 0, words);
              bool same = panel.Values() == want;
              for (Index i = 0; group == 4 && i < 4 * words * width; ++i) {
                const Index n = i / 4 % width, c = i / 4 / width * 4 + i % 4;
                const int byte = static_cast<int>(want[i / 4] >> i % 4 * 8 & 0xff);
                const int q = offset == 0 ? static_cast<std::int8_t>(byte) : byte - offset;
                if (n >= samples || c >= features || want_inverses[n] == 0) {
                  same &= q == 0;
                } else {
                  const float exact = x[n * features + c];
                  same &= std::fabs(q * want_scales[n] - (floats ? exact : Widened(Truncated(exact)))) <=
                          want_scales[n] * 0.5001f;
                }
              }
              Expect(same, "%s: words of %ld, %ld features, %ld of %ld samples, offset %d", variant.name, long{group},
                     long{features}, long{samples}, long{width}, offset);
            }
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  for (const WordVariant& variant :
       {WordVariant{"scalar", CpuIsa::kScalar, kWordPanelsScalar}, WordVariant{"avx2", CpuIsa::kAvx2, kWordPanelsAvx2},
        WordVariant{"avx512", CpuIsa::kAvx512, kWordPanelsAvx512}}) {
    if (ProcessCpuIsa().detected >= variant.needs) TestWords(variant);
  }
  TestVariant("scalar", kPackPanelScalar);
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx2) TestVariant("avx2", kPackPanelAvx2);
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx512) TestVariant("avx512", kPackPanelAvx512);
  return Failures() != 0;
}
