// The two products of attention in float32 vectors. Queries lie in the lanes: no sums over lanes, and rows of keys and
// values are read as they are. bfloat16 becomes float32 while it is packed.
#pragma once

#include "attention_kernels.h"
#include "scratch.h"
#include "time_buckets.h"

namespace alure {
namespace {

// How element (row, k) of the left matrix lies in memory.
enum class By { kRow, kColumn };

// c [kRowCount, kWidth] (+)= a [kRowCount, depth] · b [depth, kWidth]
template <By kBy, bool kAdd, int kRowCount>
inline void multiply_rows(const float* a, std::int64_t stride, const float* b, std::int64_t depth, float* c) {
    Floats sums[kRowCount][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRowCount; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sums[row][v] = kAdd ? load(c + row * kWidth + v * kLanes) : Floats{};
    for (std::int64_t k = 0; k < depth; ++k) {
        const Floats right[2] = {load(b + k * kWidth), load(b + k * kWidth + kLanes)};
#pragma GCC unroll 16
        for (int row = 0; row < kRowCount; ++row) {
            const Floats left = splat(kBy == By::kRow ? a[row * stride + k] : a[k * stride + row]);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) sums[row][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRowCount; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) store(c + row * kWidth + v * kLanes, sums[row][v]);
}

template <By kBy, bool kAdd, int kRowCount = kRows>
inline void multiply_few(std::int64_t rows, const float* a, std::int64_t stride, const float* b, std::int64_t depth,
                         float* c) {
    if (rows == kRowCount)
        multiply_rows<kBy, kAdd, kRowCount>(a, stride, b, depth, c);
    else if constexpr (kRowCount > 1)
        multiply_few<kBy, kAdd, kRowCount - 1>(rows, a, stride, b, depth, c);
}

// The last rows are shared out evenly: a block of one row would wait for its own sums.
template <By kBy, bool kAdd>
inline void multiply_tile(std::int64_t rows, const float* a, std::int64_t stride, const float* b, std::int64_t depth,
                          float* c) {
    for (std::int64_t row = 0; row < rows;) {
        const std::int64_t left = rows - row, step = left >= 2 * kRows ? kRows : left > kRows ? (left + 1) / 2 : left;
        multiply_few<kBy, kAdd>(step, a + row * (kBy == By::kRow ? stride : 1), stride, b, depth, c + row * kWidth);
        row += step;
    }
}

template <class From>
inline void copy_lanes(const From* x, std::int64_t size, float* packed) {
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store(packed + i, load(x + i));
    for (; i < size; ++i) packed[i] = to_float(x[i]);
}

// x [rows, columns] times `factor` as [columns, kWidth], zeros in the lanes without a row.
template <class From>
inline void pack_lanes(const From* x, std::int64_t stride, std::int64_t rows, std::int64_t columns, float factor,
                       float* packed) {
    for (int v = 0; v < 2; ++v) {
        const std::int64_t first = v * kLanes, lanes = smaller<std::int64_t>(kLanes, rows - first);
        std::int64_t column = 0;
        for (; column + kLanes <= columns; column += kLanes) {
            Floats square[kLanes];
            for (int i = 0; i < kLanes; ++i)
                square[i] = i < lanes ? factor * load(x + (first + i) * stride + column) : Floats{};
            transpose(square);
            for (int i = 0; i < kLanes; ++i) store(packed + (column + i) * kWidth + first, square[i]);
        }
        for (; column < columns; ++column)
            for (std::int64_t i = 0; i < kLanes; ++i)
                packed[column * kWidth + first + i] =
                    i < lanes ? factor * to_float(x[(first + i) * stride + column]) : 0.0f;
    }
}

template <class T>
class VectorProducts {
public:
    using Source = T;
    static constexpr std::int64_t kTiles = 8;   // of a part: a packed block of keys serves this many
    static constexpr std::int64_t kChunk = 96;  // keys: with D = 64, what a tile needs of them is 60 KiB
    static constexpr std::int64_t kSlice = kChunk;
    static constexpr int kDegree = 5;  // of the polynomial for weights

    VectorProducts(const AttentionInputs& in, Arena& arena)
        : in_(in),
          channels_(in.head_dim + in.num_cyclic),
          keys_(arena.array<float>(kChunk * channels_)),
          values_(arena.array<float>(kChunk * in.head_dim)),
          scores_(arena.array<float>(kChunk * kWidth)) {}

    static constexpr bool streams() { return false; }
    static constexpr std::int64_t block() { return kChunk; }

    [[nodiscard]] std::int64_t query_floats() const { return channels_ * kWidth; }   // of a packed tile
    [[nodiscard]] std::int64_t sum_floats() const { return in_.head_dim * kWidth; }  // of a tile's sums
    [[nodiscard]] float factor() const { return 1.0f; }  // from scores to logits in units of log 2: queries carry it

    // A tile's queries and their cyclic channels, transposed; no query where there are fewer than kWidth.
    void pack_queries(std::int64_t row, std::int64_t rows, std::int64_t head, float* packed) const {
        const T* x = static_cast<const T*>(in_.q.data) + row * in_.q.row_stride + head * in_.q.head_stride;
        pack_lanes(x, in_.q.row_stride, rows, in_.head_dim, in_.scale * kLog2E, packed);
        if (in_.num_cyclic == 0) return;
        pack_lanes(in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic, in_.heads * in_.num_cyclic, rows,
                   in_.num_cyclic, kLog2E, packed + in_.head_dim * kWidth);
    }

    // One head of a block; returns 1.
    std::int64_t pack_keys(std::int64_t row, std::int64_t rows, std::int64_t head) {
        const T* k = static_cast<const T*>(in_.k.data) + row * in_.k.row_stride + head * in_.k.head_stride;
        const T* v = static_cast<const T*>(in_.v.data) + row * in_.v.row_stride + head * in_.v.head_stride;
        for (std::int64_t r = 0; r < rows; ++r) {
            copy_lanes(k + r * in_.k.row_stride, in_.head_dim, keys_ + r * channels_);
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c)
                keys_[r * channels_ + in_.head_dim + c] = in_.k_cyclic[(row + r) * in_.num_cyclic + c];
            copy_lanes(v + r * in_.v.row_stride, in_.head_dim, values_ + r * in_.head_dim);
        }
        return 1;
    }

    void use_head(std::int64_t) const {}

    // Scores of keys [begin, end) of the block, [keys, kWidth].
    void multiply_keys(const float* queries, std::int64_t begin, std::int64_t end) const {
        multiply_tile<By::kRow, false>(end - begin, keys_ + begin * channels_, channels_, queries, channels_,
                                       scores_ + begin * kWidth);
    }
    [[nodiscard]] float* scores(std::int64_t key) const { return scores_ + key * kWidth; }

    // Weights take the place of the scores; those of two neighbouring keys come together. Returns their sum as stored.
    Floats store_weights(std::int64_t key, int v, Floats weight, Floats next) const {
        store(scores_ + (key + 1) * kWidth + v * kLanes, next);
        return store_weight(key, v, weight) + next;
    }
    Floats store_weight(std::int64_t key, int v, Floats weight) const {
        store(scores_ + key * kWidth + v * kLanes, weight);
        return weight;
    }

    // sums [head_dim, kWidth] += values · weights of keys [begin, end)
    void multiply_values(std::int64_t begin, std::int64_t end, float* sums) const {
        multiply_tile<By::kColumn, true>(in_.head_dim, values_ + begin * in_.head_dim, in_.head_dim,
                                         scores_ + begin * kWidth, end - begin, sums);
    }

    void continue_values() {}
    void finish_values() {}

    static void begin_thread() {}
    static void end_thread() {}

private:
    const AttentionInputs& in_;
    std::int64_t channels_;
    float* keys_;    // [kChunk, channels]
    float* values_;  // [kChunk, head_dim]
    float* scores_;  // [kChunk, kWidth]
};

}  // namespace
}  // namespace alure
