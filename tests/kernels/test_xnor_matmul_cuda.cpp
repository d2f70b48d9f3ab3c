// The CUDA kernels of xnor_matmul against the definition, to the bit, on shapes around their tiles.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/xnor_matmul/xnor_matmul_cuda.h"
#include "kernels/xnor_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename T>
std::vector<T> Multiply(XnorPath path, const XnorProblem& p, XnorOutput output) {
  DeviceArray<std::uint64_t> x("x", p.x), weight("weight", p.packed);
  DeviceArray<float> scale("scale", p.scale), bias("bias", p.bias);
  DeviceArray<std::int32_t> thresholds("thresholds", p.thresholds);
  const Index size = output == XnorOutput::kBits ? p.samples * ((p.rows + 63) / 64) : p.samples * p.rows;
  DeviceArray<T> y("y", static_cast<std::size_t>(size));
  XnorMatmulArgs args{x.data(), weight.data(), p.samples, p.words, p.columns, p.rows, {}, {}, {}, {}, {}, {}};
  if (output == XnorOutput::kFloats) {
    args.scale = scale.data();
    args.bias = bias.data();
  }
  if (output == XnorOutput::kBits) args.thresholds = thresholds.data();
  p.SetOutput(args, output, y.data());
  ExpectLaunched(XnorMatmulCudaBy(path, args, nullptr), "XnorMatmulCuda");
  return y.Values();
}

void TestOne(XnorPath path, Index rows, Index columns, Index samples, std::mt19937& rng) {
  const XnorProblem p(rows, columns, samples, rng);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s, path %d, %ld x %ld, %ld samples", what, static_cast<int>(path), long{rows}, long{columns},
           long{samples});
  };
  complain(Multiply<std::int32_t>(path, p, XnorOutput::kDots) == p.dots, "dots");
  complain(Multiply<float>(path, p, XnorOutput::kFloats) == p.floats, "floats");
  complain(Multiply<std::uint64_t>(path, p, XnorOutput::kBits) == p.bits, "bits");
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const XnorPath path : {XnorPath::kCount, XnorPath::kFew}) {
      for (const Index rows : {1, 32, 70}) {
        for (const Index columns : {1, 300}) {
          for (const Index samples : {1, 5}) TestOne(path, rows, columns, samples, rng);
        }
      }
      // Around what a warp takes at a time and what the warps of a block share.
      for (const Index columns : {0, 257, 2049}) {
        for (const Index samples : {0, 9, 17}) TestOne(path, 37, columns, samples, rng);
      }
      TestOne(path, 5, 4500, 33, rng);
    }
    // Around a block's samples and rows, and a stage's words.
    TestOne(XnorPath::kMany, 31, 70, 129, rng);
    TestOne(XnorPath::kMany, 129, 512, 1, rng);
    TestOne(XnorPath::kMany, 40, 2100, 20, rng);
  });
}
