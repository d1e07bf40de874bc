// The position biases of a part's queries against one block of keys. They depend on i − j alone, so in a row of keys
// the biases of neighbouring queries are a stretch of one array.
#pragma once

#include "attention_mask.h"
#include "time_buckets.h"

namespace alure {
namespace {

class PositionDiagonals {
public:
    PositionDiagonals(const AttentionInputs& in, std::int64_t queries, std::int64_t keys, Arena& arena) : in_(in) {
        if (!in.position.table) return;
        buckets_ = arena.array<std::int32_t>(queries + keys + kWidth);
        values_ = arena.array<float>(queries + keys + kWidth);
    }

    // Queries from position `first`, `rows` of them, against keys [begin, end), whole strips.
    void start_block(std::int64_t first, std::int64_t rows, std::int64_t begin, std::int64_t end) {
        if (!in_.position.table) return;
        least_ = first - (end - 1);
        size_ = round_up(rows, kWidth) + end - begin;
        std::int32_t bucket = bucket_of(in_.position, least_);
        for (std::int64_t x = 0; x < size_; ++x) {
            while (bucket < in_.position.num_thresholds && in_.position.thresholds[bucket] <= least_ + x) ++bucket;
            buckets_[x] = bucket;
        }
    }

    void start_head(const float* table) {
        if (!in_.position.table) return;
        table_ = table;
        std::int64_t x = 0;
        for (; x + kLanes <= size_; x += kLanes) store(values_ + x, gather(table, load_ints(buckets_ + x)));
        for (; x < size_; ++x) values_[x] = table[buckets_[x]];
    }

    [[nodiscard]] std::int32_t bucket(std::int64_t difference) const { return buckets_[difference - least_]; }

    // Biases of the queries from position i on, one a lane, against key j.
    [[nodiscard]] const float* diagonal(std::int64_t i, std::int64_t j) const { return values_ + (i - j - least_); }
    [[nodiscard]] Floats values(std::int64_t i, std::int64_t j) const { return load(diagonal(i, j)); }

    // The same where some of the queries or the key may be targets, which all stand right after the history.
    [[nodiscard]] Floats values(std::int64_t i, std::int64_t j, std::int64_t history) const {
        if (j >= history) return splat(table_[bucket_of(in_.position, 0)]);  // seen by itself only
        if (i + kLanes - 1 <= history) return values(i, j);
        const Floats target = splat(table_[bucket_of(in_.position, history - j)]);
        if (i > history) return target;
        return lane_numbers() <= static_cast<std::int32_t>(history - i) ? values(i, j) : target;
    }

private:
    const AttentionInputs& in_;
    std::int32_t* buckets_ = nullptr;
    float* values_ = nullptr;
    const float* table_ = nullptr;
    std::int64_t least_ = 0, size_ = 0;
};

}  // namespace
}  // namespace alure
