// Every variant against the definition, on widths, odd feature counts, unaligned memory and split ranges.
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/panels/panels.h"

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
          pack(args, features / 3, features);
          pack(args, 0, features / 3);
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

}  // namespace

int main() {
  TestVariant("scalar", kPackPanelScalar);
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx2) TestVariant("avx2", kPackPanelAvx2);
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx512) TestVariant("avx512", kPackPanelAvx512);
  return Failures() != 0;
}
