// tersetorch::codebook_embedding and its adjoint: checks, allocates, splits the work, calls the kernels.
#include "kernels/codebook_embedding/codebook_embedding.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "kernels/codebook_embedding/codebook_embedding_cuda.h"
#include "torch/codebook_weight.h"
#include "torch/common.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {
namespace {

// Indices of any shape, whose tensor lives as long as this.
struct Indices {
  Indices(const char* op, Place place, const Tensor& t) : tensor(Usable(place, Checked(op, place, t))) {
    args = {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long};
    count = tensor.numel();
  }

  static const Tensor& Checked(const char* op, Place place, const Tensor& t) {
    CheckOn(place, op, t, "indices");
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, op, ": indices must be int64 or int32, got ",
                    torch::headeronly::toString(dtype), "; convert them");
    return t;
  }

  Tensor tensor;
  CodebookIndices args{};
  std::int64_t count;
};

class SharedEmbeddingStatus {
 public:
  void Report(CodebookEmbeddingStatus status) {
    if (status != CodebookEmbeddingStatus::kOk) damaged_.store(true, std::memory_order_relaxed);
  }
  void Raise(const char* op, const Indices& indices, const CodebookWeight& w) const {
    if (!damaged_.load(std::memory_order_relaxed)) return;
    for (std::int64_t i = 0; i < indices.count; ++i) {
      const std::int64_t index = indices.args.At(i);
      STD_TORCH_CHECK(index >= 0 && index < w.rows, op, ": indices must lie in [0, ", w.rows, "), got ", index,
                      " at position ", i, "; pass indices of the weight's rows");
    }
    STD_TORCH_CHECK(false, op, ": codes must lie in [0, ", w.entries,
                    "), got one outside; pass the codebook that the codes were made with");
  }

 private:
  std::atomic<bool> damaged_{false};
};

// Rows [..., columns] for indices [...], uninitialised.
struct Rows {
  Rows(const char* op, const Indices& indices, std::int64_t columns, std::optional<ScalarType> dtype)
      : tensor(Empty(op, indices.tensor, columns, dtype.value_or(ScalarType::Float))),
        stored_as(DtypeOf(op, tensor, "dtype")) {}

  static Tensor Empty(const char* op, const Tensor& indices, std::int64_t columns, ScalarType dtype) {
    const bool on_cuda = indices.is_cuda();
    STD_TORCH_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || (on_cuda && dtype == ScalarType::Half), op,
        ": dtype must be float32", on_cuda ? ", bfloat16 or float16" : " or bfloat16", ", got ",
        torch::headeronly::toString(dtype), "; convert the result");
    std::vector<std::int64_t> shape = SizesOf(indices, indices.dim() + 1);
    shape.push_back(columns);
    const auto of = dtype == ScalarType::Float  ? aoti_torch_dtype_float32()
                    : dtype == ScalarType::Half ? aoti_torch_dtype_float16()
                                                : aoti_torch_dtype_bfloat16();
    return EmptyOnDeviceOf(indices, std::move(shape), of);
  }

  Tensor tensor;
  FloatDtype stored_as;
};

Tensor CodebookEmbeddingOnCpu(const Tensor& indices, const Tensor& codes, const Tensor& codebook, std::int64_t columns,
                              std::int64_t column_block, std::int64_t, std::optional<ScalarType> dtype) {
  constexpr const char* kOp = "codebook_embedding";
  const Indices of_rows(kOp, kCpu, indices);
  const CodedWeight weight = CodedWeightOf(kOp, kCpu, codes, codebook, CodedWidth(kOp, columns, column_block));
  Rows y(kOp, of_rows, columns, dtype);
  const CodebookEmbeddingArgs args{weight.args, of_rows.args, y.tensor.mutable_data_ptr(), y.stored_as};
  SharedEmbeddingStatus status;
  ParallelFor(of_rows.count, GrainItems(columns / 8 + 8),
              [&](std::int64_t begin, std::int64_t end) { status.Report(CodebookEmbedding(args, begin, end)); });
  status.Raise(kOp, of_rows, weight.args);
  return y.tensor;
}

void CheckGrad(const char* op, const Tensor& grad, const Tensor& indices) {
  bool fits = grad.scalar_type() == ScalarType::Float && grad.dim() == indices.dim() + 1;
  for (std::int64_t d = 0; fits && d < indices.dim(); ++d) fits = grad.size(d) == indices.size(d);
  STD_TORCH_CHECK(fits, op, ": grad must be float32, with the dimensions of indices and one more, got ",
                  torch::headeronly::toString(grad.scalar_type()), " and ", grad.dim(), "-D; convert it");
}

Tensor CodebookEmbeddingReduceOnCpu(const Tensor& grad, const Tensor& indices, const Tensor& codes, std::int64_t tables,
                                    std::int64_t entries, std::int64_t column_block, std::int64_t padding_idx) {
  constexpr const char* kOp = "codebook_embedding_reduce";
  CheckOnCpu(kOp, grad, "grad");
  CheckGrad(kOp, grad, indices);
  const Indices of_rows(kOp, kCpu, indices);
  const CodedWeight weight(kOp, kCpu, codes, std::nullopt, tables, entries,
                           CodedWidth(kOp, grad.size(-1), column_block));
  const CodebookWeight& w = weight.args;
  const Tensor contiguous = Contiguous(grad);
  Tensor sums = torch::stable::new_empty(contiguous, {tables, entries});
  auto* to = sums.mutable_data_ptr<float>();
  // Tables of rows belong to the thread that has these rows; other tables have sums for each block of indices, added
  // in their order: the same for any number of threads.
  const std::int64_t size = tables * entries;
  const std::int64_t at_once = w.per_row ? of_rows.count : std::max<std::int64_t>(64, Blocks(of_rows.count, 64));
  const std::int64_t blocks = w.per_row ? 1 : Blocks(of_rows.count, std::max<std::int64_t>(1, at_once));
  std::vector<double> partial(std::max<std::int64_t>(1, blocks) * size, 0.0);
  CodebookEmbeddingReduceArgs args{w, of_rows.args, padding_idx, contiguous.const_data_ptr<float>(), partial.data()};
  SharedEmbeddingStatus status;
  if (w.per_row) {
    ParallelFor(w.rows, std::max<std::int64_t>(4096, w.rows / 16), [&](std::int64_t begin, std::int64_t end) {
      status.Report(CodebookEmbeddingReduce(args, 0, of_rows.count, begin, end));
    });
  } else {
    ParallelFor(blocks, GrainItems(at_once * w.columns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t b = begin; b < end; ++b) {
        CodebookEmbeddingReduceArgs own = args;
        own.sums += b * size;
        const std::int64_t stop = std::min(of_rows.count, (b + 1) * at_once);
        status.Report(CodebookEmbeddingReduce(own, b * at_once, stop, 0, w.rows));
      }
    });
  }
  status.Raise(kOp, of_rows, w);
  for (std::int64_t k = 0; k < size; ++k) {
    double sum = 0;
    for (std::size_t i = k; i < partial.size(); i += size) sum += partial[i];
    to[k] = static_cast<float>(sum);
  }
  return sums;
}

#ifdef TERSETORCH_CUDA

Tensor CodebookEmbeddingOnCuda(const Tensor& indices, const Tensor& codes, const Tensor& codebook, std::int64_t columns,
                               std::int64_t column_block, std::int64_t, std::optional<ScalarType> dtype) {
  constexpr const char* kOp = "codebook_embedding";
  const CudaCall call(kOp, indices, "indices");
  const Indices of_rows(kOp, call.place(), indices);
  const CodedWeight weight = CodedWeightOf(kOp, call.place(), codes, codebook, CodedWidth(kOp, columns, column_block));
  Rows y(kOp, of_rows, columns, dtype);
  call.Check(CodebookEmbeddingCuda({weight.args, of_rows.args, of_rows.count, y.tensor.mutable_data_ptr(), y.stored_as},
                                   call.Stream()));
  return y.tensor;
}

Tensor CodebookEmbeddingReduceOnCuda(const Tensor& grad, const Tensor& indices, const Tensor& codes,
                                     std::int64_t tables, std::int64_t entries, std::int64_t column_block,
                                     std::int64_t padding_idx) {
  constexpr const char* kOp = "codebook_embedding_reduce";
  const CudaCall call(kOp, grad, "grad");
  CheckGrad(kOp, grad, indices);
  const Indices of_rows(kOp, call.place(), indices);
  const CodedWeight weight(kOp, call.place(), codes, std::nullopt, tables, entries,
                           CodedWidth(kOp, grad.size(-1), column_block));
  const Tensor contiguous = Usable(call.place(), grad);
  Tensor sums = torch::stable::new_empty(contiguous, {tables, entries});
  call.Check(CodebookEmbeddingReduceCuda({weight.args, of_rows.args, of_rows.count, padding_idx,
                                          contiguous.const_data_ptr<float>(), sums.mutable_data_ptr<float>(), tables},
                                         call.Stream()));
  return sums;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CPU, m) {
  m.impl("codebook_embedding", TORCH_BOX(&CodebookEmbeddingOnCpu));
  m.impl("codebook_embedding_inference", TORCH_BOX(&CodebookEmbeddingOnCpu));
  m.impl("codebook_embedding_reduce", TORCH_BOX(&CodebookEmbeddingReduceOnCpu));
}

STABLE_TORCH_LIBRARY_IMPL(tersetorch, CUDA, m) {
#ifdef TERSETORCH_CUDA
  m.impl("codebook_embedding", TORCH_BOX(&CodebookEmbeddingOnCuda));
  m.impl("codebook_embedding_inference", TORCH_BOX(&CodebookEmbeddingOnCuda));
  m.impl("codebook_embedding_reduce", TORCH_BOX(&CodebookEmbeddingReduceOnCuda));
#else
  for (const char* op : {"codebook_embedding", "codebook_embedding_inference", "codebook_embedding_reduce"}) {
    m.impl(op, &NotBuiltForCuda);
  }
#endif
}

}  // namespace tersetorch
