// The loops of the AVX-512 levels, local to each file that includes this.
#pragma once

#include "kernels/machine_rates/machine_rates.h"

namespace tersetorch {
namespace {

constexpr int kSums = 16;
constexpr std::int64_t kBinaryOperations = 2 * 2 * 512 * (kSums / 2);

// zmm0 to zmm15 are the sums, zmm16 and zmm17 the operands.
#define FOR_EACH_SUM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define CLEAR(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n "\n\t"

// A loop of one instruction on every sum, both operands filled with a 32-bit pattern.
#define ARITHMETIC_LOOP(instruction, pattern) \
  const std::int32_t bits = pattern;          \
  if (passes <= 0) return;                    \
  asm volatile(FOR_EACH_SUM(CLEAR) "vpbroadcastd %1, %%zmm16\n\tvmovaps %%zmm16, %%zmm17\n\t"                         \
                                   "1:\n\t" FOR_EACH_SUM(instruction) "dec %0\n\tjnz 1b"                              \
               : "+r"(passes)                                                                                         \
               : "m"(bits)                                                                                            \
               : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",    \
                 "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "cc")

#define MULTIPLY_ADD(n) "vfmadd231ps %%zmm17, %%zmm16, %%zmm" #n "\n\t"
#define DOT_INT8(n) "vpdpbusd %%zmm17, %%zmm16, %%zmm" #n "\n\t"

void Float32(std::int64_t passes) noexcept { ARITHMETIC_LOOP(MULTIPLY_ADD, 0x3f800000); }
void Int8(std::int64_t passes) noexcept { ARITHMETIC_LOOP(DOT_INT8, 0x01010101); }

// What xnor_matmul does with two words: q = sum ^ w ^ x, t = q ^ w ^ x, the carry of the three; its bits are counted
// and added up. Copies are renamed away.
#define BINARY_SUM(sum, count)                      \
  "vmovdqa64 %%zmm" #sum                            \
  ", %%zmm18\n\t"                                   \
  "vpternlogq $0x96, %%zmm17, %%zmm16, %%zmm18\n\t" \
  "vmovdqa64 %%zmm18, %%zmm19\n\t"                  \
  "vpternlogq $0x96, %%zmm17, %%zmm16, %%zmm19\n\t" \
  "vpternlogq $0x74, %%zmm19, %%zmm18, %%zmm" #sum  \
  "\n\t"                                            \
  "vpopcntq %%zmm" #sum                             \
  ", %%zmm18\n\t"                                   \
  "vpaddq %%zmm18, %%zmm" #count ", %%zmm" #count   \
  "\n\t"                                            \
  "vmovdqa64 %%zmm19, %%zmm" #sum "\n\t"

void Binary(std::int64_t passes) noexcept {
  const std::int32_t bits = 0x12345678;
  if (passes <= 0) return;
  asm volatile(FOR_EACH_SUM(CLEAR) "vpbroadcastd %1, %%zmm16\n\tvmovaps %%zmm16, %%zmm17\n\t"
                                   "1:\n\t" BINARY_SUM(0, 8) BINARY_SUM(1, 9) BINARY_SUM(2, 10) BINARY_SUM(3, 11)
                                       BINARY_SUM(4, 12) BINARY_SUM(5, 13) BINARY_SUM(6, 14) BINARY_SUM(7, 15)
                                   "dec %0\n\tjnz 1b"
               : "+r"(passes)
               : "m"(bits)
               : "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11",
                 "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "cc");
}

#define LOAD(offset) "vmovups " offset "(%1), %%zmm0\n\tvmovups 64+" offset "(%1), %%zmm1\n\t"
#define LOAD_512(offset) LOAD(offset) LOAD("128+" offset) LOAD("256+" offset) LOAD("384+" offset)

void Read(const void* buffer, std::int64_t blocks, std::int64_t passes) noexcept {
  if (blocks <= 0) return;
  for (; passes > 0; --passes) {
    std::int64_t left = blocks;
    const void* p = buffer;
    asm volatile("1:\n\t" LOAD_512("0") LOAD_512("512") "add $1024, %1\n\tdec %0\n\tjnz 1b"
                 : "+r"(left), "+r"(p)
                 :
                 : "zmm0", "zmm1", "cc", "memory");
  }
}

}  // namespace
}  // namespace tersetorch
