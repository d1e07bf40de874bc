// Personalized PageRank from many sources, the best k nodes of each.
#pragma once

#include <cstdint>
#include <span>

namespace alure {

// Node u's edges lead to neighbors[offsets[u] … offsets[u + 1]). Trusted: Python has checked offsets, ids and weights.
struct DirectedGraph {
    std::span<const std::int64_t> offsets;    // [nodes + 1]
    std::span<const std::int32_t> neighbors;  // [edges]
    std::span<const float> weights;           // [edges], above 0; empty: all alike

    [[nodiscard]] std::int64_t num_nodes() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
    [[nodiscard]] std::int64_t num_edges() const { return static_cast<std::int64_t>(neighbors.size()); }
};

struct PageRankSettings {
    std::int64_t k;
    double alpha;    // of a restart at each step
    double epsilon;  // of the k-th score: a node passes on what would bring a neighbour at least that much
    int num_threads;
};

// Row i belongs to sources[i].
struct PageRankOutput {
    float* scores;      // [sources, k], best first; 0 = none
    std::int64_t* ids;  // [sources, k]; −1 = none
    float* lost;        // [sources]: 1 − the sum of all nodes' scores
};

// A row depends on its source only: not on the other sources, nor on the number of threads.
void personalized_pagerank(const DirectedGraph& graph, std::span<const std::int64_t> sources,
                           const PageRankSettings& settings, const PageRankOutput& out);

}  // namespace alure
