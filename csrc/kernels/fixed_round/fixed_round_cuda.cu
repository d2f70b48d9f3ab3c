#include <cmath>

#include "kernels/common/cuda.cuh"
#include "kernels/common/philox.h"
#include "kernels/fixed_round/fixed_round_cuda.h"

namespace tersetorch {
namespace {

struct CounterTile {
  static constexpr int kThreads = 256;
};

// floor(s + 1/2); the difference to the floor is exact where it is below 1/2.
__device__ inline int NextWhole(float s) {
  const float floor = floorf(s);
  return static_cast<int>(floor) + (s - floor >= 0.5f ? 1 : 0);
}

__device__ inline int Rounded(const FixedRoundArgs& a, float x, float scale, float highest, std::uint32_t random) {
  const float s = fminf(fmaxf(x * scale, -highest - 1), highest);
  if (!a.stochastic) return NextWhole(s);
  const float near = rintf(s);
  const int rest = NextWhole((s - near) * 65536);
  return static_cast<int>(near) + ((rest + static_cast<int>(random)) >> 16);
}

template <typename Float>
__device__ void Put(const FixedRoundArgs& a, std::int64_t i, Float x, int k, float step) {
  const bool nan = ToFloat(x) != ToFloat(x);
  if (a.as == FixedAs::kFloats) {
    static_cast<Float*>(a.y)[i] = nan ? x : FromFloat<Float>(static_cast<float>(k) * step);
  } else {
    WithWhole(a.as, nan ? 0 : k, [&](auto whole) { static_cast<decltype(whole)*>(a.y)[i] = whole; });
  }
}

template <typename Tile, typename Float>
__global__ void __launch_bounds__(Tile::kThreads) RoundValues(FixedRoundArgs a, std::int64_t size) {
  const std::int64_t thread = std::int64_t{blockIdx.x} * Tile::kThreads + threadIdx.x;
  const std::uint64_t block = a.offset / kRandomBlock + static_cast<std::uint64_t>(thread / 8);
  // The first value of the block, before x where the offset lies inside it.
  const std::int64_t first = thread / 8 * kRandomBlock - static_cast<std::int64_t>(a.offset % kRandomBlock);
  if (first >= size) return;
  const auto counter = static_cast<std::uint32_t>(thread % 8);
  PhiloxWords words{};
  if (a.stochastic) words = Philox(a.seed, block * 8 + counter);
  const float scale = __uint_as_float(static_cast<std::uint32_t>(127 + a.fraction_bits) << 23);
  const float step = __uint_as_float(static_cast<std::uint32_t>(127 - a.fraction_bits) << 23);
  const float highest = static_cast<float>((1 << (a.integer_bits + a.fraction_bits - 1)) - 1);
#pragma unroll
  for (int v = 0; v < 4; ++v) {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const std::int64_t i = first + 16 * v + 2 * counter + l;
      if (i < 0 || i >= size) continue;
      const std::uint32_t word = words.word[v / 2 * 2 + l], random = v % 2 == 0 ? word & 0xffff : word >> 16;
      const Float x = static_cast<const Float*>(a.x)[i];
      Put(a, i, x, Rounded(a, ToFloat(x), scale, highest, random), step);
    }
  }
}

}  // namespace

int FixedRoundCuda(const FixedRoundArgs& a, std::int64_t size, void* stream) noexcept {
  if (size == 0) return cudaSuccess;
  const std::int64_t blocks = CeilDiv(size + static_cast<std::int64_t>(a.offset % kRandomBlock), kRandomBlock);
  const dim3 grid(static_cast<unsigned>(CeilDiv(8 * blocks, CounterTile::kThreads)));
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(RoundValues<CounterTile, decltype(number)>, grid, CounterTile::kThreads, stream, a, size);
  });
}

}  // namespace tersetorch
