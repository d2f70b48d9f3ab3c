// The CUDA kernels against sums in double, on shapes around their tiles and on damaged weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/scalars.h"
#include "kernels/csr_matmul/csr_matmul_cuda.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

// The same numbers in each way of storing them; codes go through a codebook of 7 entries.
struct Weight {
  // Row r has row_lengths[r % size] non-zeros, at random columns.
  Weight(Index rows, Index columns, const std::vector<Index>& row_lengths, std::mt19937& rng)
      : rows(rows), columns(columns), codebook(Random(7, rng)) {
    for (Index r = 0; r < rows; ++r) {
      const Index length = columns == 0 ? 0 : row_lengths[r % row_lengths.size()];
      for (Index i = 0; i < length; ++i) {
        col_indices.push_back(static_cast<std::int32_t>(rng() % columns));
        codes.push_back(static_cast<std::uint8_t>(rng() % codebook.size()));
        values.push_back(codebook[codes.back()]);
        halves.push_back(Truncated(values.back()));
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
  }
  Index nnz() const { return static_cast<Index>(col_indices.size()); }

  Index rows, columns;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> codebook, values;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

struct OnDevice {
  OnDevice(const Weight& w, CsrValues stored_as, CsrIndices indexed_by)
      : offsets("row_offsets", w.row_offsets),
        indices("col_indices", w.col_indices),
        narrow_indices("col_indices", std::vector<std::uint16_t>(w.col_indices.begin(), w.col_indices.end())),
        codebook("codebook", w.codebook),
        values("values", w.values),
        halves("values", w.halves),
        codes("codes", w.codes) {
    args.row_offsets = offsets.data();
    args.indexed_by = indexed_by;
    args.col_indices =
        indexed_by == CsrIndices::kInt32 ? static_cast<const void*>(indices.data()) : narrow_indices.data();
    args.stored_as = stored_as;
    args.values = stored_as == CsrValues::kFloat32    ? static_cast<const void*>(values.data())
                  : stored_as == CsrValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                      : codes.data();
    args.codebook = codebook.data();
    args.entries = static_cast<Index>(w.codebook.size());
    args.rows = w.rows;
    args.columns = w.columns;
    args.nnz = w.nnz();
  }

  DeviceArray<std::int32_t> offsets, indices;
  DeviceArray<std::uint16_t> narrow_indices;
  DeviceArray<float> codebook, values;
  DeviceArray<std::uint16_t> halves;
  DeviceArray<std::uint8_t> codes;
  CsrWeight args{};
};

struct Results {
  std::vector<float> y, grad_x, grad_values;
};

Results Run(const Weight& w, CsrValues values_as, FloatDtype floats_as, Index samples,
            const std::vector<float>& x_numbers, const std::vector<float>& grad_numbers,
            const std::vector<float>* bias_numbers, CsrIndices indexed_by = CsrIndices::kInt32, bool relu = false) {
  OnDevice weight(w, values_as, indexed_by);
  DeviceFloats x("x", floats_as, x_numbers), grad("grad_y", floats_as, grad_numbers);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  DeviceFloats y("y", floats_as, samples * w.rows), grad_x("grad_x", floats_as, samples * w.columns);
  DeviceArray<float> sums("sums", samples * w.columns), grad_values("grad_values", w.nnz());
  DeviceArray<float> panels("panels", (samples + 7) / 8 * 8 * w.columns);
  ExpectLaunched(CsrMatmulCuda({weight.args, x.data(), floats_as, bias_numbers == nullptr ? nullptr : bias.data(), relu,
                                y.data(), samples, panels.data()},
                               nullptr),
                 "CsrMatmulCuda");
  float* scratch = floats_as == FloatDtype::kFloat32 ? grad_x.floats.data() : sums.data();
  ExpectLaunched(CsrMatmulGradXCuda({weight.args, grad.data(), floats_as, scratch, grad_x.data(), samples}, nullptr),
                 "CsrMatmulGradXCuda");
  ExpectLaunched(CsrMatmulGradValuesCuda(
                     {weight.args, grad.data(), floats_as, x.data(), floats_as, grad_values.data(), samples}, nullptr),
                 "CsrMatmulGradValuesCuda");
  // The same numbers, of which x is stored in the other way.
  const FloatDtype other = floats_as == FloatDtype::kFloat32 ? FloatDtype::kBFloat16 : FloatDtype::kFloat32;
  DeviceFloats other_x("x", other, x_numbers);
  DeviceArray<float> again("grad_values", w.nnz());
  ExpectLaunched(CsrMatmulGradValuesCuda(
                     {weight.args, grad.data(), floats_as, other_x.data(), other, again.data(), samples}, nullptr),
                 "CsrMatmulGradValuesCuda");
  const auto first = grad_values.Values(), second = again.Values();
  Expect(first.empty() || std::memcmp(first.data(), second.data(), first.size() * sizeof(float)) == 0,
         "grad_values where x is stored in another way");
  return {y.Values(), grad_x.Values(), grad_values.Values()};
}

void TestOne(const Weight& w, CsrValues values_as, FloatDtype floats_as, Index samples, bool with_bias,
             std::mt19937& rng, CsrIndices indexed_by = CsrIndices::kInt32) {
  const auto x = Random(samples * w.columns, rng), grad = Random(samples * w.rows, rng), bias = Random(w.rows, rng);
  const bool relu = samples % 2 == 1;
  const Results got = Run(w, values_as, floats_as, samples, x, grad, with_bias ? &bias : nullptr, indexed_by, relu);
  std::vector<Sum> y(samples * w.rows), grad_x(samples * w.columns), grad_values(w.nnz());
  for (Index r = 0; r < w.rows; ++r) {
    for (Index n = 0; n < samples; ++n) {
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        const Index c = w.col_indices[k];
        y[n * w.rows + r].Add(double{w.values[k]} * x[n * w.columns + c]);
        grad_x[n * w.columns + c].Add(double{w.values[k]} * grad[n * w.rows + r]);
        grad_values[k].Add(double{grad[n * w.rows + r]} * x[n * w.columns + c]);
      }
      if (with_bias) y[n * w.rows + r].Add(bias[r]);
    }
  }
  const auto compare = [&](const std::vector<Sum>& want, const std::vector<float>& numbers, FloatDtype stored_as,
                           const char* what, bool floored = false) {
    bool right = want.size() == numbers.size();
    for (std::size_t i = 0; i < want.size(); ++i) {
      right &= floored && numbers[i] == 0 ? want[i].value <= std::ldexp((want[i].terms + 1) * want[i].magnitude, -24)
                                          : want[i].Near(numbers[i], stored_as) && !(floored && numbers[i] < 0);
    }
    Expect(right, "%s: %ld x %ld, nnz %ld, values %d, floats %d, samples %ld", what, long{w.rows}, long{w.columns},
           long{w.nnz()}, static_cast<int>(values_as), static_cast<int>(floats_as), long{samples});
  };
  compare(y, got.y, floats_as, "y", relu);
  compare(grad_x, got.grad_x, floats_as, "grad_x");
  compare(grad_values, got.grad_values, FloatDtype::kFloat32, "grad_values");
}

constexpr CsrValues kValues[] = {CsrValues::kFloat32, CsrValues::kBFloat16, CsrValues::kCodes};

void TestShapes() {
  std::mt19937 rng(1234);
  const struct {
    Index rows, columns;
    std::vector<Index> row_lengths;
  } shapes[] = {{1, 1, {1}},         {3, 9, {2, 0, 5}},         {4, 40, {31, 32, 33}}, {5, 100, {0, 64, 65, 1}},
                {37, 11, {3, 0, 0}}, {9, 50, {0, 0, 97, 0, 0}}, {20, 50, {0}},         {5, 0, {0}},
                {0, 5, {0}}};
  int turn = 0;
  for (const auto& shape : shapes) {
    const Weight w(shape.rows, shape.columns, shape.row_lengths, rng);
    for (const Index samples : {0, 1, 7, 8, 9, 17}) {
      for (const CsrValues values_as : kValues) {
        for (const FloatDtype floats_as : kFloats) TestOne(w, values_as, floats_as, samples, turn++ % 2 == 0, rng);
      }
      TestOne(w, kValues[turn % 3], FloatDtype::kFloat16, samples, turn % 2 == 0, rng);
    }
  }
}

// NaN and infinity reach the rows whose stored weights meet them, and no others.
void TestInfinities() {
  std::mt19937 rng(5);
  Weight w(3, 4, {1}, rng);
  w.col_indices = {0, 1, 2};
  w.values = {2, INFINITY, 3};
  for (const bool relu : {false, true}) {
    const Results got = Run(w, CsrValues::kFloat32, FloatDtype::kFloat32, 1, {NAN, 0, INFINITY, NAN}, {1, 1, 1},
                            nullptr, CsrIndices::kInt32, relu);
    Expect(std::isnan(got.y[0]) && std::isnan(got.y[1]) && got.y[2] == INFINITY, "NaN and infinity in y");
    Expect(got.grad_x[0] == 2 && got.grad_x[1] == INFINITY && got.grad_x[2] == 3 && got.grad_x[3] == 0,
           "NaN and infinity in grad_x");
  }
}

// Results are stored as bfloat16 to the bit as on the CPU: ties, the largest numbers, and a NaN of all bits.
void TestRounding() {
  std::mt19937 rng(6);
  const std::vector<std::uint32_t> bits = {0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0xbf808000, 0xbf818000,
                                           0x7f7fffff, 0x00008000, 0x00018000, 0x7f800000, 0x7fffffff, 0xffffffff};
  Weight w(static_cast<Index>(bits.size()), 1, {1}, rng);
  std::memcpy(w.values.data(), bits.data(), 4 * bits.size());
  for (const Index samples : {1, 2}) {
    const Results got = Run(w, CsrValues::kFloat32, FloatDtype::kBFloat16, samples, std::vector<float>(samples, 1.0f),
                            std::vector<float>(samples * w.rows, 1.0f), nullptr);
    for (Index i = 0; i < samples * w.rows; ++i) {
      const float value = w.values[i % w.rows], want = Widened(ToBFloat16(value));
      Expect(std::isnan(value) ? std::isnan(got.y[i]) : got.y[i] == want, "%a rounded to %a, want %a", double{value},
             double{got.y[i]}, double{want});
    }
  }
}

// Damage becomes NaN where the contract says, and changes no other row.
void TestDamage() {
  std::mt19937 rng(99);
  const Weight good(10, 50, {45, 3, 0, 1, 33}, rng);
  const Index samples = 9;
  const auto x = Random(samples * good.columns, rng), grad = Random(samples * good.rows, rng);
  const Results want = Run(good, CsrValues::kCodes, FloatDtype::kFloat32, samples, x, grad, nullptr);
  const auto expect = [&](const Weight& bad, std::vector<Index> rows, Index k, const char* what) {
    for (const FloatDtype floats_as : kFloats) {
      const Results got = Run(bad, CsrValues::kCodes, floats_as, samples, x, grad, nullptr);
      bool right = true;
      for (Index i = 0; i < samples * good.rows; ++i) {
        const bool damaged = std::find(rows.begin(), rows.end(), i % good.rows) != rows.end();
        right &= damaged ? std::isnan(got.y[i]) : floats_as == FloatDtype::kBFloat16 || got.y[i] == want.y[i];
      }
      Expect(right, "%s: y", what);
      Expect(std::all_of(got.grad_x.begin(), got.grad_x.end(), [](float g) { return std::isnan(g); }), "%s: grad_x",
             what);
      if (k >= 0) Expect(std::isnan(got.grad_values[k]), "%s: grad_values", what);
    }
  };
  const Index last = good.nnz() - 1;
  const auto row_of = [&](Index k) {
    Index r = 0;
    while (good.row_offsets[r + 1] <= k) ++r;
    return r;
  };
  for (const Index k : {Index{0}, Index{44}, Index{45}, Index{48}, last}) {
    for (const std::int32_t column : {50, -1, 1 << 30, INT32_MIN, INT32_MAX}) {
      Weight bad = good;
      bad.col_indices[k] = column;
      expect(bad, {row_of(k)}, k, "a column outside");
    }
    Weight bad = good;
    bad.codes[k] = static_cast<std::uint8_t>(k % 2 == 0 ? 7 : 255);
    expect(bad, {row_of(k)}, -1, "a code outside");
  }
  for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX, static_cast<std::int32_t>(last) + 2}) {
    Weight bad = good;
    bad.row_offsets[4] = offset;
    expect(bad, {3, 4}, -1, "an offset outside");
  }
  Weight falling = good;
  std::swap(falling.row_offsets[4], falling.row_offsets[5]);
  const Results fallen = Run(falling, CsrValues::kCodes, FloatDtype::kFloat32, samples, x, grad, nullptr);
  Expect(std::isnan(fallen.y[4]) && std::isnan(fallen.grad_x[0]), "falling offsets");
  for (const bool first : {true, false}) {
    Weight bad = good;
    (first ? bad.row_offsets.front() : bad.row_offsets.back()) += first ? 1 : -1;
    const Results got = Run(bad, CsrValues::kCodes, FloatDtype::kFloat32, samples, x, grad, nullptr);
    Expect(
        std::isnan(got.y[first ? 0 : good.rows - 1]) && std::isnan(got.grad_x[0]) && std::isnan(got.grad_values[last]),
        "offsets that do not run from 0 to nnz");
  }
}

// Without a driver a launch returns an error and the program goes on.
void TestWithoutDriver() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices != 0) return;
  CsrMatmulCudaArgs args{};
  args.weight.rows = args.samples = 1;
  const int error = CsrMatmulCuda(args, nullptr);
  Expect(error == 35 || error == 100, "no driver, or no device, got %d", error);
}

// More rows than the grid's y axis takes blocks, more samples than it is given; as many columns as 16 bits name.
void TestLargeGrids() {
  std::mt19937 rng(7);
  TestOne(Weight(65536 + 3, 5, {0, 1}, rng), CsrValues::kFloat32, FloatDtype::kFloat32, 1, true, rng);
  TestOne(Weight(2, 65536, {70}, rng), CsrValues::kFloat32, FloatDtype::kFloat32, 1, true, rng, CsrIndices::kUInt16);
  TestOne(Weight(1, 1, {1}, rng), CsrValues::kFloat32, FloatDtype::kBFloat16, 8192 * 8 + 9, false, rng);
}

}  // namespace

int main() {
  TestWithoutDriver();
  bool first = true;
  return RunOnDevice([&] {
    TestShapes();
    TestInfinities();
    TestRounding();
    TestDamage();
    if (first) TestLargeGrids();
    first = false;
  });
}
