// Forward push from one source (Andersen, Chung and Lang 2006): the visits that matter, in time that the graph's size
// does not bound from below.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pagerank_visits.h"
#include "top_ranks.h"

namespace alure {

// A thread's working memory: 24 bytes a node, all zero between sources.
template <bool kWeighted>
class ForwardPush {
public:
    ForwardPush(const DirectedGraph& graph, const Onward& onward, const PageRankSettings& settings)
        : graph_(graph), onward_(onward), settings_(settings), top_(settings.k),
          nodes_(static_cast<std::size_t>(graph.num_nodes())), visited_(nodes_.size(), 0.0) {
        for (std::int64_t u = 0; u < graph.num_nodes(); ++u) nodes_[u].largest_share = onward.largest_share(u);
    }

    // Writes row i and returns 0; or, once it has followed a part of as many edges as the graph has, writes nothing and
    // returns the share at which it would have stopped: from there on, sweeps of all nodes cost less.
    double walk(std::int32_t source, std::int64_t i, const PageRankOutput& out) {
        const double share = push_all(source);
        if (share == 0.0) write(source, i, out);
        for (const std::int32_t v : touched_) nodes_[v].waiting = visited_[v] = 0.0;
        nodes_[source] = {0.0, onward_.largest_share(source)};
        visited_[source] = 0.0;
        touched_.clear();
        next_.clear();
        return share;
    }

private:
    struct Node {
        double waiting = 0.0;        // visits not passed on yet
        double largest_share = 0.0;  // that a neighbour gets of a visit
    };
    static constexpr double kFirstShare = 0.125;  // ÷ k: coarse; a share that is final from the start is pushed twice
    static constexpr double kFiner = 4.0;
    // Of a graph within the caches a sweep of one lane takes 0.4 to 0.6 ns an edge, a push 10 to 30, and about 25 sweeps
    // are far more exact than pushes of their time.
    static constexpr std::int64_t kWorthSweeps = 16;

    double push_all(std::int32_t source) {
        edges_followed_ = 0;
        share_ = kFirstShare / static_cast<double>(settings_.k);
        visited_[source] = 1.0;
        nodes_[source].largest_share = 0.0;  // never pushed again: what comes back waits there
        if (!onward_.is_end(source)) pass_on(source, 1.0);
        for (;;) {
            if (!push_queued()) return wanted_share();
            if (nothing_waits()) return 0.0;
            const double wanted = wanted_share();
            if (share_ <= wanted) return 0.0;
            share_ = std::max(wanted, share_ / kFiner);
            for (const std::int32_t v : touched_)
                if (is_due(nodes_[v].waiting, nodes_[v])) next_.push_back(v);
        }
    }

    // First in, first out, so that much gathers before it is passed on; false: gave up.
    bool push_queued() {
        while (!next_.empty()) {
            queue_.swap(next_);
            next_.clear();
            for (const std::int32_t u : queue_) {
                const double visits = nodes_[u].waiting;
                nodes_[u].waiting = 0.0;
                visited_[u] += visits;
                pass_on(u, visits);
            }
            if (edges_followed_ > graph_.num_edges() / kWorthSweeps) return false;
        }
        return true;
    }

    void pass_on(std::int32_t u, double visits) {
        const std::int64_t begin = graph_.offsets[u], end = graph_.offsets[u + 1];
        const double unit = visits * onward_.onward[u];
        edges_followed_ += end - begin;
        for (std::int64_t e = begin; e < end; ++e) {
            const std::int32_t v = graph_.neighbors[e];
            Node& node = nodes_[v];
            const double before = node.waiting;
            const double after = before + (kWeighted ? unit * graph_.weights[e] : unit);
            node.waiting = after;
            if (is_due(after, node) && !is_due(before, node)) next_.push_back(v);
            if (before == 0.0 && visited_[v] == 0.0) touched_.push_back(v);
        }
    }

    [[nodiscard]] bool is_due(double waiting, const Node& node) const { return waiting * node.largest_share >= share_; }

    [[nodiscard]] bool nothing_waits() const {
        return std::none_of(touched_.begin(), touched_.end(),
                            [&](std::int32_t v) { return nodes_[v].waiting * nodes_[v].largest_share > 0.0; });
    }

    [[nodiscard]] double visits(std::int32_t v) const { return visited_[v] + nodes_[v].waiting; }

    // ε × the k-th most visits.
    double wanted_share() {
        top_.clear();
        for (const std::int32_t v : touched_) top_.offer(static_cast<float>(visits(v)), v);
        return std::max(settings_.epsilon * top_.last_score(), kLeastShare);
    }

    void write(std::int32_t source, std::int64_t i, const PageRankOutput& out) {
        VisitSums sums{.visits = 1.0, .returned = nodes_[source].waiting};
        if (onward_.is_end(source)) sums.returned = 1.0 - settings_.alpha;
        for (const std::int32_t v : touched_) {
            sums.visits += visits(v);
            if (onward_.is_end(v)) sums.returned += (1.0 - settings_.alpha) * visits(v);
        }
        const double scale = sums.scale(settings_.alpha);
        top_.clear();
        for (const std::int32_t v : touched_) top_.offer(static_cast<float>(scale * visits(v)), v);
        top_.write(out.scores + i * settings_.k, out.ids + i * settings_.k);
        out.lost[i] = sums.lost(settings_.alpha);
    }

    const DirectedGraph& graph_;
    const Onward& onward_;
    const PageRankSettings& settings_;
    TopRanks top_;
    std::vector<Node> nodes_;
    std::vector<double> visited_;  // visits passed on
    std::vector<std::int32_t> touched_;  // nodes with visits, but the source, in the order of the first
    std::vector<std::int32_t> queue_, next_;
    std::int64_t edges_followed_ = 0;
    double share_ = 0.0;  // a node is pushed when a neighbour would get as much
};

}  // namespace alure
