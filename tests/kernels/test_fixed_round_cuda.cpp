// The CUDA kernel of fixed_round against the reference, bit by bit.
#include "kernels/common/philox.h"
#include "kernels/device.h"
#include "kernels/fixed_round/fixed_round_cuda.h"
#include "kernels/fixed_round_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

void Check(const std::vector<float>& numbers, FixedFormat format, FloatDtype stored_as, FixedAs as, bool stochastic,
           std::uint64_t offset) {
  const auto size = static_cast<Index>(numbers.size());
  const auto halves = HalvesOf(numbers);
  DeviceArray<float> floats("x", numbers);
  DeviceArray<std::uint16_t> stored_halves("x", halves);
  const Index bytes = size * BytesOf(as, stored_as);
  std::vector<unsigned char> want(bytes);
  DeviceArray<unsigned char> y("y", bytes);
  const bool wide = stored_as == FloatDtype::kFloat32;
  FixedRoundArgs args{wide ? static_cast<const void*>(numbers.data()) : halves.data(),
                      stored_as,
                      format.integer_bits,
                      format.fraction_bits,
                      stochastic,
                      0x123456789abcdef0,
                      offset,
                      want.data(),
                      as};
  kFixedRoundScalar(args, 0, size);
  args.x = wide ? static_cast<void*>(floats.data()) : stored_halves.data();
  args.y = y.data();
  ExpectLaunched(FixedRoundCuda(args, size, nullptr), "FixedRoundCuda");
  Expect(y.Values() == want, "%ld values to <%d,%d>, floats %d, as %d, stochastic %d, offset %ld", long{size},
         format.integer_bits, format.fraction_bits, static_cast<int>(stored_as), static_cast<int>(as), stochastic,
         static_cast<long>(offset));
}

void TestOne(Index size, FixedFormat format, FloatDtype stored_as, FixedAs as, bool stochastic, std::uint64_t offset,
             std::mt19937& rng) {
  Check(FixedNumbers(size, format, stored_as, rng), format, stored_as, as, stochastic, offset);
}

// Numbers whose random bits are just enough to round them up, or one too few.
void TestThresholds(std::mt19937& rng) {
  constexpr std::uint64_t kSeed = 0x123456789abcdef0, kOffset = 38;
  std::vector<float> numbers(400);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const auto random = static_cast<float>(RandomBits(kSeed, kOffset + i) + rng() % 2);
    numbers[i] = static_cast<float>(static_cast<int>(rng() % 9) - 4) - std::ldexp(random, -16);
  }
  Check(numbers, {6, 0}, FloatDtype::kFloat32, FixedAs::kFloats, true, kOffset);
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    TestThresholds(rng);
    for (const FixedFormat format : kFixedFormats) {
      for (const FloatDtype stored_as : kFloats) {
        for (const FixedAs as : {FixedAs::kFloats, FixedAs::kInt8, FixedAs::kInt16, FixedAs::kInt32}) {
          if (!Holds(as, format)) continue;
          for (const Index size : {0, 1, 130}) {
            TestOne(size, format, stored_as, as, true, 37, rng);
          }
          TestOne(65, format, stored_as, as, false, 0, rng);
        }
      }
    }
    for (const Index size : {1, 64, 100, 128, 255, 2112}) {  // the last one just more than a block's
      for (const std::uint64_t offset : {0, 38, 64, 127}) {
        TestOne(size, {4, 4}, FloatDtype::kFloat32, FixedAs::kFloats, true, offset, rng);
      }
    }
    TestOne(3000, {2, 14}, FloatDtype::kFloat32, FixedAs::kFloats, true, (std::uint64_t{1} << 35) - 7, rng);
  });
}
