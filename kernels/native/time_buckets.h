// The time buckets of a part's queries against one block of keys: found once, looked up by every head.
//
// Times are sorted, so the corners of a rectangle of queries × keys bound its differences, and its buckets are an
// interval. Most rectangles lie in one bucket; the others keep an index a pair, counted from the least bucket of the
// vector of queries and the key.
#pragma once

#include "attention_kernels.h"
#include "scratch.h"
#include "simd.h"

namespace alure {
namespace {

constexpr int kWidth = 2 * kLanes;   // queries of a tile, in two vectors
constexpr std::int64_t kStrip = 16;  // keys of a rectangle

// How a strip of keys × a tile of queries finds its biases: one value, a permutation of 1, 2 or 4 vectors, a gather.
// With AVX2 four are still faster than the gather: 14 % of a forward of 64 events with 16 channels.
enum class LookUp : std::uint8_t { kOne, kPermute, kPermuteTwo, kPermuteFour, kGather };

struct Buckets {
    std::int32_t least, most;
};

struct Strip {
    LookUp look_up = LookUp::kOne;
    std::int32_t bucket = 0;  // with kOne
    std::int32_t widest = 0;  // the most that an index is
};

inline std::int64_t elapsed(std::int64_t query, std::int64_t key) {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(query) - static_cast<std::uint64_t>(key));
}

inline std::int32_t bucket_of(const BucketTable& table, std::int64_t difference) {
    std::int64_t begin = 0, end = table.num_thresholds;
    while (begin < end) {
        const std::int64_t middle = (begin + end) / 2;
        if (table.thresholds[middle] <= difference)
            begin = middle + 1;
        else
            end = middle;
    }
    return static_cast<std::int32_t>(begin);
}

class TimeBuckets {
public:
    // For at most `tiles` tiles of queries and `keys` keys a block.
    TimeBuckets(const AttentionInputs& in, const BiasTables* tables, std::int64_t tiles, std::int64_t keys,
                Arena& arena)
        : in_(in), tables_(tables), keys_(keys) {
        strips_ = arena.array<Strip>(tiles * ((keys + kStrip - 1) / kStrip));
        if (!in.time.table) return;
        query_times_ = arena.array<std::int32_t>(tiles * kWidth);
        key_times_ = arena.array<std::int32_t>(keys);
        first_ = arena.array<std::int32_t>(tiles * keys * 2);
        index_ = arena.array<std::uint16_t>(tiles * keys * kWidth);
    }

    void start_part(std::int64_t q_row, std::int64_t rows) {
        rows_ = rows;
        if (!in_.time.table) return;
        queries_ = in_.q_times + q_row;
        for (std::int64_t i = 0; i < round_up(rows, kWidth); ++i)
            query_times_[i] = static_cast<std::int32_t>(queries_[smaller(i, rows - 1)]);
    }

    void start_block(std::int64_t k_row, std::int64_t num_keys) {
        num_keys_ = num_keys;
        if (!in_.time.table) return;
        buckets_ = {static_cast<std::int32_t>(in_.time.num_thresholds), 0};
        times_ = in_.k_times + k_row;
        for (std::int64_t j = 0; j < num_keys; ++j) key_times_[j] = static_cast<std::int32_t>(times_[j]);
    }

    void find(std::int64_t tile) {
        const std::int64_t num_strips = (num_keys_ + kStrip - 1) / kStrip;
        Strip* strips = strips_ + tile * ((keys_ + kStrip - 1) / kStrip);
        for (std::int64_t s = 0; s < num_strips; ++s) strips[s] = {};
        if (!in_.time.table) return;
        const std::int64_t begin = tile * kWidth, last = smaller(begin + kWidth, rows_) - 1;
        const std::int64_t most = elapsed(queries_[last], times_[0]),
                           least = elapsed(queries_[begin], times_[num_keys_ - 1]);
        const std::int32_t high = bucket_of(in_.time, most), low = bucket_of(in_.time, least);
        buckets_ = {smaller(buckets_.least, low), larger(buckets_.most, high)};
        if (low == high)
            for (std::int64_t s = 0; s < num_strips; ++s) strips[s].bucket = low;
        else if (most < INT32_MAX && least > INT32_MIN)
            find_strips(tile, high, strips);
        else
            find_far_apart(tile, strips);
    }

    // Buckets of all pairs of the block and the tiles found.
    [[nodiscard]] Buckets buckets() const { return buckets_; }

    // Of vector `v` of a tile's queries and one key of a strip that is not kOne: buckets, counted from `first`.
    [[nodiscard]] std::int32_t first(std::int64_t tile, std::int64_t key, int v) const {
        return first_[(tile * keys_ + key) * 2 + v];
    }
    [[nodiscard]] const std::uint16_t* index(std::int64_t tile, std::int64_t key, int v) const {
        return index_ + (tile * keys_ + key) * kWidth + v * kLanes;
    }

    [[nodiscard]] const Strip* strips(std::int64_t tile) const {
        return strips_ + tile * ((keys_ + kStrip - 1) / kStrip);
    }

    // Biases of vector `v` of a tile's queries and one key, from one head's table.
    template <LookUp kLookUp>
    [[nodiscard]] Floats values(std::int64_t tile, std::int64_t key, int v, const float* table) const {
        const float* window = table + first(tile, key, v);
        const Ints index = load_indices(this->index(tile, key, v));
        if constexpr (kLookUp == LookUp::kPermute)
            return permute(load(window), index);
        else if constexpr (kLookUp == LookUp::kPermuteTwo)
            return permute_two(window, index);
        else if constexpr (kLookUp == LookUp::kPermuteFour)
            return index < 2 * kLanes ? permute_two(window, index & (2 * kLanes - 1))
                                      : permute_two(window + 2 * kLanes, index & (2 * kLanes - 1));
        else
            return gather(window, index);
    }

private:
    static Floats permute_two(const float* window, Ints index) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
        return _mm512_permutex2var_ps(load(window), reinterpret_cast<__m512i>(index), load(window + kLanes));
#else
        const Floats low = permute(load(window), index & (kLanes - 1));
        const Floats high = permute(load(window + kLanes), index & (kLanes - 1));
        return index < kLanes ? low : high;
#endif
    }

    // The first bucket at or below `bucket` that a difference falls into.
    [[nodiscard]] std::int32_t fall(std::int32_t bucket, std::int32_t difference) const {
        while (bucket > 0 && tables_->thresholds[bucket - 1] > difference) --bucket;
        return bucket;
    }

    // All differences fit int32, so those of times cut to int32 are right. Along the keys they only fall.
    void find_strips(std::int64_t tile, std::int32_t high, Strip* strips) {
        const std::int32_t* queries = query_times_ + tile * kWidth;
        std::int32_t low = high;
        for (std::int64_t begin = 0; begin < num_keys_; begin += kStrip) {
            const std::int64_t end = smaller(begin + kStrip, num_keys_);
            high = fall(high, minus(queries[kWidth - 1], key_times_[begin]));
            low = fall(low, minus(queries[0], key_times_[end - 1]));
            strips[begin / kStrip] = low == high ? Strip{LookUp::kOne, low} : find_rows(tile, begin, end, high);
        }
    }

    Strip find_rows(std::int64_t tile, std::int64_t begin, std::int64_t end, std::int32_t bucket) {
        const std::int32_t* queries = query_times_ + tile * kWidth;
        std::int32_t high[2] = {bucket, bucket}, low[2] = {bucket, bucket}, widest = 0;
        for (std::int64_t key = begin; key < end; ++key) {
            const std::int64_t row = tile * keys_ + key;
            for (int v = 0; v < 2; ++v) {
                const std::int32_t* lanes = queries + v * kLanes;
                high[v] = fall(high[v], minus(lanes[kLanes - 1], key_times_[key]));
                low[v] = fall(low[v], minus(lanes[0], key_times_[key]));
                first_[row * 2 + v] = low[v];
                const Ints index = indices(alure::minus(load_ints(lanes), splat(key_times_[key])), low[v], high[v]);
                store_indices(index_ + row * kWidth + v * kLanes, index);
                widest = larger(widest, high[v] - low[v]);
            }
        }
        if (widest < kLanes) return {LookUp::kPermute, 0, widest};
        if (widest < 2 * kLanes) return {LookUp::kPermuteTwo, 0, widest};
        if (widest < 4 * kLanes) return {LookUp::kPermuteFour, 0, widest};
        return {LookUp::kGather, 0, widest};
    }

    // Buckets of the differences, counted from `low`.
    [[nodiscard]] Ints indices(Ints differences, std::int32_t low, std::int32_t high) const {
        Ints index{};
        if (high - low <= 8 + 4 * tables_->most_in_cell) {
            for (std::int32_t b = low; b < high; ++b) index -= differences >= tables_->thresholds[b];  // true is −1
            return index;
        }
        const Ints largest = splat(std::int32_t{INT32_MAX - 1});
        differences = differences < largest ? differences : largest;
        const Ints bits = reinterpret_cast<Ints>(__builtin_convertvector(differences, Floats));
        index = gather(tables_->cells, bits >> 22 & 1023);
        for (std::int64_t i = 0; i < tables_->most_in_cell; ++i)
            index -= differences >= gather(tables_->thresholds, index);
        index = index < low ? splat(low) : index > high ? splat(high) : index;  // times out of order stay in bounds
        return index - low;
    }

    // Differences beyond int32: one binary search a pair.
    void find_far_apart(std::int64_t tile, Strip* strips) {
        for (std::int64_t key = 0; key < num_keys_; ++key) {
            const std::int64_t row = tile * keys_ + key;
            first_[row * 2] = first_[row * 2 + 1] = 0;
            for (std::int64_t i = 0; i < kWidth; ++i) {
                const std::int64_t query = queries_[smaller(tile * kWidth + i, rows_ - 1)];
                index_[row * kWidth + i] = static_cast<std::uint16_t>(bucket_of(in_.time, elapsed(query, times_[key])));
            }
            strips[key / kStrip].look_up = LookUp::kGather;
        }
    }

    static std::int32_t minus(std::int32_t a, std::int32_t b) {
        return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b));
    }

    const AttentionInputs& in_;
    const BiasTables* tables_;
    const std::int64_t keys_;
    Strip* strips_;                        // [tiles, strips of a block]
    std::int32_t* query_times_ = nullptr;  // cut to int32; behind the last query, its time again
    std::int32_t* key_times_ = nullptr;
    std::int32_t* first_ = nullptr;   // [tiles, keys, 2]
    std::uint16_t* index_ = nullptr;  // [tiles, keys, kWidth]
    const std::int64_t* queries_ = nullptr;
    const std::int64_t* times_ = nullptr;
    std::int64_t rows_ = 0, num_keys_ = 0;
    Buckets buckets_{};
};

}  // namespace
}  // namespace alure
