// Every variant against the definition, to the bit, on shapes around its tiles and on unaligned memory.
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/xnor_matmul/xnor_matmul.h"
#include "kernels/xnor_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  XnorMatmulVariant multiply;
};

template <typename T>
std::vector<T> Multiply(const Variant& variant, const XnorProblem& p, XnorOutput output) {
  Unaligned<std::uint64_t> x(p.x), weight(p.packed);
  Unaligned<float> scale(p.scale), bias(p.bias);
  Unaligned<std::int32_t> thresholds(p.thresholds);
  const Index size = output == XnorOutput::kBits ? p.samples * ((p.rows + 63) / 64) : p.samples * p.rows;
  Unaligned<T> y(std::vector<T>(size, static_cast<T>(0x55)));
  XnorMatmulArgs args{x.data(), weight.data(), p.samples, p.words, p.columns, p.rows, {}, {}, {}, {}, {}, {}};
  if (output == XnorOutput::kFloats) {
    args.scale = scale.data();
    args.bias = bias.data();
  }
  if (output == XnorOutput::kBits) args.thresholds = thresholds.data();
  p.SetOutput(args, output, y.data());
  const Index tiles = XnorTiles(p.rows), cut = tiles / 2 / 2 * 2;
  InParts(cut, tiles, [&](Index begin, Index end) { variant.multiply(args, begin, end); });
  return y.Values();
}

void TestOne(const Variant& variant, Index rows, Index columns, Index samples, std::mt19937& rng) {
  const XnorProblem p(rows, columns, samples, rng);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %ld x %ld, %ld samples", variant.name, what, long{rows}, long{columns}, long{samples});
  };
  complain(Multiply<std::int32_t>(variant, p, XnorOutput::kDots) == p.dots, "dots");
  complain(Multiply<float>(variant, p, XnorOutput::kFloats) == p.floats, "floats");
  complain(Multiply<std::uint64_t>(variant, p, XnorOutput::kBits) == p.bits, "bits");
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kXnorMatmulScalar},
                              {"avx2", CpuIsa::kAvx2, kXnorMatmulAvx2},
                              {"avx512", CpuIsa::kAvx512, kXnorMatmulAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Index rows : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100}) {
      for (const Index columns : {1, 64, 65, 131}) {
        for (const Index samples : {1, 3}) TestOne(variant, rows, columns, samples, rng);
      }
    }
    // Around pairs of words, and around what a byte counts.
    for (const Index columns : {0, 128, 129, 191, 192, 193, 3967, 3968, 3969, 4032, 4096, 4097, 8200}) {
      for (const Index samples : {0, 1, 2, 5}) TestOne(variant, 37, columns, samples, rng);
    }
    // Around the words, tiles and samples that lookups count together, and more words than 16 bits count.
    for (const Index columns : {767, 769, 1345}) TestOne(variant, 161, columns, 7, rng);
    for (const Index samples : {128, 129}) TestOne(variant, 33, 70, samples, rng);
    for (const Index columns : {65472, 65473}) TestOne(variant, 5, columns, 2, rng);
  }
  return Failures() != 0;
}
