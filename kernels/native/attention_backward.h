// Backward attention of one block of keys: tiles of queries in order, weights computed again from the log-sum-exp.
#pragma once

#include "attention_tiles.h"

namespace alure {
namespace {

constexpr std::int64_t kBackwardKeys = 128;
constexpr std::int64_t kBackwardTile = 48;  // divisible by kRows; everything a pair of blocks needs stays in the second cache
constexpr std::int64_t kWeightStride = kBackwardKeys + kLanes;
static_assert(kBackwardKeys <= kMostKeys && kBackwardKeys % kLanes == 0);

struct BackwardScratch {
    BackwardScratch(const AttentionInputs& in, void* base) : arena(base) {
        const std::int64_t channels = in.head_dim + in.num_cyclic;
        channel_stride = round_up(channels, kLanes);
        value_stride = round_up(in.head_dim, kLanes);
        keys = arena.floats(kBackwardKeys * channels);
        key_rows = arena.floats(kBackwardKeys * channel_stride);
        values = arena.floats(kBackwardKeys * in.head_dim);
        dk = arena.floats(kBackwardKeys * channel_stride);
        dv = arena.floats(kBackwardKeys * value_stride);
        queries = arena.floats(kBackwardTile * channels);
        query_rows = arena.floats(kBackwardTile * channel_stride);
        grad_out_rows = arena.floats(kBackwardTile * value_stride);
        weights = arena.floats(kBackwardTile * kWeightStride + kLanes);
        d_logits = arena.floats(kBackwardTile * kWeightStride + kLanes);
        dq = arena.floats(kBackwardTile * channel_stride);
        biases = arena.bytes(BiasWalker::scratch_bytes(in));
        runs = static_cast<Run*>(arena.bytes(sizeof(Run) * kRows * kBackwardKeys));
    }
    Arena arena;
    std::int64_t channel_stride, value_stride;
    float *keys, *values;                                // transposed
    float *key_rows, *query_rows, *grad_out_rows;        // panels of their columns
    float *dk, *dv, *dq;                                 // sums of this block and tile
    float *queries, *weights, *d_logits;                 // row-major
    void* biases;
    Run* runs;  // of a panel of queries
};

inline float sum_of(const float* values, std::int32_t begin, std::int32_t end) {
    Floats sum{};
    for (; begin + kLanes <= end; begin += kLanes) sum += load(values + begin);
    if (begin < end) sum += lane_numbers() < end - begin ? load(values + begin) : Floats{};
    return sum_of_lanes(sum);
}

inline float dot(const float* a, const float* b, std::int64_t size) {
    Floats sums{};
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) sums += load(a + i) * load(b + i);
    float sum = sum_of_lanes(sums);
    for (; i < size; ++i) sum += a[i] * b[i];
    return sum;
}

class BackwardBlock {
public:
    BackwardBlock(const AttentionInputs& in, const AttentionGradients& gradients, const Part& part, double* d_time,
                  double* d_position, void* base)
        : in_(in), g_(gradients), part_(part), s_(in, base), sequence_(sequence_at(in, part.sequence)),
          channels_(in.head_dim + in.num_cyclic), num_keys_(part.end - part.begin), row_stride_(in.heads * in.head_dim),
          d_time_(d_time), d_position_(d_position) {
        const std::int64_t k_row = sequence_.k_row + part.begin;
        const float* k = in.k + (k_row * in.heads + part.head) * in.head_dim;
        const float* v = in.v + (k_row * in.heads + part.head) * in.head_dim;
        pack_keys_transposed(in, k_row, num_keys_, part.head, s_.keys);
        pack_transposed(v, row_stride_, num_keys_, in.head_dim, 0, in.head_dim, s_.values);
        // dk is not needed yet: it lends its space to the keys in rows
        pack_channels(k, row_stride_, in.head_dim, 1.0f, in.num_cyclic ? in.k_cyclic + k_row * in.num_cyclic : nullptr,
                      in.num_cyclic, in.num_cyclic, num_keys_, s_.dk);
        pack_rows(s_.dk, channels_, num_keys_, channels_, s_.key_rows);
        fill(s_.dk, 0, num_keys_ * s_.channel_stride, Floats{});
        fill(s_.dv, 0, num_keys_ * s_.value_stride, Floats{});
        biases_.start(in, part.head, sequence_.k_row, part.begin, num_keys_, s_.biases);
    }

    // Adds the part of queries [begin, begin + rows) to dk, dv and the tables, and leaves their dq in scratch.
    // False where they see no key of the block.
    bool add_tile(std::int64_t begin, std::int64_t rows) {
        const std::int64_t position = begin + sequence_.shift, q_row = sequence_.q_row + begin;
        const Range seen = within_block(visible_keys(in_, position, position + rows - 1, sequence_.num_keys), part_.begin, num_keys_);
        if (seen.empty()) return false;
        const float* grad_out = g_.grad_out + (q_row * in_.heads + part_.head) * in_.head_dim;
        pack_queries(in_, q_row, rows, part_.head, s_.queries);
        pack_rows(s_.queries, channels_, rows, channels_, s_.query_rows);
        pack_rows(grad_out, row_stride_, rows, in_.head_dim, s_.grad_out_rows);
        for (std::int64_t r = 0; r < rows; r += kRows)
            weigh(begin + r, smaller<std::int64_t>(kRows, rows - r), s_.weights + r * kWeightStride,
                  s_.d_logits + r * kWeightStride, s_.queries + r * channels_);
        multiply<Left::kColumnMajor>(num_keys_, s_.weights, kWeightStride, s_.grad_out_rows, rows * kLanes, in_.head_dim,
                                     rows, s_.dv, s_.value_stride);
        multiply<Left::kColumnMajor>(num_keys_, s_.d_logits, kWeightStride, s_.query_rows, rows * kLanes, channels_, rows,
                                     s_.dk, s_.channel_stride);
        fill(s_.dq, 0, rows * s_.channel_stride, Floats{});
        multiply<Left::kRowMajor>(rows, s_.d_logits, kWeightStride, s_.key_rows, num_keys_ * kLanes, channels_, num_keys_,
                                  s_.dq, s_.channel_stride);
        return true;
    }

    void add_dq(std::int64_t begin, std::int64_t rows) const {
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t row = (sequence_.q_row + begin + r) * in_.heads + part_.head;
            const float* sums = s_.dq + r * s_.channel_stride;
            float* dq = g_.dq + row * in_.head_dim;
            for (std::int64_t d = 0; d < in_.head_dim; ++d) dq[d] += in_.scale * sums[d];
            if (in_.num_cyclic == 0) continue;
            float* d_cyclic = g_.d_q_cyclic + row * in_.num_cyclic;
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c) d_cyclic[c] += sums[in_.head_dim + c];
        }
    }

    void write_dk_dv() const {
        for (std::int64_t j = 0; j < num_keys_; ++j) {
            const std::int64_t row = (sequence_.k_row + part_.begin + j) * in_.heads + part_.head;
            for (std::int64_t d = 0; d < in_.head_dim; ++d) {
                g_.dk[row * in_.head_dim + d] = s_.dk[j * s_.channel_stride + d];  // the queries carry the scale
                g_.dv[row * in_.head_dim + d] = s_.dv[j * s_.value_stride + d];
            }
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c)
                g_.d_k_cyclic[row * in_.num_cyclic + c] = s_.dk[j * s_.channel_stride + in_.head_dim + c];
        }
    }

    [[nodiscard]] const Sequence& sequence() const { return sequence_; }

private:
    // Weights and gradients of logits of a few queries, and the sums of the latter by bucket.
    void weigh(std::int64_t query, std::int64_t rows, float* weights, float* d_logits, const float* queries) {
        const std::int64_t position = query + sequence_.shift, q_row = sequence_.q_row + query;
        const Range whole{0, round_up(num_keys_, kLanes)};
        std::int64_t num_runs[kRows];
        for (std::int64_t i = 0; i < rows; ++i) {
            biases_.move_to(in_.q_times ? in_.q_times[q_row + i] : 0, position + i);
            const Range visible = within_block(visible_keys(in_, position + i, position + i, sequence_.num_keys), part_.begin, num_keys_);
            Run* runs = s_.runs + i * kBackwardKeys;
            write_biases(biases_, visible, whole, weights + i * kWeightStride, [&](const Run& run) { *runs++ = run; });
            num_runs[i] = runs - (s_.runs + i * kBackwardKeys);
            fill(d_logits + i * kWeightStride, 0, whole.end, Floats{});
        }
        const float* grad_out = g_.grad_out + (q_row * in_.heads + part_.head) * in_.head_dim;
        const float* out = g_.out + (q_row * in_.heads + part_.head) * in_.head_dim;
        multiply<Left::kRowMajor>(rows, queries, channels_, s_.keys, channels_ * kLanes, num_keys_, channels_, weights, kWeightStride);
        multiply<Left::kRowMajor>(rows, grad_out, row_stride_, s_.values, in_.head_dim * kLanes, num_keys_, in_.head_dim,
                                  d_logits, kWeightStride);
        for (std::int64_t i = 0; i < rows; ++i, weights += kWeightStride, d_logits += kWeightStride) {
            const float lse = g_.lse[part_.head * g_.total_q + q_row + i];
            const float reference = lse == -kInfinity ? 0.0f : lse;  // a query that sees nothing: weights 0, not NaN
            const float delta = dot(grad_out + i * row_stride_, out + i * row_stride_, in_.head_dim);
            for (std::int64_t j = 0; j < num_keys_; j += kLanes) {
                const Floats weight = exp_lanes(load(weights + j) - reference);
                store(weights + j, weight);
                store(d_logits + j, weight * (load(d_logits + j) - delta));
            }
            if (d_time_ || d_position_) add_to_tables(s_.runs + i * kBackwardKeys, num_runs[i], d_logits);
        }
    }

    void add_to_tables(const Run* runs, std::int64_t num_runs, const float* d_logits) {
        for (std::int64_t i = 0; i < num_runs; ++i) {
            const double sum = sum_of(d_logits, runs[i].begin, runs[i].end);
            if (d_time_) d_time_[runs[i].time_bucket] += sum;
            if (d_position_) d_position_[runs[i].position_bucket] += sum;
        }
    }

    const AttentionInputs& in_;
    const AttentionGradients& g_;
    const Part part_;
    BackwardScratch s_;
    const Sequence sequence_;
    const std::int64_t channels_, num_keys_, row_stride_;
    double *d_time_, *d_position_;
    BiasWalker biases_;
};

void backward(const AttentionInputs& in, const AttentionGradients& gradients, const Part& part, const Turn& turn,
              double* d_time, double* d_position, void* scratch) {
    BackwardBlock block(in, gradients, part, d_time, d_position, scratch);
    const std::int64_t num_queries = block.sequence().num_queries;
    for (std::int64_t tile = 0; tile * kBackwardTile < num_queries; ++tile) {
        const std::int64_t begin = tile * kBackwardTile, rows = smaller(kBackwardTile, num_queries - begin);
        const bool sees_keys = block.add_tile(begin, rows);
        const std::int64_t order = part.begin / kBackwardKeys;
        if (turn.counters) turn.wait(turn.counters, tile, order);
        if (sees_keys) block.add_dq(begin, rows);
        if (turn.counters) turn.pass(turn.counters, tile, order);
    }
    block.write_dk_dv();
}

}  // namespace
}  // namespace alure
