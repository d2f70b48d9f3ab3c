// What CUDA kernels read and write as float16: every number, and every way of rounding to one.
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels/csr_matmul/csr_matmul_cuda.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

constexpr int kFinite = 0x7c00;  // finite numbers of one sign

// What the bits of a finite number with the sign bit 0 mean; those of infinity the power of two that it stands for.
double Meaning(int bits) {
  const int exponent = bits >> 10, fraction = bits & 0x3ff;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
}

struct Weight {
  explicit Weight(const std::vector<float>& numbers)
      : offsets("row_offsets", {0, static_cast<std::int32_t>(numbers.size())}),
        indices("col_indices", Counted(numbers.size())),
        values("values", numbers) {
    args.row_offsets = offsets.data();
    args.indexed_by = CsrIndices::kInt32;
    args.col_indices = indices.data();
    args.stored_as = CsrValues::kFloat32;
    args.values = values.data();
    args.rows = 1;
    args.columns = args.nnz = static_cast<Index>(numbers.size());
  }
  static std::vector<std::int32_t> Counted(std::size_t count) {
    std::vector<std::int32_t> all(count);
    std::iota(all.begin(), all.end(), 0);
    return all;
  }

  DeviceArray<std::int32_t> offsets, indices;
  DeviceArray<float> values;
  CsrWeight args{};
};

// The gradients of values are all numbers times 1.
void TestReads() {
  std::vector<std::uint16_t> all(1 << 16);
  std::iota(all.begin(), all.end(), std::uint16_t{0});
  Weight weight(std::vector<float>(all.size(), 0.0f));
  DeviceArray<std::uint16_t> x("x", all), one("grad_y", std::vector<std::uint16_t>{0x3c00});
  DeviceArray<float> grad_values("grad_values", all.size());
  ExpectLaunched(CsrMatmulGradValuesCuda({weight.args, one.data(), FloatDtype::kFloat16, x.data(), FloatDtype::kFloat16,
                                          grad_values.data(), 1},
                                         nullptr),
                 "CsrMatmulGradValuesCuda");
  const std::vector<float> got = grad_values.Values();
  for (const std::uint16_t bits : all) {
    const int number = bits & 0x7fff;
    const double want = (bits >= 0x8000 ? -1 : 1) * (number == kFinite ? INFINITY : Meaning(number));
    Expect(number > kFinite ? std::isnan(got[bits]) : got[bits] == want, "0x%04x must be %g, got %g", unsigned{bits},
           want, double{got[bits]});
  }
}

// The gradient of x is numbers times 1, rounded.
void TestRounds() {
  std::vector<float> numbers{NAN};
  std::vector<std::uint16_t> want{0};
  const auto add = [&](double number, int bits) {
    numbers.push_back(static_cast<float>(number));
    want.push_back(static_cast<std::uint16_t>(bits));
    numbers.push_back(static_cast<float>(-number));
    want.push_back(static_cast<std::uint16_t>(bits | 0x8000));
  };
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (int bits = 0; bits < kFinite; ++bits) {
    if (bits != 0) add(Meaning(bits), bits);  // the sum loses the sign of 0
    const auto tie = static_cast<float>((Meaning(bits) + Meaning(bits + 1)) / 2);
    add(std::nextafter(tie, 0.0f), bits);
    add(tie, bits + bits % 2);
    add(std::nextafter(tie, kLargest), bits + 1);
  }
  for (const double number : {65536.0, double{kLargest}, double{INFINITY}}) add(number, kFinite);
  for (const double number : {0x1p-126, 0x1p-27}) add(number, 0);
  Weight weight(numbers);
  DeviceArray<std::uint16_t> one("grad_y", std::vector<std::uint16_t>{0x3c00}), grad_x("grad_x", numbers.size());
  DeviceArray<float> sums("sums", numbers.size());
  ExpectLaunched(
      CsrMatmulGradXCuda({weight.args, one.data(), FloatDtype::kFloat16, sums.data(), grad_x.data(), 1}, nullptr),
      "CsrMatmulGradXCuda");
  const std::vector<std::uint16_t> got = grad_x.Values();
  Expect((got[0] & 0x7fff) > kFinite, "NaN must stay NaN, got 0x%04x", unsigned{got[0]});
  for (std::size_t i = 1; i < got.size(); ++i) {
    Expect(got[i] == want[i], "%a must become 0x%04x, got 0x%04x", double{numbers[i]}, unsigned{want[i]},
           unsigned{got[i]});
  }
}

}  // namespace

int main() {
  bool first = true;
  return RunOnDevice([&] {
    if (first) TestReads(), TestRounds();  // the order of threads is nothing to them
    first = false;
  });
}
