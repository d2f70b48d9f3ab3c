#include <cmath>

#include "kernels/codebook_matmul/codebook_matmul_cuda.h"
#include "kernels/codebook_matmul/codebook_paths_cuda.h"
#include "kernels/common/cuda.cuh"
#include "kernels/common/tensor_cores.cuh"

namespace tersetorch {
namespace {

// ---- the weight

// Codes of row r, one column after the other; lanes that take consecutive columns read consecutive words.
struct Codes {
  __device__ Codes(const CodebookWeight& w, std::int64_t r)
      : bits(CodeBits(w.entries)),
        of_block(CodeChunks(w.column_block, bits)),
        column_block(w.column_block),
        words(reinterpret_cast<const std::uint32_t*>(w.codes + r * CodeRowBytes(w.columns, w.column_block, bits))) {}

  __device__ std::uint32_t At(std::int64_t c) const {
    const std::int64_t block = c / column_block, in_block = c % column_block, of_chunk = 512 / bits;
    const std::int64_t chunk = block * of_block + in_block / of_chunk;
    const int column = static_cast<int>(in_block % of_chunk);
    return words[chunk * 16 + column % 16] >> bits * (column / 16) & ((1u << bits) - 1);
  }

  int bits;
  std::int64_t of_block, column_block;
  const std::uint32_t* words;
};

__device__ std::int64_t TableOf(const CodebookWeight& w, std::int64_t r, std::int64_t c) {
  return w.per_row ? r : c / w.column_block;
}

// ---- modes: what is multiplied and added up

struct Exact {
  using Sum = float;
  __device__ static float Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.weight.codebook[table * a.weight.entries + code];
  }
  template <typename Float>
  __device__ static float X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return ToFloat(static_cast<const Float*>(a.x)[n * a.weight.columns + c]);
  }
  __device__ static float Number(const CodebookMatmulCudaArgs&, float sum, std::int64_t, std::int64_t, float bias) {
    return sum + bias;
  }
};

struct Rounded : Exact {
  __device__ static float Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return ToFloat(FromFloat<BFloat16>(Exact::Weight(a, table, code)));
  }
  template <typename Float>
  __device__ static float X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return ToFloat(FromFloat<BFloat16>(Exact::X<Float>(a, n, c)));
  }
};

struct Integers {
  using Sum = int;
  __device__ static int Weight(const CodebookMatmulCudaArgs& a, std::int64_t table, std::uint32_t code) {
    return a.tables[table * a.table_stride + code];
  }
  template <typename Float>
  __device__ static int X(const CodebookMatmulCudaArgs& a, std::int64_t n, std::int64_t c) {
    return static_cast<const std::int8_t*>(a.x)[n * a.x_stride + c];
  }
  __device__ static float Number(const CodebookMatmulCudaArgs& a, int sum, std::int64_t n, std::int64_t r, float bias) {
    const float of_table = a.table_scales[a.weight.per_row ? r : 0], of_sample = a.sample_scales[n];
    const float low = of_sample < of_table ? of_sample : of_table, high = of_sample < of_table ? of_table : of_sample;
    return fmaf(static_cast<float>(sum) * low, high, bias);
  }
};

// ---- kernels

template <typename Tile, typename Mode, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) CodebookMatmulKernel(CodebookMatmulCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= w.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Codes codes(w, r);
  const float bias = a.bias == nullptr ? 0.0f : a.bias[r];
  Float* y = static_cast<Float*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    typename Mode::Sum sums[Tile::kSamples] = {};
    bool damaged = false;
    for (std::int64_t c = lane; c < w.columns; c += kWarpSize) {
      const std::uint32_t code = codes.At(c);
      if (code >= w.entries) {
        damaged = true;
        continue;
      }
      const auto weight = Mode::Weight(a, TableOf(w, r, c), code);
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s < count) sums[s] += weight * Mode::template X<Float>(a, first + s, c);
      }
    }
    damaged = __any_sync(kWholeWarp, damaged) != 0;
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      const auto sum = WarpSum(sums[s]);
      if (s != lane) continue;
      const float result = damaged ? DamagedWeight() : Mode::Number(a, sum, first + s, r, bias);
      y[(first + s) * w.rows + r] = FromFloat<Float>(a.relu && result < 0 ? 0.0f : result);
    }
  }
}

// A block decodes one row, its warps the chunks in turn: lane l reads word l % 16, and half-warps take fields in turn.
struct DecodeTile {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
};

// Where a chunk's columns lie: in which block of columns, and how many there are.
struct ChunkPlace {
  __device__ ChunkPlace(const CodebookWeight& w, int bits, std::int64_t chunk) {
    const std::int64_t of_block = CodeChunks(w.column_block, bits);
    block = chunk / of_block;
    const std::int64_t in_block = (chunk - block * of_block) * (512 / bits);
    first = block * w.column_block + in_block;
    columns = static_cast<int>(min(min(w.column_block - in_block, w.columns - first), std::int64_t{512 / bits}));
  }
  std::int64_t block, first;
  int columns;
};

template <typename Tile, int kBits>
__global__ void __launch_bounds__(Tile::kThreads) CodebookDecodeKernel(CodebookDecodeCudaArgs a) {
  const CodebookWeight& w = a.weight;
  const std::int64_t r = blockIdx.x, chunks = CodeRowBytes(w.columns, w.column_block, kBits) / kCodeChunkBytes;
  const auto* words = reinterpret_cast<const std::uint32_t*>(w.codes + r * chunks * kCodeChunkBytes);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  constexpr std::uint32_t kMask = (1u << kBits) - 1;
  bool damaged = false;
  if (w.entries <= kMask) {
    for (std::int64_t chunk = warp; chunk < chunks; chunk += Tile::kWarps) {
      const ChunkPlace place(w, kBits, chunk);
      const std::uint32_t word = words[chunk * 16 + lane % 16];
#pragma unroll
      for (int column = lane; column < 512 / kBits; column += kWarpSize) {
        damaged |= column < place.columns && (word >> kBits * (column / 16) & kMask) >= w.entries;
      }
    }
    damaged = __syncthreads_or(damaged) != 0;
  }
  for (std::int64_t chunk = warp; chunk < chunks; chunk += Tile::kWarps) {
    const ChunkPlace place(w, kBits, chunk);
    const std::uint32_t word = words[chunk * 16 + lane % 16];
    const float* table = w.codebook + (w.per_row ? r : place.block) * w.entries;
    float* dense = a.dense + r * w.columns + place.first;
#pragma unroll
    for (int column = lane; column < 512 / kBits; column += kWarpSize) {
      if (column >= place.columns) continue;
      dense[column] = damaged ? DamagedWeight() : __ldg(table + (word >> kBits * (column / 16) & kMask));
    }
  }
}

// A block adds up a part of the rows of one table: every lane has a sum of its own for each entry, so that nothing is
// added in an order that chance decides.
template <int kCodeBits>
struct ReduceTile {
  static constexpr int kBits = kCodeBits, kEntries = 1 << kBits;
  static constexpr int kWarps = kBits == 8 ? 1 : 8, kThreads = kWarps * kWarpSize;

  struct Memory {
    float sums[kWarps][kEntries][kWarpSize];
  };
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CodebookReduceKernel(CodebookReduceCudaArgs a) {
  constexpr int kBits = Tile::kBits, kFields = 32 / kBits / 2;  // of a half-warp
  auto& memory = SharedMemory<typename Tile::Memory>();
  const CodebookWeight& w = a.weight;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize, lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const std::int64_t table = blockIdx.x, part = blockIdx.y;
  const std::int64_t rows = w.per_row ? 1 : w.rows, first_row = w.per_row ? table : 0;
  const std::int64_t row_begin = first_row + rows * part / a.parts;
  const std::int64_t row_end = first_row + rows * (part + 1) / a.parts;
  // The table's columns and their chunks.
  const std::int64_t begin = w.per_row ? 0 : table * w.column_block, end = min(w.columns, begin + w.column_block);
  const std::int64_t chunks = CodeChunks(end - begin, kBits);
  const std::int64_t row_bytes = CodeRowBytes(w.columns, w.column_block, kBits);
  const std::int64_t first_byte = w.per_row ? 0 : table * CodeChunks(w.column_block, kBits) * kCodeChunkBytes;
  float (*sums)[kWarpSize] = memory.sums[warp];
  for (int k = 0; k < Tile::kEntries; ++k) sums[k][lane] = 0;

  std::int64_t row = row_begin, chunk = warp;
  for (; row < row_end && chunk >= chunks && chunks > 0; chunk -= chunks) ++row;
  while (row < row_end && chunks > 0) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(w.codes + row * row_bytes + first_byte);
    const std::uint32_t word = words[chunk * 16 + lane % 16];
    const std::int64_t c = chunk * (512 / kBits) + lane;
    const float* grad = a.grad + row * w.columns + begin + c;
    float numbers[kFields];
#pragma unroll
    for (int i = 0; i < kFields; ++i) numbers[i] = c + i * kWarpSize < end - begin ? grad[i * kWarpSize] : 0.0f;
#pragma unroll
    for (int i = 0; i < kFields; ++i) {
      const std::uint32_t code = word >> kBits * (2 * i + lane / 16) & ((1u << kBits) - 1);
      if (c + i * kWarpSize < end - begin) sums[code][lane] += numbers[i];
    }
    for (chunk += Tile::kWarps; row < row_end && chunk >= chunks; chunk -= chunks) ++row;
  }
  __syncthreads();
  for (int k = warp; k < w.entries; k += Tile::kWarps) {
    double sum = 0;
    for (int i = 0; i < Tile::kWarps; ++i) sum += static_cast<double>(memory.sums[i][k][lane]);
    sum = WarpSum(sum);
    if (lane != 0) continue;
    if (a.parts == 1) {
      a.sums[table * w.entries + k] = static_cast<float>(sum);
    } else {
      a.partial[(part * a.tables + table) * w.entries + k] = sum;
    }
  }
}

// A warp adds the parts of one entry up.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CodebookAddReducedKernel(CodebookReduceCudaArgs a) {
  const std::int64_t entry = Tile::RowOfWarp(), entries = a.tables * a.weight.entries;
  if (entry >= entries) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double sum = 0;
  for (std::int64_t part = lane; part < a.parts; part += kWarpSize) sum += a.partial[part * entries + entry];
  sum = WarpSum(sum);
  if (lane == 0) a.sums[entry] = static_cast<float>(sum);
}

// ---- launchers

template <typename Run>
int WithBits(const CodebookWeight& w, const Run& run) {
  switch (CodeBits(w.entries)) {
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    default:
      return run(std::integral_constant<int, 8>{});
  }
}

enum class Path : int { kAnyTables, kFew, kTiles };

Path PathOf(const CodebookMatmulCudaArgs& a) {
  const CodebookWeight& w = a.weight;
  if (!HasFewTables(w) || w.columns == 0 || !IsAligned(w.codes, 16)) return Path::kAnyTables;
  if (a.mode == CodebookMode::kExact) {
    if (a.samples > kCodebookFewExact) return Path::kTiles;
    return w.columns % 4 == 0 ? Path::kFew : Path::kAnyTables;
  }
  if (!HasTensorCores()) return Path::kAnyTables;
  return a.samples > kCodebookFewFragments ? Path::kTiles : Path::kFew;
}

}  // namespace

CodebookPlan CodebookPlanCuda(const CodebookMatmulCudaArgs& a) noexcept {
  const Path path = PathOf(a);
  CodebookPlan plan{0, path == Path::kTiles ? CodebookTilePartsCuda(a) : 1};
  if (path == Path::kAnyTables) return plan;
  const std::int64_t columns = a.weight.columns;
  if (a.mode == CodebookMode::kExact) {
    if (!TakesFourNumbers(a) || a.stored_as != FloatDtype::kFloat32) plan.packed_stride = CeilDiv(columns, 4) * 16;
  } else if (a.mode == CodebookMode::kInt8 || a.samples > 8 || !TakesFourNumbers(a)) {
    const int bits = KernelBits(a.weight.entries), bytes = a.mode == CodebookMode::kInt8 ? 1 : 2;
    plan.packed_stride = CodeChunks(columns, bits) * (512 / bits) * bytes;
  }
  return plan;
}

int CodebookMatmulCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  if (const Path path = PathOf(a); path != Path::kAnyTables) {
    if (a.packed != nullptr) {
      if (const int error = CodebookPackCuda(a, stream); error != cudaSuccess) return error;
    }
    return path == Path::kFew ? CodebookFewCuda(a, stream) : CodebookTilesCuda(a, stream);
  }
  const dim3 grid = RowGrid(a.weight.rows, a.samples);
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    switch (a.mode) {
      case CodebookMode::kExact:
        return Launch(CodebookMatmulKernel<RowTile, Exact, Float>, grid, RowTile::kThreads, stream, a);
      case CodebookMode::kBFloat16:
        return Launch(CodebookMatmulKernel<RowTile, Rounded, Float>, grid, RowTile::kThreads, stream, a);
      default:
        return Launch(CodebookMatmulKernel<RowTile, Integers, Float>, grid, RowTile::kThreads, stream, a);
    }
  });
}

int CodebookDecodeCuda(const CodebookDecodeCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.weight.columns == 0) return cudaSuccess;
  return WithBits(a.weight, [&](auto bits) {
    return Launch(CodebookDecodeKernel<DecodeTile, decltype(bits)::value>, BlocksOnX(a.weight.rows),
                  DecodeTile::kThreads, stream, a);
  });
}

std::int64_t CodebookReducePartsCuda(const CodebookWeight& w, std::int64_t tables) noexcept {
  constexpr std::int64_t kBlocks = 1056;  // eight for each processor of a large GPU
  return w.per_row || tables == 0 ? 1 : std::max<std::int64_t>(1, std::min(w.rows, kBlocks / tables));
}

int CodebookReduceCuda(const CodebookReduceCudaArgs& a, void* stream) noexcept {
  if (a.tables == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(a.tables), static_cast<unsigned>(a.parts));
  const int error = WithBits(a.weight, [&](auto bits) {
    using Tile = ReduceTile<decltype(bits)::value>;
    return Launch(CodebookReduceKernel<Tile>, grid, Tile::kThreads, stream, a);
  });
  if (error != cudaSuccess || a.parts == 1) return error;
  return Launch(CodebookAddReducedKernel<RowTile>, RowGrid(a.tables * a.weight.entries, 1), RowTile::kThreads, stream,
                a);
}

}  // namespace tersetorch
