// The CUDA kernels against sums in double, int8 to the bit against the formula, on shapes around their tiles and on
// damaged codes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/codebook_matmul/codebook_matmul_cuda.h"
#include "kernels/common/scalars.h"
#include "kernels/device.h"
#include "kernels/panels/panels.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

enum class Tables { kOne, kRows, kBlocks };

struct Problem {
  Problem(Index rows, Index columns, Index entries, Tables kind, std::mt19937& rng)
      : rows(rows), columns(columns), entries(entries), kind(kind), codes(rows * columns) {
    column_block = kind == Tables::kBlocks ? 70 : std::max<Index>(1, columns);
    tables = kind == Tables::kOne ? 1 : kind == Tables::kRows ? rows : std::max<Index>(1, (columns + 69) / 70);
    for (auto& code : codes) code = static_cast<std::uint8_t>(rng() % entries);
    codebook = Random(tables * entries, rng);
    packed.assign(rows * CodeRowBytes(columns, column_block, CodeBits(entries)), 0);
    CodebookPack(codes.data(), columns, column_block, CodeBits(entries), packed.data(), 0, rows);
  }
  Index Table(Index r, Index c) const {
    return kind == Tables::kOne ? 0 : kind == Tables::kRows ? r : c / column_block;
  }
  float At(Index r, Index c) const { return codebook[Table(r, c) * entries + codes[r * columns + c]]; }

  Index rows, columns, entries, column_block, tables;
  Tables kind;
  std::vector<std::uint8_t> codes, packed;
  std::vector<float> codebook;
};

SampleScale ScaleOfValues(const float* values, Index count) {
  SampleScale scale{};
  SampleScales({values, FloatDtype::kFloat32, count, &scale.scale, &scale.inverse}, 0, 1);
  return scale;
}
int Rounded(float value, SampleScale scale) {
  return scale.inverse == 0 ? 0 : static_cast<int>(std::lrintf(value * scale.inverse));
}
float ToBFloat16Number(float value) { return Widened(ToBFloat16(value)); }

// What int8 gives, by the formula of codebook_matmul.h.
std::vector<float> Int8Formula(const Problem& p, const std::vector<float>& x, Index samples,
                               const std::vector<float>& bias) {
  std::vector<float> y;
  for (Index n = 0; n < samples; ++n) {
    const SampleScale of_x = ScaleOfValues(x.data() + n * p.columns, p.columns);
    for (Index r = 0; r < p.rows; ++r) {
      const SampleScale of_table = p.kind == Tables::kRows ? ScaleOfValues(p.codebook.data() + r * p.entries, p.entries)
                                                           : ScaleOfValues(p.codebook.data(), p.tables * p.entries);
      int sum = 0;
      for (Index c = 0; c < p.columns; ++c) {
        sum += Rounded(p.At(r, c), of_table) * Rounded(x[n * p.columns + c], of_x);
      }
      const float low = of_x.scale < of_table.scale ? of_x.scale : of_table.scale;
      const float high = of_x.scale < of_table.scale ? of_table.scale : of_x.scale;
      y.push_back(std::fma(static_cast<float>(sum) * low, high, bias[r]));
    }
  }
  return y;
}

std::vector<float> Multiply(const Problem& p, CodebookMode mode, FloatDtype floats_as, Index samples, bool relu,
                            const std::vector<float>& x_numbers, const std::vector<float>& bias_numbers) {
  DeviceArray<std::uint8_t> codes("codes", p.packed);
  DeviceArray<float> codebook("codebook", p.codebook), bias("bias", bias_numbers);
  DeviceFloats x("x", floats_as, x_numbers), y("y", floats_as, samples * p.rows);
  CodebookMatmulCudaArgs args{
      {codes.data(), codebook.data(), p.entries, p.kind == Tables::kRows, p.rows, p.columns, p.column_block},
      mode,
      x.data(),
      floats_as,
      bias.data(),
      relu,
      y.data(),
      samples};
  const CodebookPlan plan = CodebookPlanCuda(args);
  DeviceArray<uint4> packed("packed", samples * plan.packed_stride / 16);
  DeviceArray<float> parts("parts", plan.part_count > 1 ? plan.part_count * samples * p.rows : 0),
      scales("scales", samples);
  args.part_count = plan.part_count;
  if (plan.part_count > 1) args.parts = parts.data();
  if (plan.packed_stride > 0) {
    args.packed = packed.data();
    args.packed_stride = plan.packed_stride;
    args.sample_scales = scales.data();
  }
  if (mode == CodebookMode::kInt8 && plan.packed_stride == 0) return {};  // the ops' test rounds for it
  ExpectLaunched(CodebookMatmulCuda(args, nullptr), "CodebookMatmulCuda");
  return y.Values();
}

void TestOne(const Problem& p, FloatDtype floats_as, Index samples, std::mt19937& rng) {
  auto x = Random(samples * p.columns, rng);
  const auto bias = Random(p.rows, rng);
  for (float& number : x) {  // to be rounded where the mode says so
    if (floats_as == FloatDtype::kFloat32) number += number * std::ldexp(static_cast<float>(rng() % 512), -16);
  }
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s, %ld x %ld, entries %ld, tables %d, %ld samples, floats %d", what, long{p.rows}, long{p.columns},
           long{p.entries}, static_cast<int>(p.kind), long{samples}, static_cast<int>(floats_as));
  };
  for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16}) {
    const auto got = Multiply(p, mode, floats_as, samples, false, x, bias);
    const bool clips = floats_as == FloatDtype::kFloat32 && (samples % 2 == 1) != (samples > 32);
    const auto relu = clips ? Multiply(p, mode, floats_as, samples, true, x, bias) : std::vector<float>();
    bool near = true, clipped = true;
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < p.rows; ++r) {
        Sum sum;
        sum.Add(bias[r]);
        for (Index c = 0; c < p.columns; ++c) {
          const float weight = mode == CodebookMode::kExact ? p.At(r, c) : ToBFloat16Number(p.At(r, c));
          const float number = x[n * p.columns + c];
          sum.Add(double{mode == CodebookMode::kExact ? number : ToBFloat16Number(number)} * weight);
        }
        const float value = got[n * p.rows + r];
        near = near && sum.Near(value, floats_as, 2);
        clipped = clipped && (relu.empty() || relu[n * p.rows + r] == (value < 0 ? 0 : value));
      }
    }
    complain(near, mode == CodebookMode::kExact ? "exact" : "bfloat16");
    complain(clipped, "relu");
  }
  if (floats_as != FloatDtype::kFloat32) return;
  const auto int8 = Multiply(p, CodebookMode::kInt8, floats_as, samples, false, x, bias);
  if (!int8.empty()) complain(int8 == Int8Formula(p, x, samples, bias), "int8");
}

// Rows with a code outside become NaN in every sample, the others stay; an infinite entry that no code has is nothing.
void TestDamage(Index columns, Index samples, Tables kind, std::mt19937& rng) {
  for (const Index entries : {3, 11, 200}) {
    if ((kind == Tables::kRows || samples > 1) && entries == 3) continue;
    if (kind == Tables::kRows && entries == 200) continue;
    Problem p(70, columns, entries, kind, rng);
    for (auto& code : p.codes) code = std::max<std::uint8_t>(code, 1);
    // Those of different lanes.
    for (const Index at : {3 * columns + 5, 20 * columns + columns - 30, 66 * columns + columns - 1}) {
      p.codes[at] = static_cast<std::uint8_t>(entries);
    }
    CodebookPack(p.codes.data(), columns, p.column_block, CodeBits(entries), p.packed.data(), 0, p.rows);
    const auto x = Random(samples * columns, rng);
    for (const auto mode : {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8}) {
      if (mode != CodebookMode::kInt8) {
        for (Index t = 0; t < p.tables; ++t) p.codebook[t * entries] = std::numeric_limits<float>::infinity();
      } else {
        p.codebook = Random(p.tables * entries, rng);
      }
      const auto got = Multiply(p, mode, FloatDtype::kFloat32, samples, true, x, std::vector<float>(p.rows, 0.0f));
      for (Index i = 0; i < static_cast<Index>(got.size()); ++i) {
        const Index r = i % p.rows;
        Expect(std::isnan(got[i]) == (r == 3 || r == 20 || r == 66) && !std::isinf(got[i]),
               "damage, mode %d, row %ld, %ld entries, %ld samples", static_cast<int>(mode), long{r}, long{entries},
               long{samples});
      }
    }
  }
}

void TestDecodeAndReduce(const Problem& p, std::mt19937& rng) {
  DeviceArray<std::uint8_t> codes("codes", p.packed);
  DeviceArray<float> codebook("codebook", p.codebook), dense("dense", p.rows * p.columns),
      sums("sums", p.tables * p.entries);
  const CodebookWeight weight{codes.data(), codebook.data(), p.entries,     p.kind == Tables::kRows,
                              p.rows,       p.columns,       p.column_block};
  ExpectLaunched(CodebookDecodeCuda({weight, dense.data()}, nullptr), "CodebookDecodeCuda");
  const auto got = dense.Values();
  const auto numbers = Random(p.rows * p.columns, rng);
  DeviceArray<float> grad("grad", numbers);
  const Index parts = CodebookReducePartsCuda(weight, p.tables);
  DeviceArray<double> partial("partial", parts * p.tables * p.entries);
  ExpectLaunched(CodebookReduceCuda({weight, grad.data(), sums.data(), p.tables, parts, partial.data()}, nullptr),
                 "CodebookReduceCuda");
  std::vector<Sum> wanted(p.tables * p.entries);
  bool decoded = true;
  for (Index r = 0; r < p.rows; ++r) {
    for (Index c = 0; c < p.columns; ++c) {
      decoded = decoded && got[r * p.columns + c] == p.At(r, c);
      wanted[p.Table(r, c) * p.entries + p.codes[r * p.columns + c]].Add(numbers[r * p.columns + c]);
    }
  }
  bool reduced = true;
  const auto summed = sums.Values();
  for (std::size_t i = 0; i < wanted.size(); ++i) reduced = reduced && wanted[i].Near(summed[i], FloatDtype::kFloat32);
  Expect(decoded, "decode, %ld x %ld, entries %ld", long{p.rows}, long{p.columns}, long{p.entries});
  Expect(reduced, "reduce, %ld x %ld, entries %ld", long{p.rows}, long{p.columns}, long{p.entries});
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(7);
    struct Case {
      Index rows, columns, entries, samples;
      Tables kind;
    };
    const Case cases[] = {
        {1, 1, 1, 1, Tables::kOne},      {33, 300, 4, 1, Tables::kOne},   {31, 260, 16, 8, Tables::kOne},
        {35, 300, 200, 3, Tables::kOne}, {33, 136, 13, 2, Tables::kRows}, {5, 71, 256, 1, Tables::kOne},
        {40, 515, 9, 17, Tables::kOne},  {17, 140, 16, 9, Tables::kRows}, {3, 520, 200, 33, Tables::kOne},
        {130, 35, 16, 65, Tables::kOne}, {65, 70, 5, 34, Tables::kRows},  {9, 150, 7, 4, Tables::kBlocks},
        {7, 140, 3, 66, Tables::kOne},   {9, 68, 4, 2, Tables::kRows},    {6, 40, 100, 12, Tables::kRows},
        {0, 40, 16, 40, Tables::kOne},   {5, 68, 16, 3, Tables::kOne},    {5, 68, 200, 20, Tables::kOne},
        {5, 68, 16, 20, Tables::kRows},  {5, 36, 200, 66, Tables::kOne},  {5, 36, 16, 66, Tables::kRows},
    };
    for (const Case& c : cases) {
      const Problem p(c.rows, c.columns, c.entries, c.kind, rng);
      for (const FloatDtype floats_as : kFloats) TestOne(p, floats_as, c.samples, rng);
      TestDecodeAndReduce(p, rng);
    }
    for (const Index samples : {1, 9, 34}) {
      TestDamage(132, samples, Tables::kOne, rng);
      if (samples != 9) TestDamage(68, samples, Tables::kRows, rng);
    }
  });
}
