// Jagged attention on the CPU: checks, tables, work units, threads. The arithmetic is compiled per instruction set.
#pragma once

#include "attention_kernels.h"
#include "instruction_set.h"

namespace alure {

// Outputs need not be initialised. A sequence's result depends neither on the other sequences nor on the threads.
// Throws std::invalid_argument where offsets do not tile the rows, or a group has no table.
void attention_forward(const AttentionInputs& in, const ForwardOutputs& outputs, InstructionSet set, int num_threads);

// float32 [groups, heads, buckets]; null without the table.
struct TableGradients {
    float* d_time;
    float* d_position;
};

// Sums are in one fixed order, so the gradients do not depend on the threads.
void attention_backward(const AttentionInputs& in, const BackwardArguments& arguments, const TableGradients& tables,
                        InstructionSet set, int num_threads);

}  // namespace alure
