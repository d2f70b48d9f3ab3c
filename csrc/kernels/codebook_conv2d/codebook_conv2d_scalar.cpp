#include "kernels/codebook_conv2d/codebook_conv2d.h"
#include "kernels/common/scalars.h"

namespace tersetorch {
namespace {

void Pad(const CodebookPadArgs& a, std::int64_t channel_begin, std::int64_t channel_end) noexcept {
  const CodebookWindowShape& s = a.shape;
  const std::int64_t columns = CodebookPhaseColumns(a.width, a.pad_w, s.stride_w), rows = a.height + 2 * a.pad_h;
  for (std::int64_t c = channel_begin; c < channel_end; ++c) {
    for (std::int64_t h = 0; h < rows; ++h) {
      for (std::int64_t i = 0; i < columns * s.stride_w; ++i) {
        const std::int64_t from_h = h - a.pad_h, from_w = i % columns * s.stride_w + i / columns - a.pad_w;
        const bool inside = 0 <= from_h && from_h < a.height && 0 <= from_w && from_w < a.width;
        const float x = inside ? Load(a.x, a.stored_as, (c * a.height + from_h) * a.width + from_w) : 0.0f;
        const std::int64_t to = (c * rows + h) * columns * s.stride_w + i;
        if (a.integer) {
          Put(a.padded, to, static_cast<std::int8_t>(a.inverse == 0 ? 0 : __builtin_lrintf(x * a.inverse)));
        } else {
          Put(a.padded, to, x);
        }
      }
    }
  }
}

void PackWindows(const CodebookWindowsArgs& a, std::int64_t chunk_begin, std::int64_t chunk_end) noexcept {
  const CodebookWindowShape& s = a.shape;
  const int vectors = CodebookVectors(a.bits, a.mode);
  const std::int64_t taps = s.kernel_h * s.kernel_w, columns = a.channels * taps;
  const std::int64_t of_block = CodeChunks(a.column_block, a.bits), of_chunk = 512 / a.bits;
  for (std::int64_t i = chunk_begin; i < chunk_end; ++i) {
    for (std::int64_t k = 0; k < vectors * 16 * a.width; ++k) Put(a.panel, i * vectors * 16 * a.width + k, 0.0f);
    const std::int64_t begin = i / of_block * a.column_block + i % of_block * of_chunk;
    std::int64_t end = begin + of_chunk;
    if (end > (i / of_block + 1) * a.column_block) end = (i / of_block + 1) * a.column_block;
    if (end > columns) end = columns;
    for (std::int64_t n = 0; n < a.count; ++n) {
      const std::int64_t output = a.first + n, row = output / a.out_width;
      const std::int64_t image = row / a.out_height, down = row % a.out_height * s.stride_h;
      for (std::int64_t column = begin; column < end; ++column) {
        const std::int64_t c = column / taps, kh = column % taps / s.kernel_w, kw = column % s.kernel_w;
        const std::int64_t right = output % a.out_width + kw * s.dilation_w / s.stride_w;
        const std::int64_t from = image * a.image_step + c * a.channel_step + (down + kh * s.dilation_h) * a.row_step +
                                  kw * s.dilation_w % s.stride_w * a.phase_step + right;
        const std::int64_t in_chunk = column - begin, vector = in_chunk / 16, l = in_chunk % 16;
        // As codebook_matmul.h lays panels out.
        const std::int64_t v = i * vectors + (a.mode == CodebookMode::kInt8 ? vector % (8 / a.bits) : vector);
        const std::int64_t in_vector = a.width <= kCodebookFewSamples ? n * 16 + l : l * a.width + n;
        const std::int64_t word = v * 16 * a.width + in_vector;
        if (a.mode == CodebookMode::kInt8) {
          const auto q = At<std::int8_t>(a.images, from);
          Put(a.panel, 4 * word + vector / (8 / a.bits), q);
          __atomic_fetch_add(a.sums + n, q, __ATOMIC_RELAXED);
        } else {
          const float x = At<float>(a.images, from);
          Put(a.panel, word, a.mode == CodebookMode::kExact ? x : FromBFloat16(ToBFloat16(x)));
        }
      }
    }
  }
}

}  // namespace

const CodebookConvKernels kCodebookConvScalar = {Pad, PackWindows};

}  // namespace tersetorch
