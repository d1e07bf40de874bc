// Which keys a query sees, and how a rectangle of queries and keys stands to that.
#pragma once

#include "attention_kernels.h"
#include "simd.h"

namespace alure {
namespace {

// Of a rectangle of queries × keys: nobody sees any key, some pairs are hidden, all are seen.
enum class Sight { kHidden, kMasked, kWhole };

// One sequence. Queries are named by their position i: the last rows of q and k are aligned.
class Mask {
public:
    Mask(const AttentionInputs& in, std::int64_t sequence, std::int64_t num_keys) : num_keys_(num_keys) {
        history_ = num_keys;
        if (!in.rules) return;
        const Rules rules = in.rules[sequence];
        left_ = within(rules.left, kUnlimited);
        right_ = within(rules.right, kUnlimited);
        contexts_ = within(rules.contexts, num_keys);
        history_ = num_keys - within(rules.targets, num_keys);
        everyone_ = history_ == num_keys && left_ == kUnlimited && right_ == kUnlimited;
    }

    [[nodiscard]] std::int64_t history() const { return history_; }    // keys before the targets
    [[nodiscard]] std::int64_t contexts() const { return contexts_; }  // the first keys, which everyone sees
    [[nodiscard]] std::int64_t num_keys() const { return num_keys_; }

    // The history that query i sees, besides the contexts. A target also sees itself.
    [[nodiscard]] Range seen(std::int64_t i) const {
        if (everyone_ || (i >= 0 && i < contexts_)) return {0, history_};
        const std::int64_t position = smaller(i, history_);
        return {larger<std::int64_t>(position - left_, 0), smaller(history_, position + right_ + 1)};
    }

    // Queries first..last against keys [begin, end). Exact but for kMasked, which is what is not quickly known to be
    // another.
    [[nodiscard]] Sight sight(std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) const {
        if (everyone_ || end <= contexts_) return Sight::kWhole;
        const bool meets_context_query = last >= 0 && first < contexts_;
        const std::int64_t first_position = smaller(first, history_), last_position = smaller(last, history_);
        const std::int64_t newest = smaller(history_, first_position + right_ + 1);  // end of what all see
        if (last_position - left_ <= begin && end <= newest) return Sight::kWhole;
        const bool in_window = begin < smaller(history_, last_position + right_ + 1) && first_position - left_ < end;
        const bool meets_itself = end > history_ && last >= begin && first < end && last >= history_;
        if (begin < contexts_ || in_window || meets_itself || (meets_context_query && begin < history_))
            return Sight::kMasked;
        return Sight::kHidden;
    }

private:
    static constexpr std::int64_t kUnlimited = 1 << 30;  // beyond every position
    static std::int64_t within(std::int64_t x, std::int64_t most) { return smaller(larger<std::int64_t>(x, 0), most); }

    std::int64_t num_keys_, history_, contexts_ = 0, left_ = kUnlimited, right_ = kUnlimited;
    bool everyone_ = true;
};

struct Sequence {
    Sequence(const AttentionInputs& in, std::int64_t index)
        : q_row(in.q_offsets[index]),
          num_queries(in.q_offsets[index + 1] - q_row),
          k_row(in.k_offsets[index]),
          num_keys(in.k_offsets[index + 1] - k_row),
          shift(num_keys - num_queries),
          group(in.groups ? in.groups[index] : 0),
          mask(in, index, num_keys) {}

    std::int64_t q_row, num_queries, k_row, num_keys;  // first rows and lengths
    std::int64_t shift;                                // position of query 0: the last rows are aligned
    std::int64_t group;                                // which tables it reads
    Mask mask;
};

}  // namespace
}  // namespace alure
