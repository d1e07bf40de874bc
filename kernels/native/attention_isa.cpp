// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "attention_backward.h"
#include "attention_forward.h"

namespace alure {
namespace {

std::size_t scratch_bytes(const AttentionInputs& in) {
    return larger(ForwardScratch(in, nullptr).arena.used(), BackwardScratch(in, nullptr).arena.used());
}

static_assert(kQueryTile % kRows == 0 && kBackwardTile % kRows == 0);

}  // namespace

namespace ALURE_ISA {
const AttentionKernels attention_kernels{kQueryTile, kBackwardKeys, kBackwardTile, scratch_bytes, forward, backward};
}

}  // namespace alure
