// The CUDA kernel against the scalar reference, to the bit, on shapes around its tiles.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/sign_matmul/sign_matmul_cuda.h"
#include "kernels/sign_tables_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

void TestOne(Index rows, Index columns, Index samples, bool whole, FloatDtype stored_as, std::mt19937& rng,
             bool with_nan = false) {
  const Signs signs(rows, columns, rng);
  std::vector<float> numbers = Random(samples * columns, rng);
  if (with_nan) numbers.back() = NAN;
  const std::vector<float> scales = Random(rows, rng), biases = Random(rows, rng);
  DeviceFloats x("x", stored_as, numbers), y("y", stored_as, samples * rows);
  DeviceArray<std::uint64_t> weight("weight", signs.packed);
  DeviceArray<float> scale("scale", scales), bias("bias", biases);
  const SignMatmulCudaArgs args{x.data(),
                                stored_as,
                                weight.data(),
                                samples,
                                columns,
                                rows,
                                whole ? scale.data() : nullptr,
                                whole ? bias.data() : nullptr,
                                whole,
                                y.data()};
  ExpectLaunched(SignMatmulCuda(args, nullptr), "SignMatmulCuda");
  std::vector<float> tables(signs.words * samples * kSignMatmulTableFloats);
  Output want(samples * rows, stored_as);
  kSignMatmulScalar.tables({numbers.data(), FloatDtype::kFloat32, samples, columns, tables.data()}, 0, signs.words);
  kSignMatmulScalar.multiply(
      {signs.packed.data(), tables.data(), samples, signs.words, rows, whole ? scales.data() : nullptr,
       whole ? biases.data() : nullptr, whole, want.data(), stored_as},
      0, XnorTiles(rows));
  const auto got = y.Values(), wanted = want.Values();
  const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  Expect(std::equal(got.begin(), got.end(), wanted.begin(), wanted.end(), same),
         "%ld x %ld, %ld samples, floats %d, whole %d", long{rows}, long{columns}, long{samples},
         static_cast<int>(stored_as), whole);
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const FloatDtype stored_as : kFloats) {
      TestOne(0, 9, 2, false, stored_as, rng);
      TestOne(5, 0, 2, true, stored_as, rng);
      TestOne(33, 70, 5, true, stored_as, rng);
      TestOne(129, 257, 1, false, stored_as, rng);
      TestOne(31, 300, 9, false, stored_as, rng);
      TestOne(40, 1088, 3, true, stored_as, rng);  // more words than a block has tables for
      TestOne(2, 64, 6, true, stored_as, rng);
      TestOne(3, 70, 2, true, stored_as, rng, true);
    }
  });
}
