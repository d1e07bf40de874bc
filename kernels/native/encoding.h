// Event encoding on the CPU, sums in float32: threads and the order of sums. The arithmetic is in encoding_isa.cpp.
#pragma once

#include "encoding_kernels.h"
#include "instruction_set.h"

namespace alure {

struct EncodingGradients {
    const float* grad_out;  // [total, width]
    float* d_table;         // [num_rows, d_e], zeros before
    float* d_dense;         // [total, d_dense], or null where not wanted
    float* d_id_weight;     // [attributes · d_e, width]
    float* d_dense_weight;  // [d_dense, width], or null
    float* d_time_weight;   // [2 + 2 · num_periods, width]
    float* d_bias;          // [width]
    float* d_position;      // [num_positions, width], zeros before
    float* d_frequency;     // [num_frequencies, width], zeros before
    float* d_phases;        // [num_periods]
};

// Whether every value that becomes an address or a difference of times is in range; where false, outputs are unusable.
// A row of `out` [total, width], in.element, depends on its own sequence alone, and no result depends on the threads.
bool encode_events(const EncodingInputs& in, void* out, InstructionSet set, int num_threads);

bool encode_events_backward(const EncodingInputs& in, const EncodingGradients& gradients, InstructionSet set,
                            int num_threads);

}  // namespace alure
