// The time buckets of a part's queries against one block of keys: found once, looked up by every head.
//
// Times are sorted, so the corners of a rectangle of queries × keys bound its differences, and its buckets are an
// interval. Most rectangles lie in one bucket or two; the others keep an index a pair, counted from their least bucket
// where they have few, elsewhere from the least of a vector of queries and a key.
#pragma once

#include "attention_kernels.h"
#include "scratch.h"
#include "simd.h"

namespace alure {
namespace {

constexpr int kWidth = 2 * kLanes;   // queries of a tile, in two vectors
constexpr std::int64_t kStrip = 16;  // keys of a rectangle

// How a strip of keys × a tile of queries finds its biases: one value, one of two by a comparison, a permutation of a
// vector that is the same for all keys, a permutation of 2 or 4 vectors, a gather.
// With AVX2 four are still faster than the gather: 14 % of a forward of 64 events with 16 channels.
enum class LookUp : std::uint8_t { kOne, kCompare, kPermute, kPermuteTwo, kPermuteFour, kGather };

struct Buckets {
    std::int32_t least, most;
};

struct Look {
    LookUp look_up = LookUp::kOne;
    std::int32_t bucket = 0;  // of kOne; the lower one of kCompare
};

struct Strip {
    Look tile, vectors[2];    // those of one vector of queries may be simpler
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
    // For at most `tiles` tiles of queries and `keys` keys a block, whole strips.
    TimeBuckets(const AttentionInputs& in, const BiasTables* tables, std::int64_t tiles, std::int64_t keys,
                Arena& arena)
        : in_(in), tables_(tables), keys_(keys) {
        strips_ = arena.array<Strip>(tiles * (keys / kStrip));
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
        for (std::int64_t j = 0; j < round_up(num_keys, kStrip); ++j)
            key_times_[j] = static_cast<std::int32_t>(times_[smaller(j, num_keys - 1)]);
    }

    void find(std::int64_t tile) {
        for (std::int64_t begin = 0; begin < num_keys_; begin += kStretch)
            find(tile, begin, smaller(begin + kStretch, num_keys_));
    }

    // Buckets of all pairs of the block and the tiles found.
    [[nodiscard]] Buckets buckets() const { return buckets_; }

    // Of vector `v` of a tile's queries and one key of a strip that is not kOne: buckets, counted from `first`.
    [[nodiscard]] const std::int32_t* first(std::int64_t tile, std::int64_t key, int v) const {
        return first_ + (tile * keys_ + key) * 2 + v;
    }
    [[nodiscard]] const std::uint16_t* index(std::int64_t tile, std::int64_t key, int v) const {
        return index_ + (tile * keys_ + key) * kWidth + v * kLanes;
    }

    [[nodiscard]] const Strip* strips(std::int64_t tile) const {
        return strips_ + tile * (keys_ / kStrip);
    }

    // Which lanes of vector `v` of a tile's queries are in the upper one of the two buckets of a strip with kCompare.
    struct Comparison {
        Ints queries, threshold;
        const std::int32_t* keys;  // of the block
        [[nodiscard]] Ints is_upper(std::int64_t key) const {
            return alure::minus(queries, splat(keys[key])) >= threshold;
        }
    };
    [[nodiscard]] Comparison comparison(std::int64_t tile, int v, std::int32_t bucket) const {
        return {load_ints(query_times_ + tile * kWidth + v * kLanes), splat(tables_->thresholds[bucket]), key_times_};
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
    static constexpr std::int64_t kStretch = 128;  // keys whose buckets are found together

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
        if (most < INT32_MAX && least > INT32_MIN) return find_strips(tile, begin, end, high, strips);
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

    // The first bucket at or below `bucket` that a difference falls into.
    [[nodiscard]] std::int32_t fall(std::int32_t bucket, std::int32_t difference) const {
        while (bucket > 0 && tables_->thresholds[bucket - 1] > difference) --bucket;
        return bucket;
    }

    // All differences fit int32, so those of times cut to int32 are right. Along the keys they only fall.
    void find_strips(std::int64_t tile, std::int64_t begin, std::int64_t end, std::int32_t high, Strip* strips) {
        const std::int32_t* queries = query_times_ + tile * kWidth;
        std::int32_t low = high;
        for (std::int64_t key = begin; key < end; key += kStrip) {
            high = fall(high, minus(queries[kWidth - 1], key_times_[key]));
            low = fall(low, minus(queries[0], key_times_[key + kStrip - 1]));
            Strip& strip = strips[key / kStrip];
            if (low == high)
                strip = {{LookUp::kOne, low}, {{LookUp::kOne, low}, {LookUp::kOne, low}}};
            else if (high - low < kLanes)
                strip = find_few(tile, key, low, high);
            else
                strip = find_rows(tile, key);
        }
    }

    // A strip whose buckets, low to high, are few.
    Strip find_few(std::int64_t tile, std::int64_t begin, std::int32_t low, std::int32_t high) {
        const auto look = [](std::int32_t least, std::int32_t most) {
            return Look{most == least ? LookUp::kOne : most == least + 1 ? LookUp::kCompare : LookUp::kPermute, least};
        };
        Strip strip{look(low, high), {}, high - low};
        for (int v = 0; v < 2; ++v) {
            const std::int32_t* lanes = query_times_ + tile * kWidth + v * kLanes;
            const std::int32_t most = fall(high, minus(lanes[kLanes - 1], key_times_[begin]));
            const std::int32_t least = fall(most, minus(lanes[0], key_times_[begin + kStrip - 1]));
            strip.vectors[v] = look(least, most);
            if (strip.tile.look_up == LookUp::kCompare) continue;
            const Ints queries = load_ints(lanes);
            const auto write = [&](auto buckets_of) ALURE_INLINE {
                for (std::int64_t key = begin; key < begin + kStrip; ++key) {
                    const Ints buckets = buckets_of(alure::minus(queries, splat(key_times_[key])));
                    store_indices(index_ + (tile * keys_ + key) * kWidth + v * kLanes, buckets - low);
                    first_[(tile * keys_ + key) * 2 + v] = low;
                }
            };
            if (most - least > 2) {
                const CellWindow window(*tables_, minus(lanes[0], key_times_[begin + kStrip - 1]),
                                        minus(lanes[kLanes - 1], key_times_[begin]), least, most);
                if (window.fits) {
                    write([&](Ints differences) ALURE_INLINE { return window.buckets_of(differences); });
                    continue;
                }
            }
            write([&](Ints differences) ALURE_INLINE { return buckets_of(differences, least, most); });
        }
        return strip;
    }

    Strip find_rows(std::int64_t tile, std::int64_t begin) {
        std::int32_t widest = 0;
        for (std::int64_t key = begin; key < begin + kStrip; ++key) {
            const std::int64_t row = tile * keys_ + key;
            for (int v = 0; v < 2; ++v) {
                const Ints queries = load_ints(query_times_ + tile * kWidth + v * kLanes);
                const Ints buckets = buckets_of(alure::minus(queries, splat(key_times_[key])));
                const std::int32_t low = buckets[0], high = larger(low, std::int32_t{buckets[kLanes - 1]});
                first_[row * 2 + v] = low;
                store_indices(index_ + row * kWidth + v * kLanes, clamp(buckets, low, high) - low);
                widest = larger(widest, high - low);
            }
        }
        const Look look{widest < 2 * kLanes   ? LookUp::kPermuteTwo
                        : widest < 4 * kLanes ? LookUp::kPermuteFour
                                              : LookUp::kGather};
        return {look, {look, look}, widest};
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
            const std::int64_t row = tile * keys_ + key;
            first_[row * 2] = first_[row * 2 + 1] = 0;
            for (std::int64_t i = 0; i < kWidth; ++i) {
                const std::int64_t query = queries_[smaller(tile * kWidth + i, rows_ - 1)];
                index_[row * kWidth + i] = static_cast<std::uint16_t>(bucket_of(in_.time, elapsed(query, time)));
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
    std::int32_t* first_ = nullptr;        // [tiles, keys, 2]
    std::uint16_t* index_ = nullptr;       // [tiles, keys, kWidth]
    const std::int64_t* queries_ = nullptr;
    const std::int64_t* times_ = nullptr;
    std::int64_t rows_ = 0, num_keys_ = 0;
    Buckets buckets_{};
};

}  // namespace
}  // namespace alure
