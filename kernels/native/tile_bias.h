// What a part's queries and one block of keys add to their scores, and who sees whom: found once, used by every head.
#pragma once

#include "attention_mask.h"
#include "position_diagonals.h"
#include "time_buckets.h"

namespace alure {
namespace {

// Biases of a vector of a tile's queries and the keys of a strip that is seen whole. Without those of kOne.
template <LookUp kLookUp, bool kPosition>
struct WholeBias {
    TimeBuckets::Comparison comparison;  // of kCompare
    Floats lower, upper;
    Floats rows[kMostRows];  // of kRows
    const std::uint8_t* row_of;  // each key's
    Floats window;               // of kPermute
    const float* table;          // of times
    const std::int32_t* first;
    const std::uint16_t* index;
    const float* diagonal;  // of positions

    // Of the strip's key `i`.
    [[nodiscard]] Floats of(std::int64_t i) const {
        Floats bias{};
        if constexpr (kLookUp == LookUp::kCompare)
            bias = comparison.is_upper(i) ? upper : lower;
        else if constexpr (kLookUp == LookUp::kRows)
            bias = rows[row_of[i]];
        else if constexpr (kLookUp == LookUp::kPermute)
            bias = permute(window, load_indices(index + i * kLanes));
        else if constexpr (kLookUp != LookUp::kOne)
            bias = TimeBuckets::look_up<kLookUp>(table + first[i], load_indices(index + i * kLanes));
        if constexpr (kPosition) bias += load(diagonal - i);
        return bias;
    }
};

class TileBias {
public:
    // For at most `tiles` tiles of queries and `keys` keys a block, whole strips.
    TileBias(const AttentionInputs& in, const BiasTables* tables, std::int64_t tiles, std::int64_t keys,
             Arena& arena)
        : in_(in),
          tables_(tables),
          strips_(keys / kStrip),
          times_(in, tables, tiles, keys, arena),
          positions_(in, tiles * kWidth, keys, arena),
          seen_begin_(arena.array<std::int32_t>(tiles * kWidth)),
          seen_end_(arena.array<std::int32_t>(tiles * kWidth)),
          sights_(arena.array<Sight>(tiles * strips_)) {}

    void start_part(const Sequence& sequence, const Part& part) {
        sequence_ = &sequence;
        rows_ = part.end - part.begin;
        position_ = part.begin + sequence.shift;
        times_.start_part(sequence.q_row + part.begin, rows_);
        for (std::int64_t i = 0; i < round_up(rows_, kWidth); ++i) {
            const Range seen = sequence.mask.seen(position_ + i);
            seen_begin_[i] = static_cast<std::int32_t>(seen.begin);
            seen_end_[i] = static_cast<std::int32_t>(seen.end);
        }
    }

    void start_block(std::int64_t block, std::int64_t end) {
        block_ = block;
        num_keys_ = end - block;
        head_ = -1;
        times_.start_block(sequence_->k_row + block, num_keys_);
        positions_.start_block(position_, rows_, block, block + round_up(num_keys_, kStrip));
        for (std::int64_t tile = 0; tile * kWidth < rows_; ++tile) {
            find_sights(tile);
            times_.find(tile);
        }
    }

    void start_head(std::int64_t head) {
        if (head == head_) return;
        head_ = head;
        const std::int64_t table = sequence_->group * in_.heads + head;
        if (in_.time.table) time_table_ = tables_->time + table * tables_->time_stride;
        if (in_.position.table) positions_.start_head(tables_->position + table * tables_->position_stride);
    }

    [[nodiscard]] std::int64_t num_strips() const { return (num_keys_ + kStrip - 1) / kStrip; }
    // Of some strips of the block, from the first to the last of which any is seen.
    [[nodiscard]] Range seen_strips(std::int64_t tile, Range range) const {
        const Sight* sights = sights_ + tile * strips_;
        while (!range.empty() && sights[range.begin] == Sight::kHidden) ++range.begin;
        while (!range.empty() && sights[range.end - 1] == Sight::kHidden) --range.end;
        return range;
    }
    // Whole strips have no targets with a position bias.
    [[nodiscard]] Sight sight(std::int64_t tile, std::int64_t strip) const { return sights_[tile * strips_ + strip]; }

    [[nodiscard]] const Strip& strip(std::int64_t tile, std::int64_t strip) const { return times_.strips(tile)[strip]; }
    [[nodiscard]] float of_bucket(std::int32_t bucket) const { return in_.time.table ? time_table_[bucket] : 0.0f; }

    template <LookUp kLookUp, bool kPosition>
    [[nodiscard]] WholeBias<kLookUp, kPosition> whole(std::int64_t tile, std::int64_t strip, int v,
                                                       std::int32_t bucket) const {
        const std::int64_t key = strip * kStrip;
        WholeBias<kLookUp, kPosition> bias;  // zeroing it took 9 % of a forward
        if constexpr (kLookUp == LookUp::kCompare) {
            bias.comparison = times_.comparison(tile, key, v, bucket);
            bias.lower = splat(time_table_[bucket]);
            bias.upper = splat(time_table_[bucket + 1]);
        } else if constexpr (kLookUp == LookUp::kRows) {
            const BucketRows& rows = times_.rows(tile, strip, v);
            const Floats window = load(time_table_ + bucket);
            for (int row = 0; row < kMostRows; ++row) bias.rows[row] = permute(window, load_indices(rows.index[row]));
            bias.row_of = rows.of_key;
        } else if constexpr (kLookUp != LookUp::kOne) {
            bias.table = time_table_;
            bias.first = times_.first(tile, key, v);
            bias.index = times_.index(tile, key, v);
            if constexpr (kLookUp == LookUp::kPermute) bias.window = load(time_table_ + bucket);
        }
        if constexpr (kPosition) bias.diagonal = positions_.diagonal(position_of(tile, v), block_ + key);
        return bias;
    }

    // Biases of vector `v` of a tile's queries and one key of any strip, with those of kOne, −inf where it is hidden.
    [[nodiscard]] Floats masked(std::int64_t tile, std::int64_t key, int v) const {
        const std::int64_t i = position_of(tile, v), j = block_ + key;
        Floats bias{};
        if (in_.time.table) {
            const Look look = strip(tile, key / kStrip).tile;
            if (look.look_up == LookUp::kOne) {
                bias = splat(of_bucket(look.bucket));
            } else {
                const auto [first, index] = times_.indices(tile, key, v);
                bias = gather(time_table_ + first, index);
            }
        }
        if (in_.position.table) bias += positions_.values(i, j, sequence_->mask.history());
        return seen(tile * kWidth + v * kLanes, i, j) ? bias : splat(-kInfinity);
    }

    [[nodiscard]] const TimeBuckets& times() const { return times_; }
    [[nodiscard]] const PositionDiagonals& positions() const { return positions_; }
    [[nodiscard]] std::int64_t position_of(std::int64_t tile, int v) const {
        return position_ + tile * kWidth + v * kLanes;
    }
    [[nodiscard]] std::int64_t history() const { return sequence_->mask.history(); }
    [[nodiscard]] std::int64_t block() const { return block_; }
    [[nodiscard]] std::int64_t rows() const { return rows_; }
    [[nodiscard]] std::int64_t num_keys() const { return num_keys_; }

private:
    void find_sights(std::int64_t tile) {
        const std::int64_t first = position_ + tile * kWidth;
        const std::int64_t last = first + smaller<std::int64_t>(kWidth, rows_ - tile * kWidth) - 1;
        const bool has_targets = in_.position.table && last > history();  // they have no diagonals of one bias
        Sight* sights = sights_ + tile * strips_;
        for (std::int64_t begin = 0; begin < num_keys_; begin += kStrip) {
            const std::int64_t end = smaller(begin + kStrip, num_keys_);
            const Sight sight = sequence_->mask.sight(first, last, block_ + begin, block_ + end);
            *sights++ = sight == Sight::kWhole && has_targets ? Sight::kMasked : sight;
        }
    }

    // Which of the queries from row `row` of the part, position i, see key j.
    [[nodiscard]] Ints seen(std::int64_t row, std::int64_t i, std::int64_t j) const {
        const auto key = static_cast<std::int32_t>(j);
        if (j < sequence_->mask.contexts()) return splat(std::int32_t{-1});
        if (j >= history()) return lane_numbers() == static_cast<std::int32_t>(j - i);
        return (load_ints(seen_begin_ + row) <= key) & (load_ints(seen_end_ + row) > key);
    }

    const AttentionInputs& in_;
    const BiasTables* tables_;
    const std::int64_t strips_;  // of a block
    TimeBuckets times_;
    PositionDiagonals positions_;
    std::int32_t *seen_begin_, *seen_end_;  // [queries] the history that each query sees
    Sight* sights_;                         // [tiles, strips]
    const Sequence* sequence_ = nullptr;
    const float* time_table_ = nullptr;
    std::int64_t rows_ = 0, position_ = 0;   // of the part
    std::int64_t block_ = 0, num_keys_ = 0;  // first key of the block, and how many
    std::int64_t head_ = -1;                 // that the tables are of; −1: none yet in this block
};

// Calls work<look-up, position>() for a whole strip.
template <class Work>
inline void with_look_up(LookUp look_up, bool position, Work work) {
    const auto with_position = [&]<LookUp kLookUp>() {
        if (position)
            work.template operator()<kLookUp, true>();
        else
            work.template operator()<kLookUp, false>();
    };
    switch (look_up) {
        case LookUp::kOne:
            return with_position.template operator()<LookUp::kOne>();
        case LookUp::kCompare:
            return with_position.template operator()<LookUp::kCompare>();
        case LookUp::kRows:
            return with_position.template operator()<LookUp::kRows>();
        case LookUp::kPermute:
            return with_position.template operator()<LookUp::kPermute>();
        case LookUp::kPermuteTwo:
            return with_position.template operator()<LookUp::kPermuteTwo>();
        case LookUp::kPermuteFour:
            return with_position.template operator()<LookUp::kPermuteFour>();
        case LookUp::kGather:
            return with_position.template operator()<LookUp::kGather>();
    }
}

}  // namespace
}  // namespace alure
