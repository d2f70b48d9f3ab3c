// Every variant against sums in double, on awkward shapes and unaligned memory, and against damaged weights.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/panels/panels.h"
#include "kernels/parts.h"

namespace tersetorch {
extern const CsrKernels kCsrAvx512OnAvx2;
extern const CsrKernels kCsrAvx2PlainLoads;
extern const CsrKernels kCsrAvx512PlainLoads;
}  // namespace tersetorch

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const CsrKernels& kernels;
};

// The same numbers in each way of storing them; codes go through a codebook.
struct Weight {
  Weight(Index rows, Index columns, double density, std::mt19937& rng, Index entries = 7)
      : rows(rows), columns(columns) {
    std::bernoulli_distribution kept(density);
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < columns; ++c) {
        if (kept(rng)) col_indices.push_back(static_cast<std::int32_t>(c));
      }
      row_offsets.push_back(static_cast<std::int32_t>(col_indices.size()));
    }
    codebook = Random(entries, rng);
    for (std::size_t k = 0; k < col_indices.size(); ++k) {
      codes.push_back(static_cast<std::uint8_t>(rng() % codebook.size()));
      values.push_back(codebook[codes.back()]);
      halves.push_back(Truncated(values.back()));
    }
  }

  Index rows, columns;
  std::vector<std::int32_t> row_offsets{0}, col_indices;
  std::vector<float> values, codebook;
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> codes;
};

// A weight's tensors in unaligned memory.
struct Stored {
  Stored(const Weight& w, CsrValues stored_as, CsrIndices indexed_by)
      : offsets(w.row_offsets),
        indices(w.col_indices),
        short_indices(std::vector<std::uint16_t>(w.col_indices.begin(), w.col_indices.end())),
        codebook(w.codebook),
        values(w.values),
        halves(w.halves),
        codes(w.codes) {
    const void* chosen = stored_as == CsrValues::kFloat32    ? static_cast<const void*>(values.data())
                         : stored_as == CsrValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                             : codes.data();
    const void* columns =
        indexed_by == CsrIndices::kInt32 ? static_cast<const void*>(indices.data()) : short_indices.data();
    args = {offsets.data(),
            columns,
            indexed_by,
            chosen,
            stored_as,
            codebook.data(),
            static_cast<Index>(w.codebook.size()),
            w.rows,
            w.columns,
            static_cast<Index>(w.col_indices.size())};
  }

  Unaligned<std::int32_t> offsets, indices;
  Unaligned<std::uint16_t> short_indices;
  Unaligned<float> codebook, values;
  Unaligned<std::uint16_t> halves;
  Unaligned<std::uint8_t> codes;
  CsrWeight args;
};

std::vector<float> Pack(const std::vector<float>& x, Index samples, Index features, Index width) {
  std::vector<float> panel(features * width, NAN);
  kPackPanelScalar({x.data(), FloatDtype::kFloat32, samples, features, panel.data(), width}, 0, features);
  return panel;
}

void TestOne(const Variant& variant, const Weight& w, CsrValues values_as, CsrIndices indexed_by, FloatDtype floats_as,
             Index samples, Index width, bool relu, std::mt19937& rng) {
  const CsrKernels& kernels = variant.kernels;
  Stored stored(w, values_as, indexed_by);
  const auto x = Random(samples * w.columns, rng), bias = Random(w.rows, rng), grad = Random(samples * w.rows, rng);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %ld x %ld, %ld of %ld samples, values %d, floats %d, relu %d", variant.name, what, long{w.rows},
           long{w.columns}, long{samples}, long{width}, static_cast<int>(values_as), static_cast<int>(floats_as),
           static_cast<int>(relu));
  };

  const auto x_panel = Pack(x, samples, w.columns, width);
  const auto grad_panel = Pack(grad, samples, w.rows, width);

  // y, whole and in two parts.
  Unaligned<float> stored_bias(bias);
  Output y(samples * w.rows, floats_as), parts(samples * w.rows, floats_as);
  CsrMatmulArgs args{stored.args, x_panel.data(), width, stored_bias.data(), relu, y.data(), floats_as, samples};
  complain(kernels.matmul(args, 0, w.rows) == CsrStatus::kOk, "matmul status");
  args.y = parts.data();
  InParts(w.rows / 3, w.rows, [&](Index begin, Index end) { kernels.matmul(args, begin, end); });
  const auto y_values = y.Values();
  complain(samples * w.rows == 0 ||
               std::memcmp(y_values.data(), parts.Values().data(), sizeof(float) * y_values.size()) == 0,
           "matmul in parts");
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < w.rows; ++r) {
      Sum want;
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        want.Add(double{w.values[k]} * x[n * w.columns + w.col_indices[k]]);
      }
      want.Add(bias[r]);
      const float got = y_values[n * w.rows + r];
      right &= relu && got == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                                : want.Near(got, floats_as) && !(relu && got < 0);
    }
  }
  complain(right, "matmul");

  // grad_x
  std::vector<float> sums(w.columns * width, NAN);
  Output grad_x(samples * w.columns, floats_as);
  const CsrGradXArgs grad_x_args{stored.args, grad_panel.data(), width, sums.data(), grad_x.data(), floats_as, samples};
  complain(kernels.grad_x(grad_x_args) == CsrStatus::kOk, "grad_x status");
  std::vector<Sum> want_x(samples * w.columns);
  for (Index r = 0; r < w.rows; ++r) {
    for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
      for (Index n = 0; n < samples; ++n) {
        want_x[n * w.columns + w.col_indices[k]].Add(double{w.values[k]} * grad[n * w.rows + r]);
      }
    }
  }
  const auto got_x = grad_x.Values();
  bool right_x = true;
  for (std::size_t i = 0; i < want_x.size(); ++i) right_x &= want_x[i].Near(got_x[i], floats_as);
  complain(right_x, "grad_x");

  // grad_values: replaced, then added once more in two parts, which doubles them exactly.
  std::vector<float> grad_values(w.col_indices.size(), NAN);
  CsrGradValuesArgs values_args{stored.args, grad_panel.data(), x_panel.data(), width, false, grad_values.data()};
  complain(kernels.grad_values(values_args, 0, w.rows) == CsrStatus::kOk, "grad_values status");
  bool right_values = true;
  for (Index r = 0; r < w.rows; ++r) {
    for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
      Sum want;
      for (Index n = 0; n < samples; ++n) {
        want.Add(double{grad[n * w.rows + r]} * x[n * w.columns + w.col_indices[k]]);
      }
      right_values &= want.Near(grad_values[k], FloatDtype::kFloat32);
    }
  }
  complain(right_values, "grad_values");
  auto doubled = grad_values;
  values_args.add = true;
  values_args.grad_values = doubled.data();
  InParts(w.rows / 3, w.rows, [&](Index begin, Index end) { kernels.grad_values(values_args, begin, end); });
  bool twice = true;
  for (std::size_t k = 0; k < doubled.size(); ++k) twice &= doubled[k] == 2 * grad_values[k];
  complain(twice, "grad_values added");
}

void TestShapes(const Variant& variant) {
  std::mt19937 rng(1234);
  int turn = 0;
  const struct {
    Index rows, columns;
    double density;
  } shapes[] = {{1, 1, 1.0},    {7, 9, 0.5},   {64, 8, 0.3},  {65, 100, 0.1}, {131, 37, 0.2}, {10, 300, 0.08},
                {40, 100, 0.6}, {3, 257, 1.0}, {20, 50, 0.0}, {5, 0, 0.0},    {0, 5, 0.0}};
  for (const auto& shape : shapes) {
    const Weight w(shape.rows, shape.columns, shape.density, rng, shape.rows % 2 == 0 ? 7 : 100);
    for (const Index width : {1, 8, 16, 32}) {
      for (const Index samples : {Index{1}, width / 2 + 1, width}) {
        for (const CsrValues values_as : {CsrValues::kFloat32, CsrValues::kBFloat16, CsrValues::kCodes}) {
          for (const CsrIndices indexed_by : {CsrIndices::kInt32, CsrIndices::kUInt16}) {
            for (const FloatDtype floats_as : kFloats) {
              TestOne(variant, w, values_as, indexed_by, floats_as, samples, width, turn++ % 2 == 0, rng);
            }
          }
        }
      }
    }
  }
}

// Each damage must be met by its status in every function that reads the damaged part, wherever in the row it lies.
void TestDamage(const Variant& variant) {
  std::mt19937 rng(99);
  const Weight good(40, 50, 0.9, rng);  // more non-zeros than a kernel checks at once
  const auto expect = [&](const Weight& w, CsrStatus want, bool values_too, const char* what) {
    for (const CsrIndices indexed_by : {CsrIndices::kInt32, CsrIndices::kUInt16}) {
      const auto [low, high] = std::minmax_element(w.col_indices.begin(), w.col_indices.end());
      if (indexed_by == CsrIndices::kUInt16 && (*low < 0 || *high > 0xffff)) continue;
      for (const Index width : {1, 8, 16, 32}) {
        const CsrValues stored_as = want == CsrStatus::kBadCode ? CsrValues::kCodes : CsrValues::kFloat32;
        Stored stored(w, stored_as, indexed_by);
        std::vector<float> panel(w.columns * width), grads(w.rows * width), y(w.rows * width);
        std::vector<float> sums(w.columns * width), grad_x(w.columns * width), grad_values(w.col_indices.size());
        const auto check = [&](CsrStatus got, CsrStatus wanted, const char* function) {
          Expect(got == wanted, "%s: %s in %s, width %ld, got %d", variant.name, what, function, long{width},
                 static_cast<int>(got));
        };
        const CsrMatmulArgs args{stored.args, panel.data(),         width, nullptr, false,
                                 y.data(),    FloatDtype::kFloat32, width};
        check(variant.kernels.matmul(args, 0, w.rows), want, "matmul");
        if (want == CsrStatus::kBadRowOffsets)
          check(variant.kernels.matmul(args, 4, w.rows), want, "matmul from row 4");
        const CsrGradXArgs grad_x_args{stored.args,   grads.data(),         width, sums.data(),
                                       grad_x.data(), FloatDtype::kFloat32, width};
        check(variant.kernels.grad_x(grad_x_args), want, "grad_x");
        const CsrGradValuesArgs values_args{stored.args, grads.data(), panel.data(), width, false, grad_values.data()};
        check(variant.kernels.grad_values(values_args, 0, w.rows), values_too ? want : CsrStatus::kOk, "grad_values");
      }
    }
  };
  const std::size_t last = good.col_indices.size() - 1;
  for (const std::size_t k : {std::size_t{0}, std::size_t{5}, std::size_t{43}, last}) {
    for (const std::int32_t column : {50, -1, 1 << 30, INT32_MIN, INT32_MAX}) {
      Weight bad = good;
      bad.col_indices[k] = column;
      expect(bad, CsrStatus::kBadColumn, true, "a column outside");
    }
    for (const int code : {7, 255}) {
      Weight bad = good;
      bad.codes[k] = static_cast<std::uint8_t>(code);
      expect(bad, CsrStatus::kBadCode, false, "a code outside");
    }
  }
  for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX, static_cast<std::int32_t>(last) + 2}) {
    Weight bad = good;
    bad.row_offsets[4] = offset;
    expect(bad, CsrStatus::kBadRowOffsets, true, "an offset outside");
  }
  Weight falling = good;
  std::swap(falling.row_offsets[4], falling.row_offsets[5]);
  expect(falling, CsrStatus::kBadRowOffsets, true, "falling offsets");
  expect(good, CsrStatus::kOk, true, "nothing");
}

// What bfloat16 outputs do with ties, infinities and NaN.
void TestRounding(const Variant& variant) {
  const float inputs[] = {1.0f,
                          1.00390625f,              // halfway between 1 and 1 + 2^-7: to even, 1
                          1.01171875f,              // halfway, to even: 1 + 2^-6
                          -1.00390625f - 0x1p-20f,  // just over halfway
                          3.4e38f,                  // rounds to infinity
                          INFINITY,
                          -INFINITY,
                          std::bit_cast<float>(0x7f800001u),  // a NaN whose upper half alone would be infinity
                          std::bit_cast<float>(0x7fffffffu),  // a NaN that would be rounded to -0
                          0x1p-140f};
  const std::uint16_t want[] = {0x3f80, 0x3f80, 0x3f82, 0xbf81, 0x7f80, 0x7f80, 0xff80, 0x7fc0, 0x7fff, 0x0000};
  constexpr Index kCount = std::size(inputs);
  const std::int32_t offsets[kCount + 1] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, indices[kCount] = {};
  for (const Index width : {1, 8}) {
    std::vector<float> panel(width, 1.0f);
    std::uint16_t y[kCount * 8];
    const CsrWeight weight{offsets, indices, CsrIndices::kInt32, inputs, CsrValues::kFloat32, nullptr, 0, kCount,
                           1,       kCount};
    variant.kernels.matmul({weight, panel.data(), width, nullptr, false, y, FloatDtype::kBFloat16, 1}, 0, kCount);
    for (Index i = 0; i < kCount; ++i) {
      Expect(y[i] == want[i], "%s: %g as bfloat16, got %04x", variant.name, double{inputs[i]}, unsigned{y[i]});
    }
  }
}

// relu keeps NaN, and what is above 0.
void TestRelu(const Variant& variant) {
  const std::int32_t offsets[] = {0, 1, 2, 3, 4}, indices[] = {0, 0, 0, 0};
  const float values[] = {NAN, -2, 3, -INFINITY};
  const CsrWeight weight{offsets, indices, CsrIndices::kInt32, values, CsrValues::kFloat32, nullptr, 0, 4, 1, 4};
  for (const Index width : {1, 8, 16, 32}) {
    std::vector<float> panel(width, 1.0f), y(4 * width);
    variant.kernels.matmul({weight, panel.data(), width, nullptr, true, y.data(), FloatDtype::kFloat32, width}, 0, 4);
    for (Index n = 0; n < width; ++n) {
      const float* got = y.data() + 4 * n;
      Expect(std::isnan(got[0]) && got[1] == 0 && got[2] == 3 && got[3] == 0, "%s: relu, width %ld, got %g %g %g %g",
             variant.name, long{width}, double{got[0]}, double{got[1]}, double{got[2]}, double{got[3]});
    }
  }
}

// Which of the two ways to read one sample is faster must not show in the result.
void TestSameBits(const CsrKernels& gathers, const CsrKernels& loads) {
  std::mt19937 rng(5);
  for (const Index entries : {7, 32, 33, 256}) {
    const Weight w(50, 300, 0.4, rng, entries);
    const auto x = Random(w.columns, rng);
    for (const CsrValues stored_as : {CsrValues::kFloat32, CsrValues::kBFloat16, CsrValues::kCodes}) {
      Stored stored(w, stored_as, CsrIndices::kUInt16);
      std::vector<float> y(w.rows), same(w.rows);
      gathers.matmul({stored.args, x.data(), 1, nullptr, false, y.data(), FloatDtype::kFloat32, 1}, 0, w.rows);
      loads.matmul({stored.args, x.data(), 1, nullptr, false, same.data(), FloatDtype::kFloat32, 1}, 0, w.rows);
      Expect(std::memcmp(y.data(), same.data(), sizeof(float) * w.rows) == 0, "gathers and loads differ, values %d",
             static_cast<int>(stored_as));
    }
  }
}

}  // namespace

int main() {
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kCsrScalar},
                              {"avx2", CpuIsa::kAvx2, kCsrAvx2},
                              {"avx512", CpuIsa::kAvx512, kCsrAvx512},
                              {"avx2 without gathers", CpuIsa::kAvx2, kCsrAvx2PlainLoads},
                              {"avx512 without gathers", CpuIsa::kAvx512, kCsrAvx512PlainLoads},
                              {"avx512 source on avx2", CpuIsa::kAvx2, kCsrAvx512OnAvx2}};
  for (const Variant& variant : variants) {
    if (variant.needs > ProcessCpuIsa().detected) continue;
    TestShapes(variant);
    TestDamage(variant);
    TestRounding(variant);
    TestRelu(variant);
  }
  if (CpuIsa::kAvx2 <= ProcessCpuIsa().detected) TestSameBits(kCsrAvx2, kCsrAvx2PlainLoads);
  if (CpuIsa::kAvx512 <= ProcessCpuIsa().detected) TestSameBits(kCsrAvx512, kCsrAvx512PlainLoads);
  return Failures() != 0;
}
