// Forward attention of a part of one sequence's queries: blocks of keys in order, all heads, tile by tile; where
// products can stream, the two vectors of a tile's queries one after the other.
//
// Logits are in units of log 2. A weight is 2^logit, as it is. Where a query's weights then add up to something far
// from 1, its tile is computed again: with a query's maximum so far subtracted, and what was summed before shrinking
// when that grows.
#pragma once

#include "tile_bias.h"

namespace alure {
namespace {

// The most that plain weights of a query may add up to, and the inverse of the least: what is left out below 2^-126 is
// nothing beside their sum, and sums of weight · value stay far from the largest float.
constexpr float kMostPlain = 0x1p48f;

// Of one tile of queries and one head.
struct TileState {
    float* queries;  // packed
    float* sums;     // Σ weight · value so far, [head_dim, kWidth]; nothing yet before the tile's first keys
    float* totals;   // Σ weight so far, [kWidth]
    float* maxima;   // [kWidth] subtracted from logits; zeros where weights are plain
};

// Where products.streams() is never true.
struct NoStreams {
    template <class... T>
    explicit NoStreams(T&&...) {}
    void add(const TileState&, std::int64_t, int, std::int64_t, bool) {}
    void finish() {}
};

template <class Products, class Streams = NoStreams>
class Forward {
public:
    using Source = typename Products::Source;
    static constexpr std::int64_t kTiles = Products::kTiles, kQueries = kTiles * kWidth;

    Forward(const AttentionInputs& in, const BiasTables* tables, void* scratch)
        : in_(in),
          arena_(scratch),
          products_(in, arena_),
          bias_(in, tables, kTiles, products_.block(), arena_),
          streams_(in, products_, bias_, arena_),
          progress_(arena_.array<Progress>(kTiles * in.heads)),
          states_(arena_.array<float>(kTiles * in.heads * state_floats())) {}

    [[nodiscard]] std::size_t scratch_bytes() const { return arena_.used(); }

    void run(const ForwardOutputs& outputs, const Part& part) {
        const Sequence sequence(in_, part.sequence);
        rows_ = part.end - part.begin;
        q_row_ = sequence.q_row + part.begin;
        position_ = part.begin + sequence.shift;
        bias_.start_part(sequence, part);
        start();
        add_keys(sequence);
        if (!finish_plain()) add_keys(sequence);
        for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile)
            for (std::int64_t head = 0; head < in_.heads; ++head) write(outputs, tile, head);
    }

private:
    // Of one tile of queries and one head: how its weights are computed, and whether it has any sums.
    enum class Way : std::uint8_t { kPlain, kScaled, kDone };
    struct Progress {
        Way way;
        bool has_sums;
    };

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

    void start() {
        for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile)
            for (std::int64_t head = 0; head < in_.heads; ++head) {
                const TileState s = state(tile, head);
                products_.pack_queries(q_row_ + tile * kWidth, tile_rows(tile), head, s.queries);
                fill(s.totals, {0, kWidth}, Floats{});
                fill(s.maxima, {0, kWidth}, Floats{});
                progress_[tile * in_.heads + head] = {Way::kPlain, false};
            }
    }

    // All blocks of keys that the part sees.
    void add_keys(const Sequence& sequence) {
        for (std::int64_t block = 0; block < sequence.num_keys; block += products_.block()) {
            const std::int64_t end = smaller(block + products_.block(), sequence.num_keys);
            if (sequence.mask.sight(position_, position_ + rows_ - 1, block, end) != Sight::kHidden)
                add_block(sequence, block, end);
        }
    }

    // Whether all tiles are done. The others start again, with maxima.
    bool finish_plain() {
        bool all = true;
        for (std::int64_t head = 0; head < in_.heads; ++head)
            for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) {
                const TileState s = state(tile, head);
                Floats strange{};
                for (int v = 0; v < 2; ++v) {
                    const Floats total = load(s.totals + v * kLanes);
                    const Ints fits = (total > 1.0f / kMostPlain) & (total < kMostPlain);
                    const auto rows = static_cast<std::int32_t>(tile_rows(tile) - v * kLanes);
                    strange += fits | (lane_numbers() >= rows) ? Floats{} : splat(1.0f);
                }
                Progress& progress = progress_[tile * in_.heads + head];
                if (largest_of_lanes(strange) == 0.0f) {
                    progress.way = Way::kDone;
                } else {
                    progress = {Way::kScaled, false};
                    fill(s.totals, {0, kWidth}, Floats{});
                    fill(s.maxima, {0, kWidth}, splat(-kInfinity));
                    all = false;
                }
            }
        return all;
    }

    void add_block(const Sequence& sequence, std::int64_t block, std::int64_t end) {
        bias_.start_block(block, end);
        const std::int64_t heads_a_key = in_.heads / in_.key_heads;
        for (std::int64_t first = 0, count = 0; first < in_.key_heads; first += count) {
            count = products_.pack_keys(sequence.k_row + block, end - block, first);
            for (std::int64_t i = 0; i < count; ++i) {
                products_.use_head(i);
                for (std::int64_t j = 0; j < heads_a_key; ++j) add_head((first + i) * heads_a_key + j);
            }
            streams_.finish();
        }
    }

    void add_head(std::int64_t head) {
        for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) {
            const Way way = progress_[tile * in_.heads + head].way;
            if (way == Way::kPlain && products_.streams())
                stream_tile(tile, head);
            else if (way != Way::kDone)
                add_tile(tile, head);
        }
        products_.finish_values();
    }

    // One head of a tile takes in the block's keys.
    void stream_tile(std::int64_t tile, std::int64_t head) {
        if (bias_.seen_strips(tile, {0, bias_.num_strips()}).empty()) return;
        bool& has_sums = progress_[tile * in_.heads + head].has_sums;
        for (int v = 0; v * kLanes < tile_rows(tile); ++v) streams_.add(state(tile, head), tile, v, head, has_sums);
        has_sums = true;
    }

    void add_tile(std::int64_t tile, std::int64_t head) {
        bias_.start_head(head);
        bool& has_sums = progress_[tile * in_.heads + head].has_sums;
        constexpr std::int64_t kChunkStrips = Products::kChunk / kStrip;
        for (std::int64_t first = 0; first < bias_.num_strips(); first += kChunkStrips) {
            const Range all{first, smaller(first + kChunkStrips, bias_.num_strips())};
            const Range strips = bias_.seen_strips(tile, all);
            if (strips.empty()) continue;
            if (!has_sums) fill(state(tile, head).sums, {0, products_.sum_floats()}, Floats{});
            has_sums = true;
            add_chunk(tile, head, strips);
        }
    }

    // Strips of one chunk of the block.
    void add_chunk(std::int64_t tile, std::int64_t head, Range strips) {
        const std::int64_t begin = strips.begin * kStrip, end = smaller(strips.end * kStrip, bias_.num_keys());
        const TileState s = state(tile, head);
        const auto end_of = [&](std::int64_t strip) { return smaller((strip + 1) * kStrip, end); };
        if (progress_[tile * in_.heads + head].way == Way::kPlain) {
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
            products_.finish_values();  // before these sums shrink
            products_.multiply_keys(s.queries, begin, end);
            write_logits(tile, begin, end);
            raise_maxima(s, begin, end);
            for (std::int64_t i = strips.begin; i < strips.end; ++i) weigh_logits(s, i * kStrip, end_of(i));
        }
        products_.multiply_values(begin, end, s.sums);
    }

    // Weights of a strip that is seen whole, from its scores.
    void weigh(const TileState& s, std::int64_t tile, std::int64_t strip, std::int64_t end) {
        const Strip& found = bias_.strip(tile, strip);
        with_look_up(found.tile.look_up, in_.position.table, [&]<LookUp kLookUp, bool kPosition>() {
            const float factor = products_.factor();
            const float base = kLookUp == LookUp::kOne ? bias_.of_bucket(found.tile.bucket) : 0.0f;
            const WholeBias<kLookUp, kPosition> biases[2] = {
                bias_.template whole<kLookUp, kPosition>(tile, strip, 0, found.least(0)),
                bias_.template whole<kLookUp, kPosition>(tile, strip, 1, found.least(1))};
            const std::int64_t begin = strip * kStrip;
            weigh_rows(s, begin, end, [&](std::int64_t key, int v) ALURE_INLINE {
                Floats bias = biases[v].of(key - begin);
                if constexpr (kLookUp == LookUp::kOne) bias += base;
                return exp2_clamped<Products::kDegree>(load(products_.scores(key) + v * kLanes) * factor + bias);
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
        if (!progress_[tile * in_.heads + head].has_sums) fill(s.sums, {0, products_.sum_floats()}, Floats{});
        const std::int64_t row = q_row_ + tile * kWidth;
        for (int v = 0; v < 2; ++v) {
            const std::int64_t first = v * kLanes, rows = smaller<std::int64_t>(kLanes, tile_rows(tile) - first);
            if (rows <= 0) return;
            const Floats total = load(s.totals + first), maximum = load(s.maxima + first);
            const Ints sees_nothing = (total == 0.0f) & ((maximum == 0.0f) | (maximum == -kInfinity));
            const Floats log_sum = maximum * 0.69314718f + log_lanes(total);
            const Floats lse = sees_nothing ? splat(-kInfinity) : log_sum;
            float* to = outputs.lse + head * in_.total_q + row + first;
            if (rows == kLanes)  // a copy of any size took 4 % of a forward
                store(to, lse);
            else
                for (std::int64_t i = 0; i < rows; ++i) to[i] = lse[i];
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
    Arena arena_;
    Products products_;
    TileBias bias_;
    Streams streams_;
    Progress* progress_;  // [kTiles, heads]
    float* states_;       // [kTiles, heads] tile states
    std::int64_t rows_ = 0, q_row_ = 0, position_ = 0;  // the part at hand
};

template <class Products, class Streams>
std::size_t forward_scratch_bytes(const AttentionInputs& in) {
    return Forward<Products, Streams>(in, nullptr, nullptr).scratch_bytes();
}

template <class Products, class Streams>
void forward(const AttentionInputs& in, const BiasTables& tables, const ForwardOutputs& outputs, const Part& part,
             void* scratch) {
    Forward<Products, Streams>(in, &tables, scratch).run(outputs, part);
}

template <class Products, class Streams = NoStreams>
constexpr ForwardKernel forward_kernel{Forward<Products>::kQueries, forward_scratch_bytes<Products, Streams>,
                                       Products::begin_thread, Products::end_thread, forward<Products, Streams>};

}  // namespace
}  // namespace alure
