// The CUDA kernel of fixed_round against the reference, bit by bit.
#include "kernels/device.h"
#include "kernels/fixed_round/fixed_round_cuda.h"
#include "kernels/fixed_round_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

void TestOne(Index size, FixedFormat format, FloatDtype stored_as, FixedAs as, bool stochastic, std::uint64_t offset,
             std::mt19937& rng) {
  const auto numbers = FixedNumbers(size, format, stored_as, rng);
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

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
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
    TestOne(3000, {2, 14}, FloatDtype::kFloat32, FixedAs::kFloats, true, (std::uint64_t{1} << 35) - 7, rng);
  });
}
