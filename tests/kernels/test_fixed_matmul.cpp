// The reference against the formula, and every variant against it, bit by bit: shapes around every tile, numbers that
// overflow 32 bits at once, unaligned memory.
#include <cmath>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/philox.h"
#include "kernels/fixed_matmul/fixed_matmul.h"
#include "kernels/fixed_matmul_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const FixedMatmulKernels* kernels;
};

template <typename Whole>
void TestProduct(const Variant& variant, Index samples, Index rows, Index columns, int bits, bool extreme,
                 std::mt19937& rng) {
  Unaligned<Whole> x(WholeNumbers<Whole>(samples * columns, bits, extreme, rng));
  Unaligned<Whole> weight(WholeNumbers<Whole>(rows * columns, bits, extreme, rng));
  std::vector<Index> of_rows(rows);
  for (Index& bias : of_rows) bias = (static_cast<Index>(rng()) << 31) - (Index{1} << 62);
  Unaligned<Index> bias(of_rows), got(std::vector<Index>(samples * rows, 7)), want(std::vector<Index>(samples * rows));
  FixedMatmulArgs args{x.data(), weight.data(), sizeof(Whole) == 2, samples, columns, rows, nullptr, got.data()};
  for (const bool biased : {false, true}) {
    args.bias = biased ? bias.data() : nullptr;
    args.sums = got.data();
    variant.kernels->multiply(args, rows / 3, rows);
    variant.kernels->multiply(args, 0, rows / 3);
    args.sums = want.data();
    kFixedMatmulScalar.multiply(args, 0, rows);
    Expect(got.Values() == want.Values(), "%s: int%d, %ld samples, %ld rows, %ld columns, %d bits, extreme %d, bias %d",
           variant.name, static_cast<int>(8 * sizeof(Whole)), long{samples}, long{rows}, long{columns}, bits, extreme,
           biased);
  }
}

void TestProducts(const Variant& variant, std::mt19937& rng) {
  for (const Index columns : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 131, 500}) {
    for (const Index samples : {0, 1, 2, 3, 4, 5, 9}) {
      for (const Index rows : {0, 1, 3, 4, 5, 11}) {
        TestProduct<std::int8_t>(variant, samples, rows, columns, 8, rows == 5, rng);
        TestProduct<std::int16_t>(variant, samples, rows, columns, 13, false, rng);
      }
    }
    for (const bool extreme : {false, true}) {
      for (const Index samples : {1, 6}) TestProduct<std::int16_t>(variant, samples, 6, columns, 16, extreme, rng);
    }
  }
  // Several chunks of columns.
  for (const Index columns : {1024, 2048, 4170}) {
    for (const Index samples : {1, 3}) {
      TestProduct<std::int8_t>(variant, samples, 9, columns, 8, true, rng);
      for (const int bits : {9, 13, 16}) TestProduct<std::int16_t>(variant, samples, 9, columns, bits, bits == 16, rng);
    }
  }
}

Index BytesOfNumber(FixedAs as) { return as == FixedAs::kInt8 ? 1 : as == FixedAs::kInt16 ? 2 : 4; }

void TestConversion(const Variant& variant, FixedConvertArgs args, Index size, std::mt19937& rng) {
  Unaligned<Index> sums(SumsOf(args, size, rng));
  const Index bytes = size * BytesOfNumber(args.as);
  Unaligned<unsigned char> got(std::vector<unsigned char>(bytes, 0xa5)), want(std::vector<unsigned char>(bytes, 0));
  args.sums = sums.data();
  args.y = got.data();
  variant.kernels->convert(args, size / 3, size);
  variant.kernels->convert(args, 0, size / 3);
  args.y = want.data();
  kFixedMatmulScalar.convert(args, 0, size);
  Expect(got.Values() == want.Values(), "%s: %ld sums of %d fraction bits to <%d,%d>, stochastic %d, relu %d, as %d",
         variant.name, long{size}, args.sum_fraction_bits, args.integer_bits, args.fraction_bits, args.stochastic,
         args.relu, static_cast<int>(args.as));
}

// Against the formula in long double, which has 64 bits.
void TestReference(std::mt19937& rng) {
  for (FixedConvertArgs args : Conversions()) {
    args.as = FixedAs::kInt32;
    const auto sums = SumsOf(args, 500, rng);
    std::vector<std::int32_t> got(sums.size());
    args.sums = sums.data();
    args.y = got.data();
    kFixedMatmulScalar.convert(args, 0, 500);
    const long double high = std::ldexp(1.0L, args.integer_bits + args.fraction_bits - 1) - 1;
    bool right = true;
    for (std::size_t i = 0; i < sums.size(); ++i) {
      const long double s = std::ldexp(static_cast<long double>(sums[i]), args.fraction_bits - args.sum_fraction_bits);
      const std::uint32_t u = RandomBits(args.seed, args.offset + i);
      const long double k =
          args.stochastic ? std::floor((std::floor(65536 * s + 0.5L) + u) / 65536) : std::floor(s + 0.5L);
      const long double low = args.relu ? 0 : -high - 1;
      // Beyond 2^62 even long double rounds, and everything saturates.
      right = right && got[i] == static_cast<std::int32_t>(k < low ? low : k > high ? high : k);
    }
    Expect(right, "reference: %d fraction bits to <%d,%d>, stochastic %d, relu %d", args.sum_fraction_bits,
           args.integer_bits, args.fraction_bits, args.stochastic, args.relu);
  }
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  TestReference(rng);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, &kFixedMatmulScalar},
                              {"avx2", CpuIsa::kAvx2, &kFixedMatmulAvx2},
                              {"avx512", CpuIsa::kAvx512, &kFixedMatmulAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    if (variant.needs != CpuIsa::kScalar) TestProducts(variant, rng);
    for (const FixedConvertArgs& args : Conversions()) {
      for (const Index size : {0, 1, 27, 64, 200}) TestConversion(variant, args, size, rng);
    }
  }
  return Failures() != 0;
}
