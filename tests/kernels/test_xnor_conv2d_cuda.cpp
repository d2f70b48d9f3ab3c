// The CUDA kernels of xnor_conv2d against the definition, to the bit.
#include "kernels/device.h"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"
#include "kernels/xnor_conv_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

#ifdef TERSETORCH_CUDA_EMULATOR
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

template <typename T>
std::vector<T> Convolve(XnorConvPath path, const XnorConvProblem& p, XnorOutput output) {
  DeviceArray<std::uint64_t> x("x", p.split);
  DeviceArray<std::int32_t> weight("weight", p.packed), thresholds("thresholds", p.thresholds);
  DeviceArray<float> scale("scale", p.scale), bias("bias", p.bias);
  DeviceArray<T> y("y", static_cast<std::size_t>(p.OutputSize(output)));
  XnorConv2dArgs args = p.args;
  args.x = x.data();
  args.weight = weight.data();
  p.SetOutput(args, output, scale.data(), bias.data(), thresholds.data(), y.data());
  ExpectLaunched(XnorConv2dCudaBy(path, args, nullptr), "XnorConv2dCuda");
  return y.Values();
}

// `turn` says which output the emulator, which has many schedules, is asked for.
void TestOne(const XnorConvCase& c, XnorConvPath path, int turn, std::mt19937& rng) {
  const XnorConvProblem p(c, rng);
  const auto wanted = [&](XnorOutput output) { return !kEmulated || turn % 3 == static_cast<int>(output); };
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s, path %d, %s", what, static_cast<int>(path), p.name.c_str());
  };
  if (wanted(XnorOutput::kDots)) complain(Convolve<std::int32_t>(path, p, XnorOutput::kDots) == p.dots, "dots");
  if (wanted(XnorOutput::kFloats)) complain(Convolve<float>(path, p, XnorOutput::kFloats) == p.floats, "floats");
  if (wanted(XnorOutput::kBits)) complain(Convolve<std::uint64_t>(path, p, XnorOutput::kBits) == p.bits, "bits");
  if (p.args.pixel_words == (c.channels + 63) / 64) return;
  DeviceArray<std::uint64_t> x("x", p.x), split("split", p.split.size());
  const Index pixels = c.images * c.height * c.width;
  ExpectLaunched(XnorSplitGroupsCuda(x.data(), pixels, c.groups, p.args.channels, split.data(), nullptr),
                 "XnorSplitGroupsCuda");
  Expect(split.Values() == p.split, "groups of %s", p.name.c_str());
}

}  // namespace

int main() {
  int turn = 0;
  return RunOnDevice([&turn] {
    std::mt19937 rng(1);
    for (const XnorConvCase& c : XnorConvCases()) {
      ++turn;
      // A few of many; the last one takes the emulator long, and so do many groups or taps on
      // tensor cores.
      if (c.channels >= 300 || (c.filters == 31 && c.channels != 65)) continue;
      TestOne(c, XnorConvPath::kCount, turn, rng);
      if (c.kernel_h < 32 && (c.groups < 8 || (c.groups == 37 && c.outside == 0)))
        TestOne(c, XnorConvPath::kFragments, turn, rng);
    }
    // Around a block's pixels, in several images; words around its stages; pairs of tiles in groups.
    const XnorConvCase of_fragments[] = {
        {1, 64, 7, 9, 32, 1, 1},
        {1, 70, 8, 8, 64, 1, 1},
        {3, 20, 5, 13, 65, 2, 3, 1, 1, 1, 1, 1, 1, 1, -1},
        {1, 260, 5, 6, 33, 3, 3, 1, 1, 1, 1},
        {1, 512, 3, 3, 5, 2, 2, 1, 1, 1, 1},
        {1, 128, 5, 5, 192, 3, 2, 2, 1, 1, 1, 1, 1, 2, 1},
    };
    for (const XnorConvCase& c : of_fragments) TestOne(c, XnorConvPath::kFragments, ++turn, rng);
  });
}
