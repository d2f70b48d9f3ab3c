// Small kernels, each right in one form and with one mistake in the other.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator.h"

struct SeededBug {
  const char* name;
  std::vector<const char*> kinds;  // of report that may meet it first, depending on the schedule
  int (*run)(bool bug);            // cudaSuccess, or the error of its launch; -1 for a wrong result
};

std::vector<SeededBug> SeededBugs();

// Launches of one warp that take a known number of requests, cycles or sectors, and would take the least.
struct SeededPattern {
  const char* name;
  cuda_emulator::AccessCount got;
  std::uint64_t requests, taken, least;
};

std::vector<SeededPattern> SeededPatterns();
