// Races that ThreadSanitizer must report, or its silence on the other tests says nothing: two threads write the same
// rows of a product, at the level that the argument names; with "codec", two threads read on with one reader.
#include <cstdio>
#include <cstring>
#include <vector>

#include "codec/bit_stream.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/parts.h"

using namespace tersetorch;

int main(int, char** arguments) {
  if (std::strcmp(arguments[1], "codec") == 0) {
    const std::vector<std::uint8_t> bytes(64, 0x5a);
    BitReader reader(bytes.data(), bytes.size());
    for (int again = 0; again < 100; ++again) test::AtOnce([&] { reader.Read(7); }, [&] { reader.Read(7); });
    return 0;
  }
  const struct {
    CpuIsa needs;
    const CsrKernels& kernels;
  } levels[] = {{CpuIsa::kScalar, kCsrScalar}, {CpuIsa::kAvx2, kCsrAvx2}, {CpuIsa::kAvx512, kCsrAvx512}};
  for (const auto& level : levels) {
    if (std::strcmp(arguments[1], CpuIsaName(level.needs)) != 0) continue;
    if (ProcessCpuIsa().detected < level.needs) return std::puts("not on this CPU"), 0;
    constexpr std::int64_t kRows = 64, kWidth = 16;
    std::vector<std::int32_t> offsets(kRows + 1), columns(kRows);
    for (std::int64_t r = 0; r < kRows; ++r) offsets[r + 1] = static_cast<std::int32_t>(r + 1);
    std::vector<float> values(kRows, 1.0f), panel(kWidth, 1.0f), y(kRows * kWidth);
    const CsrWeight weight{
        offsets.data(), columns.data(), CsrIndices::kInt32, values.data(), CsrValues::kFloat32, nullptr, 0, kRows, 1,
        kRows};
    const CsrMatmulArgs args{weight, panel.data(), kWidth, nullptr, false, y.data(), FloatDtype::kFloat32, kWidth};
    // On a busy machine one may be done before the other begins, and what ThreadSanitizer remembers is short.
    for (int again = 0; again < 100; ++again) {
      test::AtOnce([&] { level.kernels.matmul(args, 0, 2 * kRows / 3); },
                   [&] { level.kernels.matmul(args, kRows / 3, kRows); });
    }
  }
  return 0;
}
