// Every variant against the definition and, to the bit, against the scalar one; shapes around its tiles, unaligned
// memory.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/sign_matmul/sign_matmul.h"
#include "kernels/sign_tables_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Problem {
  Problem(Index rows, Index columns, Index samples, std::mt19937& rng)
      : signs(rows, columns, rng),
        samples(samples),
        x(Random(samples * columns, rng)),
        scale(Random(rows, rng)),
        bias(Random(rows, rng)) {}
  Signs signs;
  Index samples;
  std::vector<float> x, scale, bias;
};

std::vector<float> Multiply(const SignMatmulKernels& kernels, const Problem& p, FloatDtype stored_as, bool whole) {
  std::vector<std::uint16_t> halves;
  for (const float number : p.x) halves.push_back(Truncated(number));
  Unaligned<float> floats(p.x), scale(p.scale), bias(p.bias);
  Unaligned<std::uint16_t> short_floats(halves);
  Unaligned<std::uint64_t> weight(p.signs.packed);
  std::vector<float> tables(p.signs.words * p.samples * kSignMatmulTableFloats, NAN);
  Output y(p.samples * p.signs.rows, stored_as);
  const void* x = stored_as == FloatDtype::kFloat32 ? static_cast<const void*>(floats.data()) : short_floats.data();
  const SignTablesArgs make{x, stored_as, p.samples, p.signs.columns, tables.data()};
  InParts(p.signs.words / 2, p.signs.words, [&](Index begin, Index end) { kernels.tables(make, begin, end); });
  const SignMatmulArgs args{weight.data(),
                            tables.data(),
                            p.samples,
                            p.signs.words,
                            p.signs.rows,
                            whole ? scale.data() : nullptr,
                            whole ? bias.data() : nullptr,
                            whole,
                            y.data(),
                            stored_as};
  const Index tiles = XnorTiles(p.signs.rows), cut = tiles / 3;
  InParts(cut, tiles, [&](Index begin, Index end) { kernels.multiply(args, begin, end); });
  return y.Values();
}

void TestOne(const char* name, const SignMatmulKernels& kernels, const Problem& p) {
  for (const FloatDtype stored_as : kFloats) {
    for (const bool whole : {false, true}) {
      const std::vector<float> y = Multiply(kernels, p, stored_as, whole);
      const std::vector<float> scalar = Multiply(kSignMatmulScalar, p, stored_as, whole);
      bool near = true;
      for (Index n = 0; n < p.samples; ++n) {
        for (Index r = 0; r < p.signs.rows; ++r) {
          Sum sum;
          const double scale = whole ? p.scale[r] : 1;
          for (Index c = 0; c < p.signs.columns; ++c) sum.Add(scale * p.signs.At(r, c) * p.x[n * p.signs.columns + c]);
          if (whole) sum.Add(p.bias[r]);
          const float got = y[n * p.signs.rows + r];
          near = near && (whole && got == 0 ? sum.value <= 1e-3 : sum.Near(got, stored_as, 2));
        }
      }
      const bool same = y.empty() || std::memcmp(y.data(), scalar.data(), 4 * y.size()) == 0;
      Expect(near && same, "%s: %ld x %ld, %ld samples, floats %d, whole %d: %s", name, long{p.signs.rows},
             long{p.signs.columns}, long{p.samples}, static_cast<int>(stored_as), whole,
             near ? "not the scalar bits" : "wrong");
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  struct Variant {
    const char* name;
    CpuIsa needs;
    const SignMatmulKernels& kernels;
  };
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kSignMatmulScalar},
                              {"avx2", CpuIsa::kAvx2, kSignMatmulAvx2},
                              {"avx512", CpuIsa::kAvx512, kSignMatmulAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    for (const Index samples : {1, 2, 4, 8}) {
      for (const Index rows : {0, 1, 7, 8, 9, 31, 32, 33, 64, 65, 97}) {
        for (const Index columns : {1, 64, 131}) TestOne(variant.name, variant.kernels, {rows, columns, samples, rng});
      }
      // Around the words of a part, and more tiles than a group has.
      for (const Index columns : {0, 3, 63, 65, 127, 128, 129, 383, 384, 385, 1600}) {
        TestOne(variant.name, variant.kernels, {37, columns, samples, rng});
      }
      TestOne(variant.name, variant.kernels, {32 * 33 + 5, 200, samples, rng});
    }
    Problem odd(40, 100, 2, rng);
    odd.x[3] = NAN;
    odd.x[107] = INFINITY;
    const std::vector<float> y = Multiply(variant.kernels, odd, FloatDtype::kFloat32, false);
    bool right = true;
    for (Index r = 0; r < 40; ++r) right = right && std::isnan(y[r]) && std::isinf(y[40 + r]);
    Expect(right, "%s: NaN and infinity", variant.name);
  }
  return Failures() != 0;
}
