// tersetorch::sparse_conv2d and the packing of its weight: checks, allocates, splits the work, calls the kernels.
#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

using Ints = std::vector<std::int64_t>;

void CheckVector(const char* op, const Tensor& t, const char* name, ScalarType dtype, std::int64_t dim = 1,
                 Place place = kCpu) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == dim, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " and ", dim, "-D, got ",
                  torch::headeronly::toString(t.scalar_type()), " and ", t.dim(), "-D; convert it");
}

std::int64_t Blocks(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

void CheckPair(const char* op, const Ints& pair, const char* name, std::int64_t least) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // so that products of them fit int64
  const auto fits = [&](std::int64_t n) { return least <= n && n <= kMost; };
  STD_TORCH_CHECK(pair.size() == 2 && fits(pair[0]) && fits(pair[1]), op, ": ", name, " must be two numbers from ",
                  least, " to ", kMost, ", got ", pair.size(),
                  " of them or one outside; pass one for the height and one for the width");
}

ConvShape ShapeOf(const char* op, std::int64_t in_channels, std::int64_t out_channels, const Ints& kernel_size,
                  const Ints& stride, const Ints& dilation, std::int64_t groups) {
  CheckPair(op, kernel_size, "kernel_size", 1);
  CheckPair(op, stride, "stride", 1);
  CheckPair(op, dilation, "dilation", 1);
  STD_TORCH_CHECK(groups >= 1 && in_channels % groups == 0 && out_channels % groups == 0, op,
                  ": groups must divide the channels, got ", groups, " groups of ", in_channels, " channels in and ",
                  out_channels, " out; pass the groups of the weight");
  const ConvShape shape{in_channels, out_channels, groups,      kernel_size[0], kernel_size[1],
                        stride[0],   stride[1],    dilation[0], dilation[1]};
  // The first two bound what the third multiplies.
  STD_TORCH_CHECK(kernel_size[0] < kConvMaxIndex && kernel_size[1] < kConvMaxIndex &&
                      kernel_size[1] * ConvSlots(shape).Count() <= kConvMaxIndex,
                  op, ": kernel_size must be smaller, got ", kernel_size[0], " x ", kernel_size[1],
                  "; keep this layer dense");
  return shape;
}

void CheckEntries(const char* op, const Tensor& codebook, Place place = kCpu) {
  CheckVector(op, codebook, "codebook", ScalarType::Float, 1, place);
  STD_TORCH_CHECK(codebook.numel() <= kConvMaxEntries, op, ": codebook must have at most ", kConvMaxEntries,
                  " entries, got ", codebook.numel(), "; pass one group of a codebook");
}

// A packed weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, const Tensor& blocks, const Tensor& segments, const Tensor& indices, const Tensor& values,
         const std::optional<Tensor>& codebook, const ConvShape& shape, std::int64_t channel_block) {
    STD_TORCH_CHECK(1 <= channel_block && channel_block * shape.kernel_w * ConvSlots(shape).Count() <= kConvMaxIndex,
                    op, ": channel_block must be the one that the weight was packed with, got ", channel_block,
                    "; pass what sparse_conv2d_channel_block returned");
    CheckVector(op, blocks, "blocks", ScalarType::Int, 2);
    CheckVector(op, segments, "segments", ScalarType::Int);
    CheckVector(op, indices, "indices", ScalarType::Short);
    CheckOnCpu(op, values, "values");
    const std::int64_t count = Blocks(shape.in_channels, channel_block) * Blocks(shape.out_channels, kConvRows) + 1;
    STD_TORCH_CHECK(blocks.size(0) == count && blocks.size(1) == 2, op, ": blocks must be [", count, ", 2], got [",
                    blocks.size(0), ", ", blocks.size(1), "]; pass the weight that x's channels fit");
    STD_TORCH_CHECK(values.dim() == 1 && values.numel() == indices.numel(), op, ": values must be [", indices.numel(),
                    "], got ", values.dim(), "-D with ", values.numel(), " elements; pass one for each index");
    tensors = {Contiguous(blocks), Contiguous(segments), Contiguous(indices), Contiguous(values)};
    args.blocks = tensors[0].const_data_ptr<std::int32_t>();
    args.segments = tensors[1].const_data_ptr<std::int32_t>();
    args.indices = static_cast<const std::uint16_t*>(tensors[2].const_data_ptr());
    args.values = tensors[3].const_data_ptr();
    args.segment_count = segments.numel();
    args.nnz = indices.numel();
    args.channel_block = channel_block;
    args.shape = shape;
    if (!codebook.has_value()) {
      args.stored_as =
          DtypeOf(op, values, "values") == FloatDtype::kFloat32 ? ConvValues::kFloat32 : ConvValues::kBFloat16;
      return;
    }
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Byte, op,
                    ": values must be uint8 codes beside a codebook, got ",
                    torch::headeronly::toString(values.scalar_type()), "; pass codes, or no codebook");
    CheckEntries(op, *codebook);
    tensors.push_back(Contiguous(*codebook));
    args.stored_as = ConvValues::kCodes;
    args.codebook = tensors[4].const_data_ptr<float>();
    args.entries = codebook->numel();
  }

  std::vector<Tensor> tensors;
  ConvWeight args{};
};

void Raise(const char* op, ConvStatus status, const ConvWeight& w) {
  switch (status) {
    case ConvStatus::kOk:
      return;
    case ConvStatus::kBadBlock:
      STD_TORCH_CHECK(false, op, ": blocks must never fall and stay in [0, ", w.segment_count, "] and [0, ", w.nnz,
                      "], got a block that breaks this; pack the weight again");
    case ConvStatus::kBadSegment:
      STD_TORCH_CHECK(false, op,
                      ": segments must name filters of their block and count all its non-zeros, got a block that "
                      "breaks this; pack the weight again");
    case ConvStatus::kBadIndex:
      STD_TORCH_CHECK(false, op,
                      ": indices must lie inside their block of channels, got one outside; pack the weight "
                      "again");
    case ConvStatus::kBadCode:
      STD_TORCH_CHECK(false, op, ": codes must lie in [0, ", w.entries,
                      "), got one outside; pass the codebook that the codes were made with");
  }
}

// The dimensions of an image's planes follow each other as channels_last has them, and not as the default has them.
bool IsChannelsLast(const Tensor& t) {
  if (t.is_contiguous()) return false;
  std::int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Images [N, C, H, W], checked, and the sizes of what a convolution makes of them.
struct Images {
  Images(const char* op, const Tensor& x, const ConvShape& s, const Ints& padding, Place place = kCpu)
      : stored_as(DtypeOf(op, x, "x")), count(x.size(0)), height(x.size(2)), width(x.size(3)) {
    CheckPair(op, padding, "padding", 0);
    STD_TORCH_CHECK(height + 2 * padding[0] > s.dilation_h * (s.kernel_h - 1) &&
                        width + 2 * padding[1] > s.dilation_w * (s.kernel_w - 1),
                    op, ": x must be as large as the kernel, got ", height, " x ", width,
                    " before padding; pass larger images or more padding");
    out_height = (height + 2 * padding[0] - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
    out_width = (width + 2 * padding[1] - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
    channels_last = IsChannelsLast(x);
    tensor = channels_last ? x : Contiguous(x);
    // As Usable does, which knows contiguous tensors only.
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
    if (place != kCpu && address % tensor.element_size() != 0) tensor = torch::stable::clone(tensor);
  }

  // Outputs, uninitialised, in the memory format of the images.
  Tensor Outputs(std::int64_t channels) const {
    return torch::stable::empty(
        {count, channels, out_height, out_width}, tensor.scalar_type(), std::nullopt, tensor.device(), std::nullopt,
        channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
  }

  FloatDtype stored_as;
  std::int64_t count, height, width, out_height = 0, out_width = 0;
  bool channels_last = false;
  Tensor tensor;
};

// Threads share out tiles, and filters too where there are few tiles.
std::int64_t FilterChunks(std::int64_t tiles, std::int64_t row_blocks) {
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  std::int64_t chunks = 1;
  while (chunks < row_blocks && tiles * chunks % threads != 0 && tiles * chunks < 4 * threads) ++chunks;
  return chunks;
}

class Aligned {
 public:
  explicit Aligned(std::int64_t floats) : memory_(new float[floats + kLine]) {}
  float* data() const {
    return memory_.get() + (kLine - reinterpret_cast<std::uintptr_t>(memory_.get()) / sizeof(float) % kLine);
  }

 private:
  static constexpr std::size_t kLine = 16;  // floats
  std::unique_ptr<float[]> memory_;
};

std::int64_t RoundUp(std::int64_t floats) { return Blocks(floats, 16) * 16; }

Tensor Convolve(const char* op, const Tensor& x, const Weight& weight, const std::optional<Tensor>& bias,
                const Ints& padding, bool relu) {
  const ConvShape& s = weight.args.shape;
  const Images input(op, x, s, padding);
  const Bias bias_of_filters(op, bias, s.out_channels);
  const std::int64_t images = input.count, height = input.height, width = input.width;
  const std::int64_t out_height = input.out_height, out_width = input.out_width;
  const FloatDtype stored_as = input.stored_as;
  const bool channels_last = input.channels_last;
  Raise(op, ConvCheck(weight.args), weight.args);
  const Tensor y = input.Outputs(s.out_channels);
  if (y.numel() == 0) return y;

  ConvArgs args{};
  args.weight = weight.args;
  args.height = height, args.width = width, args.out_height = out_height, args.out_width = out_width;
  args.pad_h = padding[0], args.pad_w = padding[1];
  args.channels_last = channels_last;
  args.stored_as = stored_as;
  args.bias = bias_of_filters.data;
  args.relu = relu;
  if (s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && padding[0] == 0 && padding[1] == 0) {
    // Without neighbours an image is a line.
    args.width = args.out_width = height * width;
    args.height = args.out_height = 1;
  }
  args.plan = ConvPlanFor(s, weight.args.nnz, args.pad_h, args.out_height, args.out_width, ConvLanes());
  const std::int64_t row_blocks = Blocks(s.out_channels, kConvRows);
  const std::int64_t tiles = args.plan.tiles_across * args.plan.tiles_down;
  const std::int64_t chunks = FilterChunks(images * tiles, row_blocks);
  const std::int64_t rows_of_chunk = Blocks(row_blocks, chunks);
  const std::int64_t bytes = stored_as == FloatDtype::kFloat32 ? 4 : 2;
  const ConvScratchSizes sizes = ConvScratch(weight.args, args.plan);
  const char* x_data = static_cast<const char*>(input.tensor.const_data_ptr());
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  const std::int64_t pixels = height * width, plane_floats = s.in_channels * pixels;

  // Images that the kernel cannot read as they are, are converted shortly before, so many at a time that every thread
  // has one and few enough to come back from the last cache level.
  const bool as_planes = stored_as == FloatDtype::kFloat32 && !channels_last;
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t wave = as_planes ? images : std::min(images, threads);
  const Aligned planes(as_planes ? 0 : wave * plane_floats);
  const std::int64_t work = weight.args.nnz / chunks * args.plan.tile_rows;
  for (std::int64_t first = 0; first < images; first += wave) {
    const std::int64_t count = std::min(wave, images - first);
    if (!as_planes) {
      ParallelRanges(count, pixels, GrainItems(s.in_channels / 4),
                     [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                       ConvPlanes({x_data + (first + i) * plane_floats * bytes, stored_as, channels_last, s.in_channels,
                                   pixels, planes.data() + i * plane_floats},
                                  begin, end);
                     });
    }
    torch::stable::parallel_for(0, count * tiles * chunks, GrainItems(work), [&](std::int64_t begin, std::int64_t end) {
      const Aligned memory(RoundUp(sizes.buffer) + RoundUp(sizes.line) + sizes.sums * rows_of_chunk);
      ConvArgs own = args;
      own.buffer = memory.data();
      own.line = own.buffer + RoundUp(sizes.buffer);
      own.sums = own.line + RoundUp(sizes.line);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t image = task / chunks / tiles, row_begin = task % chunks * rows_of_chunk;
        const std::int64_t row_end = std::min(row_begin + rows_of_chunk, row_blocks);
        if (row_begin >= row_end) continue;
        own.planes = as_planes ? reinterpret_cast<const float*>(x_data) + (first + image) * plane_floats
                               : planes.data() + image * plane_floats;
        own.y = y_data + (first + image) * s.out_channels * out_height * out_width * bytes;
        Conv(own, task / chunks % tiles, row_begin, row_end);
      }
    });
  }
  return y;
}

void CheckImages(const char* op, const Tensor& x, Place place = kCpu) {
  CheckOn(place, op, x, "x");
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be [N, C, H, W], got ", x.dim(), "-D; reshape it");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> Pack(const char* op, const Tensor& row_offsets, const Tensor& col_indices,
                                                const ConvShape& shape, std::int64_t channel_block) {
  STD_TORCH_CHECK(1 <= channel_block && channel_block * shape.kernel_w * ConvSlots(shape).Count() <= kConvMaxIndex &&
                      channel_block * shape.kernel_h * shape.kernel_w < kConvMaxIndex,
                  op, ": channel_block must be one that 16 bits can number, got ", channel_block,
                  "; pass what sparse_conv2d_channel_block returns");
  // In memory of their own, which the kernel may read as int32.
  const Tensor offsets = torch::stable::clone(row_offsets), from = torch::stable::clone(col_indices);
  const std::int32_t* offset = offsets.const_data_ptr<std::int32_t>();
  const std::int32_t* column = from.const_data_ptr<std::int32_t>();
  const std::int64_t rows = shape.out_channels, nnz = from.numel();
  const std::int64_t columns = shape.in_channels / shape.groups * shape.kernel_h * shape.kernel_w;
  bool rising = offset[0] == 0 && offset[rows] == nnz, inside = true, sorted = true;
  for (std::int64_t r = 0; r < rows; ++r) rising &= offset[r] <= offset[r + 1];
  STD_TORCH_CHECK(rising, op, ": row_offsets must rise from 0 to ", nnz, "; rebuild the weight");
  for (std::int64_t k = 0; k < nnz; ++k) inside &= 0 <= column[k] && column[k] < columns;
  STD_TORCH_CHECK(inside, op, ": col_indices must lie in [0, ", columns,
                  "), got one outside; rebuild the weight or pass x with its number of channels");
  // A row with more non-zeros in a block than the block has weights would not fit its segment.
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = offset[r] + 1; k < offset[r + 1]; ++k) sorted &= column[k - 1] < column[k];
  }
  STD_TORCH_CHECK(sorted, op, ": col_indices must rise strictly within a row; rebuild the weight");

  const std::int64_t row_blocks = Blocks(rows, kConvRows), channel_blocks = Blocks(shape.in_channels, channel_block);
  const auto empty = [&](Ints size, ScalarType dtype) { return torch::stable::new_empty(row_offsets, size, dtype); };
  Tensor blocks = empty({channel_blocks * row_blocks + 1, 2}, ScalarType::Int);
  Tensor segments = empty({channel_blocks * rows}, ScalarType::Int);
  Tensor indices = empty({nnz}, ScalarType::Short), sources = empty({nnz}, ScalarType::Int);
  std::vector<std::int32_t> scratch(channel_blocks * rows + shape.kernel_h);
  std::int32_t* block = blocks.mutable_data_ptr<std::int32_t>();
  ConvPack({shape, offset, column, channel_block, block, segments.mutable_data_ptr<std::int32_t>(),
            static_cast<std::uint16_t*>(indices.mutable_data_ptr()), sources.mutable_data_ptr<std::int32_t>(),
            scratch.data()});
  const std::int64_t used = block[2 * channel_blocks * row_blocks];
  return {blocks, torch::stable::clone(torch::stable::narrow(segments, 0, 0, used)), indices, sources};
}

void CheckPositions(const char* op, const Tensor& row_offsets, const Tensor& col_indices, Place place = kCpu) {
  CheckVector(op, row_offsets, "row_offsets", ScalarType::Int, 1, place);
  CheckVector(op, col_indices, "col_indices", ScalarType::Int, 1, place);
  STD_TORCH_CHECK(row_offsets.numel() >= 1, op, ": row_offsets must have one entry more than filters, got none; ",
                  "pass [0]");
}

// The numbers of a weight in compressed sparse rows.
void CheckNumbers(const char* op, const Tensor& col_indices, const Tensor& values,
                  const std::optional<Tensor>& codebook, Place place = kCpu) {
  CheckOn(place, op, values, "values");
  if (!codebook.has_value()) DtypeOf(op, values, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == col_indices.numel() &&
                      (!codebook.has_value() || values.scalar_type() == ScalarType::Byte),
                  op, ": values must be [", col_indices.numel(), "], uint8 codes beside a codebook, got ",
                  torch::headeronly::toString(values.scalar_type()), ", ", values.dim(), "-D with ", values.numel(),
                  " elements; pass one for each column index");
}

// ---- ops

std::int64_t ChannelBlock(std::int64_t in_channels, Ints kernel_size, Ints stride, Ints dilation) {
  return ConvChannelBlock(ShapeOf("sparse_conv2d_channel_block", in_channels, 0, kernel_size, stride, dilation, 1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> PackOnCpu(const Tensor& row_offsets, const Tensor& col_indices,
                                                     std::int64_t in_channels, std::int64_t channel_block,
                                                     Ints kernel_size, Ints stride, Ints dilation,
                                                     std::int64_t groups) {
  constexpr const char* kOp = "sparse_conv2d_pack";
  CheckPositions(kOp, row_offsets, col_indices);
  const ConvShape shape = ShapeOf(kOp, in_channels, row_offsets.numel() - 1, kernel_size, stride, dilation, groups);
  return Pack(kOp, row_offsets, col_indices, shape, channel_block);
}

Tensor PackedOnCpu(const Tensor& x, const Tensor& blocks, const Tensor& segments, const Tensor& indices,
                   const Tensor& values, const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
                   std::int64_t out_channels, std::int64_t channel_block, Ints kernel_size, Ints stride, Ints padding,
                   Ints dilation, std::int64_t groups, bool relu) {
  constexpr const char* kOp = "sparse_conv2d_packed";
  CheckImages(kOp, x);
  const ConvShape shape = ShapeOf(kOp, x.size(1), out_channels, kernel_size, stride, dilation, groups);
  return Convolve(kOp, x, Weight(kOp, blocks, segments, indices, values, codebook, shape, channel_block), bias, padding,
                  relu);
}

// array[sources], item by item.
Tensor Gathered(const Tensor& array, const Tensor& sources) {
  const Tensor from = Contiguous(array), to = torch::stable::new_empty(array, {sources.numel()});
  const std::size_t size = array.scalar_type() == ScalarType::Byte    ? 1
                           : array.scalar_type() == ScalarType::Float ? 4
                                                                      : 2;
  const auto* source = sources.const_data_ptr<std::int32_t>();
  const char* read = static_cast<const char*>(from.const_data_ptr());
  char* write = static_cast<char*>(to.mutable_data_ptr());
  for (std::int64_t k = 0; k < sources.numel(); ++k) std::memcpy(write + k * size, read + source[k] * size, size);
  return to;
}

Tensor ConvOnCpu(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook, Ints kernel_size,
                 Ints stride, Ints padding, Ints dilation, std::int64_t groups, bool relu) {
  constexpr const char* kOp = "sparse_conv2d";
  CheckImages(kOp, x);
  CheckPositions(kOp, row_offsets, col_indices);
  const ConvShape shape = ShapeOf(kOp, x.size(1), row_offsets.numel() - 1, kernel_size, stride, dilation, groups);
  CheckNumbers(kOp, col_indices, values, codebook);
  const std::int64_t channel_block = ConvChannelBlock(shape);
  const auto [blocks, segments, indices, sources] = Pack(kOp, row_offsets, col_indices, shape, channel_block);
  return Convolve(kOp, x,
                  Weight(kOp, blocks, segments, indices, Gathered(values, sources), codebook, shape, channel_block),
                  bias, padding, relu);
}

#ifdef TERSETORCH_CUDA

ConvSteps StepsOf(std::int64_t channels, std::int64_t height, std::int64_t width, bool channels_last) {
  const std::int64_t image = channels * height * width;
  if (channels_last) return {image, 1, width * channels, channels};
  return {image, height * width, width, 1};
}

Tensor ConvOnCuda(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook, Ints kernel_size,
                  Ints stride, Ints padding, Ints dilation, std::int64_t groups, bool relu) {
  constexpr const char* kOp = "sparse_conv2d";
  const CudaCall call(kOp, x, "x");
  const Place place = call.place();
  CheckImages(kOp, x, place);
  CheckPositions(kOp, row_offsets, col_indices, place);
  const std::int64_t channels = x.size(1), filters = row_offsets.numel() - 1;
  const ConvShape shape = ShapeOf(kOp, channels, filters, kernel_size, stride, dilation, groups);
  CheckNumbers(kOp, col_indices, values, codebook, place);
  if (codebook.has_value()) CheckEntries(kOp, *codebook, place);
  const Images images(kOp, x, shape, padding, place);
  const Bias bias_of_filters(kOp, bias, filters, place);
  const Tensor offsets = Usable(place, row_offsets), columns = Usable(place, col_indices);
  const Tensor numbers = Usable(place, values);
  const std::optional<Tensor> entries = codebook.has_value() ? std::optional(Usable(place, *codebook)) : std::nullopt;

  ConvCudaArgs args{};
  args.weight.row_offsets = offsets.const_data_ptr<std::int32_t>();
  args.weight.col_indices = columns.const_data_ptr();
  args.weight.indexed_by = CsrIndices::kInt32;
  args.weight.values = numbers.const_data_ptr();
  args.weight.stored_as = entries.has_value()                         ? CsrValues::kCodes
                          : values.scalar_type() == ScalarType::Float ? CsrValues::kFloat32
                                                                      : CsrValues::kBFloat16;
  args.weight.codebook = entries.has_value() ? entries->const_data_ptr<float>() : nullptr;
  args.weight.entries = entries.has_value() ? entries->numel() : 0;
  args.weight.rows = filters;
  args.weight.columns = channels / groups * shape.kernel_h * shape.kernel_w;
  args.weight.nnz = col_indices.numel();
  args.shape = shape;
  args.images = images.count;
  args.height = images.height, args.width = images.width;
  args.out_height = images.out_height, args.out_width = images.out_width;
  args.pad_h = padding[0], args.pad_w = padding[1];
  args.x = images.tensor.const_data_ptr();
  args.x_steps = StepsOf(channels, images.height, images.width, images.channels_last);
  args.stored_as = images.stored_as;
  args.bias = bias_of_filters.data;
  args.relu = relu;
  const Tensor y = images.Outputs(filters);
  args.y = y.mutable_data_ptr();
  args.y_steps = StepsOf(filters, images.out_height, images.out_width, images.channels_last);
  call.Check(ConvCuda(args, call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("sparse_conv2d", TORCH_BOX(&ConvOnCpu));
  m.impl("sparse_conv2d_inference", TORCH_BOX(&ConvOnCpu));
  m.impl("sparse_conv2d_packed", TORCH_BOX(&PackedOnCpu));
  m.impl("sparse_conv2d_pack", TORCH_BOX(&PackOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("sparse_conv2d", TORCH_BOX(&ConvOnCuda));
  m.impl("sparse_conv2d_inference", TORCH_BOX(&ConvOnCuda));
#else
  for (const char* op : {"sparse_conv2d", "sparse_conv2d_inference"}) m.impl(op, &NotBuiltForCuda);
#endif
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CompositeExplicitAutograd, m) {
  m.impl("sparse_conv2d_channel_block", TORCH_BOX(&ChannelBlock));
}

}  // namespace tersetorch
