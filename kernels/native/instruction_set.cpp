#include "instruction_set.h"

#if defined(ALURE_HAS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace alure {
namespace {

#if defined(ALURE_HAS_AMX)
// The CPU has tiles of bfloat16 and of bytes, the operating system saves them, and it lets this process use them: Linux
// wants to be asked once, since a thread's state grows by 8 KiB.
bool may_use_amx() {
    constexpr unsigned kTiles = 1u << 22 | 1u << 24 | 1u << 25, kSavesExtendedState = 1u << 27, kTileState = 3u << 17;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSavesExtendedState)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
    std::uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & kTileState) != kTileState) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(ALURE_HAS_AMX)
    static const bool amx = avx512 && __builtin_cpu_supports("avx512bf16") && may_use_amx();
    if (amx) sets.push_back(InstructionSet::kAmx);
#endif
#if defined(ALURE_HAS_AVX512_BF16)
    if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.push_back(InstructionSet::kAvx512Bf16);
#endif
    if (avx512) sets.push_back(InstructionSet::kAvx512);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.push_back(InstructionSet::kAvx2);
#endif
    sets.push_back(InstructionSet::kPortable);
    return sets;
}

InstructionSet vectors_of(InstructionSet set) {
    if (set == InstructionSet::kAmx || set == InstructionSet::kAvx512Bf16) return InstructionSet::kAvx512;
    if (set == InstructionSet::kEmulatedAmx) return InstructionSet::kPortable;
    return set;
}

const char* name_of(InstructionSet set) {
    switch (set) {
        case InstructionSet::kEmulatedAmx:
            return "emulated amx";
        case InstructionSet::kAmx:
            return "amx";
        case InstructionSet::kAvx512Bf16:
            return "avx512 bf16";
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
