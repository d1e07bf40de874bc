// The five products of attention's backward in float32 vectors. As in products_vector.h queries lie in the lanes, and
// bfloat16 becomes float32 while it is packed.
#pragma once

#include "products.h"
#include "products_vector.h"

namespace alure {
namespace {

template <class T>
class VectorGradients {
public:
    using Source = T;
    static constexpr std::int64_t kTiles = 8;
    static constexpr std::int64_t kBlock = 192;
    static constexpr std::int64_t kSlice = 48;
    static constexpr int kDegree = 5;  // of the polynomial for weights

    VectorGradients(const AttentionInputs& in, Arena& arena)
        : in_(in),
          channels_(in.head_dim + in.num_cyclic),
          key_stride_(round_up(channels_, kLanes)),
          value_stride_(round_up(in.head_dim, kLanes)),
          keys_(arena.array<float>(kBlock * channels_)),
          values_(arena.array<float>(kBlock * in.head_dim)),
          scores_(arena.array<float>(kBlock * kWidth)),
          d_weights_(arena.array<float>(kBlock * kWidth)),
          d_keys_(arena.array<float>(kBlock * key_stride_)),
          d_values_(arena.array<float>(kBlock * value_stride_)) {}

    // Of a packed tile: queries and gradients of the output, each transposed and in rows.
    [[nodiscard]] std::int64_t query_floats() const {
        return kWidth * (channels_ + in_.head_dim + key_stride_ + value_stride_);
    }
    [[nodiscard]] std::int64_t channels() const { return channels_; }  // of the gradients of queries and keys
    [[nodiscard]] float factor() const { return 1.0f; }  // from scores to logits in units of log 2: queries carry it

    // No query where there are fewer than kWidth.
    void pack_queries(const Rows& grad_out, std::int64_t row, std::int64_t rows, std::int64_t head,
                      float* packed) const {
        const T* q = static_cast<const T*>(in_.q.data) + row * in_.q.row_stride + head * in_.q.head_stride;
        const T* g = static_cast<const T*>(grad_out.data) + row * grad_out.row_stride + head * grad_out.head_stride;
        const float* cyclic = in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic;
        const std::int64_t cyclic_stride = in_.heads * in_.num_cyclic;
        const Packed to = packed_of(packed);
        pack_lanes(q, in_.q.row_stride, rows, in_.head_dim, in_.scale * kLog2E, to.queries);
        if (in_.num_cyclic)
            pack_lanes(cyclic, cyclic_stride, rows, in_.num_cyclic, kLog2E, to.queries + in_.head_dim * kWidth);
        pack_lanes(g, grad_out.row_stride, rows, in_.head_dim, 1.0f, to.grad_out);
        fill(to.query_rows, {0, kWidth * (key_stride_ + value_stride_)}, Floats{});
        for (std::int64_t i = 0; i < rows; ++i) {
            copy_lanes(q + i * in_.q.row_stride, in_.head_dim, to.query_rows + i * key_stride_);
            copy_lanes(cyclic + i * cyclic_stride, in_.num_cyclic, to.query_rows + i * key_stride_ + in_.head_dim);
            copy_lanes(g + i * grad_out.row_stride, in_.head_dim, to.grad_out_rows + i * value_stride_);
        }
    }

    // The sums of the gradients of `rows` keys begin at 0.
    void start_keys(std::int64_t rows) const {
        fill(d_keys_, {0, rows * key_stride_}, Floats{});
        fill(d_values_, {0, rows * value_stride_}, Floats{});
    }

    void pack_keys(std::int64_t row, std::int64_t rows, std::int64_t head) {
        const T* k = static_cast<const T*>(in_.k.data) + row * in_.k.row_stride + head * in_.k.head_stride;
        const T* v = static_cast<const T*>(in_.v.data) + row * in_.v.row_stride + head * in_.v.head_stride;
        for (std::int64_t r = 0; r < rows; ++r) {
            float* key = keys_ + r * channels_;
            copy_lanes(k + r * in_.k.row_stride, in_.head_dim, key);
            copy_lanes(in_.k_cyclic + (row + r) * in_.num_cyclic, in_.num_cyclic, key + in_.head_dim);
            copy_lanes(v + r * in_.v.row_stride, in_.head_dim, values_ + r * in_.head_dim);
        }
    }

    void start_tile(std::int64_t, float* packed) { packed_ = packed_of(packed); }

    // Scores and gradients of the weights of keys [begin, end) of the block, [keys, kWidth].
    void multiply(std::int64_t begin, std::int64_t end) const {
        multiply_tile<By::kRow, false>(end - begin, keys_ + begin * channels_, channels_, packed_.queries, channels_,
                                       scores_ + begin * kWidth);
        multiply_tile<By::kRow, false>(end - begin, values_ + begin * in_.head_dim, in_.head_dim, packed_.grad_out,
                                       in_.head_dim, d_weights_ + begin * kWidth);
    }
    [[nodiscard]] const float* scores(std::int64_t key) const { return scores_ + key * kWidth; }
    [[nodiscard]] const float* d_weights(std::int64_t key) const { return d_weights_ + key * kWidth; }

    // Weights and gradients of logits of two neighbouring keys, in place of scores and gradients of weights.
    void put(std::int64_t key, const Floats (&weights)[2][2], const Floats (&d_logits)[2][2]) const {
        for (int k = 0; k < 2; ++k)
            for (int v = 0; v < 2; ++v) {
                store(scores_ + (key + k) * kWidth + v * kLanes, weights[k][v]);
                store(d_weights_ + (key + k) * kWidth + v * kLanes, d_logits[k][v]);
            }
    }

    void clear(std::int64_t begin, std::int64_t end) const {
        fill(scores_, {begin * kWidth, end * kWidth}, Floats{});
        fill(d_weights_, {begin * kWidth, end * kWidth}, Floats{});
    }

    // Takes what was put for keys [begin, end) into the sums: d_queries [channels, kWidth], and those of the keys.
    void add_tile(std::int64_t begin, std::int64_t end, float* d_queries) const {
        const float *weights = scores_ + begin * kWidth, *d_logits = d_weights_ + begin * kWidth;
        multiply_tile<By::kColumn, true>(channels_, keys_ + begin * channels_, channels_, d_logits, end - begin,
                                         d_queries);
        add_product(end - begin, value_stride_, {weights, kWidth, 1}, packed_.grad_out_rows, value_stride_, kWidth,
                    d_values_ + begin * value_stride_, value_stride_);
        add_product(end - begin, key_stride_, {d_logits, kWidth, 1}, packed_.query_rows, key_stride_, kWidth,
                    d_keys_ + begin * key_stride_, key_stride_);
    }
    void finish_head(float*, std::int64_t, std::int64_t) const {}

    // Sums of the block's keys; those of the head's channels want the scale.
    [[nodiscard]] const float* d_key(std::int64_t key) const { return d_keys_ + key * key_stride_; }
    [[nodiscard]] const float* d_value(std::int64_t key) const { return d_values_ + key * value_stride_; }
    [[nodiscard]] float d_key_cyclic(std::int64_t key, std::int64_t c) const { return d_key(key)[in_.head_dim + c]; }
    [[nodiscard]] float d_query_cyclic(const float* d_queries, std::int64_t i, std::int64_t c) const {
        return d_queries[(in_.head_dim + c) * kWidth + i];
    }

    static void begin_thread() {}
    static void end_thread() {}

private:
    struct Packed {
        float *queries, *grad_out;  // [channels, kWidth]; queries times scale · log2 e
        float *query_rows, *grad_out_rows;
    };
    [[nodiscard]] Packed packed_of(float* packed) const {
        float* grad_out = packed + channels_ * kWidth;
        float* query_rows = grad_out + in_.head_dim * kWidth;
        return {packed, grad_out, query_rows, query_rows + key_stride_ * kWidth};
    }

    const AttentionInputs& in_;
    std::int64_t channels_, key_stride_, value_stride_;
    float *keys_, *values_;       // [kBlock, channels]
    float *scores_, *d_weights_;  // [kBlock, kWidth]
    float *d_keys_, *d_values_;   // [kBlock, stride]
    Packed packed_{};             // the tile at hand
};

}  // namespace
}  // namespace alure
