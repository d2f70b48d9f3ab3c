// Each seeded bug is reported as what it is under every schedule, and its right form passes without a report; seeded
// patterns of access are counted as what they are.
#include <algorithm>
#include <cstring>

#include "emulator.h"
#include "kernels/check.h"
#include "seeded_bugs.h"

using namespace cuda_emulator;
using namespace tersetorch::test;

int main() {
  const auto bugs = SeededBugs();
  for (std::size_t s = 0; s < std::size(kSchedules); ++s) {
    SetSchedule(kSchedules[s]);
    for (const SeededBug& bug : bugs) {
      ClearReport();
      const int right = bug.run(false);
      Expect(right == 0 && LastReport().kind.empty(), "right form of '%s', schedule %zu: error %d, %s: %s", bug.name, s,
             right, LastReport().kind.c_str(), LastReport().message.c_str());
      ClearReport();
      const int wrong = bug.run(true);
      const Report& report = LastReport();
      const bool met =
          std::any_of(bug.kinds.begin(), bug.kinds.end(), [&](const char* kind) { return report.kind == kind; });
      Expect(wrong > 0 && met, "'%s', schedule %zu: error %d, %s: %s", bug.name, s, wrong, report.kind.c_str(),
             report.message.c_str());
      if (s == 0) std::printf("%-50s %s: %s\n", bug.name, report.kind.c_str(), report.message.c_str());
    }
  }
  SetSchedule({});
  for (const SeededPattern& pattern : SeededPatterns()) {
    const AccessCount& got = pattern.got;
    Expect(got.shared_requests + got.global_requests == pattern.requests &&
               got.bank_cycles + got.sectors == pattern.taken && got.least_cycles + got.least_sectors == pattern.least,
           "'%s': %lu + %lu requests, %lu cycles for %lu, %lu sectors for %lu", pattern.name, got.shared_requests,
           got.global_requests, got.bank_cycles, got.least_cycles, got.sectors, got.least_sectors);
  }
  std::printf("%zu seeded bugs under %zu schedules\n", bugs.size(), std::size(kSchedules));
  return Failures() != 0;
}
