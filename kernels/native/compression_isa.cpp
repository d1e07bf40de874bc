// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "compression_backward.h"

namespace alure {
namespace ALURE_ISA {
const CompressionKernels compression_kernels{
    kLanes, scratch_bytes, compress, backward_scratch_bytes, differentiate_embeddings, differentiate_hidden,
    differentiate_output, differentiate_vectors};
}

}  // namespace alure
