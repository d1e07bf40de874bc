// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "encoding_backward.h"

namespace alure {
namespace {

std::size_t scratch_bytes(const EncodingInputs& in) {
    return larger(ForwardScratch(in, nullptr).arena.used(), BackwardScratch(in, nullptr).arena.used());
}

static_assert(kEventBlock % kRows == 0 && kEventBlock % kLanes == 0);

}  // namespace

namespace ALURE_ISA {
const EncodingKernels encoding_kernels{kEventBlock,  padded_width,  id_stride,     packed_floats, pack_forward,
                                       pack_backward, scratch_bytes, forward, backward, scatter};
}

}  // namespace alure
