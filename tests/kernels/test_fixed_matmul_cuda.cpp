// The CUDA kernels of fixed_matmul against the reference, bit by bit.
#include <algorithm>

#include "kernels/device.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "kernels/fixed_matmul_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

template <typename X, typename Whole>
void TestProduct(Index samples, Index rows, Index columns, bool extreme, std::mt19937& rng) {
  constexpr bool kWide = sizeof(Whole) == 2;
  const auto x = WholeNumbers<X>(samples * columns, 8 * sizeof(X), extreme, rng);
  const auto weight = WholeNumbers<Whole>(rows * columns, 8 * sizeof(Whole), extreme, rng);
  std::vector<Index> want(samples * rows);
  for (Index i = 0; i < samples * rows; ++i) {
    for (Index c = 0; c < columns; ++c) want[i] += Index{x[i / rows * columns + c]} * weight[i % rows * columns + c];
  }
  const Index of_word = FixedNumbersOfWord(kWide), words = (columns + of_word - 1) / of_word;
  const Index panels = (rows + kFixedPanel - 1) / kFixedPanel;
  std::vector<std::int32_t> packed(panels * (words + 1) * kFixedPanel);
  FixedPack({weight.data(), kWide, rows, columns, 1, packed.data()}, 0, panels);
  DeviceArray<X> of_x("x", x);
  DeviceArray<std::int32_t> of_packed("packed", packed);
  DeviceArray<Index> sums("sums", want.size());
  const FixedCudaArgs args{of_x.data(), sizeof(X) == 2, of_packed.data(), kWide, samples,
                           columns,     rows,           sums.data(),      {}};
  ExpectLaunched(FixedMatmulCuda(args, nullptr), "FixedMatmulCuda");
  Expect(sums.Values() == want, "int%d by int%d, %ld samples, %ld rows, %ld columns, extreme %d",
         static_cast<int>(8 * sizeof(X)), static_cast<int>(8 * sizeof(Whole)), long{samples}, long{rows}, long{columns},
         extreme);
}

// Of two samples.
void TestConversion(FixedConvertArgs args, Index size, std::mt19937& rng) {
  args.rows = args.sums_stride = args.y_stride = size;
  const auto of_args = SumsOf(args, 2 * size, rng), biases = SumsOf(args, size, rng);
  for (const bool biased : {false, true}) {
    const Index bytes = 2 * size * (args.as == FixedAs::kInt8 ? 1 : args.as == FixedAs::kInt16 ? 2 : 4);
    std::vector<unsigned char> want(bytes);
    auto kept = biases;
    for (Index& bias : kept) bias = std::min(std::max(bias, -kFixedMostBias), kFixedMostBias);
    args.sums = of_args.data();
    args.added = biased ? kept.data() : nullptr;
    args.y = want.data();
    kFixedMatmulScalar.convert(args, 0, 2);
    DeviceArray<Index> sums("sums", of_args), added("added", biases);
    DeviceArray<unsigned char> y("y", bytes);
    args.sums = sums.data();
    args.added = biased ? added.data() : nullptr;
    args.y = y.data();
    ExpectLaunched(FixedConvertCuda(args, 2, 1, nullptr), "FixedConvertCuda");
    Expect(y.Values() == want, "%ld sums of %d fraction bits to <%d,%d>, stochastic %d, relu %d, as %d, biased %d",
           long{size}, args.sum_fraction_bits, args.integer_bits, args.fraction_bits, args.stochastic, args.relu,
           static_cast<int>(args.as), biased);
  }
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(1);
    for (const Index columns : {0, 1, 33, 70}) {
      for (const Index samples : {0, 7, 9}) {
        for (const Index rows : {1, 16, 18}) {
          TestProduct<std::int8_t, std::int8_t>(samples, rows, columns, rows == 16, rng);
          TestProduct<std::int8_t, std::int16_t>(samples, rows, columns, rows == 16, rng);
          TestProduct<std::int16_t, std::int16_t>(samples, rows, columns, rows == 16, rng);
        }
      }
    }
    for (const Index samples : {3, 65}) {  // few, and more than one tile of them
      TestProduct<std::int8_t, std::int8_t>(samples, 49, 257, true, rng);
      TestProduct<std::int8_t, std::int8_t>(samples, 33, 260, false, rng);  // of whole words
      TestProduct<std::int16_t, std::int16_t>(samples, 49, 130, true, rng);
      TestProduct<std::int16_t, std::int16_t>(samples, 33, 131, true, rng);
      TestProduct<std::int8_t, std::int16_t>(samples, 17, 130, true, rng);
    }
    // More columns than are summed in 32 bits, of the least number, whose products are the largest.
    TestProduct<std::int8_t, std::int8_t>(9, 1, 16'400, true, rng);
    TestProduct<std::int8_t, std::int8_t>(1, 1, 65'600, true, rng);
    for (const FixedConvertArgs& args : Conversions()) TestConversion(args, 65, rng);
    TestConversion(Conversions()[0], 0, rng);
  });
}
