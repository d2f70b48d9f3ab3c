// A parser with a bug behind a comparison, a length and a checksum, which the fuzzer must find: it reads past an array.
#include <cstdint>
#include <stdexcept>

#include "native/engine.h"

namespace tersetorch::fuzz {
namespace {

void Parse(std::span<const std::uint8_t> input) {
  Arguments arguments(input);
  if (arguments.Take(4) != 0x35725374) throw std::invalid_argument("must begin with tSr5, got another beginning");
  const std::uint64_t length = arguments.Take(2);
  const Bytes body = arguments.Rest();
  if (length != body.size() || length < 3)
    throw std::invalid_argument("must be as long as it says, got another length");
  std::uint8_t sum = 0;
  for (std::size_t i = 0; i + 1 < body.size(); ++i) sum = static_cast<std::uint8_t>(sum + body[i]);
  if (sum != body.back()) throw std::invalid_argument("must match its checksum, got another");
  volatile std::uint8_t found = body.data()[body.size() + body[0] % 8];
  static_cast<void>(found);
}

std::vector<Bytes> Seeds() { return {{1, 2, 3, 4, 5, 6, 7, 8}}; }

constexpr Target kTargets[] = {{"seeded_bug", Parse, Seeds}};

}  // namespace

std::span<const Target> Targets() { return kTargets; }

}  // namespace tersetorch::fuzz
