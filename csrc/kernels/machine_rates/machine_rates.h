// Loops that do nothing but what a kernel is held against: multiply-adds as fast as a level's registers allow, and
// reads as fast as the caches and the memory give.
//
// Math:   none; each arithmetic loop repeats acc += a * b on independent accumulators that stay in registers, enough of
//         them (12 to 16) that the latency of an instruction (4 to 5 cycles, two a cycle at most) never waits. A read
//         loop loads every byte of a buffer once a pass and uses none.
// Limits: the loops are the limits. The vector ones are written in assembly, so that no compiler drops, merges or
//         spills what is to be timed; the scalar ones are what the compiler makes of plain C++ for every x86-64.
//
// Not an op: the benches time these loops (csrc/native, bench/rates.py), nothing else calls them.
#pragma once

#include <cstdint>

#include "kernels/common/cpu_isa.h"
#include "kernels/common/export.h"

namespace tersetorch {

enum class Arithmetic : int {
  kFloat32,   // fused multiply-adds
  kBFloat16,  // dot products of pairs, summed in float32; level avx512bf16 only
  kInt8,      // dot products of fours, summed in int32; avx2: pairs summed in int16, then in int32
  kBinary,    // products of signs: exclusive or of two words, a full adder, and a count of the carries' bits; avx2:
              // lookups of how many differ
};
inline constexpr int kArithmetics = 4;

inline constexpr std::int64_t kRatesReadBlock = 1024;  // a read buffer holds a whole number of such blocks

struct MachineRateLoops {
  // What one pass does, a multiply and an add counted as two; 0 where the level has no such instruction.
  std::int64_t operations[kArithmetics];
  void (*arithmetic[kArithmetics])(std::int64_t passes) noexcept;
  void (*read)(const void* buffer, std::int64_t blocks, std::int64_t passes) noexcept;
};

// The loops of a level, which the CPU must have.
TERSETORCH_API const MachineRateLoops& MachineRates(CpuIsa level) noexcept;

// The variants, hidden in the library.
extern const MachineRateLoops kMachineRatesScalar;
extern const MachineRateLoops kMachineRatesAvx2;
extern const MachineRateLoops kMachineRatesAvx512;
extern const MachineRateLoops kMachineRatesAvx512Bf16;

}  // namespace tersetorch
