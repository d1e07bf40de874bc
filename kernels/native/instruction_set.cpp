#include "instruction_set.h"

namespace alure {

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) sets.push_back(InstructionSet::kAvx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(InstructionSet::kAvx2);
#endif
    sets.push_back(InstructionSet::kPortable);
    return sets;
}

const char* name_of(InstructionSet set) {
    switch (set) {
        case InstructionSet::kAvx512:
            return "avx512";
        case InstructionSet::kAvx2:
            return "avx2";
        case InstructionSet::kPortable:
            return "portable";
    }
    return "";
}

}  // namespace alure
