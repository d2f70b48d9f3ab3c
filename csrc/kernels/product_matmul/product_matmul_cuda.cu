#include <cmath>

#include "kernels/common/cuda.cuh"
#include "kernels/product_matmul/product_matmul_cuda.h"

namespace tersetorch {
namespace {

// ---- the weight

__host__ __device__ std::int64_t Tables(const ProductWeight& w) { return w.stages * w.segments; }

// The code of a row for a table, and whether it names an entry.
__device__ int CodeAt(const ProductWeight& w, std::int64_t row, std::int64_t table) {
  const std::int64_t tile = row / kProductRows, r = row % kProductRows, tables = Tables(w);
  if (w.entries > kProductFew) return w.codes[(tile * tables + table) * kProductRows + r];
  const std::int64_t groups = CeilDiv(tables, kProductGroup), j = table % kProductGroup;
  const std::int64_t word = (tile * groups + table / kProductGroup) * kProductRows + r;
  return w.codes[word * 4 + j / 2] >> 4 * (j % 2) & 15;
}

// Where the codebooks have entry 0 of number 0 of a table.
__device__ const float* BookOf(const ProductWeight& w, std::int64_t table) {
  const std::int64_t book = w.books == 1 ? 0 : table % w.segments;
  return w.codebooks + (table / w.segments * w.books + book) * w.width * w.entries;
}

__device__ std::int64_t WidthOf(const ProductWeight& w, std::int64_t table) {
  return min(w.width, w.columns - table % w.segments * w.width);
}

// ---- tiles

// A block makes tables of one sample, a thread an entry.
struct TablesTile {
  static constexpr int kThreads = 128;
};

// A block looks up some rows for one sample, a thread a row.
struct RowsTile {
  static constexpr int kThreads = kProductRows;
};

// ---- kernels

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) ProductTablesKernel(ProductMatmulCudaArgs a) {
  const ProductWeight& w = a.weight;
  const std::int64_t table = blockIdx.x, tables = Tables(w), first = table % w.segments * w.width;
  const std::int64_t width = WidthOf(w, table);
  const float* book = BookOf(w, table);
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    const Float* x = static_cast<const Float*>(a.x) + n * w.columns + first;
    for (std::int64_t k = threadIdx.x; k < w.entries; k += Tile::kThreads) {
      float product = 0;
      for (std::int64_t j = 0; j < width; ++j) product = fmaf(ToFloat(x[j]), book[j * w.entries + k], product);
      a.tables[(n * tables + table) * w.entries + k] = product;
    }
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductMeasureKernel(ProductMatmulCudaArgs a) {
  const ProductWeight& w = a.weight;
  const std::int64_t table = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x, tables = Tables(w);
  if (table >= tables) return;
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    const float* products = a.tables + (n * tables + table) * w.entries;
    float low = products[0], high = low, nothing = 0;
    for (std::int64_t k = 0; k < w.entries; ++k) {
      low = products[k] < low ? products[k] : low;
      high = products[k] > high ? products[k] : high;
      nothing += products[k] - products[k];
    }
    a.lows[n * tables + table] = low + nothing;
    a.ranges[n * tables + table] = high - low + nothing;
  }
}

// ProductScaleOf on the device, a thread for each sample: the sum has one order.
template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductScaleKernel(ProductMatmulCudaArgs a) {
  const std::int64_t n = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x, tables = Tables(a.weight);
  if (n >= a.samples) return;
  float low = 0, range = 0;
  bool finite = true;
  for (std::int64_t i = 0; i < tables; ++i) {
    const float of_table = a.ranges[n * tables + i];
    low += a.lows[n * tables + i];
    range = of_table > range ? of_table : range;
    finite = finite && of_table <= 3.4028234e38f;
  }
  const float damaged = __uint_as_float(0x7fc00000u);
  if (!finite) {
    a.scales[n] = {damaged, damaged, 0.0f};
  } else if (range < 0x1p-100f) {
    a.scales[n] = {low, 0.0f, 0.0f};
  } else {
    a.scales[n] = {low, range / 255, 255 / range};
  }
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) ProductMatmulKernel(ProductMatmulCudaArgs a) {
  const ProductWeight& w = a.weight;
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x, tables = Tables(w);
  if (r >= w.rows) return;
  Float* y = static_cast<Float*>(a.y);
  const float bias = a.bias == nullptr ? 0.0f : a.bias[r];
  for (std::int64_t n = blockIdx.y; n < a.samples; n += gridDim.y) {
    const float* products = a.tables + n * tables * w.entries;
    const ProductScale scale = a.scales == nullptr ? ProductScale{0, 0, 0} : a.scales[n];
    float sum = 0;
    std::uint32_t steps = 0;
    bool damaged = false;
    for (std::int64_t i = 0; i < tables; ++i) {
      const int code = CodeAt(w, r, i);
      if (code >= w.entries) {
        damaged = true;
        continue;
      }
      const float product = products[i * w.entries + code];
      if (a.scales == nullptr) {
        sum += product;
      } else if (scale.inverse != 0) {
        steps += static_cast<std::uint32_t>(rintf((product - a.lows[n * tables + i]) * scale.inverse));
      }
    }
    if (a.scales != nullptr) sum = fmaf(scale.scale, static_cast<float>(steps), scale.low);
    const float result = damaged ? DamagedWeight() : sum + bias;
    y[n * w.rows + r] = FromFloat<Float>(a.relu && result < 0 ? 0.0f : result);
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) ProductDecodeKernel(ProductDecodeArgs a) {
  const ProductWeight& w = a.weight;
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (r >= w.rows) return;
  for (std::int64_t segment = blockIdx.y; segment < w.segments; segment += gridDim.y) {
    float* out = a.dense + r * w.columns + segment * w.width;
    const std::int64_t width = WidthOf(w, segment);
    for (std::int64_t j = 0; j < width; ++j) {
      float sum = 0;
#pragma unroll 1
      for (std::int64_t stage = 0; stage < w.stages; ++stage) {
        const std::int64_t table = stage * w.segments + segment;
        const int code = CodeAt(w, r, table);
        const float entry = code < w.entries ? BookOf(w, table)[j * w.entries + code] : DamagedWeight();
        sum = stage == 0 ? entry : sum + entry;
      }
      out[j] = sum;
    }
  }
}

}  // namespace

// ---- launchers

int ProductMatmulCuda(const ProductMatmulCudaArgs& a, void* stream) noexcept {
  const ProductWeight& w = a.weight;
  if (w.rows == 0 || a.samples == 0) return cudaSuccess;
  const std::int64_t tables = Tables(w);
  const unsigned samples = BlocksOnY(a.samples, 1);
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    int error = cudaSuccess;
    if (tables != 0) {
      const dim3 grid{static_cast<unsigned>(tables), samples, 1};
      error = Launch(ProductTablesKernel<TablesTile, Float>, grid, TablesTile::kThreads, stream, a);
      if (error != cudaSuccess) return error;
    }
    if (a.scales != nullptr) {
      const dim3 grid{static_cast<unsigned>(CeilDiv(std::max<std::int64_t>(tables, 1), RowsTile::kThreads)), samples,
                      1};
      error = Launch(ProductMeasureKernel<RowsTile>, grid, RowsTile::kThreads, stream, a);
      if (error != cudaSuccess) return error;
      const dim3 all{static_cast<unsigned>(CeilDiv(a.samples, RowsTile::kThreads)), 1, 1};
      error = Launch(ProductScaleKernel<RowsTile>, all, RowsTile::kThreads, stream, a);
      if (error != cudaSuccess) return error;
    }
    const dim3 grid{static_cast<unsigned>(CeilDiv(w.rows, RowsTile::kThreads)), samples, 1};
    return Launch(ProductMatmulKernel<RowsTile, Float>, grid, RowsTile::kThreads, stream, a);
  });
}

int ProductDecodeCuda(const ProductDecodeArgs& a, void* stream) noexcept {
  const ProductWeight& w = a.weight;
  if (w.rows == 0 || w.columns == 0) return cudaSuccess;
  const dim3 grid{static_cast<unsigned>(CeilDiv(w.rows, RowsTile::kThreads)), BlocksOnY(w.segments, 1), 1};
  return Launch(ProductDecodeKernel<RowsTile>, grid, RowsTile::kThreads, stream, a);
}

}  // namespace tersetorch
