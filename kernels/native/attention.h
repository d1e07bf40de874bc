// Jagged attention on the CPU in float32: checks, work units, threads. The arithmetic is in attention_isa.cpp.
#pragma once

#include "attention_kernels.h"
#include "instruction_set.h"

namespace alure {

// Outputs need not be initialised. A sequence's result depends neither on the other sequences nor on the threads.
// Throws std::invalid_argument where offsets do not tile the rows.
void attention_forward(const AttentionInputs& in, const AttentionOutputs& outputs, std::int64_t total_k,
                       InstructionSet set, int num_threads);

// float32 [heads, buckets]; null without the table.
struct TableGradients {
    float* d_time;
    float* d_position;
};

// Sums are in one fixed order, so the gradients do not depend on the threads.
void attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const TableGradients& tables,
                        std::int64_t total_k, InstructionSet set, int num_threads);

}  // namespace alure
