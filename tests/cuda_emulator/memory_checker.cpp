// The memory checker. Kernels are compiled with -fsanitize=thread, which makes each access call __tsan_read4 and its
// like, and linked without libtsan: the calls come here. -fsanitize=bounds,alignment,... likewise calls
// __ubsan_handle_*.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "internal.h"

namespace cuda_emulator {
namespace {

struct Access {
  std::uint64_t time = 0;  // 0: none
  std::uint64_t block = 0;
  const void* code = nullptr;
  unsigned thread = 0;
  bool atomic = false;

  unsigned warp() const { return thread / warpSize; }
};

// Whether `before` happened before what the thread does now, in every possible order of running.
bool Ordered(const Access& before, const Thread& now) {
  if (before.block != now.block->number) return false;
  if (before.thread == now.number || before.time < now.block->barrier_time) return true;
  return before.warp() == now.warp() &&
         before.time < now.block->warps[now.warp()].seen[now.lane()][before.thread % warpSize];
}

// The accesses to some bytes that can still be in conflict with a later one: the last, and before it the last of
// another lane of its warp, of another warp of its block, and of another block. Whoever is not ordered with an older
// access is not ordered with one of these either (but for lanes that only partial warp barriers order).
class History {
 public:
  void Add(const Access& access) {
    const Access old = last_;
    last_ = access;
    if (old.time == 0) return;
    if (old.block != access.block) {
      other_block_ = old;
      other_warp_ = other_lane_ = {};
    } else if (old.warp() != access.warp()) {
      other_warp_ = old;
      other_lane_ = {};
    } else if (old.thread != access.thread) {
      other_lane_ = old;
    }
  }
  void Replace(const Access& access) { *this = History{access}; }

  const Access* Conflict(const Thread& now, bool atomic) const {
    for (const Access* access : {&last_, &other_lane_, &other_warp_, &other_block_}) {
      if (access->time != 0 && !(atomic && access->atomic) && !Ordered(*access, now)) return access;
    }
    return nullptr;
  }

  History() = default;

 private:
  explicit History(const Access& access) : last_(access) {}
  Access last_, other_lane_, other_warp_, other_block_;
};

struct Cell {
  History reads, writes;
};

enum class Byte : std::uint8_t { kUnwritten, kWritten, kInFlight };

// Memory that a kernel may touch.
struct Range {
  std::uintptr_t begin, end;
  std::string name;
  bool read_only = false;
  const Block* owner = nullptr;                      // of shared memory
  std::vector<Byte> state;                           // empty: all is written
  std::uint64_t written_in = 0, written_before = 0;  // the last launch that wrote to it, and the last before that
  // The accesses of one launch, by cell; made when they are needed.
  std::uint64_t launch = 0;
  std::size_t cell_bytes = 4;
  std::vector<std::unique_ptr<Cell[]>> cells;
};

constexpr std::size_t kCellsInChunk = 16;

std::map<std::uintptr_t, Range> ranges;  // by begin
Range* recent = nullptr;
std::uint64_t launch = 0;

std::uintptr_t Number(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

Range* Nearest(std::uintptr_t p) {
  auto next = ranges.upper_bound(p);
  return next == ranges.begin() ? nullptr : &std::prev(next)->second;
}

Range* Find(std::uintptr_t p) {
  if (recent != nullptr && recent->begin <= p && p < recent->end) return recent;
  Range* range = Nearest(p);
  return range != nullptr && p < range->end ? recent = range : nullptr;
}

Range& At(const void* memory) {
  const auto found = ranges.find(Number(memory));
  if (found == ranges.end()) {
    std::fprintf(stderr, "cuda_emulator: %p must come from cudaMalloc and not be freed\n", memory);
    std::abort();
  }
  return found->second;
}

bool BuiltIn(const void* p) {
  const auto in = [p](const auto& variable) { return p >= &variable && p < &variable + 1; };
  return in(threadIdx) || in(blockIdx) || in(blockDim) || in(gridDim);
}

// Whether p lies in a loaded program or library: constants do.
bool InProgram(std::uintptr_t p) {
  struct Query {
    std::uintptr_t p;
    bool found;
  } query{p, false};
  dl_iterate_phdr(
      [](dl_phdr_info* module, std::size_t, void* data) {
        Query& query = *static_cast<Query*>(data);
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const std::uintptr_t begin = module->dlpi_addr + module->dlpi_phdr[i].p_vaddr;
          query.found |= module->dlpi_phdr[i].p_type == PT_LOAD && begin <= query.p &&
                         query.p < begin + module->dlpi_phdr[i].p_memsz;
        }
        return query.found ? 1 : 0;
      },
      &query);
  return query.found;
}

std::string Place(const Range& range, std::uintptr_t p) {
  return "'" + range.name + "' (" + std::to_string(range.end - range.begin) + " bytes) at byte " +
         std::to_string(static_cast<std::intptr_t>(p - range.begin));
}

// Halves the cells until each access covers whole ones.
void Refine(Range& range, std::size_t cell_bytes) {
  const std::size_t factor = range.cell_bytes / cell_bytes;
  std::vector<std::unique_ptr<Cell[]>> finer(range.cells.size() * factor);
  for (std::size_t i = 0; i < range.cells.size() * kCellsInChunk; ++i) {
    const auto& chunk = range.cells[i / kCellsInChunk];
    if (chunk == nullptr) continue;
    for (std::size_t j = i * factor; j < (i + 1) * factor; ++j) {
      auto& fine = finer[j / kCellsInChunk];
      if (fine == nullptr) fine = std::make_unique<Cell[]>(kCellsInChunk);
      fine[j % kCellsInChunk] = chunk[i % kCellsInChunk];
    }
  }
  range.cells = std::move(finer);
  range.cell_bytes = cell_bytes;
}

void CheckRaces(Range& range, std::size_t offset, std::size_t bytes, bool write, bool atomic, const void* code) {
  const Thread& thread = *running;
  if (range.launch != launch) {
    range.launch = launch;
    range.cells.clear();
    range.cells.resize((range.end - range.begin) / range.cell_bytes / kCellsInChunk + 1);
  }
  while ((offset | bytes) % range.cell_bytes != 0) Refine(range, range.cell_bytes / 2);
  const Access access{time, thread.block->number, code, thread.number, atomic};
  for (std::size_t i = offset / range.cell_bytes; i < (offset + bytes) / range.cell_bytes; ++i) {
    auto& chunk = range.cells[i / kCellsInChunk];
    if (chunk == nullptr) chunk = std::make_unique<Cell[]>(kCellsInChunk);
    Cell& cell = chunk[i % kCellsInChunk];
    const Access* conflict = cell.writes.Conflict(thread, atomic);
    const char* other = "write";
    if (conflict == nullptr && write) {
      conflict = cell.reads.Conflict(thread, atomic);
      other = "read";
    }
    if (conflict != nullptr) {
      const Access past = *conflict;
      Fail("race", "%s at %s of %s and %s at %s by thread %u of block %lu have no order", write ? "write" : "read",
           Line(code).c_str(), Place(range, range.begin + offset).c_str(), other, Line(past.code).c_str(), past.thread,
           static_cast<unsigned long>(past.block));
    }
    if (!write) {
      cell.reads.Add(access);
    } else if (atomic) {
      cell.writes.Add(access);
    } else {
      cell.writes.Replace(access);
    }
  }
}

}  // namespace

// ---- memory

void* AddMemory(std::size_t bytes, const char* name, const Block* owner) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t size = (bytes + page) / page * page;  // one byte at least, so that each address is its own
  char* guard = static_cast<char*>(
      mmap(nullptr, size + 2 * kGuardBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (guard == MAP_FAILED) std::abort();
  char* memory = guard + kGuardBytes;
  if (mprotect(memory, size, PROT_READ | PROT_WRITE) != 0) std::abort();
  std::memset(memory, 0xcb, size);
  Range range;
  range.begin = Number(memory);
  range.end = range.begin + bytes;
  range.name = name;
  range.owner = owner;
  range.state.assign(bytes, Byte::kUnwritten);
  ranges[range.begin] = std::move(range);
  return memory;
}

void RemoveMemory(void* memory) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const Range& range = At(memory);
  const std::size_t size = (range.end - range.begin + page) / page * page;
  recent = nullptr;
  ranges.erase(range.begin);
  munmap(static_cast<char*>(memory) - kGuardBytes, size + 2 * kGuardBytes);
}

void AddParameters(const void* parameters, std::size_t bytes) {
  Range range;
  range.begin = Number(parameters);
  range.end = range.begin + bytes;
  range.name = "kernel parameters";
  range.read_only = true;
  ranges[range.begin] = std::move(range);
}

void RemoveParameters(const void* parameters) {
  recent = nullptr;
  ranges.erase(Number(parameters));
}

void MarkWritten(const void* memory, std::size_t bytes) {
  Range* range = Find(Number(memory));
  if (range != nullptr && !range->state.empty()) {
    std::fill_n(range->state.begin() + static_cast<std::ptrdiff_t>(Number(memory) - range->begin), bytes,
                Byte::kWritten);
  }
}

void MarkInFlight(const void* memory, std::size_t bytes, bool in_flight) {
  Range& range = *Find(Number(memory));
  std::fill_n(range.state.begin() + static_cast<std::ptrdiff_t>(Number(memory) - range.begin), bytes,
              in_flight ? Byte::kInFlight : Byte::kUnwritten);
}

void Name(const void* memory, const char* name) { At(memory).name = name; }
void MakeReadOnly(const void* memory) { At(memory).read_only = true; }
std::size_t UnwrittenBytes(const void* memory) {
  const Range& range = At(memory);
  return range.state.size() -
         static_cast<std::size_t>(std::count(range.state.begin(), range.state.end(), Byte::kWritten));
}

std::vector<Memory> DeviceMemory() {
  std::vector<Memory> all;
  for (const auto& [begin, range] : ranges) {
    const bool parameters = range.state.empty();
    if (range.owner != nullptr || parameters) continue;
    all.push_back({reinterpret_cast<const void*>(begin), range.end - begin, range.name, range.read_only});
  }
  return all;
}

// ---- accesses

void CheckerBeginLaunch() { ++launch; }

MemorySpace Check(const void* p, std::size_t bytes, Use use, bool aligned, const void* code) {
  if (running == nullptr || running->fiber.Owns(p) || BuiltIn(p)) return MemorySpace::kOther;
  if (reached != nullptr && ++reached->accesses != 0) reached->code.insert(code);
  const std::uintptr_t address = Number(p);
  const bool write = use != Use::kRead, atomic = use == Use::kAtomic;
  const char* verb = write ? "write" : "read";
  Range* range = Find(address);
  if (range == nullptr || address + bytes > range->end) {
    if (range == nullptr && !write && InProgram(address)) return MemorySpace::kOther;
    range = Nearest(address);
    Fail("bounds", "%zu-byte %s at %s out of bounds; nearest below is %s", bytes, verb, Line(code).c_str(),
         range == nullptr ? "nothing" : Place(*range, address).c_str());
  }
  if (range->owner != nullptr && range->owner != running->block) {
    Fail("bounds", "%s at %s of another block's shared memory", verb, Line(code).c_str());
  }
  if (write && range->read_only) {
    Fail("read-only", "write at %s to %s", Line(code).c_str(), Place(*range, address).c_str());
  }
  if (aligned && address % std::min<std::size_t>(bytes, 16) != 0 && (bytes & (bytes - 1)) == 0) {
    Fail("misaligned", "%zu-byte %s at %s of %s", bytes, verb, Line(code).c_str(), Place(*range, address).c_str());
  }
  const std::size_t offset = address - range->begin;
  if (range->owner == nullptr) {
    const std::uint64_t before = range->written_in == launch ? range->written_before : range->written_in;
    if (begun_early && !running->waited && before != 0 && before == launch - 1) {
      Fail("asynchronous", "%s at %s of %s, which the kernel before may be writing, ahead of WaitForPrevious", verb,
           Line(code).c_str(), Place(*range, address).c_str());
    }
    if (write) range->written_before = before, range->written_in = launch;
  }
  if (!range->state.empty()) {
    for (std::size_t i = offset; i < offset + bytes; ++i) {
      Byte& byte = range->state[i];
      if (byte == Byte::kInFlight) {
        Fail("asynchronous", "%s at %s of %s before the copy to it was waited for", verb, Line(code).c_str(),
             Place(*range, address).c_str());
      }
      if (byte == Byte::kUnwritten && (!write || atomic)) {
        Fail("uninitialised", "%s at %s of %s, which nobody has written", atomic ? "atomic" : verb, Line(code).c_str(),
             Place(*range, address).c_str());
      }
      if (write) byte = Byte::kWritten;
    }
  }
  if (!range->read_only) CheckRaces(*range, offset, bytes, write, atomic, code);
  if (range->owner != nullptr) return MemorySpace::kShared;
  return range->state.empty() ? MemorySpace::kOther : MemorySpace::kGlobal;  // other: parameters
}

void UseMemory(const void* p, std::size_t bytes, Use use, bool aligned, const void* code) {
  const MemorySpace space = Check(p, bytes, use, aligned, code);
  if (counting) CountAccess(space, p, bytes, use, aligned, code);
  if (space != MemorySpace::kOther) MaybeYield();
}

namespace {

// What the compiler tells the handlers of undefined behaviour first.
struct UbsanSite {
  const char* file;
  std::uint32_t line, column;
};

void FailUndefined(const char* kind, const void* data, const char* what) {
  if (running == nullptr) return;
  const UbsanSite& site = *static_cast<const UbsanSite*>(data);
  const char* slash = std::strrchr(site.file, '/');
  Fail(kind, "%s at %s:%u", what, slash == nullptr ? site.file : slash + 1, site.line);
}

template <typename T>
T Old(T* p, const void* code) {
  UseMemory(p, sizeof(T), Use::kAtomic, true, code);
  return *p;
}

}  // namespace
}  // namespace cuda_emulator

// ---- the runtime's memory

using namespace cuda_emulator;

cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  if (WaitsForbidden("cudaMalloc")) return cudaErrorStreamCaptureUnsupported;
  *memory = AddMemory(bytes, "device memory", nullptr);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  if (WaitsForbidden("cudaFree")) return cudaErrorStreamCaptureUnsupported;
  if (memory != nullptr) RemoveMemory(memory);
  return cudaSuccess;
}
namespace {

cudaError_t Copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  const void* device[] = {kind == cudaMemcpyHostToDevice ? to : from, kind == cudaMemcpyDeviceToHost ? from : to};
  for (const void* p : device) {
    const Range* range = Find(Number(p));
    if (bytes != 0 && (range == nullptr || Number(p) + bytes > range->end)) return cudaErrorInvalidValue;
  }
  if (bytes != 0) std::memmove(to, from, bytes);
  if (kind != cudaMemcpyDeviceToHost) MarkWritten(to, bytes);
  return cudaSuccess;
}

cudaError_t Set(void* memory, int value, std::size_t bytes) {
  const Range* range = Find(Number(memory));
  if (bytes != 0 && (range == nullptr || Number(memory) + bytes > range->end)) return cudaErrorInvalidValue;
  if (bytes != 0) std::memset(memory, value, bytes);
  MarkWritten(memory, bytes);
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return WaitsForbidden("cudaMemcpy") ? cudaErrorStreamCaptureUnsupported : Copy(to, from, bytes, kind);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  // To and from pageable memory of the host it waits, whatever its name.
  if (kind != cudaMemcpyDeviceToDevice && WaitsForbidden("cudaMemcpyAsync")) return cudaErrorStreamCaptureUnsupported;
  return Copy(to, from, bytes, kind);
}
cudaError_t cudaMemset(void* memory, int value, std::size_t bytes) {
  return WaitsForbidden("cudaMemset") ? cudaErrorStreamCaptureUnsupported : Set(memory, value, bytes);
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  return Set(memory, value, bytes);
}

// ---- atomics: fibers change only inside UseMemory, so nothing comes between the read and the write

#define CODE __builtin_return_address(0)
#define ATOMIC(name, T, result) \
  T name(T* p, T value) {       \
    const T old = Old(p, CODE); \
    *p = result;                \
    return old;                 \
  }
ATOMIC(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))
ATOMIC(atomicAdd, unsigned, old + value)
ATOMIC(atomicAdd, unsigned long long, old + value)
ATOMIC(atomicAdd, float, old + value)
ATOMIC(atomicAdd, double, old + value)
ATOMIC(atomicMax, int, std::max(old, value))
ATOMIC(atomicMax, unsigned, std::max(old, value))
ATOMIC(atomicMin, int, std::min(old, value))
ATOMIC(atomicOr, unsigned, old | value)
ATOMIC(atomicExch, int, value)
ATOMIC(atomicExch, unsigned, value)
#define ATOMIC_CAS(T)                      \
  T atomicCAS(T* p, T expected, T value) { \
    const T old = Old(p, CODE);            \
    if (old == expected) *p = value;       \
    return old;                            \
  }
ATOMIC_CAS(int)
ATOMIC_CAS(unsigned)

// ---- what instrumented code calls; hidden, so that no other library's calls come here

#define HOOK extern "C" __attribute__((visibility("hidden"))) void
#define ACCESS_HOOK(name, bytes, use, aligned) \
  HOOK __tsan_##name##bytes(void* p) { UseMemory(p, bytes, use, aligned, CODE); }
#define ACCESS_HOOKS(bytes)                             \
  ACCESS_HOOK(read, bytes, Use::kRead, true)            \
  ACCESS_HOOK(write, bytes, Use::kWrite, true)          \
  ACCESS_HOOK(volatile_read, bytes, Use::kRead, true)   \
  ACCESS_HOOK(volatile_write, bytes, Use::kWrite, true) \
  ACCESS_HOOK(unaligned_read, bytes, Use::kRead, false) \
  ACCESS_HOOK(unaligned_write, bytes, Use::kWrite, false)
ACCESS_HOOKS(1)
ACCESS_HOOKS(2)
ACCESS_HOOKS(4)
ACCESS_HOOKS(8)
ACCESS_HOOKS(16)
HOOK __tsan_read_range(void* p, std::size_t bytes) { UseMemory(p, bytes, Use::kRead, false, CODE); }
HOOK __tsan_write_range(void* p, std::size_t bytes) { UseMemory(p, bytes, Use::kWrite, false, CODE); }
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}

HOOK __ubsan_handle_out_of_bounds(void* data, void*) { FailUndefined("bounds", data, "array index out of bounds"); }
HOOK __ubsan_handle_type_mismatch_v1(void* data, void*) { FailUndefined("misaligned", data, "misaligned access"); }
HOOK __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) { FailUndefined("arithmetic", data, "shift"); }
HOOK __ubsan_handle_add_overflow(void* data, void*, void*) { FailUndefined("arithmetic", data, "overflow of +"); }
HOOK __ubsan_handle_sub_overflow(void* data, void*, void*) { FailUndefined("arithmetic", data, "overflow of -"); }
HOOK __ubsan_handle_mul_overflow(void* data, void*, void*) { FailUndefined("arithmetic", data, "overflow of *"); }
HOOK __ubsan_handle_negate_overflow(void* data, void*) { FailUndefined("arithmetic", data, "overflow of -"); }
HOOK __ubsan_handle_divrem_overflow(void* data, void*, void*) { FailUndefined("arithmetic", data, "division"); }
