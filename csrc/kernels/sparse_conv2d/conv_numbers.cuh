// How the CUDA kernels of sparse_conv2d read its images and its weight, whose offsets, columns and codes may be
// damaged, and what they make of a sum.
#pragma once

#include <cmath>

#include "kernels/common/cuda.cuh"
#include "kernels/csr_matmul/csr_weight.cuh"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"

namespace tersetorch {
namespace {

// A non-zero, as all outputs of its filter see it.
struct Tap {
  std::int64_t offset;       // in x, from the input that an output's first tap multiplies in channel 0
  std::int64_t down, right;  // of that input
  float value;
};

// Numbers as they are stored. The branches are the same for all threads; types for them would multiply the kernels.
__device__ inline float InputAt(const ConvCudaArgs& a, std::int64_t i) {
  if (a.stored_as == FloatDtype::kFloat32) return static_cast<const float*>(a.x)[i];
  if (a.stored_as == FloatDtype::kBFloat16) return ToFloat(static_cast<const BFloat16*>(a.x)[i]);
  return ToFloat(static_cast<const Float16*>(a.x)[i]);
}
__device__ inline void PutOutput(const ConvCudaArgs& a, std::int64_t i, float y) {
  if (a.stored_as == FloatDtype::kFloat32) {
    static_cast<float*>(a.y)[i] = y;
  } else if (a.stored_as == FloatDtype::kBFloat16) {
    static_cast<BFloat16*>(a.y)[i] = FromFloat<BFloat16>(y);
  } else {
    static_cast<Float16*>(a.y)[i] = FromFloat<Float16>(y);
  }
}
// A code without an entry is 0, and damaged.
__device__ inline float WeightAt(const CsrWeight& w, std::int64_t k, bool& damaged) {
  if (w.stored_as == CsrValues::kFloat32) return Float32Values::At(w, k);
  if (w.stored_as == CsrValues::kBFloat16) return BFloat16Values::At(w, k);
  if (!CodeValues::Damaged(w, k)) return CodeValues::At(w, k);
  damaged = true;
  return 0.0f;
}

// A damaged one lies below every image, so that nothing is read for it.
__device__ inline Tap TapAt(const ConvCudaArgs& a, std::int64_t filter, std::int32_t k) {
  const ConvShape& s = a.shape;
  const std::int32_t column = ColumnAt(a.weight, k);
  bool damaged = Outside(a.weight, column);
  const float value = WeightAt(a.weight, k, damaged);
  if (damaged) return {0, a.height + a.pad_h, 0, DamagedWeight()};
  const std::int64_t row = column / s.kernel_w, group = filter / (s.out_channels / s.groups);
  const std::int64_t channel = group * (s.in_channels / s.groups) + row / s.kernel_h;
  const std::int64_t down = row % s.kernel_h * s.dilation_h, right = column % s.kernel_w * s.dilation_w;
  return {channel * a.x_steps.channel + down * a.x_steps.row + right * a.x_steps.column, down, right, value};
}

__device__ inline int Rounded(float x, float inverse) {
  return inverse == 0 ? 0 : static_cast<int>(rintf(x * inverse));
}

// A sum of products: a float, or for int8 an integer in its bits, so that one kernel serves both. Of integers the least
// stands for damage, which no sum reaches.
using ConvSum = std::uint32_t;

__device__ inline bool Integers(const ConvCudaArgs& a) { return a.mode == ConvMode::kInt8; }
__device__ inline ConvSum DamagedSum(bool integers) {
  return integers ? 0x80000000u : __float_as_uint(DamagedWeight());
}

// What y holds where the products' sum is `total`.
__device__ inline float Finished(const ConvCudaArgs& a, std::int64_t image, std::int64_t filter, ConvSum total) {
  const float bias = a.bias == nullptr ? 0.0f : a.bias[filter];
  float sum = __uint_as_float(total);
  if (!Integers(a)) {
    sum = a.bias == nullptr ? sum : sum + bias;
  } else if (total == DamagedSum(true)) {
    return DamagedWeight();
  } else {
    sum = fmaf(static_cast<float>(static_cast<int>(total)) * a.scales[a.images + filter].scale, a.scales[image].scale,
               bias);
  }
  return a.relu && sum < 0 ? 0.0f : sum;  // NaN stays
}

// How many of the non-zeros [begin, end) come before the first in `column` or behind it; all lanes of the warp call it.
__device__ inline int FindColumn(const CsrWeight& w, int begin, int end, std::int64_t column) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  while (begin < end) {
    const int step = (end - begin + kWarpSize - 1) / kWarpSize, probe = begin + (lane + 1) * step - 1;
    const bool before = probe < end && ColumnAt(w, probe) < column;
    begin += __popc(__ballot_sync(kWholeWarp, before)) * step;
    end = min(end, begin + step - 1);
  }
  return begin;
}

}  // namespace
}  // namespace tersetorch
