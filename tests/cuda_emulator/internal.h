// What the scheduler and the memory checker share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"
#include "fiber.h"

namespace cuda_emulator {

struct Block;

enum class State : int { kReady, kAtBarrier, kInWarpOperation, kDone };

// Of 4, 8 or 16 bytes into shared memory, by a thread that has not waited for it.
struct AsyncCopy {
  void* to;
  const void* from;
  std::size_t bytes;
  int group;
  const void* code;
  unsigned char data[16];
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned number = 0;  // in its block
  uint3 index{};
  State state = State::kDone;
  Site site;                      // where it waits
  int predicate = 0, result = 0;  // of a barrier
  std::uint64_t warp_result = 0;
  std::vector<AsyncCopy> copies;  // in flight
  int copy_groups = 0;            // committed
  bool waited = false;            // for the kernel before

  unsigned lane() const { return number % warpSize; }
  unsigned warp() const { return number / warpSize; }
};

// A warp operation that some lanes have reached.
struct WarpOperation {
  enum class Kind : int { kBarrier, kShuffle, kBallot, kGather };
  struct Operand {
    std::uint64_t value;
    int source;  // lane, of a shuffle
    // Of a gathering.
    const void* own;
    void* all;
    std::size_t bytes;
  };
  Kind kind{};
  unsigned mask = 0, arrived = 0;
  Site site;
  Operand operands[warpSize];
  std::uint64_t results[warpSize];
};

struct Warp {
  unsigned alive = 0;  // lanes that have not exited
  std::vector<WarpOperation> waiting;
  // What a lane did before seen[other][lane] happened before what `other` does now.
  std::uint64_t seen[warpSize][warpSize] = {};
};

struct SharedVariable {
  const void* key;
  void* memory;
  std::size_t bytes;
};

struct Block {
  std::uint64_t number = 0;
  uint3 index{};
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned finished = 0;
  std::vector<Thread*> at_barrier;
  Barrier barrier_kind{};
  std::uint64_t barrier_time = 0;  // of the last barrier that all threads passed
  std::vector<SharedVariable> shared;
};

extern Thread* running;     // null outside kernels
extern std::uint64_t time;  // grows at every switch and every synchronisation

// Ends the launch with a report; does not return.
[[noreturn, gnu::format(printf, 2, 3)]] void Fail(const char* kind, const char* format, ...);
// Reports a call by the host that waits, where it must not.
bool WaitsForbidden(const char* call);
// Lets another thread run.
void Yield();
// Yields at one in Schedule::preempt_one_in calls.
void MaybeYield();
std::string Describe(const Site& site);

// ---- memory_checker.cpp

// Memory between guards of kGuardBytes; kernels may touch nothing else but their own stacks and constants.
inline constexpr std::size_t kGuardBytes = std::size_t{1} << 20;
void* AddMemory(std::size_t bytes, const char* name, const Block* owner);
void RemoveMemory(void* memory);
// The parameters of a kernel, which lie on the host's stack.
void AddParameters(const void* parameters, std::size_t bytes);
void RemoveParameters(const void* parameters);
void MarkWritten(const void* memory, std::size_t bytes);
void CheckerBeginLaunch();
// Whether the running kernel may have begun before the one ahead of it ended.
extern bool begun_early;
// Bytes that a copy will write; then, once it is waited for, bytes to write.
void MarkInFlight(const void* memory, std::size_t bytes, bool in_flight);

enum class Use : int { kRead, kWrite, kAtomic };
enum class MemorySpace : int { kGlobal, kShared, kOther };
// A use by the running thread, of an aligned type or not: reports what is wrong with it and remembers it.
MemorySpace Check(const void* p, std::size_t bytes, Use use, bool aligned, const void* code);
// The same, counts it, and may let another thread run.
void UseMemory(const void* p, std::size_t bytes, Use use, bool aligned, const void* code);

// ---- source_lines.cpp

// file:line of each return address, of the kernel where it called something inlined from the headers that stand in for
// CUDA; offsets in their modules where addr2line is missing.
std::vector<std::string> Lines(const std::vector<const void*>& codes);
std::string Line(const void* code);

// ---- access_counter.cpp

extern bool counting;
void CountAccess(MemorySpace space, const void* p, std::size_t bytes, Use use, bool aligned, const void* code);
// All lanes of the warp have come to one place: what they did before is what they did together.
void CountTogether(const Block& block, unsigned warp);

// All memory of cudaMalloc.
struct Memory {
  const void* begin;
  std::size_t bytes;
  std::string name;
  bool read_only;
};
std::vector<Memory> DeviceMemory();

// ---- launch_recorder.cpp

// While a launch is recorded: how often Check was called, and from where.
struct Reached {
  std::size_t accesses = 0;
  std::unordered_set<const void*> code;
};
extern Reached* reached;

// Made before a launch and told when it went well.
class LaunchRecorder {
 public:
  LaunchRecorder(const cudaLaunchConfig_t& config, const Kernel& kernel, bool forward);
  ~LaunchRecorder();
  LaunchRecorder(const LaunchRecorder&) = delete;
  void Finish();

 private:
  const cudaLaunchConfig_t& config_;
  const Kernel& kernel_;
  std::vector<Memory> memory_;
  std::string before_;
  Reached reached_;
};

}  // namespace cuda_emulator
