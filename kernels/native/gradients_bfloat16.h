// The five products of attention's backward in bfloat16, each of 32 × 32 sums at a time. As in
// products_bfloat16.h, Sᵀ = K·Qᵀ has queries in its columns.
//
// dQᵀ = Kᵀ·dSᵀ sums over the keys of a block. dV = Pᵀ·dO and dK = dSᵀ·Q sum over queries, so they wait for all tiles of
// a part. In a row of Pᵀ and of dSᵀ query i is followed by query i + 16: then it takes no shuffle to write.
#pragma once

#include "attention_kernels.h"
#include "cyclic_pairs.h"
#include "scratch.h"
#include "squares_bfloat16.h"
#include "time_buckets.h"

namespace alure {
namespace {

static_assert(kLanes == 16 && kWidth == 32);

class PairGradients {
public:
    using Source = Bfloat16;
    static constexpr std::int64_t kTiles = 16;
    static constexpr std::int64_t kBlock = 128;
    static constexpr std::int64_t kSlice = 32;
    static constexpr int kDegree = 3;  // of the polynomial for weights

    PairGradients(const AttentionInputs& in, Arena& arena)
        : in_(in),
          cyclic_(in.head_dim, in.num_cyclic),
          depth_(round_up(cyclic_.end(), 32)),
          value_depth_(round_up(in.head_dim, 32)),
          has_scale_(in.scale > 1e-30f || in.scale < -1e-30f),
          rows_(arena.array<Bfloat16>(kWidth * depth_)),
          keys_(arena.array<Bfloat16>(kBlock * depth_)),
          channels_(arena.array<Bfloat16>(depth_ * kBlock)),
          values_(arena.array<Bfloat16>(kBlock * value_depth_)),
          scores_(arena.array<float>(kBlock * kWidth)),
          d_weights_(arena.array<float>(kBlock * kWidth)),
          weights_(arena.array<std::int32_t>(kTiles * kBlock * 16)),
          d_logits_(arena.array<std::int32_t>(kTiles * kBlock * 16)),
          d_logit_pairs_(arena.array<std::int32_t>(kBlock / 2 * kWidth)),
          d_keys_(arena.array<float>(kBlock * depth_)),
          d_values_(arena.array<float>(kBlock * value_depth_)) {}

    [[nodiscard]] std::int64_t query_floats() const { return kWidth * (depth_ + value_depth_); }
    [[nodiscard]] std::int64_t channels() const { return depth_; }
    [[nodiscard]] float factor() const { return has_scale_ ? in_.scale * kLog2E : kLog2E; }

    void pack_queries(const Rows& grad_out, std::int64_t row, std::int64_t rows, std::int64_t head,
                      float* packed) const {
        const Packed to = packed_of(packed);
        copy_rows(in_.q, row, has_scale_ ? rows : 0, head, kWidth, rows_, depth_);
        const float* cyclic = in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic;
        for (std::int64_t i = 0; i < rows; ++i)
            cyclic_.of_query(cyclic + i * in_.heads * in_.num_cyclic, has_scale_ ? 1.0f / in_.scale : 1.0f,
                             [&](std::int64_t channel, Bfloat16 x) { rows_[i * depth_ + channel] = x; });
        pair_channels(rows_, depth_, to.queries);
        pair_queries(rows_, depth_, to.query_pairs);
        copy_rows(grad_out, row, rows, head, kWidth, rows_, value_depth_);
        pair_channels(rows_, value_depth_, to.grad_out);
        pair_queries(rows_, value_depth_, to.grad_out_pairs);
    }

    // The sums of the gradients of `rows` keys begin at 0.
    void start_keys(std::int64_t rows) {
        num_keys_ = round_up(rows, kSlice);
        fill(d_keys_, {0, num_keys_ * depth_}, Floats{});
        fill(d_values_, {0, num_keys_ * value_depth_}, Floats{});
    }

    void pack_keys(std::int64_t row, std::int64_t rows, std::int64_t head) const {
        copy_rows(in_.k, row, rows, head, num_keys_, keys_, depth_);
        for (std::int64_t r = 0; r < rows; ++r)
            cyclic_.of_key(in_.k_cyclic + (row + r) * in_.num_cyclic,
                           [&](std::int64_t channel, Bfloat16 x) { keys_[r * depth_ + channel] = x; });
        for (std::int64_t key = 0; key < num_keys_; key += 32)
            for (std::int64_t channel = 0; channel < depth_; channel += 16) transpose_keys(key, channel);
        copy_rows(in_.v, row, rows, head, num_keys_, values_, value_depth_);
    }

    void start_tile(std::int64_t tile, float* packed) {
        tile_ = tile;
        packed_ = packed_of(packed);
    }

    // Scores and gradients of the weights of the slices of keys [begin, end), [keys, kWidth].
    void multiply(std::int64_t begin, std::int64_t end) const {
        for (std::int64_t key = begin / kSlice * kSlice; key < end; key += kSlice) {
            const std::int64_t rows = smaller(kSlice, end - key);
            multiply_square<false>(
                rows, (cyclic_.end() + 1) / 2, [&](std::int64_t s) { return keys_ + key * depth_ + s * 32; },
                depth_ * 2, [&](std::int64_t s) { return packed_.queries + s * 16 * kWidth; }, kWidth * 4,
                scores_ + key * kWidth, kWidth);
            multiply_square<false>(
                rows, (in_.head_dim + 1) / 2, [&](std::int64_t s) { return values_ + key * value_depth_ + s * 32; },
                value_depth_ * 2, [&](std::int64_t s) { return packed_.grad_out + s * 16 * kWidth; }, kWidth * 4,
                d_weights_ + key * kWidth, kWidth);
        }
    }
    [[nodiscard]] const float* scores(std::int64_t key) const { return scores_ + key * kWidth; }
    [[nodiscard]] const float* d_weights(std::int64_t key) const { return d_weights_ + key * kWidth; }

    // Weights and gradients of logits of two neighbouring keys, rounded to the nearest.
    void put(std::int64_t key, const Floats (&weights)[2][2], const Floats (&d_logits)[2][2]) const {
        for (int k = 0; k < 2; ++k) {
            put_pairs(row_of(weights_, key + k), weights[k][0], weights[k][1]);
            put_pairs(row_of(d_logits_, key + k), d_logits[k][0], d_logits[k][1]);
        }
        for (int v = 0; v < 2; ++v)
            put_pairs(d_logit_pairs_ + key / 2 * kWidth + v * 16, d_logits[0][v], d_logits[1][v]);
    }
    void clear(std::int64_t begin, std::int64_t end) const {
        const std::int64_t first = begin / 2 * 2, last = round_up(end, 2);
        fill_zeros(row_of(weights_, first), (last - first) * 16);
        fill_zeros(row_of(d_logits_, first), (last - first) * 16);
        fill_zeros(d_logit_pairs_ + first / 2 * kWidth, (last - first) / 2 * kWidth);
    }

    void add_tile(std::int64_t begin, std::int64_t end, float* d_queries) {
        const std::int64_t first = begin / kSlice * kSlice, last = round_up(end, kSlice);
        slices_[tile_] = {first, last};
        if (first == last) return;
        if (first < begin) clear(first, begin);
        if (round_up(end, 2) < last) clear(round_up(end, 2), last);
        for (std::int64_t channel = 0; channel < depth_; channel += 32)
            multiply_square<true>(
                smaller<std::int64_t>(32, cyclic_.end() - channel), (end - first + 1) / 2,
                [&](std::int64_t s) { return channels_ + channel * kBlock + first + s * 32; }, kBlock * 2,
                [&](std::int64_t s) { return d_logit_pairs_ + (first / 2 + s * 16) * kWidth; }, kWidth * 4,
                d_queries + channel * kWidth, kWidth);
    }

    // Takes all tiles of a head into the sums of the keys. Packed tiles are `stride` floats apart.
    void finish_head(float* packed, std::int64_t stride, std::int64_t num_tiles) const {
        const Packed from = packed_of(packed);
        for (std::int64_t key = 0; key < num_keys_; key += kSlice) {
            std::int64_t tiles[kTiles], count = 0;
            for (std::int64_t tile = 0; tile < num_tiles; ++tile)
                if (slices_[tile].begin <= key && key < slices_[tile].end) tiles[count++] = tile;
            if (count == 0) continue;
            const auto add = [&](const std::int32_t* left, const float* right, float* sums, std::int64_t depth) {
                for (std::int64_t channel = 0; channel < depth; channel += 32)
                    multiply_square<true>(
                        kSlice, count * 16, [&](std::int64_t s) { return left + (tiles[s] * kBlock + key) * 16; }, 64,
                        [&](std::int64_t s) { return right + tiles[s] * stride + channel; }, depth * 4,
                        sums + key * depth + channel, depth);
            };
            add(weights_, from.grad_out_pairs, d_values_, value_depth_);
            add(d_logits_, from.query_pairs, d_keys_, depth_);
        }
    }

    [[nodiscard]] const float* d_key(std::int64_t key) const { return d_keys_ + key * depth_; }
    [[nodiscard]] const float* d_value(std::int64_t key) const { return d_values_ + key * value_depth_; }
    [[nodiscard]] float d_key_cyclic(std::int64_t key, std::int64_t c) const {
        const float* sums = d_key(key);
        return (has_scale_ ? in_.scale : 1.0f) * (sums[cyclic_.pair(c)] + sums[cyclic_.rest(c)]);
    }
    [[nodiscard]] float d_query_cyclic(const float* d_queries, std::int64_t i, std::int64_t c) const {
        const float* sums = d_queries + cyclic_.pair(c) * kWidth + i;
        return sums[0] + sums[kWidth];
    }

    static void begin_thread() { begin_squares(); }
    static void end_thread() { end_squares(); }

private:
    struct Packed {
        float *queries, *grad_out;            // [pairs of channels, kWidth, 2]
        float *query_pairs, *grad_out_pairs;  // [16 pairs of queries, channels, 2]
    };
    [[nodiscard]] Packed packed_of(float* packed) const {
        float* grad_out = packed + depth_ / 2 * kWidth;
        float* query_pairs = grad_out + value_depth_ / 2 * kWidth;
        return {packed, grad_out, query_pairs, query_pairs + 16 * depth_};
    }
    [[nodiscard]] std::int32_t* row_of(std::int32_t* rows, std::int64_t key) const {
        return rows + (tile_ * kBlock + key) * 16;
    }

    template <class U>
    static void fill_zeros(U* p, std::int64_t count) {
        __builtin_memset(p, 0, count * sizeof(U));
    }
    // `rows` rows as [padded, depth], zeros where there is nothing.
    void copy_rows(const Rows& from, std::int64_t row, std::int64_t rows, std::int64_t head, std::int64_t padded,
                   Bfloat16* to, std::int64_t depth) const {
        constexpr std::int64_t kStep = 32;  // of a vector
        const auto* x = static_cast<const Bfloat16*>(from.data) + row * from.row_stride + head * from.head_stride;
        const std::int64_t whole = in_.head_dim / kStep * kStep;
        for (std::int64_t r = 0; r < rows; ++r, x += from.row_stride, to += depth) {
            for (std::int64_t d = 0; d < whole; d += kStep) __builtin_memcpy(to + d, x + d, kStep * sizeof(Bfloat16));
            if (whole == depth) continue;
            fill_zeros(to + whole, depth - whole);
            __builtin_memcpy(to + whole, x + whole, (in_.head_dim - whole) * sizeof(Bfloat16));
        }
        fill_zeros(to, (padded - rows) * depth);
    }

    // rows [kWidth, depth] as [depth / 2, kWidth, 2]
    static void pair_channels(const Bfloat16* rows, std::int64_t depth, float* to) {
        for (std::int64_t first = 0; first < kWidth; first += 16)
            for (std::int64_t pair = 0; pair < depth / 2; pair += 16) {
                Floats square[16];
                for (int i = 0; i < 16; ++i)
                    square[i] = load(reinterpret_cast<const float*>(rows + (first + i) * depth) + pair);
                transpose(square);
                for (int i = 0; i < 16; ++i) store(to + (pair + i) * kWidth + first, square[i]);
            }
    }
    // rows [kWidth, depth] as [16, depth, 2]: rows i and i + 16
    static void pair_queries(const Bfloat16* rows, std::int64_t depth, float* to) {
        for (std::int64_t i = 0; i < 16; ++i)
            for (std::int64_t channel = 0; channel < depth; channel += 16)
                store(to + i * depth + channel,
                      interleaved(rows + i * depth + channel, rows + (i + 16) * depth + channel));
    }
    // Channels [channel, channel + 16) of keys [key, key + 32) in rows of keys.
    void transpose_keys(std::int64_t key, std::int64_t channel) const {
        Floats square[16];
        const Bfloat16* from = keys_ + key * depth_ + channel;
        for (int i = 0; i < 16; ++i) square[i] = interleaved(from + 2 * i * depth_, from + (2 * i + 1) * depth_);
        transpose(square);
        for (int i = 0; i < 16; ++i)
            store(reinterpret_cast<float*>(channels_ + (channel + i) * kBlock + key), square[i]);
    }
    static Floats interleaved(const Bfloat16* a, const Bfloat16* b) {
        const auto lanes = [](const Bfloat16* x) { return load_indices(reinterpret_cast<const std::uint16_t*>(x)); };
        return reinterpret_cast<Floats>(lanes(a) | lanes(b) << 16);
    }
    static void put_pairs(std::int32_t* to, Floats a, Floats b) {
        constexpr std::int32_t kHalf = 0x8000;
        const auto low = reinterpret_cast<Unsigneds>(plus(reinterpret_cast<Ints>(a), splat(kHalf))) >> 16;
        const auto high = reinterpret_cast<Unsigneds>(plus(reinterpret_cast<Ints>(b), splat(kHalf))) & 0xffff0000u;
        store(reinterpret_cast<float*>(to), reinterpret_cast<Floats>(low | high));
    }

    const AttentionInputs& in_;
    CyclicPairs cyclic_;
    std::int64_t depth_, value_depth_;
    bool has_scale_;                     // of about 0, nothing is to be divided by: then queries are zeros
    Bfloat16* rows_;                     // [kWidth, depth]
    Bfloat16* keys_;                     // [kBlock, depth]
    Bfloat16* channels_;                 // [depth, kBlock]: the keys transposed
    Bfloat16* values_;                   // [kBlock, value_depth]
    float *scores_, *d_weights_;         // [kBlock, kWidth]
    std::int32_t *weights_, *d_logits_;  // [kTiles, kBlock, 16 pairs of queries]
    std::int32_t* d_logit_pairs_;        // [kBlock / 2, kWidth] pairs of keys
    float* d_keys_;                      // [kBlock, depth]
    float* d_values_;                    // [kBlock, value_depth]
    Range slices_[kTiles];               // what add_tile got of each tile
    Packed packed_{};                    // of the tile at hand
    std::int64_t tile_ = 0, num_keys_ = 0;
};

}  // namespace
}  // namespace alure
