// Operators on the rows of a matrix, on the CPU, in float32: threads and the order of sums.
#pragma once

#include "instruction_set.h"
#include "rowwise_kernels.h"

namespace alure {

// No result depends on the threads, and no row's on other rows.
void rms_norm(const RmsNormInputs& in, void* out, InstructionSet set, int num_threads);
void rms_norm_backward(const RmsNormInputs& in, const void* grad, void* d_x, float* d_weight, InstructionSet set,
                       int num_threads);
void swiglu(const SwigluInputs& in, void* out, InstructionSet set, int num_threads);
void swiglu_backward(const SwigluInputs& in, const void* grad, void* d_gate_up, InstructionSet set, int num_threads);

}  // namespace alure
