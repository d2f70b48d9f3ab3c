// Where in the source an address is.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "internal.h"

namespace cuda_emulator {
namespace {

// A header whose functions are inlined into kernels and say nothing about them.
bool StandsIn(const std::string& place) {
  return place.starts_with("/usr/") || place.find("/cuda_runtime.h:") != std::string::npos ||
         place.find("/tensor_cores.cuh:") != std::string::npos;
}

}  // namespace

std::vector<std::string> Lines(const std::vector<const void*>& codes) {
  std::vector<std::string> lines(codes.size());
  std::map<std::string, std::vector<std::size_t>> of_module;
  std::vector<unsigned long> offsets(codes.size());
  for (std::size_t i = 0; i < codes.size(); ++i) {
    Dl_info module;
    if (dladdr(codes[i], &module) == 0) continue;
    offsets[i] =
        static_cast<unsigned long>(static_cast<const char*>(codes[i]) - static_cast<const char*>(module.dli_fbase)) - 1;
    char text[32];
    std::snprintf(text, sizeof text, "+%#lx", offsets[i]);
    lines[i] = std::string(module.dli_fname) + text;
    of_module[module.dli_fname].push_back(i);
  }
  for (const auto& [module, of_it] : of_module) {
    std::string command = "addr2line -a -i -e '" + module + "'";
    for (const std::size_t i : of_it) {
      char text[32];
      std::snprintf(text, sizeof text, " %#lx", offsets[i]);
      command += text;
    }
    std::FILE* output = popen((command + " 2>/dev/null").c_str(), "r");
    if (output == nullptr) continue;
    // For each address itself, then the innermost place and those that it was inlined into.
    char text[4096];
    std::size_t next = 0;
    bool found = true;
    while (std::fgets(text, sizeof text, output) != nullptr) {
      std::string place = text;
      place = place.substr(0, place.find_first_of(" \n"));
      if (place.starts_with("0x")) {
        ++next;
        found = false;
      } else if (!found && place[0] != '?' && next <= of_it.size()) {
        lines[of_it[next - 1]] = place.substr(place.rfind('/') + 1);
        found = !StandsIn(place);
      }
    }
    pclose(output);
  }
  return lines;
}

std::string Line(const void* code) { return Lines({code})[0]; }

}  // namespace cuda_emulator
