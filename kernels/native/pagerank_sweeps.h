// Visits of all nodes from eight sources at once: Gauss–Seidel sweeps, one cache line a node and one lane a source.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "pagerank_visits.h"
#include "top_ranks.h"

namespace alure {

// The edges by where they lead to; those of one node in the order of where they come from.
struct IncomingEdges {
    std::vector<std::int64_t> offsets;  // [nodes + 1]
    std::vector<std::int32_t> from;     // [edges]
    std::vector<float> weights;         // [edges] or empty

    explicit IncomingEdges(const DirectedGraph& graph)
        : offsets(graph.offsets.size(), 0), from(graph.neighbors.size()), weights(graph.weights.size()) {
        const std::int64_t n = graph.num_nodes();
        for (const std::int32_t v : graph.neighbors) ++offsets[v + 1];
        for (std::int64_t v = 0; v < n; ++v) offsets[v + 1] += offsets[v];
        std::vector<std::int64_t> place(offsets.begin(), offsets.end() - 1);
        for (std::int64_t u = 0; u < n; ++u)
            for (std::int64_t e = graph.offsets[u]; e < graph.offsets[u + 1]; ++e) {
                const std::int64_t at = place[graph.neighbors[e]]++;
                from[at] = static_cast<std::int32_t>(u);
                if (!weights.empty()) weights[at] = graph.weights[e];
            }
    }
};

// A source and its row of the output; its visits are found once no node's share changes by `share`.
struct SweptSource {
    std::int32_t node;
    std::int64_t row;
    double share;
};

// A thread's working memory: 64 bytes a node.
template <bool kWeighted>
class Sweeps {
public:
    static constexpr int kLanes = 8;

    Sweeps(const IncomingEdges& edges, const Onward& onward, const PageRankSettings& settings)
        : edges_(edges), onward_(onward), settings_(settings), top_(settings.k), shares_(onward.onward.size()),
          starts_(onward.onward.size(), 0) {}

    // Up to kLanes sources. Lanes do not mix, and each is read after the sweep in which it is found.
    void run(std::span<const SweptSource> sources, const PageRankOutput& out) {
        std::fill(shares_.begin(), shares_.end(), Lanes{});
        for (std::size_t lane = 0; lane < sources.size(); ++lane) {
            const std::int32_t s = sources[lane].node;
            starts_[s] |= static_cast<std::uint8_t>(1u << lane);
            shares_[s].set(lane, onward_.onward[s]);
        }
        // Each sweep leaves at most 1 − α of what was missing, so this many leave less than rounding does.
        const auto most = static_cast<std::int64_t>(std::ceil(std::log(1e-17) / std::log1p(-settings_.alpha)));
        unsigned running = (1u << sources.size()) - 1;
        for (std::int64_t done = 1; running; ++done) {
            sweep();
            for (std::size_t lane = 0; lane < sources.size(); ++lane)
                if ((running >> lane & 1) && (changed_.get(lane) < sources[lane].share || done >= most)) {
                    write(lane, sources[lane], out);
                    running &= ~(1u << lane);
                }
        }
        for (const SweptSource& source : sources) starts_[source.node] = 0;
    }

private:
    // 16-byte vectors, which every x86-64 and ARMv8 has. Twice as wide ones gain a quarter to a third.
    typedef double Pair __attribute__((vector_size(16)));

    struct alignas(64) Lanes {
        std::array<Pair, kLanes / 2> pairs{};

        [[nodiscard]] double get(std::size_t lane) const { return pairs[lane / 2][lane % 2]; }
        void set(std::size_t lane, double x) { pairs[lane / 2][lane % 2] = x; }
    };

    // y(v) = Σ over edges u → v of weight × (y(u) × onward(u)), in the order of nodes, with the newest y(u).
    void sweep() {
        visits_ = returned_ = changed_ = Lanes{};
        const auto n = static_cast<std::int64_t>(shares_.size());
        for (std::int64_t v = 0; v < n; ++v) {
            Lanes y;
            for (std::int64_t e = edges_.offsets[v]; e < edges_.offsets[v + 1]; ++e) {
                const Lanes& share = shares_[edges_.from[e]];
                for (int j = 0; j < kLanes / 2; ++j)
                    y.pairs[j] += kWeighted ? share.pairs[j] * static_cast<double>(edges_.weights[e]) : share.pairs[j];
            }
            if (starts_[v]) [[unlikely]]
                come_back(v, y);
            const double onward = onward_.onward[v], heaviest = onward_.heaviest[v];
            const double to_source = heaviest == 0.0 ? 1.0 - settings_.alpha : 0.0;
            Lanes& share = shares_[v];
            for (int j = 0; j < kLanes / 2; ++j) {
                const Pair now = y.pairs[j] * onward;
                const Pair change = (now - share.pairs[j]) * heaviest;
                changed_.pairs[j] = change > changed_.pairs[j] ? change : changed_.pairs[j];
                visits_.pairs[j] += y.pairs[j];
                returned_.pairs[j] += y.pairs[j] * to_source;
                share.pairs[j] = now;
            }
        }
    }

    // The lanes whose source is v: its visits are 1, and what leads to it has come back.
    void come_back(std::int64_t v, Lanes& y) {
        for (int lane = 0; lane < kLanes; ++lane)
            if (starts_[v] >> lane & 1) {
                returned_.set(lane, returned_.get(lane) + y.get(lane));
                y.set(lane, 1.0);
            }
    }

    void write(std::size_t lane, const SweptSource& source, const PageRankOutput& out) {
        const VisitSums sums{.visits = visits_.get(lane), .returned = returned_.get(lane)};
        const double scale = sums.scale(settings_.alpha);
        top_.clear();
        for (std::size_t v = 0; v < shares_.size(); ++v)
            if (static_cast<std::int32_t>(v) != source.node)
                top_.offer(static_cast<float>(scale * shares_[v].get(lane) / onward_.onward[v]),
                           static_cast<std::int32_t>(v));
        top_.write(out.scores + source.row * settings_.k, out.ids + source.row * settings_.k);
        out.lost[source.row] = sums.lost(settings_.alpha);
    }

    const IncomingEdges& edges_;
    const Onward& onward_;
    const PageRankSettings& settings_;
    TopRanks top_;
    std::vector<Lanes> shares_;         // y × onward
    std::vector<std::uint8_t> starts_;  // the lanes whose source is this node, as bits
    Lanes visits_, returned_, changed_;
};

}  // namespace alure
