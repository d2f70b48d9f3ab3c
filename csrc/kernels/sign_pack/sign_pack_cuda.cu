#include "kernels/common/cuda.cuh"
#include "kernels/sign_pack/sign_pack_cuda.h"

namespace tersetorch {
namespace {

// A warp packs a word, a lane looks at two of its numbers.
struct WordTile {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarpSize;

  __device__ static std::int64_t Word() { return std::int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize; }
};

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) SignPackWords(SignPackArgs a, std::int64_t samples) {
  const std::int64_t words = CeilDiv(a.columns, kSignBits), i = Tile::Word();
  if (i >= samples * words) return;
  const std::int64_t n = i / words, c = i % words * kSignBits + threadIdx.x % kWarpSize;
  const Float* x = static_cast<const Float*>(a.x) + n * a.columns;
  const bool low = c < a.columns && !(ToFloat(x[c]) >= 0);
  const bool high = c + kWarpSize < a.columns && !(ToFloat(x[c + kWarpSize]) >= 0);
  const std::uint64_t low_bits = __ballot_sync(kWholeWarp, low), high_bits = __ballot_sync(kWholeWarp, high);
  if (threadIdx.x % kWarpSize == 0) a.bits[i] = low_bits | high_bits << kWarpSize;
}

// A thread packs a word; those of a warp read neighbouring pixels of one plane after the other.
struct PlaneTile {
  static constexpr int kThreads = 256;
};

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) SignPackPlanesKernel(SignPackPlanesArgs a, std::int64_t images) {
  const std::int64_t at = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x,
                     words = CeilDiv(a.channels, kSignBits);
  if (at >= images * a.pixels * a.groups * words) return;
  const std::int64_t p = at % a.pixels, word = at / a.pixels % (a.groups * words), n = at / a.pixels / a.groups / words;
  const std::int64_t group = word / words, first = word % words * kSignBits;
  const auto* x = static_cast<const Float*>(a.x) + ((n * a.groups + group) * a.channels + first) * a.pixels + p;
  const int count = static_cast<int>(min(kSignBits, a.channels - first));
  std::uint64_t bits = 0;
  for (int c = 0; c < count; ++c) bits |= std::uint64_t{!(ToFloat(x[c * a.pixels]) >= 0)} << c;
  a.bits[(n * a.pixels + p) * a.groups * words + word] = bits;
}

}  // namespace

int SignPackPlanesCuda(const SignPackPlanesArgs& a, std::int64_t images, void* stream) noexcept {
  const std::int64_t words = images * a.pixels * a.groups * CeilDiv(a.channels, kSignBits);
  if (words == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(words, PlaneTile::kThreads));
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(SignPackPlanesKernel<PlaneTile, decltype(number)>, grid, PlaneTile::kThreads, stream, a, images);
  });
}

int SignPackCuda(const SignPackArgs& a, std::int64_t samples, void* stream) noexcept {
  const std::int64_t words = samples * CeilDiv(a.columns, kSignBits);
  if (words == 0) return cudaSuccess;
  const dim3 grid(BlocksOnX(words, WordTile::kWarps));
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(SignPackWords<WordTile, decltype(number)>, grid, WordTile::kThreads, stream, a, samples);
  });
}

}  // namespace tersetorch
