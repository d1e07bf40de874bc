// What both ways of computing Personalized PageRank share: the walk, and ranks from visits.
//
// y(v): how often walks that start at s visit v before they come back to s; y(s) = 1. At each step a walk stops with
// probability α or follows an edge, chosen by weight; from a node without edges it returns to s, as in networkx. With ρ
// the probability of coming back, walks come back again and again, so that p(v) = α y(v) / (1 − ρ). To ask for y rather
// than p spares all the visits of s after the first, and makes nodes without edges ends like any other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pagerank.h"

namespace alure {

// Smallest share that is passed on, whatever ε and the k-th score; visits are of the order of 1.
constexpr double kLeastShare = 1e-15;

// A visit of u gives `onward × weight` to each neighbour. Nodes without edges: onward = 1, heaviest = 0.
struct Onward {
    std::vector<double> onward;    // (1 − α) ÷ Σ weights
    std::vector<double> heaviest;  // the largest weight

    Onward(const DirectedGraph& graph, double alpha)
        : onward(static_cast<std::size_t>(graph.num_nodes()), 1.0), heaviest(onward.size(), 0.0) {
        for (std::int64_t u = 0; u < graph.num_nodes(); ++u) {
            const std::int64_t begin = graph.offsets[u], end = graph.offsets[u + 1];
            if (begin == end) continue;
            double sum = static_cast<double>(end - begin), most = 1.0;
            if (!graph.weights.empty()) {
                sum = most = 0.0;
                for (std::int64_t e = begin; e < end; ++e) {
                    sum += graph.weights[e];
                    most = std::max<double>(most, graph.weights[e]);
                }
            }
            onward[u] = (1.0 - alpha) / sum;
            heaviest[u] = most;
        }
    }

    [[nodiscard]] bool is_end(std::int64_t u) const { return heaviest[u] == 0.0; }
    [[nodiscard]] double largest_share(std::int64_t u) const { return onward[u] * heaviest[u]; }
};

// The sums over a source's visits that turn them into probabilities.
struct VisitSums {
    double visits = 1.0;    // Σ y, the source's own among them
    double returned = 0.0;  // ρ

    [[nodiscard]] double scale(double alpha) const { return alpha / (1.0 - returned); }
    // Computed visits fall short of y, so scores of p: by so much in all.
    [[nodiscard]] float lost(double alpha) const {
        return static_cast<float>(std::max(0.0, 1.0 - visits * scale(alpha)));
    }
};

}  // namespace alure
