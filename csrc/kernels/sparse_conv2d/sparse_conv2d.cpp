#include "kernels/sparse_conv2d/sparse_conv2d.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

const ConvKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
      return kConvAvx512Bf16;
    case CpuIsa::kAvx512:
      return kConvAvx512;
    case CpuIsa::kAvx2:
      return kConvAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kConvScalar;
}

std::int64_t Parts(std::int64_t size, std::int64_t part) { return (size + part - 1) / part; }
std::int64_t Smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Fills in the rows of a tile for `units` rows of vectors.
void CutDown(ConvPlan& plan, std::int64_t units) {
  plan.tiles_down = Parts(units, kConvTileRows);
  plan.tile_rows = plan.tiles_down == 0 ? 1 : Parts(units, plan.tiles_down);
}

}  // namespace

std::int64_t ConvChannelBlock(const ConvShape& s) noexcept {
  constexpr std::int64_t kBufferBytes = 24 * 1024;
  const std::int64_t vectors = s.kernel_w * ConvSlots(s).Count();
  const std::int64_t most = kConvMaxIndex / vectors, taps = (kConvMaxIndex - 1) / (s.kernel_h * s.kernel_w);
  const std::int64_t wanted = kBufferBytes / (vectors * kConvMaxLanes * std::int64_t{sizeof(float)});
  const std::int64_t channels = Smaller(Smaller(most, taps), Smaller(wanted < 1 ? 1 : wanted, s.in_channels));
  return channels < 1 ? 1 : channels;
}

std::int64_t ConvLanes() noexcept { return Active().lanes; }

std::int32_t ConvQuadOffset() noexcept { return Active().quad_offset; }

ConvPlan ConvPlanFor(const ConvShape& s, std::int64_t nnz, std::int64_t pad_h, std::int64_t out_height,
                     std::int64_t out_width, std::int64_t lanes) noexcept {
  // The one row of y is then the first row of x; with padding above, it would be a row of zeros.
  if (out_height == 1 && s.kernel_h == 1 && pad_h == 0) {
    ConvPlan plan{true, lanes, lanes, 1, 1, 1, 0};
    CutDown(plan, Parts(out_width, lanes));
    return plan;
  }
  const ConvSlots slots(s);
  ConvPlan best{};
  std::int64_t least = INT64_MAX;
  for (std::int64_t columns = lanes; columns >= 4; columns /= 2) {
    ConvPlan plan{false, lanes, columns, lanes / columns, 1, Parts(out_width, columns), 0};
    CutDown(plan, Parts(out_height, plan.parts));
    // In quarters of a load: what a non-zero costs is its vectors, its value and its share of an index. A part of a
    // vector that is packed costs as much as 8 loads.
    std::int64_t slot_rows = 0;
    for (std::int64_t i = 0; i < slots.period; ++i) slot_rows += slots.Rows(i, plan.tile_rows);
    const std::int64_t of_tile =
        nnz * (4 * plan.tile_rows + 5) + 32 * s.in_channels * s.kernel_w * slot_rows * plan.parts;
    const std::int64_t cost = plan.tiles_across * plan.tiles_down * of_tile;
    if (cost < least) {
      least = cost;
      best = plan;
    }
  }
  return best;
}

ConvScratchSizes ConvScratch(const ConvWeight& w, const ConvPlan& plan) noexcept {
  const ConvShape& s = w.shape;
  const std::int64_t pitch = plan.columns + (s.kernel_w - 1) * s.dilation_w / s.stride_w + 1;
  return {w.channel_block * s.kernel_w * ConvSlots(s).Count() * plan.lanes, s.stride_w * pitch,
          kConvRows * plan.tile_rows * plan.lanes};
}

ConvStatus ConvCheck(const ConvWeight& weight) noexcept { return Active().check(weight); }

void ConvPlanes(const ConvPlanesArgs& args, std::int64_t begin, std::int64_t end) noexcept {
  Active().planes(args, begin, end);
}

void Conv(const ConvArgs& args, std::int64_t tile, std::int64_t row_begin, std::int64_t row_end) noexcept {
  Active().conv(args, tile, row_begin, row_end);
}

void ConvPack(const ConvPackArgs& a) noexcept {
  const ConvShape& s = a.shape;
  const ConvSlots slots(s);
  const std::int64_t rows = s.out_channels, taps = s.kernel_h * s.kernel_w, per_channel = s.kernel_w * slots.Count();
  const std::int64_t channel_blocks = Parts(s.in_channels, a.channel_block), row_blocks = Parts(rows, kConvRows);
  const std::int64_t group_rows = rows / s.groups, group_channels = s.in_channels / s.groups;

  // counts[j][r]: non-zeros of filter r in channel block j; later, where the next of them goes.
  std::int32_t* counts = a.scratch;
  std::int32_t* slot_of = counts + channel_blocks * rows;
  for (std::int64_t i = 0; i < channel_blocks * rows; ++i) counts[i] = 0;
  for (std::int64_t kh = 0; kh < s.kernel_h; ++kh) slot_of[kh] = static_cast<std::int32_t>(slots.Slot(kh));
  const auto channel = [&](std::int64_t r, std::int64_t column) {
    return r / group_rows * group_channels + column / taps;
  };
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = a.row_offsets[r]; k < a.row_offsets[r + 1]; ++k) {
      ++counts[channel(r, a.col_indices[k]) / a.channel_block * rows + r];
    }
  }

  std::int32_t segment = 0, next = 0;
  for (std::int64_t j = 0; j < channel_blocks; ++j) {
    for (std::int64_t block = 0; block < row_blocks; ++block) {
      std::int32_t* start = a.blocks + 2 * (j * row_blocks + block);
      start[0] = segment;
      start[1] = next;
      const std::int64_t first = block * kConvRows, count = Smaller(kConvRows, rows - first);
      std::int32_t* of_row = counts + j * rows + first;
      std::int32_t* segments = a.segments + segment;
      std::int64_t used = 0;
      for (std::int64_t r = 0; r < count; ++r) {
        if (of_row[r] == 0) continue;
        std::int64_t at = used++;
        for (; at > 0 && (segments[at - 1] & 0xffff) < of_row[r]; --at) segments[at] = segments[at - 1];
        segments[at] = static_cast<std::int32_t>(r << 16) | of_row[r];
      }
      for (std::int64_t i = 0; i < used; ++i) {
        of_row[segments[i] >> 16] = next;
        next += segments[i] & 0xffff;
      }
      segment += static_cast<std::int32_t>(used);
    }
  }
  std::int32_t* end = a.blocks + 2 * channel_blocks * row_blocks;
  end[0] = segment;
  end[1] = next;

  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = a.row_offsets[r]; k < a.row_offsets[r + 1]; ++k) {
      const std::int64_t c = channel(r, a.col_indices[k]), tap = a.col_indices[k] % taps;
      const std::int64_t j = c / a.channel_block;
      const std::int64_t place = (c - j * a.channel_block) * per_channel + tap % s.kernel_w * slots.Count();
      const std::int32_t to = counts[j * rows + r]++;
      a.indices[to] = static_cast<std::uint16_t>(place + slot_of[tap / s.kernel_w]);
      a.sources[to] = static_cast<std::int32_t>(k);
    }
  }
}

}  // namespace tersetorch
