// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "attention_backward.h"
#include "attention_forward.h"
#include "gradients_vector.h"
#include "products_vector.h"

namespace alure::ALURE_ISA {
const AttentionKernels attention_kernels{
    forward_kernel<VectorProducts<float>>, forward_kernel<VectorProducts<Bfloat16>>,
    backward_kernel<VectorGradients<float>>, backward_kernel<VectorGradients<Bfloat16>>};
}
