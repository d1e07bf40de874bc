// Times and positions are sorted, so along a row of keys the buckets only fall: a row is a few runs of one bucket.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

namespace alure {
namespace {

constexpr std::int64_t kMostKeys = 256;  // keys of a block

// The buckets of one query after another (their values never decrease) over one block of sorted keys.
class BucketWalker {
public:
    // counts: scratch of `num_thresholds` integers. keys: [num_keys], num_keys >= 1.
    void start(const BucketTable& bias, std::int64_t head, std::int32_t* counts, const std::int64_t* keys,
               std::int64_t num_keys) {
        thresholds_ = bias.thresholds;
        num_thresholds_ = bias.num_thresholds;
        values_ = bias.table ? bias.table + head * (num_thresholds_ + 1) : &kNone;
        counts_ = counts;
        keys_ = keys;
        num_keys_ = static_cast<std::int32_t>(num_keys);
        first_ = last_ = 0;
    }

    // Moves to a query. Pointers only advance: over the queries of a tile this costs about a step a key and threshold.
    void move_to(std::int64_t query) {
        while (first_ < num_thresholds_ && thresholds_[first_] <= query - keys_[0]) counts_[first_++] = 0;
        while (last_ < first_ && thresholds_[last_] <= query - keys_[num_keys_ - 1]) ++last_;
        for (std::int64_t b = last_; b < first_; ++b) {
            const std::int64_t newest = query - thresholds_[b];  // keys up to here are in a bucket above b
            std::int32_t count = counts_[b];
            while (count < num_keys_ && keys_[count] <= newest) ++count;
            counts_[b] = count;
        }
    }

    [[nodiscard]] std::int64_t first_bucket() const { return first_; }  // of key 0; buckets fall from here
    [[nodiscard]] std::int32_t run_end(std::int64_t bucket) const { return bucket > last_ ? counts_[bucket - 1] : num_keys_; }
    [[nodiscard]] bool is_last(std::int64_t bucket) const { return bucket <= last_; }
    [[nodiscard]] float value(std::int64_t bucket) const { return values_[bucket]; }

private:
    static constexpr float kNone = 0.0f;
    const std::int64_t* thresholds_;
    std::int64_t num_thresholds_;
    const float* values_;
    std::int32_t* counts_;  // of the thresholds in [last_, first_): keys of the block at least that far behind the query
    const std::int64_t* keys_;
    std::int32_t num_keys_;
    std::int64_t first_, last_;  // buckets of the block's first and last key
};

struct Run {
    std::int32_t begin, end;  // keys of the block
    std::int32_t time_bucket, position_bucket;
};

// Both biases along the keys of one block.
class BiasWalker {
public:
    static std::size_t scratch_bytes(const AttentionInputs& in) {
        return round_up(4 * (in.time.num_thresholds + in.position.num_thresholds) + 8 * kMostKeys, 64);
    }

    // The block is keys [begin, begin + num_keys) of the sequence whose first key is row k_row.
    void start(const AttentionInputs& in, std::int64_t head, std::int64_t k_row, std::int64_t begin,
               std::int64_t num_keys, void* scratch) {
        auto* positions = static_cast<std::int64_t*>(scratch);
        for (std::int64_t j = 0; j < num_keys; ++j) positions[j] = begin + j;
        auto* counts = reinterpret_cast<std::int32_t*>(positions + kMostKeys);
        has_time_ = in.time.table != nullptr;
        has_position_ = in.position.table != nullptr;
        time_.start(in.time, head, counts, has_time_ ? in.k_times + k_row + begin : positions, num_keys);
        position_.start(in.position, head, counts + in.time.num_thresholds, positions, num_keys);
    }

    void move_to(std::int64_t time, std::int64_t position) {
        if (has_time_) time_.move_to(time);
        if (has_position_) position_.move_to(position);
    }

    // Calls emit(run, bias) for the runs that cover keys [begin, end) of the block, in order.
    template <class Emit>
    void runs(std::int32_t begin, std::int32_t end, Emit emit) const {
        std::int64_t time = time_.first_bucket(), position = position_.first_bucket();
        std::int32_t time_end = time_.run_end(time), position_end = position_.run_end(position);
        while (begin < end) {
            while (time_end <= begin && !time_.is_last(time)) time_end = time_.run_end(--time);
            while (position_end <= begin && !position_.is_last(position)) position_end = position_.run_end(--position);
            const std::int32_t stop = smaller(end, smaller(time_end, position_end));
            emit(Run{begin, stop, static_cast<std::int32_t>(time), static_cast<std::int32_t>(position)},
                 time_.value(time) + position_.value(position));
            begin = stop;
        }
    }

private:
    BucketWalker time_, position_;
    bool has_time_, has_position_;
};

}  // namespace
}  // namespace alure
