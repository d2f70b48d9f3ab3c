// Times variants of the codebook kernels on a GPU, beside each other: medians of graphs of launches over rotating
// buffers larger than the second cache level, and the largest error of each against a plain kernel.
//   nvcc -std=c++20 -O3 -arch=sm_90 -I csrc -o codebook_variants bench/cuda/codebook_variants.cu \
//     csrc/kernels/codebook_matmul/*_cuda.cu && ./codebook_variants
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/codebook_matmul/codebook_few.cuh"
#include "kernels/codebook_matmul/codebook_tiles.cuh"

using namespace tersetorch;

#define CHECK(call)                                                                                        \
  do {                                                                                                     \
    const int error = static_cast<int>(call);                                                              \
    if (error != 0) {                                                                                      \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(static_cast<cudaError_t>(error))); \
      std::exit(1);                                                                                        \
    }                                                                                                      \
  } while (0)

namespace variants {

using Index = std::int64_t;

struct Shape {
  Index rows, columns;
};

template <typename T>
T* OnDevice(const std::vector<T>& values) {
  T* p;
  CHECK(cudaMalloc(&p, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

// y[n][r] in double, by the formula; for the first rows and samples.
__global__ void Plain(CodebookMatmulCudaArgs a, double* y, Index rows) {
  const Index r = threadIdx.x + Index{blockIdx.x} * blockDim.x, n = blockIdx.y;
  if (r >= rows) return;
  const CodebookWeight& w = a.weight;
  const int bits = CodeBits(w.entries);
  const Index of_chunk = 512 / bits;
  const auto* words = reinterpret_cast<const std::uint32_t*>(w.codes + r * CodeRowBytes(w.columns, w.columns, bits));
  std::uint32_t table = 0, sample = 0;
  if (a.mode == CodebookMode::kInt8) {
    for (int k = 0; k < w.entries; ++k) table = max(table, __float_as_uint(w.codebook[k]) & 0x7fffffffu);
    for (Index c = 0; c < w.columns; ++c) {
      sample = max(sample, __float_as_uint(static_cast<const float*>(a.x)[n * w.columns + c]) & 0x7fffffffu);
    }
  }
  const TableScale of_table = ScaleOfLargest(table), of_x = ScaleOfLargest(sample);
  double sum = 0;
  for (Index c = 0; c < w.columns; ++c) {
    const Index in_chunk = c % of_chunk;
    const std::uint32_t code = words[c / of_chunk * 16 + in_chunk % 16] >> bits * (in_chunk / 16) & ((1u << bits) - 1);
    float weight = w.codebook[code], x = static_cast<const float*>(a.x)[n * w.columns + c];
    if (a.mode == CodebookMode::kBFloat16) {
      weight = ToFloat(FromFloat<BFloat16>(weight)), x = ToFloat(FromFloat<BFloat16>(x));
    } else if (a.mode == CodebookMode::kInt8) {
      weight = rintf(weight * of_table.inverse), x = rintf(x * of_x.inverse);
    }
    sum += static_cast<double>(weight) * x;
  }
  y[n * rows + r] = a.mode == CodebookMode::kInt8 ? sum * of_table.scale * of_x.scale : sum;
}

struct Variant {
  std::string name;
  std::function<int(const CodebookMatmulCudaArgs&, void*)> run;
};

constexpr int kLaunches = 40, kRepeats = 9;

void Measure(const Shape& shape, int entries, CodebookMode mode, Index samples, const std::vector<Variant>& variants) {
  const int bits = CodeBits(entries);
  const Index row_bytes = CodeRowBytes(shape.columns, shape.columns, bits), bytes = shape.rows * row_bytes;
  const int copies = static_cast<int>(std::clamp<Index>(160'000'000 / bytes + 1, 2, 64));
  std::mt19937 rng(1);
  std::vector<std::uint8_t> codes(bytes);
  for (std::size_t i = 0; i + 4 <= codes.size(); i += 4) {
    const std::uint32_t word = rng();
    std::memcpy(&codes[i], &word, 4);
  }
  std::normal_distribution<float> normal;
  std::vector<float> x(samples * shape.columns), codebook(entries);
  for (float& v : x) v = normal(rng);
  for (float& v : codebook) v = normal(rng);
  std::vector<std::uint8_t*> rotated;
  for (int i = 0; i < copies; ++i) rotated.push_back(OnDevice(codes));
  float *y, *scales, *parts;
  void* packed;
  constexpr int kParts = 16;
  const Index stride = CodeChunks(shape.columns, bits) * (512 / bits) * (mode == CodebookMode::kInt8 ? 1 : 2);
  CHECK(cudaMalloc(&y, samples * shape.rows * 4));
  CHECK(cudaMalloc(&scales, samples * 4));
  CHECK(cudaMalloc(&packed, samples * stride));
  CHECK(cudaMalloc(&parts, std::min<Index>(samples, 1024) * shape.rows * 4 * kParts));
  CodebookMatmulCudaArgs args{
      {rotated[0], OnDevice(codebook), entries, false, shape.rows, shape.columns, shape.columns},
      mode,
      OnDevice(x),
      FloatDtype::kFloat32,
      nullptr,
      false,
      y,
      samples};
  args.packed_stride = stride;
  args.packed = packed;
  args.sample_scales = scales;
  args.parts = parts;
  const Index few_rows = std::min<Index>(shape.rows, 256), few_samples = std::min<Index>(samples, 16);
  double* plain;
  CHECK(cudaMalloc(&plain, few_samples * few_rows * 8));
  Plain<<<dim3(static_cast<unsigned>((few_rows + 63) / 64), static_cast<unsigned>(few_samples)), 64>>>(args, plain,
                                                                                                       few_rows);
  std::vector<double> expected(few_samples * few_rows);
  CHECK(cudaMemcpy(expected.data(), plain, expected.size() * 8, cudaMemcpyDeviceToHost));
  const char* modes[] = {"exact", "bfloat16", "int8"};
  std::printf("\n%ld x %ld, %d bits, %s, batch %ld: %.1f MB of codes, %.2f us at 3.0 TB/s, %.1f GFLOP\n",
              long(shape.rows), long(shape.columns), bits, modes[static_cast<int>(mode)], long(samples), bytes / 1e6,
              bytes / 3.0e6, 2e-9 * shape.rows * shape.columns * samples);
  cudaStream_t stream;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (const Variant& variant : variants) {
    CHECK(cudaMemset(y, 0xff, samples * shape.rows * 4));
    const int launched = variant.run(args, stream);
    const int error = launched != 0 ? launched : static_cast<int>(cudaStreamSynchronize(stream));
    if (error != 0) {
      std::printf("  %-34s %s\n", variant.name.c_str(), cudaGetErrorString(static_cast<cudaError_t>(error)));
      if (launched == 0) std::exit(1);
      cudaGetLastError();
      continue;
    }
    std::vector<float> got(samples * shape.rows);
    CHECK(cudaMemcpy(got.data(), y, got.size() * 4, cudaMemcpyDeviceToHost));
    double worst = 0, largest = 0;
    for (Index n = 0; n < few_samples; ++n) {
      for (Index r = 0; r < few_rows; ++r) {
        const double off = std::fabs(got[n * shape.rows + r] - expected[n * few_rows + r]);
        worst = off <= worst ? worst : off;  // NaN stays
        largest = std::max(largest, std::fabs(expected[n * few_rows + r]));
      }
    }
    cudaGraph_t graph;
    cudaGraphExec_t launches;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < kLaunches; ++i) {
      CodebookMatmulCudaArgs rotating = args;
      rotating.weight.codes = rotated[i % copies];
      CHECK(variant.run(rotating, stream));
    }
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&launches, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < kRepeats + 1; ++i) {
      float ms = 0;
      CHECK(cudaEventRecord(begin, stream));
      CHECK(cudaGraphLaunch(launches, stream));
      CHECK(cudaEventRecord(end, stream));
      CHECK(cudaEventSynchronize(end));
      CHECK(cudaEventElapsedTime(&ms, begin, end));
      if (i > 0) times.push_back(ms * 1000 / kLaunches);
      if (ms > 200 && i > 1) break;
    }
    std::sort(times.begin(), times.end());
    const double us = times[times.size() / 2];
    std::printf("  %-34s %9.2f us (min %9.2f)  %7.1f GB/s  %8.2f TOP/s  error %.1e\n", variant.name.c_str(), us,
                times[0], bytes / us / 1e3, 2e-6 * shape.rows * shape.columns * samples / us, worst / largest);
    std::fflush(stdout);
    cudaGraphExecDestroy(launches);
    cudaGraphDestroy(graph);
  }
  for (std::uint8_t* p : rotated) cudaFree(p);
  for (void* p : {static_cast<void*>(y), static_cast<void*>(scales), packed, static_cast<void*>(parts),
                  static_cast<void*>(plain), const_cast<void*>(args.x)}) {
    cudaFree(p);
  }
  cudaStreamDestroy(stream);
}

// ---- the variants

// What the library launches, with what packs x and adds parts up.
Variant Shipped() {
  return {"as shipped", [](CodebookMatmulCudaArgs a, void* stream) {
            const CodebookPlan plan = CodebookPlanCuda(a);
            a.packed_stride = plan.packed_stride;
            a.part_count = plan.part_count;
            if (plan.packed_stride == 0) a.packed = nullptr;
            if (plan.part_count == 1) a.parts = nullptr;
            return CodebookMatmulCuda(a, stream);
          }};
}
Variant Pack() { return {"packing x alone", CodebookPackCuda}; }

template <typename Tile>
dim3 Blocks(const CodebookMatmulCudaArgs& a, int parts = 1) {
  return {static_cast<unsigned>(CeilDiv(a.weight.rows, Tile::kRows)), BlocksOnY(a.samples, Tile::kSamples),
          static_cast<unsigned>(parts)};
}

template <int kSlots, int kGroups, int kWarps, template <int, bool, int> typename Mode, int kBits, typename X = XPacked>
Variant Few() {
  using Tile = FewTile<kSlots, kGroups, kWarps>;
  return {"few " + std::to_string(Tile::kRows) + " rows, " + std::to_string(kWarps) + " warps",
          [](const CodebookMatmulCudaArgs& a, void* stream) {
            return Launch(CodebookFewKernel<Tile, Mode<kBits, false, kSlots>, X>, Blocks<Tile>(a).x, Tile::kThreads,
                          stream, a);
          }};
}
template <int kSlots, int kSamples, int kWarps, int kBits>
Variant ExactFew() {
  using Tile = ExactFewTile<kSlots, kSamples, kWarps>;
  return {"few " + std::to_string(Tile::kRows) + " rows, " + std::to_string(kWarps) + " warps",
          [](CodebookMatmulCudaArgs a, void* stream) {
            a.packed = nullptr;
            return Launch(CodebookExactFewKernel<Tile, kBits, false>, Blocks<Tile>(a), Tile::kThreads, stream, a);
          }};
}

int AddParts(const CodebookMatmulCudaArgs& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(a.weight.rows, PartsTile::kThreads)), static_cast<unsigned>(a.samples));
  return a.mode == CodebookMode::kInt8
             ? Launch(CodebookAddPartsKernel<PartsTile, int>, grid, PartsTile::kThreads, stream, a)
             : Launch(CodebookAddPartsKernel<PartsTile, float>, grid, PartsTile::kThreads, stream, a);
}
// With x packed already.
template <typename Tile, typename Memory>
Variant Tiles(const char* name, void (*kernel)(CodebookMatmulCudaArgs), int parts) {
  return {std::string(name) + ", " + std::to_string(parts) + " parts", [=](CodebookMatmulCudaArgs a, void* stream) {
            a.part_count = parts;
            if (parts == 1) a.parts = nullptr;
            if (a.mode == CodebookMode::kExact) a.packed = nullptr;
            const int error =
                LaunchWithMemory(kernel, Blocks<Tile>(a, parts), Tile::kThreads, sizeof(Memory), stream, a);
            return error != 0 || parts == 1 ? error : AddParts(a, stream);
          }};
}
template <typename Tile, typename Mode>
Variant Fragments(const char* name, int parts) {
  return Tiles<Tile, typename Tile::template Memory<Mode>>(name, CodebookTileKernel<Tile, Mode>, parts);
}
template <typename Tile, int kBits>
Variant ExactTiles(const char* name, int parts) {
  return Tiles<Tile, typename Tile::template Memory<kBits>>(name, CodebookExactTileKernel<Tile, kBits, false>, parts);
}
template <typename Mode>
std::vector<Variant> TileVariants() {
  std::vector<Variant> all{Shipped(), Pack()};
  for (const int parts : {1, 2, 4}) {
    all.push_back(Fragments<FragmentTile<4, 4, 2, 2, 4, 2>, Mode>("64 x 64, 4 warps", parts));
    all.push_back(Fragments<FragmentTile<4, 8, 4, 2, 4, 1>, Mode>("128 x 128, 8 warps", parts));
  }
  return all;
}

}  // namespace variants

int main() {
  using namespace variants;
  using enum CodebookMode;
  const Shape large{4096, 9216}, wide{11008, 4096}, square{4096, 4096};
  for (const Shape& shape : {large, wide, square}) {
    Measure(shape, 16, kBFloat16, 1,
            {Shipped(), Few<4, 1, 16, BFloat16Fragments, 4, XAsItLies<float>>(),
             Few<2, 1, 16, BFloat16Fragments, 4, XAsItLies<float>>()});
    Measure(shape, 16, kInt8, 1,
            {Shipped(), Pack(), Few<2, 1, 16, Int8Fragments, 4>(), Few<4, 1, 16, Int8Fragments, 4>()});
    Measure(shape, 16, kExact, 1, {Shipped(), ExactFew<2, 1, 16, 4>(), ExactFew<4, 1, 16, 4>()});
  }
  for (const CodebookMode mode : {kBFloat16, kInt8, kExact}) {
    for (const int entries : {4, 16, 256}) {
      for (const Index samples : {1, 2, 4, 8, 16, 32}) Measure(large, entries, mode, samples, {Shipped()});
    }
  }
  Measure(large, 16, kExact, 4, {Shipped(), ExactFew<2, 4, 8, 4>(), ExactFew<2, 4, 16, 4>()});
  Measure(large, 16, kExact, 8, {Shipped(), ExactFew<2, 8, 8, 4>(), ExactFew<2, 8, 16, 4>()});
  for (const Index samples : {64, 128, 256, 1024}) {
    Measure(large, 16, kBFloat16, samples, TileVariants<BFloat16Fragments<4, false, 4>>());
    Measure(large, 16, kInt8, samples, TileVariants<Int8Fragments<4, false, 4>>());
    std::vector<Variant> exact{Shipped()};
    for (const int parts : {1, 2, 8}) {
      exact.push_back(ExactTiles<ExactTile<4, 2>, 4>("128 x 64", parts));
      exact.push_back(ExactTiles<ExactTile<8, 1>, 4>("128 x 128", parts));
    }
    Measure(large, 16, kExact, samples, exact);
  }
  return 0;
}
