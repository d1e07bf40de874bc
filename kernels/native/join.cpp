#include "join.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "join_row.h"
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
                     const std::int64_t begin = block * kValuesPerCheck, end = std::min(size, begin + kValuesPerCheck);
                     int all_valid = 1;  // without a way out of the loop, so that it becomes vectors
                     for (std::int64_t i = begin; i < end; ++i) all_valid &= valid(values[i]);
                     if (all_valid) return;
                     const auto bad = std::find_if_not(values.begin() + begin, values.begin() + end, valid);
                     const std::int64_t at = bad - values.begin();
                     std::int64_t seen = first_bad.load();
                     while (at < seen && !first_bad.compare_exchange_weak(seen, at)) {
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
        fail(std::string(name) + ": expected " + std::to_string(expected) + " values, got " +
             std::to_string(got));
}

void check(const NeighborLists& neighbors, const Engagements& engagements, const ItemRules& rules,
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

    if (!rules.eligible.empty()) check_same_length(rules.eligible.size(), limits.num_items, "eligible");
    if (!rules.groups.empty()) {
        check_same_length(rules.groups.size(), limits.num_items, "groups");
        if (rules.group_cap < 1) fail("group_cap: expected at least 1, got " + std::to_string(rules.group_cap));
    }
    if (rules.exclude_offsets.empty()) return;
    check_same_length(rules.exclude_offsets.size(), neighbors.offsets.size(), "exclude_offsets");
    check_offsets(rules.exclude_offsets, rules.exclude_items.size(), "exclude_offsets");
    for (std::size_t row = 0; row + 1 < rules.exclude_offsets.size(); ++row) {
        const auto begin = rules.exclude_items.begin() + rules.exclude_offsets[row];
        const auto end = rules.exclude_items.begin() + rules.exclude_offsets[row + 1];
        if (!std::is_sorted(begin, end))
            fail("exclude_items: expected ascending items within a row, got a descent in row " + std::to_string(row));
    }
}

std::int32_t group_of(const ItemRules& rules, std::int32_t item) {
    return rules.groups.empty() ? -1 : rules.groups[item];
}

// The groups numbered anew from 0; empty where none is beyond the number of items. Each thread has a count of every
// group up to the largest, which for a hashed id would be 8 GiB.
std::vector<std::int32_t> number_groups(std::span<const std::int32_t> groups) {
    if (groups.empty() || *std::max_element(groups.begin(), groups.end()) < static_cast<std::int64_t>(groups.size()))
        return {};
    std::vector<std::int32_t> known(groups.begin(), groups.end()), numbers(groups.size(), -1);
    std::sort(known.begin(), known.end());
    known.erase(std::unique(known.begin(), known.end()), known.end());
    for (std::size_t i = 0; i < groups.size(); ++i) {
        if (groups[i] < 0) continue;
        const auto place = std::lower_bound(known.begin(), known.end(), groups[i]);
        numbers[i] = static_cast<std::int32_t>(place - known.begin());
    }
    return numbers;
}

struct Part {  // what a chunk of rows yields, until the sizes are known
    std::vector<std::int32_t> items;
    std::vector<float> scores;
    std::vector<std::uint8_t> reasons;

    void resize(std::size_t size) {
        items.resize(size);
        scores.resize(size);
        reasons.resize(size);
    }
};

struct Scratch {
    explicit Scratch(std::int64_t num_groups) : taken(num_groups) {}

    Accumulator accumulator;
    Ranking ranking;
    std::vector<std::int32_t> taken;  // items of each group
    Part part;                        // filled again and again: its pages are there already
};

void add_up(std::int64_t row, const NeighborLists& neighbors, const Engagements& engagements, std::int64_t num_items,
            Accumulator& accumulator) {
    const std::int64_t begin = neighbors.offsets[row], end = neighbors.offsets[row + 1];
    std::int64_t most_items = 0;
    for (std::int64_t n = begin; n < end; ++n)
        most_items += engagements.offsets[neighbors.ids[n] + 1] - engagements.offsets[neighbors.ids[n]];
    accumulator.start_row(std::min(most_items, num_items));
    for (std::int64_t n = begin; n < end; ++n) {
        const double similarity = neighbors.similarities[n];
        const std::int32_t list = neighbors.ids[n];
        for (std::int64_t e = engagements.offsets[list]; e < engagements.offsets[list + 1]; ++e)
            accumulator.add(engagements.items[e], similarity * engagements.weights[e], engagements.reasons[e]);
    }
}

// Appends the best items of one row to scratch.part and returns their number.
std::int64_t join_row(std::int64_t row, const NeighborLists& neighbors, const Engagements& engagements,
                      const ItemRules& rules, const JoinLimits& limits, Scratch& scratch) {
    add_up(row, neighbors, engagements, limits.num_items, scratch.accumulator);
    std::span<const std::int32_t> excluded;
    if (!rules.exclude_offsets.empty()) {
        const std::int64_t first = rules.exclude_offsets[row];
        excluded = rules.exclude_items.subspan(first, rules.exclude_offsets[row + 1] - first);
    }
    const auto& entries = scratch.accumulator.entries();
    scratch.ranking.clear();
    for (std::size_t place = 0; place < entries.size(); ++place) {
        const auto score = static_cast<float>(entries[place].score);
        const std::int32_t item = entries[place].item;
        if (score > 0 && (rules.eligible.empty() || rules.eligible[item]) &&
            !std::binary_search(excluded.begin(), excluded.end(), item))
            scratch.ranking.offer(score, place);
    }
    const auto ranked = scratch.ranking.sorted(entries);
    Part& out = scratch.part;
    const std::size_t begin = out.items.size();
    const std::size_t most = begin + std::min<std::size_t>(ranked.size(), limits.cap);
    out.resize(most);
    std::size_t end = begin;
    for (std::size_t i = 0; i < ranked.size() && end < most; ++i) {
        const ScoredItem& entry = Ranking::entry(entries, ranked[i]);
        if (const std::int32_t group = group_of(rules, entry.item); group >= 0)
            if (scratch.taken[group]++ >= rules.group_cap) continue;
        out.items[end] = entry.item;
        out.scores[end] = Ranking::score(ranked[i]);
        out.reasons[end++] = entry.reasons;
    }
    out.resize(end);
    for (const ScoredItem& entry : entries)
        if (const std::int32_t group = group_of(rules, entry.item); group >= 0) scratch.taken[group] = 0;
    return static_cast<std::int64_t>(end - begin);
}

}  // namespace

Candidates join_candidates(const NeighborLists& neighbors, const Engagements& engagements, const ItemRules& rules,
                           const JoinLimits& limits) {
    check(neighbors, engagements, rules, limits);
    const auto rows = static_cast<std::int64_t>(neighbors.offsets.size()) - 1;
    const std::int64_t num_chunks = (rows + kRowsPerChunk - 1) / kRowsPerChunk;
    ItemRules numbered = rules;
    const std::vector<std::int32_t> numbers = number_groups(rules.groups);
    if (!numbers.empty()) numbered.groups = numbers;
    std::int64_t num_groups = 0;
    for (const std::int32_t group : numbered.groups)
        num_groups = std::max<std::int64_t>(num_groups, group + std::int64_t{1});

    Candidates out;
    out.offsets.assign(rows + 1, 0);
    std::vector<Part> parts(num_chunks);
    parallel_for(
        num_chunks, limits.num_threads, [&] { return Scratch(num_groups); },
        [&](Scratch& scratch, std::int64_t chunk) {
            const std::int64_t last = std::min(rows, (chunk + 1) * kRowsPerChunk);
            for (std::int64_t row = chunk * kRowsPerChunk; row < last; ++row)
                out.offsets[row + 1] = join_row(row, neighbors, engagements, numbered, limits, scratch);
            parts[chunk] = scratch.part;
            scratch.part.resize(0);
        });
    for (std::int64_t row = 0; row < rows; ++row) out.offsets[row + 1] += out.offsets[row];

    out.items.resize(out.offsets[rows]);
    out.scores.resize(out.offsets[rows]);
    out.reasons.resize(out.offsets[rows]);
    parallel_for(
        num_chunks, limits.num_threads, [] { return 0; },
        [&](int, std::int64_t chunk) {
            const Part part = std::move(parts[chunk]);  // its memory goes with it
            const std::int64_t o = out.offsets[chunk * kRowsPerChunk];
            std::copy(part.items.begin(), part.items.end(), out.items.begin() + o);
            std::copy(part.scores.begin(), part.scores.end(), out.scores.begin() + o);
            std::copy(part.reasons.begin(), part.reasons.end(), out.reasons.begin() + o);
        });
    return out;
}

}  // namespace alure
