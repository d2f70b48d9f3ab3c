// The CUDA kernels against the scalar level, to the bit, on shapes around their tiles and on damaged codes and indices.
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/check.h"
#include "kernels/codebook_embedding/codebook_embedding_cuda.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Problem {
  Index rows, columns, column_block, entries, tables;
  bool per_row;
  std::vector<float> codebook;
  std::vector<std::uint8_t> packed;

  Problem(Index rows, Index columns, Index column_block, Index entries, bool per_row, std::mt19937& rng)
      : rows(rows),
        columns(columns),
        column_block(column_block),
        entries(entries),
        tables(per_row ? rows : (columns + column_block - 1) / column_block),
        per_row(per_row),
        codebook(Random(entries * tables, rng)),
        packed(rows * CodeRowBytes(columns, column_block, CodeBits(entries))) {
    std::vector<std::uint8_t> codes(rows * columns);
    for (auto& code : codes) code = static_cast<std::uint8_t>(rng() % entries);
    CodebookPack(codes.data(), columns, column_block, CodeBits(entries), packed.data(), 0, rows);
  }
  CodebookWeight Weight() const {
    return {packed.data(), codebook.data(), entries, per_row, rows, columns, column_block};
  }
};

struct OnDevice {
  OnDevice(const Problem& p, const std::vector<std::int64_t>& indices)
      : codes("codes", p.packed),
        codebook("codebook", p.codebook),
        wide("indices", indices),
        narrow("indices", std::vector<std::int32_t>(indices.begin(), indices.end())),
        weight(p.Weight()) {
    weight.codes = codes.data();
    weight.codebook = codebook.data();
  }
  CodebookIndices Indices(bool as_int64) {
    return {as_int64 ? static_cast<const void*>(wide.data()) : narrow.data(), as_int64};
  }
  DeviceArray<std::uint8_t> codes;
  DeviceArray<float> codebook;
  DeviceArray<std::int64_t> wide;
  DeviceArray<std::int32_t> narrow;
  CodebookWeight weight;
};

std::vector<float> LookUp(const Problem& p, const std::vector<std::int64_t>& indices, FloatDtype y_as, bool as_int64) {
  OnDevice on(p, indices);
  const auto count = static_cast<Index>(indices.size());
  DeviceFloats y("y", y_as, count * p.columns);
  ExpectLaunched(CodebookEmbeddingCuda({on.weight, on.Indices(as_int64), count, y.data(), y_as}, nullptr),
                 "CodebookEmbeddingCuda");
  return y.Values();
}

void TestOne(const Problem& p, Index count, std::mt19937& rng) {
  std::vector<std::int64_t> indices(count);
  for (auto& index : indices) index = static_cast<std::int64_t>(rng() % p.rows);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %ld of %ld x %ld in blocks of %ld, %ld entries, rows %d", what, long{count}, long{p.rows},
           long{p.columns}, long{p.column_block}, long{p.entries}, static_cast<int>(p.per_row));
  };
  for (const FloatDtype y_as : kFloats) {
    Output want(count * p.columns, y_as);
    kCodebookEmbeddingScalar({p.Weight(), {indices.data(), true}, want.data(), y_as}, 0, count);
    complain(LookUp(p, indices, y_as, rng() % 2 == 0) == want.Values(), "y");
  }
  const auto grad = Random(count * p.columns, rng);
  std::vector<double> want(p.codebook.size());
  const Index padding = p.rows / 2;
  CodebookEmbeddingReduce({p.Weight(), {indices.data(), true}, padding, grad.data(), want.data()}, 0, count, 0, p.rows);
  OnDevice on(p, indices);
  DeviceArray<float> of_y("grad", grad), sums("sums", p.codebook.size());
  ExpectLaunched(CodebookEmbeddingReduceCuda(
                     {on.weight, on.Indices(false), count, padding, of_y.data(), sums.data(), p.tables}, nullptr),
                 "CodebookEmbeddingReduceCuda");
  const auto got = sums.Values();
  bool near = true;
  for (std::size_t k = 0; k < got.size(); ++k) near = near && std::fabs(got[k] - want[k]) <= 1e-5;
  complain(near, "sums");
}

std::vector<float> Reduce(const Problem& p, const std::vector<std::int64_t>& indices, Index padding,
                          const std::vector<float>& grad) {
  OnDevice on(p, indices);
  DeviceArray<float> of_y("grad", grad), sums("sums", p.codebook.size());
  ExpectLaunched(CodebookEmbeddingReduceCuda({on.weight, on.Indices(true), static_cast<Index>(indices.size()), padding,
                                              of_y.data(), sums.data(), p.tables},
                                             nullptr),
                 "CodebookEmbeddingReduceCuda");
  return sums.Values();
}

// Such rows become NaN, the others stay; they have no part in sums.
void TestDamage(std::mt19937& rng) {
  for (const Index entries : {5, 100}) {
    Problem p(70, 131, 131, entries, false, rng);
    // The first code without an entry, of 4 bits and of 8.
    p.packed[66 * p.packed.size() / 70 + 7] = static_cast<std::uint8_t>(entries == 5 ? 0x50 : entries);
    const auto got = LookUp(p, {3, 66, 70, -1, 65}, FloatDtype::kFloat32, true);
    for (Index i = 0; i < 5; ++i) {
      for (Index c = 0; c < 131; ++c) {
        Expect(std::isnan(got[i * 131 + c]) == (i == 1 || i == 2 || i == 3), "damage, index %ld", long{i});
      }
    }
    const auto grad = Random(4 * 131, rng);
    const std::vector<float> last(grad.begin() + 3 * 131, grad.end());
    Expect(Reduce(p, {-1, 70, 9, 65}, 9, grad) == Reduce(p, {65}, 9, last), "sums without what is damaged or padding");
  }
}

}  // namespace

int main() {
  return RunOnDevice([] {
    std::mt19937 rng(3);
    for (const Index entries : {3, 16, 200}) {
      for (const Index columns : {1, 33, 150, 256}) {
        TestOne({11, columns, columns, entries, false, rng}, 9, rng);
        TestOne({11, columns, columns, entries, true, rng}, 5, rng);
        TestOne({11, columns, 70, entries, false, rng}, 1, rng);
      }
    }
    TestDamage(rng);
  });
}
