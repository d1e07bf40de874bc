// Dot-linear compression on the CPU, sums in float32: weights, blocks of users, threads. The arithmetic is in
// compression_isa.cpp.
#pragma once

#include "compression_kernels.h"
#include "instruction_set.h"

namespace alure {

// The weights' strides are their columns. Outputs need not be initialised. A user's result depends neither on the
// other users nor on the threads.
void compress_dot_linear(const DotLinearInputs& in, const CompressionOutputs& outputs, std::int64_t users,
                         InstructionSet set, int num_threads);

}  // namespace alure
