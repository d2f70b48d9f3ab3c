#include <algorithm>
#include <type_traits>

#include "kernels/codebook_matmul/codebook_paths_cuda.h"
#include "kernels/codebook_matmul/codebook_tiles.cuh"

namespace tersetorch {
namespace {

// ---- launchers

// By what an H100 took for 4,096 x 9,216 codes of 4 bits.
using SmallFragments = FragmentTile<4, 4, 2, 2, 4, 2>;
using LargeFragments = FragmentTile<4, 8, 4, 2, 4, 1>;
using SmallExact = ExactTile<4, 2>;
using LargeExact = ExactTile<8, 1>;

// How many parts of the columns fill the device; each has some chunks, so that its sums are worth their way.
int PartsFor(const CodebookMatmulCudaArgs& a, std::int64_t rows, std::int64_t samples, int blocks_at_once) {
  constexpr std::int64_t kChunks = 4, kMost = 16;
  int device = 0, processors = 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  const std::int64_t blocks = CeilDiv(a.weight.rows, rows) * CeilDiv(a.samples, samples);
  const std::int64_t fit = std::int64_t{processors} * blocks_at_once / std::max<std::int64_t>(1, blocks);
  return static_cast<int>(
      std::max<std::int64_t>(1, std::min({fit, std::int64_t{ChunksOfRow(a.weight)} / kChunks, kMost})));
}

bool IsLarge(const CodebookMatmulCudaArgs& a) { return a.samples > 64; }

template <typename Tile, typename Memory>
int LaunchTile(void (*kernel)(CodebookMatmulCudaArgs), const CodebookMatmulCudaArgs& a, void* stream) {
  const dim3 grid(BlocksOnX(a.weight.rows, Tile::kRows), BlocksOnY(a.samples, Tile::kSamples),
                  static_cast<unsigned>(a.part_count));
  return LaunchMain(kernel, grid, Tile::kThreads, sizeof(Memory), stream, a);
}

template <typename Tile, typename Mode>
int LaunchFragments(const CodebookMatmulCudaArgs& a, void* stream) {
  return LaunchTile<Tile, typename Tile::template Memory<Mode>>(CodebookTileKernel<Tile, Mode>, a, stream);
}

template <typename Tile, int kBits, bool kPerRow>
int LaunchExact(const CodebookMatmulCudaArgs& a, void* stream) {
  return LaunchTile<Tile, typename Tile::template Memory<kBits>>(CodebookExactTileKernel<Tile, kBits, kPerRow>, a,
                                                                 stream);
}

template <int kBits, bool kPerRow>
int LaunchMode(const CodebookMatmulCudaArgs& a, void* stream) {
  using Rounded = BFloat16Fragments<kBits, kPerRow, 4>;
  using Integers = Int8Fragments<kBits, kPerRow, 4>;
  switch (a.mode) {
    case CodebookMode::kExact:
      return IsLarge(a) ? LaunchExact<LargeExact, kBits, kPerRow>(a, stream)
                        : LaunchExact<SmallExact, kBits, kPerRow>(a, stream);
    case CodebookMode::kBFloat16:
      return IsLarge(a) ? LaunchFragments<LargeFragments, Rounded>(a, stream)
                        : LaunchFragments<SmallFragments, Rounded>(a, stream);
    default:
      return IsLarge(a) ? LaunchFragments<LargeFragments, Integers>(a, stream)
                        : LaunchFragments<SmallFragments, Integers>(a, stream);
  }
}

}  // namespace

int CodebookTilePartsCuda(const CodebookMatmulCudaArgs& a) noexcept {
  const auto of = [&](auto tile) {
    using Tile = decltype(tile);
    return PartsFor(a, Tile::kRows, Tile::kSamples, Tile::kBlocksAtOnce);
  };
  if (a.mode == CodebookMode::kExact) return IsLarge(a) ? of(LargeExact{}) : of(SmallExact{});
  return IsLarge(a) ? of(LargeFragments{}) : of(SmallFragments{});
}

int CodebookTilesCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept {
  const int error = WithCodes(a.weight, [&](auto bits, auto per_row) {
    return LaunchMode<decltype(bits)::value, decltype(per_row)::value>(a, stream);
  });
  if (error != cudaSuccess || a.parts == nullptr) return error;
  const dim3 grid(BlocksOnX(a.weight.rows, PartsTile::kThreads), static_cast<unsigned>(a.samples));
  return a.mode == CodebookMode::kInt8
             ? Launch(CodebookAddPartsKernel<PartsTile, int>, grid, PartsTile::kThreads, stream, a)
             : Launch(CodebookAddPartsKernel<PartsTile, float>, grid, PartsTile::kThreads, stream, a);
}

}  // namespace tersetorch
