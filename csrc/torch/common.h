// What every op of this room needs: shapes, memory and tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace tersetorch {

// An uninitialised tensor on t's device. Past the dispatcher, which looks an op up by its name at every call.
inline torch::stable::Tensor EmptyOnDeviceOf(const torch::stable::Tensor& t, std::vector<std::int64_t> shape,
                                             std::int32_t dtype) {
  const auto dim = static_cast<std::int64_t>(shape.size());
  shape.resize(2 * dim);
  std::int64_t* strides = shape.data() + dim;
  std::int64_t stride = 1;
  for (std::int64_t d = dim; d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<std::int64_t>(1, shape[d]);
  }
  std::int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device_index));
  AtenTensorHandle empty;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, shape.data(), strides, dtype, device_type, device_index, &empty));
  return torch::stable::Tensor(empty);
}

// t's sizes, with room for so many numbers that Empty... of this many dimensions needs no more memory.
inline std::vector<std::int64_t> SizesOf(const torch::stable::Tensor& t, std::int64_t dim) {
  std::vector<std::int64_t> sizes;
  sizes.reserve(2 * dim);
  sizes.assign(t.sizes().begin(), t.sizes().end());
  return sizes;
}

// A tensor of t's dtype and device and of its shape with the last dimension replaced.
inline torch::stable::Tensor EmptyWithLastDim(const torch::stable::Tensor& t, std::int64_t last) {
  std::vector<std::int64_t> shape = SizesOf(t, t.dim());
  shape.back() = last;
  std::int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return EmptyOnDeviceOf(t, std::move(shape), dtype);
}

// The product of the leading dimensions; unlike numel() / size(-1) it is right for an empty last dimension too.
inline std::int64_t LeadingSize(const torch::stable::Tensor& t) {
  std::int64_t size = 1;
  for (std::int64_t d = 0; d + 1 < t.dim(); ++d) size *= t.size(d);
  return size;
}

// Asking is cheaper than dispatching aten::contiguous, which nearly always has nothing to do.
inline torch::stable::Tensor Contiguous(const torch::stable::Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::int64_t Blocks(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

// Items of one thread's task: fewer than about 32 Ki vector operations cost less than waking a thread.
inline std::int64_t GrainItems(std::int64_t vector_operations_per_item) {
  constexpr std::int64_t kVectorOperationsPerTask = 32 * 1024;
  return std::max<std::int64_t>(1, kVectorOperationsPerTask / std::max<std::int64_t>(1, vector_operations_per_item));
}

// Calls run(begin, end) for parts of `items`, on several threads where each gets at least `grain` of them.
template <typename Run>
void ParallelFor(std::int64_t items, std::int64_t grain, const Run& run) {
  if (items > grain) {
    torch::stable::parallel_for(0, items, grain, run);
  } else if (items > 0) {
    run(0, items);
  }
}

// Memory for a call, aligned to a cache line: a little of it on the stack, because asking for some costs as much as a
// small product.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes) {
    if (bytes > static_cast<std::int64_t>(sizeof small_)) large_.reset(new char[bytes + kLine]);
  }
  template <typename T>
  T* Data() {
    char* p = large_ ? large_.get() : small_;
    return reinterpret_cast<T*>(p + (kLine - reinterpret_cast<std::uintptr_t>(p) % kLine) % kLine);
  }

 private:
  static constexpr std::int64_t kLine = 64;
  alignas(kLine) char small_[16 * 1024];
  std::unique_ptr<char[]> large_;
};

}  // namespace tersetorch
