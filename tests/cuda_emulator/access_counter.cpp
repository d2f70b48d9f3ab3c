// How often warps use memory, and how many cycles of the banks of shared memory or sectors of global memory it takes.
// Lanes run one after the other here: those uses are one request of a warp which its lanes make with one instruction,
// each for the same time since all of them came to one place.
#include <algorithm>
#include <unordered_map>
#include <utility>

#include "internal.h"

namespace cuda_emulator {

bool counting = false;

namespace {

constexpr unsigned kBanks = 32, kSectorBytes = 32;

struct Request {
  std::vector<std::uintptr_t> addresses;  // of its lanes, in whatever order they came
  std::vector<unsigned> lanes;
};

struct Instruction {
  const void* code = nullptr;
  MemorySpace space{};
  bool atomic = false, aligned = false;
  std::size_t bytes = 0;
  std::size_t times[warpSize] = {};  // that each lane came here
  std::vector<Request> requests;
};

using Key = std::pair<const void*, int>;
struct Hash {
  std::size_t operator()(const Key& key) const {
    return std::hash<const void*>()(key.first) * 4 + static_cast<std::size_t>(key.second);
  }
};
struct WarpUses {
  std::unordered_map<Key, Instruction, Hash> instructions;
};

std::map<std::pair<std::uint64_t, unsigned>, WarpUses> warps;  // by block and number
std::map<const void*, AccessCount> counts;

// What one instruction of the GPU moves at most of a use of so many bytes.
std::size_t PieceBytes(const Instruction& instruction) {
  const std::size_t bytes = instruction.bytes;
  if (bytes <= 4) return bytes;
  if (!instruction.aligned && bytes <= 16) return 4;  // a struct of 4-byte numbers
  if (bytes <= 16) return bytes;
  std::uintptr_t all = bytes;
  for (const Request& request : instruction.requests) {
    for (const std::uintptr_t address : request.addresses) all |= address;
  }
  return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : 4;
}

std::size_t CountUnique(std::vector<std::uintptr_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  return numbers.size();
}

// Cycles for `bytes` from each address on: lanes of a half-warp go together where those are 8, of a quarter where 16.
void AddShared(const Request& request, std::size_t first, std::size_t bytes, bool atomic, AccessCount& count) {
  const unsigned together = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  ++count.shared_requests;
  for (unsigned part = 0; part < warpSize; part += together) {
    std::vector<std::uintptr_t> words;
    for (std::size_t i = 0; i < request.lanes.size(); ++i) {
      if (request.lanes[i] / together * together != part) continue;
      const std::uintptr_t begin = request.addresses[i] + first;
      for (std::uintptr_t word = begin / 4; word <= (begin + bytes - 1) / 4; ++word) words.push_back(word);
    }
    if (words.empty()) continue;
    if (!atomic) CountUnique(words);  // lanes share a word, but add to it in turn
    unsigned of_bank[kBanks] = {};
    for (const std::uintptr_t word : words) ++of_bank[word % kBanks];
    count.bank_cycles += *std::max_element(of_bank, of_bank + kBanks);
    ++count.least_cycles;
  }
}

void AddGlobal(const Request& request, std::size_t bytes, std::size_t pieces, AccessCount& count) {
  std::vector<std::uintptr_t> sectors, touched;
  for (const std::uintptr_t address : request.addresses) {
    for (std::size_t i = 0; i < bytes; ++i) {
      touched.push_back(address + i);
      sectors.push_back((address + i) / kSectorBytes);
    }
  }
  count.global_requests += pieces;
  count.sectors += CountUnique(sectors);
  count.least_sectors += (CountUnique(touched) + kSectorBytes - 1) / kSectorBytes;
}

}  // namespace

void CountAccess(MemorySpace space, const void* p, std::size_t bytes, Use use, bool aligned, const void* code) {
  if (space == MemorySpace::kOther) return;
  const Thread& thread = *running;
  WarpUses& warp = warps[{thread.block->number, thread.warp()}];
  Instruction& instruction = warp.instructions[{code, static_cast<int>(space)}];
  instruction.code = code;
  instruction.space = space;
  instruction.atomic = use == Use::kAtomic;
  instruction.aligned = aligned;
  instruction.bytes = std::max(instruction.bytes, bytes);
  const std::size_t time = instruction.times[thread.lane()]++;
  if (time >= instruction.requests.size()) instruction.requests.resize(time + 1);
  instruction.requests[time].addresses.push_back(reinterpret_cast<std::uintptr_t>(p));
  instruction.requests[time].lanes.push_back(thread.lane());
}

void CountTogether(const Block& block, unsigned warp) {
  const auto uses = warps.find({block.number, warp});
  if (uses == warps.end()) return;
  for (const auto& [key, instruction] : uses->second.instructions) {
    AccessCount& count = counts[instruction.code];
    const std::size_t piece = PieceBytes(instruction), pieces = (instruction.bytes + piece - 1) / piece;
    for (const Request& request : instruction.requests) {
      if (instruction.space == MemorySpace::kGlobal) {
        AddGlobal(request, instruction.bytes, pieces, count);
      } else {
        for (std::size_t i = 0; i < pieces; ++i) AddShared(request, i * piece, piece, instruction.atomic, count);
      }
    }
  }
  warps.erase(uses);
}

void CountAccesses(bool count) {
  counting = count;
  warps.clear();
  counts.clear();
}

std::map<std::string, AccessCount> AccessCounts() {
  std::vector<const void*> codes;
  for (const auto& [code, count] : counts) codes.push_back(code);
  const std::vector<std::string> lines = Lines(codes);
  std::map<std::string, AccessCount> of_line;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const AccessCount& count = counts[codes[i]];
    AccessCount& sum = of_line[lines[i]];
    sum.shared_requests += count.shared_requests;
    sum.bank_cycles += count.bank_cycles;
    sum.least_cycles += count.least_cycles;
    sum.global_requests += count.global_requests;
    sum.sectors += count.sectors;
    sum.least_sectors += count.least_sectors;
  }
  return of_line;
}

}  // namespace cuda_emulator
