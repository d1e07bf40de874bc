// The two products of attention in bfloat16: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, both of 32 rows × 32 queries at a time.
//
// A product of AMX's tiles takes 16 cycles, in which the vectors can compute weights. tile_streams.h makes use of that
// where weights are plain and heads are not too wide. Here the products of the next keys, and those with the values of
// the tile before, are handed out ahead of the weights that do not wait for them.
#pragma once

#include "attention_kernels.h"
#include "cyclic_pairs.h"
#include "scratch.h"
#include "squares_bfloat16.h"
#include "time_buckets.h"

namespace alure {
namespace {

static_assert(kLanes == 16 && kWidth == 32);

class PairProducts {
public:
    using Source = Bfloat16;
    static constexpr std::int64_t kTiles = 16;   // of a part: a block of transposed values serves 512 queries
    static constexpr std::int64_t kChunk = 128;  // keys of a tile at a time
    static constexpr std::int64_t kSlice = 32;   // keys
    static constexpr int kDegree = 3;            // of the polynomial for weights

    PairProducts(const AttentionInputs& in, Arena& arena)
        : in_(in),
          cyclic_(in.head_dim, in.num_cyclic),
          depth_(round_up(cyclic_.end(), kDepthStep)),
          value_channels_(round_up(in.head_dim, kRowStep)),
          block_(streams() ? 1024 : kChunk),
          has_scale_(in.scale > 1e-30f || in.scale < -1e-30f),
          packed_keys_(arena.array<Bfloat16>(block_ * depth_ + block_ / kSlice * kBehind)),
          key_cyclic_(arena.array<Bfloat16>(block_ * 3 * in.num_cyclic)),
          packed_values_(arena.array<Bfloat16>(block_ * value_channels_)),
          scores_(arena.array<float>(kChunk * kWidth)),
          weights_{arena.array<std::int32_t>(kChunk / 2 * kWidth), arena.array<std::int32_t>(kChunk / 2 * kWidth)} {}

    // Whether the sums of a vector of queries fit into the tile registers of AMX: see tile_streams.h.
    [[nodiscard]] bool streams() const { return ALURE_TILES && depth_ <= 64; }
    [[nodiscard]] std::int64_t block() const { return block_; }  // keys, whole chunks
    [[nodiscard]] std::int64_t depth() const { return depth_; }
    [[nodiscard]] std::int64_t value_channels() const { return value_channels_; }
    [[nodiscard]] std::int64_t query_floats() const { return depth_ / 2 * kWidth; }
    [[nodiscard]] std::int64_t sum_floats() const { return value_channels_ * kWidth; }
    [[nodiscard]] float factor() const { return has_scale_ ? in_.scale * kLog2E : kLog2E; }

    // [pairs of channels, kWidth queries, 2]
    void pack_queries(std::int64_t row, std::int64_t rows, std::int64_t head, float* packed) const {
        const auto* x = static_cast<const Bfloat16*>(in_.q.data) + row * in_.q.row_stride + head * in_.q.head_stride;
        const std::int64_t known = has_scale_ ? rows : 0;
        for (std::int64_t first = 0; first < kWidth; first += 16)
            for (std::int64_t channel = 0; channel < depth_; channel += 32) {
                Floats square[16];
                for (int i = 0; i < 16; ++i)
                    square[i] = reinterpret_cast<Floats>(
                        first + i < known ? channels_of(x + (first + i) * in_.q.row_stride, channel) : Ints{});
                transpose(square);
                for (int i = 0; i < smaller<std::int64_t>(16, (depth_ - channel) / 2); ++i)
                    store(packed + (channel / 2 + i) * kWidth + first, square[i]);
            }
        const float* cyclic = in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic;
        auto* to = reinterpret_cast<Bfloat16*>(packed);
        for (std::int64_t i = 0; i < rows; ++i)
            cyclic_.of_query(cyclic + i * in_.heads * in_.num_cyclic, has_scale_ ? 1.0f / in_.scale : 1.0f,
                             [&](std::int64_t channel, Bfloat16 x) {
                                 to[(channel / 2 * kWidth + i) * 2 + channel % 2] = x;
                             });
    }

    // Packs a block of `rows` keys and values, of head `head` and as many behind it as there is room for. Returns how
    // many heads that are.
    std::int64_t pack_keys(std::int64_t row, std::int64_t rows, std::int64_t head) {
        padded_ = round_up(rows, kSlice);
        const std::int64_t count = smaller(block_ / padded_, in_.key_heads - head);
        if (head == 0) split_cyclic(row, rows);
        for (std::int64_t first = 0; first < padded_; first += kSlice)  // all heads of a few rows: memory in order
            for (std::int64_t i = 0; i < count; ++i) {
                use_head(i);
                pack_slice(row + first, first, smaller(kSlice, rows - first),
                           smaller(kSlice, rows - first - kSlice), head + i, keys_ + first * depth_,
                           values_ + first * value_channels_);
            }
        return count;
    }
    // What is multiplied from here on: the keys and values of the i-th head that is packed.
    void use_head(std::int64_t i) {
        keys_ = packed_keys_ + i * (padded_ * depth_ + kBehind);
        values_ = packed_values_ + i * padded_ * value_channels_;
    }

    [[nodiscard]] const Bfloat16* keys(std::int64_t key) const { return keys_ + key * depth_; }
    [[nodiscard]] const Bfloat16* values(std::int64_t key) const { return values_ + key * value_channels_; }

    // Scores of the slices of keys [begin, end) of one chunk, [keys, kWidth].
    void multiply_keys(const float* queries, std::int64_t begin, std::int64_t end) const {
        for (std::int64_t key = begin / kSlice * kSlice; key < end; key += kSlice)
            multiply_square<false>(
                smaller(kSlice, end - key), (cyclic_.end() + 1) / 2, [&](std::int64_t s) { return keys(key) + s * 32; },
                depth_ * 2, [&](std::int64_t s) { return queries + s * 16 * kWidth; }, kWidth * 4, scores(key), kWidth);
    }
    [[nodiscard]] float* scores(std::int64_t key) const { return scores_ + in_chunk(key) * kWidth; }

    // Weights [pairs of keys, kWidth queries, 2], rounded to the nearest. Returns their sum as stored: so a query that
    // sees one key gets its value, to the bit.
    Floats store_weights(std::int64_t key, int v, Floats weight, Floats next) const {
        const auto rounded = [](Floats x) {
            return plus(reinterpret_cast<Ints>(x), splat(std::int32_t{0x8000})) & std::int32_t(0xffff0000);
        };
        const Ints low = rounded(weight), high = rounded(next);
        store_pairs(reinterpret_cast<Bfloat16*>(weights_[current_] + in_chunk(key) / 2 * kWidth + v * kLanes),
                    upper_halves(low) | high);
        return reinterpret_cast<Floats>(low) + reinterpret_cast<Floats>(high);
    }
    Floats store_weight(std::int64_t key, int v, Floats weight) const {
        return store_weights(key, v, weight, Floats{});
    }

    // sums [value_channels, kWidth] += values · weights of keys [begin, end) of one chunk, once continue_values has
    // been called often enough, or finish_values. The next weights go elsewhere.
    void multiply_values(std::int64_t begin, std::int64_t end, float* sums) {
        finish_values();
        const std::int64_t first = begin / kSlice * kSlice, last = round_up(end, kSlice);
        std::int32_t* weights = weights_[current_];
        fill_zeros(weights + in_chunk(first) / 2 * kWidth, (begin - first) / 2 * kWidth);
        fill_zeros(weights + (in_chunk(end) + 1) / 2 * kWidth, (last - end) / 2 * kWidth);
        pending_ = {weights + in_chunk(first) / 2 * kWidth, values(first), sums, (end - first + 1) / 2, 0};
        current_ = 1 - current_;
    }

    void continue_values() {
        if (pending_.pairs == 0) return;
        const std::int64_t shares = round_up(2 * pending_.pairs, kSlice);
        const std::int64_t share = (value_channels_ + shares - 1) / shares * 32;
        const std::int64_t end = smaller(pending_.channel + share, value_channels_);
        for (; pending_.channel < end; pending_.channel += 32) add_values(pending_.channel);
    }

    void finish_values() {
        if (pending_.pairs == 0) return;
        for (; pending_.channel < value_channels_; pending_.channel += 32) add_values(pending_.channel);
        pending_ = {};
    }

    static void begin_thread() { begin_squares(); }
    static void end_thread() { end_squares(); }

private:
    static constexpr std::int64_t kBehind = 32;  // room behind a head's keys, which are written in whole vectors

    // A product with the values that is not finished: channels from `channel` on are to do.
    struct Pending {
        const std::int32_t* weights;
        const Bfloat16* values;
        float* sums;
        std::int64_t pairs, channel;  // of keys
    };

    static std::int64_t in_chunk(std::int64_t key) { return key & (kChunk - 1); }
    template <class T>
    static void fill_zeros(T* p, std::int64_t count) {
        __builtin_memset(p, 0, count * sizeof(T));
    }

    // The cyclic channels of a block's keys, which all heads share.
    void split_cyclic(std::int64_t row, std::int64_t rows) const {
        Bfloat16* to = key_cyclic_;
        for (std::int64_t i = 0; i < rows; ++i, to += 3 * in_.num_cyclic)
            cyclic_.of_key(in_.k_cyclic + (row + i) * in_.num_cyclic,
                           [&](std::int64_t channel, Bfloat16 x) { to[channel - cyclic_.first()] = x; });
    }

    // Keys of a slice, [kSlice, depth], and its values transposed, [channels, kSlice]; the first `rows` are there, from
    // `first` on in the block. Fetches `ahead` rows of the next one.
    void pack_slice(std::int64_t row, std::int64_t first, std::int64_t rows, std::int64_t ahead, std::int64_t head,
                    Bfloat16* keys, Bfloat16* values) const {
        const auto* k = static_cast<const Bfloat16*>(in_.k.data) + row * in_.k.row_stride + head * in_.k.head_stride;
        const auto* v = static_cast<const Bfloat16*>(in_.v.data) + row * in_.v.row_stride + head * in_.v.head_stride;
        const std::int64_t cyclic = 3 * in_.num_cyclic;
        for (std::int64_t i = kSlice; i < kSlice + ahead; ++i)  // 3 to 5 % of a forward
            for (std::int64_t channel = 0; channel < in_.head_dim; channel += 32) {
                __builtin_prefetch(k + i * in_.k.row_stride + channel);
                __builtin_prefetch(v + i * in_.v.row_stride + channel);
            }
        for (std::int64_t i = 0; i < kSlice; ++i) {
            for (std::int64_t channel = 0; channel < depth_; channel += 32)
                store_pairs(keys + i * depth_ + channel,
                            i < rows ? channels_of(k + i * in_.k.row_stride, channel) : Ints{});
            if (i < rows)
                for (std::int64_t c = 0; c < cyclic; ++c)
                    keys[i * depth_ + cyclic_.first() + c] = key_cyclic_[(first + i) * cyclic + c];
        }
        for (std::int64_t channel = 0; channel < value_channels_; channel += 32)
            transpose_values(v, rows, channel, values + channel * kSlice);
    }

    // Channels [first, first + 32) of a row, zeros behind its last.
    [[nodiscard]] Ints channels_of(const Bfloat16* x, std::int64_t first) const {
        const std::int64_t channels = in_.head_dim - first;
        return channels >= 32 ? load_pairs(x + first) : channels > 0 ? load_pairs(x + first, channels) : Ints{};
    }

    // Channels [channel, channel + 32) of 32 values, of which the first `rows` are there.
    void transpose_values(const Bfloat16* v, std::int64_t rows, std::int64_t channel, Bfloat16* to) const {
        const auto row = [&](std::int64_t i) {
            return i < rows ? channels_of(v + i * in_.v.row_stride, channel) : Ints{};
        };
        for (int odd = 0; odd < 2; ++odd) {  // every other channel, values in pairs
            Floats square[16];
            for (int i = 0; i < 16; ++i) {
                const Ints a = row(2 * i), b = row(2 * i + 1);
                square[i] = reinterpret_cast<Floats>(odd ? join_upper_halves(a, b) : (a & 0xffff) | b << 16);
            }
            transpose(square);
            for (int i = 0; i < smaller<std::int64_t>(16, (value_channels_ - channel) / 2); ++i)
                store_pairs(to + (2 * i + odd) * kSlice, reinterpret_cast<Ints>(square[i]));
        }
    }

    void add_values(std::int64_t channel) const {
        multiply_square<true>(
            smaller<std::int64_t>(32, in_.head_dim - channel), pending_.pairs,
            [&](std::int64_t s) { return pending_.values + (s * value_channels_ + channel) * kSlice; }, kSlice * 2,
            [&](std::int64_t s) { return pending_.weights + s * kSlice / 2 * kWidth; }, kWidth * 4,
            pending_.sums + channel * kWidth, kWidth);
    }

    const AttentionInputs& in_;
    CyclicPairs cyclic_;
    std::int64_t depth_, value_channels_;
    std::int64_t block_, padded_ = 0;  // keys: room for so many; of a head at hand, whole slices
    bool has_scale_;                   // of about 0, nothing is to be divided by: then queries are zeros
    Bfloat16* packed_keys_;
    Bfloat16* key_cyclic_;  // [keys of a block, 3 · num_cyclic]
    Bfloat16* packed_values_;
    Bfloat16 *keys_ = nullptr, *values_ = nullptr;  // of the head at hand
    float* scores_;                                 // of a chunk
    std::int32_t* weights_[2];  // of this tile, and of the tile before
    int current_ = 0;
    Pending pending_{};
};

}  // namespace
}  // namespace alure
