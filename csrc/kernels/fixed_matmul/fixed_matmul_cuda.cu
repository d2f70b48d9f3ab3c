#include "kernels/common/cuda.cuh"
#include "kernels/common/fixed_sums.h"
#include "kernels/common/tensor_cores.cuh"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"

namespace tersetorch {
namespace {

constexpr int kPanelRows = static_cast<int>(kFixedPanel);

// ---- words: 4 numbers of 8 bits or 2 of 16

template <typename Whole>
constexpr int kOfWord = static_cast<int>(kFixedWord / sizeof(Whole));

// Number i of x: the branch is the same for all threads, types for it would multiply the kernels.
__device__ int NumberAt(const FixedCudaArgs& a, std::int64_t i) {
  return a.x_wide ? static_cast<const std::int16_t*>(a.x)[i] : static_cast<const std::int8_t*>(a.x)[i];
}

// Columns [c, c + 4 or 2) of the sample at number `from` of x, 0 past the last; kWhole where samples are whole words:
// then loads need no branches between them, and wait for memory together.
template <typename Whole, bool kWhole>
__device__ std::uint32_t WordAt(const FixedCudaArgs& a, std::int64_t from, int c) {
  const std::int64_t i = from + c;
  if constexpr (kWhole) {
    return c < a.columns ? *reinterpret_cast<const std::uint32_t*>(static_cast<const Whole*>(a.x) + i) : 0;
  }
  std::uint32_t word = 0;
  for (int k = 0; k < kOfWord<Whole> && c + k < a.columns; ++k) {
    const auto bits = static_cast<std::uint32_t>(NumberAt(a, i + k)) & (0xffffffffu >> (32 - 8 * sizeof(Whole)));
    word |= bits << 8 * sizeof(Whole) * k;
  }
  return word;
}

template <typename Whole>
bool WholeWords(const FixedCudaArgs& a) {
  return a.x_wide == a.wide && reinterpret_cast<std::uintptr_t>(a.x) % kFixedWord == 0 &&
         a.columns % kOfWord<Whole> == 0;
}

// Columns and words fit 32 bits: kFixedMaxColumns does.
template <typename Whole>
__device__ int WordsOf(const FixedCudaArgs& a) {
  return (static_cast<int>(a.columns) + kOfWord<Whole> - 1) / kOfWord<Whole>;
}

// Words of a matrix from that of a row on; the rows of a panel lie side by side.
template <typename Whole>
__device__ const std::uint32_t* PackedFrom(const FixedCudaArgs& a, std::int64_t row) {
  return static_cast<const std::uint32_t*>(a.packed) + row / kPanelRows * ((WordsOf<Whole>(a) + 1) * kPanelRows) +
         row % kPanelRows;
}

// sum += the products of two words. 2^14 of them fit 32 bits where the numbers have 8.
__device__ inline void AddProducts(int& sum, std::uint32_t x, std::uint32_t w) {
  sum = __dp4a(static_cast<int>(x), static_cast<int>(w), sum);
}
__device__ inline void AddProducts(long long& sum, std::uint32_t x, std::uint32_t w) {
  const auto low = [](std::uint32_t word) { return static_cast<int>(static_cast<std::int16_t>(word & 0xffff)); };
  sum += static_cast<long long>(low(x)) * low(w);
  sum += static_cast<long long>(low(x >> 16)) * low(w >> 16);
}

template <typename Whole>
struct SumOf {
  using Type = long long;
};
template <>
struct SumOf<std::int8_t> {
  using Type = int;
};

// ---- a few samples: a block multiplies a panel with them, each thread one word of four rows

template <typename Whole, bool kWhole>
struct FewTile {
  static constexpr int kSamples = sizeof(Whole) == 1 ? 4 : 2, kWarps = 16, kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 4;                     // of a thread, 16 bytes of a word
  static constexpr int kAcross = kPanelRows / kRows;  // threads of a word
  static constexpr int kParts = kThreads / kAcross;   // of the words
  static constexpr int kWords =
      sizeof(Whole) == 1 && kWhole ? 4 : 2;  // of a thread, on their way before the first is needed
  static constexpr int kChunk = 1 << 14;     // words, then sums become 64 bits wide
  static_assert(kSamples * kPanelRows <= kThreads, "a thread adds the warps' sums of a row and sample");

  struct Memory {
    long long of_warp[kWarps][kSamples][kPanelRows];
  };
};

template <typename Tile, typename Whole, bool kWhole>
__global__ void __launch_bounds__(Tile::kThreads, 2) MultiplyFew(FixedCudaArgs a) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), row = thread % Tile::kAcross * Tile::kRows;
  const int part = thread / Tile::kAcross, warp = thread / kWarpSize;
  const int words = WordsOf<Whole>(a);
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kPanelRows;
  const std::uint32_t* w = PackedFrom<Whole>(a, first_row + row);
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const auto samples = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    int begin = 0;
    do {
      const int end = min(words, begin + Tile::kChunk);
      typename SumOf<Whole>::Type sums[Tile::kSamples][Tile::kRows] = {};
      for (int i = begin + part; i < end; i += Tile::kWords * Tile::kParts) {
        uint4 of_w[Tile::kWords];
#pragma unroll
        for (int k = 0; k < Tile::kWords; ++k) {
          const int word = i + k * Tile::kParts;
          of_w[k] = word < end ? *reinterpret_cast<const uint4*>(w + word * kPanelRows) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) {
          if (s >= samples) break;
#pragma unroll
          for (int k = 0; k < Tile::kWords; ++k) {
            const std::uint32_t x =
                WordAt<Whole, kWhole>(a, (first + s) * a.columns, (i + k * Tile::kParts) * kOfWord<Whole>);
            AddProducts(sums[s][0], x, of_w[k].x);
            AddProducts(sums[s][1], x, of_w[k].y);
            AddProducts(sums[s][2], x, of_w[k].z);
            AddProducts(sums[s][3], x, of_w[k].w);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < Tile::kSamples; ++s) {
        if (s >= samples) break;
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
          auto sum = sums[s][r];
#pragma unroll
          for (int distance = Tile::kAcross; distance < kWarpSize; distance *= 2) {
            sum += __shfl_xor_sync(kWholeWarp, sum, distance);
          }
          auto& of_warp = memory.of_warp[warp][s][row + r];
          if (thread % kWarpSize < Tile::kAcross) of_warp = begin == 0 ? sum : of_warp + sum;
        }
      }
      begin += Tile::kChunk;
    } while (begin < words);
    __syncthreads();
    const int s = thread / kPanelRows, of_panel = thread % kPanelRows;  // beyond the samples are threads without any
    if (s < samples && first_row + of_panel < a.rows) {
      long long sum = 0;
      for (int one = 0; one < Tile::kWarps; ++one) sum += memory.of_warp[one][s][of_panel];
      a.sums[(first + s) * a.rows + first_row + of_panel] = sum;
    }
    __syncthreads();
  }
}

// ---- many samples: a block multiplies some rows with some samples; each half of it has half of the words, and the
// samples come through shared memory

// The words of samples that a thread brings for the next step: one of every so many lines. Whole ones are on their way
// during this step; others are read when they are put.
template <typename Tile, typename Whole>
struct NextWords {
  static constexpr int kStride = Tile::kThreads / Tile::kWords, kCount = Tile::kSamples / kStride;
  static_assert(kCount * kStride == Tile::kSamples, "whole loads");
  std::uint32_t of_x[kCount];

  // A warp brings kWordsOfWarp words of each of some lines.
  static constexpr int kOfWarp = Tile::kWordsOfWarp, kWarpsOfLine = Tile::kWords / kOfWarp;
  __device__ static int Word() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / kWarpSize % kWarpsOfLine * kOfWarp + thread % kOfWarp;
  }
  __device__ static int Line() {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / kWarpSize / kWarpsOfLine * (kWarpSize / kOfWarp) + thread % kWarpSize / kOfWarp;
  }

  __device__ void Load(const FixedCudaArgs& a, bool whole, std::int64_t first, int word) {
    if (!whole) return;
    const int c = (word + Word()) * kOfWord<Whole>;
    const auto lines = static_cast<int>(min(std::int64_t{Tile::kSamples}, a.samples - first));
    const auto* at = static_cast<const Whole*>(a.x) + (first + Line()) * a.columns + c;
#pragma unroll
    for (int i = 0; i < kCount; ++i, at += kStride * a.columns) {
      const bool there = c < a.columns && i * kStride + Line() < lines;
      of_x[i] = there ? *reinterpret_cast<const std::uint32_t*>(at) : 0;
    }
  }
  // Calls put with each line and its word.
  template <typename Put>
  __device__ void ForEach(const FixedCudaArgs& a, bool whole, std::int64_t first, int word, const Put& put) const {
    if (whole) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) put(i * kStride + Line(), of_x[i]);
    } else {
#pragma unroll 1
      for (int line = Line(); line < Tile::kSamples; line += kStride) {
        const std::int64_t n = first + line;
        const int c = (word + Word()) * kOfWord<Whole>;
        put(line, n < a.samples ? WordAt<Whole, false>(a, n * a.columns, c) : 0);
      }
    }
  }
};

// Of int16, whose sums take 64 bits.
struct WideTile {
  static constexpr int kRows = 32, kSamples = 64, kWords = 32;  // so many words of each at a time
  static constexpr int kWordsOfWarp = 8;                        // a sector
  static constexpr int kSide = 4;                               // a thread has 4 rows and 4 samples
  static constexpr int kHalf = kRows / kSide * (kSamples / kSide), kThreads = 2 * kHalf;
  static_assert(kRows * kWords == kSide * kThreads, "a thread brings a word of 4 rows");

  // Lines side by side, and some more, so that 8 words of 4 of them lie in different banks.
  struct Memory {
    alignas(16) std::uint32_t w[kWords][kRows + kSide];
    alignas(16) std::uint32_t x[kWords][kSamples + kSide];
    long long of_half[kSide * kSide][kHalf];
  };
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyWide(FixedCudaArgs a, bool whole) {
  constexpr int kAcross = Tile::kRows / Tile::kSide;
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), half = thread / Tile::kHalf, in_half = thread % Tile::kHalf;
  const int row = thread % kAcross * Tile::kSide, sample = in_half / kAcross * Tile::kSide;
  const int words = WordsOf<std::int16_t>(a);
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  const bool has_rows = first_row + row / kPanelRows * kPanelRows < a.rows;
  const std::uint32_t* w = PackedFrom<std::int16_t>(a, first_row + row);
  const auto of_w_from = [&](int word) {
    word += thread / kAcross;
    return has_rows && word < words ? *reinterpret_cast<const uint4*>(w + word * kPanelRows) : uint4{0, 0, 0, 0};
  };
  using Next = NextWords<Tile, std::int16_t>;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    Next next;
    next.Load(a, whole, first, 0);
    uint4 next_w = of_w_from(0);
    long long sums[Tile::kSide][Tile::kSide] = {};
    for (int begin = 0; begin < words; begin += Tile::kWords) {
      __syncthreads();
      *reinterpret_cast<uint4*>(&memory.w[thread / kAcross][row]) = next_w;
      next.ForEach(a, whole, first, begin, [&](int line, std::uint32_t x) { memory.x[Next::Word()][line] = x; });
      __syncthreads();
      next.Load(a, whole, first, begin + Tile::kWords);
      next_w = of_w_from(begin + Tile::kWords);
#pragma unroll 2
      for (int word = half; word < Tile::kWords; word += 2) {
        const uint4 of_w = *reinterpret_cast<const uint4*>(&memory.w[word][row]);
        const uint4 of_x = *reinterpret_cast<const uint4*>(&memory.x[word][sample]);
        const std::uint32_t ws[] = {of_w.x, of_w.y, of_w.z, of_w.w}, xs[] = {of_x.x, of_x.y, of_x.z, of_x.w};
#pragma unroll
        for (int s = 0; s < Tile::kSide; ++s) {
#pragma unroll
          for (int i = 0; i < Tile::kSide; ++i) AddProducts(sums[s][i], xs[s], ws[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kSide * Tile::kSide; ++i) {
      if (half == 1) memory.of_half[i][in_half] = sums[i / Tile::kSide][i % Tile::kSide];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kSide * Tile::kSide; ++i) {
      const std::int64_t n = first + sample + i / Tile::kSide, r = first_row + row + i % Tile::kSide;
      if (half == 0 && n < a.samples && r < a.rows) {
        a.sums[n * a.rows + r] = sums[i / Tile::kSide][i % Tile::kSide] + memory.of_half[i][in_half];
      }
    }
  }
}

// Of int8, on tensor cores: a warp has a panel and 32 samples. Which row, sample and word stands for which of a
// fragment is free: a lane takes two rows and four words that lie side by side.
struct NarrowTile {
  static constexpr int kRows = 32, kSamples = 64, kWords = 64;
  static constexpr int kWordsOfWarp = kWarpSize;
  static constexpr int kParts = 4;  // 8 samples each
  static constexpr int kWarps = kRows / kPanelRows * (kSamples / (8 * kParts)),
                       kHalf = kWarps * kWarpSize;  // of a half
  static constexpr int kThreads = 2 * kHalf;
  static constexpr int kBlocks = kWords / 2 / 16;  // of 16 words, two fragments
  static constexpr int kChunk = 1 << 12;           // words, then sums become 64 bits wide

  // Words side by side, and some more, so that the lines that a warp reads lie in different banks.
  struct Memory {
    alignas(16) std::uint32_t x[kSamples][kWords + 16];
    int of_half[4 * kParts][kHalf];
  };
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) MultiplyNarrow(FixedCudaArgs a, bool whole) {
  constexpr int kPanels = Tile::kRows / kPanelRows;
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), half = thread / Tile::kHalf, in_half = thread % Tile::kHalf;
  const int g = thread % kWarpSize / 4, t = thread % 4, warp = in_half / kWarpSize;
  const int sample = warp / kPanels * 8 * Tile::kParts, word = half * (Tile::kWords / 2) + 4 * t;
  const int words = WordsOf<std::int8_t>(a);
  const std::int64_t row = std::int64_t{blockIdx.x} * Tile::kRows + warp % kPanels * kPanelRows + 2 * g;
  const bool has_rows = row - 2 * g < a.rows;
  const std::uint32_t* w = PackedFrom<std::int8_t>(a, row);
  uint2 of_w[Tile::kBlocks][4];
  const auto load_w = [&](int begin) {
#pragma unroll
    for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
      const int at = begin + word + i / 4 * 16 + i % 4;
      of_w[i / 4][i % 4] = has_rows && at < words ? *reinterpret_cast<const uint2*>(w + at * kPanelRows) : uint2{0, 0};
    }
  };
  using Next = NextWords<Tile, std::int8_t>;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    Next next;
    next.Load(a, whole, first, 0);
    load_w(0);
    for (int chunk = 0; chunk < words; chunk += Tile::kChunk) {
      int sums[Tile::kParts][4] = {};
      const int end = min(words, chunk + Tile::kChunk);
      for (int begin = chunk; begin < end; begin += Tile::kWords) {
        __syncthreads();
        next.ForEach(a, whole, first, begin, [&](int line, std::uint32_t x) { memory.x[line][Next::Word()] = x; });
        __syncthreads();
        next.Load(a, whole, first, begin + Tile::kWords);
        std::uint32_t fragments[Tile::kBlocks][2][4];
#pragma unroll
        for (int i = 0; i < 4 * Tile::kBlocks; ++i) {
          fragments[i / 4][i % 4 / 2][i % 2 * 2] = of_w[i / 4][i % 4].x;
          fragments[i / 4][i % 4 / 2][i % 2 * 2 + 1] = of_w[i / 4][i % 4].y;
        }
        load_w(begin + Tile::kWords);
#pragma unroll
        for (int block = 0; block < Tile::kBlocks; ++block) {
#pragma unroll
          for (int part = 0; part < Tile::kParts; ++part) {
            const uint4 of_x = *reinterpret_cast<const uint4*>(&memory.x[sample + 8 * part + g][word + 16 * block]);
            MultiplyFragments(sums[part], fragments[block][0], of_x.x, of_x.y);
            MultiplyFragments(sums[part], fragments[block][1], of_x.z, of_x.w);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * Tile::kParts; ++i) {
        if (half == 1) memory.of_half[i][in_half] = sums[i / 4][i % 4];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 4 * Tile::kParts; ++i) {
        const std::int64_t n = first + sample + i / 4 * 8 + 2 * t + i % 2, r = row + i % 4 / 2;
        if (half == 1 || n >= a.samples || r >= a.rows) continue;
        std::int64_t& sum = a.sums[n * a.rows + r];
        sum = (chunk == 0 ? 0 : sum) + (sums[i / 4][i % 4] + memory.of_half[i][in_half]);
      }
    }
  }
}

template <typename Tile>
dim3 TileGrid(const FixedCudaArgs& a) {
  return {BlocksOnX(a.rows, Tile::kRows), BlocksOnY(a.samples, Tile::kSamples), 1};
}

template <typename Whole, bool kWhole>
int LaunchFew(const FixedCudaArgs& a, void* stream) {
  using Tile = FewTile<Whole, kWhole>;
  const dim3 grid(BlocksOnX(a.rows, kPanelRows), BlocksOnY(a.samples, Tile::kSamples));
  return Launch(MultiplyFew<Tile, Whole, kWhole>, grid, Tile::kThreads, stream, a);
}

template <typename Whole>
int MultiplyMatrix(const FixedCudaArgs& a, void* stream) {
  constexpr std::int64_t kFew = 8;
  const bool whole = WholeWords<Whole>(a);
  if (a.samples > kFew && a.columns > 0) {
    if constexpr (sizeof(Whole) == 2) {
      return Launch(MultiplyWide<WideTile>, TileGrid<WideTile>(a), WideTile::kThreads, stream, a, whole);
    } else if (HasTensorCores()) {
      return Launch(MultiplyNarrow<NarrowTile>, TileGrid<NarrowTile>(a), NarrowTile::kThreads, stream, a, whole);
    }
  }
  return whole ? LaunchFew<Whole, true>(a, stream) : LaunchFew<Whole, false>(a, stream);
}

// ---- windows of images: a block multiplies a panel with some, each thread words of one row

struct WindowTile {
  static constexpr int kSamples = 4, kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kParts = kThreads / kPanelRows;  // of the words
  static_assert(kWarpSize == 2 * kPanelRows);

  struct Memory {
    long long of_warp[kWarps][kSamples][kPanelRows];
  };
};

// Windows from `first` on.
template <typename Tile>
struct Windows {
  struct Tap {
    std::int64_t down, right, channel;
  };
  __device__ Windows(const FixedCudaArgs& a, std::int64_t of_group, std::int64_t first)
      : channels(static_cast<unsigned>(a.images.channels) / static_cast<unsigned>(a.images.groups)), group(of_group) {
    const FixedImages& i = a.images;
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      const auto n = static_cast<unsigned>(first + s), windows = static_cast<unsigned>(i.Windows());
      const unsigned window = n % windows, across = static_cast<unsigned>(i.out_width);
      high[s] = window / across * i.stride_h - i.pad_h;
      wide[s] = window % across * i.stride_w - i.pad_w;
      image[s] = n / windows * i.channels * i.height * i.width;
    }
  }
  __device__ static std::int64_t Columns(const FixedCudaArgs& a) {
    const unsigned of_group = static_cast<unsigned>(a.images.channels) / static_cast<unsigned>(a.images.groups);
    return of_group * a.images.kernel_h * a.images.kernel_w;
  }
  // Where number `within` of a segment stands, and what it is of sample s.
  __device__ Tap Place(const FixedCudaArgs& a, std::int64_t segment, std::int64_t within) const {
    const FixedImages& i = a.images;
    const auto in_segment = static_cast<unsigned>(within), across = static_cast<unsigned>(i.kernel_w);
    const unsigned tap =
        i.RowsAreSegments() ? segment * across + in_segment / channels : static_cast<unsigned>(segment);
    return {tap / across * i.dilation_h, tap % across * i.dilation_w, group * channels + in_segment % channels};
  }
  __device__ int At(const FixedCudaArgs& a, const Tap& tap, int s) const {
    const FixedImages& i = a.images;
    const std::int64_t row = high[s] + tap.down, column = wide[s] + tap.right;
    if (row < 0 || row >= i.height || column < 0 || column >= i.width) return 0;
    const std::int64_t pixel = row * i.width + column;
    return NumberAt(
        a, image[s] + (i.channels_last ? pixel * i.channels + tap.channel : tap.channel * i.height * i.width + pixel));
  }
  unsigned channels;
  std::int64_t group, high[Tile::kSamples], wide[Tile::kSamples], image[Tile::kSamples];
};

template <typename Tile, typename Whole>
__global__ void __launch_bounds__(Tile::kThreads, 2) MultiplyWindows(FixedCudaArgs a) {
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), row = thread % kPanelRows, warp = thread / kWarpSize;
  const std::int64_t segments = a.images.Segments();
  const std::int64_t segment = static_cast<unsigned>(Windows<Tile>::Columns(a)) / static_cast<unsigned>(segments);
  const std::int64_t segment_words = CeilDiv(segment, kOfWord<Whole>), words = segments * segment_words;
  const auto* w = static_cast<const std::uint32_t*>(a.packed) + blockIdx.x * (words + 1) * kPanelRows + row;
  // Divisions are of 32 bits: those of 64 are calls, before which registers are saved.
  const std::int64_t rows = static_cast<unsigned>(a.rows) / static_cast<unsigned>(a.images.groups);
  const auto panels = static_cast<unsigned>(CeilDiv(static_cast<unsigned>(rows), unsigned{kPanelRows}));
  const std::int64_t group = blockIdx.x / panels, in_group = std::int64_t{blockIdx.x % panels} * kPanelRows + row;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const std::int64_t left = a.samples - first;
    const int samples = static_cast<int>(left < Tile::kSamples ? left : Tile::kSamples);
    const Windows<Tile> x(a, group, first);
    long long sums[Tile::kSamples] = {};
    std::int64_t of_segment = 0, word = thread / kPanelRows;  // i as a segment and a word there
    for (std::int64_t i = word; i < words; i += Tile::kParts, word += Tile::kParts) {
      for (; word >= segment_words; word -= segment_words) ++of_segment;
      std::uint32_t numbers = w[i * kPanelRows];
      const std::int64_t within = word * kOfWord<Whole>;
      const int count = static_cast<int>(min(segment - within, std::int64_t{kOfWord<Whole>}));
      for (int k = 0; k < count; ++k, numbers >>= 32 / kOfWord<Whole>) {
        const int number = static_cast<Whole>(numbers);
        const auto place = x.Place(a, of_segment, within + k);
#pragma unroll
        for (int s = 0; s < Tile::kSamples; ++s) {
          if (s < samples) sums[s] += number * x.At(a, place, s);  // at most 2^30
        }
      }
    }
#pragma unroll
    for (int s = 0; s < Tile::kSamples; ++s) {
      const long long both = sums[s] + __shfl_xor_sync(kWholeWarp, sums[s], kPanelRows);
      if (thread % kWarpSize < kPanelRows) memory.of_warp[warp][s][row] = both;
    }
    __syncthreads();
    const int s = thread / kPanelRows;  // beyond the samples are threads without any
    if (s < samples && in_group < rows) {
      long long sum = 0;
      for (int one = 0; one < Tile::kWarps; ++one) sum += memory.of_warp[one][s][row];
      a.sums[(first + s) * a.rows + group * rows + in_group] = sum;
    }
    __syncthreads();
  }
}

// ---- conversion

struct ConvertTile {
  static constexpr int kThreads = 64;
};

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads)
    ConvertValues(FixedConvertArgs a, std::int64_t samples, std::int64_t pixels) {
  const std::int64_t r = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  if (r >= a.rows) return;
  const FixedConversion conversion(a.sum_fraction_bits, a.integer_bits, a.fraction_bits, a.stochastic, a.relu);
  const std::int64_t of_row = a.added == nullptr ? 0 : a.added[r];
  const std::int64_t most = kFixedMostBias, added = of_row < -most ? -most : of_row > most ? most : of_row;
  for (std::int64_t n = blockIdx.y; n < samples; n += gridDim.y) {
    const std::int64_t value = n * a.y_stride + r;
    const std::uint32_t u = conversion.random ? RandomBits(a.seed, a.offset + static_cast<std::uint64_t>(value)) : 0;
    std::int64_t place = value;
    if (pixels > 1) {
      const auto image = static_cast<unsigned>(n) / static_cast<unsigned>(pixels);
      place = (image * a.rows + r) * pixels + (n - image * pixels);
    }
    PutFixed(a.y, place, conversion.Of(a.sums[n * a.sums_stride + r] + added, u), a.fraction_bits, a.as);
  }
}

}  // namespace

int FixedMatmulCuda(const FixedCudaArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  return a.wide ? MultiplyMatrix<std::int16_t>(a, stream) : MultiplyMatrix<std::int8_t>(a, stream);
}

int FixedConv2dCuda(const FixedCudaArgs& a, void* stream) noexcept {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  using Tile = WindowTile;
  constexpr unsigned kMost = 2048;  // with one panel they fill a GPU
  const std::int64_t panels = a.images.groups * CeilDiv(a.rows / a.images.groups, kPanelRows);
  const dim3 grid(BlocksOnX(panels), std::min(BlocksOnY(a.samples, Tile::kSamples), kMost));
  return Launch(a.wide ? MultiplyWindows<Tile, std::int16_t> : MultiplyWindows<Tile, std::int8_t>, grid, Tile::kThreads,
                stream, a);
}

int FixedConvertCuda(const FixedConvertArgs& a, std::int64_t samples, std::int64_t pixels, void* stream) noexcept {
  if (samples == 0 || a.rows == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(a.rows, ConvertTile::kThreads), BlocksOnY(samples, 1));
  return Launch(ConvertValues<ConvertTile>, grid, ConvertTile::kThreads, stream, a, samples, pixels);
}

}  // namespace tersetorch
