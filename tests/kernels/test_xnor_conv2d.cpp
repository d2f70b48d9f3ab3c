// Every variant against the definition, to the bit, on shapes around its tiles and borders and on unaligned memory.
#include "kernels/common/cpu_isa.h"
#include "kernels/parts.h"
#include "kernels/xnor_conv_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

struct Variant {
  const char* name;
  CpuIsa needs;
  XnorConv2dVariant convolve;
};

template <typename T>
std::vector<T> Convolve(const Variant& variant, const XnorConvProblem& p, XnorOutput output) {
  Unaligned<std::uint64_t> x(p.split);
  Unaligned<std::int32_t> weight(p.packed), thresholds(p.thresholds);
  Unaligned<float> scale(p.scale), bias(p.bias);
  Unaligned<T> y(std::vector<T>(p.OutputSize(output)));
  XnorConv2dArgs args = p.args;
  args.x = x.data();
  args.weight = weight.data();
  p.SetOutput(args, output, scale.data(), bias.data(), thresholds.data(), y.data());
  std::vector<XnorSpan> rows(args.out_height), columns(args.out_width);
  p.SetSpans(args, rows, columns);
  const Index tiles = XnorConvTiles(args.filters, args.groups), cut = XnorWholeTiles(args) ? tiles / 4 * 2 : tiles;
  const Index row = args.out_height / 2;
  for (Index n = 0; n < args.images; ++n) {
    const auto upper = [&] { variant.convolve(args, {n, 0, row, cut, tiles}); };
    const auto lower = [&] { variant.convolve(args, {n, row, args.out_height, cut, tiles}); };
    const auto other_filters = [&] { variant.convolve(args, {n, 0, args.out_height, 0, cut}); };
    AtOnce(other_filters, [&] { AtOnce(upper, lower); });
  }
  return y.Values();
}

void TestOne(const Variant& variant, const XnorConvCase& c, std::mt19937& rng) {
  const XnorConvProblem p(c, rng);
  const auto complain = [&](bool ok, const char* what) {
    Expect(ok, "%s: %s, %s", variant.name, what, p.name.c_str());
  };
  complain(Convolve<std::int32_t>(variant, p, XnorOutput::kDots) == p.dots, "dots");
  complain(Convolve<float>(variant, p, XnorOutput::kFloats) == p.floats, "floats");
  complain(Convolve<std::uint64_t>(variant, p, XnorOutput::kBits) == p.bits, "bits");
}

}  // namespace

int main() {
  const Variant variants[] = {{"scalar", CpuIsa::kScalar, kXnorConv2dScalar},
                              {"avx2", CpuIsa::kAvx2, kXnorConv2dAvx2},
                              {"avx512", CpuIsa::kAvx512, kXnorConv2dAvx512}};
  for (const Variant& variant : variants) {
    if (ProcessCpuIsa().detected < variant.needs) continue;
    std::mt19937 rng(1);
    for (const XnorConvCase& c : XnorConvCases()) TestOne(variant, c, rng);
  }
  return Failures() != 0;
}
