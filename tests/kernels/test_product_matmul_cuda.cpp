// The CUDA kernels against sums in double, int8 to the bit against the scalar level, on shapes around their tiles and
// on damaged codes.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/product_matmul/product_matmul_cuda.h"
#include "kernels/product_weight.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct OnDevice {
  explicit OnDevice(const RandomProduct& w) : codes("codes", w.packed), codebooks("codebooks", w.codebooks) {
    args = w.args;
    args.codes = codes.data();
    args.codebooks = codebooks.data();
  }
  DeviceArray<std::uint8_t> codes;
  DeviceArray<float> codebooks;
  ProductWeight args;
};

std::vector<float> Multiply(const RandomProduct& w, FloatDtype floats_as, Index samples, bool quantized, bool relu,
                            const std::vector<float>& x_numbers, const std::vector<float>& bias_numbers) {
  OnDevice weight(w);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * w.shape.rows);
  DeviceArray<float> bias("bias", bias_numbers), lows("lows", samples * w.tables), ranges("ranges", samples * w.tables);
  DeviceArray<ProductScale> scales("scales", samples);
  const ProductCudaPlan plan = ProductPlanCuda(weight.args, samples, quantized);
  DeviceArray<std::uint8_t> parts("parts", ProductPartsBytes(weight.args, plan, samples, quantized));
  const ProductMatmulCudaArgs args{weight.args,
                                   x.data(),
                                   floats_as,
                                   plan,
                                   parts.data(),
                                   quantized ? lows.data() : nullptr,
                                   quantized ? ranges.data() : nullptr,
                                   quantized ? scales.data() : nullptr,
                                   bias.data(),
                                   relu,
                                   y.data(),
                                   samples};
  ExpectLaunched(ProductMatmulCuda(args, nullptr), "ProductMatmulCuda");
  return y.Values();
}

// One sample's int8 product of the scalar level.
std::vector<float> Int8OnCpu(const RandomProduct& w, const float* x, const std::vector<float>& bias) {
  ProductWeight weight = w.args;
  weight.codes = w.packed.data();
  weight.codebooks = w.codebooks.data();
  const Index tables = ProductTables(weight), tiles = ProductTiles(weight);
  std::vector<float> products(tables * ProductTableEntries(weight)), lows(tables), ranges(tables), y(w.shape.rows);
  std::vector<std::uint8_t> bytes(products.size());
  std::vector<std::uint32_t> sums(tiles * kProductRows);
  kProductScalar.make_tables({weight, x, 1, products.data()}, 0, tables);
  ProductQuantizeArgs args{weight, products.data(), lows.data(), ranges.data(), {}, bytes.data()};
  kProductScalar.measure_tables(args, 0, tables);
  args.scale = ProductScaleOf(args);
  kProductScalar.quantize_tables(args, 0, tables);
  kProductScalar.matmul_int8(
      {weight, bytes.data(), args.scale, sums.data(), bias.data(), false, y.data(), FloatDtype::kFloat32}, 0, tiles);
  return y;
}

void TestOne(const ProductShape& s, FloatDtype floats_as, Index samples, std::mt19937& rng) {
  const RandomProduct w(s, rng);
  const auto x = Random(samples * s.columns, rng), bias = Random(s.rows, rng);
  const auto got = Multiply(w, floats_as, samples, false, false, x, bias);
  const auto relu = Multiply(w, floats_as, samples, false, true, x, bias);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s, %ld x %ld, width %ld, entries %ld, stages %ld, %ld samples, floats %d", what, long{s.rows},
           long{s.columns}, long{s.width}, long{s.entries}, long{s.stages}, long{samples}, static_cast<int>(floats_as));
  };
  bool near = true, clipped = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < s.rows; ++r) {
      Sum sum;
      sum.Add(bias[r]);
      for (Index i = 0; i < w.tables; ++i) {
        const Index first = i % w.args.segments * s.width;
        for (Index j = 0; j < s.width && first + j < s.columns; ++j) {
          sum.Add(double{x[n * s.columns + first + j]} * w.Entry(r, i, j));
        }
      }
      const float value = got[n * s.rows + r];
      near = near && sum.Near(value, floats_as, 2);
      clipped = clipped && relu[n * s.rows + r] == (value < 0 ? 0 : value);
    }
  }
  complain(near, "y");
  complain(clipped, "relu");
  if (floats_as != FloatDtype::kFloat32) return;
  const auto int8 = Multiply(w, floats_as, samples, true, false, x, bias);
  for (Index n = 0; n < samples; ++n) {
    const auto expected = Int8OnCpu(w, x.data() + n * s.columns, bias);
    complain(std::memcmp(expected.data(), int8.data() + n * s.rows, 4 * s.rows) == 0, "int8 bits");
  }
  OnDevice weight(w);
  DeviceArray<float> dense("dense", s.rows * s.columns);
  ExpectLaunched(ProductDecodeCuda({weight.args, dense.data()}, nullptr), "ProductDecodeCuda");
  std::vector<float> expected(s.rows * s.columns);
  ProductWeight on_cpu = w.args;
  on_cpu.codes = w.packed.data();
  on_cpu.codebooks = w.codebooks.data();
  ProductDecode({on_cpu, expected.data()}, 0, ProductTiles(on_cpu));
  complain(dense.Values() == expected, "decode");
}

void TestNotFinite(std::mt19937& rng) {
  const RandomProduct w({65, 9, 2, 16, 1, false}, rng);
  auto x = Random(2 * 9, rng);
  x[13] = INFINITY;
  const auto got = Multiply(w, FloatDtype::kFloat32, 2, true, false, x, std::vector<float>(65, 0.0f));
  for (Index r = 0; r < 65; ++r) {
    Expect(std::isfinite(got[r]) && std::isnan(got[65 + r]), "not finite, row %ld", long{r});
  }
}

// Rows with such a code become NaN in every sample, the others stay. Of many tables the last is not in the first split.
void TestDamage(std::mt19937& rng) {
  const ProductShape shapes[] = {
      {70, 9, 2, 5, 1, false}, {70, 9, 2, 100, 1, false}, {67, 300, 2, 5, 1, false}, {67, 300, 2, 250, 1, false}};
  for (const ProductShape& s : shapes) {
    RandomProduct w(s, rng);
    w.SetCode(66, w.tables - 1, static_cast<std::uint8_t>(s.entries));
    for (const Index samples : {1, 3, 9}) {
      const auto x = Random(samples * s.columns, rng);
      for (const bool quantized : {false, true}) {
        const auto got =
            Multiply(w, FloatDtype::kFloat32, samples, quantized, true, x, std::vector<float>(s.rows, 0.0f));
        for (Index i = 0; i < samples * s.rows; ++i) {
          Expect(std::isnan(got[i]) == (i % s.rows == 66), "damage, row %ld of %ld columns, %ld entries, %ld samples",
                 long{i % s.rows}, long{s.columns}, long{s.entries}, long{samples});
        }
      }
    }
  }
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(3);
    for (const ProductShape& shape : kProductShapes) {
      if (shape.rows == 0) continue;
      for (const FloatDtype floats_as : kFloats) {
        for (const Index samples : {1, 3, 9}) {
          if (samples == 1 || floats_as == FloatDtype::kFloat32) TestOne(shape, floats_as, samples, rng);
        }
      }
    }
    for (const Index samples : {4, 67}) TestOne({65, 4, 2, 3, 1, false}, FloatDtype::kFloat32, samples, rng);
    TestNotFinite(rng);
    TestDamage(rng);
  });
}
