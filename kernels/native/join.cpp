#include "join.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace alure {
namespace {

constexpr std::int64_t kRowsPerChunk = 128;
constexpr std::int64_t kValuesPerCheck = 1 << 16;

[[noreturn]] void fail(const std::string& message) { throw std::invalid_argument(message); }

// Raises for the first value (in the order of the array) that `valid` refuses.
template <class T, class Valid>
void check_values(std::span<const T> values, const char* name, const std::string& expected, int num_threads,
                  Valid valid) {
    const auto size = static_cast<std::int64_t>(values.size());
    std::atomic<std::int64_t> first_bad{size};
    parallel_for((size + kValuesPerCheck - 1) / kValuesPerCheck, num_threads, [] { return 0; },
                 [&](int, std::int64_t block) {
                     const std::int64_t end = std::min(size, (block + 1) * kValuesPerCheck);
                     for (std::int64_t i = block * kValuesPerCheck; i < end; ++i) {
                         if (valid(values[i])) continue;
                         std::int64_t seen = first_bad.load();
                         while (i < seen && !first_bad.compare_exchange_weak(seen, i)) {
                         }
                         return;
                     }
                 });
    if (first_bad == size) return;
    fail(std::string(name) + ": expected " + expected + ", got " + std::to_string(values[first_bad]) + " at position " +
         std::to_string(first_bad.load()));
}

void check_offsets(std::span<const std::int64_t> offsets, std::size_t total, const char* name) {
    const std::string label(name);
    if (offsets.empty()) fail(label + ": expected shape [rows + 1], got [0]");
    if (offsets.front() != 0)
        fail(label + ": expected the first offset to be 0, got " + std::to_string(offsets.front()));
    for (std::size_t i = 0; i + 1 < offsets.size(); ++i)
        if (offsets[i + 1] < offsets[i])
            fail(label + ": expected offsets that never decrease, got " + std::to_string(offsets[i]) + " before " +
                 std::to_string(offsets[i + 1]) + " at row " + std::to_string(i));
    if (offsets.back() != static_cast<std::int64_t>(total))
        fail(label + ": expected the last offset to equal the number of values, " + std::to_string(total) + ", got " +
             std::to_string(offsets.back()));
}

void check_same_length(std::size_t got, std::size_t expected, const char* name) {
    if (got != expected)
        fail(std::string(name) + ": expected " + std::to_string(expected) + " values, one an id, got " +
             std::to_string(got));
}

void check(const NeighborLists& neighbors, const Engagements& engagements, const Exclusions& exclusions,
           const JoinLimits& limits) {
    if (limits.cap < 1) fail("cap: expected at least 1, got " + std::to_string(limits.cap));
    check_offsets(neighbors.offsets, neighbors.ids.size(), "neighbors.offsets");
    check_same_length(neighbors.similarities.size(), neighbors.ids.size(), "neighbors.similarities");
    check_offsets(engagements.offsets, engagements.items.size(), "engagements.offsets");
    check_same_length(engagements.weights.size(), engagements.items.size(), "engagements.weights");
    check_same_length(engagements.reasons.size(), engagements.items.size(), "engagements.reasons");

    const auto num_lists = static_cast<std::int64_t>(engagements.offsets.size()) - 1;
    const auto is_list = [=](std::int32_t id) { return id >= 0 && id < num_lists; };
    const auto is_item = [&](std::int32_t item) { return item >= 0 && item < limits.num_items; };
    const auto is_finite = [](float value) { return std::isfinite(value); };
    const std::string item_range = "item ids from 0 to " + std::to_string(limits.num_items - 1);
    check_values(neighbors.ids, "neighbors.ids", "rows of engagements from 0 to " + std::to_string(num_lists - 1),
                 limits.num_threads, is_list);
    check_values(neighbors.similarities, "neighbors.similarities", "finite numbers", limits.num_threads, is_finite);
    check_values(engagements.items, "engagements.items", item_range, limits.num_threads, is_item);
    check_values(engagements.weights, "engagements.weights", "finite numbers", limits.num_threads, is_finite);

    if (exclusions.offsets.empty()) return;
    if (exclusions.offsets.size() != neighbors.offsets.size())
        fail("exclude_offsets: expected " + std::to_string(neighbors.offsets.size()) +
             " values, as neighbors.offsets, got " + std::to_string(exclusions.offsets.size()));
    check_offsets(exclusions.offsets, exclusions.items.size(), "exclude_offsets");
    for (std::size_t row = 0; row + 1 < exclusions.offsets.size(); ++row) {
        const auto begin = exclusions.items.begin() + exclusions.offsets[row];
        const auto end = exclusions.items.begin() + exclusions.offsets[row + 1];
        if (!std::is_sorted(begin, end))
            fail("exclude_items: expected ascending items within a row, got a descent in row " + std::to_string(row));
    }
}

// item → (score, reasons) by open addressing; sized to the row, so it stays in the nearest cache that holds the row.
class Accumulator {
public:
    struct Entry {
        double score;
        std::int32_t item;
        std::uint8_t reasons;
    };

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

    [[nodiscard]] const std::vector<Entry>& entries() const { return entries_; }

private:
    static constexpr std::int32_t kEmpty = -1;
    std::vector<std::int32_t> slots_;  // index into entries_
    std::vector<Entry> entries_;       // in the order of first appearance
    std::uint64_t mask_ = 0;
    int shift_ = 0;
};

struct Ranked {
    std::uint64_t key;  // ascending key = best first, then lower item
    std::uint8_t reasons;
    bool operator<(const Ranked& other) const { return key < other.key; }
};

Ranked rank(float score, std::int32_t item, std::uint8_t reasons) {
    // The bits of positive floats are in the order of their values.
    const std::uint64_t descending = ~std::bit_cast<std::uint32_t>(score);
    return {descending << 32 | static_cast<std::uint32_t>(item), reasons};
}

float score_of(const Ranked& ranked) { return std::bit_cast<float>(~static_cast<std::uint32_t>(ranked.key >> 32)); }

struct Scratch {
    Accumulator accumulator;
    std::vector<Ranked> ranked;
};

// The best items of one row, in scratch.ranked.
void join_row(std::int64_t row, const NeighborLists& neighbors, const Engagements& engagements,
              const Exclusions& exclusions, const JoinLimits& limits, Scratch& scratch) {
    const std::int64_t begin = neighbors.offsets[row], end = neighbors.offsets[row + 1];
    std::int64_t most_items = 0;
    for (std::int64_t n = begin; n < end; ++n)
        most_items += engagements.offsets[neighbors.ids[n] + 1] - engagements.offsets[neighbors.ids[n]];

    Accumulator& accumulator = scratch.accumulator;
    accumulator.start_row(std::min(most_items, limits.num_items));
    for (std::int64_t n = begin; n < end; ++n) {
        const double similarity = neighbors.similarities[n];
        const std::int32_t list = neighbors.ids[n];
        for (std::int64_t e = engagements.offsets[list]; e < engagements.offsets[list + 1]; ++e)
            accumulator.add(engagements.items[e], similarity * engagements.weights[e], engagements.reasons[e]);
    }

    std::span<const std::int32_t> excluded;
    if (!exclusions.offsets.empty())
        excluded =
            exclusions.items.subspan(exclusions.offsets[row], exclusions.offsets[row + 1] - exclusions.offsets[row]);
    auto& ranked = scratch.ranked;
    ranked.clear();
    for (const auto& entry : accumulator.entries()) {
        const auto score = static_cast<float>(entry.score);
        if (score > 0 && !std::binary_search(excluded.begin(), excluded.end(), entry.item))
            ranked.push_back(rank(score, entry.item, entry.reasons));
    }
    if (static_cast<std::int64_t>(ranked.size()) > limits.cap) {
        std::nth_element(ranked.begin(), ranked.begin() + limits.cap, ranked.end());
        ranked.resize(limits.cap);
    }
    std::sort(ranked.begin(), ranked.end());
}

}  // namespace

Candidates join_candidates(const NeighborLists& neighbors, const Engagements& engagements, const Exclusions& exclusions,
                           const JoinLimits& limits) {
    check(neighbors, engagements, exclusions, limits);
    const auto rows = static_cast<std::int64_t>(neighbors.offsets.size()) - 1;
    const std::int64_t num_chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;

    Candidates out;
    out.offsets.assign(rows + 1, 0);
    std::vector<std::vector<Ranked>> chunks(num_chunks);  // what a chunk of rows yields, until the sizes are known
    parallel_for(
        num_chunks, limits.num_threads, [] { return Scratch(); },
        [&](Scratch& scratch, std::int64_t chunk) {
            for (std::int64_t row = chunk * kRowsPerChunk; row < std::min(rows, (chunk + 1) * kRowsPerChunk); ++row) {
                join_row(row, neighbors, engagements, exclusions, limits, scratch);
                out.offsets[row + 1] = static_cast<std::int64_t>(scratch.ranked.size());
                chunks[chunk].insert(chunks[chunk].end(), scratch.ranked.begin(), scratch.ranked.end());
            }
        });
    for (std::int64_t row = 0; row < rows; ++row) out.offsets[row + 1] += out.offsets[row];

    out.items.resize(out.offsets[rows]);
    out.scores.resize(out.offsets[rows]);
    out.reasons.resize(out.offsets[rows]);
    parallel_for(
        num_chunks, limits.num_threads, [] { return 0; },
        [&](int, std::int64_t chunk) {
            std::int64_t o = out.offsets[chunk * kRowsPerChunk];
            for (const Ranked& ranked : chunks[chunk]) {
                out.items[o] = static_cast<std::int32_t>(static_cast<std::uint32_t>(ranked.key));
                out.scores[o] = score_of(ranked);
                out.reasons[o++] = ranked.reasons;
            }
            std::vector<Ranked>().swap(chunks[chunk]);
        });
    return out;
}

}  // namespace alure
