// Forward attention in the tile registers of AMX, for plain weights and at most 64 channels: a stream is a vector of
// queries, half a tile, against the block's keys, slice by slice. While the weights of a slice are computed, the tiles
// multiply the keys of the next one and the values of the one before, a product after every two pairs of keys. Nothing
// stops between streams.
//
// Sums stay in registers from a stream's first slice to its last. Registers 0 to 3 hold sums of 16 channels each, 4 and
// 5 queries, 6 scores and then weights, 7 what is loaded: keys or values. A register is free again as soon as a product
// has begun, so one is enough.
#pragma once

#include "attention_forward.h"
#include "products_bfloat16.h"

namespace alure {
namespace {

class TileStreams {
public:
    TileStreams(const AttentionInputs& in, const PairProducts& products, TileBias& bias, Arena& arena)
        : has_position_(in.position.table != nullptr), products_(products), bias_(bias) {
        for (int i = 0; i < 2; ++i) {
            scores_[i] = arena.array<float>(PairProducts::kSlice * kLanes);
            weights_[i] = arena.array<std::int32_t>(PairProducts::kSlice / 2 * kLanes);
        }
    }

    // Vector `v` of a tile's queries takes in the block's keys, of which it sees some; its sums exist if `has_sums`.
    void add(const TileState& state, std::int64_t tile, int v, std::int64_t head, bool has_sums) {
        with_shape([&]<int kDepth, int kSums>() { add<kDepth, kSums>(state, tile, v, head, has_sums); });
    }

    // Stores all sums. Whoever uses the tile registers or packs other keys calls it before.
    void finish() {
        if (!held_) return;
        with_shape([&]<int kDepth, int kSums>() {
            step<kDepth, kSums>(*held_->stream, held_->strip, false);
            start_sums<kSums>();
            const Tiles<kDepth, kSums> tiles{nullptr, done_->values(), weights_[1 - turn_], scores_[1 - turn_]};
            tiles.template multiply_four<4>();
            store_sums<kSums>();
        });
        held_ = done_ = nullptr;
        sums_ = nullptr;
    }

private:
    static constexpr std::int64_t kSlice = PairProducts::kSlice, kStripScores = kStrip * kLanes;

    // A vector of a tile's queries and one head.
    struct Stream {
        Stream() = default;
        Stream(const PairProducts& products, const TileState& state, std::int64_t tile, std::int64_t head, int v,
               bool has_sums)
            : keys(products.keys(0)),
              values(products.values(0)),
              depth(products.depth()),
              value_channels(products.value_channels()),
              queries(state.queries + v * kLanes),
              sums(state.sums + v * kLanes),
              totals(state.totals + v * kLanes),
              tile(tile),
              head(head),
              v(v),
              has_sums(has_sums) {}

        const Bfloat16 *keys, *values;  // of the block
        std::int64_t depth, value_channels;
        const float* queries;
        float *sums, *totals;
        std::int64_t tile, head;
        int v;
        bool has_sums;
    };
    struct Slice {
        const Stream* stream;
        std::int64_t strip;  // its first
        bool is_first;       // of the stream

        [[nodiscard]] const Bfloat16* keys() const { return stream->keys + strip * kStrip * stream->depth; }
        [[nodiscard]] const Bfloat16* values() const {
            return stream->values + strip * kStrip * stream->value_channels;
        }
    };

    // Calls work<tiles of 32 channels of a key, tiles of 16 channels of a value>().
    template <class Work>
    void with_shape(Work work) const {
        if (products_.depth() == 32)
            work.template operator()<1, 2>();
        else if (products_.value_channels() == 32)
            work.template operator()<2, 2>();
        else
            work.template operator()<2, 4>();
    }

    template <int kDepth, int kSums>
    void add(const TileState& state, std::int64_t tile, int v, std::int64_t head, bool has_sums) {
        next_stream_ = (next_stream_ + 1) % 3;  // the slices held and done may be of two others
        Stream& stream = streams_[next_stream_];
        stream = {products_, state, tile, head, v, has_sums};
        bool is_first = true;
        for (std::int64_t strip = 0; strip < bias_.num_strips(); strip += 2) {
            if (sight(tile, strip) == Sight::kHidden && sight(tile, strip + 1) == Sight::kHidden) continue;
            step<kDepth, kSums>(stream, strip, is_first);
            is_first = false;
        }
    }

    [[nodiscard]] Sight sight(std::int64_t tile, std::int64_t strip) const {
        return strip < bias_.num_strips() ? bias_.sight(tile, strip) : Sight::kHidden;
    }

    // Weights of the slice held, beside the scores of the next one and the values of the slice before.
    template <int kDepth, int kSums>
    void step(const Stream& stream, std::int64_t strip, bool is_first) {
        Slice& next = slices_[next_slice_];  // a copy would wait for it to be written, 12 % of a forward
        next_slice_ = (next_slice_ + 1) % 3;
        next.stream = &stream;
        next.strip = strip;
        next.is_first = is_first;
        if (is_first) load_queries<kDepth>(stream);
        const Slice& before = done_ ? *done_ : held_ ? *held_ : next;
        const Tiles<kDepth, kSums> tiles{next.keys(), before.values(), weights_[1 - turn_], scores_[1 - turn_]};
        if (held_) {
            start_sums<kSums>();
            weigh<0>(tiles);
            weigh<1>(tiles);
            done_ = held_;
        } else {
            tiles.template multiply_four<0>();
            tiles.template multiply_four<4>();  // stores the last scores; what it sums is nobody's
        }
        turn_ = 1 - turn_;
        held_ = &next;
        bias_.start_head(stream.head);
    }

    // The products beside a slice's weights, in eight parts.
    template <int kDepth, int kSums>
    struct Tiles {
        const Bfloat16 *keys, *values;
        const std::int32_t* weights;
        float* scores;

        template <int kPart>
        [[gnu::always_inline]] void multiply() const {
            if constexpr (kPart == 0) clear_tile<6>();
            if constexpr (kPart == 2) {
                store_tile<6>(scores, 64);
                clear_tile<6>();
            }
            if constexpr (kPart < 4 && kPart % 2 < kDepth) {
                load_tile<7>(keys + kPart / 2 * kStrip * kDepth * 32 + kPart % 2 * 32, kDepth * 64);
                multiply_tiles<6, 7, 4 + kPart % 2>();
            }
            if constexpr (kPart == 4) {
                store_tile<6>(scores + kStripScores, 64);
                load_tile<6>(weights, 64);
            }
            if constexpr (kPart >= 4 && kPart - 4 < kSums) {
                load_tile<7>(values + (kPart - 4) * 16 * kSlice, 64);
                multiply_tiles<kPart - 4, 7, 6>();
            }
        }
        template <int kFirst>
        [[gnu::always_inline]] void multiply_four() const {
            multiply<kFirst>();
            multiply<kFirst + 1>();
            multiply<kFirst + 2>();
            multiply<kFirst + 3>();
        }
    };

    template <int kDepth>
    static void load_queries(const Stream& stream) {
        load_tile<4>(stream.queries, kWidth * 4);
        if constexpr (kDepth == 2) load_tile<5>(stream.queries + 16 * kWidth, kWidth * 4);
    }

    // Where the slice whose values come next is its stream's first, its sums take the place of the stream's before.
    template <int kSums>
    void start_sums() {
        if (!done_ || !done_->is_first) return;
        if (sums_) store_sums<kSums>();
        sums_ = done_->stream->sums;
        for_tiles<kSums>([&]<int kTile>() {
            if (done_->stream->has_sums)
                load_tile<kTile>(sums_ + kTile * 16 * kWidth, kWidth * 4);
            else
                clear_tile<kTile>();
        });
    }
    template <int kSums>
    void store_sums() {
        for_tiles<kSums>([&]<int kTile>() { store_tile<kTile>(sums_ + kTile * 16 * kWidth, kWidth * 4); });
    }
    template <int kCount, class Work>
    static void for_tiles(Work work) {
        work.template operator()<0>();
        work.template operator()<1>();
        if constexpr (kCount == 4) {
            work.template operator()<2>();
            work.template operator()<3>();
        }
    }

    // Weights of one of the two strips of the slice held.
    template <int kHalf, int kDepth, int kSums>
    void weigh(const Tiles<kDepth, kSums>& tiles) {
        const std::int64_t strip = held_->strip + kHalf;
        const Stream& stream = *held_->stream;
        const Sight sight = this->sight(stream.tile, strip);
        if (sight == Sight::kWhole) {
            const Look look = bias_.strip(stream.tile, strip).vectors[stream.v];
            return with_look_up(look.look_up, has_position_, [&]<LookUp kLookUp, bool kPosition>() {
                weigh_whole<kLookUp, kPosition, kHalf>(tiles, strip, look);
            });
        }
        tiles.template multiply_four<4 * kHalf>();
        std::int32_t* weights = weights_[turn_] + kHalf * kStripScores / 2;
        if (sight == Sight::kHidden)
            fill(reinterpret_cast<float*>(weights), {0, kStripScores / 2}, Floats{});
        else
            weigh_masked(scores_[turn_] + kHalf * kStripScores, strip, weights);
    }

    template <LookUp kLookUp, bool kPosition, int kHalf, int kDepth, int kSums>
    void weigh_whole(const Tiles<kDepth, kSums>& all, std::int64_t strip, Look look) const {
        const Tiles<kDepth, kSums> tiles = all;
        const Stream& stream = *held_->stream;
        float* const totals = stream.totals;
        const auto bias = bias_.template whole<kLookUp, kPosition>(stream.tile, strip, stream.v, look.bucket);
        const Floats base = splat(kLookUp == LookUp::kOne ? bias_.of_bucket(look.bucket) : 0.0f);
        const Floats factor = splat(products_.factor());
        const float* scores = scores_[turn_] + kHalf * kStripScores;
        std::int32_t* weights = weights_[turn_] + kHalf * kStripScores / 2;
        const auto logit = [&](int i) ALURE_INLINE {
            Floats add = base;
            if constexpr (kLookUp != LookUp::kOne || kPosition) {
                add = bias.of(i);
                if constexpr (kLookUp == LookUp::kOne) add += base;
            }
            return load(scores + i * kLanes) * factor + add;
        };
        Floats sums[2] = {load(totals), Floats{}};
        const auto pairs = [&]<int kPart>() ALURE_INLINE {
            tiles.template multiply<4 * kHalf + kPart>();
#pragma GCC unroll 2
            for (int pair = 2 * kPart; pair < 2 * kPart + 2; ++pair)
                sums[pair % 2] =
                    put(weights + pair * kLanes, logit(2 * pair), logit(2 * pair + 1), sums[pair % 2]);
        };
        pairs.template operator()<0>();
        pairs.template operator()<1>();
        pairs.template operator()<2>();
        pairs.template operator()<3>();
        const std::int64_t rest = bias_.num_keys() - strip * kStrip;
        store(totals, rest < kStrip ? cut(weights, rest, load(totals)) : sums[0] + sums[1]);
    }

    void weigh_masked(const float* scores, std::int64_t strip, std::int32_t* weights) const {
        const float factor = products_.factor();
        const std::int64_t key = strip * kStrip, rest = bias_.num_keys() - key;
        const Stream& stream = *held_->stream;
        Floats total = load(stream.totals);
        const auto logit = [&](std::int64_t i) ALURE_INLINE {
            return i < rest ? load(scores + i * kLanes) * factor + bias_.masked(stream.tile, key + i, stream.v)
                            : splat(-kInfinity);
        };
        for (std::int64_t i = 0; i < kStrip; i += 2)
            total = put(weights + i / 2 * kLanes, logit(i), logit(i + 1), total);
        store(stream.totals, total);
    }

    // Keeps the weights of the strip's first `keys` keys alone. Returns `total` and their sum.
    static Floats cut(std::int32_t* weights, std::int64_t keys, Floats total) {
        for (std::int64_t i = 0; i < kStrip / 2; ++i) {
            Ints pairs = load_ints(weights + i * kLanes);
            if (2 * i + 1 == keys) pairs &= 0xffff;
            if (2 * i >= keys) pairs = Ints{};
            store_pairs(reinterpret_cast<Bfloat16*>(weights + i * kLanes), pairs);
            total = add_pairs(total, pairs);
        }
        return total;
    }

    // Stores the weights of two keys, 2 to their logits, rounded to the nearest. Returns `total` and their sum as
    // stored: so a query that sees one key gets its value, to the bit.
    [[gnu::always_inline]] static Floats put(std::int32_t* weights, Floats logit, Floats next, Floats total) {
#if defined(__AVX512BF16__)
        // half a unit of the last place kept of 1 <= y < 2 is added to the polynomial: what is cut off was rounded
        const auto weight = [](Floats x) ALURE_INLINE {
            const Floats r = _mm512_reduce_ps(x, 9);  // x − floor(x)
            const Floats y = (splat(7.7067069e-2f) * r + 2.2764496e-1f) * r + 6.9511680e-1f;
            return reinterpret_cast<__m512i>(_mm512_scalef_ps(y * r + (1.0f + 0x1p-8f), x));
        };
        const __m512i upper_halves = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
        const auto pairs = reinterpret_cast<Ints>(
            _mm512_mask_shuffle_epi8(weight(next), 0x3333333333333333, weight(logit), upper_halves));
#else
        const auto weight = [](Floats x) {
            return plus(reinterpret_cast<Ints>(exp2_or_zero<3>(x)), splat(std::int32_t{0x8000}));
        };
        const Ints pairs = join_upper_halves(weight(logit), weight(next));
#endif
        store_pairs(reinterpret_cast<Bfloat16*>(weights), pairs);
        return add_pairs(total, pairs);
    }

    [[gnu::always_inline]] static Floats add_pairs(Floats total, Ints pairs) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(total, (__m512bh)pairs, (__m512bh)splat(std::int32_t{0x3f803f80}));  // ones
#else
        return total + reinterpret_cast<Floats>(pairs << 16) +
               reinterpret_cast<Floats>(pairs & std::int32_t(0xffff0000));
#endif
    }

    const bool has_position_;
    const PairProducts& products_;
    TileBias& bias_;
    Stream streams_[3];
    int next_stream_ = 0;
    Slice slices_[3];
    int next_slice_ = 0;
    const Slice *held_ = nullptr, *done_ = nullptr;  // whose weights come next, and whose values; none yet
    float* sums_ = nullptr;                          // where those in the registers belong
    int turn_ = 0;                                   // which scores are of the slice held
    float* scores_[2];                               // [kSlice keys, kLanes queries]
    std::int32_t* weights_[2];                       // [pairs of keys, kLanes queries, 2]
};

}  // namespace
}  // namespace alure
