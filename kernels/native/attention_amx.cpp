// Compiled for AMX and, with ALURE_EMULATED_AMX, for tests: CMakeLists.txt sets ALURE_ISA, a namespace.
#include "attention_forward.h"
#include "products_amx.h"

namespace alure::ALURE_ISA {
const ForwardKernel forward_bfloat16 = forward_kernel<AmxProducts>;
}
