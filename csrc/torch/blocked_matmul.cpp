// tersetorch::blocked_matmul and the packing of its weight: checks, allocates, splits the work, calls the kernels.
#include "kernels/blocked_matmul/blocked_matmul.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/panels/panels.h"
#include "torch/common.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

void CheckVector(const char* op, const Tensor& t, const char* name, ScalarType dtype) {
  CheckOnCpu(op, t, name);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 1, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), " and 1-D, got ", torch::headeronly::toString(t.scalar_type()),
                  " and ", t.dim(), "-D; convert it");
}

std::int64_t Blocks(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

void CheckColumnBlock(const char* op, std::int64_t column_block) {
  STD_TORCH_CHECK(1 <= column_block && column_block <= kBlockedMaxColumnBlock, op, ": column_block must be 1 to ",
                  kBlockedMaxColumnBlock, ", got ", column_block, "; pass the one the weight was packed with");
}

// A weight whose tensors live as long as this.
struct Weight {
  Weight(const char* op, const Tensor& block_offsets, const Tensor& segments, const Tensor& indices,
         const Tensor& values, const std::optional<Tensor>& codebook, std::int64_t rows, std::int64_t columns,
         std::int64_t column_block) {
    CheckColumnBlock(op, column_block);
    CheckVector(op, block_offsets, "block_offsets", ScalarType::Int);
    CheckVector(op, segments, "segments", ScalarType::Int);
    CheckVector(op, indices, "indices", ScalarType::Short);
    CheckOnCpu(op, values, "values");
    const std::int64_t column_blocks = Blocks(columns, column_block);
    STD_TORCH_CHECK(rows >= 0 && segments.numel() == rows * column_blocks, op, ": segments must be [",
                    rows * column_blocks, "], one for each of ", rows, " rows in ", column_blocks,
                    " column blocks, got ", segments.numel(), "; pass the weight that x's features fit");
    STD_TORCH_CHECK(block_offsets.numel() == Blocks(rows, kBlockedRows) * column_blocks + 1, op,
                    ": block_offsets must be [", Blocks(rows, kBlockedRows) * column_blocks + 1, "], got ",
                    block_offsets.numel(), "; pack the weight again");
    STD_TORCH_CHECK(values.dim() == 1 && values.numel() == indices.numel(), op, ": values must be [", indices.numel(),
                    "], got ", values.dim(), "-D with ", values.numel(), " elements; pass one for each index");
    tensors = {Contiguous(block_offsets), Contiguous(segments), Contiguous(indices), Contiguous(values)};
    args.block_offsets = tensors[0].const_data_ptr<std::int32_t>();
    args.segments = tensors[1].const_data_ptr<std::int32_t>();
    args.indices = static_cast<const std::uint16_t*>(tensors[2].const_data_ptr());
    args.values = tensors[3].const_data_ptr();
    args.rows = rows;
    args.columns = columns;
    args.nnz = indices.numel();
    args.column_block = column_block;
    if (!codebook.has_value()) {
      args.stored_as =
          DtypeOf(op, values, "values") == FloatDtype::kFloat32 ? BlockedValues::kFloat32 : BlockedValues::kBFloat16;
      return;
    }
    STD_TORCH_CHECK(values.scalar_type() == ScalarType::Byte, op,
                    ": values must be uint8 codes beside a codebook, got ",
                    torch::headeronly::toString(values.scalar_type()), "; pass codes, or no codebook");
    CheckVector(op, *codebook, "codebook", ScalarType::Float);
    STD_TORCH_CHECK(codebook->numel() <= kBlockedMaxEntries, op, ": codebook must have at most ", kBlockedMaxEntries,
                    " entries, got ", codebook->numel(), "; pass one group of a codebook");
    tensors.push_back(Contiguous(*codebook));
    args.stored_as = BlockedValues::kCodes;
    args.codebook = tensors[4].const_data_ptr<float>();
    args.entries = codebook->numel();
  }

  std::vector<Tensor> tensors;
  BlockedWeight args{};
};

struct Panel {
  std::int64_t begin, samples, width;
};

// Cuts samples into panels, as wide as a block's part of one stays in the first cache level.
std::vector<Panel> PanelsOf(std::int64_t samples, std::int64_t column_block) {
  // Measured on 32 and 48 KiB of first-level data cache: beyond this a narrower panel is faster, although it decodes a
  // weight more often.
  constexpr std::int64_t kTileBytes = 48 * 1024;
  std::int64_t widest = kBlockedMaxWidth;
  while (widest > 8 && widest * column_block * std::int64_t{sizeof(float)} > kTileBytes) widest /= 2;
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

Tensor BlockedMatmulOnCpu(const Tensor& x, const Tensor& block_offsets, const Tensor& segments, const Tensor& indices,
                          const Tensor& values, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& codebook, std::int64_t out_features, std::int64_t column_block,
                          bool relu) {
  constexpr const char* kOp = "blocked_matmul";
  // Packed at the same time: enough for the threads, and few enough to come back from the last cache level.
  constexpr std::int64_t kWave = 8;
  const Samples samples(kOp, x, "x");
  const Weight weight(kOp, block_offsets, segments, indices, values, codebook, out_features, samples.features,
                      column_block);
  const Bias bias_of_rows(kOp, bias, out_features);
  const Tensor y = torch::stable::new_empty(x, WithLastDim(x, out_features));
  char* y_data = static_cast<char*>(y.mutable_data_ptr());

  const std::vector<Panel> panels = PanelsOf(samples.count, column_block);
  const auto panel_count = static_cast<std::int64_t>(panels.size());
  const std::int64_t row_blocks = Blocks(out_features, kBlockedRows);
  if (panel_count == 0 || row_blocks == 0) return y;
  const std::int64_t stride = panels[0].width * samples.features;
  const Tensor memory =
      torch::stable::new_empty(samples.tensor, {std::min(kWave, panel_count) * stride}, ScalarType::Float);
  float* panel_data = memory.mutable_data_ptr<float>();
  const std::int64_t work = weight.args.nnz / row_blocks * std::max<std::int64_t>(1, panels[0].width / 8);
  SharedStatus status;
  for (std::int64_t first = 0; first < panel_count; first += kWave) {
    const std::int64_t count = std::min(kWave, panel_count - first);
    ParallelRanges(count, samples.features, GrainItems(panels[0].width / 4),
                   [&](std::int64_t i, std::int64_t begin, std::int64_t end) {
                     const Panel& panel = panels[first + i];
                     PackPanel({samples.At(panel.begin), samples.stored_as, panel.samples, samples.features,
                                panel_data + i * stride, panel.width},
                               begin, end);
                   });
    // The panels of a row block one after the other, so that its part of the weight comes from memory once.
    torch::stable::parallel_for(0, row_blocks * count, GrainItems(work), [&](std::int64_t begin, std::int64_t end) {
      constexpr std::size_t kLine = 16;  // floats
      const std::unique_ptr<float[]> sums(new float[kBlockedRows * panels[0].width + kLine]);
      float* aligned = sums.get() + (kLine - reinterpret_cast<std::uintptr_t>(sums.get()) / sizeof(float) % kLine);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t i = task / row_blocks;
        const Panel& panel = panels[first + i];
        status.Report(BlockedMatmul(
            {weight.args, panel_data + i * stride, panel.width, bias_of_rows.data, relu,
             y_data + panel.begin * out_features * samples.item_bytes, samples.stored_as, panel.samples, aligned},
            task % row_blocks));
      }
    });
  }
  status.Raise(kOp, weight.args);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> BlockedPackOnCpu(const Tensor& row_offsets, const Tensor& col_indices,
                                                            std::int64_t columns, std::int64_t column_block) {
  constexpr const char* kOp = "blocked_pack";
  CheckVector(kOp, row_offsets, "row_offsets", ScalarType::Int);
  CheckVector(kOp, col_indices, "col_indices", ScalarType::Int);
  CheckColumnBlock(kOp, column_block);
  STD_TORCH_CHECK(row_offsets.numel() >= 1 && columns >= 0, kOp,
                  ": row_offsets must have one entry more than rows, got ", row_offsets.numel(), "; pass [0]");
  // In memory of their own, which the kernel may read as int32.
  const Tensor offsets = torch::stable::clone(row_offsets), from = torch::stable::clone(col_indices);
  const std::int32_t* offset = offsets.const_data_ptr<std::int32_t>();
  const std::int32_t* column = from.const_data_ptr<std::int32_t>();
  const std::int64_t rows = offsets.numel() - 1, nnz = from.numel();
  bool rising = offset[0] == 0 && offset[rows] == nnz, inside = true;
  for (std::int64_t r = 0; r < rows; ++r) rising &= offset[r] <= offset[r + 1];
  for (std::int64_t k = 0; k < nnz; ++k) inside &= 0 <= column[k] && column[k] < columns;
  STD_TORCH_CHECK(rising, kOp, ": row_offsets must rise from 0 to ", nnz, "; rebuild the weight");
  STD_TORCH_CHECK(inside, kOp, ": col_indices must lie in [0, ", columns, "), got one outside; rebuild the weight");

  const std::int64_t row_blocks = Blocks(rows, kBlockedRows), column_blocks = Blocks(columns, column_block);
  const auto empty = [&](std::int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(row_offsets, {size}, dtype);
  };
  Tensor block_offsets = empty(row_blocks * column_blocks + 1, ScalarType::Int);
  Tensor segments = empty(rows * column_blocks, ScalarType::Int);
  Tensor indices = empty(nnz, ScalarType::Short), sources = empty(nnz, ScalarType::Int);
  BlockedPackArgs args{offset,
                       column,
                       rows,
                       columns,
                       column_block,
                       block_offsets.mutable_data_ptr<std::int32_t>(),
                       segments.mutable_data_ptr<std::int32_t>(),
                       static_cast<std::uint16_t*>(indices.mutable_data_ptr()),
                       sources.mutable_data_ptr<std::int32_t>(),
                       nullptr};
  args.block_offsets[row_blocks * column_blocks] = static_cast<std::int32_t>(nnz);
  torch::stable::parallel_for(0, row_blocks, 1, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> scratch((kBlockedRows + 1) * column_blocks + column_block + 1);
    BlockedPackArgs own = args;
    own.scratch = scratch.data();
    for (std::int64_t block = begin; block < end; ++block) BlockedPack(own, block);
  });
  return {block_offsets, segments, indices, sources};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("blocked_matmul", TORCH_BOX(&BlockedMatmulOnCpu));
  m.impl("blocked_matmul_inference", TORCH_BOX(&BlockedMatmulOnCpu));
  m.impl("blocked_pack", TORCH_BOX(&BlockedPackOnCpu));
}

}  // namespace tersetorch
