// Tells PyTorch that its accelerator is CUDA, which a build without CUDA denies by how it was compiled. A library of
// its own, loaded before PyTorch: PyTorch's calls of getAccelerator then come here, and its hooks are made once, early.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>

namespace at {

// PyTorch looks for hooks of this name.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace accelerator {

__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}

}  // namespace accelerator
}  // namespace at
