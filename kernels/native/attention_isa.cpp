// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "attention_backward.h"
#include "attention_forward.h"
#include "products_vector.h"

namespace alure {
namespace {

static_assert(kBackwardTile % kRows == 0);

}  // namespace

namespace ALURE_ISA {
const AttentionKernels attention_kernels{forward_kernel<VectorProducts<float>>,
                                         forward_kernel<VectorProducts<Bfloat16>>,
                                         {kBackwardKeys, kBackwardTile, backward_scratch_bytes, backward}};
}

}  // namespace alure
