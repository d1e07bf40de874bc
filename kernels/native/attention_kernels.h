// The boundary between attention.cpp (checks, tables, work units, threads) and the kernels of one instruction set.
// kernels/attention/arguments.py has the formula. Plain data only: the kernels are compiled once for each set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace alure {

// [rows, heads, head_dim] whose channels are neighbours; strides in elements.
struct Rows {
    const void* data;
    std::int64_t row_stride, head_stride;
};

// bucket(x) = number of thresholds <= x. Without the bias, table is null.
struct BucketTable {
    const std::int64_t* thresholds;  // increasing
    std::int64_t num_thresholds;
    const float* table;  // [groups, heads, num_thresholds + 1]
};

// Who sees whom in one sequence, as arguments.py has it.
struct Rules {
    std::int64_t left, right, contexts, targets;
};

struct AttentionInputs {
    Element element;
    Rows q;     // [total_q, heads, head_dim]
    Rows k, v;  // [total_k, key_heads, head_dim]
    std::int64_t heads, key_heads, head_dim;
    std::int64_t total_q, total_k;
    std::int64_t num_sequences;
    const std::int64_t* q_offsets;  // [num_sequences + 1]
    const std::int64_t* k_offsets;
    const std::int64_t* q_times;  // [total_q], or null without a time table
    const std::int64_t* k_times;
    const Rules* rules;          // [num_sequences], or null: everyone sees everyone
    const std::int64_t* groups;  // [num_sequences], or null: all read table 0
    std::int64_t num_groups;
    BucketTable time, position;
    const float* q_cyclic;  // [total_q, heads, num_cyclic], or null where num_cyclic is 0
    const float* k_cyclic;  // [total_k, num_cyclic]
    std::int64_t num_cyclic;
    float scale;
};

// The kernels count logits in units of log 2.
constexpr float kLog2E = 1.44269504f;
// A cell is the int32 whose floats have the same upper bits: sign, exponent and three more, so 8 cells an octave.
constexpr int kCellShift = 20;
constexpr std::int64_t kCells = 4096;
constexpr std::int64_t kTablePadding = 64;  // floats behind every row of a table, which wide look-ups read

// What is made of the biases once a call.
struct BiasTables {
    const float* time;  // [groups, heads, time_stride], times log2 e
    std::int64_t time_stride;
    const float* position;  // [groups, heads, position_stride], times log2 e
    std::int64_t position_stride;
    const std::int32_t* thresholds;  // of times, saturated: exact for differences that fit int32
    const std::int32_t* cells;       // [kCells and padding] bucket of the least int32 of each cell
    std::int64_t most_in_cell;       // thresholds beyond it within one cell
};

struct ForwardOutputs {
    void* out;   // [total_q, heads, head_dim], elements as of q
    float* lse;  // [heads, total_q]
};

struct BackwardArguments {
    Rows grad_out, out;     // [total_q, heads, head_dim], elements as of q
    const float* grad_lse;  // [heads, total_q]
    const float* lse;       // [heads, total_q]
    void* dq;               // [total_q, heads, head_dim], elements as of q
    void *dk, *dv;          // [total_k, key_heads, head_dim], elements as of q
    float* dk_sums;         // [total_k, key_heads, head_dim] what parts of a sequence leave to the next; may be dk
    float* dv_sums;
    float* d_q_cyclic;  // [total_q, heads, num_cyclic]
    float* d_k_cyclic;  // [total_k, num_cyclic], zeros before
};

// Queries [begin, end) of a sequence, all heads.
struct Part {
    std::int64_t sequence, begin, end;
};

// Lets the parts that add to the same rows of dk and dv do so in the order of their queries. `place` counts the key
// heads of blocks of keys, block after block.
struct Turn {
    void (*wait)(void* counters, std::int64_t place, std::int64_t turn);
    void (*pass)(void* counters, std::int64_t place, std::int64_t turn);
    void* counters;  // null: nobody else adds to these rows
};

struct ForwardKernel {
    std::int64_t queries;                                  // most rows of a part
    std::size_t (*scratch_bytes)(const AttentionInputs&);  // for one thread
    void (*begin_thread)();                                // around the parts that one thread runs
    void (*end_thread)();
    void (*run)(const AttentionInputs&, const BiasTables&, const ForwardOutputs&, const Part&, void* scratch);
};

struct BackwardKernel {
    std::int64_t queries;  // most rows of a part
    std::int64_t keys;     // keys a turn
    std::size_t (*scratch_bytes)(const AttentionInputs&);
    void (*begin_thread)();
    void (*end_thread)();
    // d_time and d_position: sums by bucket [heads, num_thresholds + 1], added to; not read without the table.
    void (*run)(const AttentionInputs&, const BiasTables&, const BackwardArguments&, const Part&, const Turn&,
                double* d_time, double* d_position, void* scratch);
};

// Of one instruction set.
struct AttentionKernels {
    ForwardKernel forward_float32, forward_bfloat16;
    BackwardKernel backward_float32, backward_bfloat16;
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
namespace amx {
extern const ForwardKernel forward_bfloat16;
extern const BackwardKernel backward_bfloat16;
}  // namespace amx
namespace avx512_bf16 {
extern const ForwardKernel forward_bfloat16;
extern const BackwardKernel backward_bfloat16;
}  // namespace avx512_bf16
namespace emulated_amx {
extern const ForwardKernel forward_bfloat16;
extern const BackwardKernel backward_bfloat16;
}  // namespace emulated_amx

}  // namespace alure
