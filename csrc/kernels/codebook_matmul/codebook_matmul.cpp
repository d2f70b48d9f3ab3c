#include "kernels/codebook_matmul/codebook_matmul.h"

#include "kernels/common/cpu_isa.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

// AMD multiplies pairs of bfloat16 at twice the rate of float32. Intel at half of it (Golden Cove: an instruction every
// other cycle, against two a cycle), so that a product there asks for them by naming the level.
bool PairsAreFast() {
  __builtin_cpu_init();
  return ProcessCpuIsa().forced || __builtin_cpu_is("amd");
}

const CodebookKernels& Active(CodebookMode mode) {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
      if (mode == CodebookMode::kBFloat16 && PairsAreFast()) return kCodebookAvx512Bf16;
      return kCodebookAvx512;
    case CpuIsa::kAvx512:
      return kCodebookAvx512;
    case CpuIsa::kAvx2:
      return kCodebookAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kCodebookScalar;
}

// Calls each(chunk, begin, count) for the chunks of a row: columns [begin, begin + count) lie in it.
template <typename Each>
void ForChunks(std::int64_t columns, std::int64_t column_block, int bits, const Each& each) {
  std::int64_t chunk = 0;
  for (std::int64_t block = 0; block < columns; block += column_block) {
    const std::int64_t end = block + column_block < columns ? block + column_block : columns;
    for (std::int64_t begin = block; begin < end; begin += 512 / bits, ++chunk) {
      each(chunk, begin, end - begin < 512 / bits ? end - begin : 512 / bits);
    }
  }
}

// Calls each(begin, count, table, codes) for the chunks of row r, codes being its `count` unpacked ones; false where
// one lies outside its table.
template <typename Each>
bool ForCodes(const CodebookWeight& w, std::int64_t r, const Each& each) {
  const int bits = CodeBits(w.entries);
  const std::uint8_t* row = w.codes + r * CodeRowBytes(w.columns, w.column_block, bits);
  bool fit = true;
  ForChunks(w.columns, w.column_block, bits, [&](std::int64_t chunk, std::int64_t begin, std::int64_t count) {
    std::uint8_t codes[256];
    std::uint32_t largest = 0;
    for (std::int64_t c = 0; c < count; ++c) {
      const auto word = At<std::uint32_t>(row + chunk * kCodeChunkBytes, c % 16);
      const std::uint32_t code = word >> bits * (c / 16) & ((1u << bits) - 1);
      codes[c] = static_cast<std::uint8_t>(code);
      largest = code > largest ? code : largest;
    }
    fit = fit && largest < w.entries;
    if (fit) each(begin, count, w.per_row ? r : begin / w.column_block, codes);
  });
  return fit;
}

}  // namespace

void CodebookPackSamples(const CodebookSamplesArgs& args, std::int64_t chunk_begin, std::int64_t chunk_end) noexcept {
  Active(args.mode).pack_samples(args, chunk_begin, chunk_end);
}

CodebookStatus CodebookMatmul(const CodebookMatmulArgs& args, std::int64_t row_begin, std::int64_t row_end) noexcept {
  return Active(args.mode).matmul(args, row_begin, row_end);
}

CodebookStatus CodebookDecode(const CodebookWeight& w, float* dense, std::int64_t row_begin,
                              std::int64_t row_end) noexcept {
  bool fit = true;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const auto decode = [&](std::int64_t begin, std::int64_t count, std::int64_t table, const std::uint8_t* codes) {
      for (std::int64_t c = 0; c < count; ++c) {
        Put(dense, r * w.columns + begin + c, At<float>(w.codebook, table * w.entries + codes[c]));
      }
    };
    fit = ForCodes(w, r, decode) && fit;
  }
  return fit ? CodebookStatus::kOk : CodebookStatus::kBadCode;
}

CodebookStatus CodebookReduce(const CodebookWeight& w, const float* grad, double* sums, std::int64_t row_begin,
                              std::int64_t row_end) noexcept {
  bool fit = true;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    const auto add = [&](std::int64_t begin, std::int64_t count, std::int64_t table, const std::uint8_t* codes) {
      for (std::int64_t c = 0; c < count; ++c) {
        sums[table * w.entries + codes[c]] += At<float>(grad, r * w.columns + begin + c);
      }
    };
    fit = ForCodes(w, r, add) && fit;
  }
  return fit ? CodebookStatus::kOk : CodebookStatus::kBadCode;
}

void CodebookPack(const std::uint8_t* codes, std::int64_t columns, std::int64_t column_block, int bits,
                  std::uint8_t* packed, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const std::int64_t row_bytes = CodeRowBytes(columns, column_block, bits);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    ForChunks(columns, column_block, bits, [&](std::int64_t chunk, std::int64_t begin, std::int64_t count) {
      std::uint32_t words[16] = {};
      for (std::int64_t c = 0; c < count; ++c) {
        words[c % 16] |= std::uint32_t{codes[r * columns + begin + c]} << bits * (c / 16);
      }
      __builtin_memcpy(packed + r * row_bytes + chunk * kCodeChunkBytes, words, sizeof words);
    });
  }
}

void CodebookUnpack(const std::uint8_t* packed, std::int64_t columns, std::int64_t column_block, int bits,
                    std::uint8_t* codes, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const std::int64_t row_bytes = CodeRowBytes(columns, column_block, bits);
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    ForChunks(columns, column_block, bits, [&](std::int64_t chunk, std::int64_t begin, std::int64_t count) {
      for (std::int64_t c = 0; c < count; ++c) {
        const auto word = At<std::uint32_t>(packed + r * row_bytes + chunk * kCodeChunkBytes, c % 16);
        codes[r * columns + begin + c] = static_cast<std::uint8_t>(word >> bits * (c / 16) & ((1u << bits) - 1));
      }
    });
  }
}

}  // namespace tersetorch
