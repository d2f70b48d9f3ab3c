// Small kernels, each right in one form and with one mistake in the other.
#pragma once

#include <vector>

struct SeededBug {
  const char* name;
  std::vector<const char*> kinds;  // of report that may meet it first, depending on the schedule
  int (*run)(bool bug);            // cudaSuccess, or the error of its launch; -1 for a wrong result
};

std::vector<SeededBug> SeededBugs();
