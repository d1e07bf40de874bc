// The retrieval join: neighbour lists × engagement lists → the best items of each row.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace alure {

// Lists end to end; offsets [rows + 1] say where each begins. Nothing here is trusted before check() in join.cpp.
struct NeighborLists {
    std::span<const std::int64_t> offsets;
    std::span<const std::int32_t> ids;  // rows of Engagements
    std::span<const float> similarities;
};

struct Engagements {
    std::span<const std::int64_t> offsets;
    std::span<const std::int32_t> items;
    std::span<const float> weights;
    std::span<const std::uint8_t> reasons;  // bit set
};

// What a row may get; an empty span makes no rule.
struct ItemRules {
    std::span<const std::int64_t> exclude_offsets;  // [rows + 1]
    std::span<const std::int32_t> exclude_items;    // ascending within a row: not for this row
    std::span<const bool> eligible;                 // [num_items]; false: for no row
    std::span<const std::int32_t> groups;           // [num_items], negative: none
    std::int64_t group_cap = 0;                     // items of one group a row
};

struct JoinLimits {
    std::int64_t cap;        // items kept a row
    std::int64_t num_items;  // every item id is below it
    int num_threads;
};

struct Candidates {
    std::vector<std::int64_t> offsets;  // [rows + 1]
    std::vector<std::int32_t> items;
    std::vector<float> scores;
    std::vector<std::uint8_t> reasons;
};

// For each row: score(item) = Σ similarity × weight over the neighbours' engagements, added in double in the order of
// the lists, then rounded to float; reasons are OR-ed; items that the rules refuse and scores not above 0 are left out;
// of each group the best `group_cap` remain, of all the best `cap`, best first, equal scores by lower item. The result
// does not depend on the number of threads. Throws std::invalid_argument for any array that does not describe valid
// lists.
Candidates join_candidates(const NeighborLists& neighbors, const Engagements& engagements, const ItemRules& rules,
                           const JoinLimits& limits);

}  // namespace alure
