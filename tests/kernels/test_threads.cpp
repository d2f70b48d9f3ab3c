// Many threads at once: the first use of what is made at the first use, one weight that all of them multiply by, and
// every coder on the same data. Built with ThreadSanitizer (make test-threads) this also reports what they share.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "codec/bit_stream.h"
#include "codec/contexts.h"
#include "codec/huffman.h"
#include "codec/numbers.h"
#include "codec/positions.h"
#include "codec/rans.h"
#include "kernels/arrays.h"
#include "kernels/blocked_matmul/blocked_matmul.h"
#include "kernels/check.h"
#include "kernels/common/cpu_isa.h"
#include "kernels/csr_matmul/csr_matmul.h"
#include "kernels/sparse_conv2d/sparse_conv2d.h"
#include "kernels/vector_kmeans/vector_kmeans.h"
#include "kernels/xnor_problem.h"

using namespace tersetorch;
using namespace tersetorch::test;

namespace {

constexpr int kThreads = 6;
using Bytes = std::vector<std::uint8_t>;

// Calls run(thread) on every thread, as nearly at once as it goes.
void OnThreads(const std::function<void(int)>& run) {
  std::atomic<int> waiting = kThreads;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (--waiting; waiting != 0;) std::this_thread::yield();
      run(t);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Whether make() gives on every thread what it gives on one.
template <typename Make>
void ExpectTheSame(const char* name, const Make& make) {
  std::vector<decltype(make())> found(kThreads);
  OnThreads([&](int t) { found[static_cast<std::size_t>(t)] = make(); });
  const auto alone = make();
  for (const auto& one : found) Expect(one == alone, "%s: another result among other threads", name);
}

struct Csr {
  explicit Csr(Index rows, Index columns, std::mt19937& rng) : rows(rows), columns(columns) {
    for (Index r = 0; r < rows; ++r) {
      for (Index c = 0; c < columns; ++c) {
        if (rng() % 3 == 0) indices.push_back(static_cast<std::int32_t>(c));
      }
      offsets.push_back(static_cast<std::int32_t>(indices.size()));
    }
    values = Random(static_cast<Index>(indices.size()), rng);
  }
  CsrWeight Weight() const {
    return {offsets.data(),
            indices.data(),
            CsrIndices::kInt32,
            values.data(),
            CsrValues::kFloat32,
            nullptr,
            0,
            rows,
            columns,
            static_cast<Index>(indices.size())};
  }
  std::vector<float> Multiply(const std::vector<float>& panel, Index width) const {
    std::vector<float> y(rows * width);
    CsrMatmul({Weight(), panel.data(), width, nullptr, false, y.data(), FloatDtype::kFloat32, width}, 0, rows);
    return y;
  }

  Index rows, columns;
  std::vector<std::int32_t> offsets{0}, indices;
  std::vector<float> values;
};

// Levels and probes that are asked for once in a process: before anything else has.
void TestFirstUse() {
  std::mt19937 rng(1);
  const Csr weight(40, 90, rng);
  const auto x = Random(90, rng);
  std::vector<std::vector<float>> y(kThreads);
  std::atomic<int> same = 0;
  OnThreads([&](int t) {
    y[static_cast<std::size_t>(t)] = weight.Multiply(x, 1);  // asks for the level, and times gathers
    same += ConvLanes() == ConvLanes() && BlockedQuadOffset() == BlockedQuadOffset();
  });
  for (const auto& one : y) Expect(one == y[0], "csr_matmul: another result at the first use");
  Expect(same == kThreads, "levels: another answer at the second question");
}

void TestKernels() {
  std::mt19937 rng(2);
  const Csr weight(130, 100, rng);
  for (const Index width : {1, 8, 32}) {
    const auto panel = Random(100 * width, rng);
    ExpectTheSame("csr_matmul", [&] { return weight.Multiply(panel, width); });
  }
  const XnorProblem signs(70, 200, 9, rng);
  ExpectTheSame("xnor_matmul", [&] {
    std::vector<std::int32_t> dots(signs.dots.size());
    XnorMatmulArgs args{signs.x.data(),
                        signs.packed.data(),
                        signs.samples,
                        signs.words,
                        signs.columns,
                        signs.rows,
                        {},
                        {},
                        {},
                        {},
                        {},
                        {}};
    args.dots = dots.data();
    XnorMatmul(args, 0, XnorTiles(signs.rows));
    return dots;
  });
  const auto points = Random(300 * 4, rng), centres = Random(16 * 4, rng);
  ExpectTheSame("vector_kmeans", [&] {
    std::vector<float> found = centres;
    std::vector<std::int32_t> codes(300);
    std::vector<double> scratch(VectorKmeansScratch(300, 4, 16));
    VectorKmeans({points.data(), 300, 4, 16, nullptr, 5, 2, codes.data(), found.data(), scratch.data()});
    return std::make_pair(found, codes);
  });
}

void TestCoders() {
  std::mt19937 rng(3);
  std::vector<std::uint16_t> symbols(5000);
  std::vector<std::uint64_t> counts(100);
  for (std::uint16_t& symbol : symbols)
    ++counts[symbol = static_cast<std::uint16_t>(std::min(rng() % 100, rng() % 100))];
  ExpectTheSame("rans", [&] {
    const Bytes stream = RansEncode(symbols, BestRansCoding(counts));
    RansDecoder decoder(counts.size(), stream);
    std::vector<std::uint16_t> found(symbols.size());
    decoder.Read(found);
    decoder.Finish();
    return std::make_pair(stream, found);
  });
  // One decoder's tables serve all threads.
  BitWriter writer;
  const HuffmanEncoder encoder(HuffmanLengths(counts));
  encoder.WriteTable(writer);
  for (const std::uint16_t symbol : symbols) encoder.Write(symbol, writer);
  const Bytes huffman = writer.Finish();
  BitReader head(huffman.data(), huffman.size());
  const HuffmanDecoder decoder(counts.size(), head, symbols.size());
  ExpectTheSame("huffman", [&] {
    BitReader reader = head;
    std::vector<std::uint16_t> found(symbols.size());
    decoder.Read(reader, found);
    return found;
  });

  const WeightGrid grid{8 * 10 * 9, 10, 9, 3};
  std::vector<std::int64_t> positions;
  for (std::int64_t p = 0; p < grid.size; ++p) {
    if (rng() % 3 == 0) positions.push_back(p);
  }
  std::vector<std::uint8_t> codes(positions.size());
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(rng() % 16);
  using Places = std::vector<std::int64_t>;
  for (const GapCoder coder : {GapCoder::kPacked, GapCoder::kHuffman, GapCoder::kRans}) {
    ExpectTheSame("gaps", [&] {
      const Bytes stream = EncodeGaps(positions, 3, coder);
      Places found(positions.size());
      DecodeGaps(stream, 3, coder, grid.size, found);
      return std::make_pair(stream, found);
    });
  }
  ExpectTheSame("contexts", [&] {
    const Bytes of_positions = EncodePositionsInContext(positions, grid);
    const Bytes of_codes = EncodeSymbolsInContext(codes, positions, grid, {4, 7});
    Places found(positions.size());
    Bytes found_codes(codes.size());
    DecodePositionsInContext(of_positions, grid, found);
    DecodeSymbolsInContext(of_codes, positions, grid, {4, 7}, found_codes);
    return std::make_pair(found, found_codes);
  });
  std::vector<std::uint64_t> patterns(200);
  for (std::uint64_t& pattern : patterns) pattern = rng();
  ExpectTheSame("numbers", [&] {
    const Bytes stream = EncodeNumbers(patterns, 32);
    std::vector<std::uint64_t> found(patterns.size());
    DecodeNumbers(stream, 32, found);
    return std::make_pair(stream, found);
  });
}

}  // namespace

int main() {
  TestFirstUse();
  TestKernels();
  TestCoders();
  return Failures() != 0;
}
