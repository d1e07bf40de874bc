// The boundary between attention.cpp (checks, work units, threads) and the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alure {

// bucket(x) = number of thresholds <= x; table [heads, num_thresholds + 1]. Without thresholds, table is null: no bias.
struct BucketTable {
    const std::int64_t* thresholds;  // increasing
    std::int64_t num_thresholds;
    const float* table;
};

// kernels/attention/ops.py has the formula. Rows are those of the packed tensors.
struct AttentionInputs {
    const float* q;  // [total_q, heads, head_dim]
    const float* k;  // [total_k, heads, head_dim]
    const float* v;  // [total_k, heads, head_dim]
    std::int64_t heads, head_dim;
    std::int64_t num_sequences;
    const std::int64_t* q_offsets;  // [num_sequences + 1]
    const std::int64_t* k_offsets;
    const std::int64_t* q_times;  // [total_q], or null without a time table
    const std::int64_t* k_times;
    BucketTable time, position;
    const float* q_cyclic;  // [total_q, heads, num_cyclic], or null where num_cyclic is 0
    const float* k_cyclic;  // [total_k, num_cyclic]
    std::int64_t num_cyclic;
    bool causal;
    std::int64_t window_left, window_right;  // −1: no limit
    float scale;
};

struct AttentionOutputs {
    float* out;  // [total_q, heads, head_dim]
    float* lse;  // [heads, total_q]
    std::int64_t total_q;
};

struct AttentionGradients {
    const float* grad_out;  // [total_q, heads, head_dim]
    const float* out;
    const float* lse;  // [heads, total_q]
    std::int64_t total_q;
    float* dq;          // [total_q, heads, head_dim], zeros before
    float* dk;          // [total_k, heads, head_dim]
    float* dv;          // [total_k, heads, head_dim]
    float* d_q_cyclic;  // [total_q, heads, num_cyclic], zeros before
    float* d_k_cyclic;  // [total_k, num_cyclic], zeros before
};

// Rows [begin, end) of a sequence: of its queries (forward) or of its keys (backward); all heads.
struct Part {
    std::int64_t sequence, begin, end;
};

// Lets the parts that add to the same rows of dq do so in the order of their keys. `tile` counts tiles of queries of
// one head, head after head.
struct Turn {
    void (*wait)(void* counters, std::int64_t tile, std::int64_t turn);
    void (*pass)(void* counters, std::int64_t tile, std::int64_t turn);
    void* counters;  // null: nobody else adds to these rows
};

struct AttentionKernels {
    std::int64_t query_tile;                               // most rows of a forward part
    std::int64_t key_block;                                // most rows of a backward part
    std::int64_t backward_tile;                            // queries a turn
    std::size_t (*scratch_bytes)(const AttentionInputs&);  // for one thread
    void (*forward)(const AttentionInputs&, const AttentionOutputs&, const Part&, void* scratch);
    // d_time and d_position: sums by bucket [heads, num_thresholds + 1], added to; not read without the table.
    void (*backward)(const AttentionInputs&, const AttentionGradients&, const Part&, const Turn&, double* d_time,
                     double* d_position, void* scratch);
};

namespace portable {
extern const AttentionKernels attention_kernels;
}
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}

}  // namespace alure
