// A small coverage-guided fuzzer of native code: inputs that reach a new edge of the compiled sources, or come nearer
// to equality in one of their comparisons, are kept and changed further. GCC's -fsanitize-coverage calls the hooks in
// engine.cpp; the address and undefined-behaviour sanitizers say what a crash is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tersetorch::fuzz {

using Bytes = std::vector<std::uint8_t>;

struct Target {
  const char* name;
  // Reads one input. It may throw std::invalid_argument, which is a refusal; anything else is a crash.
  void (*run)(std::span<const std::uint8_t> input);
  // Inputs to begin with.
  std::vector<Bytes> (*seeds)();
};

// Of the program that engine.cpp is linked with. The first byte of an input is the number of its target, which changes
// leave alone.
std::span<const Target> Targets();

// Ends the run as a crash, with this sentence.
[[noreturn]] void Fail(const char* what);

// Takes numbers from the front of an input; zeros when it is used up.
class Arguments {
 public:
  explicit Arguments(std::span<const std::uint8_t> input) : rest_(input) {}

  std::uint64_t Take(int bytes) {
    std::uint64_t number = 0;
    for (int i = 0; i < bytes && !rest_.empty(); ++i, rest_ = rest_.subspan(1)) {
      number |= std::uint64_t{rest_[0]} << 8 * i;
    }
    return number;
  }
  // Between low and high, both included.
  std::int64_t Take(int bytes, std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(Take(bytes) % static_cast<std::uint64_t>(high - low + 1));
  }
  // What is left, in memory of its own: a read past its end is one past an allocation.
  Bytes Rest() const { return Bytes(rest_.begin(), rest_.end()); }
  std::size_t Left() const { return rest_.size(); }

 private:
  std::span<const std::uint8_t> rest_;
};

}  // namespace tersetorch::fuzz
