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
  const bool low = c < a.columns && ToFloat(x[c]) >= 0;
  const bool high = c + kWarpSize < a.columns && ToFloat(x[c + kWarpSize]) >= 0;
  const std::uint64_t low_bits = __ballot_sync(kWholeWarp, low), high_bits = __ballot_sync(kWholeWarp, high);
  if (threadIdx.x % kWarpSize == 0) a.bits[i] = low_bits | high_bits << kWarpSize;
}

}  // namespace

int SignPackCuda(const SignPackArgs& a, std::int64_t samples, void* stream) noexcept {
  const std::int64_t words = samples * CeilDiv(a.columns, kSignBits);
  if (words == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(words, WordTile::kWarps)));
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(SignPackWords<WordTile, decltype(number)>, grid, WordTile::kThreads, stream, a, samples);
  });
}

}  // namespace tersetorch
