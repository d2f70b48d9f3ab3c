// Every variant against the definition and the scalar one to the bit, on both layouts, groups that no word fills,
// unaligned memory and split ranges.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/parts.h"
#include "kernels/planes/planes.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const WordPlanesFunctions& functions;
};

// The number that byte or half j of a word must hold for x.
std::uint32_t Number(Index group, float x, float inverse, std::int32_t offset) {
  if (group == 2) return ToBFloat16(x);
  return static_cast<std::uint8_t>((inverse == 0 ? 0 : static_cast<int>(std::rint(x * inverse))) + offset);
}

void TestOne(const Variant& variant, Index group, Index channels, Index groups, Index pixels, FloatDtype stored_as,
             bool last, float inverse, std::int32_t offset, std::mt19937& rng) {
  const bool floats = stored_as == FloatDtype::kFloat32;
  auto x = Random(channels * pixels, rng);
  for (float& value : x) value = std::fmin(std::fmax(value, -4.0f), 4.0f);
  // Not representable in bfloat16, ties among them.
  for (std::size_t i = 0; floats && i < x.size(); i += 3) x[i] *= 1 + std::ldexp(static_cast<float>(i % 9), -9);
  if (inverse == 0 && !x.empty()) x[x.size() / 2] = NAN;
  std::vector<std::uint16_t> halves;
  for (const float value : x) halves.push_back(Truncated(value));
  Unaligned<float> floats_in(x);
  Unaligned<std::uint16_t> halves_in(halves);
  const Index of_group = channels / groups, per_group = (of_group + group - 1) / group;
  std::vector<std::uint32_t> want;
  for (Index w = 0; w < groups * per_group; ++w) {
    for (Index i = 0; i < pixels; ++i) {
      std::uint32_t word = 0;
      for (Index j = 0; j < group; ++j) {
        const Index in_group = w % per_group * group + j, c = w / per_group * of_group + in_group;
        const bool there = in_group < of_group;
        word |= Number(group, there ? x[last ? i * channels + c : c * pixels + i] : 0, inverse, offset)
                << (32 / group * j);
      }
      want.push_back(word);
    }
  }
  Unaligned<std::uint32_t> planes(std::vector<std::uint32_t>(want.size(), 0xdeadbeef));
  const WordPlanesArgs args{floats ? static_cast<const void*>(floats_in.data()) : halves_in.data(),
                            stored_as,
                            last,
                            channels,
                            groups,
                            pixels,
                            planes.data(),
                            inverse,
                            offset};
  const auto convert = group == 2 ? variant.functions.pairs : variant.functions.quads;
  InParts(pixels / 3, pixels, [&](Index begin, Index end) { convert(args, begin, end); });
  Expect(planes.Values() == want, "%s: words of %ld, %ld channels in %ld groups, %ld pixels, stored %d, last %d",
         variant.name, long{group}, long{channels}, long{groups}, long{pixels}, static_cast<int>(stored_as), last);
}

}  // namespace

int main() {
  for (const Variant& variant :
       {Variant{"scalar", CpuIsa::kScalar, kWordPlanesScalar}, Variant{"avx2", CpuIsa::kAvx2, kWordPlanesAvx2},
        Variant{"avx512", CpuIsa::kAvx512, kWordPlanesAvx512}}) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    std::mt19937 rng(9);
    for (const Index groups : {1, 3}) {
      for (const Index channels : {1, 2, 3, 4, 5, 16, 31, 32, 33, 71}) {
        for (const Index pixels : {1, 7, 8, 9, 23, 48, 50}) {
          for (const FloatDtype stored_as : kFloats) {
            for (const bool last : {false, true}) {
              TestOne(variant, 2, groups * channels, groups, pixels, stored_as, last, 1, 0, rng);
              TestOne(variant, 4, groups * channels, groups, pixels, stored_as, last, 30, pixels % 2 * 128, rng);
              TestOne(variant, 4, groups * channels, groups, pixels, stored_as, last, 0, 128, rng);
            }
          }
        }
      }
    }
  }
  return Failures() != 0;
}
