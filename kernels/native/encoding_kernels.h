// The boundary between encoding.cpp (threads, order of sums) and the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace alure {

// kernels/encoding/ops.py has the formula. All arrays are packed, row after row.
struct EncodingInputs {
    std::int64_t total, num_sequences, attributes;
    std::int64_t num_rows, d_e;  // of the table
    std::int64_t d_dense, width, num_periods, num_positions, num_frequencies;
    const std::int64_t* ids;              // [total, attributes], −1 = missing
    const std::int64_t* offsets;          // [num_sequences + 1]
    const std::int64_t* timestamps;       // [total]
    const std::int64_t* reference_times;  // [num_sequences]
    const std::int64_t* counts;           // [total], or null
    const std::int64_t* utc_offsets;      // [total], or null
    const float* dense;                   // [total, d_dense], or null
    Element element;                      // of tables and of the output; all else is float32
    const void* table;                    // [num_rows, d_e]
    const float* id_weight;               // [attributes · d_e, width]
    const float* dense_weight;            // [d_dense, width], or null
    const float* time_weight;             // [2 + 2 · num_periods, width]
    const float* bias;                    // [width]
    const void* position_table;           // [num_positions, width]
    const void* frequency_table;          // [num_frequencies, width]
    const std::int64_t* periods;          // [num_periods]
    const float* phases;                  // [num_periods]
    double tau;

    [[nodiscard]] std::int64_t id_features() const { return attributes * d_e; }
    [[nodiscard]] std::int64_t time_features() const { return 2 + 2 * num_periods; }
    // What an event's embedding is a product of: rows of the table, content, time.
    [[nodiscard]] std::int64_t features() const { return id_features() + d_dense + time_features(); }
};

// Rows [begin, end) of the batch, at most `block` of them; `sequence` is the one that holds the first.
struct EventRows {
    std::int64_t begin, end, sequence;
};

// What backward adds to for the rows of one block.
struct BlockGradients {
    const float* grad_out;  // [total, width]
    float* d_weights;       // [id, dense, time features and the bias, weight_stride], added to
    float* d_found;         // [rows of the block, id_stride], gradients of the gathered embeddings
    float* d_dense;         // [total, d_dense], or null where not wanted
};

// Gradients of tables, added to by the rows of events in their order.
struct TableSums {
    float* table;      // [num_rows, d_e]
    float* position;   // [num_positions, width]
    float* frequency;  // [num_frequencies, width]
};

// The share of every table's rows that one thread adds to.
struct Share {
    std::int64_t index, count;
};

struct EncodingKernels {
    std::int64_t block;                                           // most rows of a call
    std::int64_t (*weight_stride)(const EncodingInputs&);         // floats from row to row of d_weights
    std::int64_t (*id_stride)(const EncodingInputs&);             // floats from row to row of d_found
    std::int64_t (*packed_floats)(const EncodingInputs&);         // weights packed for either direction
    void (*pack_forward)(const EncodingInputs&, float* packed);   // once a call
    void (*pack_backward)(const EncodingInputs&, float* packed);  // once a call
    std::size_t (*scratch_bytes)(const EncodingInputs&);          // for one thread
    // Both return false, and write nothing, where an id, a time or a count is out of range.
    bool (*forward)(const EncodingInputs&, const float* packed, const EventRows&, void* out, void* scratch);
    bool (*backward)(const EncodingInputs&, const float* packed, const EventRows&, const BlockGradients&,
                     void* scratch);
    // Adds the gradients of rows [begin, end), whose ids have been checked, to the share's rows of the tables.
    void (*scatter)(const EncodingInputs&, const EventRows&, const float* grad_out, const float* d_found,
                    const Share&, const TableSums&);
};

namespace portable {
extern const EncodingKernels encoding_kernels;
}
namespace avx2 {
extern const EncodingKernels encoding_kernels;
}
namespace avx512 {
extern const EncodingKernels encoding_kernels;
}

}  // namespace alure
