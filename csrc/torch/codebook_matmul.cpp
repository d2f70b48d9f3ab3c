// tersetorch::codebook_matmul, its weight as a tensor and the packing of its codes: checks, allocates, splits the work,
// calls the kernels.
#include "kernels/codebook_matmul/codebook_matmul.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels/codebook_matmul/codebook_matmul_cuda.h"
#include "kernels/panels/panels.h"
#include "torch/codebook_weight.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

// Columns of a panel for so many samples.
std::int64_t PanelWidth(std::int64_t samples) {
  std::int64_t width = 1;
  while (width < samples) width *= 2;
  return width;
}

Tensor CodebookMatmulOnCpu(const Tensor& x, const Tensor& codes, const Tensor& codebook,
                           const std::optional<Tensor>& bias, std::int64_t column_block, std::string mode, bool relu) {
  constexpr const char* kOp = "codebook_matmul";
  const Samples samples(kOp, x, "x");
  const CodedWeight weight = CodedWeightOf(kOp, kCpu, codes, codebook, CodedWidth(kOp, samples.features, column_block));
  const CodebookWeight& w = weight.args;
  const Bias of_rows(kOp, bias, w.rows);
  const CodebookMode how = CodebookModeOf(kOp, mode, samples.features);
  const int bits = CodeBits(w.entries);
  const Tensor y = EmptyWithLastDim(x, w.rows);
  char* y_data = static_cast<char*>(y.mutable_data_ptr());

  float table_scale = 0, table_inverse = 0;
  if (how == CodebookMode::kInt8 && !w.per_row) {
    SampleScales({w.codebook, FloatDtype::kFloat32, weight.codebook->numel(), &table_scale, &table_inverse}, 0, 1);
  }
  const std::int64_t chunks = weight.row_bytes / kCodeChunkBytes;
  const std::int64_t at_once = std::min(samples.count, kCodebookMaxWidth);
  Scratch panel(CodebookPanelBytes(weight.row_bytes, bits, how, PanelWidth(at_once)));
  SharedCodebookStatus status;
  for (std::int64_t first = 0; first < samples.count; first += kCodebookMaxWidth) {
    const std::int64_t count = std::min(kCodebookMaxWidth, samples.count - first), width = PanelWidth(count);
    const void* from = samples.At(first);
    float scales[kCodebookMaxWidth] = {}, inverses[kCodebookMaxWidth] = {};
    std::int32_t sums[kCodebookMaxWidth] = {};
    if (how == CodebookMode::kInt8) {
      ParallelFor(count, GrainItems(w.columns / 32), [&](std::int64_t begin, std::int64_t end) {
        SampleScales({from, samples.stored_as, w.columns, scales, inverses}, begin, end);
      });
    }
    const CodebookSamplesArgs pack{from,     samples.stored_as,  count, w.columns, w.column_block, bits, how,
                                   inverses, panel.Data<char>(), width, sums};
    ParallelFor(chunks, GrainItems(512 / bits * width / 8),
                [&](std::int64_t begin, std::int64_t end) { CodebookPackSamples(pack, begin, end); });
    CodebookMatmulArgs args{w,
                            how,
                            panel.Data<char>(),
                            width,
                            count,
                            scales,
                            sums,
                            table_scale,
                            table_inverse,
                            of_rows.data,
                            relu,
                            y_data + first * w.rows * samples.item_bytes,
                            samples.stored_as,
                            nullptr};
    const std::int64_t row_operations = w.columns * (width / 2 + 1) / 16;
    if (width <= kCodebookFewSamples) {
      ParallelFor(w.rows, GrainItems(row_operations),
                  [&](std::int64_t begin, std::int64_t end) { status.Report(CodebookMatmul(args, begin, end)); });
      continue;
    }
    ParallelFor(Blocks(w.rows, kCodebookRows), GrainItems(row_operations * kCodebookRows),
                [&](std::int64_t begin, std::int64_t end) {
                  Scratch memory(CodebookScratchBytes(width, w.per_row));
                  CodebookMatmulArgs own = args;
                  own.sums = memory.Data<float>();
                  for (std::int64_t b = begin; b < end; ++b) {
                    status.Report(CodebookMatmul(own, b * kCodebookRows, std::min(w.rows, (b + 1) * kCodebookRows)));
                  }
                });
  }
  status.Raise(kOp, w.entries);
  return y;
}

Tensor CodebookDenseOnCpu(const Tensor& codes, const Tensor& codebook, std::int64_t columns,
                          std::int64_t column_block) {
  constexpr const char* kOp = "codebook_dense";
  const CodedWeight weight = CodedWeightOf(kOp, kCpu, codes, codebook, CodedWidth(kOp, columns, column_block));
  const CodebookWeight& w = weight.args;
  Tensor dense = torch::stable::new_empty(codebook, {w.rows, columns});
  auto* to = dense.mutable_data_ptr<float>();
  SharedCodebookStatus status;
  ParallelFor(w.rows, GrainItems(columns),
              [&](std::int64_t begin, std::int64_t end) { status.Report(CodebookDecode(w, to, begin, end)); });
  status.Raise(kOp, w.entries);
  return dense;
}

void CheckGrad(const char* op, const Tensor& grad) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.dim() == 2, op,
                  ": grad must be float32 [rows, columns], got ", torch::headeronly::toString(grad.scalar_type()),
                  " and ", grad.dim(), "-D; convert it");
}

void CheckRows(const char* op, const Tensor& grad, std::int64_t rows) {
  STD_TORCH_CHECK(grad.size(0) == rows, op, ": grad must have the ", rows, " rows of codes, got ", grad.size(0),
                  "; pass the gradient of that weight");
}

Tensor CodebookReduceOnCpu(const Tensor& grad, const Tensor& codes, std::int64_t tables, std::int64_t entries,
                           std::int64_t column_block) {
  constexpr const char* kOp = "codebook_reduce";
  CheckOnCpu(kOp, grad, "grad");
  CheckGrad(kOp, grad);
  const CodedWeight weight(kOp, kCpu, codes, std::nullopt, tables, entries,
                           CodedWidth(kOp, grad.size(1), column_block));
  const CodebookWeight& w = weight.args;
  CheckRows(kOp, grad, w.rows);
  const Tensor contiguous = Contiguous(grad);
  const float* from = contiguous.const_data_ptr<float>();
  Tensor sums = torch::stable::new_empty(contiguous, {tables, entries});
  auto* to = sums.mutable_data_ptr<float>();
  SharedCodebookStatus status;
  // Blocks of rows have sums of their own, added in their order: the same for any number of threads. Tables of rows
  // are nobody else's.
  const std::int64_t rows_a_block = std::max<std::int64_t>(64, Blocks(w.rows, 64));
  const std::int64_t blocks = Blocks(w.rows, rows_a_block), size = tables * entries;
  std::vector<double> partial((w.per_row ? 1 : blocks) * size, 0.0);
  ParallelFor(blocks, GrainItems(rows_a_block * w.columns), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      double* own = partial.data() + (w.per_row ? 0 : b * size);
      status.Report(CodebookReduce(w, from, own, b * rows_a_block, std::min(w.rows, (b + 1) * rows_a_block)));
    }
  });
  status.Raise(kOp, entries);
  for (std::int64_t k = 0; k < size; ++k) {
    double sum = 0;
    for (std::size_t i = k; i < partial.size(); i += size) sum += partial[i];
    to[k] = static_cast<float>(sum);
  }
  return sums;
}

Tensor CodebookPackOnCpu(const Tensor& codes, std::int64_t entries, std::int64_t column_block) {
  constexpr const char* kOp = "codebook_pack";
  CheckOnCpu(kOp, codes, "codes");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2, kOp,
                  ": codes must be uint8 [rows, columns], got ", torch::headeronly::toString(codes.scalar_type()),
                  " and ", codes.dim(), "-D; convert them");
  const Tensor plain = Contiguous(codes);
  const auto* from = plain.const_data_ptr<std::uint8_t>();
  const int bits = CheckedBits(kOp, entries);
  const CodedWidth width(kOp, codes.size(1), column_block);
  const std::int64_t rows = codes.size(0);
  const std::int64_t size = plain.numel();
  std::uint8_t largest = 0;
  for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, from[i]);
  STD_TORCH_CHECK(size == 0 || largest < entries, kOp, ": codes must lie in [0, ", entries, "), got ",
                  static_cast<int>(largest), "; pass the number of entries that the codes were made with");
  Tensor packed = torch::stable::new_empty(plain, {rows, CodeRowBytes(width.columns, width.block, bits)});
  auto* to = packed.mutable_data_ptr<std::uint8_t>();
  ParallelFor(rows, GrainItems(width.columns), [&](std::int64_t begin, std::int64_t end) {
    CodebookPack(from, width.columns, width.block, bits, to, begin, end);
  });
  return packed;
}

Tensor CodebookUnpackOnCpu(const Tensor& packed, std::int64_t entries, std::int64_t columns,
                           std::int64_t column_block) {
  constexpr const char* kOp = "codebook_unpack";
  const int bits = CheckedBits(kOp, entries);
  const CodedWidth width(kOp, columns, column_block);
  CheckCodes(kCpu, kOp, packed, CodeRowBytes(width.columns, width.block, bits));
  const Tensor from = Contiguous(packed);
  const std::int64_t rows = packed.size(0);
  Tensor codes = torch::stable::new_empty(from, {rows, columns});
  auto* to = codes.mutable_data_ptr<std::uint8_t>();
  ParallelFor(rows, GrainItems(columns), [&](std::int64_t begin, std::int64_t end) {
    CodebookUnpack(from.const_data_ptr<std::uint8_t>(), columns, width.block, bits, to, begin, end);
  });
  return codes;
}

#ifdef TERSETORCH_CUDA

Tensor CodebookMatmulOnCuda(const Tensor& x, const Tensor& codes, const Tensor& codebook,
                            const std::optional<Tensor>& bias, std::int64_t column_block, std::string mode, bool relu) {
  constexpr const char* kOp = "codebook_matmul";
  const CudaCall call(kOp, x, "x");
  const Samples samples(kOp, x, "x", call.place());
  const CodedWeight weight =
      CodedWeightOf(kOp, call.place(), codes, codebook, CodedWidth(kOp, samples.features, column_block));
  const CodebookWeight& w = weight.args;
  const Bias of_rows(kOp, bias, w.rows, call.place());
  const Tensor y = EmptyWithLastDim(x, w.rows);
  CodebookMatmulCudaArgs args{w,
                              CodebookModeOf(kOp, mode, samples.features),
                              samples.At(0),
                              samples.stored_as,
                              of_rows.data,
                              relu,
                              y.mutable_data_ptr(),
                              samples.count};
  std::optional<RoundedRows> of_x, of_tables;
  std::optional<Tensor> packed, scales, parts;
  const CodebookPlan plan = CodebookPlanCuda(args);
  args.packed_stride = plan.packed_stride;
  args.part_count = plan.part_count;
  if (args.part_count > 1) {
    parts = torch::stable::new_empty(x, {args.part_count, samples.count, w.rows}, ScalarType::Float);
    args.parts = parts->mutable_data_ptr();
  }
  if (args.packed_stride > 0) {
    packed = torch::stable::new_empty(x, {samples.count, args.packed_stride}, ScalarType::Byte);
    args.packed = packed->mutable_data_ptr();
    if (args.mode == CodebookMode::kInt8) {
      scales = torch::stable::new_empty(x, {samples.count}, ScalarType::Float);
      args.sample_scales = scales->mutable_data_ptr<float>();
    }
  } else if (args.mode == CodebookMode::kInt8) {
    const std::int64_t tables = weight.codebook->size(0);
    of_x.emplace(call, x, args.x, samples.stored_as, samples.count, samples.features);
    of_tables.emplace(call, codebook, w.codebook, FloatDtype::kFloat32, w.per_row ? tables : 1,
                      w.per_row ? w.entries : tables * w.entries);
    args.x = of_x->bytes.const_data_ptr();
    args.x_stride = of_x->stride;
    args.sample_scales = of_x->scales.mutable_data_ptr<float>();
    args.tables = of_tables->bytes.const_data_ptr<std::int8_t>();
    args.table_stride = w.per_row ? of_tables->stride : w.entries;
    args.table_scales = of_tables->scales.const_data_ptr<float>();
  }
  call.Check(CodebookMatmulCuda(args, call.Stream()));
  return y;
}

Tensor CodebookDenseOnCuda(const Tensor& codes, const Tensor& codebook, std::int64_t columns,
                           std::int64_t column_block) {
  constexpr const char* kOp = "codebook_dense";
  const CudaCall call(kOp, codes, "codes");
  const CodedWeight weight = CodedWeightOf(kOp, call.place(), codes, codebook, CodedWidth(kOp, columns, column_block));
  Tensor dense = torch::stable::new_empty(codebook, {weight.args.rows, columns});
  call.Check(CodebookDecodeCuda({weight.args, dense.mutable_data_ptr<float>()}, call.Stream()));
  return dense;
}

Tensor CodebookReduceOnCuda(const Tensor& grad, const Tensor& codes, std::int64_t tables, std::int64_t entries,
                            std::int64_t column_block) {
  constexpr const char* kOp = "codebook_reduce";
  const CudaCall call(kOp, grad, "grad");
  CheckGrad(kOp, grad);
  const CodedWeight weight(kOp, call.place(), codes, std::nullopt, tables, entries,
                           CodedWidth(kOp, grad.size(1), column_block));
  CheckRows(kOp, grad, weight.args.rows);
  const Tensor contiguous = Usable(call.place(), grad);
  Tensor sums = torch::stable::new_empty(contiguous, {tables, entries});
  CodebookReduceCudaArgs args{weight.args, contiguous.const_data_ptr<float>(), sums.mutable_data_ptr<float>(), tables};
  args.parts = CodebookReducePartsCuda(args.weight, tables);
  std::optional<Tensor> partial;
  if (args.parts > 1) {
    partial = torch::stable::new_empty(contiguous, {args.parts, tables, entries}, ScalarType::Double);
    args.partial = partial->mutable_data_ptr<double>();
  }
  call.Check(CodebookReduceCuda(args, call.Stream()));
  return sums;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("codebook_matmul", TORCH_BOX(&CodebookMatmulOnCpu));
  m.impl("codebook_matmul_inference", TORCH_BOX(&CodebookMatmulOnCpu));
  m.impl("codebook_dense", TORCH_BOX(&CodebookDenseOnCpu));
  m.impl("codebook_reduce", TORCH_BOX(&CodebookReduceOnCpu));
  m.impl("codebook_pack", TORCH_BOX(&CodebookPackOnCpu));
  m.impl("codebook_unpack", TORCH_BOX(&CodebookUnpackOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("codebook_matmul", TORCH_BOX(&CodebookMatmulOnCuda));
  m.impl("codebook_matmul_inference", TORCH_BOX(&CodebookMatmulOnCuda));
  m.impl("codebook_dense", TORCH_BOX(&CodebookDenseOnCuda));
  m.impl("codebook_reduce", TORCH_BOX(&CodebookReduceOnCuda));
#else
  for (const char* op : {"codebook_matmul", "codebook_matmul_inference", "codebook_dense", "codebook_reduce"}) {
    m.impl(op, &NotBuiltForCuda);
  }
#endif
}

}  // namespace tersetorch
