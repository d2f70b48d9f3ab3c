// Every variant against sums in double (integers against the scalar level, to the bit), on awkward shapes and unaligned
// memory, and damaged codes.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/product_matmul/product_matmul.h"
#include "kernels/product_weight.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  const ProductKernels& kernels;
};

struct Stored {
  explicit Stored(const RandomProduct& w) : codes(w.packed), codebooks(w.codebooks), args(w.args) {
    args.codes = codes.data();
    args.codebooks = codebooks.data();
  }
  Unaligned<std::uint8_t> codes;
  Unaligned<float> codebooks;
  ProductWeight args;
};

std::vector<float> Panel(const std::vector<float>& x, Index samples, Index columns, Index lanes) {
  std::vector<float> panel(columns * lanes, 0.0f);
  for (Index n = 0; n < samples; ++n) {
    for (Index c = 0; c < columns; ++c) panel[c * lanes + n] = x[n * columns + c];
  }
  return panel;
}

void TestExact(const Variant& variant, const RandomProduct& w, FloatDtype floats_as, Index samples, Index lanes,
               std::mt19937& rng) {
  const ProductShape& s = w.shape;
  Stored stored(w);
  const auto x = Random(samples * s.columns, rng), bias = Random(s.rows, rng);
  Unaligned<float> panel(Panel(x, samples, s.columns, lanes)), stored_bias(bias);
  const Index in_memory = ProductTables(w.args), tiles = ProductTiles(w.args);
  // Entries past the weight's are not written, and must not be used.
  std::vector<float> tables(in_memory * ProductTableEntries(w.args) * lanes, NAN);
  const ProductTablesArgs make{stored.args, panel.data(), lanes, tables.data()};
  InParts(in_memory / 2, in_memory, [&](Index begin, Index end) { variant.kernels.make_tables(make, begin, end); });
  std::vector<float> sums(tiles * kProductRows * lanes);
  Output y(samples * s.rows, floats_as), relu(samples * s.rows, floats_as);
  for (const bool with_relu : {false, true}) {
    Output& out = with_relu ? relu : y;
    const ProductMatmulArgs args{stored.args, tables.data(), lanes,     sums.data(), stored_bias.data(),
                                 with_relu,   out.data(),    floats_as, samples};
    InParts(tiles / 2, tiles, [&](Index begin, Index end) { variant.kernels.matmul(args, begin, end); });
  }
  const auto got = y.Values(), got_relu = relu.Values();
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
      const float value = got[n * s.rows + r], above = got_relu[n * s.rows + r];
      near = near && sum.Near(value, floats_as, 2);
      clipped = clipped && above == (value < 0 ? 0 : value);
    }
  }
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %ld x %ld, width %ld, entries %ld, stages %ld, %ld samples in %ld lanes, floats %d",
           variant.name, what, long{s.rows}, long{s.columns}, long{s.width}, long{s.entries}, long{s.stages},
           long{samples}, long{lanes}, static_cast<int>(floats_as));
  };
  complain(near, "y");
  complain(clipped, "relu");
}

// What the int8 mode makes of a sample: tables in bytes, scale and y.
struct Int8Result {
  std::vector<std::uint8_t> quantized;
  ProductScale scale;
  std::vector<float> y, tables;
};

Int8Result RunInt8(const ProductKernels& kernels, const RandomProduct& w, const std::vector<float>& x,
                   const std::vector<float>& bias) {
  Stored stored(w);
  Unaligned<float> panel(x), stored_bias(bias);
  const Index in_memory = ProductTables(w.args), tiles = ProductTiles(w.args);
  Int8Result result;
  result.tables.assign(in_memory * ProductTableEntries(w.args), NAN);
  result.quantized.assign(result.tables.size(), 0xee);
  std::vector<float> lows(in_memory), ranges(in_memory);
  kernels.make_tables({stored.args, panel.data(), 1, result.tables.data()}, 0, in_memory);
  ProductQuantizeArgs args{stored.args, result.tables.data(), lows.data(), ranges.data(), {}, result.quantized.data()};
  kernels.measure_tables(args, 0, in_memory);
  args.scale = result.scale = ProductScaleOf(args);
  kernels.quantize_tables(args, 0, in_memory);
  std::vector<std::uint32_t> sums(tiles * kProductRows);
  Output y(w.shape.rows, FloatDtype::kFloat32);
  const ProductInt8Args multiply{stored.args, result.quantized.data(), result.scale,
                                 sums.data(), stored_bias.data(),      false,
                                 y.data(),    FloatDtype::kFloat32};
  InParts(tiles / 2, tiles, [&](Index begin, Index end) { kernels.matmul_int8(multiply, begin, end); });
  result.y = y.Values();
  return result;
}

void TestInt8(const Variant& variant, const RandomProduct& w, std::mt19937& rng) {
  const ProductShape& s = w.shape;
  const auto x = Random(s.columns, rng), bias = Random(s.rows, rng);
  const Int8Result expected = RunInt8(kProductScalar, w, x, bias), got = RunInt8(variant.kernels, w, x, bias);
  bool within = true;
  for (Index r = 0; r < s.rows; ++r) {
    double sum = bias[r];
    for (Index i = 0; i < w.tables; ++i) {
      sum += got.tables[i * ProductTableEntries(w.args) + w.codes[r * w.tables + i]];
    }
    within = within && std::fabs(got.y[r] - sum) <= w.tables * (got.scale.scale / 2 + 1e-4) + 1e-4;
  }
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s in int8, %ld x %ld, width %ld, entries %ld, stages %ld", variant.name, what, long{s.rows},
           long{s.columns}, long{s.width}, long{s.entries}, long{s.stages});
  };
  complain(got.quantized == expected.quantized, "tables");
  complain(got.y.empty() || std::memcmp(got.y.data(), expected.y.data(), 4 * got.y.size()) == 0, "bits");
  complain(within, "error");
  for (const float broken : {NAN, INFINITY}) {
    auto damaged = x;
    if (damaged.empty()) break;
    damaged.back() = broken;
    for (const float value : RunInt8(variant.kernels, w, damaged, bias).y) complain(value != value, "not finite");
  }
  for (const float value : RunInt8(variant.kernels, w, std::vector<float>(s.columns, 0.0f), bias).y) {
    complain(value == value, "all zero");
  }
}

void TestCodes(const Variant& variant, RandomProduct w) {
  const ProductShape& s = w.shape;
  if (s.rows == 0 || s.entries == ProductTableEntries(w.args)) return;
  const Index tiles = ProductTiles(w.args);
  Expect(variant.kernels.codes_fit(Stored(w).args, 0, tiles), "%s: good codes refused", variant.name);
  w.SetCode(s.rows - 1, w.tables - 1, static_cast<std::uint8_t>(s.entries));
  Expect(!variant.kernels.codes_fit(Stored(w).args, 0, tiles), "%s: bad code taken, %ld entries", variant.name,
         long{s.entries});
  Expect(variant.kernels.codes_fit(Stored(w).args, 0, tiles - 1), "%s: other tile's code", variant.name);
}

void TestDecode(const RandomProduct& w) {
  const ProductShape& s = w.shape;
  Stored stored(w);
  Unaligned<float> dense(std::vector<float>(s.rows * s.columns, NAN));
  ProductDecode({stored.args, dense.data()}, 0, ProductTiles(w.args));
  const auto got = dense.Values();
  bool same = true;
  for (Index r = 0; r < s.rows; ++r) {
    for (Index c = 0; c < s.columns; ++c) {
      float sum = 0;
      for (Index t = 0; t < s.stages; ++t) {
        const float entry = w.Entry(r, t * w.args.segments + c / s.width, c % s.width);
        sum = t == 0 ? entry : sum + entry;
      }
      same = same && got[r * s.columns + c] == sum;
    }
  }
  Expect(same, "decode, %ld x %ld", long{s.rows}, long{s.columns});
}

}  // namespace

int main() {
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kProductScalar},
                              {"avx2", CpuIsa::kAvx2, kProductAvx2},
                              {"avx512", CpuIsa::kAvx512, kProductAvx512}};
  std::mt19937 rng(7);
  for (const ProductShape& shape : kProductShapes) {
    const RandomProduct w(shape, rng);
    TestDecode(w);
    for (const Variant& variant : variants) {
      if (ProcessCpuIsa().detected < variant.needs) continue;
      for (const FloatDtype floats_as : kFloats) {
        TestExact(variant, w, floats_as, 1, 1, rng);
        for (const Index samples : {1, 7, 8}) TestExact(variant, w, floats_as, samples, 8, rng);
        for (const Index samples : {3, 16}) TestExact(variant, w, floats_as, samples, 16, rng);
      }
      TestInt8(variant, w, rng);
      TestCodes(variant, w);
    }
  }
  // Sums past 16 bits.
  const RandomProduct wide({65, 700, 1, 256, 1, true}, rng), narrow({65, 700, 1, 16, 1, true}, rng);
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    TestInt8(variant, wide, rng);
    TestInt8(variant, narrow, rng);
  }
  return Failures() != 0;
}
