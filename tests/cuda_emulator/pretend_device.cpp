// A CUDA device for a PyTorch without CUDA: memory and launches are the emulator's. It stands behind PyTorch's own
// interfaces for devices (and pretend_accelerator.cpp), so that an op's CUDA side runs as it would with a GPU.
// PyTorch's other ops work on such tensors through its CPU kernels. It is built with the headers of the torch that runs
// it.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "cuda_runtime.h"
#include "emulator.h"

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;

constexpr DeviceIndex kDevices = kCudaDevices;
thread_local c10::StreamId stream_now[kDevices] = {0, 0};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    const Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override {
    int device = 0;
    cudaGetDevice(&device);
    return {DeviceType::CUDA, static_cast<DeviceIndex>(device)};
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(cudaSetDevice(device.index()) == cudaSuccess, "no such device");
  }
  void uncheckedSetDevice(Device device) const noexcept override { cudaSetDevice(device.index()); }
  c10::Stream getStream(Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, stream_now[device.index()]);
  }
  c10::Stream getDefaultStream(Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream old = getStream(stream.device());
    stream_now[stream.device_index()] = stream.id();
    return old;
  }
  // A handle that tells device and stream.
  void* getStreamNativeHandle(const c10::Stream stream) const override {
    return reinterpret_cast<void*>(0x1000 * (stream.device_index() + 1) + stream.id());
  }
  // The emulator is never behind.
  void record(void**, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// While it lives PyTorch may do what a kernel's launcher may not: a graph has a pool of its memory.
struct OfPyTorch {
  bool forbidden = cuda_emulator::ForbidWaiting(false);
  OfPyTorch() = default;
  OfPyTorch(const OfPyTorch&) = delete;
  ~OfPyTorch() { cuda_emulator::ForbidWaiting(forbidden); }
};

std::atomic<std::uint64_t> allocations{0};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const OfPyTorch allowed;
    void* memory = nullptr;
    if (bytes != 0) cudaMalloc(&memory, bytes);
    allocations += bytes != 0;
    return {memory, memory, raw_deleter(), Guard().getDevice()};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* memory) {
      const OfPyTorch allowed;
      cudaFree(memory);
    };
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    const OfPyTorch allowed;
    cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice);
  }
};
Memory memory;

at::Tensor Empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor EmptyStrided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                        std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU, which the pretend device's memory is.
at::Tensor OnCpu(const at::Tensor& t) {
  if (t.is_cpu()) return t;
  return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), t.options().device(c10::kCPU));
}

thread_local bool falling_back = false;
struct FallingBack {
  bool before = std::exchange(falling_back, true);
  FallingBack() = default;
  FallingBack(const FallingBack&) = delete;
  ~FallingBack() { falling_back = before; }
};

at::Tensor& Copy(at::Tensor& to, const at::Tensor& from, bool) {
  if (to.numel() == 0) return to;
  const OfPyTorch allowed;
  TORCH_CHECK(!allowed.forbidden || falling_back || (to.is_cuda() && from.is_cuda()),
              "a copy between host and device waits, which no CUDA graph can record");
  OnCpu(to).copy_(OnCpu(from));
  if (to.is_cuda()) {
    // Telling the emulator that the host wrote: the whole array, of which `to` may be a part.
    const c10::Storage& storage = to.storage();
    cudaMemcpy(storage.mutable_data(), storage.data(), storage.nbytes(), cudaMemcpyHostToDevice);
  }
  return to;
}

at::Tensor CopyFrom(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  at::Tensor target = to;
  return Copy(target, from, non_blocking);
}

at::Tensor CopyFromAndResize(const at::Tensor& from, const at::Tensor& to) {
  if (from.sizes() != to.sizes()) {
    const c10::DeviceGuard guard(to.device());
    const at::Tensor resized = Empty(from.sizes(), to.scalar_type(), {}, {}, {}, {});
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
    to.unsafeGetTensorImpl()->set_sizes_contiguous(from.sizes());
  }
  return CopyFrom(from, to, false);
}

// The same numbers one byte behind an aligned address.
at::Tensor Unaligned(const at::Tensor& t) {
  const at::Tensor from = t.contiguous();
  void* bytes = nullptr;
  cudaMalloc(&bytes, from.nbytes() + 1);
  void* to = static_cast<char*>(bytes) + 1;
  cudaMemcpy(to, from.const_data_ptr(), from.nbytes(), cudaMemcpyDeviceToDevice);
  return at::for_blob(to, from.sizes())
      .deleter([bytes](void*) { cudaFree(bytes); })
      .options(from.options())
      .target_device(from.device())
      .make_tensor();
}

// Whether the host waits in an op of PyTorch's, for a number or for the size of its result.
bool Waits(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  static const std::set<std::string> waiting = {"aten::_local_scalar_dense", "aten::nonzero",  "aten::equal",
                                                "aten::masked_select",       "aten::_unique2", "aten::unique_dim",
                                                "aten::unique_consecutive",  "aten::bincount"};
  const std::string& name = op.operator_name().name;
  if (waiting.contains(name)) return true;
  if (name == "aten::repeat_interleave") return stack.back().isNone();  // no output_size
  if (name != "aten::index" && name != "aten::index_put_" && name != "aten::_index_put_impl_") return false;
  const c10::IValue& indices = stack[stack.size() - op.schema().arguments().size() + 1];
  for (const auto& index : indices.toOptionalTensorVector()) {
    if (index.has_value() && (index->scalar_type() == at::kBool || index->scalar_type() == at::kByte)) return true;
  }
  return false;
}

void OnTheCpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.operator_name().name;
  TORCH_CHECK_NOT_IMPLEMENTED(name.rfind("tersetorch::", 0) != 0, "Could not run '", name,
                              "' with arguments from the 'CUDA' backend");
  const OfPyTorch allowed;
  TORCH_CHECK(!allowed.forbidden || !Waits(op, *stack), name, " waits, which no CUDA graph can record");
  const FallingBack copies_are_not_the_ops;
  at::native::cpu_fallback(op, stack);
}

struct Registration {
  Registration() { c10::SetAllocator(DeviceType::CUDA, &memory); }
} registration;

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &Empty);
  m.impl("empty_strided", &EmptyStrided);
  m.impl("copy_", &Copy);
  m.impl("_copy_from", &CopyFrom);
  m.impl("_copy_from_and_resize", &CopyFromAndResize);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&OnTheCpu>()); }

TORCH_LIBRARY(pretend_cuda, m) { m.def("unaligned(Tensor t) -> Tensor"); }
TORCH_LIBRARY_IMPL(pretend_cuda, CUDA, m) { m.impl("unaligned", &Unaligned); }

// ---- what tests say to the emulator, through ctypes

#define API extern "C" __attribute__((visibility("default")))

API void cuda_emulator_schedule(int order, std::uint64_t seed, int resident_blocks, int preempt_one_in) {
  cuda_emulator::SetSchedule({static_cast<cuda_emulator::Order>(order), seed, resident_blocks, preempt_one_in});
}
API const char* cuda_emulator_report() {
  static std::string text;
  const cuda_emulator::Report& report = cuda_emulator::LastReport();
  text = report.kind.empty() ? "" : report.kind + ": " + report.message;
  return text.c_str();
}
API void cuda_emulator_clear_report() { cuda_emulator::ClearReport(); }
API void cuda_emulator_forbid_waiting(int forbid) { cuda_emulator::ForbidWaiting(forbid != 0); }
API std::uint64_t cuda_emulator_allocations() { return allocations; }
API int cuda_emulator_device() { return cuda_emulator::LastDevice(); }
API void cuda_emulator_fail_launches(int error) { cuda_emulator::FailLaunches(error); }
API std::uint64_t cuda_emulator_launches() { return cuda_emulator::LaunchCount(); }
API std::uint64_t cuda_emulator_stream() { return reinterpret_cast<std::uint64_t>(cuda_emulator::LastStream()); }
API void cuda_emulator_use_stream(int device, std::int64_t stream) { stream_now[device] = stream; }
