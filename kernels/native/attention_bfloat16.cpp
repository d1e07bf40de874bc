// Compiled for AMX, for AVX512_BF16 and, with ALURE_EMULATED_AMX, for tests: CMakeLists.txt sets ALURE_ISA, a namespace.
#include "attention_backward.h"
#include "attention_forward.h"
#include "gradients_bfloat16.h"
#include "products_bfloat16.h"
#include "tile_streams.h"

namespace alure::ALURE_ISA {
const ForwardKernel forward_bfloat16 = forward_kernel<PairProducts, TileStreams>;
const BackwardKernel backward_bfloat16 = backward_kernel<PairGradients>;
}  // namespace alure::ALURE_ISA
