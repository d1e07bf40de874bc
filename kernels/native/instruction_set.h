// Which of the compiled instruction sets this machine runs.
#pragma once

#include <vector>

namespace alure {

enum class InstructionSet { kPortable, kAvx2, kAvx512 };

// Those that this CPU and operating system support, best first; never empty.
std::vector<InstructionSet> instruction_sets();

const char* name_of(InstructionSet set);

}  // namespace alure
