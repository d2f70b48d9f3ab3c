#include "kernels/machine_rates/machine_rates.h"

namespace tersetorch {
namespace {

constexpr int kSums = 12;
constexpr std::int32_t kOne = 0x3f800000, kOnes16 = 0x00010001, kOnes8 = 0x01010101;

// ymm0 to ymm11 are the sums, ymm12 and ymm13 the operands, ymm14 and ymm15 what lies between.
#define FOR_EACH_SUM(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define CLEAR(n) "vpxor %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define REGISTERS                                                                                                     \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", \
      "ymm14", "ymm15", "cc"

#define MULTIPLY_ADD(n) "vfmadd231ps %%ymm13, %%ymm12, %%ymm" #n "\n\t"

void Float32(std::int64_t passes) noexcept {
  if (passes <= 0) return;
  asm volatile(FOR_EACH_SUM(CLEAR) "vpbroadcastd %1, %%ymm12\n\tvmovaps %%ymm12, %%ymm13\n\t"
                                   "1:\n\t" FOR_EACH_SUM(MULTIPLY_ADD) "dec %0\n\tjnz 1b"
               : "+r"(passes)
               : "m"(kOne)
               : REGISTERS);
}

#define DOT(n)                               \
  "vpmaddubsw %%ymm12, %%ymm12, %%ymm14\n\t" \
  "vpmaddwd %%ymm13, %%ymm14, %%ymm15\n\t"   \
  "vpaddd %%ymm15, %%ymm" #n ", %%ymm" #n "\n\t"

void Int8(std::int64_t passes) noexcept {
  if (passes <= 0) return;
  asm volatile(FOR_EACH_SUM(CLEAR) "vpbroadcastd %1, %%ymm12\n\tvpbroadcastd %2, %%ymm13\n\t"
                                   "1:\n\t" FOR_EACH_SUM(DOT) "dec %0\n\tjnz 1b"
               : "+r"(passes)
               : "m"(kOnes8), "m"(kOnes16)
               : REGISTERS);
}

// What xnor_matmul does with three times four signs of two samples and 32 rows: how many differ, looked up for both at
// once, then parted. ymm8 holds the table, ymm9 w, ymm10 the nibbles' mask.
#define BINARY_SUM(first, both)                   \
  "vpshufb %%ymm9, %%ymm8, %%ymm12\n\t"           \
  "vpshufb %%ymm9, %%ymm8, %%ymm13\n\t"           \
  "vpshufb %%ymm9, %%ymm8, %%ymm14\n\t"           \
  "vpaddb %%ymm13, %%ymm12, %%ymm12\n\t"          \
  "vpaddb %%ymm14, %%ymm12, %%ymm12\n\t"          \
  "vpand %%ymm10, %%ymm12, %%ymm13\n\t"           \
  "vpsrlw $4, %%ymm12, %%ymm12\n\t"               \
  "vpaddb %%ymm13, %%ymm" #first ", %%ymm" #first \
  "\n\t"                                          \
  "vpaddw %%ymm12, %%ymm" #both ", %%ymm" #both "\n\t"

void Binary(std::int64_t passes) noexcept {
  if (passes <= 0) return;
  asm volatile(FOR_EACH_SUM(CLEAR) "vpbroadcastd %1, %%ymm8\n\tvmovaps %%ymm8, %%ymm9\n\t"
                                   "1:\n\t" BINARY_SUM(0, 4) BINARY_SUM(1, 5) BINARY_SUM(2, 6) BINARY_SUM(3, 7)
                                   "dec %0\n\tjnz 1b"
               : "+r"(passes)
               : "m"(kOne)
               : REGISTERS);
}

#define LOAD(offset) "vmovups " offset "(%1), %%ymm0\n\tvmovups 32+" offset "(%1), %%ymm1\n\t"
#define LOAD_256(offset) LOAD(offset) LOAD("64+" offset) LOAD("128+" offset) LOAD("192+" offset)

void Read(const void* buffer, std::int64_t blocks, std::int64_t passes) noexcept {
  if (blocks <= 0) return;
  for (; passes > 0; --passes) {
    std::int64_t left = blocks;
    const void* p = buffer;
    asm volatile("1:\n\t" LOAD_256("0") LOAD_256("256") LOAD_256("512")
                     LOAD_256("768") "add $1024, %1\n\tdec %0\n\tjnz 1b"
                 : "+r"(left), "+r"(p)
                 :
                 : "ymm0", "ymm1", "cc", "memory");
  }
}

}  // namespace

const MachineRateLoops kMachineRatesAvx2 = {
    {2 * 8 * kSums, 0, 2 * 32 * kSums, 2 * 3 * 4 * 2 * 32 * 4}, {Float32, nullptr, Int8, Binary}, Read};

}  // namespace tersetorch
