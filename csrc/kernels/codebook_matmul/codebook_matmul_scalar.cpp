#include "kernels/codebook_matmul/codebook_matmul.h"
#include "kernels/common/scalars.h"
#include "kernels/panels/panels.h"

namespace tersetorch {
namespace {

// Where word l of vector v of sample n lies in a panel, in words.
std::int64_t WordOf(std::int64_t v, std::int64_t n, std::int64_t l, std::int64_t width) {
  return v * 16 * width + (width <= kCodebookFewSamples ? n * 16 + l : l * width + n);
}

// Where the column `c` of a chunk of so many bits lies: its vector, word, and byte in int8.
struct Place {
  Place(std::int64_t c, int bits, CodebookMode mode)
      : vector(mode == CodebookMode::kInt8 ? c / 16 % (8 / bits) : c / 16), word(c % 16), byte(c / 16 / (8 / bits)) {}

  std::int64_t vector, word, byte;
};

// The first column of a chunk, and how many it has.
struct Chunk {
  Chunk(std::int64_t chunk, std::int64_t columns, std::int64_t column_block, int bits) {
    const std::int64_t of_block = CodeChunks(column_block, bits), in_block = chunk % of_block * (512 / bits);
    begin = chunk / of_block * column_block + in_block;
    const std::int64_t of_columns = columns - begin, left = column_block - in_block;
    count = of_columns < left ? of_columns : left;
    if (count > 512 / bits) count = 512 / bits;
  }

  std::int64_t begin, count;
};

void PackSamples(const CodebookSamplesArgs& a, std::int64_t chunk_begin, std::int64_t chunk_end) noexcept {
  const int vectors = CodebookVectors(a.bits, a.mode);
  for (std::int64_t i = chunk_begin; i < chunk_end; ++i) {
    for (std::int64_t k = 0; k < vectors * 16 * a.width; ++k) Put(a.panel, i * vectors * 16 * a.width + k, 0.0f);
    const Chunk chunk(i, a.columns, a.column_block, a.bits);
    for (std::int64_t n = 0; n < a.samples; ++n) {
      for (std::int64_t c = 0; c < chunk.count; ++c) {
        const float x = Load(a.x, a.stored_as, n * a.columns + chunk.begin + c);
        const Place place(c, a.bits, a.mode);
        const std::int64_t word = WordOf(i * vectors + place.vector, n, place.word, a.width);
        if (a.mode == CodebookMode::kExact) Put(a.panel, word, x);
        if (a.mode == CodebookMode::kBFloat16) Put(a.panel, word, FromBFloat16(ToBFloat16(x)));
        if (a.mode != CodebookMode::kInt8) continue;
        const float inverse = At<float>(a.inverses, n);
        const auto q = static_cast<std::int8_t>(inverse == 0 ? 0 : __builtin_lrintf(x * inverse));
        Put(a.panel, 4 * word + place.byte, q);
        __atomic_fetch_add(a.sums + n, q, __ATOMIC_RELAXED);
      }
    }
  }
}

CodebookStatus Matmul(const CodebookMatmulArgs& a, std::int64_t row_begin, std::int64_t row_end) noexcept {
  const CodebookWeight& w = a.weight;
  const int bits = CodeBits(w.entries), vectors = CodebookVectors(bits, a.mode);
  const std::int64_t row_bytes = CodeRowBytes(w.columns, w.column_block, bits), chunks = row_bytes / kCodeChunkBytes;
  for (std::int64_t r = row_begin; r < row_end; ++r) {
    SampleScale scale{a.table_scale, a.table_inverse};
    if (a.mode == CodebookMode::kInt8 && w.per_row) {
      std::uint32_t largest = 0;
      for (std::int64_t k = 0; k < w.entries; ++k) {
        const auto bits_of = At<std::uint32_t>(w.codebook, r * w.entries + k) & 0x7fffffff;
        largest = bits_of > largest ? bits_of : largest;
      }
      scale = ScaleOf(largest);
    }
    for (std::int64_t n = 0; n < a.samples; ++n) {
      if (a.places != nullptr && a.places[n] < 0) continue;
      float sum = 0;
      std::int32_t integer_sum = 0;
      for (std::int64_t i = 0; i < chunks; ++i) {
        const Chunk chunk(i, w.columns, w.column_block, bits);
        const float* table = w.codebook + (w.per_row ? r : chunk.begin / w.column_block) * w.entries;
        for (std::int64_t c = 0; c < chunk.count; ++c) {
          const auto packed = At<std::uint32_t>(w.codes + r * row_bytes + i * kCodeChunkBytes, c % 16);
          const std::int64_t code = packed >> bits * (c / 16) & ((1u << bits) - 1);
          if (code >= w.entries) return CodebookStatus::kBadCode;
          const float value = At<float>(table, code);
          const Place place(c, bits, a.mode);
          const std::int64_t word = a.offsets == nullptr ? WordOf(i * vectors + place.vector, n, place.word, a.width)
                                                         : a.offsets[chunk.begin + c] + n;
          if (a.mode == CodebookMode::kExact) sum += value * At<float>(a.panel, word);
          if (a.mode == CodebookMode::kBFloat16) sum += FromBFloat16(ToBFloat16(value)) * At<float>(a.panel, word);
          if (a.mode != CodebookMode::kInt8) continue;
          const std::int64_t v = scale.inverse == 0 ? 0 : __builtin_lrintf(value * scale.inverse);
          integer_sum += static_cast<std::int32_t>(v * At<std::int8_t>(a.panel, 4 * word + place.byte));
        }
      }
      const float bias = a.bias == nullptr ? 0.0f : At<float>(a.bias, r);
      float y = sum + bias;
      if (a.mode == CodebookMode::kInt8) {
        const float of_sample = At<float>(a.sample_scales, n);
        const float lo = of_sample < scale.scale ? of_sample : scale.scale;
        const float hi = of_sample < scale.scale ? scale.scale : of_sample;
        y = __builtin_fmaf(static_cast<float>(integer_sum) * lo, hi, bias);
      }
      Store(a.y, a.y_stored_as, CodebookPlace(a, n, r), a.relu && y < 0 ? 0.0f : y);
    }
  }
  return CodebookStatus::kOk;
}

}  // namespace

const CodebookKernels kCodebookScalar = {PackSamples, Matmul};

}  // namespace tersetorch
