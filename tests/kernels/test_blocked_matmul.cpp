// The packing against its description, every variant against sums in double, on awkward shapes and unaligned memory,
// and against damaged weights.
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/blocked_weight.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/panels/panels.h"
#include "kernels/parts.h"

namespace tersetorch {
extern const BlockedMatmulFunction kBlockedAvx512OnAvx2;
}

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  BlockedMatmulFunction matmul;
  bool unsigned_quads;
};

// A weight's arrays in unaligned memory.
struct Stored {
  Stored(const RandomBlocked& w, BlockedValues stored_as)
      : offsets(w.block_offsets),
        segments(w.segments),
        indices(w.indices),
        codebook(w.codebook),
        values(w.values),
        halves(w.halves),
        codes(w.codes) {
    const void* chosen = stored_as == BlockedValues::kFloat32    ? static_cast<const void*>(values.data())
                         : stored_as == BlockedValues::kBFloat16 ? static_cast<const void*>(halves.data())
                                                                 : codes.data();
    args = {offsets.data(),
            segments.data(),
            indices.data(),
            chosen,
            stored_as,
            codebook.data(),
            static_cast<Index>(w.codebook.size()),
            w.rows,
            w.columns,
            static_cast<Index>(w.indices.size()),
            w.column_block};
  }

  Unaligned<std::int32_t> offsets, segments;
  Unaligned<std::uint16_t> indices;
  Unaligned<float> codebook, values;
  Unaligned<std::uint16_t> halves;
  Unaligned<std::uint8_t> codes;
  BlockedWeight args;
};

// Every non-zero once, in its block, rows with more non-zeros first and every row once.
void TestPacking(const RandomBlocked& w) {
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "packing: %s, %ld x %ld in blocks of %ld", what, long{w.rows}, long{w.columns}, long{w.column_block});
  };
  std::vector<float> dense(w.rows * w.columns, 0.0f), packed(w.rows * w.columns, 0.0f);
  for (Index r = 0; r < w.rows; ++r) {
    for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
      dense[r * w.columns + w.col_indices[k]] = w.csr_values[k];
    }
  }
  Index k = 0;
  bool ordered = true, starts = true, all = true;
  for (Index b = 0; b < w.RowBlocks() * w.ColumnBlocks(); ++b) {
    const Index row_begin = b / w.ColumnBlocks() * kBlockedRows, j = b % w.ColumnBlocks();
    const Index rows = std::min(kBlockedRows, w.rows - row_begin);
    starts &= w.block_offsets[b] == k;
    std::vector<bool> seen(rows);
    Index last = kBlockedMaxColumnBlock;
    for (Index i = 0; i < rows; ++i) {
      const std::int32_t segment = w.segments[row_begin * w.ColumnBlocks() + j * rows + i];
      const Index row = segment >> 16, count = segment & 0xffff;
      ordered &= count <= last;
      last = count;
      seen[row] = true;
      for (Index stop = k + count; k < stop; ++k) {
        packed[(row_begin + row) * w.columns + j * w.column_block + w.indices[k]] = w.values[k];
      }
    }
    all &= std::count(seen.begin(), seen.end(), true) == rows;
  }
  complain(starts && w.block_offsets.back() == k, "block_offsets");
  complain(ordered, "order of rows");
  complain(all, "every row once");
  complain(packed == dense, "non-zeros");
}

// Whether all blocks of rows are without damage; each part has sums of its own.
bool Multiply(const Variant& variant, const BlockedMatmulArgs& args, Index row_blocks) {
  std::atomic<bool> ok = true;
  InParts(row_blocks / 2, row_blocks, [&](Index begin, Index end) {
    Unaligned<float> sums(std::vector<float>(kBlockedRows * args.width, NAN));
    BlockedMatmulArgs part = args;
    part.sums = sums.data();
    for (Index block = end; block-- > begin;) {
      if (variant.matmul(part, block) != BlockedStatus::kOk) ok = false;
    }
  });
  return ok;
}

void TestOne(const Variant& variant, const RandomBlocked& w, BlockedValues values_as, FloatDtype floats_as,
             Index samples, Index width, bool relu, std::mt19937& rng) {
  Stored stored(w, values_as);
  const auto x = Random(samples * w.columns, rng), bias = Random(w.rows, rng);
  std::vector<float> panel(w.columns * width, NAN);
  kPackPanelScalar({x.data(), FloatDtype::kFloat32, samples, w.columns, panel.data(), width}, 0, w.columns);
  Unaligned<float> stored_panel(panel), stored_bias(bias);
  Output y(samples * w.rows, floats_as);
  const BlockedMatmulArgs args{
      stored.args, stored_panel.data(), width, stored_bias.data(), relu, y.data(), floats_as, samples, nullptr};
  const bool ok = Multiply(variant, args, w.RowBlocks());
  const auto y_values = y.Values();
  bool right = true;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < w.rows; ++r) {
      Sum want;
      for (Index k = w.row_offsets[r]; k < w.row_offsets[r + 1]; ++k) {
        want.Add(double{w.csr_values[k]} * x[n * w.columns + w.col_indices[k]]);
      }
      want.Add(bias[r]);
      const float got = y_values[n * w.rows + r];
      right &= relu && got == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                                : want.Near(got, floats_as) && !(relu && got < 0);
    }
  }
  Expect(ok && right, "%s: %ld x %ld in blocks of %ld, %ld of %ld samples, values %d, floats %d, relu %d", variant.name,
         long{w.rows}, long{w.columns}, long{w.column_block}, long{samples}, long{width}, static_cast<int>(values_as),
         static_cast<int>(floats_as), static_cast<int>(relu));
}

void TestShapes(const std::vector<Variant>& variants) {
  std::mt19937 rng(1234);
  const struct {
    Index rows, columns, column_block;
    double density;
  } shapes[] = {{1, 1, 1, 1.0},     {7, 9, 4, 0.5},     {64, 8, 8, 0.3},     {65, 100, 32, 0.1}, {255, 37, 16, 0.2},
                {256, 64, 64, 0.1}, {257, 65, 64, 0.1}, {40, 100, 7, 0.6},   {3, 257, 300, 1.0}, {20, 50, 16, 0.0},
                {5, 0, 16, 0.0},    {0, 5, 16, 0.0},    {530, 131, 48, 0.07}};
  for (const auto& shape : shapes) {
    const RandomBlocked w(shape.rows, shape.columns, shape.column_block, shape.density, rng);
    TestPacking(w);
    for (const Variant& variant : variants) {
      for (const Index width : {8, 16, 32, 64}) {
        for (const Index samples : {Index{1}, width / 2 + 1, width}) {
          for (const BlockedValues values_as :
               {BlockedValues::kFloat32, BlockedValues::kBFloat16, BlockedValues::kCodes}) {
            for (const FloatDtype floats_as : kFloats) {
              TestOne(variant, w, values_as, floats_as, samples, width, samples == width, rng);
            }
          }
        }
      }
    }
  }
}

// Quads give the same bits as the formula at every level, pairs a sum within its rounding.
template <typename T>
void TestWords(const Variant& variant, Index rows, Index features, Index column_block, double density, Index width,
               FloatDtype floats_as, std::mt19937& rng) {
  constexpr bool kQuads = sizeof(T) == 1;
  const Words<T> w(rows, features, column_block, density, rng);
  const Index samples = std::max<Index>(1, width - static_cast<Index>(rng() % 5));
  const bool relu = rng() % 2 == 0;
  const auto x = Random(samples * features, rng), bias = Random(rows, rng), row_scales = RowScales(rows, rng);
  std::vector<float> scales(width, 0.0f), inverses(width, 0.0f);
  const auto panel_memory = std::vector<std::uint32_t>(w.columns * width, 0xdeadbeef);
  Unaligned<std::uint32_t> panel(panel_memory);
  WordPanelArgs pack{x.data(),        FloatDtype::kFloat32,
                     samples,         features,
                     panel.data(),    width,
                     inverses.data(), variant.unsigned_quads ? 128 : 0};
  if (kQuads) {
    kWordPanelsScalar.scales({x.data(), FloatDtype::kFloat32, features, scales.data(), inverses.data()}, 0, samples);
    kWordPanelsScalar.quads(pack, 0, w.columns);
  } else {
    kWordPanelsScalar.pairs(pack, 0, w.columns);
  }
  std::vector<std::int32_t> row_sums(rows);
  for (Index r = 0; r < rows; ++r) {
    for (Index c = 0; kQuads && c < features; ++c) row_sums[r] += static_cast<int>(w.dense[r * features + c]);
  }
  Unaligned<std::array<T, Words<T>::kGroup>> values(w.values);
  Unaligned<std::int32_t> segments(w.segments), offsets(w.block_offsets);
  Unaligned<std::uint16_t> indices(w.indices);
  Output y(samples * rows, floats_as);
  BlockedMatmulArgs args{};
  args.weight = {offsets.data(),
                 segments.data(),
                 indices.data(),
                 values.data(),
                 kQuads ? BlockedValues::kInt8Quads : BlockedValues::kBFloat16Pairs,
                 nullptr,
                 0,
                 rows,
                 w.columns,
                 static_cast<Index>(w.indices.size()),
                 column_block};
  args.panel = panel.data();
  args.width = width;
  args.bias = bias.data();
  args.relu = relu;
  args.y = y.data();
  args.y_stored_as = floats_as;
  args.samples = samples;
  args.sample_scales = scales.data();
  args.row_scales = row_scales.data();
  args.row_sums = row_sums.data();
  bool right = Multiply(variant, args, (rows + kBlockedRows - 1) / kBlockedRows);
  const auto got = y.Values();
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < rows; ++r) {
      Sum want;
      std::int32_t integer = 0;
      for (Index c = 0; c < features; ++c) {
        const float value = w.dense[r * features + c], of_x = x[n * features + c];
        if (value == 0) continue;
        want.Add(double{value} * of_x);
        integer += static_cast<int>(value) * static_cast<int>(std::rint(of_x * inverses[n]));
      }
      want.Add(bias[r]);
      const float y_value = got[n * rows + r];
      if (kQuads) {
        const float exact = Scaled(integer, row_scales[r], scales[n], bias[r]);
        const float stored = floats_as == FloatDtype::kFloat32 ? exact : FromBFloat16(ToBFloat16(exact));
        right &= y_value == (relu && exact < 0 ? 0 : stored);
      } else {
        right &= relu && y_value == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -22)
                                      : want.Near(y_value, floats_as, 4) && !(relu && y_value < 0);
      }
    }
  }
  Expect(right, "%s: words of %ld, %ld x %ld in blocks of %ld, %ld of %ld samples, floats %d, relu %d", variant.name,
         long{Words<T>::kGroup}, long{rows}, long{features}, long{column_block}, long{samples}, long{width},
         static_cast<int>(floats_as), static_cast<int>(relu));
}

void TestWordShapes(const Variant& variant) {
  std::mt19937 rng(4321);
  const struct {
    Index rows, features, column_block;
    double density;
  } shapes[] = {{1, 1, 1, 1.0},     {7, 9, 1, 0.5},     {64, 32, 8, 0.3},   {65, 131, 8, 0.1}, {255, 150, 16, 0.2},
                {256, 64, 16, 0.1}, {257, 67, 16, 0.1}, {40, 103, 7, 0.6},  {3, 259, 99, 1.0}, {20, 50, 16, 0.0},
                {5, 0, 16, 0.0},    {0, 5, 16, 0.0},    {530, 129, 9, 0.07}};
  for (const auto& shape : shapes) {
    for (const Index width : {8, 16, 32, 64}) {
      for (const FloatDtype floats_as : kFloats) {
        TestWords<std::int8_t>(variant, shape.rows, shape.features, shape.column_block, shape.density, width, floats_as,
                               rng);
        TestWords<std::uint16_t>(variant, shape.rows, shape.features, shape.column_block, shape.density, width,
                                 floats_as, rng);
      }
    }
  }
}

// Each damage must be met by its status, wherever in the block it lies.
void TestDamage(const Variant& variant) {
  std::mt19937 rng(99);
  const RandomBlocked good(300, 100, 40, 0.4, rng);
  const auto expect = [&](const RandomBlocked& w, Index nnz, BlockedStatus want, const char* what) {
    for (const Index width : {8, 64}) {
      Stored stored(w, want == BlockedStatus::kBadCode ? BlockedValues::kCodes : BlockedValues::kFloat32);
      stored.args.nnz = nnz;
      std::vector<float> panel(w.columns * width), y(w.rows * width), sums(kBlockedRows * width);
      const BlockedMatmulArgs args{stored.args, panel.data(),         width, nullptr,    false,
                                   y.data(),    FloatDtype::kFloat32, width, sums.data()};
      BlockedStatus got = BlockedStatus::kOk;
      for (Index block = 0; block < w.RowBlocks() && got == BlockedStatus::kOk; ++block) {
        got = variant.matmul(args, block);
      }
      Expect(got == want, "%s: %s, width %ld, got %d", variant.name, what, long{width}, static_cast<int>(got));
    }
  };
  const auto nnz = static_cast<Index>(good.indices.size());
  expect(good, nnz, BlockedStatus::kOk, "nothing");
  expect(good, nnz - 1, BlockedStatus::kBadOffsets, "more than there is");
  for (const std::size_t k : {std::size_t{0}, std::size_t{777}, good.indices.size() - 1}) {
    for (const int index : {40, 0x8000, 0xffff}) {
      RandomBlocked bad = good;
      bad.indices[k] = static_cast<std::uint16_t>(index);
      expect(bad, nnz, BlockedStatus::kBadIndex, "an index outside");
    }
    for (const int code : {7, 255}) {
      RandomBlocked bad = good;
      bad.codes[k] = static_cast<std::uint8_t>(code);
      expect(bad, nnz, BlockedStatus::kBadCode, "a code outside");
    }
  }
  RandomBlocked edge = good;  // the last column block has 20 columns
  edge.indices.back() = 20;
  expect(edge, nnz, BlockedStatus::kBadIndex, "an index past the last column");
  for (const std::size_t i : {std::size_t{0}, std::size_t{300}, good.segments.size() - 1}) {
    for (const std::int32_t segment : {good.segments[i] + 1, -1, INT32_MAX, INT32_MIN, 256 << 16}) {
      RandomBlocked bad = good;
      bad.segments[i] = segment;
      expect(bad, nnz, BlockedStatus::kBadSegment, "a segment that lies");
    }
  }
  RandomBlocked row = good;
  row.segments.back() = 44 << 16 | (row.segments.back() & 0xffff);  // the last block has 44 rows
  expect(row, nnz, BlockedStatus::kBadSegment, "a row outside");
  for (const std::int32_t offset : {-1, INT32_MIN, INT32_MAX}) {
    RandomBlocked bad = good;
    bad.block_offsets[2] = offset;
    expect(bad, nnz, BlockedStatus::kBadOffsets, "an offset outside");
  }
  RandomBlocked falling = good;
  std::swap(falling.block_offsets[2], falling.block_offsets[4]);
  expect(falling, nnz, BlockedStatus::kBadSegment, "offsets out of order");
}

// NaN and infinity reach exactly the rows whose non-zeros meet them, and relu keeps NaN.
void TestNonFinite(const Variant& variant) {
  const std::int32_t row_offsets[] = {0, 1, 2, 3, 3}, col_indices[] = {0, 1, 2};
  std::int32_t block_offsets[2] = {0, 3}, segments[4], sources[3], scratch[kBlockedRows + 1 + 5];
  std::uint16_t indices[3];
  BlockedPack({row_offsets, col_indices, 4, 4, 4, block_offsets, segments, indices, sources, scratch}, 0);
  const float values[] = {2, -1, 1}, x[] = {NAN, INFINITY, 3, NAN};
  for (const Index width : {8, 16, 32, 64}) {
    std::vector<float> panel(4 * width), sums(kBlockedRows * width), y(4);
    kPackPanelScalar({x, FloatDtype::kFloat32, 1, 4, panel.data(), width}, 0, 4);
    for (const bool relu : {false, true}) {
      variant.matmul({{block_offsets, segments, indices, values, BlockedValues::kFloat32, nullptr, 0, 4, 4, 3, 4},
                      panel.data(),
                      width,
                      nullptr,
                      relu,
                      y.data(),
                      FloatDtype::kFloat32,
                      1,
                      sums.data()},
                     0);
      Expect(std::isnan(y[0]) && y[1] == (relu ? 0 : -INFINITY) && y[2] == 3 && y[3] == 0,
             "%s: non-finite x, relu %d, got %g %g %g %g", variant.name, static_cast<int>(relu), double{y[0]},
             double{y[1]}, double{y[2]}, double{y[3]});
    }
  }
}

sigjmp_buf after_illegal_instruction;

// Whether this machine executes bfloat16 instructions, whatever it says of itself.
bool Executes(BlockedMatmulFunction matmul) {
  struct sigaction before, during{};
  during.sa_handler = [](int) { siglongjmp(after_illegal_instruction, 1); };
  sigaction(SIGILL, &during, &before);
  bool executed = false;
  if (sigsetjmp(after_illegal_instruction, 1) == 0) {
    std::mt19937 rng(1);
    TestWords<std::uint16_t>({"probe", CpuIsa::kAvx512Bf16, matmul, true}, 1, 2, 1, 1.0, 8, FloatDtype::kFloat32, rng);
    executed = true;
  }
  sigaction(SIGILL, &before, nullptr);
  return executed;
}

}  // namespace

int main() {
  const Variant all[] = {{"scalar", CpuIsa::kScalar, kBlockedScalar, false},
                         {"avx2", CpuIsa::kAvx2, kBlockedAvx2, false},
                         {"avx512", CpuIsa::kAvx512, kBlockedAvx512, true},
                         {"avx512 source on avx2", CpuIsa::kAvx2, kBlockedAvx512OnAvx2, false}};
  const CpuIsa detected = ProcessCpuIsa().detected;
  std::vector<Variant> variants;
  for (const Variant& variant : all) {
    if (variant.needs <= detected) variants.push_back(variant);
  }
  if (detected >= CpuIsa::kAvx512 && Executes(kBlockedAvx512Bf16)) {
    variants.push_back({"avx512bf16", CpuIsa::kAvx512Bf16, kBlockedAvx512Bf16, true});
  }
  TestShapes(variants);
  for (const Variant& variant : variants) {
    TestWordShapes(variant);
    TestDamage(variant);
    TestNonFinite(variant);
    std::printf("tested %s\n", variant.name);
  }
  return Failures() != 0;
}
