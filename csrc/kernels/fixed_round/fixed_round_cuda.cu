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

// Two neighbours in memory.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T of[2];
};

template <typename T>
__device__ bool OfPair(const T* at) {
  return reinterpret_cast<std::uintptr_t>(at) % sizeof(Pair<T>) == 0;
}

// Values i and i + 1 of those [0, size).
template <typename T>
__device__ void Store(void* y, std::int64_t i, std::int64_t size, Pair<T> pair) {
  T* at = static_cast<T*>(y) + i;
  if (OfPair(at) && i >= 0 && i + 1 < size) {
    *reinterpret_cast<Pair<T>*>(at) = pair;
    return;
  }
  if (0 <= i && i < size) at[0] = pair.of[0];
  if (0 <= i + 1 && i + 1 < size) at[1] = pair.of[1];
}

template <typename Float>
__device__ void Put(const FixedRoundArgs& a, std::int64_t i, std::int64_t size, Pair<Float> x, int (&k)[2],
                    float step) {
  const bool nan[2] = {ToFloat(x.of[0]) != ToFloat(x.of[0]), ToFloat(x.of[1]) != ToFloat(x.of[1])};
  const auto number = [&](int l) { return nan[l] ? x.of[l] : FromFloat<Float>(static_cast<float>(k[l]) * step); };
  const auto whole = [&](auto of) {
    using T = decltype(of);
    Store<T>(a.y, i, size, {{static_cast<T>(nan[0] ? 0 : k[0]), static_cast<T>(nan[1] ? 0 : k[1])}});
  };
  if (a.as == FixedAs::kFloats) {
    Store<Float>(a.y, i, size, {{number(0), number(1)}});
  } else {
    WithWhole(a.as, 0, whole);
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
  Pair<Float> x[4];  // all are on their way before the first is needed
  const std::int64_t begin = first + 2 * counter;
  const Float* from = static_cast<const Float*>(a.x) + begin;
  if (first >= 0 && first + kRandomBlock <= size && OfPair(from)) {
#pragma unroll
    for (int v = 0; v < 4; ++v) x[v] = *reinterpret_cast<const Pair<Float>*>(from + 16 * v);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const std::int64_t i = 16 * (k / 2) + k % 2;
      x[k / 2].of[k % 2] = 0 <= begin + i && begin + i < size ? from[i] : Float{};
    }
  }
#pragma unroll
  for (int v = 0; v < 4; ++v) {
    int k[2];
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const std::uint32_t word = words.word[v / 2 * 2 + l], random = v % 2 == 0 ? word & 0xffff : word >> 16;
      k[l] = Rounded(a, ToFloat(x[v].of[l]), scale, highest, random);
    }
    Put(a, begin + 16 * v, size, x[v], k, step);
  }
}

}  // namespace

int FixedRoundCuda(const FixedRoundArgs& a, std::int64_t size, void* stream) noexcept {
  if (size == 0) return cudaSuccess;
  const std::int64_t blocks = CeilDiv(size + static_cast<std::int64_t>(a.offset % kRandomBlock), kRandomBlock);
  const dim3 grid(BlocksOnX(8 * blocks, CounterTile::kThreads));
  return WithFloat(a.stored_as, [&](auto number) {
    return Launch(RoundValues<CounterTile, decltype(number)>, grid, CounterTile::kThreads, stream, a, size);
  });
}

}  // namespace tersetorch
