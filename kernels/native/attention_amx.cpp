// Compiled for AMX and, with ALURE_EMULATED_AMX, for tests: CMakeLists.txt sets ALURE_ISA, a namespace.
#include "attention_backward.h"
#include "attention_forward.h"
#include "gradients_amx.h"
#include "products_amx.h"

namespace alure::ALURE_ISA {
const ForwardKernel forward_bfloat16 = forward_kernel<AmxProducts>;
const BackwardKernel backward_bfloat16 = backward_kernel<AmxGradients>;
}  // namespace alure::ALURE_ISA
