// Forward attention of a part of one sequence's queries: blocks of keys in order, all heads, tile by tile.
//
// Logits are in units of log 2. Where a bound on them says that no weight over- or underflows, a weight is 2^logit, as
// it is; elsewhere a query's maximum so far is subtracted, and what was summed before shrinks when it grows.
#pragma once

#include "tile_bias.h"

namespace alure {
namespace {

constexpr float kSafe = 40.0f;  // |logit|: sums of weights and of weight · value stay far from the ends of float

// Of one tile of queries and one head.
struct TileState {
    float* queries;  // packed
    float* sums;     // Σ weight · value so far, [head_dim, kWidth]
    float* totals;   // Σ weight so far, [kWidth]
    float* maxima;   // [kWidth]; zeros where the logits are safe
};

template <class Products>
class Forward {
public:
    using Source = typename Products::Source;
    static constexpr std::int64_t kTiles = Products::kTiles, kBlock = Products::kBlock, kQueries = kTiles * kWidth;

    Forward(const AttentionInputs& in, const BiasTables* tables, void* scratch)
        : in_(in),
          tables_(tables),
          arena_(scratch),
          products_(in, arena_),
          bias_(in, tables, kTiles, kBlock, arena_),
          safe_(arena_.array<bool>(kTiles * in.heads)),
          key_norms_(arena_.array<float>(in.key_heads)),
          states_(arena_.array<float>(kTiles * in.heads * state_floats())) {}

    [[nodiscard]] std::size_t scratch_bytes() const { return arena_.used(); }

    void run(const ForwardOutputs& outputs, const Part& part) {
        const Sequence sequence(in_, part.sequence);
        begin_ = part.begin;
        rows_ = part.end - part.begin;
        q_row_ = sequence.q_row + part.begin;
        position_ = part.begin + sequence.shift;
        bias_.start_part(sequence, part);
        start(sequence);
        for (std::int64_t block = 0; block < sequence.num_keys; block += kBlock) {
            const std::int64_t end = smaller(block + kBlock, sequence.num_keys);
            if (sequence.mask.sight(position_, position_ + rows_ - 1, block, end) != Sight::kHidden)
                add_block(sequence, block, end);
        }
        for (std::int64_t head = 0; head < in_.heads; ++head)
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) write(outputs, tile, head);
    }

private:
    [[nodiscard]] std::int64_t state_floats() const {
        return round_up(products_.query_floats() + products_.sum_floats() + 2 * kWidth, 16);
    }
    [[nodiscard]] TileState state(std::int64_t tile, std::int64_t head) const {
        float* p = states_ + (tile * in_.heads + head) * state_floats();
        float* sums = p + products_.query_floats();
        return {p, sums, sums + products_.sum_floats(), sums + products_.sum_floats() + kWidth};
    }
    [[nodiscard]] std::int64_t tile_rows(std::int64_t tile) const {
        return smaller<std::int64_t>(kWidth, rows_ - tile * kWidth);
    }

    // Packs the queries, and bounds every tile's logits: |q·k| <= |q||k|.
    void start(const Sequence& sequence) {
        const float cyclic_norm = find_key_norms(sequence);
        for (std::int64_t head = 0; head < in_.heads; ++head)
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) {
                const TileState s = state(tile, head);
                const std::int64_t row = q_row_ + tile * kWidth, rows = tile_rows(tile);
                products_.pack_queries(row, rows, head, s.queries);
                fill(s.sums, {0, products_.sum_floats()}, Floats{});
                fill(s.totals, {0, kWidth}, Floats{});
                safe_[tile * in_.heads + head] = is_safe(sequence, row, rows, head, cyclic_norm);
                fill(s.maxima, {0, kWidth}, splat(safe_[tile * in_.heads + head] ? 0.0f : -kInfinity));
            }
    }

    // The largest norm of a key of each head, among the blocks that the part sees; returns that of the cyclic channels.
    float find_key_norms(const Sequence& sequence) {
        for (std::int64_t head = 0; head < in_.key_heads; ++head) key_norms_[head] = 0.0f;
        float cyclic = 0.0f;
        for (std::int64_t block = 0; block < sequence.num_keys; block += kBlock) {
            const std::int64_t end = smaller(block + kBlock, sequence.num_keys);
            if (sequence.mask.sight(position_, position_ + rows_ - 1, block, end) == Sight::kHidden) continue;
            for (std::int64_t key = block; key < end; key += kLanes) {  // all heads of a few rows: memory in order
                const std::int64_t row = sequence.k_row + key, rows = smaller<std::int64_t>(kLanes, end - key);
                const Source* keys = static_cast<const Source*>(in_.k.data) + row * in_.k.row_stride;
                for (std::int64_t head = 0; head < in_.key_heads; ++head)
                    key_norms_[head] =
                        larger(key_norms_[head],
                               largest_norm(keys + head * in_.k.head_stride, in_.k.row_stride, rows, in_.head_dim));
                cyclic = larger(cyclic, largest_norm(in_.k_cyclic + row * in_.num_cyclic, in_.num_cyclic, rows,
                                                     in_.num_cyclic));
            }
        }
        return cyclic;
    }

    [[nodiscard]] bool is_safe(const Sequence& sequence, std::int64_t row, std::int64_t rows, std::int64_t head,
                               float cyclic_norm) const {
        const Source* queries =
            static_cast<const Source*>(in_.q.data) + row * in_.q.row_stride + head * in_.q.head_stride;
        const float norm = largest_norm(queries, in_.q.row_stride, rows, in_.head_dim);
        const float cyclic = largest_norm(in_.q_cyclic + (row * in_.heads + head) * in_.num_cyclic,
                                          in_.heads * in_.num_cyclic, rows, in_.num_cyclic);
        const std::int64_t table = sequence.group * in_.heads + head;
        const float scale = (in_.scale < 0 ? -in_.scale : in_.scale) * kLog2E;
        const float bound = scale * norm * key_norms_[head / (in_.heads / in_.key_heads)] +
                            kLog2E * cyclic * cyclic_norm;
        return bound + tables_->largest[table] < kSafe && bound - tables_->smallest[table] < kSafe;
    }

    // Of rows [rows, size].
    template <class T>
    static float largest_norm(const T* x, std::int64_t stride, std::int64_t rows, std::int64_t size) {
        Floats largest{};
        for (std::int64_t row = 0; size > 0 && row < rows; row += kLanes) {
            Floats sums[kLanes] = {};
            for (std::int64_t i = 0; i < kLanes && row + i < rows; ++i) sums[i] = squares(x + (row + i) * stride, size);
            largest = larger_lanes(sums_of_rows(sums), largest);  // passes over a NaN
        }
        return __builtin_sqrtf(largest_of_lanes(largest));
    }

    static Floats squares(const float* x, std::int64_t size) {
        Floats sums{};
        std::int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) sums += load(x + i) * load(x + i);
        for (; i < size; ++i) sums[0] += x[i] * x[i];
        return sums;
    }
    static Floats squares(const Bfloat16* x, std::int64_t size) {
        Floats sums{};
        std::int64_t i = 0;
        for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
            const Ints pairs = load_pairs(x + i);
            const Floats even = reinterpret_cast<Floats>(pairs << 16);
            const Floats odd = reinterpret_cast<Floats>(pairs & std::int32_t(0xffff0000));
            sums += even * even + odd * odd;
        }
        if (i + kLanes <= size) {
            sums += load(x + i) * load(x + i);
            i += kLanes;
        }
        for (; i < size; ++i) sums[0] += to_float(x[i]) * to_float(x[i]);
        return sums;
    }

    void add_block(const Sequence& sequence, std::int64_t block, std::int64_t end) {
        bias_.start_block(block, end);
        const std::int64_t heads_a_key = in_.heads / in_.key_heads;
        for (std::int64_t head = 0; head < in_.heads; ++head) {
            if (head % heads_a_key == 0) products_.pack_keys(sequence.k_row + block, end - block, head / heads_a_key);
            bias_.start_head(head);
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) add_tile(tile, head);
            products_.finish_values();
        }
    }

    // One head of a tile takes in the block's keys.
    void add_tile(std::int64_t tile, std::int64_t head) {
        const Range strips = bias_.strips(tile);
        if (strips.empty()) return;
        const std::int64_t begin = strips.begin * kStrip, end = smaller(strips.end * kStrip, bias_.num_keys());
        const TileState s = state(tile, head);
        const auto end_of = [&](std::int64_t strip) { return smaller((strip + 1) * kStrip, end); };
        if (safe_[tile * in_.heads + head]) {
            constexpr std::int64_t kSliceStrips = Products::kSlice / kStrip;
            const auto slice_end = [&](std::int64_t strip) {
                return smaller((strip / kSliceStrips + 1) * Products::kSlice, end);
            };
            products_.multiply_keys(s.queries, begin, slice_end(strips.begin));
            for (std::int64_t i = strips.begin; i < strips.end; ++i) {
                if (i == strips.begin || i % kSliceStrips == 0) {  // products go ahead, while the weights are computed
                    const std::int64_t next = slice_end(i);
                    if (next < end) products_.multiply_keys(s.queries, next, slice_end(next / kStrip));
                    products_.continue_values();
                }
                if (bias_.sight(tile, i) == Sight::kWhole) {
                    weigh(s, tile, i, end_of(i));
                } else {
                    write_logits(tile, i * kStrip, end_of(i));
                    weigh_logits(s, i * kStrip, end_of(i));
                }
            }
        } else {
            products_.multiply_keys(s.queries, begin, end);
            write_logits(tile, begin, end);
            raise_maxima(s, begin, end);
            for (std::int64_t i = strips.begin; i < strips.end; ++i) weigh_logits(s, i * kStrip, end_of(i));
        }
        products_.multiply_values(begin, end, s.sums);
    }

    // Weights of a strip that is seen whole, from its scores.
    void weigh(const TileState& s, std::int64_t tile, std::int64_t strip, std::int64_t end) {
        const Strip found = bias_.strip(tile, strip);
        with_look_up(found.look_up, in_.position.table, [&]<LookUp kLookUp, bool kPosition>() {
            const float factor = products_.factor();
            const float base = kLookUp == LookUp::kOne ? bias_.of_bucket(found.bucket) : 0.0f;
            weigh_rows(s, strip * kStrip, end, [&](std::int64_t key, int v) ALURE_INLINE {
                Floats bias = bias_.template whole<kLookUp, kPosition>(tile, key, v);
                if constexpr (kLookUp == LookUp::kOne) bias += base;
                return exp2_lanes<Products::kDegree>(load(products_.scores(key) + v * kLanes) * factor + bias);
            });
        });
    }

    // Weights of a strip whose logits are in place of the scores.
    void weigh_logits(const TileState& s, std::int64_t begin, std::int64_t end) {
        Floats references[2];
        for (int v = 0; v < 2; ++v) {
            const Floats maximum = load(s.maxima + v * kLanes);
            references[v] = maximum == -kInfinity ? Floats{} : maximum;  // sees nothing yet: 2^(−inf − 0) = 0
        }
        weigh_rows(s, begin, end, [&](std::int64_t key, int v) ALURE_INLINE {
            return exp2_or_zero<Products::kDegree>(load(products_.scores(key) + v * kLanes) - references[v]);
        });
    }

    template <class Weight>
    void weigh_rows(const TileState& s, std::int64_t begin, std::int64_t end, Weight weight) {
        Floats totals[2] = {load(s.totals), load(s.totals + kLanes)};
        std::int64_t key = begin;
        for (; key + 2 <= end; key += 2)
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const Floats a = weight(key, v), b = weight(key + 1, v);
                totals[v] += products_.store_weights(key, v, a, b);
            }
        if (key < end)
            for (int v = 0; v < 2; ++v) totals[v] += products_.store_weight(key, v, weight(key, v));
        for (int v = 0; v < 2; ++v) store(s.totals + v * kLanes, totals[v]);
    }

    // Logits in place of the scores of keys [begin, end): biases added, −inf where hidden.
    void write_logits(std::int64_t tile, std::int64_t begin, std::int64_t end) {
        const float factor = products_.factor();
        for (std::int64_t key = begin; key < end; ++key)
            for (int v = 0; v < 2; ++v) {
                float* scores = products_.scores(key) + v * kLanes;
                store(scores, load(scores) * factor + bias_.masked(tile, key, v));
            }
    }

    void raise_maxima(const TileState& s, std::int64_t begin, std::int64_t end) {
        for (int v = 0; v < 2; ++v) {
            const Floats before = load(s.maxima + v * kLanes);
            Floats after = before;
            for (std::int64_t key = begin; key < end; ++key)
                after = larger_lanes(load(products_.scores(key) + v * kLanes), after);
            const Floats reference = after == -kInfinity ? Floats{} : after;
            const Floats shrink = exp2_or_zero<5>(before - reference);
            store(s.maxima + v * kLanes, after);
            store(s.totals + v * kLanes, load(s.totals + v * kLanes) * shrink);
            for (std::int64_t d = 0; d < products_.sum_floats(); d += kWidth)
                store(s.sums + d + v * kLanes, load(s.sums + d + v * kLanes) * shrink);
        }
    }

    void write(const ForwardOutputs& outputs, std::int64_t tile, std::int64_t head) const {
        const TileState s = state(tile, head);
        const std::int64_t row = q_row_ + tile * kWidth;
        for (int v = 0; v < 2; ++v) {
            const std::int64_t first = v * kLanes, rows = smaller<std::int64_t>(kLanes, tile_rows(tile) - first);
            if (rows <= 0) return;
            const Floats total = load(s.totals + first), maximum = load(s.maxima + first);
            const Ints sees_nothing = (total == 0.0f) & ((maximum == 0.0f) | (maximum == -kInfinity));
            const Floats lse = maximum * 0.69314718f + log_lanes(total);
            float lanes[kLanes];
            store(lanes, sees_nothing ? splat(-kInfinity) : lse);
            __builtin_memcpy(outputs.lse + head * in_.total_q + row + first, lanes, rows * sizeof(float));
            write_rows(s.sums + first, sees_nothing ? Floats{} : 1.0f / total, rows,
                       static_cast<Source*>(outputs.out) + ((row + first) * in_.heads + head) * in_.head_dim);
        }
    }

    // out [rows, head_dim] = factor · sums, transposed
    void write_rows(const float* sums, Floats factor, std::int64_t rows, Source* out) const {
        constexpr std::int64_t kFold = sizeof(float) / sizeof(Source), kStep = kLanes * kFold;
        const std::int64_t stride = in_.heads * in_.head_dim;
        std::int64_t d = 0;
        for (; d + kStep <= in_.head_dim; d += kStep) {
            Floats square[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                const float* sum = sums + (d + i * kFold) * kWidth;
                if constexpr (kFold == 1)
                    square[i] = factor * load(sum);
                else
                    square[i] = reinterpret_cast<Floats>(join_upper_halves(
                        round_to_bfloat16(factor * load(sum)), round_to_bfloat16(factor * load(sum + kWidth))));
            }
            transpose(square);
            for (std::int64_t i = 0; i < rows; ++i)
                if constexpr (kFold == 1)
                    store(out + i * stride + d, square[i]);
                else
                    store_pairs(out + i * stride + d, reinterpret_cast<Ints>(square[i]));
        }
        for (; d < in_.head_dim; ++d) {
            const Floats column = factor * load(sums + d * kWidth);
            for (std::int64_t i = 0; i < rows; ++i) store(out + i * stride + d, column[i]);
        }
    }

    const AttentionInputs& in_;
    const BiasTables* tables_;
    Arena arena_;
    Products products_;
    TileBias bias_;
    bool* safe_;                                                    // [kTiles, heads]
    float* key_norms_;                                              // [key_heads]
    float* states_;                                                 // [kTiles, heads] tile states
    std::int64_t begin_ = 0, rows_ = 0, q_row_ = 0, position_ = 0;  // the part at hand
};

template <class Products>
std::size_t forward_scratch_bytes(const AttentionInputs& in) {
    return Forward<Products>(in, nullptr, nullptr).scratch_bytes();
}

template <class Products>
void forward(const AttentionInputs& in, const BiasTables& tables, const ForwardOutputs& outputs, const Part& part,
             void* scratch) {
    Forward<Products>(in, &tables, scratch).run(outputs, part);
}

template <class Products>
constexpr ForwardKernel forward_kernel{Forward<Products>::kQueries, forward_scratch_bytes<Products>,
                                       Products::begin_thread, Products::end_thread, forward<Products>};

}  // namespace
}  // namespace alure
