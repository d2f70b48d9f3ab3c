#include "kernels/common/cuda.cuh"
#include "kernels/csr_matmul/csr_matmul_cuda.h"
#include "kernels/csr_matmul/csr_weight.cuh"

namespace tersetorch {
namespace {

// ---- tiles

// As RowTile, for one sample.
struct OneSampleTile : RowTile {
  static constexpr int kSamples = 1;
};

// A thread computes one number.
struct ElementTile {
  static constexpr int kThreads = 256;

  __device__ static std::int64_t Index() { return std::int64_t{blockIdx.x} * kThreads + threadIdx.x; }
};

dim3 ElementGrid(std::int64_t elements) { return {BlocksOnX(elements, ElementTile::kThreads), 1, 1}; }

// ---- kernels

// Four blocks a multiprocessor: left to itself, ptxas spills a register to fit more of them.
template <typename Tile, typename Values, typename Float>
__global__ void __launch_bounds__(Tile::kThreads, 4) CsrMatmulKernel(CsrMatmulCudaArgs a) {
  const CsrWeight& w = a.weight;
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= w.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  Row row = RowAt(w, r);
  // NaN times any number of x is NaN; where there is none, nothing may be read.
  if (w.columns == 0 && row.begin < row.end) row = {0, 0, true};
  [[maybe_unused]] const Float* x = static_cast<const Float*>(a.x);
  [[maybe_unused]] const auto* panels = static_cast<const PanelColumn<Float>*>(a.panels);
  Float* y = static_cast<Float*>(a.y);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    float sums[Tile::kSamples] = {};
    // Four at a time, so that as many loads are on their way.
#pragma unroll 4
    for (std::int64_t k = std::int64_t{row.begin} + lane; k < row.end; k += kWarpSize) {
      const std::int32_t column = ColumnAt(w, k);
      const bool damaged = Outside(w, column) || Values::Damaged(w, k);
      const float value = damaged ? DamagedWeight() : Values::At(w, k);
      const std::int64_t at = first / Tile::kSamples * w.columns + (damaged ? 0 : column);
      if constexpr (Tile::kSamples == 1) {
        sums[0] += value * ToFloat(x[at]);
      } else {
        const PanelColumn<Float> numbers = panels[at];
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) sums[s] += value * ToFloat(numbers.of_sample[s]);
      }
    }
    float sum = 0;  // of sample `lane`
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      if (s >= count) break;
      const float of_sample = WarpSum(sums[s]);
      if (s == lane) sum = of_sample;
    }
    if (lane >= count) continue;
    if (row.damaged) sum = DamagedWeight();
    if (a.bias != nullptr) sum += a.bias[r];
    y[(first + lane) * w.rows + r] = FromFloat<Float>(a.relu && sum < 0 ? 0.0f : sum);
  }
}

template <typename Tile, typename Values>
__global__ void __launch_bounds__(Tile::kThreads) CsrMatmulGradXKernel(CsrGradXCudaArgs a) {
  const CsrWeight& w = a.weight;
  const std::int64_t r = Tile::RowOfWarp();
  if (r >= w.rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const Row row = RowAt(w, r);
  const std::int64_t step = std::int64_t{gridDim.y} * Tile::kSamples;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples; first += step) {
    const int count = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    float* sums = a.sums + first * w.columns;
    float grads[Tile::kSamples];
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      grads[s] = s < count ? FloatAt(a.grad_y, a.stored_as, (first + s) * w.rows + r) : 0.0f;
    }
    bool damaged = row.damaged;
    for (std::int64_t k = std::int64_t{row.begin} + lane; k < row.end; k += kWarpSize) {
      const std::int32_t column = ColumnAt(w, k);
      if (Outside(w, column) || Values::Damaged(w, k)) {
        damaged = true;
        continue;
      }
      const float value = Values::At(w, k);
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s < count) atomicAdd(sums + s * w.columns + column, value * grads[s]);
      }
    }
    if (__any_sync(kWholeWarp, damaged) == 0) continue;
    for (std::int64_t i = lane; i < count * w.columns; i += kWarpSize) atomicAdd(sums + i, DamagedWeight());
  }
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) RoundKernel(CsrGradXCudaArgs a, std::int64_t count) {
  const std::int64_t i = Tile::Index();
  if (i < count) PutFloat(a.grad_x, a.stored_as, i, a.sums[i]);
}

// The row that holds non-zero k: row_offsets[r] <= k < row_offsets[r + 1]. Requires that the offsets run from 0 to nnz;
// where they fall in between, the row is still one that satisfies this.
__device__ std::int64_t RowOf(const CsrWeight& w, std::int64_t k) {
  std::int64_t low = 0, high = w.rows;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    if (w.row_offsets[middle] <= k) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) CsrMatmulGradValuesKernel(CsrGradValuesCudaArgs a) {
  const CsrWeight& w = a.weight;
  const std::int64_t k = Tile::Index();
  if (k >= w.nnz) return;
  const std::int32_t column = ColumnAt(w, k);
  if (Outside(w, column) || w.rows == 0 || w.row_offsets[0] != 0 || w.row_offsets[w.rows] != w.nnz) {
    a.grad_values[k] = DamagedWeight();
    return;
  }
  const std::int64_t r = RowOf(w, k);
  float sum = 0;
  WithFloatOnDevice(a.grad_y_stored_as, [&](auto of_grad) {
    WithFloatOnDevice(a.x_stored_as, [&](auto of_x) {
      const auto* grad = static_cast<const decltype(of_grad)*>(a.grad_y) + r;
      const auto* x = static_cast<const decltype(of_x)*>(a.x) + column;
      for (std::int64_t n = 0; n < a.samples; ++n) sum += ToFloat(grad[n * w.rows]) * ToFloat(x[n * w.columns]);
    });
  });
  a.grad_values[k] = sum;
}

}  // namespace

int CsrMatmulCuda(const CsrMatmulCudaArgs& a, void* stream) noexcept {
  if (a.weight.rows == 0 || a.samples == 0) return cudaSuccess;
  return WithValues(a.weight.stored_as, [&](auto values) {
    return WithFloat(a.stored_as, [&](auto number) {
      using Values = decltype(values);
      using Float = decltype(number);
      if (a.samples > 1) {
        const int packed = LaunchPackPanels<Float>(a.x, a.panels, a.samples, a.weight.columns, stream);
        if (packed != cudaSuccess) return packed;
      }
      const auto kernel =
          a.samples == 1 ? CsrMatmulKernel<OneSampleTile, Values, Float> : CsrMatmulKernel<RowTile, Values, Float>;
      return Launch(kernel, RowGrid(a.weight.rows, a.samples), RowTile::kThreads, stream, a);
    });
  });
}

int CsrMatmulGradXCuda(const CsrGradXCudaArgs& a, void* stream) noexcept {
  const std::int64_t count = a.samples * a.weight.columns;
  if (count == 0) return cudaSuccess;
  const int cleared = cudaMemsetAsync(a.sums, 0, count * sizeof(float), static_cast<cudaStream_t>(stream));
  if (cleared != cudaSuccess) return cleared;
  if (a.weight.rows != 0) {
    const int launched = WithValues(a.weight.stored_as, [&](auto values) {
      return Launch(CsrMatmulGradXKernel<RowTile, decltype(values)>, RowGrid(a.weight.rows, a.samples),
                    RowTile::kThreads, stream, a);
    });
    if (launched != cudaSuccess) return launched;
  }
  if (a.stored_as == FloatDtype::kFloat32) return cudaSuccess;
  return Launch(RoundKernel<ElementTile>, ElementGrid(count), ElementTile::kThreads, stream, a, count);
}

int CsrMatmulGradValuesCuda(const CsrGradValuesCudaArgs& a, void* stream) noexcept {
  if (a.weight.nnz == 0) return cudaSuccess;
  return Launch(CsrMatmulGradValuesKernel<ElementTile>, ElementGrid(a.weight.nnz), ElementTile::kThreads, stream, a);
}

}  // namespace tersetorch
