// What the ops on packed signs share: images of them, and what becomes of a binary product.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "kernels/sign_pack/sign_pack.h"
#include "kernels/sign_pack/sign_pack_cuda.h"
#include "kernels/xnor_conv2d/xnor_conv2d.h"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/samples.h"

namespace tersetorch {

// One number of float32 or int32 for each row of a weight, or none.
struct OfRows {
  OfRows(const char* op, Place place, const std::optional<Tensor>& t, const char* name, ScalarType dtype,
         std::int64_t rows) {
    if (!t.has_value()) return;
    CheckOn(place, op, *t, name);
    STD_TORCH_CHECK(t->scalar_type() == dtype && t->dim() == 1 && t->numel() == rows, op, ": ", name, " must be ",
                    torch::headeronly::toString(dtype), " [", rows, "], got ",
                    torch::headeronly::toString(t->scalar_type()), " of ", t->dim(), "-D with ", t->numel(),
                    " elements; pass one for each row");
    tensor = Usable(place, *t);
  }
  template <typename T>
  const T* Data() const {
    return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
  }
  std::optional<Tensor> tensor;
};

// What a binary product does with its sums.
struct Epilogue {
  Epilogue(const char* op, Place place, const std::optional<Tensor>& scale_of, const std::optional<Tensor>& bias_of,
           const std::optional<Tensor>& thresholds_of, std::int64_t rows)
      : scale(op, place, scale_of, "scale", ScalarType::Float, rows),
        bias(op, place, bias_of, "bias", ScalarType::Float, rows),
        thresholds(op, place, thresholds_of, "thresholds", ScalarType::Int, rows) {
    STD_TORCH_CHECK(!Bits() || !Floats(), op,
                    ": thresholds stand in for scale and bias, got them together; fold these into the thresholds");
  }
  // An array of no numbers has no address.
  bool Bits() const { return thresholds.tensor.has_value(); }
  bool Floats() const { return scale.tensor.has_value() || bias.tensor.has_value(); }

  OfRows scale, bias, thresholds;
};

// Images of real numbers [N, C, H, W] of which the signs count, or of packed signs [N, H, W, words].
struct SignImages {
  SignImages(const char* op, Place place, const Tensor& x, std::int64_t in_channels)
      : channels(in_channels), packed_already(x.scalar_type() == ScalarType::Long) {
    CheckImages(op, x, place);
    const std::int64_t words = SignWords(channels);
    count = x.size(0);
    height = x.size(packed_already ? 1 : 2);
    width = x.size(packed_already ? 2 : 3);
    if (packed_already) {
      STD_TORCH_CHECK(x.size(3) == words, op, ": x must be packed images [N, H, W, ", words, "], got ", x.size(3),
                      " words; pass x with as many channels as the weight is for");
      tensor = Usable(place, x);
      return;
    }
    stored_as = DtypeOf(op, x, "x");
    STD_TORCH_CHECK(x.size(1) == channels, op, ": x must have ", channels, " channels, got ", x.size(1),
                    "; pass x with as many channels as the weight is for");
    channels_last = IsChannelsLast(x);
    tensor = channels_last ? x : Usable(place, x);
    channels_last |= height * width == 1;
    item_bytes = stored_as == FloatDtype::kFloat32 ? 4 : 2;
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
    if (place != kCpu && address % item_bytes != 0) tensor = torch::stable::clone(tensor);
  }

  const std::uint64_t* Words() const {
    return reinterpret_cast<const std::uint64_t*>(tensor.const_data_ptr<std::int64_t>());
  }
  const void* Numbers(std::int64_t image) const {
    return static_cast<const char*>(tensor.const_data_ptr()) + image * channels * height * width * item_bytes;
  }

  // Packs some images on the CPU so that each of the groups of channels begins with a word.
  void Pack(std::int64_t first, std::int64_t images, std::int64_t groups, std::uint64_t* bits) const {
    const std::int64_t of_group = channels / groups, words = groups * SignWords(of_group), pixels = height * width;
    if (packed_already) {
      const std::uint64_t* from = Words() + first * pixels * SignWords(channels);
      return ParallelFor(images * pixels, GrainItems(4 * words), [&](std::int64_t begin, std::int64_t end) {
        XnorSplitGroups(from, groups, of_group, bits, begin, end);
      });
    }
    if (channels_last) {
      const SignPackArgs args{Numbers(first), stored_as, of_group, bits};
      return ParallelFor(images * pixels * words, GrainItems(4),
                         [&](std::int64_t begin, std::int64_t end) { SignPack(args, begin, end); });
    }
    ParallelRanges(
        images, pixels, GrainItems(channels / 8 + 1), [&](std::int64_t n, std::int64_t begin, std::int64_t end) {
          SignPackPlanes({Numbers(first + n), stored_as, groups, of_group, pixels, bits + n * pixels * words}, begin,
                         end);
        });
  }

#ifdef TERSETORCH_CUDA
  // The same for all images, on a CUDA device.
  void PackOnCuda(const CudaCall& call, std::int64_t groups, std::uint64_t* bits) const {
    const std::int64_t of_group = channels / groups, pixels = height * width;
    if (packed_already) {
      call.Check(XnorSplitGroupsCuda(Words(), count * pixels, groups, of_group, bits, call.Stream()));
    } else if (channels_last) {
      call.Check(SignPackCuda({Numbers(0), stored_as, of_group, bits}, count * pixels * groups, call.Stream()));
    } else {
      call.Check(SignPackPlanesCuda({Numbers(0), stored_as, groups, of_group, pixels, bits}, count, call.Stream()));
    }
  }
#endif

  std::int64_t channels;
  bool packed_already, channels_last = false;
  std::int64_t count, height, width, item_bytes = 0;
  FloatDtype stored_as = FloatDtype::kFloat32;
  Tensor tensor;
};

}  // namespace tersetorch
