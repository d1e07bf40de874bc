// What the forward and the backward kernel share: which keys a query sees, and packing.
#pragma once

#include "attention_kernels.h"
#include "bias.h"
#include "panels.h"

namespace alure {
namespace {

struct Sequence {
    std::int64_t q_row, num_queries, k_row, num_keys;  // first rows and lengths
    std::int64_t shift;                                // position of query 0: the last rows are aligned
};

inline Sequence sequence_at(const AttentionInputs& in, std::int64_t index) {
    const std::int64_t q_row = in.q_offsets[index], k_row = in.k_offsets[index];
    const std::int64_t num_queries = in.q_offsets[index + 1] - q_row, num_keys = in.k_offsets[index + 1] - k_row;
    return {q_row, num_queries, k_row, num_keys, num_keys - num_queries};
}

// The keys among [0, num_keys) that at least one query at positions [first, last] sees.
inline Range visible_keys(const AttentionInputs& in, std::int64_t first, std::int64_t last, std::int64_t num_keys) {
    Range range{0, num_keys};
    if (in.window_left >= 0 && in.window_left < first) range.begin = first - in.window_left;
    if (in.window_right >= 0 && in.window_right < num_keys - last)
        range.end = smaller(range.end, last + in.window_right + 1);
    if (in.causal) range.end = smaller(range.end, last + 1);
    return range;
}

inline Range within_block(Range keys, std::int64_t block, std::int64_t num_keys) {
    return {larger<std::int64_t>(keys.begin - block, 0), smaller(keys.end - block, num_keys)};
}

// Channels of q or k times `factor`, then the cyclic channels as they are: rows of head_dim + num_cyclic floats.
inline void pack_channels(const float* x, std::int64_t x_stride, std::int64_t head_dim, float factor,
                          const float* cyclic, std::int64_t cyclic_stride, std::int64_t num_cyclic, std::int64_t rows,
                          float* packed) {
    for (std::int64_t r = 0; r < rows; ++r, packed += head_dim + num_cyclic) {
        for (std::int64_t d = 0; d < head_dim; ++d) packed[d] = factor * x[r * x_stride + d];
        for (std::int64_t c = 0; c < num_cyclic; ++c) packed[head_dim + c] = cyclic[r * cyclic_stride + c];
    }
}

inline void pack_queries(const AttentionInputs& in, std::int64_t row, std::int64_t rows, std::int64_t head,
                         float* packed) {
    pack_channels(in.q + (row * in.heads + head) * in.head_dim, in.heads * in.head_dim, in.head_dim, in.scale,
                  in.num_cyclic ? in.q_cyclic + (row * in.heads + head) * in.num_cyclic : nullptr,
                  in.heads * in.num_cyclic, in.num_cyclic, rows, packed);
}

// Keys [row, row + rows) with their cyclic channels, transposed.
inline void pack_keys_transposed(const AttentionInputs& in, std::int64_t row, std::int64_t rows, std::int64_t head,
                                 float* panels) {
    const std::int64_t channels = in.head_dim + in.num_cyclic;
    pack_transposed(in.k + (row * in.heads + head) * in.head_dim, in.heads * in.head_dim, rows, in.head_dim, 0,
                    channels, panels);
    if (in.num_cyclic > 0)
        pack_transposed(in.k_cyclic + row * in.num_cyclic, in.num_cyclic, rows, in.num_cyclic, in.head_dim, channels,
                        panels);
}

}  // namespace
}  // namespace alure
