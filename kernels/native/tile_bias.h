// The biases of a tile of queries against a block of keys in the backward: prepared once, used by every head, and the
// gradients of the tables.
#pragma once

#include "attention_mask.h"
#include "scratch.h"

namespace alure {
namespace {

// Times are sorted, so along a row of keys the time bucket only falls: a row is a few runs of one bucket, found without
// a logarithm or a gather.
struct Run {
    std::int32_t end;  // key of the block after the run's last
    std::int32_t bucket;
};

// The runs of one query after another, whose times never fall, over one block of sorted keys.
class RunFinder {
public:
    // reached: scratch of as many integers as there are thresholds. num_keys >= 1.
    void start(const BucketTable& table, const std::int64_t* keys, std::int64_t num_keys, std::int32_t* reached) {
        thresholds_ = table.thresholds;
        num_thresholds_ = static_cast<std::int32_t>(table.num_thresholds);
        keys_ = keys;
        num_keys_ = static_cast<std::int32_t>(num_keys);
        reached_ = reached;
        for (std::int32_t b = 0; b < num_thresholds_; ++b) reached_[b] = 0;
        first_ = 0;
    }

    // Writes the runs of a query at time `query`, at most num_keys; returns the end of what it wrote.
    Run* find(std::int64_t query, Run* runs) {
        while (first_ < num_thresholds_ && thresholds_[first_] <= query - keys_[0]) ++first_;
        const std::int64_t least = query - keys_[num_keys_ - 1];
        std::int32_t bucket = first_, key = 0;
        while (bucket > 0 && thresholds_[bucket - 1] > least) {
            // The boundary only moves on from query to query, so the search goes on where it stopped.
            const std::int64_t newest = query - thresholds_[bucket - 1];
            std::int32_t end = larger(reached_[bucket - 1], key + 1);
            while (end < num_keys_ && keys_[end] <= newest) ++end;
            reached_[bucket - 1] = end;
            *runs++ = {end, bucket};
            if (end == num_keys_) return runs;
            key = end;
            const std::int64_t elapsed = query - keys_[key];
            do --bucket;
            while (bucket > 0 && thresholds_[bucket - 1] > elapsed);
        }
        *runs++ = {num_keys_, bucket};
        return runs;
    }

private:
    const std::int64_t* thresholds_ = nullptr;
    std::int32_t num_thresholds_ = 0;
    const std::int64_t* keys_ = nullptr;
    std::int32_t num_keys_ = 0;
    std::int32_t* reached_ = nullptr;  // for each threshold, a key not beyond the boundary of any query to come
    std::int32_t first_ = 0;           // bucket of key 0
};

class TileBias {
public:
    // For tiles of at most `rows` queries and blocks of at most `keys` keys.
    TileBias(const AttentionInputs& in, std::int64_t rows, std::int64_t keys, Arena& arena)
        : in_(in), has_time_(in.time.table != nullptr), has_position_(in.position.table != nullptr) {
        if (has_time_) {
            reached_ = arena.array<std::int32_t>(in.time.num_thresholds);
            runs_ = arena.array<Run>(rows * keys);
            row_runs_ = arena.array<Run*>(rows + 1);
        }
        if (has_position_) {
            while (zero_bucket_ < in.position.num_thresholds && in.position.thresholds[zero_bucket_] <= 0)
                ++zero_bucket_;
            diagonal_buckets_ = arena.array<std::int32_t>(rows + keys);
            diagonal_values_ = arena.array<float>(rows + keys + 2 * kLanes);
            diagonal_sums_ = arena.array<float>(rows + keys + 2 * kLanes);
        }
    }

    void start_block(std::int64_t k_row, std::int64_t first_key, std::int64_t num_keys) {
        first_key_ = first_key;
        num_keys_ = num_keys;
        if (has_time_) finder_.start(in_.time, in_.k_times + k_row, num_keys, reached_);
    }

    // Queries from row q_row of the packed tensors, at positions from `first` of their sequence.
    void start_tile(const Mask& mask, std::int64_t q_row, std::int64_t first, std::int64_t rows) {
        history_ = mask.history();
        first_ = first;
        if (has_time_) {
            row_runs_[0] = runs_;
            for (std::int64_t r = 0; r < rows; ++r)
                row_runs_[r + 1] = finder_.find(in_.q_times[q_row + r], row_runs_[r]);
        }
        if (!has_position_) return;
        // A position bucket depends on query − key alone, so a row's biases are a stretch of the same array, shifted.
        newest_ = smaller(first + rows - 1, history_);
        num_diagonals_ = newest_ - smaller(first, history_) + num_keys_;
        std::int64_t bucket = in_.position.num_thresholds;
        for (std::int64_t x = 0; x < num_diagonals_; ++x) {
            while (bucket > 0 && in_.position.thresholds[bucket - 1] > newest_ - first_key_ - x) --bucket;
            diagonal_buckets_[x] = static_cast<std::int32_t>(bucket);
        }
    }

    // `table`: group · heads + head.
    void start_head(std::int64_t table) {
        if (has_time_) time_values_ = in_.time.table + table * (in_.time.num_thresholds + 1);
        if (!has_position_) return;
        position_values_ = in_.position.table + table * (in_.position.num_thresholds + 1);
        for (std::int64_t x = 0; x < num_diagonals_; ++x) {
            diagonal_values_[x] = position_values_[diagonal_buckets_[x]];
            diagonal_sums_[x] = 0.0f;
        }
        for (int i = 0; i < 2 * kLanes; ++i) diagonal_sums_[num_diagonals_ + i] = 0.0f;
        target_sum_ = 0.0;
    }

    // Biases of query `row` of the tile into logits[written), whole vectors.
    void write(std::int64_t row, Range written, float* logits) const {
        if (has_time_)
            write_time(row, written, logits);
        else
            fill(logits, written, Floats{});
        if (!has_position_) return;
        const std::int64_t target = target_of(row);
        const float at_target = target < 0 ? 0.0f : logits[target] + position_values_[zero_bucket_];
        const float* values = diagonal_values_ + diagonal_of(row);
        for (std::int64_t j = written.begin; j < written.end; j += kLanes)
            store(logits + j, load(logits + j) + load(values + j));
        if (target >= 0) logits[target] = at_target;
    }

    // Adds a row of gradients of logits (0 where hidden, whole vectors) to the sums by bucket.
    void add_gradients(std::int64_t row, const float* d_logits, double* d_time) {
        if (has_time_) {
            std::int32_t begin = 0;
            for (const Run* run = row_runs_[row]; run != row_runs_[row + 1]; begin = run++->end)
                d_time[run->bucket] += sum_of(d_logits, begin, run->end);
        }
        if (!has_position_) return;
        const std::int64_t target = target_of(row);
        float* sums = diagonal_sums_ + diagonal_of(row);
        const float before = target < 0 ? 0.0f : sums[target];
        for (std::int64_t j = 0; j < num_keys_; j += kLanes) store(sums + j, load(sums + j) + load(d_logits + j));
        if (target < 0) return;
        sums[target] = before;
        target_sum_ += d_logits[target];
    }

    void finish_head(double* d_position) const {
        if (!has_position_) return;
        for (std::int64_t x = 0; x < num_diagonals_; ++x) d_position[diagonal_buckets_[x]] += diagonal_sums_[x];
        d_position[zero_bucket_] += target_sum_;
    }

private:
    // Targets all stand right after the history, where the diagonals end; a target's own key, where it is one of the
    // block (−1 else), stands there too.
    [[nodiscard]] std::int64_t diagonal_of(std::int64_t row) const { return newest_ - smaller(first_ + row, history_); }
    [[nodiscard]] std::int64_t target_of(std::int64_t row) const {
        const std::int64_t i = first_ + row, key = i - first_key_;
        return i >= history_ && key >= 0 && key < num_keys_ ? key : -1;
    }

    void write_time(std::int64_t row, Range written, float* logits) const {
        const Run* run = row_runs_[row];
        while (run->end <= written.begin) ++run;
        std::int64_t j = written.begin;
        for (; run != row_runs_[row + 1]; ++run) {
            const Floats value = splat(time_values_[run->bucket]);
            const std::int64_t end = smaller<std::int64_t>(run->end, written.end);
            fill(logits, {j, end}, value);
            if (end == written.end) return;
            j = end;
        }
    }

    static float sum_of(const float* values, std::int32_t begin, std::int32_t end) {
        Floats sum{};
        for (; begin + kLanes <= end; begin += kLanes) sum += load(values + begin);
        if (begin < end) sum += lane_numbers() < end - begin ? load(values + begin) : Floats{};
        return sum_of_lanes(sum);
    }

    const AttentionInputs& in_;
    const bool has_time_, has_position_;
    RunFinder finder_;
    std::int32_t* reached_ = nullptr;
    Run* runs_ = nullptr;
    Run** row_runs_ = nullptr;  // [rows + 1] where each row's runs begin
    const float* time_values_ = nullptr;
    std::int32_t* diagonal_buckets_ = nullptr;  // from the newest query and oldest key on
    float *diagonal_values_ = nullptr, *diagonal_sums_ = nullptr;
    const float* position_values_ = nullptr;
    double target_sum_ = 0.0;  // of the logits between a target and itself
    std::int64_t zero_bucket_ = 0, num_diagonals_ = 0;
    std::int64_t first_key_ = 0, num_keys_ = 0;  // of the block
    std::int64_t first_ = 0, newest_ = 0;        // positions of the tile's first query, and of its last, if of history
    std::int64_t history_ = 0;
};

}  // namespace
}  // namespace alure
