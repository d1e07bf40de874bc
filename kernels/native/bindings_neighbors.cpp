// alure.kernels._native.search_neighbors, assign_clusters, ClusterPoints and add_to_clusters.
#include "bindings.h"
#include "clustering.h"
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

// Holds the points' memory.
class BoundPoints {
public:
    BoundPoints(Array<float, 2> x, const std::string& metric, const std::string& instruction_set, int num_threads)
        : x_(x),
          points_(x.data(), size(x.shape(0)), size(x.shape(1)), metric_named(metric), chosen(instruction_set),
                  num_threads) {}

    void assign(Array<float, 2> centroids, Output<std::int64_t, 1> nearest, int num_threads) const {
        check(centroids, nearest);
        const nb::gil_scoped_release release;
        points_.assign(centroids.data(), size(centroids.shape(0)), nearest.data(), num_threads);
    }

    bool reassign(Array<float, 2> centroids, Output<std::int64_t, 1> nearest, int num_threads) const {
        check(centroids, nearest);
        const nb::gil_scoped_release release;
        return points_.reassign(centroids.data(), size(centroids.shape(0)), nearest.data(), num_threads);
    }

private:
    void check(const Array<float, 2>& centroids, const Output<std::int64_t, 1>& nearest) const {
        require(size(centroids.shape(1)) == points_.d(), "centroids: expected the columns of x");
        require(centroids.shape(0) > 0 && centroids.shape(0) < std::size_t{1} << 31, "centroids: expected 1 … 2^31 − 1");
        require(size(nearest.size()) == points_.num_rows(), "nearest: expected one a row of x");
    }

    Array<float, 2> x_;
    ClusterPoints points_;
};

bool bound_moves(Array<float, 2> x, std::optional<Vector<std::int64_t>> before, Vector<std::int64_t> nearest,
                 Output<double, 2> sums, const std::string& instruction_set, int num_threads) {
    require(nearest.size() == x.shape(0) && (!before || before->size() == x.shape(0)),
            "before, nearest: expected one a row");
    require(sums.shape(1) == x.shape(1), "sums: expected [nlist, d]");
    const Moves moves{x.data(),          or_null(before),  nearest.data(), size(x.shape(0)),
                      size(x.shape(1)), size(sums.shape(0))};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    return add_to_clusters(moves, sums.data(), set, num_threads);
}

}  // namespace

void bind_neighbors(nb::module_& m) {
    m.def("search_neighbors", &bound_search, exact("queries"), exact("database"), exact("list_offsets"),
          exact("probes"), exact("rank"), exact("exclude_row"), exact("keys"), "metric"_a, "instruction_set"_a,
          "num_threads"_a, "Fills `keys` [nq, k]; False where an offset, a probe or a rank is out of range.");
    m.def("assign_clusters", &bound_assign, exact("x"), exact("centroids"), exact("scores"), exact("index"),
          "metric"_a, "instruction_set"_a, "num_threads"_a, "Fills `scores` and `index` [n, nprobe].");
    nb::class_<BoundPoints>(m, "ClusterPoints")
        .def(nb::init<Array<float, 2>, const std::string&, const std::string&, int>(), exact("x"), "metric"_a,
             "instruction_set"_a, "num_threads"_a)
        .def("assign", &BoundPoints::assign, exact("centroids"), exact("nearest"), "num_threads"_a,
             "Fills `nearest` [n].")
        .def("reassign", &BoundPoints::reassign, exact("centroids"), exact("nearest"), "num_threads"_a,
             "The same, faster, where `nearest` mostly holds it already; False where one is out of range.");
    m.def("add_to_clusters", &bound_moves, exact("x"), exact("before").none(), exact("nearest"), exact("sums"),
          "instruction_set"_a, "num_threads"_a,
          "Rows leave the `sums` [nlist, d] of `before` and join those of `nearest`; False where one is out of range.");
}

}  // namespace alure
