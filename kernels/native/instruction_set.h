// Which of the compiled instruction sets this machine runs.
#pragma once

#include <vector>

namespace alure {

// kAvx512Bf16 adds vector products of bfloat16 to kAvx512, kAmx tiles of bfloat16 and of bytes; kEmulatedAmx runs the
// kernels of the tiles on any machine, for tests.
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kEmulatedAmx };

// Those that this CPU and operating system support, best first; never empty, and never the emulation.
std::vector<InstructionSet> instruction_sets();

// The set of the vector kernels that go with `set`.
InstructionSet vectors_of(InstructionSet set);

const char* name_of(InstructionSet set);

}  // namespace alure
