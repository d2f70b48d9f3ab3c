// Every variant against the definition, bit by bit, on lengths around its vectors and on unaligned memory.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/sign_pack/sign_pack.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  SignPackVariant pack;
  SignPackPlanesVariant pack_planes;
};

std::vector<float> Numbers(Index count, std::mt19937& rng) {
  auto numbers = Random(count, rng);
  const float special[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1e-40f, -1e-40f};
  for (Index i = 0; i < count; i += 5) numbers[i] = Widened(Truncated(special[i % 7]));
  return numbers;
}

void TestOne(const Variant& variant, Index samples, Index columns, FloatDtype stored_as, std::mt19937& rng) {
  const auto numbers = Numbers(samples * columns, rng);
  std::vector<std::uint16_t> halves;
  for (const float number : numbers) halves.push_back(Truncated(number));
  Unaligned<float> floats(numbers);
  Unaligned<std::uint16_t> stored_halves(halves);
  const void* x = stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : stored_halves.data();
  const Index words = SignWords(columns), all = samples * words;
  Unaligned<std::uint64_t> bits(std::vector<std::uint64_t>(all, 0x5555555555555555));
  const SignPackArgs args{x, stored_as, columns, bits.data()};
  InParts(all / 3, all, [&](Index begin, Index end) { variant.pack(args, begin, end); });
  const auto got = bits.Values();
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index c = 0; c < words * kSignBits; ++c) {
      const bool want = c < columns && !(numbers[n * columns + c] >= 0);
      right = right && (got[n * words + c / 64] >> c % 64 & 1) == want;
    }
  }
  Expect(right, "%s: %ld samples of %ld, floats %d", variant.name, long{samples}, long{columns},
         static_cast<int>(stored_as));
}

void TestPlanes(const Variant& variant, Index groups, Index channels, Index pixels, FloatDtype stored_as,
                std::mt19937& rng) {
  const auto numbers = Numbers(groups * channels * pixels, rng);
  std::vector<std::uint16_t> halves;
  for (const float number : numbers) halves.push_back(Truncated(number));
  Unaligned<float> floats(numbers);
  Unaligned<std::uint16_t> stored_halves(halves);
  const void* x = stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : stored_halves.data();
  const Index words = SignWords(channels);
  Unaligned<std::uint64_t> bits(std::vector<std::uint64_t>(pixels * groups * words, 0x5555555555555555));
  const SignPackPlanesArgs args{x, stored_as, groups, channels, pixels, bits.data()};
  InParts(pixels / 3, pixels, [&](Index begin, Index end) { variant.pack_planes(args, begin, end); });
  const auto got = bits.Values();
  bool right = true;
  for (Index p = 0; p < pixels; ++p) {
    for (Index c = 0; c < groups * words * kSignBits; ++c) {
      const Index group = c / (words * kSignBits), channel = c % (words * kSignBits);
      const bool want = channel < channels && !(numbers[(group * channels + channel) * pixels + p] >= 0);
      right = right && (got[p * groups * words + c / 64] >> c % 64 & 1) == want;
    }
  }
  Expect(right, "%s: %ld groups of %ld planes of %ld, floats %d", variant.name, long{groups}, long{channels},
         long{pixels}, static_cast<int>(stored_as));
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kSignPackScalar, kSignPackPlanesScalar},
                              {"avx2", CpuIsa::kAvx2, kSignPackAvx2, kSignPackPlanesAvx2},
                              {"avx512", CpuIsa::kAvx512, kSignPackAvx512, kSignPackPlanesAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Index columns : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 131, 1000}) {
      for (const FloatDtype stored_as : kFloats) {
        for (const Index samples : {0, 1, 3}) TestOne(variant, samples, columns, stored_as, rng);
      }
    }
    for (const FloatDtype stored_as : kFloats) {
      for (const Index channels : {0, 1, 31, 32, 33, 64, 65, 131}) {
        for (const Index pixels : {0, 1, 7, 8, 9, 17, 63, 64, 65, 200}) {
          for (const Index groups : {1, 3}) TestPlanes(variant, groups, channels, pixels, stored_as, rng);
        }
      }
    }
  }
  return Failures() != 0;
}
