// Forward attention of one tile of queries: blocks of keys in order, softmax on line.
#pragma once

#include "attention_tiles.h"

namespace alure {
namespace {

constexpr std::int64_t kQueryTile = 192;  // divisible by kRows; a packed block of keys serves this many queries
constexpr std::int64_t kKeyBlock = 256;   // packed keys and values of D = 64: 128 KiB, in the second cache
constexpr std::int64_t kLogitStride = kKeyBlock + kLanes;

// One head's running softmax of every query of the tile.
struct Softmax {
    float* queries;  // [rows, channels], scaled
    float* sums;     // Σ weight · value so far, [rows, value_stride]
    float* maxima;   // [rows]
    float* totals;   // [rows] Σ weight so far
};

struct ForwardScratch {
    ForwardScratch(const AttentionInputs& in, void* base)
        : arena(base),
          channels(in.head_dim + in.num_cyclic),
          value_stride(round_up(in.head_dim, kLanes)),
          keys(arena.array<float>(kKeyBlock * channels)),
          values(arena.array<float>(kKeyBlock * value_stride)),
          logits(arena.array<float>(kRows * kLogitStride + kLanes)),
          softmax(arena.array<float>(in.heads * softmax_size())),
          bias(in, kQueryTile, kKeyBlock, arena) {}

    [[nodiscard]] std::int64_t softmax_size() const { return round_up(kQueryTile * (channels + value_stride + 2), 16); }
    [[nodiscard]] Softmax softmax_of(std::int64_t head) const {
        float* p = softmax + head * softmax_size();
        return {p, p + kQueryTile * channels, p + kQueryTile * (channels + value_stride),
                p + kQueryTile * (channels + value_stride + 1)};
    }

    Arena arena;
    std::int64_t channels, value_stride;
    float *keys, *values, *logits, *softmax;
    TileBias bias;
};

// Turns logits of one query into weights exp(logit − maximum) and rescales what was summed before.
inline void soften(float* logits, Range keys, float& maximum, float& total, float* sums, std::int64_t value_stride) {
    Floats largest = load(logits + keys.begin);
    for (std::int64_t j = keys.begin + kLanes; j < keys.end; j += kLanes)
        largest = larger_lanes(largest, load(logits + j));
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
        for (std::int64_t d = 0; d < value_stride; d += kLanes) store(sums + d, load(sums + d) * shrink);
        total *= shrink[0];
        maximum = updated;
    }
    total += sum_of_lanes(sum);
}

// One head of one block: every query of the tile takes in the block's keys.
inline void attend(const AttentionInputs& in, const Sequence& sequence, std::int64_t first_position, std::int64_t rows,
                   std::int64_t block, std::int64_t num_keys, const ForwardScratch& s, const Softmax& softmax) {
    for (std::int64_t r = 0; r < rows; r += kRows) {
        const std::int64_t panel_rows = smaller<std::int64_t>(kRows, rows - r), position = first_position + r;
        Range keys =
            within_block(visible_keys(in, position, position + panel_rows - 1, sequence.num_keys), block, num_keys);
        if (keys.empty()) continue;
        keys.begin = keys.begin / kLanes * kLanes;
        const Range whole{keys.begin, round_up(keys.end, kLanes)};
        for (std::int64_t i = 0; i < panel_rows; ++i) {
            const Range visible =
                within_block(visible_keys(in, position + i, position + i, sequence.num_keys), block, num_keys);
            s.bias.write(r + i, visible, whole, s.logits + i * kLogitStride);
        }
        multiply<Left::kRowMajor>(panel_rows, softmax.queries + r * s.channels, s.channels,
                                  s.keys + keys.begin * s.channels, s.channels * kLanes, whole.end - whole.begin,
                                  s.channels, s.logits + whole.begin, kLogitStride);
        float* sums = softmax.sums + r * s.value_stride;
        for (std::int64_t i = 0; i < panel_rows; ++i)
            soften(s.logits + i * kLogitStride, whole, softmax.maxima[r + i], softmax.totals[r + i],
                   sums + i * s.value_stride, s.value_stride);
        multiply<Left::kRowMajor>(panel_rows, s.logits + keys.begin, kLogitStride, s.values + keys.begin * kLanes,
                                  num_keys * kLanes, in.head_dim, keys.end - keys.begin, sums, s.value_stride);
    }
}

inline void write_outputs(const AttentionInputs& in, const AttentionOutputs& outputs, std::int64_t row,
                          std::int64_t head, float maximum, float total, const float* sums) {
    float* out = outputs.out + (row * in.heads + head) * in.head_dim;
    const bool sees_nothing = maximum == -kInfinity && total == 0.0f;
    const float factor = sees_nothing ? 0.0f : 1.0f / total;
    for (std::int64_t d = 0; d < in.head_dim; ++d) out[d] = sums[d] * factor;
    outputs.lse[head * outputs.total_q + row] = sees_nothing ? -kInfinity : maximum + __builtin_logf(total);
}

void forward(const AttentionInputs& in, const AttentionOutputs& outputs, const Part& part, void* base) {
    ForwardScratch s(in, base);
    const Sequence sequence = sequence_at(in, part.sequence);
    const std::int64_t rows = part.end - part.begin, q_row = sequence.q_row + part.begin;
    const std::int64_t first_position = part.begin + sequence.shift;
    for (std::int64_t head = 0; head < in.heads; ++head) {
        const Softmax softmax = s.softmax_of(head);
        pack_queries(in, q_row, rows, head, softmax.queries);
        fill(softmax.sums, {0, rows * s.value_stride}, Floats{});
        for (std::int64_t r = 0; r < rows; ++r) {
            softmax.maxima[r] = -kInfinity;
            softmax.totals[r] = 0.0f;
        }
    }
    const Range tile_keys = visible_keys(in, first_position, first_position + rows - 1, sequence.num_keys);
    for (std::int64_t block = tile_keys.begin; block < tile_keys.end; block += kKeyBlock) {
        const std::int64_t num_keys = smaller(kKeyBlock, tile_keys.end - block), k_row = sequence.k_row + block;
        s.bias.start_block(k_row, block, num_keys);
        s.bias.start_tile(q_row, first_position, rows);
        for (std::int64_t head = 0; head < in.heads; ++head) {
            pack_keys_transposed(in, k_row, num_keys, head, s.keys);
            pack_rows(in.v + (k_row * in.heads + head) * in.head_dim, in.heads * in.head_dim, num_keys, in.head_dim,
                      s.values);
            s.bias.start_head(head);
            attend(in, sequence, first_position, rows, block, num_keys, s, s.softmax_of(head));
        }
    }
    for (std::int64_t head = 0; head < in.heads; ++head) {
        const Softmax softmax = s.softmax_of(head);
        for (std::int64_t r = 0; r < rows; ++r)
            write_outputs(in, outputs, q_row + r, head, softmax.maxima[r], softmax.totals[r],
                          softmax.sums + r * s.value_stride);
    }
}

}  // namespace
}  // namespace alure
