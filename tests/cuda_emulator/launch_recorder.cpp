// Writes launches down, so that what nvcc made of a kernel can be replayed on them and must leave the same memory
// (tests/ptx_interpreter). A launch is kept if it ran forward, is small, and reached an access to memory that no kept
// launch of its kernel had reached, or made many more accesses than all of them.
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>
#include <unordered_set>

#include "internal.h"

namespace cuda_emulator {

Reached* reached = nullptr;

namespace {

constexpr std::size_t kMostThreads = 1 << 16, kMostBytes = 1 << 21, kMostAccesses = 1 << 18, kManyMore = 8;

// The folder's file of this program, or none.
std::FILE* File() {
  static std::FILE* const file = [] {
    const char* folder = std::getenv("TERSETORCH_RECORD_LAUNCHES");
    if (folder == nullptr) return static_cast<std::FILE*>(nullptr);
    std::FILE* opened =
        std::fopen((std::string(folder) + "/" + program_invocation_short_name + ".launches").c_str(), "wb");
    if (opened == nullptr) {
      std::fprintf(stderr, "cuda_emulator: TERSETORCH_RECORD_LAUNCHES must be a folder, got %s\n", folder);
      std::abort();
    }
    return opened;
  }();
  return file;
}

}  // namespace

LaunchRecorder::LaunchRecorder(const cudaLaunchConfig_t& config, const Kernel& kernel, bool forward)
    : config_(config), kernel_(kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const std::size_t threads = std::size_t{grid.x} * grid.y * grid.z * block.x * block.y * block.z;
  if (!forward || threads > kMostThreads || File() == nullptr) return;
  std::size_t bytes = 0;
  memory_ = DeviceMemory();
  for (const Memory& memory : memory_) bytes += memory.bytes;
  if (bytes > kMostBytes) return;
  for (const Memory& memory : memory_) before_.append(static_cast<const char*>(memory.begin), memory.bytes);
  reached = &reached_;
}

LaunchRecorder::~LaunchRecorder() { reached = nullptr; }

void LaunchRecorder::Finish() {
  if (reached == nullptr) return;
  static std::map<const void*, Reached> kept;
  Reached& so_far = kept[kernel_.address];
  const std::size_t known = so_far.code.size();
  if (known != 0 && reached_.accesses > kMostAccesses) return;
  so_far.code.insert(reached_.code.begin(), reached_.code.end());
  const bool more = reached_.accesses > kManyMore * so_far.accesses && reached_.accesses <= kMostAccesses;
  if (so_far.code.size() == known && !more) return;
  so_far.accesses = std::max(so_far.accesses, reached_.accesses);

  Dl_info symbol;
  link_map* module = nullptr;
  if (dladdr1(kernel_.address, &symbol, reinterpret_cast<void**>(&module), RTLD_DL_LINKMAP) == 0) std::abort();
  const bool of_library = module->l_name[0] != '\0';
  const std::string program = std::filesystem::canonical(of_library ? module->l_name : "/proc/self/exe");
  std::FILE* file = File();
  std::fprintf(file, "{\"program\": \"%s\", \"address\": %zu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], ",
               program.c_str(), reinterpret_cast<std::size_t>(kernel_.address) - module->l_addr, config_.gridDim.x,
               config_.gridDim.y, config_.gridDim.z, config_.blockDim.x, config_.blockDim.y, config_.blockDim.z);
  std::fprintf(file, "\"dynamic_bytes\": %zu, \"parameter_bytes\": %zu, \"memory\": [", config_.dynamicSmemBytes,
               kernel_.packed.size());
  for (const Memory& memory : memory_) {
    std::fprintf(file, "%s{\"name\": \"%s\", \"begin\": %zu, \"bytes\": %zu, \"read_only\": %s}",
                 &memory == memory_.data() ? "" : ", ", memory.name.c_str(),
                 reinterpret_cast<std::size_t>(memory.begin), memory.bytes, memory.read_only ? "true" : "false");
  }
  std::fprintf(file, "]}\n");
  std::fwrite(kernel_.packed.data(), 1, kernel_.packed.size(), file);
  std::fwrite(before_.data(), 1, before_.size(), file);
  for (const Memory& memory : memory_) std::fwrite(memory.begin, 1, memory.bytes, file);
}

}  // namespace cuda_emulator
