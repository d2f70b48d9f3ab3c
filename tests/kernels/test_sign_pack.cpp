// Every variant against the definition, bit by bit, on lengths around its vectors and on unaligned memory.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/sign_pack/sign_pack.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  SignPackVariant pack;
};

void TestOne(const Variant& variant, Index samples, Index columns, FloatDtype stored_as, std::mt19937& rng) {
  auto numbers = Random(samples * columns, rng);
  const float special[] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1e-40f, -1e-40f};
  for (Index i = 0; i < static_cast<Index>(numbers.size()); i += 5) numbers[i] = Widened(Truncated(special[i % 7]));
  std::vector<std::uint16_t> halves;
  for (const float number : numbers) halves.push_back(Truncated(number));
  Unaligned<float> floats(numbers);
  Unaligned<std::uint16_t> stored_halves(halves);
  const void* x = stored_as == FloatDtype::kFloat32 ? static_cast<void*>(floats.data()) : stored_halves.data();
  const Index words = SignWords(columns), all = samples * words;
  Unaligned<std::uint64_t> bits(std::vector<std::uint64_t>(all, 0x5555555555555555));
  const SignPackArgs args{x, stored_as, columns, bits.data()};
  variant.pack(args, all / 3, all);
  variant.pack(args, 0, all / 3);
  const auto got = bits.Values();
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index c = 0; c < words * kSignBits; ++c) {
      const bool want = c < columns && numbers[n * columns + c] >= 0;
      right = right && (got[n * words + c / 64] >> c % 64 & 1) == want;
    }
  }
  Expect(right, "%s: %ld samples of %ld, floats %d", variant.name, long{samples}, long{columns},
         static_cast<int>(stored_as));
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kSignPackScalar},
                              {"avx2", CpuIsa::kAvx2, kSignPackAvx2},
                              {"avx512", CpuIsa::kAvx512, kSignPackAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Index columns : {0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 131, 1000}) {
      for (const FloatDtype stored_as : kFloats) {
        for (const Index samples : {0, 1, 3}) TestOne(variant, samples, columns, stored_as, rng);
      }
    }
  }
  return Failures() != 0;
}
