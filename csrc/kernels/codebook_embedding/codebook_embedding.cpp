#include "kernels/codebook_embedding/codebook_embedding.h"

#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

CodebookLookup Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kCodebookEmbeddingAvx512;
    case CpuIsa::kAvx2:
      return kCodebookEmbeddingAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kCodebookEmbeddingScalar;
}

}  // namespace

CodebookEmbeddingStatus CodebookEmbedding(const CodebookEmbeddingArgs& args, std::int64_t begin,
                                          std::int64_t end) noexcept {
  return Active()(args, begin, end);
}

CodebookEmbeddingStatus CodebookEmbeddingReduce(const CodebookEmbeddingReduceArgs& a, std::int64_t begin,
                                                std::int64_t end, std::int64_t row_begin,
                                                std::int64_t row_end) noexcept {
  CodebookWeight row = a.weight;
  row.rows = 1;
  const std::int64_t row_bytes = CodeRowBytes(row.columns, row.column_block, CodeBits(row.entries));
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t r = a.indices.At(i);
    if (r < 0 || r >= a.weight.rows) return CodebookEmbeddingStatus::kBadIndex;
    if (r < row_begin || r >= row_end || r == a.padding) continue;
    row.codes = a.weight.codes + r * row_bytes;
    double* sums = a.sums + (row.per_row ? r * row.entries : 0);
    const CodebookStatus status = CodebookReduce(row, a.grad + i * row.columns, sums, 0, 1);
    if (status != CodebookStatus::kOk) return CodebookEmbeddingStatus::kBadCode;
  }
  return CodebookEmbeddingStatus::kOk;
}

}  // namespace tersetorch
