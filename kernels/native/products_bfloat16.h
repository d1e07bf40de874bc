// The two products of attention in bfloat16: Sᵀ = K·Qᵀ and Oᵀ = Vᵀ·Pᵀ, both of 32 rows × 32 queries at a time. Cyclic
// channels are float32: x = high + low, and of the four products of two such sums the three
// largest become channels.
//
// In AMX a tile of sums takes 16 cycles a product while the vectors compute weights, so the products of the next keys,
// and those with the values of the tile before, are handed out ahead of the weights that do not wait for them.
#pragma once

#include "attention_kernels.h"
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
    static constexpr std::int64_t kBlock = 128;  // keys whose products are summed in tiles
    static constexpr std::int64_t kSlice = 32;   // keys
    static constexpr int kDegree = 3;            // of the polynomial for weights

    PairProducts(const AttentionInputs& in, Arena& arena)
        : in_(in),
          depth_(round_up(in.head_dim + 3 * in.num_cyclic, 32)),
          value_channels_(round_up(in.head_dim, 32)),
          has_scale_(in.scale > 1e-30f || in.scale < -1e-30f),
          tail_(arena.array<Bfloat16>(depth_)),
          keys_(arena.array<Bfloat16>(kBlock * depth_)),
          values_(arena.array<Bfloat16>(kBlock * value_channels_)),
          scores_(arena.array<float>(kBlock * kWidth)),
          weights_{arena.array<std::int32_t>(kBlock / 2 * kWidth), arena.array<std::int32_t>(kBlock / 2 * kWidth)} {}

    [[nodiscard]] std::int64_t query_floats() const { return depth_ / 2 * kWidth; }
    [[nodiscard]] std::int64_t sum_floats() const { return value_channels_ * kWidth; }
    [[nodiscard]] float factor() const { return has_scale_ ? in_.scale * kLog2E : kLog2E; }

    // [pairs of channels, kWidth queries, 2]
    void pack_queries(std::int64_t row, std::int64_t rows, std::int64_t head, float* packed) const {
        const auto* x = static_cast<const Bfloat16*>(in_.q.data) + row * in_.q.row_stride + head * in_.q.head_stride;
        const float* cyclic = in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic;
        const auto channels = [&](std::int64_t i, std::int64_t first) {
            return channels_of(x + i * in_.q.row_stride, first, has_scale_, [&](std::int64_t c, Bfloat16* to) {
                const float channel = cyclic[i * in_.heads * in_.num_cyclic + c];
                const Split split(has_scale_ ? channel / in_.scale : channel);
                put_channels(to, split.high, split.high, split.low);
            });
        };
        for (std::int64_t first = 0; first < kWidth; first += 16)
            for (std::int64_t channel = 0; channel < depth_; channel += 32) {
                Floats square[16];
                for (int i = 0; i < 16; ++i)
                    square[i] = reinterpret_cast<Floats>(first + i < rows ? channels(first + i, channel) : Ints{});
                transpose(square);
                for (int i = 0; i < 16; ++i) store(packed + (channel / 2 + i) * kWidth + first, square[i]);
            }
    }

    // Keys [kBlock, depth], and values transposed, [channels, kBlock]; zeros up to a whole slice.
    void pack_keys(std::int64_t row, std::int64_t rows, std::int64_t head) {
        const auto* k = static_cast<const Bfloat16*>(in_.k.data) + row * in_.k.row_stride + head * in_.k.head_stride;
        const auto* v = static_cast<const Bfloat16*>(in_.v.data) + row * in_.v.row_stride + head * in_.v.head_stride;
        const std::int64_t padded = round_up(rows, kSlice);
        for (std::int64_t i = 0; i < padded; ++i)
            for (std::int64_t channel = 0; channel < depth_; channel += 32)
                store_pairs(keys_ + i * depth_ + channel,
                           i >= rows ? Ints{}
                                     : channels_of(k + i * in_.k.row_stride, channel, true,
                                                   [&](std::int64_t c, Bfloat16* to) {
                                                       const Split split(in_.k_cyclic[(row + i) * in_.num_cyclic + c]);
                                                       put_channels(to, split.high, split.low, split.high);
                                                   }));
        for (std::int64_t first = 0; first < padded; first += 32)
            for (std::int64_t channel = 0; channel < value_channels_; channel += 32)
                transpose_values(v + first * in_.v.row_stride, smaller<std::int64_t>(32, rows - first), channel,
                                 values_ + channel * kBlock + first);
    }

    // Scores of the slices of keys [begin, end), [keys, kWidth].
    void multiply_keys(const float* queries, std::int64_t begin, std::int64_t end) const {
        for (std::int64_t key = begin / kSlice * kSlice; key < end; key += kSlice)
            multiply_square<false>(
                depth_ / 32, [&](std::int64_t s) { return keys_ + key * depth_ + s * 32; }, depth_ * 2,
                [&](std::int64_t s) { return queries + s * 16 * kWidth; }, kWidth * 4, scores_ + key * kWidth, kWidth);
    }
    [[nodiscard]] float* scores(std::int64_t key) const { return scores_ + key * kWidth; }

    // Weights [pairs of keys, kWidth queries, 2], rounded to the nearest. Returns their sum as stored: so a query that
    // sees one key gets its value, to the bit.
    Floats store_weights(std::int64_t key, int v, Floats weight, Floats next) const {
        const auto rounded = [](Floats x) {
            return plus(reinterpret_cast<Ints>(x), splat(std::int32_t{0x8000})) & std::int32_t(0xffff0000);
        };
        const Ints low = rounded(weight), high = rounded(next);
        store_pairs(reinterpret_cast<Bfloat16*>(weights_[current_] + key / 2 * kWidth + v * kLanes),
                    upper_halves(low) | high);
        return reinterpret_cast<Floats>(low) + reinterpret_cast<Floats>(high);
    }
    Floats store_weight(std::int64_t key, int v, Floats weight) const {
        return store_weights(key, v, weight, Floats{});
    }

    // sums [value_channels, kWidth] += values · weights of keys [begin, end), once continue_values has been called
    // often enough, or finish_values. The next weights go elsewhere.
    void multiply_values(std::int64_t begin, std::int64_t end, float* sums) {
        finish_values();
        const std::int64_t first = begin / kSlice * kSlice, last = round_up(end, kSlice);
        std::int32_t* weights = weights_[current_];
        fill_zeros(weights + first / 2 * kWidth, (begin - first) / 2 * kWidth);
        fill_zeros(weights + (end + 1) / 2 * kWidth, (last - end) / 2 * kWidth);
        pending_ = {weights, sums, first, last, 0};
        current_ = 1 - current_;
    }

    void continue_values() {
        const std::int64_t slices = (pending_.end - pending_.begin) / kSlice;
        if (slices == 0) return;
        const std::int64_t share = (value_channels_ + 32 * slices - 1) / (32 * slices) * 32;
        const std::int64_t end = smaller(pending_.channel + share, value_channels_);
        for (; pending_.channel < end; pending_.channel += 32) add_values(pending_.channel);
    }

    void finish_values() {
        if (pending_.begin == pending_.end) return;
        for (; pending_.channel < value_channels_; pending_.channel += 32) add_values(pending_.channel);
        pending_ = {};
    }

    static void begin_thread() { begin_squares(); }
    static void end_thread() { end_squares(); }

private:
    struct Split {
        explicit Split(float x) {
            store(&high, x);
            store(&low, x - to_float(high));
        }
        Bfloat16 high, low;
    };

    // A product with the values that is not finished: channels from `channel` on are to do.
    struct Pending {
        const std::int32_t* weights;
        float* sums;
        std::int64_t begin, end, channel;
    };

    template <class T>
    static void fill_zeros(T* p, std::int64_t count) {
        __builtin_memset(p, 0, count * sizeof(T));
    }

    static void put_channels(Bfloat16* to, Bfloat16 a, Bfloat16 b, Bfloat16 c) {
        to[0] = a;
        to[1] = b;
        to[2] = c;
    }

    // Channels [first, first + 32) of a row: its own, or zeros if they are not to count; cyclic ones; zeros.
    template <class PutCyclic>
    Ints channels_of(const Bfloat16* x, std::int64_t first, bool counts, PutCyclic put_cyclic) const {
        if (first + 32 <= in_.head_dim) return counts ? load_pairs(x + first) : Ints{};
        const std::int64_t whole = in_.head_dim / 32 * 32, rest = in_.head_dim - whole;
        fill_zeros(tail_, depth_ - whole);
        if (counts) __builtin_memcpy(tail_, x + whole, rest * sizeof(Bfloat16));
        for (std::int64_t c = 0; c < in_.num_cyclic; ++c) put_cyclic(c, tail_ + rest + 3 * c);
        return load_pairs(tail_ + first - whole);
    }

    // Channels [channel, channel + 32) of 32 values, of which the first `rows` are there.
    void transpose_values(const Bfloat16* v, std::int64_t rows, std::int64_t channel, Bfloat16* to) const {
        const std::int64_t channels = smaller<std::int64_t>(32, in_.head_dim - channel);
        const auto row = [&](std::int64_t i) {
            if (i >= rows) return Ints{};
            const Bfloat16* x = v + i * in_.v.row_stride + channel;
            if (channels == 32) return load_pairs(x);
            Bfloat16 lanes[32] = {};
            __builtin_memcpy(lanes, x, channels * sizeof(Bfloat16));
            return load_pairs(lanes);
        };
        for (int odd = 0; odd < 2; ++odd) {  // every other channel, values in pairs
            Floats square[16];
            for (int i = 0; i < 16; ++i) {
                const Ints a = row(2 * i), b = row(2 * i + 1);
                square[i] = reinterpret_cast<Floats>(odd ? join_upper_halves(a, b) : (a & 0xffff) | b << 16);
            }
            transpose(square);
            for (int i = 0; i < 16; ++i) store_pairs(to + (2 * i + odd) * kBlock, reinterpret_cast<Ints>(square[i]));
        }
    }

    void add_values(std::int64_t channel) const {
        multiply_square<true>(
            (pending_.end - pending_.begin) / kSlice,
            [&](std::int64_t s) { return values_ + channel * kBlock + pending_.begin + s * kSlice; }, kBlock * 2,
            [&](std::int64_t s) { return pending_.weights + (pending_.begin + s * kSlice) / 2 * kWidth; }, kWidth * 4,
            pending_.sums + channel * kWidth, kWidth);
    }

    const AttentionInputs& in_;
    std::int64_t depth_, value_channels_;
    bool has_scale_;  // of about 0, nothing is to be divided by: then queries are zeros
    Bfloat16* tail_;  // of a row: what is behind its last 32 whole channels
    Bfloat16* keys_;
    Bfloat16* values_;
    float* scores_;
    std::int32_t* weights_[2];  // of this tile, and of the tile before
    int current_ = 0;
    Pending pending_{};
};

}  // namespace
}  // namespace alure
