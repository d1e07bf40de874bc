// One row of the retrieval join: scores added up by item, then the items in order.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace alure {

struct ScoredItem {
    double score;
    std::int32_t item;
    std::uint8_t reasons;
};

// item → (score, reasons) by open addressing; sized to the row, so it stays in the nearest cache that holds the row.
class Accumulator {
public:
    void start_row(std::int64_t most_items) {
        entries_.clear();
        const auto wanted = std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(most_items, 8)) * 2);
        slots_.assign(wanted, kEmpty);  // keeps its storage
        shift_ = 64 - std::countr_zero(wanted);
        mask_ = wanted - 1;
    }

    void add(std::int32_t item, double score, std::uint8_t reasons) {
        // Fibonacci hashing spreads the runs of neighbouring ids that an account's ads form.
        std::uint64_t slot = (static_cast<std::uint64_t>(item) * 0x9E3779B97F4A7C15u) >> shift_;
        for (;; slot = (slot + 1) & mask_) {
            const std::int32_t entry = slots_[slot];
            if (entry == kEmpty) {
                slots_[slot] = static_cast<std::int32_t>(entries_.size());
                entries_.push_back({score, item, reasons});
                return;
            }
            if (entries_[entry].item == item) {
                entries_[entry].score += score;
                entries_[entry].reasons |= reasons;
                return;
            }
        }
    }

    [[nodiscard]] const std::vector<ScoredItem>& entries() const { return entries_; }

private:
    static constexpr std::int32_t kEmpty = -1;
    std::vector<std::int32_t> slots_;  // index into entries_
    std::vector<ScoredItem> entries_;  // in the order of first appearance
    std::uint64_t mask_ = 0;
    int shift_ = 0;
};

// Places of scores above 0, best first, equal scores by lower item.
class Ranking {
public:
    void clear() { keys_.clear(); }

    void offer(float score, std::size_t place) {
        // The bits of positive floats are in the order of their values: an ascending key is best first.
        const std::uint64_t descending = ~std::bit_cast<std::uint32_t>(score);
        keys_.push_back(descending << 32 | place);
    }

    // `entries`: what the places are of.
    std::span<const std::uint64_t> sorted(const std::vector<ScoredItem>& entries) {
        const auto by_item = [&](std::uint64_t a, std::uint64_t b) { return item(entries, a) < item(entries, b); };
        if (keys_.size() < kLeastRadix)
            std::sort(keys_.begin(), keys_.end());
        else
            radix_sort();
        for (std::size_t first = 0, last; first < keys_.size(); first = last) {
            for (last = first + 1; last < keys_.size() && keys_[last] >> 32 == keys_[first] >> 32;) ++last;
            if (last - first > 1) std::sort(keys_.begin() + first, keys_.begin() + last, by_item);
        }
        return keys_;
    }

    static float score(std::uint64_t key) { return std::bit_cast<float>(~static_cast<std::uint32_t>(key >> 32)); }
    static const ScoredItem& entry(const std::vector<ScoredItem>& entries, std::uint64_t key) {
        return entries[static_cast<std::uint32_t>(key)];
    }

private:
    static constexpr std::size_t kLeastRadix = 96;  // fewer are sorted faster by comparisons
    static constexpr int kDigits = 4;               // bytes of a score

    static std::int32_t item(const std::vector<ScoredItem>& entries, std::uint64_t key) {
        return entry(entries, key).item;
    }

    // By the score's four bytes, least first; a byte that all keys share takes no pass.
    void radix_sort() {
        std::array<std::array<std::uint32_t, 256>, kDigits> counts{};
        for (const std::uint64_t key : keys_)
            for (int d = 0; d < kDigits; ++d) ++counts[d][key >> (32 + 8 * d) & 255];
        spare_.resize(keys_.size());
        for (int d = 0; d < kDigits; ++d) {
            const int shift = 32 + 8 * d;
            if (counts[d][keys_[0] >> shift & 255] == keys_.size()) continue;
            std::uint32_t before = 0;
            for (std::uint32_t& count : counts[d]) before += std::exchange(count, before);
            for (const std::uint64_t key : keys_) spare_[counts[d][key >> shift & 255]++] = key;
            keys_.swap(spare_);
        }
    }

    std::vector<std::uint64_t> keys_, spare_;
};

}  // namespace alure
