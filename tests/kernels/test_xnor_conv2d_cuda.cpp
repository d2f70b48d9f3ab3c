// The CUDA kernels of xnor_conv2d and of packing images against the definition, to the bit.
#include "kernels/device.h"
#include "kernels/sign_pack/sign_pack_cuda.h"
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
    for (const XnorConvCase& c : XnorConvCases()) {
      // A few of many; the last one takes the emulator long.
      if (c.channels < 300 && (c.filters != 31 || c.channels == 65)) TestOne(c, rng);
    }
    for (const FloatDtype stored_as : kFloats) {
      TestPlanes(2, 1, 70, 9, stored_as, rng);
      TestPlanes(1, 3, 33, 40, stored_as, rng);
      TestPlanes(0, 1, 33, 40, stored_as, rng);
    }
  });
}
