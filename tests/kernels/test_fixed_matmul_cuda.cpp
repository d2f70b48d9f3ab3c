// The CUDA kernels of fixed_matmul against the reference, bit by bit.
#include "kernels/device.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "kernels/fixed_matmul_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename Whole>
void TestProduct(Index samples, Index rows, Index columns, bool extreme, std::mt19937& rng) {
  const auto x = WholeNumbers<Whole>(samples * columns, 8 * sizeof(Whole), extreme, rng);
  const auto weight = WholeNumbers<Whole>(rows * columns, 8 * sizeof(Whole), extreme, rng);
  std::vector<Index> bias(rows), want(samples * rows);
  for (Index& one : bias) one = (static_cast<Index>(rng()) << 31) - (Index{1} << 62);
  const bool biased = rows % 2 == 1;
  FixedMatmulArgs args{
      x.data(), weight.data(), sizeof(Whole) == 2, samples, columns, rows, biased ? bias.data() : nullptr, want.data()};
  kFixedMatmulScalar.multiply(args, 0, rows);
  DeviceArray<Whole> of_x("x", x), of_weight("weight", weight);
  DeviceArray<Index> of_bias("bias", bias), sums("sums", want.size());
  args.x = of_x.data();
  args.weight = of_weight.data();
  args.bias = biased ? of_bias.data() : nullptr;
  args.sums = sums.data();
  ExpectLaunched(FixedMatmulCuda(args, nullptr), "FixedMatmulCuda");
  Expect(sums.Values() == want, "int%d, %ld samples, %ld rows, %ld columns, extreme %d",
         static_cast<int>(8 * sizeof(Whole)), long{samples}, long{rows}, long{columns}, extreme);
}

void TestConversion(FixedConvertArgs args, Index size, std::mt19937& rng) {
  const auto of_args = SumsOf(args, size, rng);
  const Index bytes = size * (args.as == FixedAs::kInt8 ? 1 : args.as == FixedAs::kInt16 ? 2 : 4);
  std::vector<unsigned char> want(bytes);
  args.sums = of_args.data();
  args.y = want.data();
  kFixedMatmulScalar.convert(args, 0, size);
  DeviceArray<Index> sums("sums", of_args);
  DeviceArray<unsigned char> y("y", bytes);
  args.sums = sums.data();
  args.y = y.data();
  ExpectLaunched(FixedConvertCuda(args, size, nullptr), "FixedConvertCuda");
  Expect(y.Values() == want, "%ld sums of %d fraction bits to <%d,%d>, stochastic %d, relu %d, as %d", long{size},
         args.sum_fraction_bits, args.integer_bits, args.fraction_bits, args.stochastic, args.relu,
         static_cast<int>(args.as));
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const Index columns : {0, 1, 31, 33, 100}) {
      for (const Index samples : {0, 1, 7, 9}) {
        for (const Index rows : {1, 5, 6}) {
          TestProduct<std::int8_t>(samples, rows, columns, rows == 5, rng);
          TestProduct<std::int16_t>(samples, rows, columns, rows == 5, rng);
        }
      }
    }
    for (const Index samples : {3, 65}) {  // few, and more than one tile of them
      TestProduct<std::int8_t>(samples, 33, 129, true, rng);
      TestProduct<std::int8_t>(samples, 33, 132, false, rng);  // rows of whole words
      TestProduct<std::int16_t>(samples, 33, 130, true, rng);
      TestProduct<std::int16_t>(samples, 33, 131, true, rng);
    }
    TestProduct<std::int8_t>(9, 1, 4'100, true, rng);  // more columns than are summed in 32 bits
    for (const FixedConvertArgs& args : Conversions()) TestConversion(args, 130, rng);
    TestConversion(Conversions()[0], 0, rng);
  });
}
