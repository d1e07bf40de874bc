// Backward attention of a part of one sequence's queries: blocks of keys in order, all heads, tile by tile, weights
// computed again from the log-sum-exp. The gradients of the keys are sums over parts, each added in its turn.
#pragma once

#include "attention_mask.h"
#include "bias_gradients.h"
#include "tile_bias.h"

namespace alure {
namespace {

template <class Products>
class Backward {
public:
    using Source = typename Products::Source;
    static constexpr std::int64_t kTiles = Products::kTiles, kBlock = Products::kBlock, kQueries = kTiles * kWidth;

    Backward(const AttentionInputs& in, const BiasTables* tables, void* scratch)
        : in_(in),
          arena_(scratch),
          products_(in, arena_),
          bias_(in, tables, kTiles, kBlock, arena_),
          bias_gradients_(in, bias_, kTiles, kBlock, arena_),
          d_key_cyclic_(arena_.array<float>(kBlock * in.num_cyclic)),
          tiles_(arena_.array<float>(kTiles * in.heads * tile_floats())) {}

    [[nodiscard]] std::size_t scratch_bytes() const { return arena_.used(); }

    void run(const BackwardArguments& g, const Part& part, const Turn& turn, double* d_time, double* d_position) {
        const Sequence sequence(in_, part.sequence);
        q_row_ = sequence.q_row + part.begin;
        rows_ = part.end - part.begin;
        bias_.start_part(sequence, part);
        bias_gradients_.start_part();
        for (std::int64_t head = 0; head < in_.heads; ++head)
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) pack(g, tile, head);
        const std::int64_t position = part.begin + sequence.shift, order = part.begin / kQueries;
        first_ = part.begin == 0;
        last_ = part.end == sequence.num_queries;
        for (std::int64_t block = 0; block < sequence.num_keys; block += kBlock) {
            const std::int64_t end = smaller(block + kBlock, sequence.num_keys);
            const bool sees =
                rows_ > 0 && sequence.mask.sight(position, position + rows_ - 1, block, end) != Sight::kHidden;
            if (sees) bias_.start_block(block, end);
            __builtin_memset(d_key_cyclic_, 0, (end - block) * in_.num_cyclic * sizeof(float));
            for (std::int64_t head = 0; head < in_.key_heads; ++head) {
                products_.start_keys(end - block);
                if (sees) add_keys(sequence.k_row + block, end - block, head, d_time, d_position);
                const std::int64_t place = block / kBlock * in_.key_heads + head;
                if (turn.counters) turn.wait(turn.counters, place, order);
                if (sees || first_ || last_) write_keys(g, sequence.k_row + block, end - block, head);
                if (turn.counters) turn.pass(turn.counters, place, order);
            }
        }
        for (std::int64_t head = 0; head < in_.heads; ++head)
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) write_queries(g, tile, head);
    }

private:
    // One tile of queries of one head.
    struct Tile {
        float* packed;
        float* d_queries;   // [channels, kWidth] sums so far
        float* references;  // [kWidth] log-sum-exp in units of log 2
        float* deltas;      // [kWidth]
    };

    [[nodiscard]] std::int64_t tile_floats() const {
        return round_up(products_.query_floats() + (products_.channels() + 2) * kWidth, 16);
    }
    [[nodiscard]] Tile tile_of(std::int64_t tile, std::int64_t head) const {
        float* packed = tiles_ + (head * kTiles + tile) * tile_floats();
        float* d_queries = packed + products_.query_floats();
        float* references = d_queries + products_.channels() * kWidth;
        return {packed, d_queries, references, references + kWidth};
    }
    [[nodiscard]] std::int64_t tile_rows(std::int64_t tile) const {
        return smaller<std::int64_t>(kWidth, rows_ - tile * kWidth);
    }

    void pack(const BackwardArguments& g, std::int64_t tile, std::int64_t head) {
        const Tile t = tile_of(tile, head);
        const std::int64_t row = q_row_ + tile * kWidth, rows = tile_rows(tile);
        products_.pack_queries(g.grad_out, row, rows, head, t.packed);
        fill(t.d_queries, {0, products_.channels() * kWidth}, Floats{});
        fill(t.references, {0, kWidth}, splat(kInfinity));  // no query: weights of 0
        fill(t.deltas, {0, kWidth}, Floats{});
        for (std::int64_t i = 0; i < rows; ++i) {
            const float lse = g.lse[head * in_.total_q + row + i];
            t.references[i] = lse == -kInfinity ? 0.0f : lse * kLog2E;  // sees nothing: weights of 0, not NaN
            t.deltas[i] = dot(row_of(g.out, row + i, head), row_of(g.grad_out, row + i, head)) -
                          g.grad_lse[head * in_.total_q + row + i];
        }
    }

    static const Source* row_of(const Rows& x, std::int64_t row, std::int64_t head) {
        return static_cast<const Source*>(x.data) + row * x.row_stride + head * x.head_stride;
    }
    [[nodiscard]] float dot(const Source* a, const Source* b) const {
        Floats sums{};
        std::int64_t d = 0;
        for (; d + kLanes <= in_.head_dim; d += kLanes) sums += load(a + d) * load(b + d);
        float sum = sum_of_lanes(sums);
        for (; d < in_.head_dim; ++d) sum += to_float(a[d]) * to_float(b[d]);
        return sum;
    }

    // Takes the keys of one head, rows [row, row + rows), into the sums of their queries, and sums their own gradients.
    void add_keys(std::int64_t row, std::int64_t rows, std::int64_t key_head, double* d_time, double* d_position) {
        products_.pack_keys(row, rows, key_head);
        const std::int64_t heads_a_key = in_.heads / in_.key_heads;
        for (std::int64_t head = key_head * heads_a_key; head < (key_head + 1) * heads_a_key; ++head) {
            bias_.start_head(head);
            bias_gradients_.start_head(d_time + head * (in_.time.num_thresholds + 1),
                                       d_position + head * (in_.position.num_thresholds + 1));
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) add_tile(tile, head, rows);
            products_.finish_head(tile_of(0, head).packed, tile_floats(), (rows_ + kWidth - 1) / kWidth);
            bias_gradients_.finish_head();
        }
    }

    void add_tile(std::int64_t tile, std::int64_t head, std::int64_t num_keys) {
        const Tile t = tile_of(tile, head);
        const Range strips = bias_.seen_strips(tile, {0, bias_.num_strips()});
        const std::int64_t begin = strips.begin * kStrip, end = smaller(strips.end * kStrip, num_keys);
        products_.start_tile(tile, t.packed);
        if (strips.empty()) return products_.add_tile(0, 0, t.d_queries);
        constexpr std::int64_t kSlice = Products::kSlice;
        const auto multiply = [&](std::int64_t slice) {
            if (slice < end) products_.multiply(larger(slice, begin), smaller(slice + kSlice, end));
        };
        std::int64_t slice = begin / kSlice * kSlice;
        multiply(slice);
        for (; slice < end; slice += kSlice) {
            multiply(slice + kSlice);  // products go ahead, while the weights are computed
            for (std::int64_t key = larger(slice, begin); key < smaller(slice + kSlice, end); key += kStrip)
                weigh_strip(t, tile, key, smaller(key + kStrip, end));
        }
        products_.add_tile(begin, end, t.d_queries);
    }

    void weigh_strip(const Tile& t, std::int64_t tile, std::int64_t begin, std::int64_t end) {
        const Sight sight = bias_.sight(tile, begin / kStrip);
        if (sight == Sight::kHidden) return products_.clear(begin, end);
        if (sight == Sight::kMasked) {
            weigh(
                t, begin, end, Floats{}, [&](std::int64_t key, int v) { return bias_.masked(tile, key, v); },
                [&](std::int64_t key, int v, Floats x) { bias_gradients_.add_masked(tile, key, v, x); });
            return;
        }
        const Strip strip = bias_.strip(tile, begin / kStrip);
        with_look_up(strip.tile.look_up, in_.position.table != nullptr, [&]<LookUp kLookUp, bool kPosition>() {
            Floats sum{};
            const float base = kLookUp == LookUp::kOne ? bias_.of_bucket(strip.tile.bucket) : 0.0f;
            const WholeBias<kLookUp, kPosition> biases[2] = {
                bias_.template whole<kLookUp, kPosition>(tile, begin / kStrip, 0, strip.least(0)),
                bias_.template whole<kLookUp, kPosition>(tile, begin / kStrip, 1, strip.least(1))};
            weigh(
                t, begin, end, splat(base),
                [&](std::int64_t key, int v) ALURE_INLINE { return biases[v].of(key - begin); },
                [&](std::int64_t key, int v, Floats x) ALURE_INLINE {
                    if constexpr (kLookUp == LookUp::kOne) sum += x;
                    bias_gradients_.template add_whole<kLookUp, kPosition>(strip, tile, key, v, x);
                });
            if constexpr (kLookUp == LookUp::kOne) bias_gradients_.add_strip(strip.tile.bucket, sum);
            if constexpr (kLookUp == LookUp::kRows) bias_gradients_.finish_rows(strip, tile, begin / kStrip);
        });
    }

    // Weights of keys [begin, end), and the gradients of their logits, of which `add` gets each.
    template <class Bias, class Add>
    void weigh(const Tile& t, std::int64_t begin, std::int64_t end, Floats base, Bias bias, Add add) {
        const float factor = products_.factor();
        Floats bases[2], deltas[2];
        for (int v = 0; v < 2; ++v) {
            bases[v] = base - load(t.references + v * kLanes);
            deltas[v] = load(t.deltas + v * kLanes);
        }
        for (std::int64_t key = begin; key < end; key += 2) {
            Floats weights[2][2], d_logits[2][2];
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k)
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    if (key + k == end) {
                        weights[k][v] = d_logits[k][v] = Floats{};
                        continue;
                    }
                    const Floats score = load(products_.scores(key + k) + v * kLanes);
                    const Floats weight = exp2_or_zero<Products::kDegree>(score * factor + bases[v] + bias(key + k, v));
                    weights[k][v] = weight;
                    d_logits[k][v] = weight * (load(products_.d_weights(key + k) + v * kLanes) - deltas[v]);
                    add(key + k, v, d_logits[k][v]);
                }
            products_.put(key, weights, d_logits);
        }
    }

    void write_keys(const BackwardArguments& g, std::int64_t row, std::int64_t rows, std::int64_t head) const {
        for (std::int64_t j = 0; j < rows; ++j) {
            const std::int64_t offset = ((row + j) * in_.key_heads + head) * in_.head_dim;
            write_row(products_.d_key(j), in_.scale, g.dk_sums + offset, static_cast<Source*>(g.dk) + offset);
            write_row(products_.d_value(j), 1.0f, g.dv_sums + offset, static_cast<Source*>(g.dv) + offset);
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c)
                d_key_cyclic_[j * in_.num_cyclic + c] += products_.d_key_cyclic(j, c);
        }
        if (head + 1 < in_.key_heads) return;
        for (std::int64_t i = 0; i < rows * in_.num_cyclic; ++i)
            g.d_k_cyclic[row * in_.num_cyclic + i] += d_key_cyclic_[i];
    }

    // Adds what earlier parts have left, and leaves it to the next or, the last part, writes it.
    void write_row(const float* x, float factor, float* sums, Source* out) const {
        std::int64_t d = 0;
        const auto write = [&](auto value) {
            if (last_)
                store(out + d, value);
            else
                store(sums + d, value);
        };
        for (; d + kLanes <= in_.head_dim; d += kLanes)
            write(first_ ? factor * load(x + d) : factor * load(x + d) + load(sums + d));
        for (; d < in_.head_dim; ++d) write(first_ ? factor * x[d] : factor * x[d] + sums[d]);
    }

    void write_queries(const BackwardArguments& g, std::int64_t tile, std::int64_t head) const {
        const float* sums = tile_of(tile, head).d_queries;
        const std::int64_t rows = tile_rows(tile), row = q_row_ + tile * kWidth, stride = in_.heads * in_.head_dim;
        Source* dq = static_cast<Source*>(g.dq) + (row * in_.heads + head) * in_.head_dim;
        for (int v = 0; v < 2; ++v) {
            const std::int64_t first = v * kLanes, lanes = smaller<std::int64_t>(kLanes, rows - first);
            std::int64_t d = 0;
            for (; d + kLanes <= in_.head_dim; d += kLanes) {
                Floats square[kLanes];
                for (int i = 0; i < kLanes; ++i) square[i] = in_.scale * load(sums + (d + i) * kWidth + first);
                transpose(square);
                for (std::int64_t i = 0; i < lanes; ++i) store(dq + (first + i) * stride + d, square[i]);
            }
            for (; d < in_.head_dim; ++d)
                for (std::int64_t i = 0; i < lanes; ++i)
                    store(dq + (first + i) * stride + d, in_.scale * sums[d * kWidth + first + i]);
        }
        for (std::int64_t i = 0; i < rows; ++i)
            for (std::int64_t c = 0; c < in_.num_cyclic; ++c)
                g.d_q_cyclic[((row + i) * in_.heads + head) * in_.num_cyclic + c] =
                    products_.d_query_cyclic(sums, i, c);
    }

    const AttentionInputs& in_;
    Arena arena_;
    Products products_;
    TileBias bias_;
    BiasGradients bias_gradients_;
    float* d_key_cyclic_;                // [kBlock, num_cyclic] of all heads
    float* tiles_;                       // [heads, kTiles]
    std::int64_t q_row_ = 0, rows_ = 0;  // the part at hand
    bool first_ = false, last_ = false;  // of its sequence
};

template <class Products>
std::size_t backward_scratch_bytes(const AttentionInputs& in) {
    return Backward<Products>(in, nullptr, nullptr).scratch_bytes();
}

template <class Products>
void backward(const AttentionInputs& in, const BiasTables& tables, const BackwardArguments& arguments,
              const Part& part, const Turn& turn, double* d_time, double* d_position, void* scratch) {
    Backward<Products>(in, &tables, scratch).run(arguments, part, turn, d_time, d_position);
}

template <class Products>
constexpr BackwardKernel backward_kernel{
    Backward<Products>::kQueries, Backward<Products>::kBlock, backward_scratch_bytes<Products>,
    Products::begin_thread,       Products::end_thread,       backward<Products>};

}  // namespace
}  // namespace alure
