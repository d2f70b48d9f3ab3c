// Work in parts, as an op gives them to threads: the last before the first, since no order may matter. Built with
// ThreadSanitizer the parts run at once, each on a thread of its own, so that it reports a number that two of them
// touch.
#pragma once

#include <cstdint>
#ifdef __SANITIZE_THREAD__
#include <thread>
#endif

namespace tersetorch::test {

// Calls last() and first(), which may run at once.
template <typename First, typename Last>
void AtOnce(const First& first, const Last& last) {
#ifdef __SANITIZE_THREAD__
  std::thread other(last);
  first();
  other.join();
#else
  last();
  first();
#endif
}

// Calls run(begin, end) for [cut, end) and [0, cut), which may run at once.
template <typename Run>
void InParts(std::int64_t cut, std::int64_t end, const Run& run) {
  AtOnce([&] { run(std::int64_t{0}, cut); }, [&] { run(cut, end); });
}

}  // namespace tersetorch::test
