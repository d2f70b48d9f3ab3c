// Every variant against the definition, to the bit, on shapes around its tiles and on unaligned memory.
#include <algorithm>
#include <bit>
#include <random>
#include <vector>

#include "kernels/bitplane_matmul/bitplane_matmul.h"
#include "kernels/bitplane_problem.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename T>
std::vector<T> Multiply(const BitplaneMatmulKernels& kernels, const BitplaneProblem& p, BitplaneOutput output) {
  Unaligned<std::uint8_t> x(p.x);
  Unaligned<std::uint64_t> weight(p.signs.packed);
  Unaligned<float> scale(p.scale), bias(p.bias);
  Unaligned<std::int32_t> thresholds(p.thresholds);
  Unaligned<T> y(std::vector<T>(p.Size(output), static_cast<T>(0x55)));
  const Index words = p.signs.words, tiles = XnorTiles(p.signs.rows), cut = tiles / 2 / 2 * 2;
  const Index numbers = output == BitplaneOutput::kBits ? (p.signs.rows + 63) / 64 : p.signs.rows;
  for (Index first = 0; first < p.samples;) {
    const auto count =
        static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(std::min<Index>(8, p.samples - first))));
    std::vector<std::int16_t> tables(words * count * kBitplaneWordTables, 0x5555);
    BitplaneTablesArgs make = p.Tables(x.data());
    make.first = first;
    make.samples = count;
    make.tables = tables.data();
    InParts(words / 2, words, [&](Index begin, Index end) { kernels.tables(make, begin, end); });
    BitplaneMatmulArgs args{weight.data(),  tables.data(), count, words, p.signs.rows, {}, {}, {}, {}, {}, {},
                            p.signs.columns};
    if (output == BitplaneOutput::kFloats) {
      args.scale = scale.data();
      args.bias = bias.data();
    }
    if (output == BitplaneOutput::kBits) args.thresholds = thresholds.data();
    BitplaneProblem::SetOutput(args, output, y.data() + first * numbers);
    InParts(cut, tiles, [&](Index begin, Index end) { kernels.multiply(args, begin, end); });
    first += count;
  }
  return y.Values();
}

void TestOne(const char* name, const BitplaneMatmulKernels& kernels, const BitplaneProblem& p) {
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %ld x %ld, %ld samples, step %d, zero %d", name, what, long{p.signs.rows},
           long{p.signs.columns}, long{p.samples}, p.step, p.zero);
  };
  complain(Multiply<std::int32_t>(kernels, p, BitplaneOutput::kDots) == p.dots, "dots");
  complain(Multiply<float>(kernels, p, BitplaneOutput::kFloats) == p.floats, "floats");
  complain(Multiply<std::uint64_t>(kernels, p, BitplaneOutput::kBits) == p.bits, "bits");
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  struct Variant {
    const char* name;
    CpuIsa needs;
    const BitplaneMatmulKernels& kernels;
  };
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kBitplaneMatmulScalar},
                              {"avx2", CpuIsa::kAvx2, kBitplaneMatmulAvx2},
                              {"avx512", CpuIsa::kAvx512, kBitplaneMatmulAvx512}};
  for (const auto& [name, needs, kernels] : variants) {
    if (ProcessCpuIsa().detected < needs) continue;
    for (const Index samples : {0, 1, 2, 7, 8}) {
      for (const Index rows : {0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 97}) {
        for (const Index columns : {1, 64, 131}) TestOne(name, kernels, {rows, columns, samples, 1, 0, rng});
      }
      // Around what fits 16 bits, the words of a part, and more tiles than a group has.
      for (const Index columns : {0, 3, 127, 128, 129, 191, 192, 193, 767, 769, 1600}) {
        TestOne(name, kernels, {37, columns, samples, 2, 255, rng});
      }
    }
    TestOne(name, kernels, {32 * 33 + 5, 200, 5, 1, 128, rng});
    TestOne(name, kernels, {37, 3, 2, ImageSizes(5, 6, 3, 3, 1, 1, 1), 1, 0, rng});
    TestOne(name, kernels, {70, 2, 2, ImageSizes(7, 5, 2, 3, 2, 3, 2), 2, 255, rng});
    TestOne(name, kernels, {9, 40, 1, ImageSizes(3, 4, 1, 2, 1, 0, 1), 1, 255, rng});
  }
  return Failures() != 0;
}
