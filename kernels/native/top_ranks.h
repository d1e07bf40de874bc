// The k best of many (score, id), equal scores by lower id.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

namespace alure {

class TopRanks {
public:
    explicit TopRanks(std::int64_t k) : k_(static_cast<std::size_t>(k)) {}

    void clear() {
        keys_.clear();
        worst_ = std::numeric_limits<std::uint64_t>::max();
    }

    // Scores that are not above 0 are no candidates.
    void offer(float score, std::int32_t id) {
        if (!(score > 0)) return;
        // The bits of positive floats are in the order of their values: an ascending key is best first.
        const std::uint64_t descending = ~std::bit_cast<std::uint32_t>(score);
        const std::uint64_t key = descending << 32 | static_cast<std::uint32_t>(id);
        if (key > worst_) return;
        keys_.push_back(key);
        if (keys_.size() >= 2 * k_ + kSlack) keep_best();
    }

    // The k-th best score; 0 where there are fewer.
    [[nodiscard]] float last_score() {
        keep_best();
        return keys_.size() < k_ ? 0.0f : score_of(worst_);
    }

    void write(float* scores, std::int64_t* ids) {
        keep_best();
        std::sort(keys_.begin(), keys_.end());
        for (std::size_t i = 0; i < k_; ++i) {
            const bool present = i < keys_.size();
            scores[i] = present ? score_of(keys_[i]) : 0.0f;
            ids[i] = present ? static_cast<std::int64_t>(static_cast<std::uint32_t>(keys_[i])) : -1;
        }
    }

private:
    static constexpr std::size_t kSlack = 64;

    static float score_of(std::uint64_t key) { return std::bit_cast<float>(~static_cast<std::uint32_t>(key >> 32)); }

    void keep_best() {
        if (keys_.size() < k_) return;
        std::nth_element(keys_.begin(), keys_.begin() + static_cast<std::ptrdiff_t>(k_) - 1, keys_.end());
        keys_.resize(k_);
        worst_ = keys_.back();
    }

    std::size_t k_;
    std::vector<std::uint64_t> keys_;
    std::uint64_t worst_ = std::numeric_limits<std::uint64_t>::max();  // of k keys seen
};

}  // namespace alure
