#include "kernels/codebook_embedding/codebook_embedding.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

// The code of column c in a row of words.
std::uint32_t CodeOf(const std::uint8_t* row, std::int64_t c, std::int64_t column_block, int bits) {
  const std::int64_t in_block = c % column_block, of_chunk = 512 / bits;
  const std::int64_t chunk = c / column_block * CodeChunks(column_block, bits) + in_block / of_chunk;
  const std::int64_t in_chunk = in_block % of_chunk;
  return At<std::uint32_t>(row, chunk * 16 + in_chunk % 16) >> bits * (in_chunk / 16) & ((1u << bits) - 1);
}

CodebookEmbeddingStatus Lookup(const CodebookEmbeddingArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const CodebookWeight& w = a.weight;
  const int bits = CodeBits(w.entries);
  const std::int64_t row_bytes = CodeRowBytes(w.columns, w.column_block, bits);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t r = a.indices.At(i);
    if (r < 0 || r >= w.rows) return CodebookEmbeddingStatus::kBadIndex;
    for (std::int64_t c = 0; c < w.columns; ++c) {
      const std::uint32_t code = CodeOf(w.codes + r * row_bytes, c, w.column_block, bits);
      if (code >= w.entries) return CodebookEmbeddingStatus::kBadCode;
      const std::int64_t table = w.per_row ? r : c / w.column_block;
      Store(a.y, a.y_stored_as, i * w.columns + c, At<float>(w.codebook, table * w.entries + code));
    }
  }
  return CodebookEmbeddingStatus::kOk;
}

}  // namespace

const CodebookLookup kCodebookEmbeddingScalar = Lookup;

}  // namespace tersetorch
