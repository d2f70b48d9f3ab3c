// A weight kept as codes into tables, as its ops take it: checks, and what damage becomes.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/codebook_matmul/codebook_matmul.h"
#include "torch/cuda.h"
#include "torch/samples.h"

namespace tersetorch {

// Columns, and into how wide blocks codes and tables are cut: all of them for column_block 0.
struct CodedWidth {
  CodedWidth(const char* op, std::int64_t columns, std::int64_t column_block)
      : columns(columns), block(column_block == 0 ? std::max<std::int64_t>(1, columns) : column_block) {
    STD_TORCH_CHECK(columns >= 0 && column_block >= 0, op, ": columns and column_block must be at least 0, got ",
                    columns, " and ", column_block, "; pass the weight's own");
  }

  std::int64_t columns, block;
};

inline int CheckedBits(const char* op, std::int64_t entries) {
  STD_TORCH_CHECK(entries >= 1 && entries <= kCodesMaxEntries, op, ": codebook must have 1 to ", kCodesMaxEntries,
                  " entries in a table, got ", entries, "; share the weight with at most 8 bits");
  return CodeBits(entries);
}

inline void CheckCodes(Place place, const char* op, const Tensor& codes, std::int64_t row_bytes) {
  CheckOn(place, op, codes, "codes");
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.dim() == 2 && codes.size(1) == row_bytes, op,
                  ": codes must be uint8 [rows, ", row_bytes, "] for such columns and entries, got ",
                  torch::headeronly::toString(codes.scalar_type()), " and ", codes.dim(), "-D with ", codes.numel(),
                  " elements; pass what codebook_pack made for them");
}

// A weight whose tensors live as long as this. Without a codebook it has `tables` tables of `entries`, unread.
struct CodedWeight {
  CodedWeight(const char* op, Place place, const Tensor& packed, const std::optional<Tensor>& values,
              std::int64_t tables, std::int64_t entries, const CodedWidth& width)
      : codes(Usable(place, packed, 16)) {
    const int bits = CheckedBits(op, entries);
    row_bytes = CodeRowBytes(width.columns, width.block, bits);
    CheckCodes(place, op, packed, row_bytes);
    const std::int64_t rows = packed.size(0), blocks = Blocks(width.columns, width.block);
    // Where blocks are asked for, there is a table for each; else one for each row, or one.
    const bool fits = blocks > 1 ? tables == blocks : tables == 1 || tables == rows;
    STD_TORCH_CHECK(fits, op, ": codebook must have ",
                    blocks > 1 ? std::to_string(blocks) + " tables, one for each block of columns"
                               : "1 table or " + std::to_string(rows) + ", one for each row",
                    ", got ", tables, "; pass the codebook that the codes were made with");
    if (values.has_value()) codebook = Usable(place, *values);
    args = {codes.const_data_ptr<std::uint8_t>(),
            codebook.has_value() ? codebook->const_data_ptr<float>() : nullptr,
            entries,
            tables > 1 && blocks <= 1,
            rows,
            width.columns,
            width.block};
  }

  Tensor codes;
  std::optional<Tensor> codebook;
  std::int64_t row_bytes;
  CodebookWeight args{};
};

inline CodedWeight CodedWeightOf(const char* op, Place place, const Tensor& codes, const Tensor& codebook,
                                 const CodedWidth& width) {
  CheckOn(place, op, codebook, "codebook");
  STD_TORCH_CHECK(codebook.scalar_type() == ScalarType::Float && codebook.dim() == 2, op,
                  ": codebook must be float32 [tables, entries], got ",
                  torch::headeronly::toString(codebook.scalar_type()), " and ", codebook.dim(), "-D; convert it");
  return CodedWeight(op, place, codes, codebook, codebook.size(0), codebook.size(1), width);
}

class SharedCodebookStatus {
 public:
  void Report(CodebookStatus status) {
    if (status != CodebookStatus::kOk) status_.store(status, std::memory_order_relaxed);
  }
  void Raise(const char* op, std::int64_t entries) const {
    STD_TORCH_CHECK(status_.load(std::memory_order_relaxed) == CodebookStatus::kOk, op, ": codes must lie in [0, ",
                    entries, "), got one outside; pass the codebook that the codes were made with");
  }

 private:
  std::atomic<CodebookStatus> status_{CodebookStatus::kOk};
};

inline CodebookMode CodebookModeOf(const char* op, const std::string& mode, std::int64_t columns) {
  if (mode == "exact") return CodebookMode::kExact;
  if (mode == "bfloat16") return CodebookMode::kBFloat16;
  STD_TORCH_CHECK(mode == "int8", op, ": mode must be \"exact\", \"bfloat16\" or \"int8\", got \"", mode,
                  "\"; choose one of them");
  STD_TORCH_CHECK(columns <= kCodebookMaxQuantizedColumns, op, ": a row must have at most ",
                  kCodebookMaxQuantizedColumns, " weights in mode \"int8\", got ", columns,
                  "; split the layer or use mode \"exact\"");
  return CodebookMode::kInt8;
}

#ifdef TERSETORCH_CUDA

// Rows of int8 in whole words of four, and their scales.
struct RoundedRows {
  RoundedRows(const CudaCall& call, const Tensor& like, const void* x, FloatDtype stored_as, std::int64_t rows,
              std::int64_t columns)
      : stride((columns + 3) / 4 * 4),
        bytes(torch::stable::new_empty(like, {rows, stride}, ScalarType::Char)),
        scales(torch::stable::new_empty(like, {rows}, ScalarType::Float)) {
    call.Check(BlockedQuadsCuda({x, stored_as, rows, columns, static_cast<std::uint32_t*>(bytes.mutable_data_ptr()),
                                 scales.mutable_data_ptr<float>()},
                                call.Stream()));
  }

  std::int64_t stride;
  Tensor bytes, scales;
};

#endif

}  // namespace tersetorch
