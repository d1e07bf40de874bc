// Gradients of the bias tables: those of the logits summed by bucket, in one fixed order.
//
// Each lane sums by itself, in float32, over one head of a part's queries and a block of keys; what the lanes have then
// goes into float64.
#pragma once

#include "tile_bias.h"

namespace alure {
namespace {

class BiasGradients {
public:
    BiasGradients(const AttentionInputs& in, const TileBias& bias, std::int64_t tiles, std::int64_t keys, Arena& arena)
        : in_(in), bias_(bias), block_strips_((keys + kStrip - 1) / kStrip) {
        if (in.time.table) {
            of_time_ = arena.array<float>(time_floats());
            of_rows_ = arena.array<float>(row_floats());
        }
        if (in.position.table) {
            stride_ = round_up(tiles * kWidth + (block_strips_ + 2) * kStrip, kStrip);
            of_position_ = arena.array<float>(kStrip * stride_);
        }
    }

    void start_part() const {
        if (in_.time.table) {
            fill(of_time_, {0, time_floats()}, Floats{});
            fill(of_rows_, {0, row_floats()}, Floats{});
        }
        if (in_.position.table) fill(of_position_, {0, kStrip * stride_}, Floats{});
    }

    // What comes next is of one head and one block: sums of its tables, [buckets].
    void start_head(double* d_time, double* d_position) {
        d_time_ = d_time;
        d_position_ = d_position;
    }

    // The sum of a strip in one bucket.
    void add_strip(std::int32_t bucket, Floats sum) const {
        if (in_.time.table) add(of_time_ + bucket * kSums * kLanes, sum);
    }

    // Gradients of vector `v` of a tile's queries and one key of a whole strip, without those of kOne. Those of kRows
    // are summed by row until finish_rows.
    template <LookUp kLookUp, bool kPosition>
    void add_whole(const Strip& strip, std::int64_t tile, std::int64_t key, int v, Floats d_logits) const {
        if constexpr (kLookUp == LookUp::kRows)
            add(sums_of_row(bias_.times().rows(tile, key / kStrip, v).of_key[key % kStrip], key, v), d_logits);
        else if constexpr (kLookUp == LookUp::kCompare)
            add_compared(strip.tile.bucket, tile, key, v, d_logits);
        else if constexpr (kLookUp == LookUp::kPermute)
            add_buckets(bias_.times().indices(tile, key, v), strip.widest, key, v, d_logits);
        else if constexpr (kLookUp != LookUp::kOne)
            add_pairs(*bias_.times().first(tile, key, v), bias_.times().index(tile, key, v), key, v, d_logits);
        if constexpr (kPosition) add(diagonals(tile, key, v), d_logits);
    }

    // A strip's sums by row go into those of its buckets.
    void finish_rows(const Strip& strip, std::int64_t tile, std::int64_t strip_number) const {
        for (int v = 0; v < 2; ++v) {
            const BucketRows& rows = bias_.times().rows(tile, strip_number, v);
            for (int row = 0; row < kMostRows; ++row)
                for (std::int64_t odd = 0; odd < 2; ++odd) {
                    float* sums = sums_of_row(row, odd, v);
                    add_buckets({strip.vectors[v].bucket, load_indices(rows.index[row])}, strip.widest, odd, v,
                                load(sums));
                    store(sums, Floats{});
                }
        }
    }

    // The same of any strip, with those of kOne. Hidden pairs have gradients of 0.
    void add_masked(std::int64_t tile, std::int64_t key, int v, Floats d_logits) const {
        if (in_.time.table) {
            const Look look = bias_.strip(tile, key / kStrip).tile;
            if (look.look_up == LookUp::kOne)
                add_strip(look.bucket, d_logits);
            else
                add_any(bias_.times().indices(tile, key, v), key, v, d_logits);
        }
        if (in_.position.table) add_position(tile, key, v, d_logits);
    }

    void finish_head() const {
        if (in_.time.table) {
            const Buckets buckets = bias_.times().buckets();
            for (std::int64_t b = buckets.least; b <= buckets.most; ++b) {
                float* sums = of_time_ + b * kSums * kLanes;
                Floats sum = load(sums);
                for (int i = 1; i < kSums; ++i) sum += load(sums + i * kLanes);
                d_time_[b] += sum_of_lanes(sum);
                fill(sums, {0, kSums * kLanes}, Floats{});
            }
        }
        if (!in_.position.table) return;
        const std::int64_t num_keys = bias_.num_keys(), queries = round_up(bias_.rows(), kWidth);
        for (std::int64_t x = 1 - num_keys; x < queries; x += kLanes) {
            Floats sums{};
            for (std::int64_t r = 0; r < kStrip; ++r)
                sums += load(of_position_ + r * stride_ + block_strips_ * kStrip + x + r);
            const std::int64_t difference = bias_.position_of(0, 0) - bias_.block() + x;
            for (std::int64_t i = 0; i < smaller<std::int64_t>(kLanes, queries - x); ++i)
                d_position_[bias_.positions().bucket(difference + i)] += sums[i];
        }
        fill(of_position_, {0, kStrip * stride_}, Floats{});
    }

private:
    static constexpr int kSums = 4;  // of each bucket: one sum would wait for itself from key to key

    [[nodiscard]] std::int64_t time_floats() const {
        return (in_.time.num_thresholds + 1 + kLanes) * kSums * kLanes;  // the widest index may be of another key
    }
    static std::int64_t row_floats() { return kMostRows * kSums * kLanes; }
    static void add(float* sums, Floats x) { store(sums, load(sums) + x); }

    void add_buckets(TimeBuckets::Indices buckets, std::int32_t widest, std::int64_t key, int v, Floats x) const {
        float* sums = sums_of_bucket(buckets.first, key, v);
        for (std::int32_t b = 0; b <= widest; ++b) add(sums + b * kSums * kLanes, buckets.index == b ? x : Floats{});
    }
    void add_compared(std::int32_t bucket, std::int64_t tile, std::int64_t key, int v, Floats x) const {
        const Ints is_upper = bias_.times().comparison(tile, key, v, bucket).is_upper(0);
        float* both = sums_of_bucket(bucket, key, v);
        add(both, is_upper ? Floats{} : x);
        add(both + kSums * kLanes, is_upper ? x : Floats{});
    }
    void add_pairs(std::int32_t first, const std::uint16_t* index, std::int64_t key, int v, Floats x) const {
        float* sums = sums_of_bucket(first, key, v);
        for (int lane = 0; lane < kLanes; ++lane) sums[index[lane] * kSums * kLanes + lane] += x[lane];
    }
    void add_any(TimeBuckets::Indices buckets, std::int64_t key, int v, Floats x) const {
        std::uint16_t index[kLanes];
        store_indices(index, buckets.index);
        add_pairs(buckets.first, index, key, v, x);
    }

    [[nodiscard]] float* sums_of_bucket(std::int64_t bucket, std::int64_t key, int v) const {
        return of_time_ + (bucket * kSums + key % 2 * 2 + v) * kLanes;
    }
    [[nodiscard]] float* sums_of_row(int row, std::int64_t key, int v) const {
        return of_rows_ + (row * kSums + key % 2 * 2 + v) * kLanes;
    }

    // Targets all stand right after the history, and see one another not at all.
    void add_position(std::int64_t tile, std::int64_t key, int v, Floats d_logits) const {
        const std::int64_t i = bias_.position_of(tile, v), j = bias_.block() + key, history = bias_.history();
        if (j < history && i + kLanes - 1 <= history) return add(diagonals(tile, key, v), d_logits);
        const Ints targets = lane_numbers() > static_cast<std::int32_t>(larger<std::int64_t>(history - i, -1));
        const std::int64_t difference = larger<std::int64_t>(history - j, 0);
        if (j < history && i <= history) {
            add(diagonals(tile, key, v), targets ? Floats{} : d_logits);
            d_logits = targets ? d_logits : Floats{};
        }
        d_position_[bucket_of(in_.position, difference)] += sum_of_lanes(d_logits);
    }

    // Where a vector of queries and a key add to the sums of the diagonals i − j. There is a row of sums for each
    // remainder of a key, in which all vectors are aligned: what was just stored is never loaded across two stores.
    [[nodiscard]] float* diagonals(std::int64_t tile, std::int64_t key, int v) const {
        return of_position_ + key % kStrip * stride_ + tile * kWidth + v * kLanes +
               (block_strips_ - key / kStrip) * kStrip;
    }

    const AttentionInputs& in_;
    const TileBias& bias_;
    const std::int64_t block_strips_;
    std::int64_t stride_ = 0;
    float* of_time_ = nullptr;      // [buckets + kLanes, kSums, kLanes]
    float* of_rows_ = nullptr;      // [kMostRows, kSums, kLanes] of the strip at hand
    float* of_position_ = nullptr;  // [kStrip, stride]
    double *d_time_ = nullptr, *d_position_ = nullptr;
};

}  // namespace
}  // namespace alure
