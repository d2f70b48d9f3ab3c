// Copies that a thread starts and waits for later. Meanwhile nobody may touch where they go, nor write where they come
// from; in the end it is the thread that waited who has written, and others see it after a barrier.
#include <cstring>

#include "internal.h"

namespace cuda_emulator {

void CopyAsync(void* to, const void* from, std::size_t bytes) {
  const void* code = __builtin_return_address(0);
  UseMemory(from, bytes, Use::kRead, true, code);
  UseMemory(to, bytes, Use::kWrite, true, code);
  AsyncCopy copy{to, from, bytes, running->copy_groups, code, {}};
  std::memcpy(copy.data, from, bytes);
  MarkInFlight(to, bytes, true);
  running->copies.push_back(copy);
}

void CommitCopies() { ++running->copy_groups; }

void WaitForCopies(int most_groups) {
  Thread& thread = *running;
  std::size_t landed = 0;
  for (; landed < thread.copies.size(); ++landed) {
    const AsyncCopy& copy = thread.copies[landed];
    if (copy.group >= thread.copy_groups - most_groups) break;
    Check(copy.from, copy.bytes, Use::kRead, true, copy.code);
    if (std::memcmp(copy.from, copy.data, copy.bytes) != 0) {
      Fail("asynchronous", "the source of the copy at %s was written before the copy was waited for",
           Line(copy.code).c_str());
    }
    MarkInFlight(copy.to, copy.bytes, false);
    Check(copy.to, copy.bytes, Use::kWrite, true, copy.code);
    std::memcpy(copy.to, copy.data, copy.bytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace cuda_emulator
