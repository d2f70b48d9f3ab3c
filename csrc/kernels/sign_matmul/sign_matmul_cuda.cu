#include <cmath>

#include "kernels/common/cuda.cuh"
#include "kernels/common/sign_tables.cuh"
#include "kernels/sign_matmul/sign_matmul_cuda.h"

namespace tersetorch {
namespace {

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) SignMatmulKernel(SignMatmulCudaArgs a) {
  const Float* x = static_cast<const Float*>(a.x);
  const auto number = [&](std::int64_t n, std::int64_t c) {
    return c < a.columns ? ToFloat(x[n * a.columns + c]) : 0.0f;
  };
  const auto store = [&](std::int64_t tile, std::int64_t n, int lane, float dot) {
    const std::int64_t r = tile * kXnorRows + lane;
    if (r >= a.rows) return;
    const float scale = a.scale == nullptr ? 1.0f : a.scale[r], bias = a.bias == nullptr ? 0.0f : a.bias[r];
    const float y = fmaf(dot, scale, bias);
    static_cast<Float*>(a.y)[n * a.rows + r] = FromFloat<Float>(a.relu && y < 0 ? 0.0f : y);  // keeps NaN
  };
  MultiplySigns<Tile, float>(a.weight, a.rows, CeilDiv(a.columns, 64), a.samples, number, store);
}

}  // namespace

int SignMatmulCuda(const SignMatmulCudaArgs& a, void* stream) noexcept {
  if (a.samples == 0 || a.rows == 0) return cudaSuccess;
  using Tile = SignTablesTile;
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(SignMatmulKernel<Tile, decltype(number)>, Tile::Grid(a.rows, a.samples), Tile::kThreads, stream, a);
  });
}

}  // namespace tersetorch
