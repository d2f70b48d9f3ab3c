// Chooses the level, and walks through the rows of a chain of stages.
#include "kernels/flat_conv2d/flat_conv2d.h"

#include "kernels/common/cpu_isa.h"

namespace tersetorch {
namespace {

using Index = std::int64_t;

// Pixels that are worked on at once: enough that what is left over of a tile costs little and that rows of y share rows
// of l, and so few that what they need fits the second cache level.
constexpr Index kLeastPixels = 96, kMostPixels = 192, kNumbers = 24 * 1024;
constexpr Index kMostRows = 16;

const FlatKernels& Active() {
  switch (ProcessCpuIsa().active) {
    case CpuIsa::kAvx512Bf16:
    case CpuIsa::kAvx512:
      return kFlatAvx512;
    case CpuIsa::kAvx2:
      return kFlatAvx2;
    case CpuIsa::kScalar:
      break;
  }
  return kFlatScalar;
}

Index Smaller(Index a, Index b) { return a < b ? a : b; }
Index Larger(Index a, Index b) { return a > b ? a : b; }
Index Parts(Index size, Index part) { return (size + part - 1) / part; }
// Arrays begin with a cache line.
Index Floats(Index count) { return Parts(count, kFlatLanes) * kFlatLanes; }

bool TakesAsIs(const FlatImage<const void>& x) { return x.channels_last && x.stored_as == FloatDtype::kFloat32; }
bool GivesAsIs(const FlatConvArgs& a) {
  return a.y.channels_last && a.y.stored_as == FloatDtype::kFloat32 &&
         a.stages[a.count - 1].out_channels % kFlatLanes == 0;
}

// Rows of width pixels that are worked on at once.
Index RowsAtOnce(Index width, Index height, Index maps) {
  const Index pixels = Larger(kLeastPixels, Smaller(kMostPixels, kNumbers / Larger(maps, 1)));
  return Smaller(Smaller(Parts(pixels, width), kMostRows), Larger(height, 1));
}

// Where the arrays of a stage begin.
struct Numbers {
  explicit Numbers(const FlatStage& s) {
    const Index lanes = s.rank * s.Panels() * kFlatLanes;
    lateral = s.packed;
    lateral_bias = lateral + lanes * s.in_channels;
    vertical = lateral_bias + lanes;
    vertical_bias = vertical + lanes * s.kernel_h;
    horizontal = vertical_bias + lanes;
    bias = horizontal + lanes * s.kernel_w;
  }
  const float *lateral, *lateral_bias, *vertical, *vertical_bias, *horizontal, *bias;
};

// The memory of a stage for so many panels of each rank, in floats.
struct Memory {
  Memory() = default;
  Memory(const FlatConvArgs& args, Index s, Index panels, Index from) {
    const FlatStage& stage = args.stages[s];
    // Of all panels, so that what is enough for them is enough for a part.
    const Index maps = stage.rank * stage.Panels() * kFlatLanes;
    batch = RowsAtOnce(stage.width, stage.height, maps);
    made = RowsAtOnce(stage.out_width, stage.out_height, maps);
    rows = (Parts((made - 1) * stage.stride_h + stage.kernel_h - 1, batch) + 1) * batch;
    row = stage.width * kFlatLanes;
    // One line more, so that panels do not share the sets of the cache.
    panel = rows * row + kFlatLanes;
    ring = from;
    zeros = ring + stage.rank * panels * panel;
    pixels = zeros + row;
    step = Floats(stage.in_channels);
    end = pixels + (s == 0 && TakesAsIs(args.x) ? 0 : batch * stage.width * step);
  }

  Index batch, made;                // rows that are multiplied at once, and rows that are made of them
  Index rows;                       // of the ring, a multiple of batch
  Index row, panel;                 // numbers from one row of the ring to the next, and from one panel
  Index ring, zeros, pixels, step;  // step: from one of the pixels to the next
  Index end;
};

class Walk {
 public:
  Walk(const FlatKernels& kernels, const FlatConvArgs& args, Index panel_begin, Index panel_end, float* scratch)
      : kernels_(kernels), args_(args), panel_begin_(panel_begin), panels_(panel_end - panel_begin), scratch_(scratch) {
    for (Index s = 0; s < args.count; ++s) {
      memory_[s] =
          Memory(args, s, s + 1 == args.count ? panels_ : args.stages[s].Panels(), s == 0 ? 0 : memory_[s - 1].end);
      for (Index i = 0; i < memory_[s].row; ++i) scratch[memory_[s].zeros + i] = 0;
    }
  }

  void Rows(Index begin, Index end) {
    const Index last = args_.count - 1;
    const FlatStage& stage = args_.stages[last];
    Index stop = end;
    for (Index s = last; s >= 0; --s) {
      const FlatStage& of = args_.stages[s];
      stop = Larger(0, Smaller(of.height, (stop - 1) * of.stride_h - of.pad_h + of.kernel_h));
      next_[s] = 0;
      stop_[s] = stop;
    }
    const Index first = panel_begin_ * kFlatLanes;
    if (GivesAsIs(args_)) {
      float* y = static_cast<float*>(args_.y.data) + begin * stage.out_width * args_.y.step + first;
      return Make(last, begin, end, y, args_.y.step);
    }
    const Index step = panels_ * kFlatLanes, batch = memory_[last].made;
    const Index bytes = args_.y.stored_as == FloatDtype::kFloat32 ? 4 : 2;
    FlatImage<void> y = args_.y;
    y.data = static_cast<char*>(y.data) + first * (y.channels_last ? 1 : y.step) * bytes;
    float* made = scratch_ + memory_[last].end;
    for (Index row = begin; row < end; row += batch) {
      const Index count = Smaller(batch, end - row);
      Make(last, row, row + count, made, step);
      kernels_.store(
          {made, step, row * stage.out_width, count * stage.out_width, Smaller(step, stage.out_channels - first), y});
    }
  }

 private:
  // Rows [begin, end) of what stage s gives; begin is no smaller than any end before.
  void Make(Index s, Index begin, Index end, float* to, Index step) {
    const FlatStage& stage = args_.stages[s];
    const Memory& memory = memory_[s];
    const Numbers numbers(stage);
    const bool last = s == args_.count - 1;
    const Index first = last ? panel_begin_ * kFlatLanes : 0, panels = last ? panels_ : stage.Panels();
    const float* rows[kMostRows * kFlatMaxKernel];
    const Index row_step = stage.out_width * step;
    for (Index i = begin; i < end; i += memory.made, to += memory.made * row_step) {
      const Index count = Smaller(memory.made, end - i), top = i * stage.stride_h - stage.pad_h;
      const Index bottom = top + (count - 1) * stage.stride_h + stage.kernel_h;
      next_[s] = Larger(next_[s], top);
      while (next_[s] < Smaller(bottom, stage.height)) Multiply(s, panels, first);
      for (Index k = 0; k < count * stage.kernel_h; ++k) {
        const Index row = top + k / stage.kernel_h * stage.stride_h + k % stage.kernel_h;
        const bool inside = 0 <= row && row < stage.height;
        rows[k] = inside ? scratch_ + memory.ring + row % memory.rows * memory.row : nullptr;
      }
      kernels_.planes({rows,
                       count,
                       scratch_ + memory.zeros,
                       memory.panel,
                       panels,
                       stage.rank,
                       stage.kernel_h,
                       stage.kernel_w,
                       stage.stride_w,
                       stage.pad_w,
                       stage.width,
                       stage.out_width,
                       numbers.vertical + first * stage.kernel_h,
                       numbers.vertical_bias + first,
                       numbers.horizontal + first * stage.kernel_w,
                       numbers.bias + first,
                       stage.Panels(),
                       last && args_.relu,
                       to,
                       row_step,
                       step});
    }
  }

  // The next rows of stage s into its ring.
  void Multiply(Index s, Index panels, Index first) {
    const FlatStage& stage = args_.stages[s];
    const Memory& memory = memory_[s];
    const Numbers numbers(stage);
    const Index begin = next_[s], end = Smaller((begin / memory.batch + 1) * memory.batch, stop_[s]);
    const Index first_pixel = begin * stage.width, pixels = (end - begin) * stage.width;
    const float* x = scratch_ + memory.pixels;
    Index step = memory.step;
    if (s > 0) {
      Make(s - 1, begin, end, scratch_ + memory.pixels, step);
    } else if (TakesAsIs(args_.x)) {
      step = args_.x.step;
      x = static_cast<const float*>(args_.x.data) + first_pixel * step;
    } else {
      kernels_.load({args_.x, stage.in_channels, first_pixel, pixels, scratch_ + memory.pixels, step});
    }
    // All ranks at once where their panels follow each other.
    const bool all = panels == stage.Panels();
    float* ring = scratch_ + memory.ring + begin % memory.rows * memory.row;
    for (Index r = 0; r < (all ? 1 : stage.rank); ++r) {
      const Index maps = first + r * stage.Panels() * kFlatLanes;
      kernels_.lateral({x, step, pixels, stage.in_channels, numbers.lateral + maps * stage.in_channels,
                        numbers.lateral_bias + maps, all ? stage.rank * panels : panels,
                        ring + r * panels * memory.panel, memory.panel});
    }
    next_[s] = end;
  }

  const FlatKernels& kernels_;
  const FlatConvArgs& args_;
  Index panel_begin_, panels_;
  float* scratch_;
  Memory memory_[kFlatMaxStages];
  Index next_[kFlatMaxStages], stop_[kFlatMaxStages];  // rows that a stage takes: the next one, and the end
};

}  // namespace

Index FlatScratchBytes(const FlatConvArgs& args) noexcept {
  Index floats = 0, made = 0;
  for (Index s = 0; s < args.count; ++s) {
    const Memory memory(args, s, args.stages[s].Panels(), floats);
    floats = memory.end, made = memory.made;
  }
  const FlatStage& last = args.stages[args.count - 1];
  if (!GivesAsIs(args)) floats += made * last.out_width * last.Panels() * kFlatLanes;
  return floats * Index{sizeof(float)};
}

void FlatConv2d(const FlatKernels& kernels, const FlatConvArgs& args, Index row_begin, Index row_end, Index panel_begin,
                Index panel_end, void* scratch) noexcept {
  Walk(kernels, args, panel_begin, panel_end, static_cast<float*>(scratch)).Rows(row_begin, row_end);
}

void FlatConv2d(const FlatConvArgs& args, Index row_begin, Index row_end, Index panel_begin, Index panel_end,
                void* scratch) noexcept {
  FlatConv2d(Active(), args, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace tersetorch
