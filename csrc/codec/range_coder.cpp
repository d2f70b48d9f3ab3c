#include "codec/range_coder.h"

#include <stdexcept>
#include <utility>

namespace tersetorch {

std::vector<std::uint8_t> RangeEncoder::Finish() {
  for (int count = 0; count <= 4; ++count) {
    const std::uint64_t rest = (std::uint64_t{1} << (32 - 8 * count)) - 1;
    const std::uint64_t number = (low_ + rest) & ~rest;
    if (number > high_) continue;
    for (int i = 0; i < count; ++i) bytes_.push_back(static_cast<std::uint8_t>(number >> (24 - 8 * i)));
    break;
  }
  return std::exchange(bytes_, {});
}

RangeDecoder::RangeDecoder(std::span<const std::uint8_t> bytes) : bytes_(bytes) {
  for (int i = 0; i < 4; ++i) Shift();
}

void RangeDecoder::RefuseEnd() { throw std::invalid_argument("range coder: data must hold every bit, got fewer"); }

void RangeDecoder::Finish() const {
  if (next_ < bytes_.size()) throw std::invalid_argument("range coder: data must end after the last bit, got more");
}

}  // namespace tersetorch
