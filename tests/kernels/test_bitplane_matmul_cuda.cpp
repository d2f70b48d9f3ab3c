// The CUDA kernel against the definition, to the bit, on shapes around its tiles.
#include <random>
#include <vector>

#include "kernels/bitplane_matmul/bitplane_matmul_cuda.h"
#include "kernels/bitplane_problem.h"
#include "kernels/check.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename T>
std::vector<T> Multiply(const BitplaneProblem& p, BitplaneOutput output, bool scaled = true) {
  DeviceArray<std::uint8_t> x("x", p.x);
  DeviceArray<std::uint64_t> weight("weight", p.signs.packed);
  DeviceArray<float> scale("scale", p.scale), bias("bias", p.bias);
  DeviceArray<std::int32_t> thresholds("thresholds", p.thresholds);
  DeviceArray<T> y("y", static_cast<std::size_t>(p.Size(output)));
  BitplaneMatmulArgs args{weight.data(), nullptr, p.samples, p.signs.words, p.signs.rows, {}, {}, {}, {}, {}, {}, {}};
  if (output == BitplaneOutput::kFloats && scaled) {
    args.scale = scale.data();
    args.bias = bias.data();
  }
  if (output == BitplaneOutput::kBits) args.thresholds = thresholds.data();
  BitplaneProblem::SetOutput(args, output, y.data());
  ExpectLaunched(BitplaneMatmulCuda(p.Tables(x.data()), args, nullptr), "BitplaneMatmulCuda");
  return y.Values();
}

void TestOne(const BitplaneProblem& p) {
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s, %ld x %ld, %ld samples, images %d", what, long{p.signs.rows}, long{p.signs.columns},
           long{p.samples}, p.of_images);
  };
  complain(Multiply<std::int32_t>(p, BitplaneOutput::kDots) == p.dots, "dots");
  complain(Multiply<float>(p, BitplaneOutput::kFloats) == p.floats, "floats");
  complain(Multiply<float>(p, BitplaneOutput::kFloats, false) == std::vector<float>(p.dots.begin(), p.dots.end()),
           "floats without scale and bias");
  complain(Multiply<std::uint64_t>(p, BitplaneOutput::kBits) == p.bits, "bits");
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    TestOne({0, 9, 2, 1, 0, rng});
    TestOne({5, 0, 2, 1, 0, rng});
    TestOne({33, 70, 5, 1, 0, rng});
    TestOne({129, 257, 1, 2, 255, rng});
    TestOne({31, 300, 9, 1, 128, rng});
    TestOne({37, 3, 2, ImageSizes(4, 3, 3, 3, 1, 1, 1), 2, 255, rng});
    TestOne({65, 2, 1, ImageSizes(5, 3, 2, 1, 2, 2, 1), 1, 0, rng});
    TestOne({34, 530, 3, 1, 7, rng});  // more words than a block has tables for
    BitplaneImages far = ImageSizes(7, 9, 2, 3, 3, 2, 2);
    far.stride_x = 2, far.dilation_y = 3, far.column_stride = 2;
    TestOne({7, 3, 2, far, 1, 100, rng});
  });
}
