// Sources are pushed one by one, which touches the neighbourhood only; those whose walks spread over the whole graph
// before the k best are settled are swept eight at a time.
#include "pagerank.h"

#include <algorithm>
#include <vector>

#include "forward_push.h"
#include "pagerank_sweeps.h"
#include "parallel.h"

namespace alure {
namespace {

template <bool kWeighted>
void rank_all(const DirectedGraph& graph, std::span<const std::int64_t> sources, const PageRankSettings& settings,
              const PageRankOutput& out) {
    const Onward onward(graph, settings.alpha);
    std::vector<double> shares(sources.size());  // 0: done
    parallel_for(
        static_cast<std::int64_t>(sources.size()), settings.num_threads,
        [&] { return ForwardPush<kWeighted>(graph, onward, settings); },
        [&](ForwardPush<kWeighted>& push, std::int64_t i) {
            shares[i] = push.walk(static_cast<std::int32_t>(sources[i]), i, out);
        });

    std::vector<SweptSource> swept;
    for (std::size_t i = 0; i < sources.size(); ++i)
        if (shares[i] > 0.0)
            swept.push_back({static_cast<std::int32_t>(sources[i]), static_cast<std::int64_t>(i), shares[i]});
    if (swept.empty()) return;
    // Sources that stop at alike shares need alike numbers of sweeps.
    std::stable_sort(swept.begin(), swept.end(), [](const auto& a, const auto& b) { return a.share < b.share; });
    const IncomingEdges edges(graph);
    constexpr std::int64_t kLanes = Sweeps<kWeighted>::kLanes;
    const auto count = static_cast<std::int64_t>(swept.size());
    parallel_for(
        (count + kLanes - 1) / kLanes, settings.num_threads,
        [&] { return Sweeps<kWeighted>(edges, onward, settings); },
        [&](Sweeps<kWeighted>& sweeps, std::int64_t block) {
            const std::int64_t first = block * kLanes;
            sweeps.run(std::span(swept).subspan(first, std::min(kLanes, count - first)), out);
        });
}

}  // namespace

void personalized_pagerank(const DirectedGraph& graph, std::span<const std::int64_t> sources,
                           const PageRankSettings& settings, const PageRankOutput& out) {
    if (graph.weights.empty())
        rank_all<false>(graph, sources, settings, out);
    else
        rank_all<true>(graph, sources, settings, out);
}

}  // namespace alure
