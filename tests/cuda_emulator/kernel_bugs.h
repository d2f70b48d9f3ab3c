// Switches for bugs in the real kernels, put in front of a changed copy of a kernel's source (kernel_bugs.py): the copy
// holds many bugs, and TERSETORCH_KERNEL_BUG in the environment says which one there is in this run.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "cuda_runtime.h"

namespace kernel_bugs {

[[gnu::weak]] int chosen = [] {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // so that the harness sees the first failure at once
  const char* number = std::getenv("TERSETORCH_KERNEL_BUG");
  return number == nullptr ? -1 : std::atoi(number);
}();

// Not a memory access of the kernel; the same all the time, so that the compiler may take it out of loops.
[[gnu::noinline, gnu::const, gnu::no_sanitize_thread, gnu::weak]] int Chosen() { return chosen; }
constexpr bool Bug(int number) { return !std::is_constant_evaluated() && Chosen() == number; }

// `a < Less(1) < b` is a < b, or a <= b where bug 1 is chosen, whatever stands around it; so for the other operators.
#define TERSETORCH_INFIX(Name, operation, mistaken)                              \
  struct Name {                                                                  \
    int number;                                                                  \
    constexpr explicit Name(int number) : number(number) {}                      \
  };                                                                             \
  template <typename A>                                                          \
  struct Name##Of {                                                              \
    A a;                                                                         \
    int number;                                                                  \
  };                                                                             \
  template <typename A>                                                          \
  constexpr Name##Of<A> operator operation(A a, Name name) {                     \
    return {a, name.number};                                                     \
  }                                                                              \
  template <typename A, typename B>                                              \
  constexpr auto operator operation(Name##Of<A> name, B b) {                     \
    const A a = name.a;                                                          \
    using Result = decltype(a operation b);                                      \
    if constexpr (requires { static_cast<Result>(mistaken); }) {                 \
      return Bug(name.number) ? static_cast<Result>(mistaken) : (a operation b); \
    } else {                                                                     \
      return a operation b;                                                      \
    }                                                                            \
  }
TERSETORCH_INFIX(Less, <, a <= b)
TERSETORCH_INFIX(AtMost, <=, a < b)
TERSETORCH_INFIX(More, >, a >= b)
TERSETORCH_INFIX(AtLeast, >=, a > b)
TERSETORCH_INFIX(Equal, ==, a != b)
TERSETORCH_INFIX(Unequal, !=, a == b)
TERSETORCH_INFIX(Plus, +, a - b)
TERSETORCH_INFIX(Minus, -, a + b)
TERSETORCH_INFIX(Times, *, a)
TERSETORCH_INFIX(Over, /, a)
TERSETORCH_INFIX(Modulo, %, a)
TERSETORCH_INFIX(And, &, a | b)
TERSETORCH_INFIX(Or, |, a& b)
TERSETORCH_INFIX(Xor, ^, a)
TERSETORCH_INFIX(ShiftLeft, <<, a)
TERSETORCH_INFIX(ShiftRight, >>, a)
#undef TERSETORCH_INFIX

template <typename T>
constexpr T Number(int above, int below, T value) {
  return static_cast<T>(Bug(above) ? value + 1 : Bug(below) ? value - 1 : value);
}

template <typename Vector>
Vector Axes(int number, Vector v) {
  if (Bug(number)) std::swap(v.x, v.y);
  return v;
}

// `OneOf(1, 2).min(a, b)` is min(a, b), or a with bug 1, b with bug 2.
struct OneOf {
  int first, second;
  constexpr OneOf(int first, int second) : first(first), second(second) {}
  template <typename A, typename B>
  constexpr auto min(A a, B b) const {
    return Bug(first) ? a : Bug(second) ? b : ::min(a, b);
  }
  template <typename A, typename B>
  constexpr auto max(A a, B b) const {
    return Bug(first) ? a : Bug(second) ? b : ::max(a, b);
  }
};

struct NotAtomic {
  int number;
  explicit NotAtomic(int number) : number(number) {}
  template <typename T, typename V>
  T atomicAdd(T* p, V value) const {
    if (!Bug(number)) return ::atomicAdd(p, value);
    const T old = *p;
    *p = static_cast<T>(old + value);
    return old;
  }
};

}  // namespace kernel_bugs
