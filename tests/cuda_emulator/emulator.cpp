// The scheduler: one operating system thread runs all threads of a launch as fibers, in the order that the schedule
// says.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "internal.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_emulator {

Thread* running = nullptr;
std::uint64_t time = 1;

namespace {

// What every architecture from sm_75 on grants: to any kernel, and to one that asked for more.
constexpr std::size_t kSharedBytes = 48 * 1024, kOptInSharedBytes = 64 * 1024;

Schedule schedule;
Report report;
std::mutex one_launch;
int forced_error = 0;
std::uint64_t launch_count = 0;
void* last_stream = nullptr;
int last_device = 0;
bool waiting_forbidden = false;
thread_local int device_now = 0;
std::map<std::pair<int, const void*>, std::size_t> opted_in;  // on a device, a kernel

// The launch in progress.
const cudaLaunchConfig_t* config = nullptr;
const Kernel* kernel = nullptr;
bool failed = false;
std::vector<Thread*> ready;
std::size_t next_in_order = 0;
std::uint64_t random_state = 0;
char* stacks = nullptr;
std::size_t stack_bytes = 0;

std::uint64_t Random() {  // xorshift64*
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}

std::string Format(const char* format, std::va_list arguments) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

[[gnu::format(printf, 2, 3)]] void SetReport(const char* kind, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  if (!failed) report = {kind, Format(format, arguments)};
  va_end(arguments);
  failed = true;
}

bool Same(const Site& a, const Site& b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

void Wake(Thread* thread) {
  thread->state = State::kReady;
  ready.push_back(thread);
}

void Wait(State state, const Site& site) {
  Thread* thread = running;
  thread->state = state;
  thread->site = site;
  thread->fiber.Leave();
}

Thread* NextReady() {
  if (next_in_order == ready.size()) {
    ready.clear();
    next_in_order = 0;
    return nullptr;
  }
  if (schedule.order == Order::kForward) return ready[next_in_order++];
  if (schedule.order == Order::kRandom) std::swap(ready[Random() % ready.size()], ready.back());
  Thread* thread = ready.back();
  ready.pop_back();
  return thread;
}

void RunKernel() {
  kernel->call(kernel->parameters);
  running->state = State::kDone;
  running->fiber.Leave();
  std::abort();
}

void Run(Thread* thread) {
  ++time;
  running = thread;
  threadIdx = thread->index;
  blockIdx = thread->block->index;
  thread->fiber.Enter();
  running = nullptr;
}

// ---- blocks

void FreeShared(Block& block) {
  for (const SharedVariable& variable : block.shared) RemoveMemory(variable.memory);
  block.shared.clear();
}

void StartBlock(Block& block, std::uint64_t number, char* stack) {
  const dim3 grid = config->gridDim, size = config->blockDim;
  const unsigned count = size.x * size.y * size.z;
  block.number = number;
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.finished = 0;
  block.barrier_time = 0;
  block.at_barrier.clear();
  block.warps.assign((count + warpSize - 1) / warpSize, {});
  block.threads.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.number = i;
    thread.waited = false;
    thread.copies.clear();
    thread.copy_groups = 0;
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    block.warps[thread.warp()].alive |= 1u << thread.lane();
    thread.fiber.Start(stack + i * Fiber::kStackBytes, RunKernel);
    Wake(&thread);
  }
}

void ReleaseBarrier(Block& block) {
  int sum = 0;
  for (const Thread* thread : block.at_barrier) sum += thread->predicate;
  const int count = static_cast<int>(block.at_barrier.size());
  const int result = block.barrier_kind == Barrier::kAnd  ? sum == count
                     : block.barrier_kind == Barrier::kOr ? sum != 0
                                                          : sum;
  block.barrier_time = ++time;
  for (unsigned warp = 0; counting && warp < block.warps.size(); ++warp) CountTogether(block, warp);
  for (Thread* thread : block.at_barrier) {
    thread->result = result;
    if (thread != running) Wake(thread);
  }
  block.at_barrier.clear();
}

// A thread has returned from the kernel.
void Finish(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.warp()];
  ++block.finished;
  warp.alive &= ~(1u << thread.lane());
  if (!thread.fiber.Intact()) {
    SetReport("bounds", "thread %u of block %lu has used more stack than the emulator's %zu bytes", thread.number,
              static_cast<unsigned long>(block.number), Fiber::kStackBytes);
  }
  if (!block.at_barrier.empty()) {
    SetReport("barrier", "thread %u of block %lu exited while others wait at the barrier at %s", thread.number,
              static_cast<unsigned long>(block.number), Describe(block.at_barrier[0]->site).c_str());
  }
  if (!thread.copies.empty()) {
    SetReport("asynchronous", "thread %u of block %lu exited before it waited for its copy at %s", thread.number,
              static_cast<unsigned long>(block.number), Line(thread.copies[0].code).c_str());
  }
  if (counting && warp.alive == 0) CountTogether(block, thread.warp());
  for (const WarpOperation& operation : warp.waiting) {
    if ((operation.arrived != 0) && (operation.mask >> thread.lane() & 1) != 0) {
      SetReport("mask", "lane %u exited while the warp operation at %s waits for it (mask 0x%08x)", thread.lane(),
                Describe(operation.site).c_str(), operation.mask);
    }
  }
}

void ReportDeadlock(const std::vector<Block>& blocks) {
  std::map<std::string, int> waits;
  for (const Block& block : blocks) {
    for (const Thread& thread : block.threads) {
      if (thread.state == State::kAtBarrier) ++waits["barrier at " + Describe(thread.site)];
      if (thread.state == State::kInWarpOperation) ++waits["warp operation at " + Describe(thread.site)];
    }
  }
  std::string text;
  for (const auto& [where, count] : waits) text += "; " + std::to_string(count) + " threads in the " + where;
  SetReport("deadlock", "no thread can go on%s", text.c_str());
}

bool Launchable() {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const auto threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    SetReport("launch", "a block must have 1 to 1,024 threads and z at most 64, got %u x %u x %u", block.x, block.y,
              block.z);
  } else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    SetReport("launch", "a grid must have 1 to 2^31 - 1 blocks on x, 1 to 65,535 on y and z, got %u x %u x %u", grid.x,
              grid.y, grid.z);
  } else {
    const auto granted = opted_in.find({device_now, kernel->address});
    const std::size_t limit = granted == opted_in.end() ? kSharedBytes : granted->second;
    if (config->dynamicSmemBytes > limit) {
      SetReport("launch", "dynamic shared memory must be at most %zu bytes, got %zu; ask with cudaFuncSetAttribute",
                limit, config->dynamicSmemBytes);
    }
  }
  return !failed;
}

void RunBlocks() {
  const std::uint64_t blocks_to_run = std::uint64_t{config->gridDim.x} * config->gridDim.y * config->gridDim.z;
  const std::size_t threads = config->blockDim.x * config->blockDim.y * config->blockDim.z;
  const std::size_t resident = std::min<std::uint64_t>(std::max(1, schedule.resident_blocks), blocks_to_run);
  if (const std::size_t needed = resident * threads * Fiber::kStackBytes; needed > stack_bytes) {
    if (stacks != nullptr) munmap(stacks, stack_bytes);
    void* memory = mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<char*>(memory);
    stack_bytes = needed;
  }
  std::vector<std::uint64_t> order(blocks_to_run);
  for (std::uint64_t i = 0; i < blocks_to_run; ++i) order[i] = i;
  if (schedule.order == Order::kReversed) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kRandom) {
    for (std::uint64_t i = blocks_to_run; i > 1; --i) std::swap(order[i - 1], order[Random() % i]);
  }

  std::vector<Block> blocks(resident);
  std::size_t started = 0;
  const auto start = [&](Block& block) {
    const std::size_t slot = &block - blocks.data();
    StartBlock(block, order[started++], stacks + slot * threads * Fiber::kStackBytes);
  };
  for (Block& block : blocks) start(block);
  std::size_t finished = 0;
  while (!failed && finished < blocks_to_run) {
    Thread* thread = NextReady();
    if (thread == nullptr) {
      ReportDeadlock(blocks);
      break;
    }
    Run(thread);
    if (failed || thread->state != State::kDone) continue;
    Finish(*thread);
    Block& block = *thread->block;
    if (block.finished < threads) continue;
    ++finished;
    FreeShared(block);
    if (started < blocks_to_run) start(block);
  }
  for (Block& block : blocks) FreeShared(block);
}

}  // namespace

// ---- what tests call

void SetSchedule(const Schedule& next) { schedule = next; }
std::int64_t MostBlocksOnY() { return schedule.most_blocks_on_y; }
void FailLaunches(int error) { forced_error = error; }
const Report& LastReport() { return report; }
void ClearReport() { report = {}; }
std::uint64_t LaunchCount() { return launch_count; }
void* LastStream() { return last_stream; }
int LastDevice() { return last_device; }
bool ForbidWaiting(bool forbid) { return std::exchange(waiting_forbidden, forbid); }

// ---- what kernels call

std::string Describe(const Site& site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

void Fail(const char* kind, const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  const std::string what = Format(format, arguments);
  va_end(arguments);
  const Thread* thread = running;
  SetReport(kind, "block (%u,%u,%u), thread (%u,%u,%u): %s", thread->block->index.x, thread->block->index.y,
            thread->block->index.z, thread->index.x, thread->index.y, thread->index.z, what.c_str());
  running->fiber.Leave();
  std::abort();
}

bool WaitsForbidden(const char* call) {
  if (waiting_forbidden) report = {"waiting", std::string(call) + ", which no CUDA graph can record"};
  return waiting_forbidden;
}

void Yield() {
  Thread* thread = running;
  Wake(thread);
  thread->fiber.Leave();
}

void MaybeYield() {
  if (schedule.preempt_one_in != 0 && Random() % schedule.preempt_one_in == 0) Yield();
}

int Lane() { return static_cast<int>(running->lane()); }

int BlockBarrier(Barrier kind, int predicate, Site site) {
  Thread* thread = running;
  Block& block = *thread->block;
  if (block.finished != 0) {
    Fail("barrier", "%u threads of the block exited before the barrier at %s", block.finished, Describe(site).c_str());
  }
  if (!block.at_barrier.empty()) {
    const Site& other = block.at_barrier[0]->site;
    if (kind != block.barrier_kind || !Same(site, other)) {
      Fail("barrier", "divergent: this thread is at the barrier at %s, another at the one at %s",
           Describe(site).c_str(), Describe(other).c_str());
    }
  }
  block.barrier_kind = kind;
  thread->predicate = predicate != 0;
  thread->site = site;
  block.at_barrier.push_back(thread);
  if (block.at_barrier.size() == block.threads.size()) {
    ReleaseBarrier(block);
    Yield();
  } else {
    Wait(State::kAtBarrier, site);
  }
  return thread->result;
}

namespace {

void Complete(WarpOperation& operation, Warp& warp) {
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((operation.mask >> lane & 1) != 0 && operation.operands[lane].value != 0) votes |= 1u << lane;
  }
  ++time;
  for (int lane = 0; lane < warpSize; ++lane) {
    if ((operation.mask >> lane & 1) == 0) continue;
    switch (operation.kind) {
      case WarpOperation::Kind::kBallot:
        operation.results[lane] = votes;
        break;
      case WarpOperation::Kind::kShuffle: {
        const int source = operation.operands[lane].source;
        if ((operation.mask >> source & 1) == 0) {
          Fail("mask", "shuffle at %s: lane %d reads lane %d, which is not in the mask 0x%08x",
               Describe(operation.site).c_str(), lane, source, operation.mask);
        }
        operation.results[lane] = operation.operands[source].value;
        break;
      }
      case WarpOperation::Kind::kGather:
        for (int from = 0; from < warpSize; ++from) {
          if ((operation.mask >> from & 1) == 0) continue;
          const WarpOperation::Operand& operand = operation.operands[from];
          std::memcpy(static_cast<char*>(operation.operands[lane].all) + from * operand.bytes, operand.own,
                      operand.bytes);
        }
        break;
      case WarpOperation::Kind::kBarrier: {
        // What any of these lanes had seen, all of them have seen now. Shuffles and votes order no memory.
        for (int other = 0; other < warpSize; ++other) {
          std::uint64_t newest = (operation.mask >> other & 1) != 0 ? time : 0;
          for (int peer = 0; peer < warpSize; ++peer) {
            if ((operation.mask >> peer & 1) != 0) newest = std::max(newest, warp.seen[peer][other]);
          }
          for (int peer = 0; peer < warpSize; ++peer) {
            if ((operation.mask >> peer & 1) != 0) warp.seen[peer][other] = newest;
          }
        }
        return;
      }
    }
  }
}

std::uint64_t RunWarpOperation(WarpOperation::Kind kind, unsigned mask, WarpOperation::Operand operand, Site site) {
  Thread* thread = running;
  Warp& warp = thread->block->warps[thread->warp()];
  const unsigned lane = thread->lane();
  if ((mask >> lane & 1) == 0) {
    Fail("mask", "warp operation at %s: the calling lane %u is not in its mask 0x%08x", Describe(site).c_str(), lane,
         mask);
  }
  if (const unsigned gone = mask & ~warp.alive; gone != 0) {
    Fail("mask", "warp operation at %s: the mask 0x%08x names lanes 0x%08x, which have exited or do not exist",
         Describe(site).c_str(), mask, gone);
  }
  std::size_t slot = 0, free = warp.waiting.size();
  for (; slot < warp.waiting.size(); ++slot) {
    if (warp.waiting[slot].arrived == 0) {
      free = slot;
    } else if ((warp.waiting[slot].mask & mask) != 0) {
      break;
    }
  }
  if (slot == warp.waiting.size()) {
    slot = free;
    if (slot == warp.waiting.size()) warp.waiting.emplace_back();
    warp.waiting[slot].kind = kind;
    warp.waiting[slot].mask = mask;
    warp.waiting[slot].site = site;
  }
  WarpOperation& operation = warp.waiting[slot];
  if (operation.mask != mask || operation.kind != kind || !Same(operation.site, site)) {
    Fail("mask", "warp operation at %s with mask 0x%08x, but a lane that it shares waits at %s with mask 0x%08x",
         Describe(site).c_str(), mask, Describe(operation.site).c_str(), operation.mask);
  }
  operation.operands[lane] = operand;
  operation.arrived |= 1u << lane;
  if (operation.arrived != mask) {
    Wait(State::kInWarpOperation, site);
    return thread->warp_result;
  }
  Complete(operation, warp);
  operation.arrived = 0;
  if (counting && mask == warp.alive) CountTogether(*thread->block, thread->warp());
  Thread* first_lane = thread - lane;
  for (int i = 0; i < warpSize; ++i) {
    if ((mask >> i & 1) == 0) continue;
    first_lane[i].warp_result = operation.results[i];
    if (first_lane + i != thread) Wake(first_lane + i);
  }
  Yield();
  return thread->warp_result;
}

}  // namespace

void WarpBarrier(unsigned mask, Site site) { RunWarpOperation(WarpOperation::Kind::kBarrier, mask, {}, site); }
std::uint64_t Shuffle(unsigned mask, std::uint64_t value, int source_lane, Site site) {
  return RunWarpOperation(WarpOperation::Kind::kShuffle, mask, {value, source_lane, nullptr, nullptr, 0}, site);
}
unsigned Ballot(unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(
      RunWarpOperation(WarpOperation::Kind::kBallot, mask, {predicate, 0, nullptr, nullptr, 0}, site));
}
void Gather(unsigned mask, const void* own, std::size_t bytes, void* all, Site site) {
  RunWarpOperation(WarpOperation::Kind::kGather, mask, {0, 0, own, all, bytes}, site);
}

void* StaticSharedMemory(const void* key, std::size_t bytes, std::size_t, Site site) {
  Block& block = *running->block;
  std::size_t total = bytes;
  for (const SharedVariable& variable : block.shared) {
    if (variable.key == key) return variable.memory;
    total += variable.bytes;
  }
  if (total > kSharedBytes) {
    Fail("launch", "static shared memory must be at most %zu bytes, got %zu at %s", kSharedBytes, total,
         Describe(site).c_str());
  }
  block.shared.push_back({key, AddMemory(bytes, "shared memory", &block), bytes});
  return block.shared.back().memory;
}

void* DynamicSharedMemoryBase() {
  static constexpr char kKey = 0;
  Block& block = *running->block;
  for (const SharedVariable& variable : block.shared) {
    if (variable.key == &kKey) return variable.memory;
  }
  const std::size_t bytes = config->dynamicSmemBytes;
  block.shared.push_back({&kKey, AddMemory(bytes, "dynamic shared memory", &block), bytes});
  return block.shared.back().memory;
}

cudaError_t AllowDynamicSharedMemory(const void* address, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > kOptInSharedBytes) return cudaErrorInvalidValue;
  opted_in[{device_now, address}] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

bool begun_early = false;

void WaitForPrevious() { running->waited = true; }

cudaError_t Launch(const cudaLaunchConfig_t& launch_config, const Kernel& launch_kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (forced_error != 0) return static_cast<cudaError_t>(forced_error);
  config = &launch_config;
  kernel = &launch_kernel;
  failed = false;
  ++launch_count;
  last_stream = launch_config.stream;
  last_device = device_now;
  if (!Launchable()) {
    // As cudaLaunchKernelEx of CUDA 13 answers for a grid of no blocks.
    return config->gridDim.x == 0 ? cudaErrorInvalidValue : cudaErrorInvalidConfiguration;
  }
  blockDim = launch_config.blockDim;
  gridDim = launch_config.gridDim;
  ready.clear();
  next_in_order = 0;
  random_state = schedule.seed * 0x9e3779b97f4a7c15ull + 0x1234567;
  CheckerBeginLaunch();
  begun_early =
      std::any_of(launch_config.attrs, launch_config.attrs + launch_config.numAttrs, [](const auto& attribute) {
        return attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
               attribute.val.programmaticStreamSerializationAllowed != 0;
      });
  AddParameters(launch_kernel.parameters, launch_kernel.parameter_bytes);
  LaunchRecorder recorder(launch_config, launch_kernel, schedule.order == Order::kForward);
  RunBlocks();
  RemoveParameters(launch_kernel.parameters);
  if (!failed) recorder.Finish();
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace cuda_emulator

// ---- the runtime

namespace {

cudaError_t Synchronize(const char* call) {
  return cuda_emulator::WaitsForbidden(call) ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

}  // namespace

cudaError_t cudaDeviceSynchronize() { return Synchronize("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return Synchronize("cudaStreamSynchronize"); }
cudaError_t cudaGetDevice(int* device) {
  *device = cuda_emulator::device_now;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kCudaDevices) return cudaErrorInvalidValue;
  cuda_emulator::device_now = device;
  return cudaSuccess;
}
