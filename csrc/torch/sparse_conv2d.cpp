// tersetorch::sparse_conv2d, its modes and the packing of its weight: checks, allocates, splits the work, calls the
// kernels.
#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/panels/panels.h"
#include "kernels/planes/planes.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/images.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

void CheckVector(const char* op, const Tensor& t, const char* name, ScalarType dtype, std::int64_t dim = 1,
                 Place place = kCpu) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == dim, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " and ", dim, "-D, got ",
                  torch::headeronly::toString(t.scalar_type()), " and ", t.dim(), "-D; convert it");
}

ConvShape ShapeOf(const char* op, std::int64_t in_channels, std::int64_t out_channels, const Ints& kernel_size,
                  const Ints& stride, const Ints& dilation, std::int64_t groups) {
  const ConvShape shape = ConvShapeOf(op, in_channels, out_channels, kernel_size, stride, dilation, groups);
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

// Nearest, ties to even; NaN stays NaN.
std::uint32_t BFloat16Bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

ConvMode ModeOf(const char* op, const std::string& mode) {
  if (mode == "exact") return ConvMode::kExact;
  if (mode == "bfloat16") return ConvMode::kBFloat16;
  STD_TORCH_CHECK(mode == "int8", op, ": mode must be \"exact\", \"bfloat16\" or \"int8\", got \"", mode,
                  "\"; choose one of them");
  return ConvMode::kInt8;
}

// Channels of a word.
std::int64_t GroupOf(ConvMode mode) { return mode == ConvMode::kExact ? 1 : mode == ConvMode::kBFloat16 ? 2 : 4; }

// So that no sum of products of two int8 leaves int32.
void CheckInt8Size(const char* op, const ConvShape& shape) {
  constexpr std::int64_t kMostWeights = 128 * 1024;
  const std::int64_t weights = shape.in_channels / shape.groups * shape.kernel_h * shape.kernel_w;
  STD_TORCH_CHECK(weights <= kMostWeights, op, ": a filter must have at most ", kMostWeights,
                  " weights in mode \"int8\", got ", weights, "; use another mode");
}

// A packed weight whose tensors live as long as this; row_scales and row_sums of quads. The shape is that of x, in
// args that of its words.
struct Weight {
  Weight(const char* op, const Tensor& blocks, const Tensor& segments, const Tensor& indices, const Tensor& values,
         const std::optional<Tensor>& codebook, const ConvShape& of_x, std::int64_t channel_block,
         const std::optional<Tensor>& row_scales = std::nullopt, const std::optional<Tensor>& row_sums = std::nullopt)
      : channels(of_x.in_channels) {
    const bool words = values.dim() == 2;
    const bool quads = words && values.scalar_type() == ScalarType::Char;
    STD_TORCH_CHECK(!words || quads || values.scalar_type() == ScalarType::BFloat16, op,
                    ": words must be bfloat16 [n, 2] or int8 [n, 4], got ",
                    torch::headeronly::toString(values.scalar_type()), "; pass what sparse_conv2d_pack_words returned");
    STD_TORCH_CHECK(quads == row_scales.has_value() && quads == row_sums.has_value(), op,
                    ": row_scales and row_sums must come with int8 words and with nothing else, got ",
                    torch::headeronly::toString(values.scalar_type()), ", ", values.dim(),
                    "-D; pass what sparse_conv2d_pack_words returned");
    STD_TORCH_CHECK(!words || !codebook.has_value(), op, ": words must come without a codebook, got one; leave it out");
    const std::int64_t group = GroupOf(quads ? ConvMode::kInt8 : words ? ConvMode::kBFloat16 : ConvMode::kExact);
    const ConvShape shape = ConvWordShape(of_x, group);
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
    STD_TORCH_CHECK((words || values.dim() == 1) && values.numel() == indices.numel() * group, op, ": values must be [",
                    indices.numel(), words ? ", " : "", words ? std::to_string(group) : "", "], got ", values.dim(),
                    "-D with ", values.numel(), " elements; pass one for each index");
    tensors = {Contiguous(blocks), Contiguous(segments), Contiguous(indices), Contiguous(values)};
    args.blocks = tensors[0].const_data_ptr<std::int32_t>();
    args.segments = tensors[1].const_data_ptr<std::int32_t>();
    args.indices = static_cast<const std::uint16_t*>(tensors[2].const_data_ptr());
    args.values = tensors[3].const_data_ptr();
    args.segment_count = segments.numel();
    args.nnz = indices.numel();
    args.channel_block = channel_block;
    args.shape = shape;
    if (quads) {
      CheckInt8Size(op, of_x);
      CheckVector(op, *row_scales, "row_scales", ScalarType::Float);
      CheckVector(op, *row_sums, "row_sums", ScalarType::Int);
      STD_TORCH_CHECK(row_scales->numel() == shape.out_channels && row_sums->numel() == shape.out_channels, op,
                      ": row_scales and row_sums must be [", shape.out_channels, "], got ", row_scales->numel(),
                      " and ", row_sums->numel(), " elements; pass one for each filter");
      tensors.insert(tensors.end(), {Contiguous(*row_scales), Contiguous(*row_sums)});
      scales_of_rows = tensors[4].const_data_ptr<float>();
      sums_of_rows = tensors[5].const_data_ptr<std::int32_t>();
    }
    if (words) {
      args.stored_as = quads ? ConvValues::kInt8Quads : ConvValues::kBFloat16Pairs;
      return;
    }
    if (!codebook.has_value()) {
      args.stored_as =
          DtypeOf(op, values, "values", true) == FloatDtype::kFloat32 ? ConvValues::kFloat32 : ConvValues::kBFloat16;
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

  std::int64_t channels;
  std::vector<Tensor> tensors;
  ConvWeight args{};
  const float* scales_of_rows = nullptr;
  const std::int32_t* sums_of_rows = nullptr;
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
  args.row_scales = weight.scales_of_rows;
  args.row_sums = weight.sums_of_rows;
  if (s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && padding[0] == 0 && padding[1] == 0) {
    // Without neighbours an image is a line.
    args.width = args.out_width = height * width;
    args.height = args.out_height = 1;
  }
  // The stride between the columns of one column is of no use, and may be huge; the layout does not depend on it.
  if (args.out_width == 1) args.weight.shape.stride_w = 1;
  args.plan = ConvPlanFor(s, weight.args.nnz, args.pad_h, args.out_height, args.out_width, ConvLanes());
  const std::int64_t row_blocks = Blocks(s.out_channels, kConvRows);
  const std::int64_t tiles = args.plan.tiles_across * args.plan.tiles_down;
  const std::int64_t chunks = FilterChunks(images * tiles, row_blocks);
  const std::int64_t rows_of_chunk = Blocks(row_blocks, chunks);
  const std::int64_t bytes = stored_as == FloatDtype::kFloat32 ? 4 : 2;
  const ConvScratchSizes sizes = ConvScratch(args.weight, args.plan);
  constexpr std::int64_t kMostOfLine = std::int64_t{1} << 24;
  STD_TORCH_CHECK(sizes.line <= kMostOfLine, op, ": stride and dilation must be smaller for several columns of y, got ",
                  s.stride_w, " and ", s.dilation_w, "; pass those of the layer");
  const char* x_data = static_cast<const char*>(input.tensor.const_data_ptr());
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  const std::int64_t pixels = height * width, plane_floats = s.in_channels * pixels;
  const std::int64_t image_bytes = weight.channels * pixels * bytes;

  // Images that the kernel cannot read as they are, are converted shortly before, so many at a time that every thread
  // has one and few enough to come back from the last cache level.
  const ConvValues values_as = weight.args.stored_as;
  const bool pairs = values_as == ConvValues::kBFloat16Pairs, quads = values_as == ConvValues::kInt8Quads;
  const bool as_planes = stored_as == FloatDtype::kFloat32 && !channels_last && !pairs && !quads;
  std::vector<float> scales(quads ? images : 0), inverses(scales.size());
  if (quads) {
    const std::int64_t numbers = weight.channels * pixels;
    torch::stable::parallel_for(0, images, GrainItems(numbers / 8), [&](std::int64_t begin, std::int64_t end) {
      SampleScales({x_data, stored_as, numbers, scales.data(), inverses.data()}, begin, end);
    });
  }
  // Pixels [begin, end) of the planes of image n.
  const auto convert = [&](std::int64_t n, float* planes, std::int64_t begin, std::int64_t end) {
    const void* image = x_data + n * image_bytes;
    if (!pairs && !quads) {
      return ConvPlanes({image, stored_as, channels_last, s.in_channels, pixels, planes}, begin, end);
    }
    const WordPlanesArgs of_words{image,
                                  stored_as,
                                  channels_last,
                                  weight.channels,
                                  s.groups,
                                  pixels,
                                  reinterpret_cast<std::uint32_t*>(planes),
                                  quads ? inverses[n] : 0.0f,
                                  ConvQuadOffset()};
    (quads ? QuadPlanes : PairPlanes)(of_words, begin, end);
  };
  const auto threads = static_cast<std::int64_t>(torch::stable::get_num_threads());
  const std::int64_t wave = as_planes ? images : std::min(images, threads);
  const Aligned planes(as_planes ? 0 : wave * plane_floats);
  const std::int64_t work = weight.args.nnz / chunks * args.plan.tile_rows;
  for (std::int64_t first = 0; first < images; first += wave) {
    const std::int64_t count = std::min(wave, images - first);
    if (!as_planes) {
      ParallelRanges(count, pixels, GrainItems(weight.channels / 4),
                     [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                       convert(first + i, planes.data() + i * plane_floats, begin, end);
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
        if (quads) own.image_scale = scales[first + image];
        own.y = y_data + (first + image) * s.out_channels * out_height * out_width * bytes;
        Conv(own, task / chunks % tiles, row_begin, row_end);
      }
    });
  }
  return y;
}

// The positions of a weight in compressed sparse rows, valid and in memory of their own.
struct Rows {
  Rows(const char* op, const Tensor& row_offsets, const Tensor& col_indices, const ConvShape& shape)
      : offsets(shape.out_channels + 1), columns(col_indices.numel()) {
    const Tensor stored_offsets = Contiguous(row_offsets), stored_columns = Contiguous(col_indices);
    std::memcpy(offsets.data(), stored_offsets.const_data_ptr(), sizeof(std::int32_t) * offsets.size());
    if (!columns.empty()) {
      std::memcpy(columns.data(), stored_columns.const_data_ptr(), sizeof(std::int32_t) * columns.size());
    }
    const auto nnz = static_cast<std::int64_t>(columns.size());
    const std::int64_t rows = shape.out_channels;
    const std::int64_t width = shape.in_channels / shape.groups * shape.kernel_h * shape.kernel_w;
    bool rising = offsets[0] == 0 && offsets[rows] == nnz, inside = true, sorted = true;
    for (std::int64_t r = 0; r < rows; ++r) rising &= offsets[r] <= offsets[r + 1];
    STD_TORCH_CHECK(rising, op, ": row_offsets must rise from 0 to ", nnz, "; rebuild the weight");
    for (const std::int32_t column : columns) inside &= 0 <= column && column < width;
    STD_TORCH_CHECK(inside, op, ": col_indices must lie in [0, ", width,
                    "), got one outside; rebuild the weight or pass x with its number of channels");
    // A row with more non-zeros in a block than the block has weights would not fit its segment.
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t k = offsets[r] + 1; k < offsets[r + 1]; ++k) sorted &= columns[k - 1] < columns[k];
    }
    STD_TORCH_CHECK(sorted, op, ": col_indices must rise strictly within a row; rebuild the weight");
  }

  std::vector<std::int32_t> offsets, columns;
};

// blocks, segments, indices and sources. like: of the device and kind of tensor to make.
std::tuple<Tensor, Tensor, Tensor, Tensor> Pack(const char* op, const Tensor& like, const Rows& from,
                                                const ConvShape& shape, std::int64_t channel_block) {
  STD_TORCH_CHECK(1 <= channel_block && channel_block * shape.kernel_w * ConvSlots(shape).Count() <= kConvMaxIndex &&
                      channel_block * shape.kernel_h * shape.kernel_w < kConvMaxIndex,
                  op, ": channel_block must be one that 16 bits can number, got ", channel_block,
                  "; pass what sparse_conv2d_channel_block returns");
  const std::int64_t rows = shape.out_channels, nnz = static_cast<std::int64_t>(from.columns.size());
  const std::int64_t row_blocks = Blocks(rows, kConvRows), channel_blocks = Blocks(shape.in_channels, channel_block);
  const auto empty = [&](Ints size, ScalarType dtype) { return torch::stable::new_empty(like, size, dtype); };
  Tensor blocks = empty({channel_blocks * row_blocks + 1, 2}, ScalarType::Int);
  Tensor segments = empty({channel_blocks * rows}, ScalarType::Int);
  Tensor indices = empty({nnz}, ScalarType::Short), sources = empty({nnz}, ScalarType::Int);
  std::vector<std::int32_t> scratch(channel_blocks * rows + shape.kernel_h);
  std::int32_t* block = blocks.mutable_data_ptr<std::int32_t>();
  ConvPack({shape, from.offsets.data(), from.columns.data(), channel_block, block,
            segments.mutable_data_ptr<std::int32_t>(), static_cast<std::uint16_t*>(indices.mutable_data_ptr()),
            sources.mutable_data_ptr<std::int32_t>(), scratch.data()});
  const std::int64_t used = block[2 * channel_blocks * row_blocks];
  return {blocks, torch::stable::clone(torch::stable::narrow(segments, 0, 0, used)), indices, sources};
}

// A weight laid out in words: those of neighbouring channels at one tap that are not empty, filled with zeros.
struct Words {
  // values: float32, one for each column.
  Words(const char* op, const Tensor& like, Rows rows, const float* values, const ConvShape& of_x,
        std::int64_t channel_block, ConvMode mode) {
    const std::int64_t filters = of_x.out_channels, group = GroupOf(mode), item_bytes = 4 / group;
    const bool quads = mode == ConvMode::kInt8;
    if (quads) CheckInt8Size(op, of_x);
    Tensor scales = torch::stable::new_empty(like, {quads ? filters : 0}, ScalarType::Float);
    Tensor sums = torch::stable::new_empty(like, {quads ? filters : 0}, ScalarType::Int);
    std::vector<std::uint32_t> words;
    std::vector<std::int64_t> of_word;  // the non-zeros of one word of channels, by their taps
    const std::int64_t taps = of_x.kernel_h * of_x.kernel_w;
    for (std::int64_t r = 0, k = 0; r < filters; ++r) {
      const std::int64_t end = rows.offsets[r + 1];
      rows.offsets[r] = static_cast<std::int32_t>(words.size());
      const float inverse = quads ? Scale(op, values, k, end, scales.mutable_data_ptr<float>() + r) : 0.0f;
      std::int32_t sum = 0;
      while (k < end) {
        const std::int64_t word_of_channels = rows.columns[k] / taps / group;
        of_word.clear();
        for (; k < end && rows.columns[k] / taps / group == word_of_channels; ++k) of_word.push_back(k);
        std::sort(of_word.begin(), of_word.end(),
                  [&](std::int64_t a, std::int64_t b) { return rows.columns[a] % taps < rows.columns[b] % taps; });
        std::int64_t last = -1;
        for (const std::int64_t source : of_word) {
          const std::int64_t tap = rows.columns[source] % taps, place = rows.columns[source] / taps % group;
          if (tap != last) {
            columns_.push_back(static_cast<std::int32_t>(word_of_channels * taps + tap));
            words.push_back(0);
            last = tap;
          }
          const std::uint32_t number = quads ? Rounded(values[source] * inverse, sum) : BFloat16Bits(values[source]);
          words.back() |= number << (8 * item_bytes * place);
        }
      }
      if (quads) sums.mutable_data_ptr<std::int32_t>()[r] = sum;
    }
    rows.offsets[filters] = static_cast<std::int32_t>(words.size());
    rows.columns = std::move(columns_);
    Tensor sources;
    std::tie(blocks, segments, indices, sources) = Pack(op, like, rows, ConvWordShape(of_x, group), channel_block);
    const auto count = static_cast<std::int64_t>(words.size());
    values_of_words = torch::stable::new_empty(like, {count, group}, quads ? ScalarType::Char : ScalarType::BFloat16);
    auto* to = static_cast<std::uint32_t*>(values_of_words.mutable_data_ptr());
    const auto* source = sources.const_data_ptr<std::int32_t>();
    for (std::int64_t i = 0; i < count; ++i) to[i] = words[source[i]];
    row_scales = scales, row_sums = sums;
  }

  Tensor blocks, segments, indices, values_of_words, row_scales, row_sums;

 private:
  static float Scale(const char* op, const float* values, std::int64_t begin, std::int64_t end, float* scale) {
    float inverse = 0;
    SampleScales({values + begin, FloatDtype::kFloat32, end - begin, scale, &inverse}, 0, 1);
    STD_TORCH_CHECK(*scale == *scale, op,
                    ": values must be finite in mode \"int8\", got infinity or NaN; use another mode");
    return inverse;
  }

  static std::uint32_t Rounded(float value, std::int32_t& sum) {
    const auto number = static_cast<std::int32_t>(std::nearbyint(value));
    sum += number;
    return static_cast<std::uint8_t>(number);
  }

  std::vector<std::int32_t> columns_;
};

// Values that stand for themselves or for entries of a codebook, as float32.
std::vector<float> Numbers(const char* op, const Tensor& values, const std::optional<Tensor>& codebook) {
  std::vector<float> numbers(values.numel());
  if (!codebook.has_value()) {
    const Tensor floats = Contiguous(torch::stable::to(values, ScalarType::Float));
    if (!numbers.empty()) std::memcpy(numbers.data(), floats.const_data_ptr(), sizeof(float) * numbers.size());
    return numbers;
  }
  CheckEntries(op, *codebook);
  const Tensor codes = Contiguous(values), entries = Contiguous(*codebook);
  const auto* code = static_cast<const std::uint8_t*>(codes.const_data_ptr());
  for (std::size_t k = 0; k < numbers.size(); ++k) {
    STD_TORCH_CHECK(code[k] < entries.numel(), op, ": codes must lie in [0, ", entries.numel(),
                    "), got one outside; pass the codebook that the codes were made with");
    std::memcpy(&numbers[k], static_cast<const char*>(entries.const_data_ptr()) + sizeof(float) * code[k],
                sizeof(float));
  }
  return numbers;
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
  if (!codebook.has_value()) DtypeOf(op, values, "values", true);
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == col_indices.numel() &&
                      (!codebook.has_value() || values.scalar_type() == ScalarType::Byte),
                  op, ": values must be [", col_indices.numel(), "], uint8 codes beside a codebook, got ",
                  torch::headeronly::toString(values.scalar_type()), ", ", values.dim(), "-D with ", values.numel(),
                  " elements; pass one for each column index");
}

// ---- ops

std::int64_t ChannelBlock(std::int64_t in_channels, Ints kernel_size, Ints stride, Ints dilation, std::int64_t groups,
                          std::string mode) {
  constexpr const char* kOp = "sparse_conv2d_channel_block";
  const ConvShape shape = ShapeOf(kOp, in_channels, 0, kernel_size, stride, dilation, groups);
  return ConvChannelBlock(ConvWordShape(shape, GroupOf(ModeOf(kOp, mode))));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> PackOnCpu(const Tensor& row_offsets, const Tensor& col_indices,
                                                     std::int64_t in_channels, std::int64_t channel_block,
                                                     Ints kernel_size, Ints stride, Ints dilation,
                                                     std::int64_t groups) {
  constexpr const char* kOp = "sparse_conv2d_pack";
  CheckPositions(kOp, row_offsets, col_indices);
  const ConvShape shape = ShapeOf(kOp, in_channels, row_offsets.numel() - 1, kernel_size, stride, dilation, groups);
  return Pack(kOp, row_offsets, Rows(kOp, row_offsets, col_indices, shape), shape, channel_block);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> PackWordsOnCpu(
    const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values, std::int64_t in_channels,
    std::int64_t channel_block, Ints kernel_size, Ints stride, Ints dilation, std::int64_t groups, std::string mode) {
  constexpr const char* kOp = "sparse_conv2d_pack_words";
  CheckPositions(kOp, row_offsets, col_indices);
  CheckNumbers(kOp, col_indices, values, std::nullopt);
  const ConvMode words = ModeOf(kOp, mode);
  STD_TORCH_CHECK(words != ConvMode::kExact, kOp,
                  ": mode must be \"bfloat16\" or \"int8\", got \"exact\"; call sparse_conv2d_pack");
  const ConvShape shape = ShapeOf(kOp, in_channels, row_offsets.numel() - 1, kernel_size, stride, dilation, groups);
  const Words w(kOp, row_offsets, Rows(kOp, row_offsets, col_indices, shape), Numbers(kOp, values, std::nullopt).data(),
                shape, channel_block, words);
  return {w.blocks, w.segments, w.indices, w.values_of_words, w.row_scales, w.row_sums};
}

Tensor PackedOnCpu(const Tensor& x, const Tensor& blocks, const Tensor& segments, const Tensor& indices,
                   const Tensor& values, const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook,
                   std::int64_t out_channels, std::int64_t channel_block, Ints kernel_size, Ints stride, Ints padding,
                   Ints dilation, std::int64_t groups, bool relu, const std::optional<Tensor>& row_scales,
                   const std::optional<Tensor>& row_sums) {
  constexpr const char* kOp = "sparse_conv2d_packed";
  CheckImages(kOp, x);
  const ConvShape shape = ShapeOf(kOp, x.size(1), out_channels, kernel_size, stride, dilation, groups);
  const Weight weight(kOp, blocks, segments, indices, values, codebook, shape, channel_block, row_scales, row_sums);
  return Convolve(kOp, x, weight, bias, padding, relu);
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
                 Ints stride, Ints padding, Ints dilation, std::int64_t groups, bool relu, std::string mode) {
  constexpr const char* kOp = "sparse_conv2d";
  CheckImages(kOp, x);
  CheckPositions(kOp, row_offsets, col_indices);
  const ConvShape shape = ShapeOf(kOp, x.size(1), row_offsets.numel() - 1, kernel_size, stride, dilation, groups);
  CheckNumbers(kOp, col_indices, values, codebook);
  Rows rows(kOp, row_offsets, col_indices, shape);
  if (const ConvMode words = ModeOf(kOp, mode); words != ConvMode::kExact) {
    const std::int64_t channel_block = ConvChannelBlock(ConvWordShape(shape, GroupOf(words)));
    const Words w(kOp, row_offsets, std::move(rows), Numbers(kOp, values, codebook).data(), shape, channel_block,
                  words);
    const bool quads = words == ConvMode::kInt8;
    return Convolve(
        kOp, x,
        Weight(kOp, w.blocks, w.segments, w.indices, w.values_of_words, std::nullopt, shape, channel_block,
               quads ? std::optional(w.row_scales) : std::nullopt, quads ? std::optional(w.row_sums) : std::nullopt),
        bias, padding, relu);
  }
  const std::int64_t channel_block = ConvChannelBlock(shape);
  const auto [blocks, segments, indices, sources] = Pack(kOp, row_offsets, rows, shape, channel_block);
  return Convolve(kOp, x,
                  Weight(kOp, blocks, segments, indices, Gathered(values, sources), codebook, shape, channel_block),
                  bias, padding, relu);
}

#ifdef TERSETORCH_CUDA

Tensor ConvOnCuda(const Tensor& x, const Tensor& row_offsets, const Tensor& col_indices, const Tensor& values,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& codebook, Ints kernel_size,
                  Ints stride, Ints padding, Ints dilation, std::int64_t groups, bool relu, std::string mode) {
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
  args.mode = ModeOf(kOp, mode);
  std::optional<Tensor> scales;
  if (args.mode == ConvMode::kInt8) {
    CheckInt8Size(kOp, shape);
    scales = torch::stable::new_empty(x, {2 * (images.count + filters)}, ScalarType::Float);
    args.scales = static_cast<ConvScale*>(scales->mutable_data_ptr());
  }
  args.plan = ConvPlanCuda(args);
  const Tensor scratch = torch::stable::new_empty(x, {ConvScratchBytes(args) / 4}, ScalarType::Float);
  args.scratch = scratch.mutable_data_ptr();
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
  m.impl("sparse_conv2d_pack_words", TORCH_BOX(&PackWordsOnCpu));
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
