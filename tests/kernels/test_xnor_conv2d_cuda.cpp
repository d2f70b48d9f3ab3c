// The CUDA kernels of xnor_conv2d against the definition, to the bit.
#include "kernels/device.h"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"
#include "kernels/xnor_conv_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename T>
std::vector<T> Convolve(const XnorConvProblem& p, XnorOutput output) {
  DeviceArray<std::uint64_t> x("x", p.split);
  DeviceArray<std::int32_t> weight("weight", p.packed), thresholds("thresholds", p.thresholds);
  DeviceArray<float> scale("scale", p.scale), bias("bias", p.bias);
  DeviceArray<T> y("y", static_cast<std::size_t>(p.OutputSize(output)));
  XnorConv2dArgs args = p.args;
  args.x = x.data();
  args.weight = weight.data();
  p.SetOutput(args, output, scale.data(), bias.data(), thresholds.data(), y.data());
  ExpectLaunched(XnorConv2dCuda(args, nullptr), "XnorConv2dCuda");
  return y.Values();
}

void TestOne(const XnorConvCase& c, std::mt19937& rng) {
  const XnorConvProblem p(c, rng);
  Expect(Convolve<std::int32_t>(p, XnorOutput::kDots) == p.dots, "dots, %s", p.name.c_str());
  Expect(Convolve<float>(p, XnorOutput::kFloats) == p.floats, "floats, %s", p.name.c_str());
  Expect(Convolve<std::uint64_t>(p, XnorOutput::kBits) == p.bits, "bits, %s", p.name.c_str());
  if (p.args.pixel_words == (c.channels + 63) / 64) return;
  DeviceArray<std::uint64_t> x("x", p.x), split("split", p.split.size());
  const Index pixels = c.images * c.height * c.width;
  ExpectLaunched(XnorSplitGroupsCuda(x.data(), pixels, c.groups, p.args.channels, split.data(), nullptr),
                 "XnorSplitGroupsCuda");
  Expect(split.Values() == p.split, "groups of %s", p.name.c_str());
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const XnorConvCase& c : XnorConvCases()) {
      // A few of many; the last one takes the emulator long.
      if (c.channels < 300 && (c.filters != 31 || c.channels == 65)) TestOne(c, rng);
    }
  });
}
