// tersetorch::sign_pack: checks, allocates, splits the work, calls the kernels.
#include "kernels/sign_pack/sign_pack.h"

#include <torch/csrc/stable/library.h>

#include "kernels/sign_pack/sign_pack_cuda.h"
#include "torch/cuda.h"
#include "torch/samples.h"
#include "torch/signs.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "sign_pack";
constexpr const char* kImages = "sign_pack_images";

// int64 of x's shape, but the last dimension.
Tensor EmptyWords(const Tensor& x) {
  std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = SignWords(x.size(-1));
  return torch::stable::new_empty(x, shape, ScalarType::Long);
}

std::uint64_t* WordsOf(const Tensor& bits) {
  return reinterpret_cast<std::uint64_t*>(bits.mutable_data_ptr<std::int64_t>());
}

SignImages ImagesOf(Place place, const Tensor& x) {
  CheckImages(kImages, x, place);
  DtypeOf(kImages, x, "x");
  return {kImages, place, x, x.size(1)};
}

// Packed images of x's size.
Tensor EmptyImages(const SignImages& images, const Tensor& x) {
  return torch::stable::new_empty(x, {images.count, images.height, images.width, SignWords(images.channels)},
                                  ScalarType::Long);
}

Tensor SignPackOnCpu(const Tensor& x) {
  const Samples samples(kOp, x, "x");
  const Tensor bits = EmptyWords(x);
  const SignPackArgs args{samples.tensor.const_data_ptr(), samples.stored_as, samples.features, WordsOf(bits)};
  ParallelFor(bits.numel(), GrainItems(4), [&](std::int64_t begin, std::int64_t end) { SignPack(args, begin, end); });
  return bits;
}

Tensor SignPackImagesOnCpu(const Tensor& x) {
  const SignImages images = ImagesOf(kCpu, x);
  const Tensor bits = EmptyImages(images, x);
  images.Pack(0, images.count, 1, WordsOf(bits));
  return bits;
}

#ifdef TERSETORCH_CUDA

Tensor SignPackOnCuda(const Tensor& x) {
  const CudaCall call(kOp, x, "x");
  const Samples samples(kOp, x, "x", call.place());
  const Tensor bits = EmptyWords(x);
  const SignPackArgs args{samples.tensor.const_data_ptr(), samples.stored_as, samples.features, WordsOf(bits)};
  call.Check(SignPackCuda(args, samples.count, call.Stream()));
  return bits;
}

Tensor SignPackImagesOnCuda(const Tensor& x) {
  const CudaCall call(kImages, x, "x");
  const SignImages images = ImagesOf(call.place(), x);
  const Tensor bits = EmptyImages(images, x);
  images.PackOnCuda(call, 1, WordsOf(bits));
  return bits;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("sign_pack", TORCH_BOX(&SignPackOnCpu));
  m.impl("sign_pack_images", TORCH_BOX(&SignPackImagesOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("sign_pack", TORCH_BOX(&SignPackOnCuda));
  m.impl("sign_pack_images", TORCH_BOX(&SignPackImagesOnCuda));
#else
  for (const char* op : {"sign_pack", "sign_pack_images"}) m.impl(op, &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
