// The time buckets of a part's queries against one block of keys: found once, looked up by every head.
//
// Times are sorted, so the corners of a rectangle of queries × keys bound its differences, and its buckets are an
// interval. Most rectangles lie in one bucket or two, whose threshold their differences are compared with. The others
// keep an index a pair, counted from their least bucket where they have few, elsewhere from the least of a vector of
// queries and a key. Along the keys vectors of indices repeat: where there are no more than four, these are kept.
#pragma once

#include "attention_kernels.h"
#include "scratch.h"
#include "simd.h"

namespace alure {
namespace {

constexpr int kWidth = 2 * kLanes;   // queries of a tile, in two vectors
constexpr std::int64_t kStrip = 16;  // keys of a rectangle

// How a strip of keys × a tile of queries finds its biases: one value, one of two by a comparison, one of few vectors,
// a permutation of a vector that is the same for all keys, a permutation of 2 or 4 vectors, a gather. With AVX2 four
// are still faster than the gather: 14 % of a forward of 64 events with 16 channels.
enum class LookUp : std::uint8_t { kOne, kCompare, kRows, kPermute, kPermuteTwo, kPermuteFour, kGather };

constexpr int kMostRows = 4;  // different vectors of indices of a strip with kRows

struct Buckets {
    std::int32_t least, most;
};

struct Look {
    LookUp look_up = LookUp::kOne;
    std::int32_t bucket = 0;  // the least; of kOne the only one
};

struct Strip {
    Look tile, vectors[2];    // those of one vector of queries may be simpler
    std::int32_t widest = 0;  // the most that an index is

    // What the tile's look-up counts the buckets of vector `v` from.
    [[nodiscard]] std::int32_t least(int v) const {
        return tile.look_up == LookUp::kCompare ? tile.bucket : vectors[v].bucket;
    }
};

// The vectors of indices of a strip × a vector of queries that has few of them, in the order of its keys.
struct BucketRows {
    std::uint16_t index[kMostRows][kLanes];  // behind the last one, it again
    std::uint8_t of_key[kStrip];             // which one is a key's
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
    // For at most `tiles` tiles of queries and `keys` keys a block, whole strips.
    TimeBuckets(const AttentionInputs& in, const BiasTables* tables, std::int64_t tiles, std::int64_t keys,
                Arena& arena)
        : in_(in), tables_(tables), keys_(keys) {
        strips_ = arena.array<Strip>(tiles * (keys / kStrip));
        if (!in.time.table) return;
        query_times_ = arena.array<std::int32_t>(tiles * kWidth);
        key_times_ = arena.array<std::int32_t>(keys);
        strip_ends_ = arena.array<std::int32_t>(2 * padded_strips(keys));
        first_ = arena.array<std::int32_t>(2 * tiles * keys);
        index_ = arena.array<std::uint16_t>(tiles * kWidth * keys);
        rows_of_ = arena.array<BucketRows>(2 * tiles * (keys / kStrip));
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
        for (std::int64_t j = 0; j < round_up(num_keys, kStrip); ++j)
            key_times_[j] = static_cast<std::int32_t>(times_[smaller(j, num_keys - 1)]);
        for (std::int64_t i = 0; i < padded_strips(num_keys); ++i) {
            const std::int64_t strip = smaller(i, (num_keys - 1) / kStrip);
            strip_ends_[i] = key_times_[strip * kStrip];
            strip_ends_[padded_strips(keys_) + i] = key_times_[strip * kStrip + kStrip - 1];
        }
    }

    void find(std::int64_t tile) {
        for (std::int64_t begin = 0; begin < num_keys_; begin += kStretch)
            find(tile, begin, smaller(begin + kStretch, num_keys_));
    }

    // Buckets of all pairs of the block and the tiles found.
    [[nodiscard]] Buckets buckets() const { return buckets_; }

    // Which lanes of vector `v` of a tile's queries are in the upper one of the two buckets of a strip with kCompare.
    struct Comparison {
        Ints queries, threshold;
        const std::int32_t* keys;
        [[nodiscard]] Ints is_upper(std::int64_t i) const {
            return alure::minus(queries, splat(keys[i])) >= threshold;
        }
    };
    // Of keys from one on, and the lower bucket.
    [[nodiscard]] Comparison comparison(std::int64_t tile, std::int64_t key, int v, std::int32_t bucket) const {
        return {load_ints(query_times_ + tile * kWidth + v * kLanes), splat(tables_->thresholds[bucket]),
                key_times_ + key};
    }

    // Of vector `v` of a tile's queries and one key of a strip that is not kOne: buckets, counted from `first`.
    struct Indices {
        std::int32_t first;
        Ints index;
    };
    [[nodiscard]] Indices indices(std::int64_t tile, std::int64_t key, int v) const {
        const Strip& strip = strips(tile)[key / kStrip];
        if (strip.tile.look_up == LookUp::kCompare)
            return {strip.tile.bucket, -comparison(tile, key, v, strip.tile.bucket).is_upper(0)};
        if (strip.tile.look_up != LookUp::kRows)
            return {*first(tile, key, v), load_indices(index(tile, key, v))};
        const BucketRows& rows = this->rows(tile, key / kStrip, v);
        return {strip.vectors[v].bucket, load_indices(rows.index[rows.of_key[key % kStrip]])};
    }
    // Those of a strip with kRows.
    [[nodiscard]] const BucketRows& rows(std::int64_t tile, std::int64_t strip, int v) const {
        return rows_of_[place_of(tile, strip * kStrip, v) / kStrip];
    }
    // Those of other strips, of the keys from one on: [keys], and [keys, kLanes].
    [[nodiscard]] const std::int32_t* first(std::int64_t tile, std::int64_t key, int v) const {
        return first_ + place_of(tile, key, v);
    }
    [[nodiscard]] const std::uint16_t* index(std::int64_t tile, std::int64_t key, int v) const {
        return index_ + place_of(tile, key, v) * kLanes;
    }

    [[nodiscard]] const Strip* strips(std::int64_t tile) const {
        return strips_ + tile * (keys_ / kStrip);
    }

    // Lane i is window[index[i]].
    template <LookUp kLookUp>
    static Floats look_up(const float* window, Ints index) {
        if constexpr (kLookUp == LookUp::kPermuteTwo)
            return permute_two(window, index);
        else if constexpr (kLookUp == LookUp::kPermuteFour)
            return index < 2 * kLanes ? permute_two(window, index & (2 * kLanes - 1))
                                      : permute_two(window + 2 * kLanes, index & (2 * kLanes - 1));
        else
            return gather(window, index);
    }

private:
    static constexpr std::int64_t kStretch = 256;  // keys whose buckets are found together

    // Among all vectors of queries × keys.
    [[nodiscard]] std::int64_t place_of(std::int64_t tile, std::int64_t key, int v) const {
        return (tile * 2 + v) * keys_ + key;
    }
    // Strips of so many keys, rounded up to whole vectors.
    static std::int64_t padded_strips(std::int64_t keys) { return round_up((keys + kStrip - 1) / kStrip, kLanes); }

    void find(std::int64_t tile, std::int64_t begin, std::int64_t end) {
        Strip* strips = strips_ + tile * (keys_ / kStrip);
        const auto look_all = [&](Look look) {
            for (std::int64_t key = begin; key < end; key += kStrip) strips[key / kStrip] = {look, {look, look}};
        };
        if (!in_.time.table) return look_all({});
        const std::int64_t first = tile * kWidth, last = smaller(first + kWidth, rows_) - 1;
        const std::int64_t most = elapsed(queries_[last], times_[begin]),
                           least = elapsed(queries_[first], times_[end - 1]);
        const std::int32_t high = bucket_of(in_.time, most), low = bucket_of(in_.time, least);
        buckets_ = {smaller(buckets_.least, low), larger(buckets_.most, high)};
        if (low == high) return look_all({LookUp::kOne, low});
        if (most < INT32_MAX && least > INT32_MIN) return find_strips(tile, begin, end, strips);
        find_far_apart(tile, begin, end);
        look_all({LookUp::kGather});
    }

    // Buckets of differences from one to another, where these lie in few cells, none of which a threshold splits.
    struct CellWindow {
        std::int32_t base;  // the first cell
        bool fits;
        Floats low{}, high{};  // buckets, of kLanes cells each

        CellWindow(const BiasTables& tables, std::int32_t least, std::int32_t most, std::int32_t least_bucket,
                   std::int32_t most_bucket)
            : base(smaller(cell_of(least), cell_of(most))),
              fits(tables.most_in_cell == 0 && larger(cell_of(least), cell_of(most)) - base < 2 * kLanes) {
            if (!fits) return;
            const auto buckets = [&](std::int64_t first) {  // of times out of order they stay in bounds
                return reinterpret_cast<Floats>(clamp(load_ints(tables.cells + first), least_bucket, most_bucket));
            };
            low = buckets(base);
            high = buckets(base + kLanes);
        }
        [[nodiscard]] Ints buckets_of(Ints differences) const {
            const Ints cells = cells_of(differences) - base;
            return reinterpret_cast<Ints>(permute_two(low, high, cells & (2 * kLanes - 1)));
        }
    };

    static std::int32_t cell_of(std::int32_t difference) {
        return static_cast<std::int32_t>(__builtin_bit_cast(std::uint32_t, static_cast<float>(difference)) >>
                                         kCellShift);
    }
    static Ints cells_of(Ints differences) {
        const Floats floats = __builtin_convertvector(differences, Floats);
        return reinterpret_cast<Ints>(reinterpret_cast<Unsigneds>(floats) >> kCellShift);
    }

    static Floats permute_two(const float* window, Ints index) {
        return permute_two(load(window), load(window + kLanes), index);
    }
    static Floats permute_two(Floats low, Floats high, Ints index) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
        return _mm512_permutex2var_ps(low, reinterpret_cast<__m512i>(index), high);
#else
        const Floats a = permute(low, index & (kLanes - 1)), b = permute(high, index & (kLanes - 1));
        return index < kLanes ? a : b;
#endif
    }

    // All differences fit int32, so those of times cut to int32 are right.
    void find_strips(std::int64_t tile, std::int64_t begin, std::int64_t end, Strip* strips) {
        const std::int32_t *queries = query_times_ + tile * kWidth, *last_keys = strip_ends_ + padded_strips(keys_);
        for (std::int64_t first = begin / kStrip; first * kStrip < end; first += kLanes) {
            std::int32_t low[2][kLanes], high[2][kLanes];  // of strips, a vector of queries each
            for (int v = 0; v < 2; ++v) {
                const std::int32_t* lanes = queries + v * kLanes;
                const Ints least = buckets_of(alure::minus(splat(lanes[0]), load_ints(last_keys + first)));
                const Ints most = buckets_of(alure::minus(splat(lanes[kLanes - 1]), load_ints(strip_ends_ + first)));
                store_ints(low[v], least);
                store_ints(high[v], most < least ? least : most);
            }
            for (int i = 0; i < kLanes && (first + i) * kStrip < end; ++i)
                strips[first + i] = find_strip(tile, first + i, {low[0][i], high[0][i]}, {low[1][i], high[1][i]});
        }
    }

    // A strip whose buckets are at most these, of each vector of queries.
    Strip find_strip(std::int64_t tile, std::int64_t strip, Buckets a, Buckets b) {
        const auto look = [](Buckets buckets) {
            return Look{buckets.least == buckets.most ? LookUp::kOne : LookUp::kCompare, buckets.least};
        };
        if (b.most - a.least <= 1) return {look({a.least, b.most}), {look(a), look(b)}, b.most - a.least};
        Strip found;
        for (int v = 0; v < 2; ++v) found.vectors[v] = find_vector(tile, strip, v, v == 0 ? a : b, found.widest);
        const LookUp both = larger(found.vectors[0].look_up, found.vectors[1].look_up);
        found.tile = {larger(LookUp::kRows, both), a.least};
        if (both <= LookUp::kRows) return found;
        for (int v = 0; v < 2; ++v)
            if (found.vectors[v].look_up <= LookUp::kRows) write_rows(tile, strip, v, found.vectors[v].bucket);
        return found;
    }

    // Vector `v` of the queries of a strip of more than two buckets. It keeps rows even if it needs none: a tile does.
    Look find_vector(std::int64_t tile, std::int64_t strip, int v, Buckets buckets, std::int32_t& widest) {
        const auto [low, high] = buckets;
        BucketRows& rows = rows_of_[place_of(tile, strip * kStrip, v) / kStrip];
        if (low == high) {
            rows = {};
            return {LookUp::kOne, low};
        }
        if (high - low >= kLanes) return {find_many(tile, strip, v, widest), low};
        widest = larger(widest, high - low);
        Ints indices[kStrip];
        const std::uint32_t changes =
            find_few(query_times_ + tile * kWidth + v * kLanes, key_times_ + strip * kStrip, buckets, indices);
        if (__builtin_popcount(changes) < kMostRows) {
            keep_rows(indices, changes, rows);
            return {LookUp::kRows, low};
        }
        write(tile, strip, v, low, [&](std::int64_t i) ALURE_INLINE { return indices[i]; });
        return {LookUp::kPermute, low};
    }

    // Indices of a strip whose buckets are few, counted from the least. Returns at which keys they change.
    std::uint32_t find_few(const std::int32_t* lanes, const std::int32_t* keys, Buckets buckets,
                           Ints (&indices)[kStrip]) const {
        const auto [low, high] = buckets;
        const Ints queries = load_ints(lanes);
        const auto find = [&](auto index_of) ALURE_INLINE {
            std::uint32_t changes = 0;
            for (std::int64_t i = 0; i < kStrip; ++i) {
                indices[i] = index_of(alure::minus(queries, splat(keys[i])));
                if (i > 0) changes |= static_cast<std::uint32_t>(differ(indices[i], indices[i - 1])) << i;
            }
            return changes;
        };
        if (high - low > 2) {
            const CellWindow window(*tables_, minus(lanes[0], keys[kStrip - 1]), minus(lanes[kLanes - 1], keys[0]), low,
                                    high);
            if (window.fits)
                return find([&](Ints differences) ALURE_INLINE { return window.buckets_of(differences) - low; });
        }
        return find([&](Ints differences) ALURE_INLINE { return buckets_of(differences, low, high) - low; });
    }

    // Of keys whose indices change at `changes`, fewer than kMostRows.
    static void keep_rows(const Ints (&indices)[kStrip], std::uint32_t changes, BucketRows& rows) {
        std::uint8_t of_key[kStrip] = {};
        store_indices(rows.index[0], indices[0]);
        for (int row = 1; row < kMostRows; ++row, changes &= changes - 1) {
            const int key = changes ? __builtin_ctz(changes) : kStrip;
            store_indices(rows.index[row], indices[smaller<int>(key, kStrip - 1)]);
            for (int i = 0; i < kStrip; ++i) of_key[i] += i >= key;
        }
        __builtin_memcpy(rows.of_key, of_key, sizeof(of_key));
    }

    // Rows as an index a pair.
    void write_rows(std::int64_t tile, std::int64_t strip, int v, std::int32_t bucket) {
        const BucketRows& rows = this->rows(tile, strip, v);
        write(tile, strip, v, bucket,
              [&](std::int64_t i) ALURE_INLINE { return load_indices(rows.index[rows.of_key[i]]); });
    }

    template <class IndexOf>
    void write(std::int64_t tile, std::int64_t strip, int v, std::int32_t bucket, IndexOf index_of) {
        const std::int64_t place = place_of(tile, strip * kStrip, v);
        for (std::int64_t i = 0; i < kStrip; ++i) {
            first_[place + i] = bucket;
            store_indices(index_ + (place + i) * kLanes, index_of(i));
        }
    }

    // Indices of a strip, counted from the least of each key.
    LookUp find_many(std::int64_t tile, std::int64_t strip, int v, std::int32_t& widest) {
        const std::int64_t place = place_of(tile, strip * kStrip, v);
        const Ints queries = load_ints(query_times_ + tile * kWidth + v * kLanes);
        std::int32_t most = 0;
        for (std::int64_t i = 0; i < kStrip; ++i) {
            const Ints buckets = buckets_of(alure::minus(queries, splat(key_times_[strip * kStrip + i])));
            const std::int32_t low = buckets[0], high = larger(low, std::int32_t{buckets[kLanes - 1]});
            first_[place + i] = low;
            store_indices(index_ + (place + i) * kLanes, clamp(buckets, low, high) - low);
            most = larger(most, high - low);
        }
        widest = larger(widest, most);
        return most < 2 * kLanes ? LookUp::kPermuteTwo : most < 4 * kLanes ? LookUp::kPermuteFour : LookUp::kGather;
    }

    // Of differences from bucket `low` to bucket `high`.
    [[nodiscard]] Ints buckets_of(Ints differences, std::int32_t low, std::int32_t high) const {
        if (high - low > 8 + 4 * tables_->most_in_cell) return clamp(buckets_of(differences), low, high);
        Ints buckets = splat(low);
        for (std::int32_t b = low; b < high; ++b) buckets -= differences >= tables_->thresholds[b];  // true is −1
        return buckets;
    }
    [[nodiscard]] Ints buckets_of(Ints differences) const {
        const Ints largest = splat(std::int32_t{INT32_MAX - 1});
        differences = differences < largest ? differences : largest;
        Ints buckets = gather(tables_->cells, cells_of(differences));
        for (std::int64_t i = 0; i < tables_->most_in_cell; ++i)
            buckets -= differences >= gather(tables_->thresholds, buckets);
        return buckets;
    }
    // Buckets of times out of order stay in bounds.
    static Ints clamp(Ints buckets, std::int32_t low, std::int32_t high) {
        return buckets < low ? splat(low) : buckets > high ? splat(high) : buckets;
    }

    // Differences beyond int32: one binary search a pair.
    void find_far_apart(std::int64_t tile, std::int64_t begin, std::int64_t end) {
        for (std::int64_t key = begin; key < round_up(end, kStrip); ++key) {
            const std::int64_t time = times_[smaller(key, num_keys_ - 1)];
            for (std::int64_t i = 0; i < kWidth; ++i) {
                const std::int64_t place = place_of(tile, key, static_cast<int>(i / kLanes));
                const std::int64_t query = queries_[smaller(tile * kWidth + i, rows_ - 1)];
                first_[place] = 0;
                index_[place * kLanes + i % kLanes] =
                    static_cast<std::uint16_t>(bucket_of(in_.time, elapsed(query, time)));
            }
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
    std::int32_t* key_times_ = nullptr;    // behind the last key, up to a whole strip, its time again
    std::int32_t* strip_ends_ = nullptr;   // times of the first key of each strip, then of the last; whole vectors
    std::int32_t* first_ = nullptr;        // [tiles, 2, keys]
    std::uint16_t* index_ = nullptr;       // [tiles, 2, keys, kLanes]
    BucketRows* rows_of_ = nullptr;        // [tiles, 2, strips of a block]
    const std::int64_t* queries_ = nullptr;
    const std::int64_t* times_ = nullptr;
    std::int64_t rows_ = 0, num_keys_ = 0;
    Buckets buckets_{};
};

}  // namespace
}  // namespace alure
