// Backward attention of one block of keys: tiles of queries in order, weights computed again from the log-sum-exp.
#pragma once

#include "attention_mask.h"
#include "panels.h"
#include "tile_bias.h"

namespace alure {
namespace {

constexpr std::int64_t kBackwardKeys = 128;
constexpr std::int64_t kBackwardTile = 48;  // divisible by kRows; what a pair of blocks needs stays in the second cache
constexpr std::int64_t kWeightStride = kBackwardKeys + kLanes;
static_assert(kBackwardKeys % kLanes == 0);

// One head's keys of the block, and the sums of their gradients.
struct KeyPack {
    float* keys;      // transposed
    float* values;    // transposed
    float* key_rows;  // panels of channels
    float* dk;        // [keys, channel_stride]
    float* dv;        // [keys, value_stride]
};

struct BackwardScratch {
    BackwardScratch(const AttentionInputs& in, void* base)
        : arena(base),
          channels(in.head_dim + in.num_cyclic),
          channel_stride(round_up(channels, kLanes)),
          value_stride(round_up(in.head_dim, kLanes)),
          packs(arena.array<float>(in.key_heads * pack_size(in.head_dim))),
          queries(arena.array<float>(kBackwardTile * channels)),
          query_rows(arena.array<float>(kBackwardTile * channel_stride)),
          grad_out_rows(arena.array<float>(kBackwardTile * value_stride)),
          weights(arena.array<float>(kBackwardTile * kWeightStride + kLanes)),
          d_logits(arena.array<float>(kBackwardTile * kWeightStride + kLanes)),
          dq(arena.array<float>(kBackwardTile * channel_stride)),
          bias(in, kBackwardTile, kBackwardKeys, arena) {}

    [[nodiscard]] std::int64_t pack_size(std::int64_t head_dim) const {
        return kBackwardKeys * (channels + head_dim + 2 * channel_stride + value_stride);
    }
    [[nodiscard]] KeyPack pack_of(std::int64_t key_head, std::int64_t head_dim) const {
        float* keys = packs + key_head * pack_size(head_dim);
        float* values = keys + kBackwardKeys * channels;
        float* key_rows = values + kBackwardKeys * head_dim;
        float* dk = key_rows + kBackwardKeys * channel_stride;
        return {keys, values, key_rows, dk, dk + kBackwardKeys * channel_stride};
    }

    Arena arena;
    std::int64_t channels, channel_stride, value_stride;
    float* packs;
    float* queries;                     // [tile, channels], scaled
    float *query_rows, *grad_out_rows;  // panels of channels
    float *weights, *d_logits;          // [tile, kWeightStride]
    float* dq;                          // [tile, channel_stride]
    TileBias bias;
};

// Channels of q or k times `factor`, then the cyclic channels as they are: rows of head_dim + num_cyclic floats.
inline void pack_channels(const float* x, std::int64_t x_stride, std::int64_t head_dim, float factor,
                          const float* cyclic, std::int64_t cyclic_stride, std::int64_t num_cyclic, std::int64_t rows,
                          float* packed) {
    for (std::int64_t r = 0; r < rows; ++r, packed += head_dim + num_cyclic) {
        for (std::int64_t d = 0; d < head_dim; ++d) packed[d] = factor * x[r * x_stride + d];
        for (std::int64_t c = 0; c < num_cyclic; ++c) packed[head_dim + c] = cyclic[r * cyclic_stride + c];
    }
}

class BackwardBlock {
public:
    BackwardBlock(const AttentionInputs& in, const BackwardArguments& arguments, const Part& part, void* base)
        : in_(in),
          g_(arguments),
          sequence_(in, part.sequence),
          first_key_(part.begin),
          num_keys_(part.end - part.begin),
          k_row_(sequence_.k_row + part.begin),
          row_stride_(in.heads * in.head_dim),
          s_(in, base) {
        for (std::int64_t head = 0; head < in.key_heads; ++head) pack_keys(head, s_.pack_of(head, in.head_dim));
        s_.bias.start_block(k_row_, first_key_, num_keys_);
    }

    [[nodiscard]] std::int64_t num_queries() const { return sequence_.num_queries; }

    // Queries [begin, begin + rows) come next. False where none of them sees a key of the block.
    bool start_tile(std::int64_t begin, std::int64_t rows) {
        tile_ = begin;
        rows_ = rows;
        q_row_ = sequence_.q_row + begin;
        const std::int64_t position = begin + sequence_.shift;
        sight_ = sequence_.mask.sight(position, position + rows - 1, first_key_, first_key_ + num_keys_);
        if (sight_ == Sight::kHidden) return false;
        s_.bias.start_tile(sequence_.mask, q_row_, position, rows);
        return true;
    }

    // Adds the tile's part to dk, dv and the tables, and leaves its dq in scratch.
    void add_head(std::int64_t head, double* d_time, double* d_position) {
        const KeyPack pack = s_.pack_of(head / (in_.heads / in_.key_heads), in_.head_dim);
        pack_channels(static_cast<const float*>(in_.q.data) + q_row_ * in_.q.row_stride + head * in_.q.head_stride,
                      in_.q.row_stride, in_.head_dim, in_.scale,
                      in_.num_cyclic ? in_.q_cyclic + (q_row_ * in_.heads + head) * in_.num_cyclic : nullptr,
                      in_.heads * in_.num_cyclic, in_.num_cyclic, rows_, s_.queries);
        pack_rows(s_.queries, s_.channels, rows_, s_.channels, s_.query_rows);
        pack_rows(g_.grad_out + q_offset(head), row_stride_, rows_, in_.head_dim, s_.grad_out_rows);
        s_.bias.start_head(sequence_.group * in_.heads + head);
        for (std::int64_t r = 0; r < rows_; r += kRows)
            weigh(head, r, smaller<std::int64_t>(kRows, rows_ - r), pack, d_time);
        s_.bias.finish_head(d_position);
        multiply<Left::kColumnMajor>(num_keys_, s_.weights, kWeightStride, s_.grad_out_rows, rows_ * kLanes,
                                     in_.head_dim, rows_, pack.dv, s_.value_stride);
        multiply<Left::kColumnMajor>(num_keys_, s_.d_logits, kWeightStride, s_.query_rows, rows_ * kLanes, s_.channels,
                                     rows_, pack.dk, s_.channel_stride);
        fill(s_.dq, {0, rows_ * s_.channel_stride}, Floats{});
        multiply<Left::kRowMajor>(rows_, s_.d_logits, kWeightStride, pack.key_rows, num_keys_ * kLanes, s_.channels,
                                  num_keys_, s_.dq, s_.channel_stride);
    }

    void add_dq(std::int64_t head) const {
        for (std::int64_t r = 0; r < rows_; ++r) {
            const float* sums = s_.dq + r * s_.channel_stride;
            float* dq = g_.dq + q_offset(head) + r * row_stride_;
            for (std::int64_t d = 0; d < in_.head_dim; ++d) dq[d] += in_.scale * sums[d];
            if (in_.num_cyclic == 0) continue;
            float* d_cyclic = g_.d_q_cyclic + ((q_row_ + r) * in_.heads + head) * in_.num_cyclic;
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c) d_cyclic[c] += sums[in_.head_dim + c];
        }
    }

    void write_dk_dv() const {
        for (std::int64_t head = 0; head < in_.key_heads; ++head) {
            const KeyPack pack = s_.pack_of(head, in_.head_dim);
            for (std::int64_t j = 0; j < num_keys_; ++j) {
                const std::int64_t offset = ((k_row_ + j) * in_.key_heads + head) * in_.head_dim;
                for (std::int64_t d = 0; d < in_.head_dim; ++d) {
                    g_.dk[offset + d] = pack.dk[j * s_.channel_stride + d];  // the queries carry the scale
                    g_.dv[offset + d] = pack.dv[j * s_.value_stride + d];
                }
                for (std::int64_t c = 0; c < in_.num_cyclic; ++c)
                    g_.d_k_cyclic[(k_row_ + j) * in_.num_cyclic + c] +=
                        pack.dk[j * s_.channel_stride + in_.head_dim + c];
            }
        }
    }

private:
    [[nodiscard]] std::int64_t q_offset(std::int64_t head) const { return (q_row_ * in_.heads + head) * in_.head_dim; }

    void pack_keys(std::int64_t head, const KeyPack& pack) {
        const float* k = static_cast<const float*>(in_.k.data) + k_row_ * in_.k.row_stride + head * in_.k.head_stride;
        const float* v = static_cast<const float*>(in_.v.data) + k_row_ * in_.v.row_stride + head * in_.v.head_stride;
        const float* cyclic = in_.num_cyclic ? in_.k_cyclic + k_row_ * in_.num_cyclic : nullptr;
        pack_transposed(k, in_.k.row_stride, num_keys_, in_.head_dim, 0, s_.channels, pack.keys);
        if (cyclic)
            pack_transposed(cyclic, in_.num_cyclic, num_keys_, in_.num_cyclic, in_.head_dim, s_.channels, pack.keys);
        pack_transposed(v, in_.v.row_stride, num_keys_, in_.head_dim, 0, in_.head_dim, pack.values);
        // dk is not needed yet: it lends its space to the keys in rows
        pack_channels(k, in_.k.row_stride, in_.head_dim, 1.0f, cyclic, in_.num_cyclic, in_.num_cyclic, num_keys_,
                      pack.dk);
        pack_rows(pack.dk, s_.channels, num_keys_, s_.channels, pack.key_rows);
        fill(pack.dk, {0, num_keys_ * s_.channel_stride}, Floats{});
        fill(pack.dv, {0, num_keys_ * s_.value_stride}, Floats{});
    }

    // Weights and gradients of the logits of queries [r, r + rows) of the tile, and the sums of the latter by bucket.
    void weigh(std::int64_t head, std::int64_t r, std::int64_t rows, const KeyPack& pack, double* d_time) {
        const Range whole{0, round_up(num_keys_, kLanes)};
        float* weights = s_.weights + r * kWeightStride;
        float* d_logits = s_.d_logits + r * kWeightStride;
        const float* grad_out = g_.grad_out + q_offset(head) + r * row_stride_;
        for (std::int64_t i = 0; i < rows; ++i) {
            s_.bias.write(r + i, whole, weights + i * kWeightStride);
            if (sight_ == Sight::kMasked || num_keys_ < whole.end)
                hide(tile_ + r + i + sequence_.shift, whole, weights + i * kWeightStride);
            fill(d_logits + i * kWeightStride, whole, Floats{});
        }
        multiply<Left::kRowMajor>(rows, s_.queries + r * s_.channels, s_.channels, pack.keys, s_.channels * kLanes,
                                  num_keys_, s_.channels, weights, kWeightStride);
        multiply<Left::kRowMajor>(rows, grad_out, row_stride_, pack.values, in_.head_dim * kLanes, num_keys_,
                                  in_.head_dim, d_logits, kWeightStride);
        for (std::int64_t i = 0; i < rows; ++i, weights += kWeightStride, d_logits += kWeightStride) {
            const float lse = g_.lse[head * in_.total_q + q_row_ + r + i];
            const float reference = lse == -kInfinity ? 0.0f : lse;  // a query that sees nothing: weights 0, not NaN
            const float delta = g_.delta[head * in_.total_q + q_row_ + r + i];
            for (std::int64_t j = 0; j < num_keys_; j += kLanes) {
                const Floats weight = exp_lanes(load(weights + j) - reference);
                store(weights + j, weight);
                store(d_logits + j, weight * (load(d_logits + j) - delta));
            }
            s_.bias.add_gradients(r + i, d_logits, d_time);
        }
    }

    // −inf for the keys of the block that query i does not see, and behind its last key.
    void hide(std::int64_t i, Range whole, float* logits) const {
        const Mask& mask = sequence_.mask;
        const Range seen = mask.seen(i);
        const auto key = [this](std::int64_t j) { return static_cast<std::int32_t>(j - first_key_); };
        const std::int32_t self = i >= mask.history() && i < mask.num_keys() ? key(i) : -1;
        for (std::int64_t j = whole.begin; j < whole.end; j += kLanes) {
            const Ints keys = lane_numbers() + static_cast<std::int32_t>(j);
            const Ints visible =
                (keys < key(mask.contexts())) | ((keys >= key(seen.begin)) & (keys < key(seen.end))) | (keys == self);
            const Ints inside = keys < static_cast<std::int32_t>(num_keys_);
            store(logits + j, (visible & inside) ? load(logits + j) : splat(-kInfinity));
        }
    }

    const AttentionInputs& in_;
    const BackwardArguments& g_;
    const Sequence sequence_;
    const std::int64_t first_key_, num_keys_, k_row_, row_stride_;
    BackwardScratch s_;
    std::int64_t tile_ = 0, rows_ = 0, q_row_ = 0;  // the tile at hand
    Sight sight_ = Sight::kWhole;
};

std::size_t backward_scratch_bytes(const AttentionInputs& in) { return BackwardScratch(in, nullptr).arena.used(); }

void backward(const AttentionInputs& in, const BackwardArguments& arguments, const Part& part, const Turn& turn,
              double* d_time, double* d_position, void* scratch) {
    BackwardBlock block(in, arguments, part, scratch);
    const std::int64_t num_tiles = (block.num_queries() + kBackwardTile - 1) / kBackwardTile;
    const std::int64_t order = part.begin / kBackwardKeys;
    for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
        const std::int64_t begin = tile * kBackwardTile;
        const bool sees_keys = block.start_tile(begin, smaller(kBackwardTile, block.num_queries() - begin));
        for (std::int64_t head = 0; head < in.heads; ++head) {
            if (sees_keys)
                block.add_head(head, d_time + head * (in.time.num_thresholds + 1),
                               d_position + head * (in.position.num_thresholds + 1));
            if (turn.counters) turn.wait(turn.counters, head * num_tiles + tile, order);
            if (sees_keys) block.add_dq(head);
            if (turn.counters) turn.pass(turn.counters, head * num_tiles + tile, order);
        }
    }
    block.write_dk_dv();
}

}  // namespace
}  // namespace alure
