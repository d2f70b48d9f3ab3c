// The tensors that every product takes: samples, a bias, and the checks on both; and their split over the threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/common/float_dtype.h"
#include "torch/common.h"

namespace tersetorch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void CheckOnCpu(const char* op, const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name,
                  " must be on the CPU like the other tensors, got another device; move it");
}

// Where all tensors of a call lie: the CPU, or the CUDA device of this index.
using Place = std::int32_t;
inline constexpr Place kCpu = -1;

inline void CheckOn(Place place, const char* op, const Tensor& t, const char* name) {
  if (place == kCpu) return CheckOnCpu(op, t, name);
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == place, op, ": ", name, " must be on cuda:", place,
                  " like the other tensors, got ",
                  t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "the CPU", "; move it");
}

// Memory that a kernel takes: contiguous, and on a GPU, which loads whole words only, aligned to those of so many
// elements.
inline Tensor Usable(Place place, const Tensor& t, std::int64_t elements = 1) {
  const Tensor contiguous = Contiguous(t);
  const auto word = static_cast<std::uintptr_t>(contiguous.element_size() * elements);
  const bool taken = place == kCpu || reinterpret_cast<std::uintptr_t>(contiguous.const_data_ptr()) % word == 0;
  return taken ? contiguous : torch::stable::clone(contiguous);
}

// float16 is for CUDA devices only, and not for weights, which are packed on the CPU.
inline FloatDtype DtypeOf(const char* op, const Tensor& t, const char* name, bool of_weight = false) {
  const ScalarType dtype = t.scalar_type();
  const bool half = dtype == ScalarType::Half, takes_half = t.is_cuda() && !of_weight;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || (half && takes_half), op, ": ", name,
                  " must be float32", takes_half ? ", bfloat16 or float16" : " or bfloat16", ", got ",
                  torch::headeronly::toString(dtype), "; convert it",
                  half && !of_weight ? ", or move it to a CUDA device, which takes float16" : "");
  return half ? FloatDtype::kFloat16 : dtype == ScalarType::Float ? FloatDtype::kFloat32 : FloatDtype::kBFloat16;
}

// Samples [..., features] of a floating point dtype.
struct Samples {
  Samples(const char* op, const Tensor& t, const char* name, Place place = kCpu)
      : stored_as(DtypeOf(op, t, name)),
        tensor(Usable(place, Checked(op, t, name, place))),
        count(LeadingSize(t)),
        features(t.size(-1)),
        item_bytes(stored_as == FloatDtype::kFloat32 ? 4 : 2) {}

  // Sample n.
  const void* At(std::int64_t n) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + n * features * item_bytes;
  }

  static const Tensor& Checked(const char* op, const Tensor& t, const char* name, Place place) {
    CheckOn(place, op, t, name);
    STD_TORCH_CHECK(t.dim() >= 1, op, ": ", name, " must be [..., features], got a scalar; reshape it");
    return t;
  }

  FloatDtype stored_as;
  Tensor tensor;  // initialised at once: a Tensor of nothing costs two allocations
  std::int64_t count, features, item_bytes;
};

// A bias [rows] as float32, or none.
struct Bias {
  Bias(const char* op, const std::optional<Tensor>& t, std::int64_t rows, Place place = kCpu) {
    if (!t.has_value()) return;
    CheckOn(place, op, *t, "bias");
    STD_TORCH_CHECK(t->dim() == 1 && t->numel() == rows, op, ": bias must be [", rows, "], got ", t->dim(), "-D with ",
                    t->numel(), " elements; pass one for each row");
    tensor =
        DtypeOf(op, *t, "bias") == FloatDtype::kFloat32 ? Usable(place, *t) : torch::stable::to(*t, ScalarType::Float);
    data = tensor->const_data_ptr<float>();
  }

  std::optional<Tensor> tensor;
  const float* data = nullptr;
};

// A codebook [entries], or one group [1, entries].
inline void CheckCodebook(const char* op, const Tensor& t, std::int64_t max_entries, Place place = kCpu) {
  CheckOn(place, op, t, "codebook");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && (t.dim() == 1 || (t.dim() == 2 && t.size(0) == 1)) &&
                      t.numel() <= max_entries,
                  op, ": codebook must be float32 [entries] with at most ", max_entries, " entries, got ",
                  torch::headeronly::toString(t.scalar_type()), " with ", t.numel(), "; convert it");
}

// Splits `outer` times `inner` items over the threads; run(o, begin, end) gets a range of the inner items of one o.
template <typename Run>
void ParallelRanges(std::int64_t outer, std::int64_t inner, std::int64_t grain, const Run& run) {
  if (inner == 0) return;
  ParallelFor(outer * inner, grain, [&](std::int64_t begin, std::int64_t end) {
    while (begin < end) {
      const std::int64_t o = begin / inner;
      const std::int64_t stop = std::min(end, (o + 1) * inner);
      run(o, begin - o * inner, stop - o * inner);
      begin = stop;
    }
  });
}

}  // namespace tersetorch
