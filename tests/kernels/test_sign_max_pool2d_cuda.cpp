// The CUDA kernel of sign_max_pool2d against the definition, bit by bit.
#include "kernels/device.h"
#include "kernels/sign_max_pool2d/sign_max_pool2d_cuda.h"
#include "kernels/sign_pool_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (SignMaxPool2dArgs args : SignPools()) {
      const SignPoolProblem p(args, rng);
      DeviceArray<std::uint64_t> x("x", p.x), flips("flips", p.flips);
      for (const bool flipped : {false, true}) {
        DeviceArray<std::uint64_t> y("y", p.plain.size());
        args.x = x.data();
        args.flips = flipped ? flips.data() : nullptr;
        args.y = y.data();
        ExpectLaunched(SignMaxPool2dCuda(args, nullptr), "SignMaxPool2dCuda");
        Expect(y.Values() == (flipped ? p.flipped : p.plain), "%ld x %ld of %ld words, windows %ld x %ld, flips %d",
               long{args.height}, long{args.width}, long{args.words}, long{args.kernel_h}, long{args.kernel_w},
               flipped);
      }
    }
  });
}
