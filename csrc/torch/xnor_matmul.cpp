// tersetorch::xnor_matmul: checks, packs the signs of real samples, allocates, splits the work, calls the kernels.
#include "kernels/xnor_matmul/xnor_matmul.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "kernels/sign_pack/sign_pack.h"
#include "kernels/sign_pack/sign_pack_cuda.h"
#include "kernels/xnor_matmul/xnor_matmul_cuda.h"
#include "torch/cuda.h"
#include "torch/samples.h"
#include "torch/signs.h"

namespace tersetorch {
namespace {

constexpr const char* kOp = "xnor_matmul";

struct Inputs {
  Inputs(Place place, const Tensor& x, const Tensor& packed, std::int64_t in_features, std::int64_t out_features,
         const std::optional<Tensor>& scale_of, const std::optional<Tensor>& bias_of,
         const std::optional<Tensor>& thresholds_of)
      : packed_already(x.scalar_type() == ScalarType::Long),
        epilogue(kOp, place, scale_of, bias_of, thresholds_of, out_features) {
    STD_TORCH_CHECK(in_features >= 0 && in_features <= std::numeric_limits<std::int32_t>::max() && out_features >= 0,
                    kOp, ": in_features and out_features must lie in [0, 2^31), got ", in_features, " and ",
                    out_features, "; pass the sizes of W");
    CheckOn(place, kOp, x, "x");
    STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x must be [..., in], got a scalar; reshape it");
    CheckOn(place, kOp, packed, "weight");
    // A row of flattened images has unused bits in each of its words: more of them than its signs need.
    const std::int64_t least = SignWords(in_features);
    const std::int64_t words = packed.dim() == 3 ? std::max(packed.size(1), least) : least;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Long && packed.dim() == 3 &&
                        packed.size(0) == XnorTiles(out_features) && packed.size(1) == words &&
                        packed.size(2) == kXnorRows,
                    kOp, ": weight must be int64 [", XnorTiles(out_features), ", ", least, " or more, ", kXnorRows,
                    "], got ", torch::headeronly::toString(packed.scalar_type()), " of ", packed.dim(), "-D with ",
                    packed.numel(), " elements; pass what xnor_pack returns");
    STD_TORCH_CHECK(packed_already || words == least, kOp, ": x must be packed for a weight of ", words,
                    " words a row, of which ", in_features, " signs fill ", least, "; pass packed signs");
    const std::int64_t last = packed_already ? words : in_features;
    STD_TORCH_CHECK(x.size(-1) == last, kOp, ": x must have ", last, packed_already ? " words" : " features", ", got ",
                    x.size(-1), "; pass x with as many features as W has columns");
    weight = Usable(place, packed, 2);
    args.weight = reinterpret_cast<const std::uint64_t*>(weight.const_data_ptr<std::int64_t>());
    args.words = words;
    args.columns = in_features;
    args.rows = out_features;
    args.scale = epilogue.scale.Data<float>();
    args.bias = epilogue.bias.Data<float>();
    args.thresholds = epilogue.thresholds.Data<std::int32_t>();
  }

  // y, and args that say so.
  Tensor Empty(const Tensor& x) {
    const bool bits = epilogue.Bits(), floats = epilogue.Floats();
    std::vector<std::int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = bits ? SignWords(args.rows) : args.rows;
    const Tensor y = torch::stable::new_empty(x, shape,
                                              bits     ? ScalarType::Long
                                              : floats ? ScalarType::Float
                                                       : ScalarType::Int);
    if (bits) {
      args.bits = reinterpret_cast<std::uint64_t*>(y.mutable_data_ptr<std::int64_t>());
    } else if (floats) {
      args.floats = y.mutable_data_ptr<float>();
    } else {
      args.dots = y.mutable_data_ptr<std::int32_t>();
    }
    args.samples = LeadingSize(x);
    return y;
  }

  // Some of the samples; x is theirs.
  XnorMatmulArgs Part(const std::uint64_t* x, std::int64_t first, std::int64_t count) const {
    XnorMatmulArgs part = args;
    part.x = x;
    part.samples = count;
    if (args.dots != nullptr) part.dots += first * args.rows;
    if (args.floats != nullptr) part.floats += first * args.rows;
    if (args.bits != nullptr) part.bits += first * SignWords(args.rows);
    return part;
  }

  bool packed_already;
  Epilogue epilogue;
  Tensor weight;
  XnorMatmulArgs args{};
};

Tensor XnorMatmulOnCpu(const Tensor& x, const Tensor& weight, std::int64_t in_features, std::int64_t out_features,
                       const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& thresholds) {
  Inputs inputs(kCpu, x, weight, in_features, out_features, scale, bias, thresholds);
  const Tensor y = inputs.Empty(x);
  const std::int64_t samples = inputs.args.samples, words = inputs.args.words;
  if (inputs.args.rows == 0 || samples == 0) return y;
  const Tensor usable = inputs.packed_already ? Usable(kCpu, x) : Samples(kOp, x, "x").tensor;
  const FloatDtype stored_as = inputs.packed_already ? FloatDtype::kFloat32 : DtypeOf(kOp, usable, "x");
  // Words of bits are whole tiles of one thread.
  const std::int64_t together = inputs.args.bits != nullptr ? 2 : 1;
  const std::int64_t tiles = XnorTiles(inputs.args.rows), parts = (tiles + together - 1) / together;
  const std::int64_t wave = std::min(samples, kXnorSamples);
  Scratch scratch(inputs.packed_already ? 0 : 8 * wave * words);
  for (std::int64_t first = 0; first < samples; first += wave) {
    const std::int64_t count = std::min(wave, samples - first);
    const std::uint64_t* bits = scratch.Data<std::uint64_t>();
    if (inputs.packed_already) {
      bits = reinterpret_cast<const std::uint64_t*>(usable.const_data_ptr<std::int64_t>()) + first * words;
    } else {
      const std::int64_t offset = first * inputs.args.columns * (stored_as == FloatDtype::kFloat32 ? 4 : 2);
      const SignPackArgs pack{static_cast<const char*>(usable.const_data_ptr()) + offset, stored_as,
                              inputs.args.columns, scratch.Data<std::uint64_t>()};
      ParallelFor(count * words, GrainItems(4),
                  [&](std::int64_t begin, std::int64_t end) { SignPack(pack, begin, end); });
    }
    const XnorMatmulArgs part = inputs.Part(bits, first, count);
    ParallelFor(parts, GrainItems(together * count * (10 * words + 16)), [&](std::int64_t begin, std::int64_t end) {
      XnorMatmul(part, begin * together, std::min(tiles, end * together));
    });
  }
  return y;
}

#ifdef TERSETORCH_CUDA

Tensor XnorMatmulOnCuda(const Tensor& x, const Tensor& weight, std::int64_t in_features, std::int64_t out_features,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& thresholds) {
  const CudaCall call(kOp, x, "x");
  Inputs inputs(call.place(), x, weight, in_features, out_features, scale, bias, thresholds);
  constexpr std::int64_t kMost = (1 << 30) - 1;  // kernels add two counts of ones
  STD_TORCH_CHECK(inputs.args.words * kSignBits <= kMost, kOp, ": x must have fewer than 2^30 signs on a GPU, got ",
                  inputs.args.words, " words of 64; split W by columns");
  const Tensor y = inputs.Empty(x);
  Tensor bits;
  if (inputs.packed_already) {
    bits = Usable(call.place(), x);
  } else {
    const Samples samples(kOp, x, "x", call.place());
    bits = torch::stable::new_empty(x, {samples.count, inputs.args.words}, ScalarType::Long);
    const SignPackArgs pack{samples.tensor.const_data_ptr(), samples.stored_as, samples.features,
                            reinterpret_cast<std::uint64_t*>(bits.mutable_data_ptr<std::int64_t>())};
    call.Check(SignPackCuda(pack, samples.count, call.Stream()));
  }
  inputs.args.x = reinterpret_cast<const std::uint64_t*>(bits.const_data_ptr<std::int64_t>());
  call.Check(XnorMatmulCuda(inputs.args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) { m.impl("xnor_matmul", TORCH_BOX(&XnorMatmulOnCpu)); }

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("xnor_matmul", TORCH_BOX(&XnorMatmulOnCuda));
#else
  m.impl("xnor_matmul", &NotBuiltForCuda);
#endif
}

}  // namespace tersetorch
