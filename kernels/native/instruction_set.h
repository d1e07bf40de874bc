// Which of the compiled instruction sets this machine runs.
#pragma once

#include <vector>

namespace alure {

// kAmx adds tiles of bfloat16 and of bytes to kAvx512; kEmulatedAmx runs the same kernels on any machine, for tests.
enum class InstructionSet { kPortable, kAvx2, kAvx512, kAmx, kEmulatedAmx };

// Those that this CPU and operating system support, best first; never empty, and never the emulation.
std::vector<InstructionSet> instruction_sets();

// The set of the vector kernels that go with `set`.
InstructionSet vectors_of(InstructionSet set);

const char* name_of(InstructionSet set);

}  // namespace alure
