#include "clustering.h"

#include <algorithm>
#include <limits>

#include "neighbors_lists.h"

namespace alure {
namespace {

constexpr std::int64_t kScores = 1 << 13;            // of a block of rows: 32 KiB
constexpr std::int64_t kPackedBytes = 24 << 10;      // of a block of rows, beside a pair of panels in the cache
constexpr std::int64_t kHits = 1 << 12;
constexpr std::int64_t kAhead = 8;                   // rows that are on their way
constexpr std::int64_t kSampled = 1 << 12;           // rows whose mean is the origin
constexpr std::int64_t kPackingRows = 1 << 10;       // of a task

const Filter& filter_for(const NeighborKernels& kernels, std::int64_t d) {
    return d <= kernels.filter.most_channels ? kernels.filter : kernels.exact;
}

bool all_within(const std::int64_t* clusters, std::int64_t count, std::int64_t num_clusters) {
    return std::all_of(clusters, clusters + count, [=](std::int64_t c) { return c >= 0 && c < num_clusters; });
}

// Rows whose products are made together.
std::int64_t packed_rows(const Filter& filter, std::int64_t d) {
    const std::int64_t fit = kPackedBytes / filter.query_bytes(d);
    return filter.query_rows * std::clamp<std::int64_t>(fit / filter.query_rows, 1, 32);
}

// Rows that are scored together.
std::int64_t scored_rows(const Filter& filter, std::int64_t d, std::int64_t columns) {
    const std::int64_t fit = std::min(kScores / columns, kPackedBytes / filter.query_bytes(d));
    return filter.query_rows * std::clamp<std::int64_t>(fit / filter.query_rows, 1, 64);
}

// A block of rows, packed and as they are.
struct Block {
    const char* packed;        // zeros, or other rows, up to a multiple of query_rows
    const float* scales;       // the same
    const PackedQuery* terms;  // [count]
    const float* x;            // [count, d]
    std::int64_t count;
};

// The nearest of some centroids: products nominate, exact scores decide.
class Nearest {
public:
    Nearest(const NeighborKernels& kernels, const Filter& filter, const PackedLists& packed, const float* centroids,
            std::int64_t d, Metric metric)
        : kernels_(kernels),
          filter_(filter),
          packed_(packed),
          centroids_(centroids),
          d_(d),
          factor_(factor(metric)),
          exact_(exact_score(kernels, metric)),
          scores_(scored_rows(filter, d, packed.columns(0)) * packed.columns(0)),
          nominees_(packed.columns(0)) {}

    // visit(i, centroid, exact score) for every row. Without kScored the score may be missing: where it decides nothing.
    template <bool kScored, class Visit>
    void each(const Block& block, Visit visit) {
        const std::int64_t columns = packed_.columns(0);
        filter_.scores({block.packed, block.scales, block.count, d_, packed_.rows(0, 0), columns}, scores_.data());
        for (std::int64_t i = 0; i < block.count; ++i) {
            const float width = 2.0f * packed_.margin(0, block.terms[i]) / factor_;
            const std::int64_t found =
                kernels_.near_largest(scores_.data() + i * columns, columns, width, nominees_.data());
            std::int64_t nearest = nominees_[0];
            float best = 0.0f;
            if (kScored || found > 1) {
                best = score(block, i, nearest);
                for (std::int64_t n = 1; n < found; ++n) {
                    const float other = score(block, i, nominees_[n]);
                    if (other <= best) continue;
                    best = other;
                    nearest = nominees_[n];
                }
            }
            visit(i, nearest, best);
        }
    }

private:
    [[nodiscard]] float score(const Block& block, std::int64_t i, std::int64_t centroid) const {
        return exact_(block.x + i * d_, centroids_ + centroid * d_, d_);
    }

    const NeighborKernels& kernels_;
    const Filter& filter_;
    const PackedLists& packed_;
    const float* centroids_;
    std::int64_t d_;
    float factor_;
    float (*exact_)(const float*, const float*, std::int64_t);
    std::vector<float> scores_;
    std::vector<std::int32_t> nominees_;
};

void assign_nearest(const AssignInputs& in, float* scores, std::int64_t* index, const NeighborKernels& kernels,
                    int num_threads) {
    const Filter& filter = filter_for(kernels, in.d);
    const std::int64_t offsets[] = {0, in.num_centroids};
    const PackedLists packed(filter, in.centroids, in.d, offsets, in.metric, 1);
    const std::int64_t size = filter.query_bytes(in.d), rows = scored_rows(filter, in.d, packed.columns(0));
    struct Scratch {
        AlignedBytes queries;
        std::vector<float> scales;
        std::vector<PackedQuery> terms;
        Nearest nearest;
    };
    parallel_for((in.num_rows + rows - 1) / rows, num_threads,
        [&] {
            Scratch s{AlignedBytes(rows * size), std::vector<float>(rows), std::vector<PackedQuery>(rows),
                      Nearest(kernels, filter, packed, in.centroids, in.d, in.metric)};
            std::fill_n(static_cast<char*>(s.queries.get()), rows * size, char{0});
            return s;
        },
        [&](Scratch& s, std::int64_t b) {
            const std::int64_t begin = b * rows, count = std::min(rows, in.num_rows - begin);
            char* queries = static_cast<char*>(s.queries.get());
            const float* x = in.x + begin * in.d;
            for (std::int64_t i = 0; i < count; ++i) {
                s.terms[i] = filter.pack_query(x + i * in.d, packed.rows(0, 0).center, in.d, in.metric,
                                               queries + i * size);
                s.scales[i] = s.terms[i].scale;
            }
            s.nearest.each<true>({queries, s.scales.data(), s.terms.data(), x, count},
                                 [&](std::int64_t i, std::int64_t centroid, float score) {
                index[begin + i] = centroid;
                scores[begin + i] = in.metric == Metric::kInnerProduct ? score : -score;
            });
        });
}

}  // namespace

void assign(const AssignInputs& in, float* scores, std::int64_t* index, InstructionSet set, int num_threads) {
    const NeighborKernels& kernels = kernels_of(set);
    if (in.nprobe == 1) return assign_nearest(in, scores, index, kernels, num_threads);
    const Filter& exact = kernels.exact;
    const std::int64_t offsets[] = {0, in.num_centroids};
    const PackedLists centroids(exact, in.centroids, in.d, offsets, in.metric, 1);
    const std::int64_t columns = centroids.columns(0), size = exact.query_bytes(in.d);
    const std::int64_t block = scored_rows(exact, in.d, columns);
    struct Scratch {
        std::vector<char> queries, selection;
        std::vector<float> scales, scores, best;
        std::vector<std::int32_t> index;
    };
    parallel_for((in.num_rows + block - 1) / block, num_threads,
        [&] {
            return Scratch{std::vector<char>(block * size), std::vector<char>(8 * (in.nprobe + exact.panel_rows)),
                           std::vector<float>(block, 1.0f), std::vector<float>(block * columns),
                           std::vector<float>(in.nprobe), std::vector<std::int32_t>(in.nprobe)};
        },
        [&](Scratch& s, std::int64_t b) {
            const std::int64_t begin = b * block, end = std::min(begin + block, in.num_rows);
            const ScoreTile tile{s.queries.data(), s.scales.data(), end - begin, in.d, centroids.rows(0, 0), columns};
            for (std::int64_t row = begin; row < end; ++row)
                exact.pack_query(in.x + row * in.d, nullptr, in.d, in.metric, s.queries.data() + (row - begin) * size);
            exact.scores(tile, s.scores.data());
            for (std::int64_t i = 0; i < tile.num_queries; ++i) {
                kernels.largest(s.scores.data() + i * columns, columns, in.nprobe, s.selection.data(),
                                s.best.data(), s.index.data());
                float* out = scores + (begin + i) * in.nprobe;
                std::copy(s.index.begin(), s.index.end(), index + (begin + i) * in.nprobe);
                if (in.metric == Metric::kInnerProduct) {
                    std::copy(s.best.begin(), s.best.end(), out);
                } else {
                    const float shift = static_cast<float>(squared_norm(in.x + (begin + i) * in.d, in.d));
                    for (std::int64_t p = 0; p < in.nprobe; ++p) out[p] = std::max(shift - 2.0f * s.best[p], 0.0f);
                }
            }
        });
}

ClusterPoints::ClusterPoints(const float* x, std::int64_t num_rows, std::int64_t d, Metric metric, InstructionSet set,
                             int num_threads)
    : x_(x),
      num_rows_(num_rows),
      d_(d),
      metric_(metric),
      kernels_(kernels_of(set)),
      filter_(filter_for(kernels_, d)),
      center_(d),
      packed_(round_up(num_rows, filter_.query_rows) * filter_.query_bytes(d)),
      scales_(round_up(num_rows, filter_.query_rows)),
      terms_(num_rows) {
    std::vector<double> sum(d);
    const std::int64_t step = num_rows / kSampled + 1;
    for (std::int64_t i = 0; i < num_rows; i += step) kernels_.add(x + i * d, d, 1.0, sum.data());
    const double share = 1.0 / static_cast<double>(std::max<std::int64_t>((num_rows + step - 1) / step, 1));
    for (std::int64_t c = 0; c < d; ++c) center_[c] = static_cast<float>(sum[c] * share);
    char* packed = static_cast<char*>(packed_.get());
    const std::int64_t size = filter_.query_bytes(d);
    std::fill(packed + num_rows * size, packed + static_cast<std::int64_t>(scales_.size()) * size, char{0});
    parallel_for((num_rows + kPackingRows - 1) / kPackingRows, num_threads, [] { return 0; },
        [&](int, std::int64_t task) {
            const std::int64_t begin = task * kPackingRows, end = std::min(begin + kPackingRows, num_rows);
            for (std::int64_t i = begin; i < end; ++i) {
                terms_[i] = filter_.pack_query(x + i * d, center_.data(), d, metric, packed + i * size);
                scales_[i] = terms_[i].scale;
            }
        });
}

void ClusterPoints::assign(const float* centroids, std::int64_t num_centroids, std::int64_t* nearest,
                           int num_threads) const {
    const std::int64_t offsets[] = {0, num_centroids};
    const PackedLists packed(filter_, centroids, d_, offsets, metric_, 1, center_.data());
    const std::int64_t rows = scored_rows(filter_, d_, packed.columns(0)), size = filter_.query_bytes(d_);
    parallel_for((num_rows_ + rows - 1) / rows, num_threads,
        [&] { return Nearest(kernels_, filter_, packed, centroids, d_, metric_); },
        [&](Nearest& nearest_of, std::int64_t b) {
            const std::int64_t begin = b * rows, count = std::min(rows, num_rows_ - begin);
            const Block block{static_cast<const char*>(packed_.get()) + begin * size, scales_.data() + begin,
                              terms_.data() + begin, x_ + begin * d_, count};
            nearest_of.each<false>(
                block, [&](std::int64_t i, std::int64_t centroid, float) { nearest[begin + i] = centroid; });
        });
}

bool ClusterPoints::reassign(const float* centroids, std::int64_t num_centroids, std::int64_t* nearest,
                             int num_threads) const {
    if (!all_within(nearest, num_rows_, num_centroids)) return false;
    const std::int64_t offsets[] = {0, num_centroids};
    const PackedLists packed(filter_, centroids, d_, offsets, metric_, 1, center_.data());
    const std::int64_t rows = packed_rows(filter_, d_), columns = packed.columns(0), size = filter_.query_bytes(d_);
    const auto exact = exact_score(kernels_, metric_);
    struct Scratch {
        std::vector<float> best, thresholds;
        std::vector<Hit> hits;
    };
    parallel_for((num_rows_ + rows - 1) / rows, num_threads,
        [&] {
            return Scratch{std::vector<float>(rows), std::vector<float>(rows),
                           std::vector<Hit>(std::max(kHits, 2 * filter_.panel_rows * rows))};
        },
        [&](Scratch& s, std::int64_t b) {
            const std::int64_t begin = b * rows, count = std::min(rows, num_rows_ - begin);
            const auto score = [&](std::int64_t i, std::int64_t centroid) {
                return exact(x_ + (begin + i) * d_, centroids + centroid * d_, d_);
            };
            for (std::int64_t i = 0; i < count; ++i) {
                const PackedQuery& q = terms_[begin + i];
                s.best[i] = score(i, nearest[begin + i]);
                const float least = (s.best[i] - packed.margin(0, q)) / factor(metric_) - q.shift;
                s.thresholds[i] = std::max(least, std::numeric_limits<float>::lowest());  // no padding reaches it
            }
            std::fill(s.thresholds.begin() + count, s.thresholds.end(), std::numeric_limits<float>::infinity());
            const ScoreTile tile{static_cast<const char*>(packed_.get()) + begin * size, scales_.data() + begin, count,
                                 d_, packed.rows(0, 0), columns};
            for (std::int64_t column = 0; column < columns;) {
                std::int64_t found;
                column = filter_.hits(tile, s.thresholds.data(), column, s.hits.data(),
                                      static_cast<std::int64_t>(s.hits.size()), &found);
                for (std::int64_t h = 0; h < found; ++h) {
                    const auto [i, other] = s.hits[h];
                    std::int64_t& own = nearest[begin + i];
                    if (other == own) continue;
                    const float its = score(i, other);
                    if (its < s.best[i] || (its == s.best[i] && other > own)) continue;
                    s.best[i] = its;
                    own = other;
                }
            }
        });
    return true;
}

bool add_to_clusters(const Moves& moves, double* sums, InstructionSet set, int num_threads) {
    const auto [x, before, nearest, num_rows, d, num_clusters] = moves;
    if (!all_within(nearest, num_rows, num_clusters)) return false;
    if (before && !all_within(before, num_rows, num_clusters)) return false;
    std::vector<std::int64_t> moved;
    moved.reserve(num_rows);
    for (std::int64_t row = 0; row < num_rows; ++row)
        if (!before || before[row] != nearest[row]) moved.push_back(row);
    const NeighborKernels& kernels = kernels_of(set);
    const std::int64_t count = static_cast<std::int64_t>(moved.size());
    const std::int64_t shares = std::clamp<std::int64_t>(num_clusters, 1, std::max(num_threads, 1));
    parallel_for(shares, num_threads, [] { return 0; }, [&](int, std::int64_t share) {
        const std::int64_t first = share * num_clusters / shares, last = (share + 1) * num_clusters / shares;
        const auto add = [&](std::int64_t row, std::int64_t cluster, double sign) {
            if (cluster >= first && cluster < last) kernels.add(x + row * d, d, sign, sums + cluster * d);
        };
        for (std::int64_t m = 0; m < count; ++m) {
            const float* later = x + moved[std::min(m + kAhead, count - 1)] * d;
            for (std::int64_t i = 0; i < d; i += 16) __builtin_prefetch(later + i);
            if (before) add(moved[m], before[moved[m]], -1.0);
            add(moved[m], nearest[moved[m]], 1.0);
        }
    });
    return true;
}

}  // namespace alure
