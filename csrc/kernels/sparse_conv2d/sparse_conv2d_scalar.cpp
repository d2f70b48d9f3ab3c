#include "kernels/common/scalars.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"

namespace tersetorch {
namespace {

using Index = std::int64_t;

Index Smaller(Index a, Index b) { return a < b ? a : b; }

struct Block {
  Block(const ConvWeight& w, Index i)
      : segment(At<std::int32_t>(w.blocks, 2 * i)),
        segment_end(At<std::int32_t>(w.blocks, 2 * i + 2)),
        begin(At<std::int32_t>(w.blocks, 2 * i + 1)),
        end(At<std::int32_t>(w.blocks, 2 * i + 3)) {}

  Index segment, segment_end, begin, end;
};

float Value(const ConvWeight& w, Index k) {
  switch (w.stored_as) {
    case ConvValues::kFloat32:
      return At<float>(w.values, k);
    case ConvValues::kBFloat16:
      return FromBFloat16(At<std::uint16_t>(w.values, k));
    default:
      return At<float>(w.codebook, At<std::uint8_t>(w.values, k));
  }
}

// Adds what non-zero k makes of x, a float or a word.
void Add(const ConvWeight& w, Index k, float x, float* sum) {
  switch (w.stored_as) {
    case ConvValues::kBFloat16Pairs:
      for (Index j = 0; j < 2; ++j) {
        *sum += FromBFloat16(At<std::uint16_t>(w.values, 2 * k + j)) * FromBFloat16(At<std::uint16_t>(&x, j));
      }
      return;
    case ConvValues::kInt8Quads:
      for (Index j = 0; j < 4; ++j) {
        const int product = At<std::int8_t>(w.values, 4 * k + j) * At<std::int8_t>(&x, j);
        Put(sum, 0, At<std::uint32_t>(sum, 0) + static_cast<std::uint32_t>(product));
      }
      return;
    default:
      *sum += Value(w, k) * x;
  }
}

ConvStatus Check(const ConvWeight& w) noexcept {
  const ConvShape& s = w.shape;
  const Index slots = ConvSlots(s).Count();
  const Index row_blocks = (s.out_channels + kConvRows - 1) / kConvRows;
  const Index channel_blocks = (s.in_channels + w.channel_block - 1) / w.channel_block;
  for (Index i = 0; i < channel_blocks * row_blocks; ++i) {
    const Block b(w, i);
    if (b.segment < 0 || b.segment_end < b.segment || b.segment_end > w.segment_count || b.begin < 0 ||
        b.end < b.begin || b.end > w.nnz) {
      return ConvStatus::kBadBlock;
    }
    const Index rows = Smaller(kConvRows, s.out_channels - i % row_blocks * kConvRows);
    const Index channels = Smaller(w.channel_block, s.in_channels - i / row_blocks * w.channel_block);
    Index count = 0;
    for (Index j = b.segment; j < b.segment_end; ++j) {
      const auto segment = At<std::uint32_t>(w.segments, j);
      if (segment >> 16 >= static_cast<std::uint32_t>(rows)) return ConvStatus::kBadSegment;
      count += segment & 0xffff;
    }
    if (count != b.end - b.begin) return ConvStatus::kBadSegment;
    for (Index k = b.begin; k < b.end; ++k) {
      if (At<std::uint16_t>(w.indices, k) > channels * s.kernel_w * slots - kConvTileRows) return ConvStatus::kBadIndex;
      if (w.stored_as == ConvValues::kCodes && At<std::uint8_t>(w.values, k) >= w.entries) return ConvStatus::kBadCode;
    }
  }
  return ConvStatus::kOk;
}

void Planes(const ConvPlanesArgs& a, Index begin, Index end) noexcept {
  for (Index c = 0; c < a.channels; ++c) {
    for (Index i = begin; i < end; ++i) {
      a.planes[c * a.pixels + i] = Load(a.x, a.stored_as, a.channels_last ? i * a.channels + c : c * a.pixels + i);
    }
  }
}

float X(const ConvArgs& a, Index c, Index row, Index column) {
  if (row < 0 || row >= a.height || column < 0 || column >= a.width) return 0;
  return At<float>(a.planes, (c * a.height + row) * a.width + column);
}

void Convolve(const ConvArgs& a, Index tile, Index row_begin, Index row_end) noexcept {
  const ConvWeight& w = a.weight;
  const ConvShape& s = w.shape;
  const ConvPlan& p = a.plan;
  const ConvSlots slots(s);
  const Index slot_count = slots.Count(), row_blocks = (s.out_channels + kConvRows - 1) / kConvRows;
  const Index down = tile / p.tiles_across, across = tile % p.tiles_across;
  // The tile's outputs.
  const Index i_begin = p.line ? 0 : down * p.parts * p.tile_rows;
  const Index i_end = p.line ? 1 : Smaller(i_begin + p.parts * p.tile_rows, a.out_height);
  const Index j_begin = p.line ? down * p.tile_rows * p.lanes : across * p.columns;
  const Index j_end = Smaller(j_begin + (p.line ? p.tile_rows * p.lanes : p.columns), a.out_width);
  const Index height = i_end > i_begin ? i_end - i_begin : 0, width = j_end - j_begin, size = height * width;

  const bool quads = w.stored_as == ConvValues::kInt8Quads;
  const Index filters = Smaller(row_end * kConvRows, s.out_channels) - row_begin * kConvRows;
  for (Index r = 0; r < filters; ++r) {
    for (Index i = 0; i < size; ++i) {
      a.sums[r * size + i] = quads || a.bias == nullptr ? 0.0f : At<float>(a.bias, row_begin * kConvRows + r);
    }
  }
  for (Index first = 0, block = 0; first < s.in_channels; first += w.channel_block, block += row_blocks) {
    for (Index row_block = row_begin; row_block < row_end; ++row_block) {
      const Block b(w, block + row_block);
      Index k = b.begin;
      for (Index segment = b.segment; segment < b.segment_end; ++segment) {
        const auto row_and_count = At<std::uint32_t>(w.segments, segment);
        float* sums = a.sums + ((row_block - row_begin) * kConvRows + (row_and_count >> 16)) * size;
        for (const Index end = k + (row_and_count & 0xffff); k < end; ++k) {
          const Index index = At<std::uint16_t>(w.indices, k), slot = index % slot_count;
          const Index c = first + index / slot_count / s.kernel_w, kw = index / slot_count % s.kernel_w;
          Index kh = 0;
          while (kh + 1 < s.kernel_h && slots.Slot(kh) != slot) ++kh;
          for (Index i = 0; i < height; ++i) {
            for (Index j = 0; j < width; ++j) {
              const float x = X(a, c, (i_begin + i) * s.stride_h + kh * s.dilation_h - a.pad_h,
                                (j_begin + j) * s.stride_w + kw * s.dilation_w - a.pad_w);
              Add(w, k, x, sums + i * width + j);
            }
          }
        }
      }
    }
  }
  for (Index r = 0; r < filters; ++r) {
    const Index o = row_begin * kConvRows + r;
    for (Index i = 0; i < height; ++i) {
      for (Index j = 0; j < width; ++j) {
        float sum = a.sums[r * size + i * width + j];
        if (quads) {
          const auto integer = static_cast<float>(At<std::int32_t>(&sum, 0));
          sum = __builtin_fmaf(integer * At<float>(a.row_scales, o), a.image_scale,
                               a.bias == nullptr ? 0.0f : At<float>(a.bias, o));
        }
        const Index place = (i_begin + i) * a.out_width + j_begin + j;
        Store(a.y, a.stored_as, a.channels_last ? place * s.out_channels + o : o * a.out_height * a.out_width + place,
              a.relu && sum < 0 ? 0.0f : sum);
      }
    }
  }
}

}  // namespace

const ConvKernels kConvScalar{8, 0, Check, Planes, Convolve};

}  // namespace tersetorch
