// How the kernels use memory, counted for a launch of each: no banks conflict and warps touch no sector in vain, but
// where a line of the kernel is named here with what it takes, and why.
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "kernels/bitmap_matmul/bitmap_matmul_cuda.h"
#include "kernels/bitmap_weight.h"
#include "kernels/bitplane_matmul/bitplane_matmul_cuda.h"
#include "kernels/blocked_matmul/blocked_matmul_cuda.h"
#include "kernels/codebook_conv2d/codebook_conv2d_cuda.h"
#include "kernels/codebook_embedding/codebook_embedding_cuda.h"
#include "kernels/codebook_matmul/codebook_matmul_cuda.h"
#include "kernels/csr_matmul/csr_matmul_cuda.h"
#include "kernels/device.h"
#include "kernels/fixed_matmul/fixed_matmul_cuda.h"
#include "kernels/fixed_round/fixed_round_cuda.h"
#include "kernels/flat_conv2d/flat_conv2d_cuda.h"
#include "kernels/product_matmul/product_matmul_cuda.h"
#include "kernels/sign_matmul/sign_matmul_cuda.h"
#include "kernels/sign_pack/sign_pack_cuda.h"
#include "kernels/sparse_conv2d/conv_fragments_cuda.h"
#include "kernels/sparse_conv2d/sparse_conv2d_cuda.h"
#include "kernels/xnor_conv2d/xnor_conv2d_cuda.h"
#include "kernels/xnor_conv_problem.h"
#include "kernels/xnor_matmul/xnor_matmul_cuda.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

std::mt19937 rng(1);

// The text of a line "file:number" of a kernel.
std::string TextOf(const std::string& line) {
  const auto colon = line.find(':');
  if (colon == std::string::npos) return "";
  for (const auto& entry : std::filesystem::recursive_directory_iterator(KERNELS)) {
    if (entry.path().filename() != line.substr(0, colon)) continue;
    std::ifstream file(entry.path());
    std::string text;
    for (int i = std::stoi(line.substr(colon + 1)); i > 0; --i) std::getline(file, text);
    return text.substr(std::min(text.find_first_not_of(' '), text.size()));
  }
  return "";
}

// A line whose cycles or sectors may be so many times the least; its text contains this.
struct Allowed {
  const char* text;
  double conflicts, scatter;
};

template <typename Run>
void Expect(const char* name, const std::vector<Allowed>& allowed, const Run& run) {
  cuda_emulator::CountAccesses(true);
  ExpectLaunched(run(), name);
  const auto counts = cuda_emulator::AccessCounts();
  cuda_emulator::CountAccesses(false);
  test::Expect(!counts.empty(), "%s: nothing was counted", name);
  std::vector<bool> met(allowed.size());
  for (const auto& [line, count] : counts) {
    double conflicts = 1.0, scatter = 1.0;
    const std::string text = TextOf(line);
    for (std::size_t i = 0; i < allowed.size(); ++i) {
      if (text.find(allowed[i].text) == std::string::npos) continue;
      met[i] = true;
      conflicts = std::max(conflicts, allowed[i].conflicts);
      scatter = std::max(scatter, allowed[i].scatter);
    }
    if (count.Conflicts() > 1 || count.Scatter() > 1) {
      std::printf("%-28s %-30s %5lu requests %5.2f cycles for 1, %6lu requests %5.2f sectors for 1   %s\n", name,
                  line.c_str(), count.shared_requests, count.Conflicts(), count.global_requests, count.Scatter(),
                  text.c_str());
    }
    test::Expect(count.Conflicts() <= conflicts && count.Scatter() <= scatter,
                 "%s: %s takes %.2f times the least cycles and %.2f times the least sectors, allowed %.2f and %.2f: %s",
                 name, line.c_str(), count.Conflicts(), count.Scatter(), conflicts, scatter, text.c_str());
  }
  for (std::size_t i = 0; i < allowed.size(); ++i) {
    test::Expect(met[i], "%s: no line has '%s'", name, allowed[i].text);
  }
}

template <typename T>
std::vector<T> Whole(Index count) {
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(rng());
  return values;
}
std::vector<std::uint64_t> Words(Index count) {
  std::vector<std::uint64_t> values(count);
  for (auto& value : values) value = std::uint64_t{rng()} << 32 | rng();
  return values;
}

// ---- codebooks

// Of a table of each row: what is left of a sector is for the next codes.
const Allowed kTableOfRow{"code < w.entries ? ", 1, 7};
// Once for all columns: lanes of two samples, whose sums begin four banks apart.
const Allowed kSumsOfFewRows{"sum += SumOf<Sum>(memory.words", 2, 1};
// A thread's codes are two vectors that lie side by side; x is transposed, with few banks twice; and four numbers that
// lie side by side nvcc moves at once, which no banks conflict with.
const std::vector<Allowed> kExactTiles{{"__ldg(static_cast<const uint4*>(p))", 1, 2},
                                       {"memory.x[buffer][item % 4 * 4 + j]", 2, 1},
                                       {"of_rows[i] = memory.weights[buffer]", 2, 1},
                                       {"tile.sums[thread / Tile::kRowThreads]", 4, 1}};

struct Codebooks {
  Index rows, columns, entries;
  bool per_row = false;
  Index column_block = 0;
};

void TestCodebook(const char* name, const Codebooks& c, CodebookMode mode, Index samples,
                  const std::vector<Allowed>& allowed) {
  const Index block = c.column_block == 0 ? c.columns : c.column_block;
  const Index tables = c.per_row ? c.rows : (c.columns + block - 1) / block;
  DeviceArray<std::uint8_t> codes("codes",
                                  Whole<std::uint8_t>(c.rows * CodeRowBytes(c.columns, block, CodeBits(c.entries))));
  DeviceArray<float> codebook("codebook", Random(tables * c.entries, rng)), x("x", Random(samples * c.columns, rng)),
      y("y", samples * c.rows), scales("scales", samples);
  CodebookMatmulCudaArgs args{{codes.data(), codebook.data(), c.entries, c.per_row, c.rows, c.columns, block},
                              mode,
                              x.data(),
                              FloatDtype::kFloat32,
                              nullptr,
                              false,
                              y.data(),
                              samples};
  const CodebookPlan plan = CodebookPlanCuda(args);
  DeviceArray<uint4> packed("packed", samples * plan.packed_stride / 16);
  DeviceArray<float> parts("parts", plan.part_count > 1 ? plan.part_count * samples * c.rows : 0);
  args.part_count = plan.part_count;
  if (plan.part_count > 1) args.parts = parts.data();
  if (plan.packed_stride > 0) args.packed = packed.data(), args.packed_stride = plan.packed_stride;
  args.sample_scales = scales.data();
  Expect(name, allowed, [&] { return CodebookMatmulCuda(args, nullptr); });
}

void TestCodebooks() {
  using enum CodebookMode;
  // Lanes have a column each of such a table; eight of them, with random rows, meet in some banks.
  std::vector<Allowed> exact_tiles_of_8 = kExactTiles;
  exact_tiles_of_8.push_back({"const float value = memory.table[words[i] >> shift", 3.1, 1});
  TestCodebook("codebook few bfloat16", {40, 1024, 16}, kBFloat16, 1, {});
  TestCodebook("codebook few bfloat16 8", {40, 1024, 16}, kBFloat16, 8, {});
  TestCodebook("codebook few bfloat16 16", {40, 1024, 256}, kBFloat16, 16, {});
  TestCodebook("codebook few bfloat16 rows", {40, 1024, 16, true}, kBFloat16, 8, {kTableOfRow});
  TestCodebook("codebook few int8", {40, 1024, 16}, kInt8, 8, {kSumsOfFewRows});
  TestCodebook("codebook few int8 8 bits", {40, 1024, 256}, kInt8, 8, {kSumsOfFewRows});
  TestCodebook("codebook few exact", {40, 1024, 16}, kExact, 1, {});
  TestCodebook("codebook few exact 8 bits", {40, 1024, 256}, kExact, 4, {});
  TestCodebook("codebook few exact rows", {40, 1024, 16, true}, kExact, 4, {kTableOfRow});
  TestCodebook("codebook tiles bfloat16", {128, 256, 16}, kBFloat16, 40, {});
  TestCodebook("codebook tiles bfloat16 80", {128, 256, 256}, kBFloat16, 80, {});
  TestCodebook("codebook tiles int8", {128, 256, 16}, kInt8, 80, {});
  TestCodebook("codebook tiles exact", {128, 256, 16}, kExact, 40, kExactTiles);
  TestCodebook("codebook tiles exact 8 bits", {128, 256, 256}, kExact, 80, exact_tiles_of_8);
  TestCodebook("codebook any tables", {40, 1024, 16, false, 256}, kExact, 8, {});
  DeviceArray<std::uint8_t> codes("codes", Whole<std::uint8_t>(40 * CodeRowBytes(1024, 1024, 4)));
  DeviceArray<float> codebook("codebook", Random(16, rng)), dense("dense", 40 * 1024), sums("sums", 16);
  DeviceArray<float> grad("grad", Random(40 * 1024, rng));
  const CodebookWeight weight{codes.data(), codebook.data(), 16, false, 40, 1024, 1024};
  Expect("codebook decode", {}, [&] { return CodebookDecodeCuda({weight, dense.data()}, nullptr); });
  const Index parts = 2;
  DeviceArray<double> partial("partial", parts * 16);
  Expect("codebook reduce", {{"sum += a.partial[part * entries + entry]", 1, 2}},
         [&] { return CodebookReduceCuda({weight, grad.data(), sums.data(), 1, parts, partial.data()}, nullptr); });
  std::vector<std::int32_t> rows;
  for (int i = 0; i < 9; ++i) rows.push_back(static_cast<int>(rng() % 40));
  DeviceArray<std::int32_t> indices("indices", rows);
  DeviceArray<float> y("y", 9 * 1024);
  Expect("codebook embedding", {}, [&] {
    return CodebookEmbeddingCuda({weight, {indices.data(), false}, 9, y.data(), FloatDtype::kFloat32}, nullptr);
  });
}

// ---- products

void TestProduct(const char* name, Index entries, Index samples, bool quantized, const std::vector<Allowed>& allowed) {
  const Index rows = 256, segments = 64, width = 4, columns = segments * width;
  ProductWeight w{nullptr, nullptr, 1, segments, segments, width, entries, rows, columns};
  const Index bytes = rows * segments / (entries == 16 ? 2 : 1);
  DeviceArray<std::uint8_t> codes("codes", Whole<std::uint8_t>(bytes));
  DeviceArray<float> codebooks("codebooks", Random(segments * width * entries, rng)),
      x("x", Random(samples * columns, rng)), y("y", samples * rows), lows("lows", samples * segments),
      ranges("ranges", samples * segments);
  DeviceArray<ProductScale> scales("scales", samples);
  w.codes = codes.data(), w.codebooks = codebooks.data();
  const ProductCudaPlan plan = ProductPlanCuda(w, samples, quantized);
  DeviceArray<std::uint8_t> parts("parts", ProductPartsBytes(w, plan, samples, quantized));
  const ProductMatmulCudaArgs args{w,
                                   x.data(),
                                   FloatDtype::kFloat32,
                                   plan,
                                   parts.data(),
                                   quantized ? lows.data() : nullptr,
                                   quantized ? ranges.data() : nullptr,
                                   quantized ? scales.data() : nullptr,
                                   nullptr,
                                   false,
                                   y.data(),
                                   samples};
  Expect(name, allowed, [&] { return ProductMatmulCuda(args, nullptr); });
}

void TestProducts() {
  // x is small beside the codes.
  const Allowed x{"ToFloat(x[rows[s] + entries[i].column", 1, 2}, staged{"to[i] = j < entry.width ? ToFloat(x[", 1, 2};
  // 32 random words of 256, as product_matmul_cuda.h says.
  const Allowed random{"sums[r].Add(words[j * 2 * Tile::kEntries + code])", 3.5, 1};
  // A thread's 16 rows are four vectors that lie side by side.
  const Allowed rows{"to[i] = {sums[r][s]", 1, 2};
  const Allowed low{"products[s] - a.lows[(first + s) * tables + table]", 1, 2}, scale{"a.scales[n] = {", 1, 1.25};
  TestProduct("product words 16", 16, 1, false, {x});
  TestProduct("product words 256", 256, 1, false, {random});
  TestProduct("product panels 16, 4", 16, 4, false, {});
  TestProduct("product panels 16, 8", 16, 8, false, {staged});
  TestProduct("product panels 256, 4", 256, 4, false, {rows});
  TestProduct("product panels 256, 8", 256, 8, false, {staged, rows});
  TestProduct("product int8 16", 16, 4, true, {x, low, scale});
  TestProduct("product int8 256", 256, 4, true, {random, scale});
}

// ---- signs

void TestXnor(const char* name, XnorPath path, Index samples, const std::vector<Allowed>& allowed) {
  const Index rows = 128, words = 32;
  DeviceArray<std::uint64_t> x("x", Words(samples * words)), weight("weight", Words(rows * words));
  DeviceArray<std::int32_t> dots("dots", samples * rows);
  XnorMatmulArgs args{x.data(), weight.data(), samples, words, words * 64, rows, {}, {}, {}, dots.data(), {}, {}};
  Expect(name, allowed, [&] { return XnorMatmulCudaBy(path, args, nullptr); });
}

void TestXnorConv(const char* name, XnorConvPath path, XnorOutput output, const std::vector<Allowed>& allowed) {
  const XnorConvProblem p({1, 128, 8, 8, 64, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1}, rng);
  DeviceArray<std::uint64_t> x("x", p.split);
  DeviceArray<std::int32_t> weight("weight", p.packed), thresholds("thresholds", p.thresholds);
  DeviceArray<std::int32_t> y("y", p.dots.size());
  XnorConv2dArgs args = p.args;
  args.x = x.data(), args.weight = weight.data();
  p.SetOutput(args, output, nullptr, nullptr, thresholds.data(), y.data());
  Expect(name, allowed, [&] { return XnorConv2dCudaBy(path, args, nullptr); });
}

void TestSigns() {
  TestXnor("xnor count", XnorPath::kCount, 4, {});
  TestXnor("xnor few", XnorPath::kFew, 16, {});
  TestXnor("xnor few 32", XnorPath::kFew, 32, {});
  // Half-warps write 8 words of each of two samples, whose banks overlap by half, so that those of 4 words of 4
  // samples, as they are read, do not. A fragment's results are two rows of 8 samples.
  TestXnor("xnor many", XnorPath::kMany, 128,
           {{"CopyAsync8(to, a.x", 2, 1},
            {"*to = 0;", 2, 1},
            {"to[0] = 0;", 2, 1},
            {"to[1] = 0;", 2, 1},
            {"a.dots[n * a.rows + r] = dot;", 1, 2}});
  TestXnorConv("xnor conv count", XnorConvPath::kCount, XnorOutput::kDots, {});
  // A pixel is half a sector, and those of a row of taps may begin with the other half. nvcc stores four words of zeros
  // at once, and then no banks conflict.
  const std::vector<Allowed> fragments{{"CopyAsync8(to, x + place.first)", 1, 1.14},
                                       {"to[0] = to[1] = to[2] = to[3] = 0;", 4, 1}};
  TestXnorConv("xnor conv fragments", XnorConvPath::kFragments, XnorOutput::kDots, fragments);
  TestXnorConv("xnor conv bits", XnorConvPath::kFragments, XnorOutput::kBits, fragments);
  const Index rows = 128, words = 9, columns = words * 64, samples = 4;
  DeviceArray<std::uint64_t> weight("weight", Words(rows * words)), bits("bits", samples * words);
  DeviceArray<float> x("x", Random(samples * columns, rng)), y("y", samples * rows);
  // nvcc stores four entries at once, and then no banks conflict. A thread reads four numbers that lie side by side.
  const Allowed entries{"entries[entry] = pair(0, entry & 3)", 4, 1};
  Expect("sign matmul", {entries, {"ToFloat(x[n * a.columns + c])", 1, 4}}, [&] {
    return SignMatmulCuda(
        {x.data(), FloatDtype::kFloat32, weight.data(), samples, columns, rows, nullptr, nullptr, false, y.data()},
        nullptr);
  });
  DeviceArray<std::uint8_t> bytes("bytes", Whole<std::uint8_t>(samples * columns));
  Expect("bitplane matmul", {entries, {"v.step * *from - v.zero", 1, 4}}, [&] {
    const BitplaneTablesArgs of_x{bytes.data(), nullptr, 0, samples, columns, 2, 255, nullptr};
    BitplaneMatmulArgs args{};
    args.weight = weight.data(), args.samples = samples, args.words = words, args.rows = rows, args.columns = columns;
    args.floats = y.data();
    return BitplaneMatmulCuda(of_x, args, nullptr);
  });
  Expect("sign pack", {},
         [&] { return SignPackCuda({x.data(), FloatDtype::kFloat32, columns, bits.data()}, samples, nullptr); });
  DeviceArray<float> images("images", Random(2 * 64 * 96, rng));
  DeviceArray<std::uint64_t> of_images("bits", 2 * 96);
  Expect("sign pack planes", {}, [&] {
    return SignPackPlanesCuda({images.data(), FloatDtype::kFloat32, 1, 64, 96, of_images.data()}, 2, nullptr);
  });
}

// ---- bitmaps

void TestBitmap(const char* name, BitmapWay way, Index rows, Index columns, double density, Index samples,
                const std::vector<Allowed>& allowed) {
  const RandomBitmap w(rows, columns, density, way, rng);
  DeviceArray<std::uint64_t> bitmap("bitmap", w.bitmap);
  DeviceArray<std::int32_t> offsets("offsets", w.row_offsets);
  DeviceArray<std::uint16_t> halves("values", w.halves);
  DeviceArray<std::uint8_t> codes("values", w.codes);
  DeviceArray<float> scales("scales", w.scales), x_scales("x_scales", Random(samples, rng));
  DeviceArray<std::uint16_t> x("x", DeviceFloats::Halves(Random(samples * columns, rng), FloatDtype::kBFloat16)),
      y("y", samples * rows);
  DeviceArray<std::int8_t> quantized("x", Whole<std::int8_t>(samples * columns));
  BitmapMatmulCudaArgs args{};
  args.weight = {bitmap.data(), offsets.data(),
                 nullptr,       way.stored_as,
                 nullptr,       0,
                 scales.data(), rows,
                 columns,       static_cast<Index>(w.values.size())};
  args.weight.values = way.quantized ? static_cast<const void*>(codes.data()) : halves.data();
  args.x = way.quantized ? static_cast<const void*>(quantized.data()) : x.data();
  args.stored_as = FloatDtype::kBFloat16, args.samples = samples, args.y = y.data();
  if (way.quantized) args.x_scales = x_scales.data();
  DeviceArray<uint4> scratch("scratch", (BitmapScratchBytes(args) + 15) / 16);
  args.scratch = scratch.data();
  Expect(name, allowed, [&] { return BitmapMatmulCuda(args, nullptr); });
}

void TestBitmaps() {
  const BitmapWay bfloat16{BitmapValues::kBFloat16, 0, false}, int8{BitmapValues::kInt8, 0, true};
  // A thread packs numbers that lie side by side, and another walks the words of a row. Lanes load a row's values where
  // their bits are set, so that what is counted as one request are those of several rows.
  const std::vector<Allowed> tiles{{"X number = c < columns ? x[c]", 1, 8},
                                   {"step < steps ? bits[step] : 0", 1, 4},
                                   {"pairs[i][0] = (own & 1)", 1, 9},
                                   {"pairs[i][1] = (own & 2)", 1, 9}};
  TestBitmap("bitmap tiles bfloat16", bfloat16, 64, 256, 0.35, 64, tiles);
  TestBitmap("bitmap tiles bfloat16 128", bfloat16, 64, 256, 0.35, 128, tiles);
  TestBitmap("bitmap tiles int8", int8, 64, 256, 0.35, 64, tiles);
  TestBitmap("bitmap tiles int8 128", int8, 64, 256, 0.35, 128, tiles);
  // Each lane lists the columns of its word as 16 bits each, from places that random counts before it make; a row's
  // values begin within a sector, and a column of a panel is half a sector. Two rows: the third of a random bitmap is
  // dense.
  const Allowed values{"static_cast<const BFloat16*>(w.values)[k]", 1, 1.6};
  TestBitmap("bitmap list 10 %", bfloat16, 2, 8192, 0.1, 1, {{"list[place] =", 2.25, 1}, values});
  TestBitmap("bitmap list 50 %", bfloat16, 2, 8192, 0.5, 1, {{"list[place] =", 3.6, 1}, values});
  TestBitmap("bitmap list 8 samples", bfloat16, 2, 8192, 0.1, 8,
             {{"list[place] =", 2.25, 1}, values, {"numbers = panels[of_chunk + list[j]]", 1, 2}});
}

// ---- fixed point

template <typename T>
void TestFixed(const char* name, Index samples, const std::vector<Allowed>& allowed) {
  const Index rows = 64, columns = 1024, words = columns * sizeof(T) / 4;
  DeviceArray<T> x("x", Whole<T>(samples * columns));
  DeviceArray<std::int32_t> packed("packed", Whole<std::int32_t>(rows * (words + 1)));
  DeviceArray<Index> sums("sums", samples * rows);
  const FixedCudaArgs args{x.data(), sizeof(T) == 2, packed.data(), sizeof(T) == 2, samples, columns, rows, sums.data(),
                           {}};
  Expect(name, allowed, [&] { return FixedMatmulCuda(args, nullptr); });
}

void TestFixedPoint() {
  TestFixed<std::int8_t>("fixed few int8", 4, {});
  TestFixed<std::int16_t>("fixed few int16", 2, {});
  // A thread's sums are of two or four rows that lie side by side.
  TestFixed<std::int8_t>("fixed many int8", 64, {{"sum = (chunk == 0 ? 0 : sum) +", 1, 2}});
  TestFixed<std::int16_t>("fixed many int16", 64, {{"a.sums[n * a.rows + r] = sums[i / Tile::kSide]", 1, 4}});
  DeviceArray<float> x("x", Random(4096, rng)), y("y", 4096);
  Expect("fixed round", {}, [&] {
    FixedRoundArgs args{x.data(), FloatDtype::kFloat32, 4, 4, true, 1, 0, y.data(), FixedAs::kFloats};
    return FixedRoundCuda(args, 4096, nullptr);
  });
}

// ---- sparse: every fourth column or so is there, and a warp has one row

void TestCsr(const char* name, Index samples, const std::vector<Allowed>& allowed) {
  const Index rows = 16, columns = 1024, of_row = 256;
  std::vector<std::int32_t> offsets, all;
  for (Index r = 0; r <= rows; ++r) offsets.push_back(static_cast<int>(r * of_row));
  for (Index k = 0; k < rows * of_row; ++k) all.push_back(static_cast<int>(k % of_row * 4 + rng() % 4));
  DeviceArray<std::int32_t> row_offsets("offsets", offsets), indices("columns", all);
  DeviceArray<float> values("values", Random(rows * of_row, rng)), x("x", Random(samples * columns, rng)),
      y("y", samples * rows), panels("panels", (samples + 7) / 8 * 8 * columns), sums("sums", samples * columns),
      grads("grads", rows * of_row), grad_y("grad_y", Random(samples * rows, rng));
  const CsrWeight w{row_offsets.data(),
                    indices.data(),
                    CsrIndices::kInt32,
                    values.data(),
                    CsrValues::kFloat32,
                    nullptr,
                    0,
                    rows,
                    columns,
                    rows * of_row};
  Expect(name, allowed, [&] {
    return CsrMatmulCuda({w, x.data(), FloatDtype::kFloat32, nullptr, false, y.data(), samples, panels.data()},
                         nullptr);
  });
  if (samples == 1) return;
  Expect("csr grad x", {{"atomicAdd(sums + s * w.columns + column", 1, 4}}, [&] {
    return CsrMatmulGradXCuda({w, grad_y.data(), FloatDtype::kFloat32, sums.data(), sums.data(), samples}, nullptr);
  });
  Expect("csr grad values", {{"sum += ToFloat(grad[n * w.rows]) * ToFloat(x[n * w.columns])", 1, 4}}, [&] {
    return CsrMatmulGradValuesCuda(
        {w, grad_y.data(), FloatDtype::kFloat32, x.data(), FloatDtype::kFloat32, grads.data(), samples}, nullptr);
  });
}

void TestBlocked() {
  const Index rows = kBlockedRows, columns = 256, of_row = 32, samples = 8;
  std::vector<std::int32_t> segments;
  std::vector<std::uint16_t> all;
  for (Index r = 0; r < rows; ++r) segments.push_back(static_cast<int>(r << 16 | of_row));
  for (Index k = 0; k < rows * of_row; ++k) all.push_back(static_cast<std::uint16_t>(k % of_row * 8 + rng() % 8));
  DeviceArray<std::int32_t> offsets("offsets", std::vector<std::int32_t>{0, static_cast<int>(rows * of_row)}),
      of_rows("segments", segments);
  DeviceArray<std::uint16_t> indices("indices", all);
  DeviceArray<float> values("values", Random(rows * of_row, rng)), x("x", Random(samples * columns, rng)),
      y("y", samples * rows);
  const BlockedWeight w{
      offsets.data(), of_rows.data(), indices.data(), values.data(), BlockedValues::kFloat32, nullptr, 0,
      rows,           columns,        rows * of_row,  columns};
  DeviceArray<float> panels("panels", samples * columns);
  // Two rows of 16 indices and of 16 values are read at once. The panel's columns lie a sector apart.
  Expect("blocked matmul", {}, [&] {
    return BlockedMatmulCuda(
        {w, x.data(), FloatDtype::kFloat32, nullptr, false, y.data(), samples, nullptr, nullptr, panels.data()},
        nullptr);
  });
}

// ---- flattened convolution

void TestFlat() {
  const Index channels = 32, maps = 16, size = 16;
  FlatStage s{nullptr, channels, maps, 1, 3, 3, 1, 1, 1, 1, size, size, size, size};
  DeviceArray<float> packed("packed", Random(s.Vectors() * kFlatLanes, rng)),
      x("x", Random(channels * size * size, rng)), y("y", maps * size * size);
  s.packed = packed.data();
  DeviceArray<float> l("l", FlatLateralFloats(s, 1));
  const ConvSteps x_steps{channels * size * size, size * size, size, 1},
      y_steps{maps * size * size, size * size, size, 1};
  // A thread writes four pixels that lie side by side; taps are those of one lane of a panel.
  Expect("flat conv",
         {{"to[m * plane] = sums[m][p];", 1, 4},
          {"memory.vertical[thread] = vertical[", 1, 3},
          {"memory.horizontal[k] = horizontal[", 1, 3}},
         [&] {
           return FlatConvCuda({s, 1, x.data(), x_steps, FloatDtype::kFloat32, l.data(), false, y.data(), y_steps,
                                FloatDtype::kFloat32},
                               nullptr);
         });
}

// ---- convolutions

void TestCodebookConv(const char* name, CodebookMode mode, bool windows, const std::vector<Allowed>& allowed) {
  const Index channels = 16, height = 8, width = 16, outputs = height * width, columns = channels * 9;
  const Index filters = windows ? 64 : 8, entries = 16;
  DeviceArray<std::uint8_t> codes("codes",
                                  Whole<std::uint8_t>(filters * CodeRowBytes(columns, columns, CodeBits(entries))));
  DeviceArray<float> codebook("codebook", Random(entries, rng)), x("x", Random(channels * outputs, rng)),
      y("y", filters * outputs), scales("scales", std::vector<float>{1});
  DeviceArray<std::int8_t> bytes("x", Whole<std::int8_t>(channels * outputs)), tables("tables", Whole<std::int8_t>(16));
  CodebookConvCudaArgs args{};
  args.weight = {codes.data(), codebook.data(), entries, false, filters, columns, columns};
  args.shape = {channels, filters, 1, 3, 3, 1, 1, 1, 1};
  args.images = 1, args.height = args.out_height = height, args.width = args.out_width = width;
  args.pad_h = args.pad_w = 1;
  args.x = mode == CodebookMode::kInt8 ? static_cast<const void*>(bytes.data()) : x.data();
  args.x_steps = {channels * outputs, outputs, width, 1};
  // With the channels last, since lanes of the product have a row each.
  args.y = y.data(), args.y_steps = {filters * outputs, 1, width * filters, filters};
  if (!windows) args.y_steps = {filters * outputs, outputs, width, 1};
  args.mode = mode;
  args.tables = tables.data(), args.table_stride = entries;
  args.image_scales = args.table_scales = scales.data();
  if (windows) args.plan = CodebookConvPlanCuda(args);
  const CodebookConvPlan& plan = args.plan;
  test::Expect((plan.outputs > 0) == windows, "%s: windows for %ld outputs", name, long{plan.outputs});
  DeviceArray<uint4> of_windows("windows", plan.outputs * plan.window_stride / 16);
  DeviceArray<float> window_scales("window_scales", plan.outputs),
      parts("parts", plan.part_count * plan.outputs * filters);
  args.windows = of_windows.data(), args.window_scales = window_scales.data(), args.parts = parts.data();
  Expect(name, allowed, [&] { return CodebookConvCuda(args, nullptr); });
}

void TestSparseConv(const char* name, ConvMode mode, int splits, bool tiled, const std::vector<Allowed>& allowed,
                    bool fragments = false) {
  const Index channels = 16, filters = 16, size = 14, of_row = 36, columns = channels * 9, plane = size * size;
  std::vector<std::int32_t> offsets, all;
  for (Index r = 0; r <= filters; ++r) offsets.push_back(static_cast<int>(r * of_row));
  for (Index k = 0; k < filters * of_row; ++k) all.push_back(static_cast<int>(k % of_row * 4 + rng() % 4));
  DeviceArray<std::int32_t> row_offsets("offsets", offsets), indices("columns", all);
  DeviceArray<float> values("values", Random(filters * of_row, rng)), x("x", Random(channels * plane, rng)),
      y("y", filters * plane);
  DeviceArray<ConvScale> scales("scales", 1 + filters);
  ConvCudaArgs args{};
  args.weight = {row_offsets.data(),
                 indices.data(),
                 CsrIndices::kInt32,
                 values.data(),
                 CsrValues::kFloat32,
                 nullptr,
                 0,
                 filters,
                 columns,
                 filters * of_row};
  args.shape = {channels, filters, 1, 3, 3, 1, 1, 1, 1};
  args.images = 1, args.height = args.width = args.out_height = args.out_width = size, args.pad_h = args.pad_w = 1;
  args.x = x.data(), args.x_steps = {channels * plane, plane, size, 1};
  args.y = y.data(), args.y_steps = {filters * plane, plane, size, 1};
  args.mode = mode, args.scales = scales.data();
  args.plan = fragments ? ConvFragmentPlan(args) : ConvPlanCuda(args);
  test::Expect(args.plan.tiled || args.plan.fragments, "%s: no tiles", name);
  args.plan.tiled = tiled;
  if (splits != 0) args.plan.splits = splits;
  DeviceArray<std::uint8_t> scratch("scratch", ConvScratchBytes(args));
  args.scratch = scratch.data();
  Expect(name, allowed, [&] { return ConvCuda(args, nullptr); });
}

void TestConvolutions() {
  using enum CodebookMode;
  // Taps begin within a sector, and where they are outside the image, lanes are counted with another tap of others.
  const Allowed x{"numbers[i] = ToFloat(x[tap.offset])", 1, 1.6};
  std::vector<Allowed> exact = kExactTiles;
  exact.push_back(x);
  TestCodebookConv("codebook conv exact", kExact, true, exact);
  TestCodebookConv("codebook conv bfloat16", kBFloat16, true, {x});
  TestCodebookConv("codebook conv int8", kInt8, true, {{"numbers[i] = x[tap.offset]", 1, 3.3}});
  // Four columns of a filter's codes are half a sector.
  const Allowed offsets{"x[k] = read ?", 1.06, 1}, codes{"code = words[in_chunk % 16]", 1, 2};
  TestCodebookConv("codebook conv few exact", kExact, false,
                   {{"ToFloat(static_cast<const Float*>(a.x)[at])", 1, 1.6}, offsets, codes});
  TestCodebookConv("codebook conv few int8", kInt8, false,
                   {{"static_cast<const std::int8_t*>(a.x)[at]", 1, 2.5}, offsets, codes});
  // Rows and a tile's inputs begin within a sector. A tap is stored as two words, with another between those of a lane.
  // Two lanes are past the last of 222 outputs, and read the first one beside that of its bank: 8 cycles for 7.
  std::vector<Allowed> tiles{{"static_cast<const std::int32_t*>(w.col_indices)[k]", 1, 1.4},
                             {"static_cast<const float*>(w.values)[k]", 1, 1.2},
                             {"to[c * size + place] = Staged(", 1, 1.2},
                             {"memory.taps[warp][lane] = {", 1.5, 1},
                             {"inputs + (places[p] + tap.place)", 1.15, 1}};
  TestSparseConv("sparse conv", ConvMode::kExact, 0, true, tiles);
  tiles.push_back({"static_cast<float>(static_cast<int>(total)) * a.scales", 1, 1.1});
  TestSparseConv("sparse conv int8", ConvMode::kInt8, 2, true, tiles);
  // Without tiles a tap is stored number by number, 8 words from one lane to the next.
  TestSparseConv("sparse conv outputs", ConvMode::kExact, 1, false,
                 {{"static_cast<const std::int32_t*>(w.col_indices)[k]", 1, 1.2},
                  {"static_cast<const float*>(w.values)[k]", 1, 1.2},
                  {"return static_cast<const float*>(a.x)[i]", 1, 2},
                  {"static_cast<float*>(a.y)[i] = y", 1, 1.2},
                  {"taps[thread] = TapAt(", 1.8, 1},
                  {"h = top + tap.down", 1.01, 1},
                  {"const float x = read ? InputAt(", 1.4, 1}});
  // A non-zero is stored where its column says; 8 neighbouring pixels of a channel begin within a sector.
  const std::vector<Allowed> fragments{{"static_cast<const std::int32_t*>(w.col_indices)[k]", 1, 1.2},
                                       {"static_cast<const float*>(w.values)[k]", 1, 1.2},
                                       {"reinterpret_cast<Bits*>(&memory.words[at])", 9, 1},
                                       {"const float number = i < count ?", 1, 1.6},
                                       {"static_cast<float*>(a.y)[i] = y", 1, 1.2}};
  TestSparseConv("sparse conv fragments", ConvMode::kBFloat16, 0, false, fragments, true);
  TestSparseConv("sparse conv fragments int8", ConvMode::kInt8, 0, false, fragments, true);
}

}  // namespace

int main() {
  TestCodebooks();
  TestProducts();
  TestSigns();
  TestBitmaps();
  TestFixedPoint();
  TestCsr("csr 1", 1, {{"sums[0] += value * ToFloat(x[at])", 1, 4}});
  TestCsr("csr 8", 8, {{"y[(first + lane) * w.rows + r] =", 1, 8}});
  TestBlocked();
  TestFlat();
  TestConvolutions();
  return Failures() != 0;
}
