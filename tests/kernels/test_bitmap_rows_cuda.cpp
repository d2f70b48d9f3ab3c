// The columns that the CUDA kernel lists, on shapes around its words and warps and on damaged weights.
#include <random>
#include <vector>

#include "kernels/arrays.h"
#include "kernels/bitmap_matmul/bitmap_rows_cuda.h"
#include "kernels/bitmap_weight.h"
#include "kernels/check.h"
#include "kernels/device.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

std::vector<std::int32_t> Columns(const RandomBitmap& w) {
  DeviceArray<std::uint64_t> bitmap("bitmap", w.bitmap);
  DeviceArray<std::int32_t> offsets("row_offsets", w.row_offsets);
  const auto nnz = static_cast<Index>(w.col_indices.size());
  DeviceArray<std::int32_t> columns("col_indices", nnz);
  ExpectLaunched(BitmapRowsCuda({bitmap.data(), offsets.data(), w.rows, w.columns, nnz, columns.data()}, nullptr),
                 "BitmapRowsCuda");
  return columns.Values();
}

// Only the values of `row` are listed as -1.
void ExpectLost(const RandomBitmap& w, Index row, const char* what) {
  std::vector<std::int32_t> want = w.col_indices;
  for (Index k = w.row_offsets[row]; k < w.row_offsets[row + 1]; ++k) want[k] = -1;
  Expect(Columns(w) == want, "%s of row %ld loses that row", what, static_cast<long>(row));
}

}  // namespace

int main() {
  std::mt19937 rng(1);
  return RunOnDevice([&] {
    const BitmapWay way = kBitmapWays[0];
    for (const Index rows : {0, 1, 7, 8, 9}) {
      for (const Index columns : {0, 1, 63, 64, 65, 2047, 2048, 2049, 4111}) {
        const RandomBitmap w(rows, columns, 0.2, way, rng);
        Expect(Columns(w) == w.col_indices, "%ld rows of %ld", static_cast<long>(rows), static_cast<long>(columns));
      }
    }
    const RandomBitmap w(9, 130, 0.3, way, rng);
    RandomBitmap more = w;
    more.bitmap[5 * 3] ^= 1;
    ExpectLost(more, 5, "a bit too many or too few");
    RandomBitmap outside = w;
    outside.bitmap[8 * 3 + 2] = std::uint64_t{1} << 2;
    ExpectLost(outside, 8, "a bit past the last column");
    RandomBitmap low = w;
    low.row_offsets[0] = -1;
    Expect(Columns(low)[w.row_offsets[1]] == w.col_indices[w.row_offsets[1]] &&
               (w.row_offsets[1] == 0 || Columns(low)[0] == -1),
           "an offset below 0 loses its row");
    RandomBitmap high = w;
    high.row_offsets[9] += 1;
    Expect(Columns(high)[w.row_offsets[8] - 1] == w.col_indices[w.row_offsets[8] - 1] &&
               Columns(high)[w.row_offsets[8]] == -1,
           "an offset past the values loses its row");
    // Of as many values as the row has bits, but outside.
    const std::int32_t first = w.row_offsets[1], last = w.row_offsets[9] - w.row_offsets[8];
    for (const std::int32_t off : {1, first}) {
      RandomBitmap shifted = w;
      shifted.row_offsets[0] = -off, shifted.row_offsets[1] = first - off;
      const auto got = Columns(shifted);
      Expect(got[0] == -1 && got[w.row_offsets[2]] == w.col_indices[w.row_offsets[2]], "a row from %d on is lost",
             -off);
    }
    for (const std::int32_t off : {1, last}) {
      RandomBitmap shifted = w;
      shifted.row_offsets[8] += off, shifted.row_offsets[9] += off;
      const auto got = Columns(shifted);
      Expect(got.back() == -1 && got[0] == w.col_indices[0], "a row until %d past the values is lost", off);
    }
  });
}
