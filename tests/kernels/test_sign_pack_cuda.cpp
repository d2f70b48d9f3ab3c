// The CUDA kernels of sign_pack against the definition, to the bit, of rows and of planes.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/sign_pack/sign_pack_cuda.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

void TestSigns(Index samples, Index columns, FloatDtype stored_as, std::mt19937& rng) {
  auto numbers = Random(samples * columns, rng);
  for (std::size_t i = 0; i < numbers.size(); i += 4) numbers[i] = i % 8 == 0 ? -0.0f : NAN;
  DeviceFloats x("x", stored_as, numbers);
  const Index words = SignWords(columns);
  DeviceArray<std::uint64_t> bits("bits", static_cast<std::size_t>(samples * words));
  ExpectLaunched(SignPackCuda({x.data(), stored_as, columns, bits.data()}, samples, nullptr), "SignPackCuda");
  const auto got = bits.Values();
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index c = 0; c < words * kSignBits; ++c) {
      const bool want = c < columns && !(numbers[n * columns + c] >= 0);
      right = right && (got[n * words + c / 64] >> c % 64 & 1) == want;
    }
  }
  Expect(right, "signs of %ld samples of %ld, floats %d", long{samples}, long{columns}, static_cast<int>(stored_as));
}

void TestPlanes(Index images, Index groups, Index channels, Index pixels, FloatDtype stored_as, std::mt19937& rng) {
  auto numbers = Random(images * groups * channels * pixels, rng);
  for (std::size_t i = 0; i < numbers.size(); i += 4) numbers[i] = i % 8 == 0 ? -0.0f : NAN;
  DeviceFloats x("x", stored_as, numbers);
  const Index words = SignWords(channels);
  DeviceArray<std::uint64_t> bits("bits", static_cast<std::size_t>(images * pixels * groups * words));
  ExpectLaunched(SignPackPlanesCuda({x.data(), stored_as, groups, channels, pixels, bits.data()}, images, nullptr),
                 "SignPackPlanesCuda");
  const auto got = bits.Values();
  bool right = true;
  for (Index p = 0; p < images * pixels; ++p) {
    for (Index c = 0; c < groups * words * kSignBits; ++c) {
      const Index group = c / (words * kSignBits), channel = c % (words * kSignBits);
      const Index plane = (p / pixels * groups + group) * channels + channel;
      const bool want = channel < channels && !(numbers[plane * pixels + p % pixels] >= 0);
      right = right && (got[p * groups * words + c / 64] >> c % 64 & 1) == want;
    }
  }
  Expect(right, "%ld images of %ld groups of %ld planes of %ld", long{images}, long{groups}, long{channels},
         long{pixels});
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const FloatDtype stored_as : kFloats) {
      for (const Index columns : {0, 1, 31, 33, 64, 65, 200}) TestSigns(3, columns, stored_as, rng);
      TestSigns(0, 65, stored_as, rng);
      TestPlanes(2, 1, 70, 9, stored_as, rng);
      TestPlanes(1, 3, 33, 40, stored_as, rng);
      TestPlanes(0, 1, 33, 40, stored_as, rng);
      TestPlanes(2, 2, 130, 70, stored_as, rng);  // more words than a block has threads
    }
  });
}
