#include <algorithm>
#include <type_traits>

#include "kernels/codebook_matmul/codebook_few.cuh"
#include "kernels/codebook_matmul/codebook_paths_cuda.h"

namespace tersetorch {
namespace {

// ---- launchers; rows and warps of a block are by what an H100 took for 4,096 x 9,216 codes of 4 bits

template <typename Tile, typename Mode, typename X>
int LaunchFew(const CodebookMatmulCudaArgs& a, void* stream) {
  const unsigned blocks = BlocksOnX(a.weight.rows, Tile::kRows);
  return LaunchMain(CodebookFewKernel<Tile, Mode, X>, blocks, Tile::kThreads, 0, stream, a);
}

template <int kBits, bool kPerRow>
int LaunchBFloat16(const CodebookMatmulCudaArgs& a, void* stream) {
  using Mode = BFloat16Fragments<kBits, kPerRow, 4>;
  if (a.packed == nullptr) {
    return a.stored_as == FloatDtype::kFloat32 ? LaunchFew<FewTile<4, 1, 16>, Mode, XAsItLies<float>>(a, stream)
                                               : LaunchFew<FewTile<4, 1, 16>, Mode, XAsItLies<BFloat16>>(a, stream);
  }
  return a.samples <= 16 ? LaunchFew<FewTile<4, 2, 16>, Mode, XPacked>(a, stream)
                         : LaunchFew<FewTile<4, 4, 8>, Mode, XPacked>(a, stream);
}

template <int kBits, bool kPerRow>
int LaunchInt8(const CodebookMatmulCudaArgs& a, void* stream) {
  if (a.samples <= 8) return LaunchFew<FewTile<2, 1, 16>, Int8Fragments<kBits, kPerRow, 2>, XPacked>(a, stream);
  using Mode = Int8Fragments<kBits, kPerRow, 4>;
  return a.samples <= 16 ? LaunchFew<FewTile<4, 2, 16>, Mode, XPacked>(a, stream)
                         : LaunchFew<FewTile<4, 4, 8>, Mode, XPacked>(a, stream);
}

template <typename Tile, int kBits, bool kPerRow>
int LaunchExactFew(const CodebookMatmulCudaArgs& a, void* stream) {
  const dim3 grid(BlocksOnX(a.weight.rows, Tile::kRows), static_cast<unsigned>(CeilDiv(a.samples, Tile::kSamples)));
  return LaunchMain(CodebookExactFewKernel<Tile, kBits, kPerRow>, grid, Tile::kThreads, 0, stream, a);
}

}  // namespace

int CodebookPackCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept {
  return WithFloat(a.stored_as, [&](auto number) {
    using Float = decltype(number);
    if (a.mode == CodebookMode::kInt8) {
      return Launch(CodebookQuantizeKernel<QuantizeTile, Float>, BlocksOnX(a.samples), QuantizeTile::kThreads, stream,
                    a);
    }
    const unsigned blocks = PackTile::BlocksOfSample(a.packed_stride);
    return Launch(CodebookPackKernel<PackTile, Float>, BlocksOnX(a.samples * blocks), PackTile::kThreads, stream, a,
                  blocks);
  });
}

int CodebookFewCuda(const CodebookMatmulCudaArgs& a, void* stream) noexcept {
  return WithCodes(a.weight, [&](auto bits, auto per_row) {
    constexpr int kBits = decltype(bits)::value;
    constexpr bool kPerRow = decltype(per_row)::value;
    switch (a.mode) {
      case CodebookMode::kExact:
        if (a.samples == 1) return LaunchExactFew<ExactFewTile<2, 1, 16>, kBits, kPerRow>(a, stream);
        return a.samples <= 4 ? LaunchExactFew<ExactFewTile<2, 4, 8>, kBits, kPerRow>(a, stream)
                              : LaunchExactFew<ExactFewTile<2, 8, 8>, kBits, kPerRow>(a, stream);
      case CodebookMode::kBFloat16:
        return LaunchBFloat16<kBits, kPerRow>(a, stream);
      default:
        return LaunchInt8<kBits, kPerRow>(a, stream);
    }
  });
}

}  // namespace tersetorch
