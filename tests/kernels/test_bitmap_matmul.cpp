// Every variant against sums in double (8-bit products against the scalar level, to the bit), on awkward shapes and
// unaligned memory, and against damaged weights.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/bitmap_matmul/bitmap_matmul.h"
#include "kernels/bitmap_weight.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const BitmapKernels& kernels;
};

// A weight's tensors in unaligned memory.
struct Stored {
  explicit Stored(const RandomBitmap& w)
      : bitmap(w.bitmap),
        offsets(w.row_offsets),
        codebook(w.codebook),
        scales(w.scales),
        values(w.values),
        halves(w.halves),
        codes(w.codes) {
    const void* chosen = w.way.stored_as == BitmapValues::kFloat32    ? static_cast<const void*>(values.data())
                         : w.way.stored_as == BitmapValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                                      : codes.data();
    args = {bitmap.data(), offsets.data(), chosen, w.way.stored_as, codebook.data(),
            w.way.entries, scales.data(),  w.rows, w.columns,       static_cast<Index>(w.values.size())};
  }

  Unaligned<std::uint64_t> bitmap;
  Unaligned<std::int32_t> offsets;
  Unaligned<float> codebook, scales, values;
  Unaligned<std::uint16_t> halves;
  Unaligned<std::uint8_t> codes;
  BitmapWeight args;
};

// Packs x and runs rows [cut, end) and those before.
BitmapStatus Multiply(const BitmapKernels& kernels, const RandomBitmap& w, const std::vector<float>& x,
                      FloatDtype floats_as, Index samples, Output& y, bool relu, const float* bias, Index cut) {
  Stored stored(w);
  Unaligned<float> x_floats(x);
  std::vector<std::uint16_t> halves;
  for (const float value : x) halves.push_back(Truncated(value));
  Unaligned<std::uint16_t> x_halves(halves);
  const void* from = floats_as == FloatDtype::kFloat32 ? static_cast<const void*>(x_floats.data()) : x_halves.data();
  std::vector<unsigned char> panel(BitmapPanelBytes(w.columns, samples));
  float x_scales[kBitmapMaxSamples];
  const bool plain = kernels.pack_samples(
      {from, floats_as, samples, w.columns, w.way.stored_as, w.way.entries, w.way.quantized, panel.data(), x_scales});
  const BitmapMatmulArgs args{stored.args, panel.data(), samples, w.way.quantized, plain,
                              x_scales,    bias,         relu,    y.data(),        floats_as};
  std::atomic<BitmapStatus> status = BitmapStatus::kOk;
  InParts(cut, w.rows, [&](Index begin, Index end) {
    const BitmapStatus found = kernels.matmul(args, begin, end);
    if (found != BitmapStatus::kOk) status = found;
  });
  return status;
}

void TestOne(const Variant& variant, const RandomBitmap& w, FloatDtype floats_as, Index samples, std::mt19937& rng) {
  const auto x = Random(samples * w.columns, rng), bias = Random(w.rows, rng);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %ld x %ld, %ld samples, values %d of %ld, quantized %d, floats %d", variant.name, what,
           long{w.rows}, long{w.columns}, long{samples}, static_cast<int>(w.way.stored_as), long{w.way.entries},
           int{w.way.quantized}, static_cast<int>(floats_as));
  };
  Unaligned<float> stored_bias(bias);
  Output y(samples * w.rows, floats_as), parts(samples * w.rows, floats_as), relu(samples * w.rows, floats_as);
  const auto run = [&](const BitmapKernels& kernels, Output& out, bool relu, Index begin) {
    return Multiply(kernels, w, x, floats_as, samples, out, relu, stored_bias.data(), begin);
  };
  complain(run(variant.kernels, y, false, 0) == BitmapStatus::kOk, "status");
  run(variant.kernels, parts, false, w.rows / 3);
  run(variant.kernels, relu, true, 0);
  const auto values = y.Values(), in_parts = parts.Values(), cut = relu.Values();
  complain(values.empty() || std::memcmp(values.data(), in_parts.data(), sizeof(float) * values.size()) == 0, "parts");
  if (w.way.quantized) {
    Output reference(samples * w.rows, floats_as);
    run(kBitmapScalar, reference, false, 0);
    const auto want = reference.Values();
    complain(values.empty() || std::memcmp(values.data(), want.data(), sizeof(float) * values.size()) == 0, "bits");
  }
  bool right = true, positive = true;
  for (Index n = 0; n < samples; ++n) {
    float largest = 0;
    for (Index c = 0; c < w.columns; ++c) largest = std::max(largest, std::fabs(x[n * w.columns + c]));
    for (Index r = 0; r < w.rows; ++r) {
      Sum want;
      double rounding = 0;
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        const double weight = double{w.values[k]} * w.Scale(r);
        want.Add(weight * x[n * w.columns + w.col_indices[k]]);
        // Half a step of the quantized x, and what the roundings of its scale add.
        if (w.way.quantized) rounding += std::fabs(weight) * largest / 127 * 0.5001;
      }
      want.Add(bias[r]);
      ++want.terms;  // the scale rounds once more
      const float got = values[n * w.rows + r];
      right &= w.way.quantized ? std::fabs(got - want.value) <=
                                     rounding * 1.01 + std::ldexp(std::fabs(want.value) + want.magnitude, -7)
                               : want.Near(got, floats_as);
      positive &= cut[n * w.rows + r] == (got < 0 ? 0 : got);
    }
  }
  complain(right, "values");
  complain(positive, "relu");
}

void TestShapes(const Variant& variant) {
  std::mt19937 rng(1234);
  const struct {
    Index rows, columns;
    double density;
  } shapes[] = {{1, 1, 1.0},    {5, 63, 0.3},   {9, 64, 1.0},   {40, 65, 0.5},   {33, 127, 0.1}, {64, 128, 0.35},
                {17, 129, 1.0}, {10, 0, 0.0},   {0, 70, 0.0},   {8, 1031, 0.09}, {7, 200, 0.0},  {60, 320, 0.2},
                {4, 2048, 0.9}, {130, 16, 0.5}, {3, 1025, 0.5}, {11, 960, 0.03}};
  for (const auto& shape : shapes) {
    for (const BitmapWay& way : kBitmapWays) {
      const RandomBitmap w(shape.rows, shape.columns, shape.density, way, rng);
      for (const Index samples : {1, 2, 3, 4}) {
        for (const FloatDtype floats_as : kFloats) TestOne(variant, w, floats_as, samples, rng);
      }
    }
  }
}

// A sample with zeros times a weight kept by columns: here the rows of w.
BitmapStatus AddColumns(const BitmapKernels& kernels, const RandomBitmap& w, const std::vector<float>& x, Output& y,
                        bool relu, const float* bias, Index cut) {
  Stored stored(w);
  std::vector<std::int32_t> active(w.rows);
  std::vector<float> values(w.rows), sums(BitmapWords(w.columns) * 64);
  Unaligned<float> x_floats(x);
  bool finite;
  const Index count =
      BitmapFindActive(x_floats.data(), FloatDtype::kFloat32, w.rows, active.data(), values.data(), &finite);
  const BitmapColumnsArgs args{stored.args, active.data(), values.data(), count,    !finite,
                               sums.data(), bias,          relu,          y.data(), y.stored_as};
  std::atomic<BitmapStatus> status = BitmapStatus::kOk;
  InParts(cut, BitmapWords(w.columns), [&](Index begin, Index end) {
    const BitmapStatus found = kernels.columns(args, begin, end);
    if (found != BitmapStatus::kOk) status = found;
  });
  return status;
}

void TestColumns(const Variant& variant) {
  std::mt19937 rng(4321);
  const struct {
    Index rows, columns;
    double density;
  } shapes[] = {{1, 1, 1.0},     {5, 63, 0.3},   {9, 64, 1.0},    {40, 65, 0.5},   {33, 127, 0.1},
                {64, 128, 0.35}, {10, 0, 0.0},   {0, 70, 0.0},    {7, 200, 0.0},   {60, 320, 0.2},
                {8, 2048, 0.9},  {130, 16, 0.5}, {30, 1025, 0.5}, {90, 1100, 0.03}};
  for (const auto& shape : shapes) {
    for (const BitmapWay& way : kBitmapWays) {
      if (way.stored_as == BitmapValues::kInt8) continue;
      const RandomBitmap w(shape.rows, shape.columns, shape.density, way, rng);
      const auto bias = Random(w.columns, rng);
      Unaligned<float> stored_bias(bias);
      for (const double zeros : {0.0, 0.6, 1.0}) {
        auto x = Random(w.rows, rng);
        std::bernoulli_distribution zero(zeros);
        for (float& value : x) value = zero(rng) ? (value < 0 ? -0.0f : 0.0f) : value;
        for (const FloatDtype floats_as : kFloats) {
          const auto complain = [&](bool ok, const char* what) {
            Expect(ok, "%s: columns: %s, %ld x %ld, values %d of %ld, floats %d", variant.name, what, long{w.rows},
                   long{w.columns}, static_cast<int>(way.stored_as), long{way.entries}, static_cast<int>(floats_as));
          };
          Output y(w.columns, floats_as), parts(w.columns, floats_as), relu(w.columns, floats_as);
          complain(AddColumns(variant.kernels, w, x, y, false, stored_bias.data(), 0) == BitmapStatus::kOk, "status");
          AddColumns(variant.kernels, w, x, parts, false, stored_bias.data(), BitmapWords(w.columns) / 2);
          AddColumns(variant.kernels, w, x, relu, true, stored_bias.data(), 0);
          const auto values = y.Values(), in_parts = parts.Values(), cut = relu.Values();
          complain(values == in_parts, "parts");
          std::vector<Sum> want(w.columns);
          for (Index r = 0; r < w.rows; ++r) {
            for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
              want[w.col_indices[k]].Add(double{w.values[k]} * x[r]);
            }
          }
          bool right = true;
          for (Index c = 0; c < w.columns; ++c) {
            want[c].Add(bias[c]);
            right &= want[c].Near(values[c], floats_as) && cut[c] == (values[c] < 0 ? 0 : values[c]);
          }
          complain(right, "values");
        }
      }
    }
  }
}

void TestColumnsDamage(const Variant& variant) {
  std::mt19937 rng(98);
  for (const BitmapWay& way : kBitmapWays) {
    if (way.stored_as == BitmapValues::kInt8) continue;
    for (const Index rows : {Index{10}, Index{90}}) {
      const RandomBitmap good(rows, 100, 0.5, way, rng);
      auto x = Random(rows, rng);
      const auto expect = [&](const RandomBitmap& w, BitmapStatus want, const char* what) {
        Output y(w.columns, FloatDtype::kFloat32);
        const BitmapStatus got = AddColumns(variant.kernels, w, x, y, false, nullptr, 0);
        Expect(got == want, "%s: columns: %s, values %d of %ld, got %d", variant.name, what,
               static_cast<int>(way.stored_as), long{way.entries}, static_cast<int>(got));
      };
      for (const Index row : {Index{0}, Index{4}, Index{5}, rows - 1}) {
        RandomBitmap bad = good;
        bad.bitmap[row * 2 + 1] |= std::uint64_t{1} << 36;
        expect(bad, BitmapStatus::kBadBitmap, "a bit past the columns");
        bad = good;
        bad.bitmap[row * 2] = ~bad.bitmap[row * 2];
        if (__builtin_popcountll(bad.bitmap[row * 2]) == 32) bad.bitmap[row * 2] ^= 1;
        expect(bad, BitmapStatus::kBadBitmap, "other bits");
        bad = good;
        bad.row_offsets[row] = -1;
        expect(bad, BitmapStatus::kBadRowOffsets, "an offset outside");
      }
      if (way.stored_as == BitmapValues::kCodes && way.entries != kBitmapMaxEntries) {
        RandomBitmap bad = good;
        bad.codes[bad.codes.size() / 2] = static_cast<std::uint8_t>(way.entries);
        expect(bad, BitmapStatus::kBadCode, "a code outside");
      }
      // An infinite x reaches what uses it.
      x[rows - 2] = INFINITY;
      Output y(100, FloatDtype::kFloat32);
      AddColumns(variant.kernels, good, x, y, false, nullptr, 0);
      const auto values = y.Values();
      for (Index c = 0; c < 100; ++c) {
        const bool uses = good.bitmap[(rows - 2) * 2 + c / 64] >> c % 64 & 1;
        Expect(std::isfinite(values[c]) == !uses, "%s: columns: an infinite x, output %ld", variant.name, long{c});
      }
    }
  }
}

// An infinite or NaN x reaches the rows that use it and no other; quantized, the whole sample.
void TestNotFinite(const Variant& variant) {
  std::mt19937 rng(7);
  for (const BitmapWay& way : kBitmapWays) {
    const RandomBitmap w(20, 150, 0.3, way, rng);
    for (const float value : {INFINITY, -INFINITY, NAN}) {
      auto x = Random(2 * w.columns, rng);
      x[w.columns + 77] = value;
      Output y(2 * w.rows, FloatDtype::kFloat32);
      Multiply(variant.kernels, w, x, FloatDtype::kFloat32, 2, y, false, nullptr, 0);
      const auto values = y.Values();
      bool right = true;
      for (Index r = 0; r < w.rows; ++r) {
        const bool uses = w.bitmap[r * 3 + 1] >> 13 & 1;
        const float second = values[w.rows + r];
        right &= std::isfinite(values[r]);
        right &= way.quantized ? std::isnan(second) : std::isfinite(second) == !uses;
      }
      Expect(right, "%s: %g in x, values %d of %ld, quantized %d", variant.name, double{value},
             static_cast<int>(way.stored_as), long{way.entries}, int{way.quantized});
    }
  }
  // Nothing, and so little that its scale would be no number.
  for (const float value : {0.0f, -0.0f, 1e-45f, 1e-38f}) {
    const RandomBitmap w(20, 150, 0.3, kBitmapWays[std::size(kBitmapWays) - 1], rng);
    Output y(w.rows, FloatDtype::kFloat32);
    Multiply(variant.kernels, w, std::vector<float>(150, value), FloatDtype::kFloat32, 1, y, false, nullptr, 0);
    for (const float got : y.Values()) Expect(std::fabs(got) <= 1e-32f, "%s: %g quantized", variant.name, double{got});
  }
}

// Each damage must be met by its status, wherever it lies.
void TestDamage(const Variant& variant) {
  std::mt19937 rng(99);
  for (const BitmapWay& way : kBitmapWays) {
    for (const Index rows : {Index{10}, Index{90}}) {  // few values and many: through the stage and directly
      const RandomBitmap good(rows, 100, 0.5, way, rng);
      const auto expect = [&](const RandomBitmap& w, BitmapStatus want, const char* what) {
        for (const Index samples : {1, 3}) {
          const auto x = Random(samples * w.columns, rng);
          Output y(samples * w.rows, FloatDtype::kFloat32);
          const BitmapStatus got = Multiply(variant.kernels, w, x, FloatDtype::kFloat32, samples, y, false, nullptr, 0);
          Expect(got == want, "%s: %s, values %d of %ld, quantized %d, got %d", variant.name, what,
                 static_cast<int>(way.stored_as), long{way.entries}, int{way.quantized}, static_cast<int>(got));
        }
      };
      expect(good, BitmapStatus::kOk, "nothing");
      for (const Index row : {Index{0}, Index{4}, rows - 1}) {
        RandomBitmap bad = good;
        bad.bitmap[row * 2 + 1] |= std::uint64_t{1} << 36;
        expect(bad, BitmapStatus::kBadBitmap, "a bit past the columns");
        bad = good;
        bad.bitmap[row * 2] = ~bad.bitmap[row * 2];
        if (__builtin_popcountll(bad.bitmap[row * 2]) == 32) bad.bitmap[row * 2] ^= 1;
        expect(bad, BitmapStatus::kBadBitmap, "other bits");
        for (const std::int32_t offset :
             {-1, INT32_MIN, INT32_MAX, static_cast<std::int32_t>(good.values.size()) + 1}) {
          bad = good;
          bad.row_offsets[row] = offset;
          expect(bad, BitmapStatus::kBadRowOffsets, "an offset outside");
        }
      }
      if (way.stored_as != BitmapValues::kCodes || way.entries == kBitmapMaxEntries) continue;
      for (const std::size_t k : {std::size_t{0}, good.codes.size() / 2, good.codes.size() - 1}) {
        RandomBitmap bad = good;
        bad.codes[k] = static_cast<std::uint8_t>(way.entries);
        expect(bad, BitmapStatus::kBadCode, "a code outside");
      }
    }
  }
}

void TestPacking() {
  std::mt19937 rng(3);
  for (const Index columns : {1, 63, 64, 65, 200}) {
    const RandomBitmap w(19, columns, 0.4, kBitmapWays[0], rng);
    const auto nnz = static_cast<Index>(w.values.size());
    std::vector<float> dense(w.rows * columns, -0.0f);
    for (Index r = 0; r < w.rows; ++r) {
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k)
        dense[r * columns + w.col_indices[k]] = w.values[k];
    }
    std::vector<std::uint16_t> dense_halves;
    for (const float value : dense) dense_halves.push_back(Truncated(value));
    for (const FloatDtype stored_as : kFloats) {
      const bool floats = stored_as == FloatDtype::kFloat32;
      Unaligned<float> from(dense);
      Unaligned<std::uint16_t> from_halves(dense_halves);
      std::vector<std::uint64_t> bitmap(w.bitmap.size());
      std::vector<std::int32_t> offsets(w.rows + 1);
      std::vector<float> values(nnz);
      std::vector<std::uint16_t> halves(nnz);
      const BitmapPackArgs args{floats ? static_cast<const void*>(from.data()) : from_halves.data(),
                                stored_as,
                                w.rows,
                                columns,
                                bitmap.data(),
                                offsets.data(),
                                floats ? static_cast<void*>(values.data()) : halves.data()};
      BitmapPackBits(args, 0, w.rows);
      for (Index r = 0; r < w.rows; ++r) offsets[r + 1] += offsets[r];
      Expect(bitmap == w.bitmap && offsets == w.row_offsets, "packed bits of %ld columns", long{columns});
      BitmapPackValues(args, 0, w.rows);
      Expect(floats ? values == w.values : halves == w.halves, "packed values of %ld columns", long{columns});
    }
    std::vector<std::uint64_t> bitmap(w.bitmap.size());
    BitmapFromColumns(w.row_offsets.data(), w.col_indices.data(), columns, bitmap.data(), 0, w.rows);
    Expect(bitmap == w.bitmap, "bits from %ld columns", long{columns});
    std::vector<std::int32_t> col_indices(nnz);
    const auto to_columns = [&] {
      return BitmapToColumns(bitmap.data(), w.row_offsets.data(), columns, nnz, col_indices.data(), 0, w.rows);
    };
    Expect(to_columns() == BitmapStatus::kOk && col_indices == w.col_indices, "columns of %ld", long{columns});
    bitmap[2 * BitmapWords(columns)] &= bitmap[2 * BitmapWords(columns)] - 1;
    Expect(to_columns() == BitmapStatus::kBadBitmap, "a bit too few");
  }
}

}  // namespace

int main() {
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kBitmapScalar},
                              {"avx2", CpuIsa::kAvx2, kBitmapAvx2},
                              {"avx512", CpuIsa::kAvx512, kBitmapAvx512}};
  for (const Variant& variant : variants) {
    if (variant.needs > ProcessCpuIsa().detected) continue;
    TestShapes(variant);
    TestNotFinite(variant);
    TestDamage(variant);
    TestColumns(variant);
    TestColumnsDamage(variant);
  }
  TestPacking();
  return Failures() != 0;
}
