// How a test drives the emulator: the order in which threads run, and what it has to report.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace cuda_emulator {

enum class Order : int { kForward, kReversed, kRandom };

struct Schedule {
  Order order = Order::kForward;
  std::uint64_t seed = 1;   // of kRandom and of preemption
  int resident_blocks = 1;  // so many blocks take turns
  int preempt_one_in = 0;   // another thread goes on at one in so many memory accesses; 0: only where threads wait
  std::int64_t most_blocks_on_y = 8192;  // of BlocksOnY: few, so that kernels walk what the grid does not reach
};

// What the tests of a kernel run under.
inline constexpr Schedule kSchedules[] = {{},
                                          {Order::kReversed, 1, 2, 0, 1},
                                          {Order::kRandom, 1, 3, 0, 2},
                                          {Order::kRandom, 2, 4, 23},
                                          {Order::kRandom, 3, 1, 7}};

void SetSchedule(const Schedule& schedule);

// The first problem of the last launch that had one: `kind` is barrier, mask, deadlock, race, bounds, uninitialised,
// asynchronous, misaligned, read-only, arithmetic, launch or waiting. A launch that has a problem ends there and
// returns an error.
struct Report {
  std::string kind, message;
};
const Report& LastReport();
void ClearReport();

// From now on launches do nothing and return this error; 0: they run again.
void FailLaunches(int error);

// From now on what no CUDA graph can record is an error: waiting for the device, and memory that comes or goes beside
// PyTorch's. Returns whether that held before.
bool ForbidWaiting(bool forbid);

// How many launches there were, on which stream the last one, and which device was current then.
std::uint64_t LaunchCount();
void* LastStream();
int LastDevice();

// How often warps used memory, by source line, and what it took: README.md says how it is counted. Least is what no
// order of the same bytes goes below.
struct AccessCount {
  std::uint64_t shared_requests = 0, bank_cycles = 0, least_cycles = 0;
  std::uint64_t global_requests = 0, sectors = 0, least_sectors = 0;

  double Conflicts() const { return least_cycles == 0 ? 1 : static_cast<double>(bank_cycles) / least_cycles; }
  double Scatter() const { return least_sectors == 0 ? 1 : static_cast<double>(sectors) / least_sectors; }
};
// From now on; it begins at 0.
void CountAccesses(bool count);
std::map<std::string, AccessCount> AccessCounts();

// Names memory of cudaMalloc in reports.
void Name(const void* memory, const char* name);
// From now on kernels only read it.
void MakeReadOnly(const void* memory);
// How many of its bytes nobody has written.
std::size_t UnwrittenBytes(const void* memory);

}  // namespace cuda_emulator
