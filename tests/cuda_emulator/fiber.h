// A stack that can be left and entered again.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_emulator {

class Fiber {
 public:
  static constexpr std::size_t kStackBytes = 64 * 1024;

  // Makes the next Enter start main, which must not return, on `stack`.
  void Start(char* stack, void (*main)());
  // Runs this fiber until it calls Leave.
  void Enter();
  void Leave();

  bool Owns(const void* p) const { return p >= stack_ && p < stack_ + kStackBytes; }
  // Whether the lowest words of the stack are as Start left them.
  bool Intact() const;

 private:
  char* stack_ = nullptr;
#if defined(__x86_64__)
  void* inside_ = nullptr;
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
};

}  // namespace cuda_emulator
