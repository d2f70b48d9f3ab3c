// Every variant against the definition, bit by bit, on windows around its vectors and borders and on unaligned memory.
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/sign_pool_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

int main() {
  const struct {
    const char* name;
    CpuIsa needs;
    SignMaxPool2dVariant pool;
  } variants[] = {{"scalar", CpuIsa::kScalar, kSignMaxPool2dScalar},
                  {"avx2", CpuIsa::kAvx2, kSignMaxPool2dAvx2},
                  {"avx512", CpuIsa::kAvx512, kSignMaxPool2dAvx512}};
  for (const auto& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    std::mt19937 rng(1);
    for (SignMaxPool2dArgs args : SignPools()) {
      const SignPoolProblem p(args, rng);
      Unaligned<std::uint64_t> x(p.x), flips(p.flips);
      for (const bool flipped : {false, true}) {
        Unaligned<std::uint64_t> y(std::vector<std::uint64_t>(p.plain.size(), 0x5555555555555555));
        args.x = x.data();
        args.flips = flipped ? flips.data() : nullptr;
        args.y = y.data();
        const Index rows = args.images * args.out_height;
        InParts(rows / 3, rows, [&](Index begin, Index end) { variant.pool(args, begin, end); });
        Expect(y.Values() == (flipped ? p.flipped : p.plain), "%s: %ld x %ld of %ld words, windows %ld x %ld, flips %d",
               variant.name, long{args.height}, long{args.width}, long{args.words}, long{args.kernel_h},
               long{args.kernel_w}, flipped);
      }
    }
  }
  return Failures() != 0;
}
