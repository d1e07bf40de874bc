// alure.kernels._native.personalized_pagerank.
#include <optional>

#include "bindings.h"
#include "pagerank.h"

namespace alure {
namespace {

void bound_pagerank(Vector<std::int64_t> offsets, Vector<std::int32_t> neighbors, std::optional<Vector<float>> weights,
                    Vector<std::int64_t> sources, double alpha, double epsilon, Output<float, 2> scores,
                    Output<std::int64_t, 2> ids, Output<float, 1> lost, int num_threads) {
    require(offsets.size() > 0, "offsets: expected [nodes + 1]");
    require(!weights || weights->size() == neighbors.size(), "weights: expected one an edge");
    require(scores.shape(0) == sources.size() && ids.shape(0) == sources.size() && lost.size() == sources.size() &&
                ids.shape(1) == scores.shape(1) && scores.shape(1) > 0,
            "scores, ids, lost: expected [sources, k], [sources, k], [sources]");
    DirectedGraph graph{.offsets = {offsets.data(), offsets.size()},
                        .neighbors = {neighbors.data(), neighbors.size()},
                        .weights = {}};
    if (weights) graph.weights = {weights->data(), weights->size()};
    const PageRankSettings settings{static_cast<std::int64_t>(scores.shape(1)), alpha, epsilon, num_threads};
    const nb::gil_scoped_release release;
    personalized_pagerank(graph, {sources.data(), sources.size()}, settings, {scores.data(), ids.data(), lost.data()});
}

}  // namespace

void bind_pagerank(nb::module_& m) {
    m.def("personalized_pagerank", &bound_pagerank, exact("offsets"), exact("neighbors"), exact("weights").none(),
          exact("sources"), "alpha"_a, "epsilon"_a, exact("scores"), exact("ids"), exact("lost"), "num_threads"_a);
}

}  // namespace alure
