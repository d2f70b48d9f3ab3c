#include "kernels/codebook_embedding/codebook_embedding_cuda.h"
#include "kernels/common/cuda.cuh"

namespace tersetorch {
namespace {

__device__ std::int64_t IndexAt(const CodebookIndices& indices, std::int64_t i) {
  return indices.wide ? static_cast<const std::int64_t*>(indices.data)[i]
                      : static_cast<const std::int32_t*>(indices.data)[i];
}

// Calls use(column, table, code) for the columns of a row that are this lane's: a word of each chunk, every other field
// of it.
template <typename Use>
__device__ void EachCode(const CodebookWeight& w, std::int64_t r, int lane, const Use& use) {
  const int bits = CodeBits(w.entries);
  const std::uint8_t* chunk = w.codes + r * CodeRowBytes(w.columns, w.column_block, bits);
  std::int64_t table = w.per_row ? r : 0;
  for (std::int64_t begin = 0; begin < w.columns; begin += w.column_block, table += w.per_row ? 0 : 1) {
    const std::int64_t end = min(w.columns, begin + w.column_block);
    for (std::int64_t first = begin; first < end; first += 512 / bits, chunk += kCodeChunkBytes) {
      std::uint32_t word = reinterpret_cast<const std::uint32_t*>(chunk)[lane % 16] >> lane / 16 * bits;
#pragma unroll 4
      for (std::int64_t c = first + lane; c < min(end, first + 512 / bits); c += kWarpSize, word >>= 2 * bits) {
        use(c, table, word & ((1u << bits) - 1));
      }
    }
  }
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookEmbeddingKernel(CodebookEmbeddingCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t i = Tile::RowOfWarp();
  if (i >= a.count) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t r = IndexAt(a.indices, i);
  bool damaged = r < 0 || r >= w.rows;
  if (!damaged && w.entries < 1 << CodeBits(w.entries)) {
    EachCode(w, r, lane, [&](std::int64_t, std::int64_t, std::uint32_t code) { damaged |= code >= w.entries; });
    damaged = __any_sync(kWholeWarp, damaged) != 0;
  }
  Float* y = static_cast<Float*>(a.y) + i * w.columns;
  if (damaged) {
    for (std::int64_t c = lane; c < w.columns; c += kWarpSize) y[c] = FromFloat<Float>(DamagedWeight());
    return;
  }
  EachCode(w, r, lane, [&](std::int64_t c, std::int64_t table, std::uint32_t code) {
    y[c] = FromFloat<Float>(w.codebook[table * w.entries + code]);
  });
}

// A warp for each entry, which looks at all of its table's codes: atomics would give sums of no one order.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CodebookEmbeddingReduceKernel(CodebookEmbeddingReduceCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t entry = Tile::RowOfWarp();
  if (entry >= a.tables * w.entries) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t table = entry / w.entries;
  const std::uint32_t wanted = static_cast<std::uint32_t>(entry % w.entries);
  const std::int64_t begin = w.per_row ? 0 : table * w.column_block, end = min(w.columns, begin + w.column_block);
  double sum = 0;
  for (std::int64_t i = 0; i < a.count; ++i) {
    const std::int64_t r = IndexAt(a.indices, i);
    if (r < 0 || r >= w.rows || r == a.padding || (w.per_row && r != table)) continue;
    for (std::int64_t c = begin + lane; c < end; c += kWarpSize) {
      if (CodeAt(w, r, c) == wanted) sum += static_cast<double>(a.grad[i * w.columns + c]);
    }
  }
  sum = WarpSum(sum);
  if (lane == 0) a.sums[entry] = static_cast<float>(sum);
}

}  // namespace

int CodebookEmbeddingCuda(const CodebookEmbeddingCudaArgs& a, void* stream) noexcept {
  if (a.count == 0 || a.weight.columns == 0) return cudaSuccess;
  return WithFloat(a.y_stored_as, [&](auto number) {
    const auto kernel = CodebookEmbeddingKernel<RowTile, decltype(number)>;
    return Launch(kernel, RowGrid(a.count, 1), RowTile::kThreads, stream, a);
  });
}

int CodebookEmbeddingReduceCuda(const CodebookEmbeddingReduceCudaArgs& a, void* stream) noexcept {
  if (a.tables == 0) return cudaSuccess;
  const dim3 grid = RowGrid(a.tables * a.weight.entries, 1);
  return Launch(CodebookEmbeddingReduceKernel<RowTile>, grid, RowTile::kThreads, stream, a);
}

}  // namespace tersetorch
