// Forward attention of one tile of queries: blocks of keys in order, softmax on line.
#pragma once

#include "attention_tiles.h"

namespace alure {
namespace {

constexpr std::int64_t kQueryTile = 192;  // divisible by kRows; a packed block of keys serves this many queries
constexpr std::int64_t kKeyBlock = 256;   // packed keys and values of D = 64: 128 KiB, in the second cache
constexpr std::int64_t kLogitStride = kKeyBlock + kLanes;
static_assert(kKeyBlock <= kMostKeys);

struct ForwardScratch {
    ForwardScratch(const AttentionInputs& in, void* base) : arena(base) {
        const std::int64_t channels = in.head_dim + in.num_cyclic;
        value_stride = round_up(in.head_dim, kLanes);
        queries = arena.floats(kQueryTile * channels);
        keys = arena.floats(kKeyBlock * channels);
        values = arena.floats(kKeyBlock * value_stride);
        logits = arena.floats(kRows * kLogitStride + kLanes);
        sums = arena.floats(kQueryTile * value_stride);
        biases = arena.bytes(BiasWalker::scratch_bytes(in));
    }
    Arena arena;
    std::int64_t value_stride;
    float *queries, *keys, *values, *logits;
    float* sums;  // Σ weight · value so far, [queries, value_stride]
    void* biases;
    float maxima[kQueryTile], totals[kQueryTile];
};

// Turns logits [begin, end) of one query into weights exp(logit − maximum) and rescales what was summed before.
inline void soften(float* logits, Range keys, float& maximum, float& total, float* sums, std::int64_t channels) {
    Floats largest = load(logits + keys.begin);
    for (std::int64_t j = keys.begin + kLanes; j < keys.end; j += kLanes) largest = larger_lanes(largest, load(logits + j));
    const float updated = larger(maximum, largest_of_lanes(largest));
    const float reference = updated == -kInfinity ? 0.0f : updated;  // nothing seen yet: weights are exp(−inf − 0) = 0
    Floats sum{};
    for (std::int64_t j = keys.begin; j < keys.end; j += kLanes) {
        const Floats weight = exp_lanes(load(logits + j) - reference);
        store(logits + j, weight);
        sum += weight;
    }
    if (updated != maximum) {
        const Floats shrink = exp_lanes(splat(maximum - reference));
        for (std::int64_t d = 0; d < channels; d += kLanes) store(sums + d, load(sums + d) * shrink);
        total *= shrink[0];
        maximum = updated;
    }
    total += sum_of_lanes(sum);
}

inline void write_outputs(const AttentionInputs& in, const AttentionOutputs& outputs, std::int64_t row, std::int64_t head,
                          float maximum, float total, const float* sums) {
    float* out = outputs.out + (row * in.heads + head) * in.head_dim;
    const bool sees_nothing = maximum == -kInfinity && total == 0.0f;
    const float factor = sees_nothing ? 0.0f : 1.0f / total;
    for (std::int64_t d = 0; d < in.head_dim; ++d) out[d] = sums[d] * factor;
    outputs.lse[head * outputs.total_q + row] = sees_nothing ? -kInfinity : maximum + __builtin_logf(total);
}

void forward(const AttentionInputs& in, const AttentionOutputs& outputs, const Part& part, void* base) {
    ForwardScratch s(in, base);
    const Sequence sequence = sequence_at(in, part.sequence);
    const std::int64_t channels = in.head_dim + in.num_cyclic, rows = part.end - part.begin;
    const std::int64_t row_stride = in.heads * in.head_dim;
    const std::int64_t first_position = part.begin + sequence.shift;
    pack_queries(in, sequence.q_row + part.begin, rows, part.head, s.queries);
    for (std::int64_t r = 0; r < rows; ++r) {
        s.maxima[r] = -kInfinity;
        s.totals[r] = 0.0f;
        fill(s.sums + r * s.value_stride, 0, s.value_stride, Floats{});
    }

    const Range tile_keys = visible_keys(in, first_position, first_position + rows - 1, sequence.num_keys);
    for (std::int64_t block = tile_keys.begin; block < tile_keys.end; block += kKeyBlock) {
        const std::int64_t num_keys = smaller(kKeyBlock, tile_keys.end - block), k_row = sequence.k_row + block;
        pack_keys_transposed(in, k_row, num_keys, part.head, s.keys);
        pack_rows(in.v + (k_row * in.heads + part.head) * in.head_dim, row_stride, num_keys, in.head_dim, s.values);
        BiasWalker biases;
        biases.start(in, part.head, sequence.k_row, block, num_keys, s.biases);

        for (std::int64_t r = 0; r < rows; r += kRows) {
            const std::int64_t panel_rows = smaller<std::int64_t>(kRows, rows - r), position = first_position + r;
            Range keys = within_block(visible_keys(in, position, position + panel_rows - 1, sequence.num_keys), block, num_keys);
            if (keys.empty()) continue;
            keys.begin = keys.begin / kLanes * kLanes;
            const Range whole{keys.begin, round_up(keys.end, kLanes)};
            for (std::int64_t i = 0; i < panel_rows; ++i) {
                biases.move_to(in.q_times ? in.q_times[sequence.q_row + part.begin + r + i] : 0, position + i);
                const Range visible = within_block(visible_keys(in, position + i, position + i, sequence.num_keys), block, num_keys);
                write_biases(biases, visible, whole, s.logits + i * kLogitStride, [](const Run&) {});
            }
            multiply<Left::kRowMajor>(panel_rows, s.queries + r * channels, channels, s.keys + keys.begin * channels,
                                      channels * kLanes, whole.end - whole.begin, channels, s.logits + whole.begin, kLogitStride);
            for (std::int64_t i = 0; i < panel_rows; ++i)
                soften(s.logits + i * kLogitStride, whole, s.maxima[r + i], s.totals[r + i],
                       s.sums + (r + i) * s.value_stride, s.value_stride);
            multiply<Left::kRowMajor>(panel_rows, s.logits + keys.begin, kLogitStride, s.values + keys.begin * kLanes,
                                      num_keys * kLanes, in.head_dim, keys.end - keys.begin, s.sums + r * s.value_stride,
                                      s.value_stride);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r)
        write_outputs(in, outputs, sequence.q_row + part.begin + r, part.head, s.maxima[r], s.totals[r], s.sums + r * s.value_stride);
}

}  // namespace
}  // namespace alure
