// tersetorch::blocked_matmul, its int8 and bfloat16 modes and the packing of their weights: checks, allocates, splits
// the work, calls the kernels.
#include "kernels/blocked_matmul/blocked_matmul.h"

#include <torch/csrc/stable/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/panels/panels.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

void CheckVector(const char* op, const Tensor& t, const char* name, ScalarType dtype, Place place = kCpu) {
  CheckOn(place, op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " and 1-D, got ", torch::headeronly::toString(t.scalar_type()),
                  " and ", t.dim(), "-D; convert it");
}

void CheckDtype(const char* op, const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()), "; convert it");
}

// So that no sum of products of two int8 leaves int32.
void CheckInt8Columns(const char* op, std::int64_t columns) {
  constexpr std::int64_t kMaxColumns = 128 * 1024;
  STD_TORCH_CHECK(columns <= kMaxColumns, op, ": x must have at most ", kMaxColumns, " features, got ", columns,
                  "; split the layer by columns");
}

// group: consecutive columns that a value holds.
void CheckColumnBlock(const char* op, std::int64_t column_block, std::int64_t group) {
  STD_TORCH_CHECK(1 <= column_block && column_block <= kBlockedMaxColumnBlock && column_block % group == 0, op,
                  ": column_block must be 1 to ", kBlockedMaxColumnBlock, " and a multiple of ", group, ", got ",
                  column_block, "; pass the one the weight was packed with");
}

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, Place place, const Tensor& block_offsets, const Tensor& segments, const Tensor& indices,
         const Tensor& values, std::int64_t rows, std::int64_t features, std::int64_t column_block,
         std::int64_t group = 1)
      : place(place) {
    CheckColumnBlock(op, column_block, group);
    CheckVector(op, block_offsets, "block_offsets", ScalarType::Int, place);
    CheckVector(op, segments, "segments", ScalarType::Int, place);
    CheckVector(op, indices, "indices", ScalarType::Short, place);
    CheckOn(place, op, values, "values");
    const std::int64_t column_blocks = Blocks(features, column_block);
    STD_TORCH_CHECK(rows >= 0 && segments.numel() == rows * column_blocks, op, ": segments must be [",
                    rows * column_blocks, "], one for each of ", rows, " rows in ", column_blocks,
                    " column blocks, got ", segments.numel(), "; pass the weight that x's features fit");
    STD_TORCH_CHECK(block_offsets.numel() == Blocks(rows, kBlockedRows) * column_blocks + 1, op,
                    ": block_offsets must be [", Blocks(rows, kBlockedRows) * column_blocks + 1, "], got ",
                    block_offsets.numel(), "; pack the weight again");
    const bool grouped = group > 1;
    STD_TORCH_CHECK(values.dim() == (grouped ? 2 : 1) && values.numel() == indices.numel() * group, op,
                    ": values must be [", indices.numel(), grouped ? ", " : "", grouped ? std::to_string(group) : "",
                    "], got ", values.dim(), "-D with ", values.numel(), " elements; pass one for each index");
    tensors.reserve(6);
    for (const Tensor* t : {&block_offsets, &segments, &indices}) tensors.push_back(Usable(place, *t));
    tensors.push_back(Usable(place, values, group));
    args.block_offsets = tensors[0].const_data_ptr<std::int32_t>();
    args.segments = tensors[1].const_data_ptr<std::int32_t>();
    args.indices = static_cast<const std::uint16_t*>(tensors[2].const_data_ptr());
    args.values = tensors[3].const_data_ptr();
    args.rows = rows;
    args.columns = Blocks(features, group);
    args.nnz = indices.numel();
    args.column_block = column_block / group;
  }

  // Values that stand for themselves, or codes.
  void SetStored(const char* op, const Tensor& values, const std::optional<Tensor>& codebook) {
    if (!codebook.has_value()) {
      args.stored_as =
          DtypeOf(op, values, "values") == FloatDtype::kFloat32 ? BlockedValues::kFloat32 : BlockedValues::kBFloat16;
      return;
    }
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Byte, op,
                    ": values must be uint8 codes beside a codebook, got ",
                    torch::headeronly::toString(values.scalar_type()), "; pass codes, or no codebook");
    CheckCodebook(op, *codebook, kBlockedMaxEntries, place);
    tensors.push_back(Usable(place, *codebook));
    args.stored_as = BlockedValues::kCodes;
    args.codebook = tensors[4].const_data_ptr<float>();
    args.entries = codebook->numel();
  }

  Place place;
  std::vector<Tensor> tensors;
  BlockedWeight args{};
};

// The arguments of the product with float32 sums, checked.
struct MatmulInputs {
  MatmulInputs(const char* op, Place place, const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
               const Tensor& indices, const Tensor& values, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& codebook, std::int64_t out_features, std::int64_t column_block)
      : samples(op, x, "x", place),
        weight(op, place, block_offsets, segments, indices, values, out_features, samples.features, column_block),
        bias(op, bias, out_features, place) {
    weight.SetStored(op, values, codebook);
  }

  Samples samples;
  Weight weight;
  Bias bias;
};

// Those of its bfloat16 mode.
struct BFloat16Inputs {
  BFloat16Inputs(const char* op, Place place, const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
                 const Tensor& indices, const Tensor& values, const std::optional<Tensor>& bias,
                 std::int64_t out_features, std::int64_t column_block)
      : samples(op, x, "x", place),
        weight(op, place, block_offsets, segments, indices, values, out_features, samples.features, column_block, 2),
        bias(op, bias, out_features, place) {
    CheckDtype(op, values, "values", ScalarType::BFloat16);
    weight.args.stored_as = BlockedValues::kBFloat16Pairs;
  }

  Samples samples;
  Weight weight;
  Bias bias;
};

// Those of its int8 mode.
struct Int8Inputs {
  Int8Inputs(const char* op, Place place, const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
             const Tensor& indices, const Tensor& values, const Tensor& row_scales, const Tensor& row_sums,
             const std::optional<Tensor>& bias, std::int64_t out_features, std::int64_t column_block)
      : samples(op, x, "x", place),
        weight(op, place, block_offsets, segments, indices, values, out_features, samples.features, column_block, 4),
        bias(op, bias, out_features, place) {
    CheckInt8Columns(op, samples.features);
    CheckDtype(op, values, "values", ScalarType::Char);
    weight.args.stored_as = BlockedValues::kInt8Quads;
    CheckVector(op, row_scales, "row_scales", ScalarType::Float, place);
    CheckVector(op, row_sums, "row_sums", ScalarType::Int, place);
    STD_TORCH_CHECK(row_scales.numel() == out_features && row_sums.numel() == out_features, op,
                    ": row_scales and row_sums must be [", out_features, "], got ", row_scales.numel(), " and ",
                    row_sums.numel(), " elements; pass one for each row");
    for (const Tensor* t : {&row_scales, &row_sums}) weight.tensors.push_back(Usable(place, *t));
    scales = weight.tensors[4].const_data_ptr<float>();
    sums = weight.tensors[5].const_data_ptr<std::int32_t>();
  }

  Samples samples;
  Weight weight;
  Bias bias;
  const float* scales = nullptr;       // of the rows
  const std::int32_t* sums = nullptr;  // likewise
};

struct Panel {
  std::int64_t begin, samples, width;
};

// Cuts samples into panels, as wide as a block's part of one stays in the first cache level.
std::vector<Panel> PanelsOf(std::int64_t samples, std::int64_t column_block) {
  // Measured on 32 and 48 KiB of first-level data cache: beyond this a narrower panel is faster, although it decodes a
  // weight more often.
  static const std::int64_t tile_bytes = std::max<std::int64_t>(40 * 1024, sysconf(_SC_LEVEL1_DCACHE_SIZE));
  std::int64_t widest = kBlockedMaxWidth;
  while (widest > 8 && widest * column_block * std::int64_t{sizeof(float)} > tile_bytes) widest /= 2;
  std::vector<Panel> panels;
  for (std::int64_t begin = 0; begin < samples;) {
    const std::int64_t left = samples - begin;
    std::int64_t width = 8;
    while (width < left && width < widest) width *= 2;
    // A panel more than a quarter empty costs more than a narrower one beside it.
    if (width > 16 && left <= width / 4 * 3) width /= 2;
    panels.push_back({begin, std::min(left, width), width});
    begin += width;
  }
  return panels;
}

class SharedStatus {
 public:
  void Report(BlockedStatus status) {
    if (status != BlockedStatus::kOk) status_.store(status, std::memory_order_relaxed);
  }

  void Raise(const char* op, const BlockedWeight& w) const {
    switch (status_.load(std::memory_order_relaxed)) {
      case BlockedStatus::kOk:
        return;
      case BlockedStatus::kBadOffsets:
        STD_TORCH_CHECK(false, op, ": block_offsets must never fall and stay in [0, ", w.nnz,
                        "], got a block that breaks this; pack the weight again");
      case BlockedStatus::kBadSegment:
        STD_TORCH_CHECK(false, op,
                        ": segments must name rows of their block and count all its non-zeros, got a block that "
                        "breaks this; pack the weight again");
      case BlockedStatus::kBadIndex:
        STD_TORCH_CHECK(false, op, ": indices must lie in [0, ", w.column_block,
                        ") and inside x's features, got one outside; pack the weight again");
      case BlockedStatus::kBadCode:
        STD_TORCH_CHECK(false, op, ": codes must lie in [0, ", w.entries,
                        "), got one outside; pass the codebook that the codes were made with");
    }
  }

 private:
  std::atomic<BlockedStatus> status_{BlockedStatus::kOk};
};

// y of samples whose panels pack(panel, memory, begin, end) fills, columns [begin, end) at a time; memory is of 4-byte
// numbers. scales: of the samples, with kBlockedMaxWidth more behind them, or null.
template <typename Pack>
Tensor Multiply(const char* op, const Samples& samples, BlockedMatmulArgs args, const Pack& pack,
                const float* sample_scales = nullptr) {
  // Packed at the same time: enough for the threads, and few enough to come back from the last cache level.
  constexpr std::int64_t kWave = 8;
  const BlockedWeight& weight = args.weight;
  const Tensor y = EmptyWithLastDim(samples.tensor, weight.rows);
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  args.y_stored_as = samples.stored_as;

  const std::vector<Panel> panels = PanelsOf(samples.count, weight.column_block);
  const auto panel_count = static_cast<std::int64_t>(panels.size());
  const std::int64_t row_blocks = Blocks(weight.rows, kBlockedRows);
  if (panel_count == 0 || row_blocks == 0) return y;
  const std::int64_t stride = panels[0].width * weight.columns;
  Scratch memory(std::min(kWave, panel_count) * stride * std::int64_t{sizeof(float)});
  float* panel_data = memory.Data<float>();
  const std::int64_t work = weight.nnz / row_blocks * std::max<std::int64_t>(1, panels[0].width / 8);
  SharedStatus status;
  for (std::int64_t first = 0; first < panel_count; first += kWave) {
    const std::int64_t count = std::min(kWave, panel_count - first);
    ParallelRanges(count, weight.columns, GrainItems(panels[0].width / 4),
                   [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                     pack(panels[first + i], panel_data + i * stride, begin, end);
                   });
    // All row blocks of a panel one after the other: it stays in the second cache level, where its rows are read at
    // random, while the weight is read in order.
    ParallelFor(row_blocks * count, GrainItems(work), [&](std::int64_t begin, std::int64_t end) {
      alignas(64) float sums[kBlockedRows * kBlockedMaxWidth];
      BlockedMatmulArgs own = args;
      own.sums = sums;
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t i = task / row_blocks;
        const Panel& panel = panels[first + i];
        own.panel = panel_data + i * stride;
        own.width = panel.width;
        own.samples = panel.samples;
        own.y = y_data + panel.begin * weight.rows * samples.item_bytes;
        own.sample_scales = sample_scales == nullptr ? nullptr : sample_scales + panel.begin;
        status.Report(BlockedMatmul(own, task % row_blocks));
      }
    });
  }
  status.Raise(op, weight);
  return y;
}

Tensor BlockedMatmulOnCpu(const Tensor& x, const Tensor& block_offsets, const Tensor& segments, const Tensor& indices,
                          const Tensor& values, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& codebook, std::int64_t out_features, std::int64_t column_block,
                          bool relu) {
  constexpr const char* kOp = "blocked_matmul";
  const MatmulInputs inputs(kOp, kCpu, x, block_offsets, segments, indices, values, bias, codebook, out_features,
                            column_block);
  const Samples& samples = inputs.samples;
  BlockedMatmulArgs args{};
  args.weight = inputs.weight.args;
  args.bias = inputs.bias.data;
  args.relu = relu;
  return Multiply(kOp, samples, args, [&](const Panel& panel, float* memory, std::int64_t begin, std::int64_t end) {
    PackPanel({samples.At(panel.begin), samples.stored_as, panel.samples, samples.features, memory, panel.width}, begin,
              end);
  });
}

Tensor BlockedBFloat16MatmulOnCpu(const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
                                  const Tensor& indices, const Tensor& values, const std::optional<Tensor>& bias,
                                  std::int64_t out_features, std::int64_t column_block, bool relu) {
  constexpr const char* kOp = "blocked_bfloat16_matmul";
  const BFloat16Inputs inputs(kOp, kCpu, x, block_offsets, segments, indices, values, bias, out_features, column_block);
  const Samples& samples = inputs.samples;
  BlockedMatmulArgs args{};
  args.weight = inputs.weight.args;
  args.bias = inputs.bias.data;
  args.relu = relu;
  return Multiply(kOp, samples, args, [&](const Panel& panel, float* memory, std::int64_t begin, std::int64_t end) {
    PackPairPanel({samples.At(panel.begin), samples.stored_as, panel.samples, samples.features,
                   reinterpret_cast<std::uint32_t*>(memory), panel.width, nullptr, 0},
                  begin, end);
  });
}

Tensor BlockedInt8MatmulOnCpu(const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
                              const Tensor& indices, const Tensor& values, const Tensor& row_scales,
                              const Tensor& row_sums, const std::optional<Tensor>& bias, std::int64_t out_features,
                              std::int64_t column_block, bool relu) {
  constexpr const char* kOp = "blocked_int8_matmul";
  const Int8Inputs inputs(kOp, kCpu, x, block_offsets, segments, indices, values, row_scales, row_sums, bias,
                          out_features, column_block);
  const Samples& samples = inputs.samples;
  Scratch scales((samples.count + kBlockedMaxWidth + samples.count) * std::int64_t{sizeof(float)});
  float* scale = scales.Data<float>();
  float* inverse = scale + samples.count + kBlockedMaxWidth;
  std::fill(scale + samples.count, inverse, 0.0f);
  ParallelFor(samples.count, GrainItems(samples.features / 8), [&](std::int64_t begin, std::int64_t end) {
    SampleScales({samples.At(0), samples.stored_as, samples.features, scale, inverse}, begin, end);
  });
  BlockedMatmulArgs args{};
  args.weight = inputs.weight.args;
  args.bias = inputs.bias.data;
  args.relu = relu;
  args.row_scales = inputs.scales;
  args.row_sums = inputs.sums;
  return Multiply(
      kOp, samples, args,
      [&](const Panel& panel, float* memory, std::int64_t begin, std::int64_t end) {
        PackQuadPanel(
            {samples.At(panel.begin), samples.stored_as, panel.samples, samples.features,
             reinterpret_cast<std::uint32_t*>(memory), panel.width, inverse + panel.begin, BlockedQuadOffset()},
            begin, end);
      },
      scale);
}

// ---- packing

// Compressed sparse rows in memory of their own, valid.
struct Rows {
  Rows(const char* op, const Tensor& row_offsets, const Tensor& col_indices, std::int64_t columns) : columns(columns) {
    CheckVector(op, row_offsets, "row_offsets", ScalarType::Int);
    CheckVector(op, col_indices, "col_indices", ScalarType::Int);
    STD_TORCH_CHECK(row_offsets.numel() >= 1 && columns >= 0, op,
                    ": row_offsets must have one entry more than rows, got ", row_offsets.numel(), "; pass [0]");
    const std::int64_t rows = row_offsets.numel() - 1, nnz = col_indices.numel();
    offsets.resize(rows + 1);
    indices.resize(nnz);
    const Tensor stored_offsets = Contiguous(row_offsets), stored_indices = Contiguous(col_indices);
    std::memcpy(offsets.data(), stored_offsets.const_data_ptr(), sizeof(std::int32_t) * (rows + 1));
    if (nnz != 0) std::memcpy(indices.data(), stored_indices.const_data_ptr(), sizeof(std::int32_t) * nnz);
    bool rising = offsets[0] == 0 && offsets[rows] == nnz, inside = true, sorted = true;
    for (std::int64_t r = 0; r < rows; ++r) rising &= offsets[r] <= offsets[r + 1];
    STD_TORCH_CHECK(rising, op, ": row_offsets must rise from 0 to ", nnz, "; rebuild the weight");
    for (const std::int32_t column : indices) inside &= 0 <= column && column < columns;
    STD_TORCH_CHECK(inside, op, ": col_indices must lie in [0, ", columns, "), got one outside; rebuild the weight");
    // A row with more non-zeros in a block than the block has columns would not fit its segment.
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t k = offsets[r] + 1; k < offsets[r + 1]; ++k) sorted &= indices[k - 1] < indices[k];
    }
    STD_TORCH_CHECK(sorted, op, ": col_indices must rise strictly within a row; rebuild the weight");
  }

  std::int64_t Count() const { return static_cast<std::int64_t>(offsets.size()) - 1; }

  std::vector<std::int32_t> offsets, indices;
  std::int64_t columns;
};

// block_offsets, segments, indices and sources. like: of the device and kind of tensor to make.
std::tuple<Tensor, Tensor, Tensor, Tensor> Pack(const Tensor& like, const Rows& rows, std::int64_t column_block) {
  const std::int64_t count = rows.Count(), nnz = static_cast<std::int64_t>(rows.indices.size());
  const std::int64_t row_blocks = Blocks(count, kBlockedRows), column_blocks = Blocks(rows.columns, column_block);
  const auto empty = [&](std::int64_t size, ScalarType dtype) { return torch::stable::new_empty(like, {size}, dtype); };
  Tensor block_offsets = empty(row_blocks * column_blocks + 1, ScalarType::Int);
  Tensor segments = empty(count * column_blocks, ScalarType::Int);
  Tensor indices = empty(nnz, ScalarType::Short), sources = empty(nnz, ScalarType::Int);
  BlockedPackArgs args{rows.offsets.data(),
                       rows.indices.data(),
                       count,
                       rows.columns,
                       column_block,
                       block_offsets.mutable_data_ptr<std::int32_t>(),
                       segments.mutable_data_ptr<std::int32_t>(),
                       static_cast<std::uint16_t*>(indices.mutable_data_ptr()),
                       sources.mutable_data_ptr<std::int32_t>(),
                       nullptr};
  args.block_offsets[row_blocks * column_blocks] = static_cast<std::int32_t>(nnz);
  ParallelFor(row_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> scratch((kBlockedRows + 1) * column_blocks + column_block + 1);
    BlockedPackArgs own = args;
    own.scratch = scratch.data();
    for (std::int64_t block = begin; block < end; ++block) BlockedPack(own, block);
  });
  return {block_offsets, segments, indices, sources};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> BlockedPackOnCpu(const Tensor& row_offsets, const Tensor& col_indices,
                                                            std::int64_t columns, std::int64_t column_block) {
  constexpr const char* kOp = "blocked_pack";
  CheckColumnBlock(kOp, column_block, 1);
  return Pack(row_offsets, Rows(kOp, row_offsets, col_indices, columns), column_block);
}

// block_offsets, segments, indices and values [n, group]: those of each group of consecutive columns that is not empty,
// filled with zeros. T: of the size of an element.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> PackGroups(const char* op, const Tensor& row_offsets,
                                                      const Tensor& col_indices, const Tensor& values, ScalarType dtype,
                                                      std::int64_t columns, std::int64_t column_block) {
  constexpr std::int64_t kGroup = 4 / sizeof(T);
  struct Word {
    T of_column[kGroup] = {};
  };
  CheckColumnBlock(op, column_block, kGroup);
  CheckVector(op, values, "values", dtype);
  Rows rows(op, row_offsets, col_indices, columns);
  STD_TORCH_CHECK(values.numel() == col_indices.numel(), op, ": values must be [", col_indices.numel(), "], got ",
                  values.numel(), " elements; pass one for each column index");
  const Tensor contiguous = Contiguous(values);
  const auto* stored = static_cast<const char*>(contiguous.const_data_ptr());
  std::vector<Word> words;
  std::int64_t groups = 0;
  for (std::int64_t r = 0, k = 0; r < rows.Count(); ++r) {
    std::int32_t last = -1;
    const std::int64_t end = rows.offsets[r + 1];
    rows.offsets[r] = static_cast<std::int32_t>(groups);
    for (; k < end; ++k) {
      const std::int32_t column = rows.indices[k], of = column / static_cast<std::int32_t>(kGroup);
      if (last < 0 || of != last / static_cast<std::int32_t>(kGroup)) {
        rows.indices[groups++] = of;  // never ahead of k
        words.emplace_back();
      }
      last = column;
      std::memcpy(&words.back().of_column[column % kGroup], stored + k * sizeof(T), sizeof(T));
    }
  }
  rows.offsets.back() = static_cast<std::int32_t>(groups);
  rows.indices.resize(groups);
  rows.columns = Blocks(columns, kGroup);
  auto [block_offsets, segments, indices, sources] = Pack(row_offsets, rows, column_block / kGroup);
  Tensor packed = torch::stable::new_empty(row_offsets, {groups, kGroup}, dtype);
  auto* to = static_cast<Word*>(packed.mutable_data_ptr());
  const std::int32_t* source = sources.const_data_ptr<std::int32_t>();
  for (std::int64_t k = 0; k < groups; ++k) to[k] = words[source[k]];
  return {block_offsets, segments, indices, packed};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> BlockedBFloat16PackOnCpu(const Tensor& row_offsets,
                                                                    const Tensor& col_indices, const Tensor& values,
                                                                    std::int64_t columns, std::int64_t column_block) {
  return PackGroups<std::uint16_t>("blocked_bfloat16_pack", row_offsets, col_indices, values, ScalarType::BFloat16,
                                   columns, column_block);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> BlockedInt8PackOnCpu(const Tensor& row_offsets,
                                                                        const Tensor& col_indices, const Tensor& values,
                                                                        std::int64_t columns,
                                                                        std::int64_t column_block) {
  constexpr const char* kOp = "blocked_int8_pack";
  CheckInt8Columns(kOp, columns);
  auto [block_offsets, segments, indices, packed] =
      PackGroups<std::int8_t>(kOp, row_offsets, col_indices, values, ScalarType::Char, columns, column_block);
  const Rows rows(kOp, row_offsets, col_indices, columns);
  Tensor row_sums = torch::stable::new_empty(row_offsets, {rows.Count()}, ScalarType::Int);
  const Tensor contiguous = Contiguous(values);
  const auto* value = static_cast<const std::int8_t*>(contiguous.const_data_ptr());
  auto* sums = row_sums.mutable_data_ptr<std::int32_t>();
  for (std::int64_t r = 0; r < rows.Count(); ++r) {
    sums[r] = std::accumulate(value + rows.offsets[r], value + rows.offsets[r + 1], std::int32_t{0});
  }
  return {block_offsets, segments, indices, packed, row_sums};
}

#ifdef TERSETORCH_CUDA

// Memory for x in panels of 8 samples.
Tensor Panels(const Tensor& x, std::int64_t samples, std::int64_t columns, std::int64_t item_bytes) {
  return torch::stable::new_empty(x, {(samples + 7) / 8 * 8 * columns * item_bytes}, ScalarType::Byte);
}

Tensor BlockedMatmulOnCuda(const Tensor& x, const Tensor& block_offsets, const Tensor& segments, const Tensor& indices,
                           const Tensor& values, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& codebook, std::int64_t out_features, std::int64_t column_block,
                           bool relu) {
  constexpr const char* kOp = "blocked_matmul";
  const CudaCall call(kOp, x, "x");
  const MatmulInputs inputs(kOp, call.place(), x, block_offsets, segments, indices, values, bias, codebook,
                            out_features, column_block);
  const Samples& samples = inputs.samples;
  const Tensor y = EmptyWithLastDim(x, out_features);
  const Tensor panels = Panels(x, samples.count, samples.features, samples.item_bytes);
  call.Check(BlockedMatmulCuda({inputs.weight.args, samples.At(0), samples.stored_as, inputs.bias.data, relu,
                                y.mutable_data_ptr(), samples.count, nullptr, nullptr, panels.mutable_data_ptr()},
                               call.Stream()));
  return y;
}

Tensor BlockedBFloat16MatmulOnCuda(const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
                                   const Tensor& indices, const Tensor& values, const std::optional<Tensor>& bias,
                                   std::int64_t out_features, std::int64_t column_block, bool relu) {
  constexpr const char* kOp = "blocked_bfloat16_matmul";
  const CudaCall call(kOp, x, "x");
  const BFloat16Inputs inputs(kOp, call.place(), x, block_offsets, segments, indices, values, bias, out_features,
                              column_block);
  const Samples& samples = inputs.samples;
  const BlockedWeight& weight = inputs.weight.args;
  const Tensor y = EmptyWithLastDim(x, out_features);
  const Tensor words = torch::stable::new_empty(x, {samples.count, weight.columns}, ScalarType::Int);
  const Tensor panels = Panels(x, samples.count, weight.columns, 4);
  auto* rounded = static_cast<std::uint32_t*>(words.mutable_data_ptr());
  call.Check(BlockedPairsCuda({samples.At(0), samples.stored_as, samples.count, samples.features, rounded, nullptr},
                              call.Stream()));
  call.Check(BlockedMatmulCuda({weight, rounded, samples.stored_as, inputs.bias.data, relu, y.mutable_data_ptr(),
                                samples.count, nullptr, nullptr, panels.mutable_data_ptr()},
                               call.Stream()));
  return y;
}

Tensor BlockedInt8MatmulOnCuda(const Tensor& x, const Tensor& block_offsets, const Tensor& segments,
                               const Tensor& indices, const Tensor& values, const Tensor& row_scales,
                               const Tensor& row_sums, const std::optional<Tensor>& bias, std::int64_t out_features,
                               std::int64_t column_block, bool relu) {
  constexpr const char* kOp = "blocked_int8_matmul";
  const CudaCall call(kOp, x, "x");
  const Int8Inputs inputs(kOp, call.place(), x, block_offsets, segments, indices, values, row_scales, row_sums, bias,
                          out_features, column_block);
  const Samples& samples = inputs.samples;
  const BlockedWeight& weight = inputs.weight.args;
  const Tensor y = EmptyWithLastDim(x, out_features);
  const Tensor words = torch::stable::new_empty(x, {samples.count, weight.columns}, ScalarType::Int);
  const Tensor scales = torch::stable::new_empty(x, {samples.count}, ScalarType::Float);
  const Tensor panels = Panels(x, samples.count, weight.columns, 4);
  auto* rounded = static_cast<std::uint32_t*>(words.mutable_data_ptr());
  auto* scale = scales.mutable_data_ptr<float>();
  call.Check(BlockedQuadsCuda({samples.At(0), samples.stored_as, samples.count, samples.features, rounded, scale},
                              call.Stream()));
  call.Check(BlockedMatmulCuda({weight, rounded, samples.stored_as, inputs.bias.data, relu, y.mutable_data_ptr(),
                                samples.count, scale, inputs.scales, panels.mutable_data_ptr()},
                               call.Stream()));
  return y;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("blocked_matmul", TORCH_BOX(&BlockedMatmulOnCpu));
  m.impl("blocked_matmul_inference", TORCH_BOX(&BlockedMatmulOnCpu));
  m.impl("blocked_pack", TORCH_BOX(&BlockedPackOnCpu));
  m.impl("blocked_bfloat16_matmul", TORCH_BOX(&BlockedBFloat16MatmulOnCpu));
  m.impl("blocked_bfloat16_matmul_inference", TORCH_BOX(&BlockedBFloat16MatmulOnCpu));
  m.impl("blocked_bfloat16_pack", TORCH_BOX(&BlockedBFloat16PackOnCpu));
  m.impl("blocked_int8_matmul", TORCH_BOX(&BlockedInt8MatmulOnCpu));
  m.impl("blocked_int8_matmul_inference", TORCH_BOX(&BlockedInt8MatmulOnCpu));
  m.impl("blocked_int8_pack", TORCH_BOX(&BlockedInt8PackOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("blocked_matmul", TORCH_BOX(&BlockedMatmulOnCuda));
  m.impl("blocked_matmul_inference", TORCH_BOX(&BlockedMatmulOnCuda));
  m.impl("blocked_bfloat16_matmul", TORCH_BOX(&BlockedBFloat16MatmulOnCuda));
  m.impl("blocked_bfloat16_matmul_inference", TORCH_BOX(&BlockedBFloat16MatmulOnCuda));
  m.impl("blocked_int8_matmul", TORCH_BOX(&BlockedInt8MatmulOnCuda));
  m.impl("blocked_int8_matmul_inference", TORCH_BOX(&BlockedInt8MatmulOnCuda));
#else
  for (const char* op : {"blocked_matmul", "blocked_matmul_inference", "blocked_bfloat16_matmul",
                         "blocked_bfloat16_matmul_inference", "blocked_int8_matmul", "blocked_int8_matmul_inference"}) {
    m.impl(op, &NotBuiltForCuda);
  }
#endif
}

}  // namespace tersetorch
