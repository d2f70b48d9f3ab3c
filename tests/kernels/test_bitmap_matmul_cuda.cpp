// The CUDA kernels against sums in double, and quantized to the bit against the scalar level, on shapes around their
// tiles and on damaged weights.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <iterator>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/bitmap_matmul/bitmap_matmul_cuda.h"
#include "kernels/bitmap_weight.h"
#include "kernels/check.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct OnDevice {
  explicit OnDevice(const RandomBitmap& w)
      : bitmap("bitmap", w.bitmap),
        offsets("row_offsets", w.row_offsets),
        codebook("codebook", w.codebook),
        scales("scales", w.scales),
        values("values", w.values),
        halves("values", w.halves),
        codes("codes", w.codes) {
    const void* chosen = w.way.stored_as == BitmapValues::kFloat32    ? static_cast<const void*>(values.data())
                         : w.way.stored_as == BitmapValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                                      : codes.data();
    args = {bitmap.data(), offsets.data(), chosen, w.way.stored_as, codebook.data(),
            w.way.entries, scales.data(),  w.rows, w.columns,       static_cast<Index>(w.values.size())};
  }

  DeviceArray<std::uint64_t> bitmap;
  DeviceArray<std::int32_t> offsets;
  DeviceArray<float> codebook, scales, values;
  DeviceArray<std::uint16_t> halves;
  DeviceArray<std::uint8_t> codes;
  BitmapWeight args;
};

std::vector<float> Multiply(const RandomBitmap& w, FloatDtype floats_as, Index samples,
                            const std::vector<float>& x_numbers, const std::vector<float>* bias_numbers, bool relu) {
  OnDevice weight(w);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * w.rows);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  DeviceArray<std::int8_t> quantized("quantized", samples * w.columns);
  DeviceArray<float> x_scales("x_scales", samples);
  BitmapMatmulCudaArgs args{weight.args, x.data(), floats_as, nullptr, bias_numbers == nullptr ? nullptr : bias.data(),
                            relu,        y.data(), samples,   nullptr};
  if (w.way.quantized) {
    ExpectLaunched(
        BitmapQuantizeCuda({x.data(), floats_as, samples, w.columns, quantized.data(), x_scales.data()}, nullptr),
        "BitmapQuantizeCuda");
    args.x = quantized.data();
    args.x_scales = x_scales.data();
  }
  DeviceArray<unsigned char> scratch("scratch", BitmapScratchBytes(args));
  args.scratch = scratch.data();
  ExpectLaunched(BitmapMatmulCuda(args, nullptr), "BitmapMatmulCuda");
  return y.Values();
}

// The product of the scalar level.
std::vector<float> MultiplyOnCpu(const RandomBitmap& w, FloatDtype floats_as, Index samples,
                                 const std::vector<float>& x_numbers, const std::vector<float>* bias, bool relu) {
  const std::vector<std::uint16_t> halves = DeviceFloats::Halves(x_numbers);
  const BitmapWeight weight{
      w.bitmap.data(), w.row_offsets.data(), w.codes.data(), w.way.stored_as, w.codebook.data(),
      w.way.entries,   w.scales.data(),      w.rows,         w.columns,       static_cast<Index>(w.values.size())};
  std::vector<float> values;
  for (Index n = 0; n < samples; ++n) {
    const void* x = floats_as == FloatDtype::kFloat32 ? static_cast<const void*>(x_numbers.data() + n * w.columns)
                                                      : halves.data() + n * w.columns;
    std::vector<unsigned char> panel(BitmapPanelBytes(w.columns, 1));
    float x_scale;
    Output y(w.rows, floats_as);
    kBitmapScalar.pack_samples(
        {x, floats_as, 1, w.columns, w.way.stored_as, w.way.entries, w.way.quantized, panel.data(), &x_scale});
    kBitmapScalar.matmul({weight, panel.data(), 1, w.way.quantized, true, &x_scale,
                          bias == nullptr ? nullptr : bias->data(), relu, y.data(), floats_as},
                         0, w.rows);
    const auto of_sample = y.Values();
    values.insert(values.end(), of_sample.begin(), of_sample.end());
  }
  return values;
}

bool Same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void TestOne(const RandomBitmap& w, FloatDtype floats_as, Index samples, bool with_bias, bool relu, std::mt19937& rng) {
  auto x = Random(samples * w.columns, rng);
  const auto bias = Random(w.rows, rng), *chosen = with_bias ? &bias : nullptr;
  if (w.way.quantized && w.columns != 0) {
    // Samples that have no scale.
    const float odd[] = {NAN, INFINITY, -INFINITY, 1e-45f};
    for (Index n = 2; n < samples; n += 3) x[n * w.columns + rng() % w.columns] = odd[n % 4];
  }
  const auto got = Multiply(w, floats_as, samples, x, chosen, relu);
  bool right = true;
  if (w.way.quantized) {
    const auto want = MultiplyOnCpu(w, floats_as, samples, x, chosen, relu);
    for (std::size_t i = 0; i < want.size(); ++i) right &= Same(got[i], want[i]);
  } else {
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < w.rows; ++r) {
        Sum want;
        for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
          want.Add(double{w.values[k]} * w.Scale(r) * x[n * w.columns + w.col_indices[k]]);
        }
        if (with_bias) want.Add(bias[r]);
        ++want.terms;  // the scale rounds once more
        const float y = got[n * w.rows + r];
        right &= relu && y == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                                : want.Near(y, floats_as) && !(relu && y < 0);
      }
    }
  }
  Expect(right, "%ld x %ld, values %d of %ld, quantized %d, floats %d, samples %ld, relu %d", long{w.rows},
         long{w.columns}, static_cast<int>(w.way.stored_as), long{w.way.entries}, int{w.way.quantized},
         static_cast<int>(floats_as), long{samples}, int{relu});
}

std::vector<float> Columns(const RandomBitmap& w, FloatDtype floats_as, Index samples,
                           const std::vector<float>& x_numbers, const std::vector<float>* bias_numbers, bool relu) {
  OnDevice weight(w);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * w.columns);
  DeviceArray<float> bias("bias", bias_numbers == nullptr ? std::vector<float>() : *bias_numbers);
  ExpectLaunched(BitmapColumnsCuda({weight.args, x.data(), floats_as, bias_numbers == nullptr ? nullptr : bias.data(),
                                    relu, y.data(), samples},
                                   nullptr),
                 "BitmapColumnsCuda");
  return y.Values();
}

void TestOneByColumns(const RandomBitmap& w, FloatDtype floats_as, Index samples, bool with_bias, bool relu,
                      std::mt19937& rng) {
  auto x = Random(samples * w.rows, rng);
  for (float& number : x) number = rng() % 2 == 0 ? number : rng() % 2 == 0 ? 0.0f : -0.0f;
  const auto bias = Random(w.columns, rng);
  const auto got = Columns(w, floats_as, samples, x, with_bias ? &bias : nullptr, relu);
  std::vector<Sum> want(samples * w.columns);
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < w.rows; ++r) {
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        want[n * w.columns + w.col_indices[k]].Add(double{w.values[k]} * x[n * w.rows + r]);
      }
    }
  }
  bool right = true;
  for (std::size_t i = 0; i < want.size(); ++i) {
    if (with_bias) want[i].Add(bias[i % w.columns]);
    right &= relu && got[i] == 0 ? want[i].value <= std::ldexp((want[i].terms + 1) * want[i].magnitude, -24)
                                 : want[i].Near(got[i], floats_as) && !(relu && got[i] < 0);
  }
  Expect(right, "columns: %ld x %ld, values %d, floats %d, samples %ld, relu %d", long{w.rows}, long{w.columns},
         static_cast<int>(w.way.stored_as), static_cast<int>(floats_as), long{samples}, int{relu});
}

// One of each way of storing: the device does not tell codebooks of different sizes apart.
constexpr BitmapWay kWays[] = {{BitmapValues::kFloat32, 0, false},
                               {BitmapValues::kBFloat16, 0, false},
                               {BitmapValues::kCodes, 33, false},
                               {BitmapValues::kInt8, 0, false},
                               {BitmapValues::kInt8, 0, true}};

void TestShapes() {
  std::mt19937 rng(1234);
  const struct {
    Index rows, columns;
    double density;
  } shapes[] = {{1, 1, 1.0},  {3, 31, 0.3}, {4, 32, 1.0},  {5, 63, 0.3},   {9, 64, 0.5},  {7, 65, 1.0},
                {10, 0, 0.0}, {0, 70, 0.0}, {8, 200, 0.0}, {13, 131, 0.2}, {5, 300, 0.05}};
  int turn = 0;
  for (const auto& shape : shapes) {
    for (const BitmapWay& way : kWays) {
      const RandomBitmap w(shape.rows, shape.columns, shape.density, way, rng);
      for (const Index samples : {0, 1, 7, 8, 9}) {
        for (const FloatDtype floats_as : kFloats) {
          TestOne(w, floats_as, samples, turn % 2 == 0, turn % 3 == 0, rng);
          ++turn;
        }
      }
    }
  }
}

// A weight kept by columns is transposed here: its rows are features. A warp has 256 outputs, a block 1024.
void TestShapesByColumns() {
  std::mt19937 rng(4321);
  const struct {
    Index rows, columns;
    double density;
  } shapes[] = {{1, 1, 1.0},   {5, 63, 0.3},  {9, 64, 0.5},   {7, 65, 1.0},   {10, 0, 0.0},  {0, 70, 0.0},
                {8, 200, 0.0}, {6, 255, 0.2}, {13, 257, 0.2}, {5, 1025, 0.1}, {4, 2113, 0.3}};
  int turn = 0;
  for (const auto& shape : shapes) {
    for (const BitmapWay& way : kWays) {
      if (way.stored_as == BitmapValues::kInt8) continue;
      const RandomBitmap w(shape.rows, shape.columns, shape.density, way, rng);
      for (const Index samples : {0, 1, 3}) {
        for (const FloatDtype floats_as : kFloats) {
          TestOneByColumns(w, floats_as, samples, turn % 2 == 0, turn % 3 == 0, rng);
          ++turn;
        }
      }
    }
  }
}

// Tiles of tensor cores: 64 rows, 64 or 128 samples, words of 64 columns, and parts of 8 words or more. A warp counts
// 32 words at a time, a block packs 2048 columns of bfloat16 or 4096 of int8.
void TestTiles() {
  std::mt19937 rng(77);
  const struct {
    int way;
    Index rows, columns;
    double density;
    Index samples;
  } shapes[] = {{1, 1, 1, 1.0, 10},     {4, 3, 31, 1.0, 9},     {1, 63, 63, 0.3, 17},   {4, 64, 64, 0.6, 63},
                {1, 65, 65, 0.5, 64},   {4, 17, 0, 0.0, 10},    {4, 5, 127, 0.1, 65},   {1, 16, 129, 0.4, 127},
                {1, 15, 200, 0.0, 128}, {4, 33, 192, 0.9, 129}, {4, 13, 1023, 0.3, 12}, {1, 67, 1025, 0.1, 9},
                {4, 3, 1600, 0.5, 66},  {1, 3, 2200, 0.3, 9},   {4, 2, 4200, 0.2, 9}};
  int turn = 0;
  for (const auto& shape : shapes) {
    const RandomBitmap w(shape.rows, shape.columns, shape.density, kWays[shape.way], rng);
    const FloatDtype floats_as = w.way.quantized ? kFloats[turn / 2 % 2] : FloatDtype::kBFloat16;
    TestOne(w, floats_as, shape.samples, turn % 3 != 0, turn % 4 == 0, rng);
    ++turn;
  }
}

// By tiles whose columns are in parts: what is not finite in a sample meets the set bits alone, an infinite value meets
// its row alone, and a damaged row is NaN.
void TestOddTiles() {
  std::mt19937 rng(6);
  const struct {
    int way;
    Index columns;
  } cases[] = {{1, 1090}, {4, 1090}, {1, 2200}};
  for (const auto& one : cases) {
    RandomBitmap w(9, one.columns, 0.3, kWays[one.way], rng);
    const Index samples = 10, words = BitmapWords(w.columns);
    w.halves[w.row_offsets[5] + 7] = Truncated(INFINITY);
    w.values[w.row_offsets[5] + 7] = INFINITY;
    auto x = Random(samples * w.columns, rng);
    const float odd[samples] = {0, NAN, 0, 0, INFINITY, 0, 0, -INFINITY, 0, NAN};
    const Index at[samples] = {0, w.columns - 1, 0, 0, 17, 0, 0, 1024, 0, 511};
    for (Index n = 0; n < samples; ++n) {
      if (odd[n] != 0) x[n * w.columns + at[n]] = odd[n];
    }
    RandomBitmap bad = w;
    bad.bitmap[6 * words + words - 1] ^= 1;
    bad.row_offsets[1] = -1;
    const auto got = Multiply(w, FloatDtype::kBFloat16, samples, x, nullptr, false);
    const auto damaged = Multiply(bad, FloatDtype::kBFloat16, samples, x, nullptr, true);
    bool right = true;
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < w.rows; ++r) {
        const float y = got[n * w.rows + r], y_damaged = damaged[n * w.rows + r];
        if (w.way.quantized) {
          right &= std::isnan(y) == (odd[n] != 0);
        } else {
          const bool uses = odd[n] != 0 && (w.bitmap[r * words + at[n] / 64] >> at[n] % 64 & 1) != 0;
          right &= std::isfinite(y) == (!uses && r != 5) && (!uses || !std::isnan(odd[n]) || std::isnan(y));
          Sum want;
          for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
            want.Add(double{w.values[k]} * x[n * w.columns + w.col_indices[k]]);
          }
          right &= !std::isfinite(y) || want.Near(y, FloatDtype::kBFloat16);
        }
        const bool hit = r == 0 || r == 1 || r == 6;
        right &= hit ? std::isnan(y_damaged) : Same(y_damaged, y < 0 ? 0.0f : y);
      }
    }
    Expect(right, "odd tiles, %ld columns, values %d", long{w.columns}, static_cast<int>(w.way.stored_as));
  }
}

// NaN and infinity reach the rows whose stored weights meet them, and no others.
void TestInfinities() {
  std::mt19937 rng(5);
  for (const BitmapWay& way : kWays) {
    if (way.quantized) continue;
    const RandomBitmap w(10, 150, 0.3, way, rng);
    for (const float odd : {INFINITY, NAN}) {
      auto x = Random(2 * w.columns, rng), by_features = Random(w.rows, rng);
      x[w.columns + 77] = odd;
      by_features[5] = odd;
      const auto got = Multiply(w, FloatDtype::kFloat32, 2, x, nullptr, true);
      bool right = true;
      for (Index r = 0; r < w.rows; ++r) {
        const bool uses = w.bitmap[r * 3 + 1] >> 13 & 1;
        right &= std::isfinite(got[r]) && (std::isfinite(got[w.rows + r]) || uses);
        if (std::isnan(odd)) right &= std::isnan(got[w.rows + r]) == uses;
      }
      if (way.stored_as != BitmapValues::kInt8) {
        const auto columns = Columns(w, FloatDtype::kFloat32, 1, by_features, nullptr, false);
        for (Index c = 0; c < w.columns; ++c) {
          right &= std::isfinite(columns[c]) != (w.bitmap[5 * 3 + c / 64] >> c % 64 & 1);
        }
      }
      Expect(right, "%g in x, values %d", double{odd}, static_cast<int>(way.stored_as));
    }
  }
}

// Damage becomes NaN where the contract says, and changes nothing else.
void TestDamage() {
  std::mt19937 rng(99);
  for (const BitmapWay& way : kWays) {
    const RandomBitmap good(10, 100, 0.5, way, rng);
    const Index samples = 9;
    const auto x = Random(samples * good.columns, rng);
    auto by_features = Random(2 * good.rows, rng);
    std::vector<float> wants[std::size(kFloats)];
    for (std::size_t i = 0; i < std::size(kFloats); ++i) {
      wants[i] = Multiply(good, kFloats[i], samples, x, nullptr, true);
    }
    const bool by_columns = way.stored_as != BitmapValues::kInt8;
    // rows: those that the damage lies in. code: the output that it reaches where a code is damaged, else -1.
    const auto expect = [&](const RandomBitmap& bad, std::vector<Index> rows, Index code, const char* what) {
      for (std::size_t f = 0; f < std::size(kFloats); ++f) {
        const FloatDtype floats_as = kFloats[f];
        const auto& want = wants[f];
        const auto got = Multiply(bad, floats_as, samples, x, nullptr, true);
        bool right = true;
        for (Index i = 0; i < samples * good.rows; ++i) {
          const bool damaged = std::find(rows.begin(), rows.end(), i % good.rows) != rows.end();
          right &= damaged ? std::isnan(got[i]) : got[i] == want[i];
        }
        Expect(right, "%s, values %d, quantized %d", what, static_cast<int>(way.stored_as), int{way.quantized});
        if (!by_columns) continue;
        // The first sample meets the damage, the second does not.
        for (const Index r : rows) {
          by_features[r] = 1;
          by_features[good.rows + r] = 0;
        }
        const auto right_ones = Columns(good, floats_as, 2, by_features, nullptr, true);
        const auto outputs = Columns(bad, floats_as, 2, by_features, nullptr, true);
        right = true;
        for (Index i = 0; i < 2 * good.columns; ++i) {
          const bool damaged = i < good.columns && (code < 0 || code == i);
          right &= damaged ? std::isnan(outputs[i]) : outputs[i] == right_ones[i];
        }
        Expect(right, "columns: %s, values %d", what, static_cast<int>(way.stored_as));
      }
    };
    for (const Index row : {0, 2, 9}) {
      RandomBitmap bad = good;
      bad.bitmap[row * 2 + 1] |= std::uint64_t{1} << 36;
      expect(bad, {row}, -1, "a bit past the columns");
      bad.bitmap[row * 2] &= bad.bitmap[row * 2] - 1;
      expect(bad, {row}, -1, "a bit moved past the columns");
      bad = good;
      bad.bitmap[row * 2] ^= 1;
      expect(bad, {row}, -1, "a bit too many or too few");
      bad.bitmap[row * 2] = ~std::uint64_t{0};
      bad.bitmap[row * 2 + 1] = ~std::uint64_t{0};
      expect(bad, {row}, -1, "all bits");
      for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX, static_cast<std::int32_t>(good.values.size()) + 1}) {
        bad = good;
        bad.row_offsets[row] = offset;
        expect(bad, row == 0 ? std::vector<Index>{0} : std::vector<Index>{row - 1, row}, -1, "an offset outside");
      }
    }
    if (way.stored_as != BitmapValues::kCodes) continue;
    for (const Index row : {1, 9}) {
      const Index k = good.row_offsets[row + 1] - 1;
      RandomBitmap bad = good;
      bad.codes[k] = static_cast<std::uint8_t>(row == 1 ? way.entries : 255);
      expect(bad, {row}, good.col_indices[k], "a code outside");
    }
  }
}

// More rows than the grid's y axis takes blocks, more samples than it is given.
void TestLargeGrids() {
  std::mt19937 rng(7);
  TestOne(RandomBitmap(65536 + 3, 2, 0.5, kWays[0], rng), FloatDtype::kFloat32, 1, true, false, rng);
  TestOne(RandomBitmap(1, 1, 1, kWays[1], rng), FloatDtype::kFloat32, 8192 * 8 + 9, false, false, rng);
  TestOneByColumns(RandomBitmap(1, 1, 1, kWays[1], rng), FloatDtype::kFloat32, 8192 + 3, false, false, rng);
}

}  // namespace

int main() {
  bool first = true;
  return RunOnDevice([&] {
    TestShapes();
    TestTiles();
    TestOddTiles();
    TestShapesByColumns();
    TestInfinities();
    TestDamage();
    if (first) TestLargeGrids();
    first = false;
  });
}
