// Every variant against the weight that the codes stand for, to the bit, on awkward shapes, unaligned memory, indices
// outside the rows and codes outside their tables.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_embedding/codebook_embedding.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"
#include "kernels/parts.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  CodebookLookup lookup;
};

struct Problem {
  Index rows, columns, column_block, entries;
  bool per_row;
  std::vector<float> codebook;
  Unaligned<std::uint8_t> packed;
  Unaligned<float> stored_codebook;
  std::vector<float> dense;

  Problem(Index rows, Index columns, Index column_block, Index entries, bool per_row, std::mt19937& rng)
      : rows(rows),
        columns(columns),
        column_block(column_block),
        entries(entries),
        per_row(per_row),
        codebook(
            Numbers(entries * std::max(per_row ? rows : (columns + column_block - 1) / column_block, Index{1}), rng)),
        packed(std::vector<std::uint8_t>(rows * RowBytes(), 0xff)),
        stored_codebook(codebook) {
    std::vector<std::uint8_t> codes(rows * columns);
    for (Index i = 0; i < rows * columns; ++i) {
      codes[i] = static_cast<std::uint8_t>(rng() % entries);
      const Index table = per_row ? i / columns : i % columns / column_block;
      dense.push_back(codebook[table * entries + codes[i]]);
    }
    CodebookPack(codes.data(), columns, column_block, CodeBits(entries), packed.data(), 0, rows);
  }

  static std::vector<float> Numbers(Index count, std::mt19937& rng) {
    auto numbers = Random(count, rng);
    numbers[rng() % count] = NAN;
    numbers[rng() % count] = -INFINITY;
    return numbers;
  }
  Index RowBytes() const { return CodeRowBytes(columns, column_block, CodeBits(entries)); }
  CodebookWeight Weight() {
    return {packed.data(), stored_codebook.data(), entries, per_row, rows, columns, column_block};
  }
};

// Indices as int64 or int32, in memory that no element is aligned in.
struct Stored {
  Stored(const std::vector<std::int64_t>& indices, bool wide)
      : wide(indices), narrow(std::vector<std::int32_t>(indices.begin(), indices.end())), args{nullptr, wide} {
    args.data = wide ? static_cast<const void*>(this->wide.data()) : narrow.data();
  }
  Unaligned<std::int64_t> wide;
  Unaligned<std::int32_t> narrow;
  CodebookIndices args;
};

void TestLookup(const Variant& variant, Problem& p, Index count, std::mt19937& rng) {
  std::vector<std::int64_t> indices(count);
  for (auto& index : indices) index = static_cast<std::int64_t>(rng() % p.rows);
  const Stored stored(indices, rng() % 2 == 0);
  for (const FloatDtype y_as : kFloats) {
    const Index size = y_as == FloatDtype::kFloat32 ? 4 : 2;
    // With bytes around y that nobody may write.
    Unaligned<std::uint8_t> y(std::vector<std::uint8_t>(count * p.columns * size + 128, 0xa5));
    const CodebookEmbeddingArgs args{p.Weight(), stored.args, y.data() + 64, y_as};
    std::atomic<bool> ok = true;
    InParts(count / 3, count, [&](Index begin, Index end) {
      if (variant.lookup(args, begin, end) != CodebookEmbeddingStatus::kOk) ok = false;
    });
    std::vector<std::uint8_t> want(count * p.columns * size + 128, 0xa5);
    for (Index i = 0; i < count; ++i) {
      for (Index c = 0; c < p.columns; ++c) {
        Store(want.data() + 64, y_as, i * p.columns + c, p.dense[indices[i] * p.columns + c]);
      }
    }
    Expect(ok && y.Values() == want, "%s: %ld of %ld x %ld in blocks of %ld, %ld entries, rows %d, %ld bytes",
           variant.name, long{count}, long{p.rows}, long{p.columns}, long{p.column_block}, long{p.entries},
           static_cast<int>(p.per_row), long{size});
  }
}

void TestDamaged(const Variant& variant, std::mt19937& rng) {
  for (const Index entries : {3, 11, 30, 200}) {
    Problem p(40, 150, 150, entries, false, rng);
    auto bytes = p.packed.Values();
    bytes[38 * p.RowBytes() + 40] = 0xff;
    p.packed = Unaligned<std::uint8_t>(bytes);
    std::vector<float> y(50 * 150);
    const auto look_up = [&](const std::vector<std::int64_t>& indices) {
      const Stored stored(indices, true);
      const CodebookEmbeddingArgs args{p.Weight(), stored.args, y.data(), FloatDtype::kFloat32};
      return variant.lookup(args, 0, static_cast<Index>(indices.size()));
    };
    std::vector<std::int64_t> indices(50);
    for (auto& index : indices) index = static_cast<std::int64_t>(rng() % 38);
    Expect(look_up(indices) == CodebookEmbeddingStatus::kOk, "%s: rows without damage", variant.name);
    for (const Index at : {0, 15, 16, 49}) {
      auto bad = indices;
      bad[at] = 38;
      Expect(look_up(bad) == CodebookEmbeddingStatus::kBadCode, "%s: a code outside %ld", variant.name, long{entries});
      for (const Index index : {Index{40}, Index{-1}, Index{1} << 40}) {
        bad[at] = index;
        Expect(look_up(bad) == CodebookEmbeddingStatus::kBadIndex, "%s: index %ld", variant.name, long{index});
      }
    }
  }
}

void TestReduce(std::mt19937& rng) {
  for (const bool per_row : {false, true}) {
    for (const Index block : {Index{50}, Index{150}}) {
      if (per_row && block < 150) continue;
      Problem p(7, 150, block, 5, per_row, rng);
      std::vector<std::int64_t> indices(30);
      for (auto& index : indices) index = static_cast<std::int64_t>(rng() % 7);
      const Stored stored(indices, false);
      const auto grad = Random(30 * 150, rng);
      std::vector<double> sums(p.codebook.size()), want(p.codebook.size());
      std::vector<std::uint8_t> codes(7 * 150);
      CodebookUnpack(p.packed.data(), 150, block, CodeBits(5), codes.data(), 0, 7);
      for (Index i = 0; i < 30; ++i) {
        for (Index c = 0; c < 150 && indices[i] != 2; ++c) {
          const Index table = per_row ? indices[i] : c / block;
          want[table * 5 + codes[indices[i] * 150 + c]] += grad[i * 150 + c];
        }
      }
      const CodebookEmbeddingReduceArgs args{p.Weight(), stored.args, 2, grad.data(), sums.data()};
      bool ok = CodebookEmbeddingReduce(args, 0, 30, 0, 4) == CodebookEmbeddingStatus::kOk;
      ok = ok && CodebookEmbeddingReduce(args, 0, 30, 4, 7) == CodebookEmbeddingStatus::kOk;
      for (std::size_t k = 0; k < sums.size(); ++k) ok = ok && std::fabs(sums[k] - want[k]) < 1e-9;
      Expect(ok, "sums, rows %d, blocks of %ld", static_cast<int>(per_row), long{block});
    }
  }
}

}  // namespace

int main() {
  std::mt19937 rng(0);
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kCodebookEmbeddingScalar},
                              {"avx2", CpuIsa::kAvx2, kCodebookEmbeddingAvx2},
                              {"avx512", CpuIsa::kAvx512, kCodebookEmbeddingAvx512}};
  for (const Index entries : {1, 4, 5, 16, 17, 32, 33, 256}) {
    for (const Index columns : {0, 1, 64, 129, 257, 331}) {
      for (const Index block : {columns, Index{100}}) {
        for (const bool per_row : {false, true}) {
          if (per_row && block < columns) continue;
          Problem p(13, columns, std::max(block, Index{1}), entries, per_row, rng);
          for (const Variant& variant : variants) {
            if (ProcessCpuIsa().detected < variant.needs) continue;
            for (const Index count : {0, 1, 15, 16, 17, 33}) TestLookup(variant, p, count, rng);
          }
        }
      }
    }
  }
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected >= variant.needs) TestDamaged(variant, rng);
  }
  TestReduce(rng);
  return Failures() != 0;
}
