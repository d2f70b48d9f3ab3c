#include "fiber.h"

#include <cstdint>

namespace cuda_emulator {
namespace {

constexpr std::uint64_t kCanary = 0x5afe57ac5afe57ac;

}  // namespace

bool Fiber::Intact() const { return *reinterpret_cast<const std::uint64_t*>(stack_) == kCanary; }

#if defined(__x86_64__)

// Saves the registers that a call preserves on the stack, then continues on the other stack. It takes some nanoseconds;
// swapcontext, which also saves the signal mask, takes hundreds.
extern "C" void cuda_emulator_switch(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch,@function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, .-cuda_emulator_switch
)");

void Fiber::Start(char* stack, void (*main)()) {
  stack_ = stack;
  *reinterpret_cast<std::uint64_t*>(stack) = kCanary;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where main would return to
  *--top = reinterpret_cast<void*>(main);
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  inside_ = top;
}
void Fiber::Enter() { cuda_emulator_switch(&outside_, inside_); }
void Fiber::Leave() { cuda_emulator_switch(&inside_, outside_); }

#else

void Fiber::Start(char* stack, void (*main)()) {
  stack_ = stack;
  *reinterpret_cast<std::uint64_t*>(stack) = kCanary;
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack;
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  makecontext(&inside_, main, 0);
}
void Fiber::Enter() { swapcontext(&outside_, &inside_); }
void Fiber::Leave() { swapcontext(&inside_, &outside_); }

#endif

}  // namespace cuda_emulator
