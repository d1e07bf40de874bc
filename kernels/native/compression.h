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

// Gradients of everything, in the shapes of what they belong to.
struct DotLinearGradients {
    const float* grad;    // of the embeddings [users, k, d]
    const float* hidden;  // of the forward [users, hidden]
    float *d_x, *d_linear, *d_mix, *d_hidden_weight, *d_hidden_bias, *d_output_weight, *d_output_bias, *d_gate;
};

// The same holds for d_x; the weights' gradients are sums over users in an order that the threads do not change.
//
// Users are taken in rounds, a round in four passes. By groups of users: S, D and the gradients down to the hidden
// layer. By rows of the hidden weights, so that each gradient of them has one owner: their gradient, and D replaced by
// its own. By rows of the output weights: their gradient. By groups again: dX and the gradients of W_L and Y.
void compress_dot_linear_backward(const DotLinearInputs& in, const DotLinearGradients& gradients, std::int64_t users,
                                  InstructionSet set, int num_threads);

}  // namespace alure
