// Every variant against sums in double, or the reference's bits in int8, on awkward shapes and unaligned memory, and
// against codes outside their tables.
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/panels/panels.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  CodebookKernels kernels;
  std::vector<CodebookMode> modes;
};

struct Problem {
  Index rows, columns, column_block, entries;
  bool per_row;
  std::vector<std::uint8_t> codes;  // [rows, columns]
  std::vector<float> codebook;
  Unaligned<std::uint8_t> packed;
  Unaligned<float> stored_codebook;

  Problem(Index rows, Index columns, Index column_block, Index entries, bool per_row, std::mt19937& rng)
      : rows(rows),
        columns(columns),
        column_block(column_block),
        entries(entries),
        per_row(per_row),
        codes(Codes(rows * columns, entries, rng)),
        codebook(
            Random(entries * std::max(per_row ? rows : (columns + column_block - 1) / column_block, Index{1}), rng)),
        packed(std::vector<std::uint8_t>(rows * RowBytes(), 0xff)),
        stored_codebook(codebook) {
    CodebookPack(codes.data(), columns, column_block, CodeBits(entries), packed.data(), 0, rows);
  }

  static std::vector<std::uint8_t> Codes(Index count, Index entries, std::mt19937& rng) {
    std::vector<std::uint8_t> codes(count);
    for (auto& code : codes) code = static_cast<std::uint8_t>(rng() % entries);
    return codes;
  }
  Index RowBytes() const { return CodeRowBytes(columns, column_block, CodeBits(entries)); }
  CodebookWeight Weight() {
    return {packed.data(), stored_codebook.data(), entries, per_row, rows, columns, column_block};
  }
  float At(Index r, Index c) const {
    return codebook[(per_row ? r : c / column_block) * entries + codes[r * columns + c]];
  }
};

// y of one panel's samples, which some calls want sample by sample and others row by row.
std::vector<float> Run(const CodebookKernels& kernels, Problem& p, CodebookMode mode, const std::vector<float>& x,
                       const std::vector<float>& bias, Index samples, Index width, FloatDtype y_as, bool relu,
                       CodebookStatus* status) {
  Unaligned<float> stored_x(x), stored_bias(bias);
  std::vector<float> scales(width), inverses(width);
  std::vector<std::int32_t> sums(width);
  kWordPanelsScalar.scales({stored_x.data(), FloatDtype::kFloat32, p.columns, scales.data(), inverses.data()}, 0,
                           samples);
  SampleScale table{};
  SampleScales(
      {p.codebook.data(), FloatDtype::kFloat32, static_cast<Index>(p.codebook.size()), &table.scale, &table.inverse}, 0,
      1);
  const int bits = CodeBits(p.entries);
  Unaligned<float> panel(std::vector<float>(CodebookPanelBytes(p.RowBytes(), bits, mode, width) / 4 + 1, NAN));
  const CodebookSamplesArgs pack{stored_x.data(), FloatDtype::kFloat32, samples, p.columns,  p.column_block, bits, mode,
                                 inverses.data(), panel.data(),         width,   sums.data()};
  const Index chunks = p.RowBytes() / kCodeChunkBytes;
  InParts(chunks / 2, chunks, [&](Index begin, Index end) { kernels.pack_samples(pack, begin, end); });
  Output y(samples * p.rows, y_as);
  CodebookMatmulArgs args{p.Weight(),  mode,          panel.data(),       width, samples,  scales.data(), sums.data(),
                          table.scale, table.inverse, stored_bias.data(), relu,  y.data(), y_as,          nullptr};
  // Two samples change places, so that not all lie side by side.
  std::vector<Index> places(samples);
  for (Index n = 0; n < samples; ++n) places[n] = n;
  std::swap(places.front(), places[samples / 2]);
  const bool by_rows = (p.columns + samples) % 2 == 0;
  if (by_rows) args.places = places.data(), args.place_step = samples;
  std::atomic<CodebookStatus> worst = CodebookStatus::kOk;
  InParts(p.rows / 2, p.rows, [&](Index begin, Index end) {
    Unaligned<float> scratch(std::vector<float>(CodebookScratchBytes(width, p.per_row) / 4, NAN));
    CodebookMatmulArgs part = args;
    part.sums = scratch.data();
    const CodebookStatus found = kernels.matmul(part, begin, end);
    if (found != CodebookStatus::kOk) worst = found;
  });
  *status = worst;
  const auto stored = y.Values();
  if (!by_rows) return stored;
  std::vector<float> values;
  for (Index n = 0; n < samples; ++n) {
    for (Index r = 0; r < p.rows; ++r) values.push_back(stored[places[n] + r * samples]);
  }
  return values;
}

void TestOne(const Variant& variant, Problem& p, CodebookMode mode, Index samples, Index width, FloatDtype y_as,
             bool relu, std::mt19937& rng) {
  const auto x = Random(samples * p.columns, rng), bias = Random(p.rows, rng);
  CodebookStatus status;
  const auto got = Run(variant.kernels, p, mode, x, bias, samples, width, y_as, relu, &status);
  bool right = status == CodebookStatus::kOk;
  if (mode == CodebookMode::kInt8) {
    right &= got == Run(kCodebookScalar, p, mode, x, bias, samples, width, y_as, relu, &status);
  } else {
    for (Index n = 0; n < samples; ++n) {
      for (Index r = 0; r < p.rows; ++r) {
        Sum want;
        for (Index c = 0; c < p.columns; ++c) want.Add(double{p.At(r, c)} * x[n * p.columns + c]);
        want.Add(bias[r]);
        const float y = got[n * p.rows + r];
        right &= relu && y == 0 ? want.value <= std::ldexp((want.terms + 1) * want.magnitude, -24)
                                : want.Near(y, y_as) && !(relu && y < 0);
      }
    }
  }
  Expect(right, "%s: %ld x %ld in blocks of %ld, %ld entries, rows %d, mode %d, %ld of %ld samples", variant.name,
         long{p.rows}, long{p.columns}, long{p.column_block}, long{p.entries}, static_cast<int>(p.per_row),
         static_cast<int>(mode), long{samples}, long{width});
}

// Samples that are no panel, of which some are not wanted.
void TestApart(const Variant& variant, Problem& p, std::mt19937& rng) {
  constexpr Index kWidth = kCodebookMaxWidth, kNumbers = 500;
  const auto numbers = Random(kNumbers, rng);
  Unaligned<float> x(numbers);
  std::vector<Index> offsets(p.columns), places(kWidth);
  for (Index& offset : offsets) offset = static_cast<Index>(rng() % (kNumbers - kWidth + 1));
  Index wanted = 0;
  for (Index n = 0; n < kWidth; ++n) places[n] = n % 20 < 17 ? wanted++ : -1;
  Output y(p.rows * wanted, FloatDtype::kFloat32);
  std::vector<float> scratch(CodebookScratchBytes(kWidth, p.per_row) / 4, NAN);
  CodebookMatmulArgs args{};
  args.weight = p.Weight(), args.panel = x.data(), args.width = args.samples = kWidth;
  args.y = y.data(), args.sums = scratch.data();
  args.places = places.data(), args.place_step = wanted, args.offsets = offsets.data();
  bool right = variant.kernels.matmul(args, 0, p.rows) == CodebookStatus::kOk;
  const auto got = y.Values();
  for (Index r = 0; r < p.rows; ++r) {
    for (Index n = 0; n < kWidth; ++n) {
      if (places[n] < 0) continue;
      Sum want;
      for (Index c = 0; c < p.columns; ++c) want.Add(double{p.At(r, c)} * numbers[offsets[c] + n]);
      right &= want.Near(got[r * wanted + places[n]], FloatDtype::kFloat32);
    }
  }
  Expect(right, "%s: %ld columns apart, %ld entries, rows %d", variant.name, long{p.columns}, long{p.entries},
         static_cast<int>(p.per_row));
}

void TestDamaged(const Variant& variant, std::mt19937& rng) {
  for (const Index entries : {3, 8, 11, 30, 40, 200}) {
    for (const Index row : {0, 4, 18}) {
      Problem p(19, 150, 150, entries, false, rng);
      auto bytes = p.packed.Values();
      bytes[row * p.RowBytes() + 40] = 0xff;
      p.packed = Unaligned<std::uint8_t>(bytes);
      for (const Index width : {1, 8, 16}) {
        for (const CodebookMode mode : variant.modes) {
          CodebookStatus status;
          Run(variant.kernels, p, mode, Random(150, rng), Random(19, rng), 1, width, kFloats[0], false, &status);
          Expect(status == CodebookStatus::kBadCode, "%s: a code outside %ld entries", variant.name, long{entries});
        }
      }
      std::vector<float> dense(19 * 150);
      Expect(CodebookDecode(p.Weight(), dense.data(), 0, 19) == CodebookStatus::kBadCode, "decoding a bad code");
    }
  }
}

// The first entry, which what is left over of a chunk names, is not a number and no column has it.
void TestUnusedNan(const Variant& variant, std::mt19937& rng) {
  for (const Index entries : {4, 16, 32, 64, 256}) {
    for (const Index columns : {1, 31, 40, 130, 250}) {
      Problem p(7, columns, columns, entries, false, rng);
      for (auto& code : p.codes) code = std::max<std::uint8_t>(code, 1);
      CodebookPack(p.codes.data(), columns, columns, CodeBits(entries), p.packed.data(), 0, 7);
      p.codebook[0] = NAN;
      p.stored_codebook = Unaligned<float>(p.codebook);
      for (const Index width : {1, 8, 16, 64}) {
        for (const CodebookMode mode : variant.modes) {
          if (mode != CodebookMode::kInt8) TestOne(variant, p, mode, width, width, kFloats[0], false, rng);
        }
      }
    }
  }
}

sigjmp_buf after_illegal_instruction;

// Whether this machine executes the variant's instructions, whatever it says of itself.
bool Executes(const Variant& variant) {
  struct sigaction before, during{};
  during.sa_handler = [](int) { siglongjmp(after_illegal_instruction, 1); };
  sigaction(SIGILL, &during, &before);
  bool executed = false;
  if (sigsetjmp(after_illegal_instruction, 1) == 0) {
    std::mt19937 rng(1);
    Problem p(1, 1, 1, 16, false, rng);
    TestOne(variant, p, variant.modes[0], 1, 1, kFloats[0], false, rng);
    executed = true;
  }
  sigaction(SIGILL, &before, nullptr);
  return executed;
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  const std::vector<CodebookMode> all = {CodebookMode::kExact, CodebookMode::kBFloat16, CodebookMode::kInt8};
  std::vector<Variant> variants = {{"scalar", CpuIsa::kScalar, kCodebookScalar, all},
                                   {"avx2", CpuIsa::kAvx2, kCodebookAvx2, all},
                                   {"avx512", CpuIsa::kAvx512, kCodebookAvx512, all}};
  std::erase_if(variants, [](const Variant& v) { return v.needs > ProcessCpuIsa().detected; });
  const Variant pairs{"avx512bf16", CpuIsa::kAvx512Bf16, kCodebookAvx512Bf16, {CodebookMode::kBFloat16}};
  if (ProcessCpuIsa().detected >= CpuIsa::kAvx512 && Executes(pairs)) variants.push_back(pairs);
  const Index widths[] = {1, 2, 4, 8, 16, 32, 48, 64};
  for (const Index entries : {1, 4, 5, 16, 17, 32, 33, 64, 65, 256}) {
    for (const Index columns : {0, 1, 64, 129, 257, 331}) {
      for (const Index block : {columns, Index{100}}) {
        for (const bool per_row : {false, true}) {
          if (per_row && block < columns) continue;
          Problem p(13, columns, std::max(block, Index{1}), entries, per_row, rng);
          std::vector<std::uint8_t> codes(p.codes.size());
          CodebookUnpack(p.packed.data(), columns, p.column_block, CodeBits(entries), codes.data(), 0, p.rows);
          Expect(codes == p.codes, "codes of %ld columns come back", long{columns});
          for (const Variant& variant : variants) {
            if (variant.modes[0] == CodebookMode::kExact) TestApart(variant, p, rng);
            for (const Index width : widths) {
              const Index samples = std::max(width - static_cast<Index>(rng() % (width / 2 + 1)), Index{1});
              const auto y_as = kFloats[rng() % 2];
              for (const CodebookMode mode : variant.modes) {
                TestOne(variant, p, mode, samples, width, y_as, rng() % 2 == 0, rng);
              }
            }
          }
        }
      }
    }
  }
  // Rows around the tiles of each width, and the most that keep their sums.
  for (const Index rows : {1, 5, 6, 7, 12, 16, 17, 25, 192}) {
    Problem p(rows, 140, 140, 16, false, rng);
    for (const Variant& variant : variants) {
      for (const Index width : widths) TestOne(variant, p, variant.modes[0], width, width, kFloats[0], false, rng);
    }
  }
  // More columns than the part of a panel that all rows meet at once, in one block of them and in several.
  for (const Index entries : {4, 16, 200}) {
    for (const Index block : {7001, 3300}) {
      Problem p(19, 7001, block, entries, block == 7001 && entries == 16, rng);
      for (const Variant& variant : variants) {
        for (const Index width : {1, 4, 8, 16}) {
          for (const CodebookMode mode : variant.modes) TestOne(variant, p, mode, 1, width, kFloats[0], true, rng);
        }
      }
    }
  }
  for (const Variant& variant : variants) {
    TestDamaged(variant, rng);
    TestUnusedNan(variant, rng);
    std::printf("tested %s\n", variant.name);
  }
  return Failures() != 0;
}
