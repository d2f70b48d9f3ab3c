#include "kernels/common/cuda.cuh"
#include "kernels/common/fixed_sums.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"

namespace tersetorch {
namespace {

struct PanelTile {
  static constexpr int kRows = static_cast<int>(kFixedPanel), kSamples = 4, kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kParts = kThreads / kRows;  // of the words
  static_assert(kWarpSize == 2 * kRows);

  struct Memory {
    long long of_warp[kWarps][kSamples][kRows];
  };
};

// Number i of x: the branch is the same for all threads, types for it would multiply the kernels.
__device__ int NumberAt(const FixedCudaArgs& a, std::int64_t i) {
  return a.x_wide ? static_cast<const std::int16_t*>(a.x)[i] : static_cast<const std::int8_t*>(a.x)[i];
}

// Samples as rows of a matrix, from sample `first` on.
template <typename Tile>
struct MatrixSamples {
  __device__ MatrixSamples(const FixedCudaArgs& a, std::int64_t, std::int64_t first) : x(first * a.columns) {}
  __device__ static std::int64_t Segments(const FixedCudaArgs&) { return 1; }
  __device__ static std::int64_t Columns(const FixedCudaArgs& a) { return a.columns; }
  // Where number `within` of a segment stands, and what it is of sample s.
  __device__ std::int64_t Place(const FixedCudaArgs&, std::int64_t, std::int64_t within) const { return x + within; }
  __device__ int At(const FixedCudaArgs& a, std::int64_t place, int s) const {
    return NumberAt(a, place + s * a.columns);
  }
  std::int64_t x;
};

// Samples as windows of images.
template <typename Tile>
struct WindowSamples {
  struct Tap {
    std::int64_t down, right, channel;
  };
  __device__ WindowSamples(const FixedCudaArgs& a, std::int64_t of_group, std::int64_t first)
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
  __device__ static std::int64_t Segments(const FixedCudaArgs& a) { return a.images.Segments(); }
  __device__ static std::int64_t Columns(const FixedCudaArgs& a) {
    const unsigned of_group = static_cast<unsigned>(a.images.channels) / static_cast<unsigned>(a.images.groups);
    return of_group * a.images.kernel_h * a.images.kernel_w;
  }
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

template <typename Tile, typename Samples, typename Whole>
__global__ void __launch_bounds__(Tile::kThreads) MultiplyPanels(FixedCudaArgs a) {
  constexpr int kOfWord = static_cast<int>(kFixedWord / sizeof(Whole));
  auto& memory = SharedMemory<typename Tile::Memory>();
  const int thread = static_cast<int>(threadIdx.x), row = thread % Tile::kRows, warp = thread / kWarpSize;
  const std::int64_t segments = Samples::Segments(a);
  const std::int64_t segment = static_cast<unsigned>(Samples::Columns(a)) / static_cast<unsigned>(segments);
  const std::int64_t segment_words = CeilDiv(segment, kOfWord), words = segments * segment_words;
  const auto* w = static_cast<const std::uint32_t*>(a.packed) + blockIdx.x * (words + 1) * Tile::kRows + row;
  // Divisions are of 32 bits: those of 64 are calls, before which registers are saved.
  const std::int64_t rows = static_cast<unsigned>(a.rows) / static_cast<unsigned>(a.images.groups);
  const auto panels = static_cast<unsigned>(CeilDiv(static_cast<unsigned>(rows), unsigned{Tile::kRows}));
  const std::int64_t group = blockIdx.x / panels, in_group = std::int64_t{blockIdx.x % panels} * Tile::kRows + row;
  for (std::int64_t first = std::int64_t{blockIdx.y} * Tile::kSamples; first < a.samples;
       first += std::int64_t{gridDim.y} * Tile::kSamples) {
    const std::int64_t left = a.samples - first;
    const int samples = static_cast<int>(left < Tile::kSamples ? left : Tile::kSamples);
    const Samples x(a, group, first);
    long long sums[Tile::kSamples] = {};
    std::int64_t of_segment = 0, word = thread / Tile::kRows;  // i as a segment and a word there
    for (std::int64_t i = word; i < words; i += Tile::kParts, word += Tile::kParts) {
      for (; word >= segment_words; word -= segment_words) ++of_segment;
      std::uint32_t numbers = w[i * Tile::kRows];
      const std::int64_t within = word * kOfWord;
      const int count = static_cast<int>(min(segment - within, std::int64_t{kOfWord}));
      for (int k = 0; k < count; ++k, numbers >>= 32 / kOfWord) {
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
      const long long both = sums[s] + __shfl_xor_sync(kWholeWarp, sums[s], Tile::kRows);
      if (thread % kWarpSize < Tile::kRows) memory.of_warp[warp][s][row] = both;
    }
    __syncthreads();
    const int s = thread / Tile::kRows;  // beyond the samples are threads without any
    if (s < samples && in_group < rows) {
      long long sum = 0;
      for (int one = 0; one < Tile::kWarps; ++one) sum += memory.of_warp[one][s][row];
      a.sums[(first + s) * a.rows + group * rows + in_group] = sum;
    }
    __syncthreads();
  }
}

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

template <template <typename> typename Samples>
int Multiply(const FixedCudaArgs& a, void* stream) {
  if (a.rows == 0 || a.samples == 0) return cudaSuccess;
  using Tile = PanelTile;
  constexpr unsigned kMost = 2048;  // with one panel they fill a GPU
  const std::int64_t panels = a.images.groups * CeilDiv(a.rows / a.images.groups, Tile::kRows);
  const dim3 grid(static_cast<unsigned>(panels), std::min(BlocksOnY(a.samples, Tile::kSamples), kMost));
  return Launch(
      a.wide ? MultiplyPanels<Tile, Samples<Tile>, std::int16_t> : MultiplyPanels<Tile, Samples<Tile>, std::int8_t>,
      grid, Tile::kThreads, stream, a);
}

}  // namespace

int FixedMatmulCuda(const FixedCudaArgs& a, void* stream) noexcept { return Multiply<MatrixSamples>(a, stream); }

int FixedConv2dCuda(const FixedCudaArgs& a, void* stream) noexcept { return Multiply<WindowSamples>(a, stream); }

int FixedConvertCuda(const FixedConvertArgs& a, std::int64_t samples, std::int64_t pixels, void* stream) noexcept {
  if (samples == 0 || a.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.rows, ConvertTile::kThreads)), BlocksOnY(samples, 1));
  return Launch(ConvertValues<ConvertTile>, grid, ConvertTile::kThreads, stream, a, samples, pixels);
}

}  // namespace tersetorch
