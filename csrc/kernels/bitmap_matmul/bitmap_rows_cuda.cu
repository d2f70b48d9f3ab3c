#include "kernels/bitmap_matmul/bitmap_rows_cuda.h"
#include "kernels/bitmap_matmul/bitmap_weight.cuh"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

// A warp lists one row, a lane the bits of a word.
struct ListedRowTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ListColumns(BitmapRowsCudaArgs a) {
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kWarps + threadIdx.x / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (r >= a.rows) return;
  const std::int32_t begin = a.row_offsets[r], end = a.row_offsets[r + 1];
  if (begin < 0 || end < begin || end > a.nnz) return;
  const std::int64_t words = CeilDiv(a.columns, kWordBits);
  const int used = static_cast<int>(a.columns % kWordBits);
  const std::uint64_t* bits = a.bitmap + r * words;
  int count = 0;
  bool outside = false;
  for (std::int64_t w = lane; w < words; w += kWarpSize) {
    count += __popcll(bits[w]);
    outside |= w == words - 1 && used != 0 && bits[w] >> used != 0;
  }
  if (__any_sync(kWholeWarp, outside) || WarpSum(count) != end - begin) return;
  std::int32_t* to = a.col_indices + begin;
  for (std::int64_t first = 0; first < words; first += kWarpSize) {
    std::uint64_t word = first + lane < words ? bits[first + lane] : 0;
    const int own = __popcll(word), through = SumThroughLane(own);
    std::int32_t* next = to + through - own;
    for (; word != 0; word &= word - 1) {
      *next++ = static_cast<std::int32_t>((first + lane) * kWordBits + __ffsll(static_cast<long long>(word)) - 1);
    }
    to += __shfl_sync(kWholeWarp, through, kWarpSize - 1);
  }
}

}  // namespace

int BitmapRowsCuda(const BitmapRowsCudaArgs& a, void* stream) noexcept {
  if (a.nnz == 0) return cudaSuccess;
  const int error =
      cudaMemsetAsync(a.col_indices, 0xff, 4 * static_cast<std::size_t>(a.nnz), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess || a.rows == 0) return error;
  using Tile = ListedRowTile;
  return Launch(ListColumns<Tile>, BlocksOnX(a.rows, Tile::kWarps), Tile::kThreads, stream, a);
}

}  // namespace tersetorch
