// alure.kernels._native.search_neighbors, assign_clusters and cluster_sums.
#include "bindings.h"
#include "neighbors.h"

namespace alure {
namespace {

Metric metric_named(const std::string& name) {
    require(name == "ip" || name == "l2", "metric: expected 'ip' or 'l2'");
    return name == "ip" ? Metric::kInnerProduct : Metric::kSquaredDistance;
}

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

bool bound_search(Array<float, 2> queries, Array<float, 2> database, Vector<std::int64_t> list_offsets,
                  Array<std::int64_t, 2> probes, Vector<std::int64_t> rank, Vector<std::int64_t> exclude_row,
                  Output<std::int64_t, 2> keys, const std::string& metric, const std::string& instruction_set,
                  int num_threads) {
    const std::size_t num_queries = queries.shape(0), num_rows = database.shape(0);
    require(database.shape(1) == queries.shape(1) && queries.shape(1) > 0, "database: expected the queries' columns");
    require(list_offsets.size() > 0, "list_offsets: expected [nlist + 1]");
    require(probes.shape(0) == num_queries && exclude_row.size() == num_queries && keys.shape(0) == num_queries,
            "probes, exclude_row, keys: expected one row a query");
    require(rank.size() == num_rows && num_rows < std::size_t{1} << 31, "rank: expected one for each of < 2^31 rows");
    require(keys.shape(1) > 0, "keys: expected k of at least 1");
    const SearchInputs in{queries.data(),         database.data(),      size(num_queries),
                          size(num_rows),         size(queries.shape(1)), list_offsets.data(),
                          size(list_offsets.size()) - 1, probes.data(), size(probes.shape(1)),
                          rank.data(),            exclude_row.data(),   size(keys.shape(1)),
                          metric_named(metric)};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    return search(in, keys.data(), set, num_threads);
}

void bound_assign(Array<float, 2> x, Array<float, 2> centroids, Output<float, 2> scores,
                  Output<std::int64_t, 2> index, const std::string& metric, const std::string& instruction_set,
                  int num_threads) {
    const std::size_t nprobe = scores.shape(1);
    require(x.shape(1) == centroids.shape(1) && x.shape(1) > 0, "centroids: expected the columns of x");
    require(nprobe > 0 && nprobe <= centroids.shape(0) && centroids.shape(0) < std::size_t{1} << 31,
            "nprobe: expected 1 … the number of centroids");
    require(scores.shape(0) == x.shape(0) && index.shape(0) == x.shape(0) && index.shape(1) == nprobe,
            "scores, index: expected [rows of x, nprobe]");
    const AssignInputs in{x.data(),         centroids.data(), size(x.shape(0)),    size(centroids.shape(0)),
                          size(x.shape(1)), size(nprobe),     metric_named(metric)};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    assign(in, scores.data(), index.data(), set, num_threads);
}

bool bound_sums(Array<float, 2> x, Vector<float> row_errors, Vector<std::int64_t> nearest, Output<double, 2> sums,
                Output<double, 1> errors, const std::string& instruction_set, int num_threads) {
    require(row_errors.size() == x.shape(0) && nearest.size() == x.shape(0), "errors, nearest: expected one a row");
    require(sums.shape(1) == x.shape(1) && errors.size() == sums.shape(0), "sums, errors: expected [nlist, d], [nlist]");
    const Clustering in{x.data(),         row_errors.data(), nearest.data(), size(x.shape(0)),
                        size(x.shape(1)), size(sums.shape(0))};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    return cluster_sums(in, sums.data(), errors.data(), set, num_threads);
}

}  // namespace

void bind_neighbors(nb::module_& m) {
    m.def("search_neighbors", &bound_search, exact("queries"), exact("database"), exact("list_offsets"),
          exact("probes"), exact("rank"), exact("exclude_row"), exact("keys"), "metric"_a, "instruction_set"_a,
          "num_threads"_a, "Fills `keys` [nq, k]; False where an offset, a probe or a rank is out of range.");
    m.def("assign_clusters", &bound_assign, exact("x"), exact("centroids"), exact("scores"), exact("index"),
          "metric"_a, "instruction_set"_a, "num_threads"_a, "Fills `scores` and `index` [n, nprobe].");
    m.def("cluster_sums", &bound_sums, exact("x"), exact("row_errors"), exact("nearest"), exact("sums"),
          exact("errors"), "instruction_set"_a, "num_threads"_a,
          "Fills `sums` [nlist, d] and `errors` [nlist] of the rows of each cluster; False where one is out of range.");
}

}  // namespace alure
