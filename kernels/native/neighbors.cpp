#include "neighbors.h"

#include <algorithm>
#include <cmath>
#include <bit>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "neighbors_kernels.h"
#include "parallel.h"

namespace alure {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr std::int64_t kMissing = std::numeric_limits<std::int64_t>::min();

constexpr std::int64_t kChunk = 8192;                  // queries of a task: lists are packed once, read once a chunk
constexpr std::int64_t kChunkCandidates = 1 << 20;     // of a chunk: 12 MiB a thread
constexpr std::int64_t kRowBlock = 512;                // rows of a list between two looks at the thresholds
constexpr std::int64_t kQueryBlockFloats = 6144;       // gathered queries: 24 KiB, beside a pair of panels in the cache
constexpr std::int64_t kHits = 1 << 14;
constexpr std::int64_t kWaves[] = {0, 1, 4, 12};       // probes come nearest first: these give the thresholds
constexpr std::int64_t kAssignFloats = 1 << 15;        // scores of a block of rows: 128 KiB

const NeighborKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    set = vectors_of(set);
    if (set == InstructionSet::kAvx512) return avx512::neighbor_kernels;
    if (set == InstructionSet::kAvx2) return avx2::neighbor_kernels;
#endif
    return portable::neighbor_kernels;
}

std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

double squared_norm(const float* x, std::int64_t d) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < d; ++i) sum += double{x[i]} * x[i];
    return sum;
}

// Rows of lists as panels; every list begins with a panel of its own.
class PackedLists {
public:
    PackedLists(const NeighborKernels& kernels, const float* x, std::int64_t d, std::span<const std::int64_t> offsets,
                Metric metric, int num_threads)
        : d_(d), begins_(offsets.size()), largest_norms_(offsets.size() - 1) {
        for (std::size_t list = 0; list + 1 < offsets.size(); ++list)
            begins_[list + 1] = begins_[list] + round_up(offsets[list + 1] - offsets[list], kernels.panel_rows);
        panels_ = std::make_unique_for_overwrite<float[]>(begins_.back() * d);
        bias_ = std::make_unique_for_overwrite<float[]>(begins_.back());
        parallel_for(static_cast<std::int64_t>(offsets.size()) - 1, num_threads, [] { return 0; },
            [&](int, std::int64_t list) {
                const std::int64_t rows = offsets[list + 1] - offsets[list];
                const float* first = x + offsets[list] * d;
                kernels.pack(first, rows, d, panels_.get() + begins_[list] * d);
                float* bias = bias_.get() + begins_[list];
                std::fill(bias, bias_.get() + begins_[list + 1], -kInfinity);
                double largest = 0.0;
                for (std::int64_t i = 0; i < rows; ++i) {
                    const double square = squared_norm(first + i * d, d);
                    largest = std::max(largest, square);
                    bias[i] = metric == Metric::kInnerProduct ? 0.0f : -static_cast<float>(square);
                }
                largest_norms_[list] = static_cast<float>(std::sqrt(largest));
            });
    }

    // Columns [first, last) of a list, `first` a multiple of the panel's rows.
    [[nodiscard]] ScoreTile tile(std::int64_t list, std::int64_t first, std::int64_t last) const {
        const std::int64_t at = begins_[list] + first;
        return {.d = d_, .panels = panels_.get() + at * d_, .bias = bias_.get() + at, .columns = last - first};
    }
    [[nodiscard]] std::int64_t columns(std::int64_t list) const { return begins_[list + 1] - begins_[list]; }
    [[nodiscard]] float largest_norm(std::int64_t list) const { return largest_norms_[list]; }

private:
    std::int64_t d_;
    std::vector<std::int64_t> begins_;  // columns
    std::unique_ptr<float[]> panels_, bias_;
    std::vector<float> largest_norms_;
};

// A row that may be among the k best: its exact score lies between the two.
struct Candidate {
    float lower, upper;
    std::int32_t row;
};

std::int64_t encode(float score, std::int64_t rank) {
    const std::int32_t bits = std::bit_cast<std::int32_t>(score == 0.0f ? 0.0f : score);  // −0 and 0 are one score
    const std::int32_t monotone = bits < 0 ? bits ^ 0x7FFFFFFF : bits;
    return (std::int64_t{monotone} << 32) | (0x7FFFFFFF - rank);
}

float score_of(std::int64_t key) {
    const std::int32_t high = static_cast<std::int32_t>(key >> 32);
    return std::bit_cast<float>(high < 0 ? high ^ 0x7FFFFFFF : high);
}

// One thread's search of a chunk of queries: list by list, the queries that probe it as rows of a product.
class ChunkSearch {
public:
    ChunkSearch(const SearchInputs& in, const NeighborKernels& kernels, const PackedLists& lists, std::int64_t chunk)
        : in_(in),
          kernels_(kernels),
          lists_(lists),
          capacity_(2 * in.k + 32),
          query_block_(kernels.query_rows *
                       std::clamp<std::int64_t>(kQueryBlockFloats / in.d / kernels.query_rows, 1, 32)),
          candidates_(chunk * capacity_),
          counts_(chunk),
          floors_(chunk),
          norms_(chunk),
          probes_(chunk * in.nprobe),
          seen_(in.nlist),
          pair_begins_(in.nlist + 1),
          pairs_(chunk * in.nprobe),
          queries_(query_block_ * in.d),
          thresholds_(query_block_),
          scores_(query_block_ * round_up(kRowBlock, kernels.panel_rows)),
          hits_(std::max(kHits, 2 * kernels.panel_rows * query_block_)) {}

    void run(std::int64_t begin, std::int64_t end, std::int64_t* keys) {
        begin_ = begin;
        count_ = end - begin;
        start();
        for (std::size_t wave = 0; wave < std::size(kWaves) && kWaves[wave] < in_.nprobe; ++wave) {
            const bool last = wave + 1 == std::size(kWaves);
            group_by_list(kWaves[wave], last ? in_.nprobe : std::min(kWaves[wave + 1], in_.nprobe));
            for (std::int64_t list = 0; list < in_.nlist; ++list) {
                const std::int64_t begin = pair_begins_[list], size = pair_begins_[list + 1] - begin;
                if (size > 0) scan(list, {pairs_.data() + begin, static_cast<std::size_t>(size)});
            }
            for (std::int64_t i = 0; i < count_; ++i)
                if (counts_[i] > in_.k) compact(i);
        }
        for (std::int64_t i = 0; i < count_; ++i) finish(i, keys + (begin + i) * in_.k);
    }

private:
    void start() {
        std::fill(counts_.begin(), counts_.end(), 0);
        std::fill(floors_.begin(), floors_.end(), -kInfinity);
        std::fill(seen_.begin(), seen_.end(), std::int64_t{-1});
        for (std::int64_t i = 0; i < count_; ++i) {
            norms_[i] = static_cast<float>(std::sqrt(squared_norm(query(i), in_.d)));
            for (std::int64_t p = 0; p < in_.nprobe; ++p) {
                const std::int64_t list = in_.probes[(begin_ + i) * in_.nprobe + p];
                const bool repeated = list >= 0 && std::exchange(seen_[list], i) == i;
                probes_[i * in_.nprobe + p] = repeated ? -1 : static_cast<std::int32_t>(list);
            }
        }
    }

    // Counting sort of the (query, list) pairs of a range of probes.
    void group_by_list(std::int64_t first, std::int64_t last) {
        std::fill(pair_begins_.begin(), pair_begins_.end(), 0);
        const auto for_each_pair = [&](auto visit) {
            for (std::int64_t i = 0; i < count_; ++i)
                for (std::int64_t p = first; p < last; ++p)
                    if (const std::int32_t list = probes_[i * in_.nprobe + p]; list >= 0)
                        visit(static_cast<std::int32_t>(i), list);
        };
        for_each_pair([&](std::int32_t, std::int32_t list) { ++pair_begins_[list]; });
        std::int64_t end = 0;
        for (std::int64_t& begin : pair_begins_) end += std::exchange(begin, end);
        for_each_pair([&](std::int32_t i, std::int32_t list) { pairs_[pair_begins_[list]++] = i; });
        std::copy_backward(pair_begins_.begin(), pair_begins_.end() - 1, pair_begins_.end());
        pair_begins_[0] = 0;
    }

    void scan(std::int64_t list, std::span<const std::int32_t> members) {
        const std::int64_t columns = lists_.columns(list);
        for (std::int64_t first = 0; first < columns; first += kRowBlock) {
            ScoreTile tile = lists_.tile(list, first, std::min(first + kRowBlock, columns));
            for (std::size_t m = 0; m < members.size(); m += query_block_)
                scan_block(list, first, tile,
                           members.subspan(m, std::min<std::size_t>(query_block_, members.size() - m)));
        }
    }

    void scan_block(std::int64_t list, std::int64_t first, ScoreTile& tile, std::span<const std::int32_t> members) {
        const float factor = in_.metric == Metric::kInnerProduct ? 1.0f : 2.0f;
        bool fresh = false;
        for (std::size_t m = 0; m < members.size(); ++m) {
            const float* from = query(members[m]);
            for (std::int64_t d = 0; d < in_.d; ++d) queries_[m * in_.d + d] = factor * from[d];
            fresh = fresh || floors_[members[m]] == -kInfinity;
        }
        tile.queries = queries_.data();
        tile.num_queries = static_cast<std::int64_t>(members.size());
        const std::int64_t first_row = in_.list_offsets[list] + first;
        if (fresh && tile.columns > in_.k) raise_floors(list, first_row, tile, members);
        for (std::size_t m = 0; m < members.size(); ++m) thresholds_[m] = threshold(members[m], list);
        for (std::int64_t column = 0; column < tile.columns;) {
            std::int64_t found;
            column = kernels_.hits(tile, thresholds_.data(), column, hits_.data(),
                                   static_cast<std::int64_t>(hits_.size()), &found);
            for (std::int64_t h = 0; h < found; ++h) {
                const Hit& hit = hits_[h];
                offer(list, members[hit.query], first_row + hit.column, hit.score);
            }
            if (found)
                for (std::size_t m = 0; m < members.size(); ++m) thresholds_[m] = threshold(members[m], list);
        }
    }

    // The k-th best of a block of rows bounds what the k best can be.
    void raise_floors(std::int64_t list, std::int64_t first_row, const ScoreTile& tile,
                      std::span<const std::int32_t> members) {
        kernels_.scores(tile, scores_.data());
        for (std::size_t m = 0; m < members.size(); ++m) {
            float& floor = floors_[members[m]];
            if (floor != -kInfinity) continue;
            float* scores = scores_.data() + m * tile.columns;
            const std::int64_t excluded = in_.exclude_row[begin_ + members[m]] - first_row;
            if (excluded >= 0 && excluded < tile.columns) scores[excluded] = -kInfinity;
            floor = kernels_.kth_largest(scores, tile.columns, in_.k) - shift(members[m]) - margin(members[m], list);
        }
    }

    void offer(std::int64_t list, std::int32_t i, std::int64_t row, float score) {
        if (row == in_.exclude_row[begin_ + i]) return;
        const float value = score - shift(i), error = margin(i, list);
        if (value + error < floors_[i]) return;
        candidates_[i * capacity_ + counts_[i]++] = {value - error, value + error, static_cast<std::int32_t>(row)};
        if (counts_[i] == capacity_) compact(i);
    }

    // Raises the floor to the k-th best lower bound and drops what cannot reach it.
    void compact(std::int64_t i) {
        Candidate* first = candidates_.data() + i * capacity_;
        lowers_.resize(counts_[i]);
        for (std::int32_t c = 0; c < counts_[i]; ++c) lowers_[c] = first[c].lower;
        floors_[i] = std::max(floors_[i], kernels_.kth_largest(lowers_.data(), counts_[i], in_.k));
        const Candidate* end =
            std::remove_if(first, first + counts_[i], [&](const Candidate& c) { return c.upper < floors_[i]; });
        counts_[i] = static_cast<std::int32_t>(end - first);
        if (counts_[i] <= in_.k + 16) return;
        // Closer to one another than a product resolves: score them exactly.
        rank_exactly(i);
        counts_[i] = static_cast<std::int32_t>(in_.k);
        for (std::int64_t c = 0; c < in_.k; ++c) {
            const float score = score_of(ranked_[c].key);
            first[c] = {score, score, ranked_[c].row};
        }
        floors_[i] = std::max(floors_[i], score_of(ranked_[in_.k - 1].key));
    }

    // Fills ranked_ with the exact keys of the candidates, best first.
    void rank_exactly(std::int64_t i) {
        ranked_.clear();
        const auto exact = in_.metric == Metric::kInnerProduct ? kernels_.inner_product : kernels_.negated_distance;
        for (std::int32_t c = 0; c < counts_[i]; ++c) {
            const std::int32_t row = candidates_[i * capacity_ + c].row;
            ranked_.push_back({encode(exact(query(i), in_.database + row * in_.d, in_.d), in_.rank[row]), row});
        }
        std::sort(ranked_.begin(), ranked_.end(), [](const Ranked& a, const Ranked& b) { return a.key > b.key; });
    }

    void finish(std::int64_t i, std::int64_t* keys) {
        rank_exactly(i);
        const std::int64_t found = std::min<std::int64_t>(in_.k, counts_[i]);
        for (std::int64_t c = 0; c < found; ++c) keys[c] = ranked_[c].key;
        std::fill(keys + found, keys + in_.k, kMissing);
    }

    [[nodiscard]] const float* query(std::int64_t i) const { return in_.queries + (begin_ + i) * in_.d; }

    // A kernel's score minus the shift is the score: in l2, 2q·x − |x|² = −|q − x|² + |q|².
    [[nodiscard]] float shift(std::int64_t i) const {
        return in_.metric == Metric::kInnerProduct ? 0.0f : norms_[i] * norms_[i];
    }

    // Twice the bound d·2⁻²⁴·|q||x| on a float32 product's rounding, and some for the roundings around it.
    [[nodiscard]] float margin(std::int64_t i, std::int64_t list) const {
        const float error = static_cast<float>(in_.d + 16) * 0x1p-23f, q = norms_[i], x = lists_.largest_norm(list);
        return error * (in_.metric == Metric::kInnerProduct ? q * x : (q + x) * (q + x));
    }

    [[nodiscard]] float threshold(std::int64_t i, std::int64_t list) const {
        return std::max(floors_[i] + shift(i) - margin(i, list), kLowest);
    }

    struct Ranked {
        std::int64_t key;
        std::int32_t row;
    };

    const SearchInputs& in_;
    const NeighborKernels& kernels_;
    const PackedLists& lists_;
    std::int64_t capacity_, query_block_;
    std::int64_t begin_ = 0, count_ = 0;  // the chunk's queries
    std::vector<Candidate> candidates_;   // [chunk, capacity]
    std::vector<std::int32_t> counts_;    // of candidates
    std::vector<float> floors_;           // no lower score can be among the k best
    std::vector<float> norms_;
    std::vector<std::int32_t> probes_;       // [chunk, nprobe]
    std::vector<std::int64_t> seen_;         // by list, the last query that named it
    std::vector<std::int64_t> pair_begins_;  // by list
    std::vector<std::int32_t> pairs_;        // queries, by list
    std::vector<float> queries_, thresholds_, scores_, lowers_;
    std::vector<Hit> hits_;
    std::vector<Ranked> ranked_;
};

bool sound(const SearchInputs& in) {
    bool sound = in.list_offsets[0] == 0 && in.list_offsets[in.nlist] == in.num_rows;
    for (std::int64_t i = 0; i < in.nlist; ++i) sound = sound && in.list_offsets[i] <= in.list_offsets[i + 1];
    const auto within = [](std::span<const std::int64_t> values, std::int64_t first, std::int64_t last) {
        return std::all_of(values.begin(), values.end(), [=](std::int64_t x) { return x >= first && x < last; });
    };
    const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
    return sound && within({in.probes, size(in.num_queries * in.nprobe)}, -1, in.nlist) &&
           within({in.rank, size(in.num_rows)}, 0, std::int64_t{1} << 31);
}

}  // namespace

bool search(const SearchInputs& in, std::int64_t* keys, InstructionSet set, int num_threads) {
    if (!sound(in)) return false;
    const NeighborKernels& kernels = kernels_of(set);
    const PackedLists lists(kernels, in.database, in.d, {in.list_offsets, static_cast<std::size_t>(in.nlist + 1)},
                            in.metric, num_threads);
    const std::int64_t share = (in.num_queries + std::max(num_threads, 1) - 1) / std::max(num_threads, 1);
    const std::int64_t fits = std::max<std::int64_t>(kChunkCandidates / (2 * in.k + 32), 64);
    const std::int64_t chunk = std::clamp<std::int64_t>(share, 1, std::min(kChunk, fits));
    parallel_for((in.num_queries + chunk - 1) / chunk, num_threads,
        [&] { return ChunkSearch(in, kernels, lists, chunk); },
        [&](ChunkSearch& search, std::int64_t c) {
            search.run(c * chunk, std::min((c + 1) * chunk, in.num_queries), keys);
        });
    return true;
}

void assign(const AssignInputs& in, float* scores, std::int64_t* index, InstructionSet set, int num_threads) {
    const NeighborKernels& kernels = kernels_of(set);
    const std::int64_t offsets[] = {0, in.num_centroids};
    const PackedLists centroids(kernels, in.centroids, in.d, offsets, in.metric, num_threads);
    const std::int64_t columns = centroids.columns(0);
    const std::int64_t fits = std::clamp<std::int64_t>(kAssignFloats / columns, 1, kQueryBlockFloats / 16);
    const std::int64_t block = round_up(fits, kernels.query_rows);
    struct Scratch {
        std::vector<float> queries, scores, best;
        std::vector<std::int32_t> index;
        std::vector<char> selection;
    };
    parallel_for((in.num_rows + block - 1) / block, num_threads,
        [&] {
            return Scratch{std::vector<float>(block * in.d), std::vector<float>(block * columns),
                           std::vector<float>(in.nprobe), std::vector<std::int32_t>(in.nprobe),
                           std::vector<char>(8 * (in.nprobe + kernels.panel_rows))};
        },
        [&](Scratch& s, std::int64_t b) {
            const std::int64_t begin = b * block, end = std::min(begin + block, in.num_rows);
            ScoreTile tile = centroids.tile(0, 0, columns);
            tile.queries = in.x + begin * in.d;
            tile.num_queries = end - begin;
            if (in.metric == Metric::kSquaredDistance) {
                for (std::int64_t i = 0; i < (end - begin) * in.d; ++i) s.queries[i] = 2.0f * tile.queries[i];
                tile.queries = s.queries.data();
            }
            kernels.scores(tile, s.scores.data());
            for (std::int64_t i = 0; i < tile.num_queries; ++i) {
                kernels.largest(s.scores.data() + i * columns, in.num_centroids, in.nprobe, s.selection.data(),
                                s.best.data(), s.index.data());
                float* out = scores + (begin + i) * in.nprobe;
                std::copy(s.index.begin(), s.index.end(), index + (begin + i) * in.nprobe);
                if (in.metric == Metric::kInnerProduct) {
                    std::copy(s.best.begin(), s.best.end(), out);
                } else {
                    const float shift = static_cast<float>(squared_norm(in.x + (begin + i) * in.d, in.d));
                    for (std::int64_t p = 0; p < in.nprobe; ++p) out[p] = std::max(shift - s.best[p], 0.0f);
                }
            }
        });
}

bool cluster_sums(const Clustering& in, double* sums, double* errors, int num_threads) {
    const auto within = [&](std::int64_t cluster) { return cluster >= 0 && cluster < in.nlist; };
    if (!std::all_of(in.nearest, in.nearest + in.num_rows, within)) return false;
    const std::int64_t shares = std::clamp<std::int64_t>(in.nlist, 1, std::max(num_threads, 1));
    parallel_for(shares, num_threads, [] { return 0; }, [&](int, std::int64_t share) {
        const std::int64_t first = share * in.nlist / shares, last = (share + 1) * in.nlist / shares;
        std::fill(sums + first * in.d, sums + last * in.d, 0.0);
        std::fill(errors + first, errors + last, 0.0);
        for (std::int64_t row = 0; row < in.num_rows; ++row) {
            const std::int64_t cluster = in.nearest[row];
            if (cluster < first || cluster >= last) continue;
            errors[cluster] += double{in.errors[row]};
            const float* x = in.x + row * in.d;
            double* sum = sums + cluster * in.d;
            for (std::int64_t i = 0; i < in.d; ++i) sum[i] += double{x[i]};
        }
    });
    return true;
}

}  // namespace alure
