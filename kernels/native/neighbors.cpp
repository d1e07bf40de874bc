#include "neighbors.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "aligned.h"
#include "neighbors_kernels.h"
#include "parallel.h"

namespace alure {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr std::int64_t kMissing = std::numeric_limits<std::int64_t>::min();

constexpr std::int64_t kChunk = 8192;                  // queries of a task: lists are packed once, read once a chunk
constexpr std::int64_t kChunkKeys = 1 << 20;           // of a chunk: 8 MiB a thread
constexpr std::int64_t kRowBlock = 512;                // rows of a list between two looks at the thresholds
constexpr std::int64_t kQueryBlockBytes = 24 << 10;    // packed queries, beside a pair of panels in the cache
constexpr std::int64_t kHits = 1 << 14;
constexpr std::int64_t kAhead = 4;                     // rows whose vectors are on their way
constexpr std::int64_t kWaves[] = {0, 1, 4, 12};       // probes come nearest first: these give the thresholds
constexpr std::int64_t kAssignFloats = 1 << 15;        // scores of a block of rows: 128 KiB

const NeighborKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
#if defined(ALURE_HAS_AMX)
    if (set == InstructionSet::kAmx) return amx::neighbor_kernels;
#endif
    if (set == InstructionSet::kAvx512 && __builtin_cpu_supports("avx512vnni")) return avx512_vnni::neighbor_kernels;
    if (set == InstructionSet::kAvx512 || set == InstructionSet::kAvx2) return avx2::neighbor_kernels;
#endif
    if (set == InstructionSet::kEmulatedAmx) return emulated_amx::neighbor_kernels;
    return portable::neighbor_kernels;
}

std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

double squared_norm(const float* x, std::int64_t d) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < d; ++i) sum += double{x[i]} * x[i];
    return sum;
}

// Kernels halve squared distances.
float factor(Metric metric) { return metric == Metric::kInnerProduct ? 1.0f : 2.0f; }

auto exact_score(const NeighborKernels& kernels, Metric metric) {
    return metric == Metric::kInnerProduct ? kernels.inner_product : kernels.negated_distance;
}

// Rows of lists as panels; every list begins with a panel of its own.
class PackedLists {
public:
    PackedLists(const Filter& filter, const float* x, std::int64_t d, std::span<const std::int64_t> offsets,
                Metric metric, int num_threads)
        : filter_(filter),
          d_(d),
          metric_(metric),
          begins_(offsets.size()),
          norms_(offsets.size() - 1),
          center_norms_(offsets.size() - 1),
          bounds_(offsets.size() - 1) {
        const std::int64_t nlist = static_cast<std::int64_t>(bounds_.size());
        for (std::int64_t list = 0; list < nlist; ++list)
            begins_[list + 1] = begins_[list] + round_up(offsets[list + 1] - offsets[list], filter.panel_rows);
        centers_ = std::make_unique_for_overwrite<float[]>(nlist * d);
        panels_.emplace(begins_.back() * filter.row_bytes(d));
        bias_ = std::make_unique_for_overwrite<float[]>(begins_.back());
        scale_ = std::make_unique_for_overwrite<float[]>(begins_.back());
        zero_ = std::make_unique_for_overwrite<std::int32_t[]>(begins_.back());
        parallel_for(nlist, num_threads, [&] { return std::vector<double>(d); },
            [&](std::vector<double>& mean, std::int64_t list) {
                const std::int64_t rows = offsets[list + 1] - offsets[list];
                const float* first = x + offsets[list] * d;
                std::fill(mean.begin(), mean.end(), 0.0);
                double largest = 0.0;
                for (std::int64_t i = 0; i < rows; ++i) {
                    largest = std::max(largest, squared_norm(first + i * d, d));
                    for (std::int64_t c = 0; c < d; ++c) mean[c] += double{first[i * d + c]};
                }
                const double share = 1.0 / static_cast<double>(std::max<std::int64_t>(rows, 1));
                for (std::int64_t c = 0; c < d; ++c) centers_[list * d + c] = static_cast<float>(mean[c] * share);
                norms_[list] = static_cast<float>(std::sqrt(largest));
                center_norms_[list] = static_cast<float>(std::sqrt(squared_norm(centers_.get() + list * d, d)));
                bounds_[list] = filter.pack_rows(first, rows, d, metric, this->rows(list, 0));
            });
    }

    [[nodiscard]] PackedRows rows(std::int64_t list, std::int64_t first) const {
        const std::int64_t at = begins_[list] + first;
        return {centers_.get() + list * d_, static_cast<char*>(panels_->get()) + at * filter_.row_bytes(d_),
                bias_.get() + at, scale_.get() + at, zero_.get() + at};
    }
    [[nodiscard]] std::int64_t columns(std::int64_t list) const { return begins_[list + 1] - begins_[list]; }

    // How far exact scores of a list's rows may be from factor(metric) · (kernel's score + shift).
    [[nodiscard]] float margin(std::int64_t list, const PackedQuery& q) const {
        // Twice the bound d·2⁻²⁴·|q||x| on a float32 product's rounding, and some for the roundings around it.
        const float error = static_cast<float>(d_ + 16) * 0x1p-23f;
        const float reach = q.norm + center_norms_[list] + norms_[list];
        const float exactly = error * reach * (metric_ == Metric::kInnerProduct ? norms_[list] : reach);
        return exactly +
               factor(metric_) * 1.0001f * (q.norm * bounds_[list].residual + q.residual * bounds_[list].norm);
    }

private:
    const Filter& filter_;
    std::int64_t d_;
    Metric metric_;
    std::vector<std::int64_t> begins_;  // columns
    std::optional<AlignedBytes> panels_;
    std::unique_ptr<float[]> centers_, bias_, scale_;
    std::unique_ptr<std::int32_t[]> zero_;
    std::vector<float> norms_;  // the largest of each list
    std::vector<float> center_norms_;
    std::vector<RowsBound> bounds_;
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
    ChunkSearch(const SearchInputs& in, const NeighborKernels& kernels, const Filter& filter, const PackedLists& lists,
                std::int64_t chunk)
        : in_(in),
          kernels_(kernels),
          filter_(filter),
          lists_(lists),
          exact_(exact_score(kernels, in.metric)),
          factor_(factor(in.metric)),
          capacity_(2 * in.k + 32),
          query_block_(filter.query_rows * std::clamp<std::int64_t>(
                                               kQueryBlockBytes / filter.query_bytes(in.d) / filter.query_rows, 1, 32)),
          keys_(chunk * capacity_),
          counts_(chunk),
          floors_(chunk),
          probes_(chunk * in.nprobe),
          seen_(in.nlist),
          pair_begins_(in.nlist + 1),
          pairs_(chunk * in.nprobe),
          queries_(query_block_ * filter.query_bytes(in.d)),
          scales_(query_block_),
          thresholds_(query_block_),
          scores_(query_block_ * kRowBlock),
          terms_(query_block_),
          hits_(std::max(kHits, 2 * filter.panel_rows * query_block_)) {}

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
        for (std::size_t m = 0; m < members.size(); m += query_block_)
            scan_block(list, members.subspan(m, std::min<std::size_t>(query_block_, members.size() - m)));
    }

    void scan_block(std::int64_t list, std::span<const std::int32_t> members) {
        pack(list, members);
        const std::int64_t columns = lists_.columns(list);
        for (std::int64_t first = 0; first < columns; first += kRowBlock) {
            const ScoreTile tile{packed(0),
                                 scales_.data(),
                                 static_cast<std::int64_t>(members.size()),
                                 in_.d,
                                 lists_.rows(list, first),
                                 std::min(kRowBlock, columns - first)};
            const std::int64_t first_row = in_.list_offsets[list] + first;
            if (tile.columns > in_.k) raise_floors(first_row, tile, members);
            set_thresholds(members);
            for (std::int64_t column = 0; column < tile.columns;) {
                std::int64_t found;
                column = filter_.hits(tile, thresholds_.data(), column, hits_.data(),
                                      static_cast<std::int64_t>(hits_.size()), &found);
                for (std::int64_t h = 0; h < found; ++h) {
                    const Hit &hit = hits_[h], &later = hits_[std::min(h + kAhead, found - 1)];
                    prefetch(query(members[later.query]));
                    prefetch(in_.database + (first_row + later.column) * in_.d);
                    offer(members[hit.query], first_row + hit.column);
                }
                if (found) set_thresholds(members);
            }
        }
    }

    // How a kernel's score becomes the exact score to within `margin`: factor · (score + shift).
    struct Terms {
        float shift, margin;
    };

    void pack(std::int64_t list, std::span<const std::int32_t> members) {
        const std::int64_t count = static_cast<std::int64_t>(members.size());
        const PackedRows rows = lists_.rows(list, 0);
        for (std::int64_t m = 0; m < count; ++m) {
            prefetch(query(members[std::min(m + kAhead, count - 1)]));
            const PackedQuery q =
                filter_.pack_query(query(members[m]), rows.center, in_.d, in_.metric, packed(m));
            scales_[m] = q.scale;
            terms_[m] = {q.shift, lists_.margin(list, q)};
        }
        const std::int64_t padded = round_up(count, filter_.query_rows);
        std::fill(packed(count), packed(padded), char{0});
        std::fill(scales_.begin() + count, scales_.begin() + padded, 0.0f);
        std::fill(thresholds_.begin() + count, thresholds_.begin() + padded, kInfinity);
    }

    void prefetch(const float* row) const {
        for (std::int64_t d = 0; d < in_.d; d += 16) __builtin_prefetch(row + d);
    }

    void set_thresholds(std::span<const std::int32_t> members) {
        for (std::size_t m = 0; m < members.size(); ++m) {
            const float least = (floors_[members[m]] - terms_[m].margin) / factor_ - terms_[m].shift;
            thresholds_[m] = std::max(least, kLowest);
        }
    }

    // The k-th best of a block of rows bounds what the k best can be, where nothing is known yet.
    void raise_floors(std::int64_t first_row, const ScoreTile& tile, std::span<const std::int32_t> members) {
        const auto fresh = [&](std::int32_t i) { return floors_[i] == -kInfinity; };
        if (std::none_of(members.begin(), members.end(), fresh)) return;
        filter_.scores(tile, scores_.data());
        for (std::size_t m = 0; m < members.size(); ++m) {
            if (!fresh(members[m])) continue;
            float* scores = scores_.data() + m * tile.columns;
            const std::int64_t excluded = in_.exclude_row[begin_ + members[m]] - first_row;
            if (excluded >= 0 && excluded < tile.columns) scores[excluded] = -kInfinity;
            const float kth = kernels_.kth_largest(scores, tile.columns, in_.k);
            floors_[members[m]] = factor_ * (kth + terms_[m].shift) - terms_[m].margin;
        }
    }

    // A nominee's exact score decides.
    void offer(std::int32_t i, std::int64_t row) {
        if (row == in_.exclude_row[begin_ + i]) return;
        const float score = exact_(query(i), in_.database + row * in_.d, in_.d);
        if (score < floors_[i]) return;
        keys_[i * capacity_ + counts_[i]++] = encode(score, in_.rank[row]);
        if (counts_[i] == capacity_) compact(i);
    }

    // Keeps the k best; the last of them is the floor.
    void compact(std::int64_t i) {
        const auto first = keys_.begin() + i * capacity_;
        std::nth_element(first, first + in_.k - 1, first + counts_[i], std::greater<>());
        counts_[i] = static_cast<std::int32_t>(in_.k);
        floors_[i] = std::max(floors_[i], score_of(first[in_.k - 1]));
    }

    void finish(std::int64_t i, std::int64_t* keys) {
        const auto first = keys_.begin() + i * capacity_, last = first + counts_[i];
        const std::int64_t found = std::min<std::int64_t>(in_.k, counts_[i]);
        std::partial_sort_copy(first, last, keys, keys + found, std::greater<>());
        std::fill(keys + found, keys + in_.k, kMissing);
    }

    [[nodiscard]] char* packed(std::int64_t member) const {
        return static_cast<char*>(queries_.get()) + member * filter_.query_bytes(in_.d);
    }
    [[nodiscard]] const float* query(std::int64_t i) const { return in_.queries + (begin_ + i) * in_.d; }

    const SearchInputs& in_;
    const NeighborKernels& kernels_;
    const Filter& filter_;
    const PackedLists& lists_;
    float (*exact_)(const float*, const float*, std::int64_t);
    float factor_;
    std::int64_t capacity_, query_block_;
    std::int64_t begin_ = 0, count_ = 0;  // the chunk's queries
    std::vector<std::int64_t> keys_;      // [chunk, capacity], among them the k best so far
    std::vector<std::int32_t> counts_;    // of keys
    std::vector<float> floors_;           // no lower score can be among the k best
    std::vector<std::int32_t> probes_;       // [chunk, nprobe]
    std::vector<std::int64_t> seen_;         // by list, the last query that named it
    std::vector<std::int64_t> pair_begins_;  // by list
    std::vector<std::int32_t> pairs_;        // queries, by list
    AlignedBytes queries_;                   // of a block, packed
    std::vector<float> scales_, thresholds_, scores_;
    std::vector<Terms> terms_;
    std::vector<Hit> hits_;
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

// The nearest centroid of every row: products nominate, exact scores decide.
void assign_nearest(const AssignInputs& in, float* scores, std::int64_t* index, const NeighborKernels& kernels,
                    int num_threads) {
    const Filter& filter = in.d <= kernels.filter.most_channels ? kernels.filter : kernels.exact;
    const std::int64_t offsets[] = {0, in.num_centroids};
    const PackedLists centroids(filter, in.centroids, in.d, offsets, in.metric, 1);
    const std::int64_t columns = centroids.columns(0), size = filter.query_bytes(in.d);
    const std::int64_t block = filter.query_rows * std::clamp<std::int64_t>(
        std::min(kAssignFloats / columns, kQueryBlockBytes / size) / filter.query_rows, 1, 64);
    const auto exact = exact_score(kernels, in.metric);
    struct Scratch {
        AlignedBytes queries;
        std::vector<float> scales, margins, scores;
        std::vector<std::int32_t> nominees;
    };
    parallel_for((in.num_rows + block - 1) / block, num_threads,
        [&] {
            Scratch s{AlignedBytes(block * size), std::vector<float>(block), std::vector<float>(block),
                      std::vector<float>(block * columns), std::vector<std::int32_t>(columns)};
            std::fill_n(static_cast<char*>(s.queries.get()), block * size, char{0});
            return s;
        },
        [&](Scratch& s, std::int64_t b) {
            const std::int64_t begin = b * block, end = std::min(begin + block, in.num_rows);
            char* packed = static_cast<char*>(s.queries.get());
            const ScoreTile tile{packed, s.scales.data(), end - begin, in.d, centroids.rows(0, 0), columns};
            for (std::int64_t row = begin; row < end; ++row) {
                const PackedQuery q = filter.pack_query(in.x + row * in.d, tile.rows.center, in.d, in.metric,
                                                        packed + (row - begin) * size);
                s.scales[row - begin] = q.scale;
                s.margins[row - begin] = centroids.margin(0, q);
            }
            filter.scores(tile, s.scores.data());
            for (std::int64_t row = begin; row < end; ++row) {
                const float width = 2.0f * s.margins[row - begin] / factor(in.metric);
                const std::int64_t found = kernels.near_largest(s.scores.data() + (row - begin) * columns, columns,
                                                                width, s.nominees.data());
                float best = -kInfinity;
                for (std::int64_t n = 0; n < found; ++n) {
                    const std::int64_t centroid = s.nominees[n];
                    const float score = exact(in.x + row * in.d, in.centroids + centroid * in.d, in.d);
                    if (n > 0 && score <= best) continue;
                    best = score;
                    index[row] = centroid;
                }
                scores[row] = in.metric == Metric::kInnerProduct ? best : -best;
            }
        });
}

}  // namespace

bool search(const SearchInputs& in, std::int64_t* keys, InstructionSet set, int num_threads) {
    if (!sound(in)) return false;
    const NeighborKernels& kernels = kernels_of(set);
    const Filter& filter = in.d <= kernels.filter.most_channels ? kernels.filter : kernels.exact;
    const PackedLists lists(filter, in.database, in.d, {in.list_offsets, static_cast<std::size_t>(in.nlist + 1)},
                            in.metric, num_threads);
    const std::int64_t share = (in.num_queries + std::max(num_threads, 1) - 1) / std::max(num_threads, 1);
    const std::int64_t fits = std::max<std::int64_t>(kChunkKeys / (2 * in.k + 32), 64);
    const std::int64_t chunk = std::clamp<std::int64_t>(share, 1, std::min(kChunk, fits));
    parallel_for((in.num_queries + chunk - 1) / chunk, num_threads,
        [&] { return ChunkSearch(in, kernels, filter, lists, chunk); },
        [&](ChunkSearch& search, std::int64_t c) {
            search.run(c * chunk, std::min((c + 1) * chunk, in.num_queries), keys);
        });
    return true;
}

void assign(const AssignInputs& in, float* scores, std::int64_t* index, InstructionSet set, int num_threads) {
    const NeighborKernels& kernels = kernels_of(set);
    if (in.nprobe == 1) return assign_nearest(in, scores, index, kernels, num_threads);
    const Filter& exact = kernels.exact;
    const std::int64_t offsets[] = {0, in.num_centroids};
    const PackedLists centroids(exact, in.centroids, in.d, offsets, in.metric, 1);
    const std::int64_t columns = centroids.columns(0), size = exact.query_bytes(in.d);
    const std::int64_t block = exact.query_rows * std::clamp<std::int64_t>(
        std::min(kAssignFloats / columns, kQueryBlockBytes / size) / exact.query_rows, 1, 64);
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

bool cluster_sums(const Clustering& in, double* sums, double* errors, InstructionSet set, int num_threads) {
    const NeighborKernels& kernels = kernels_of(set);
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
            kernels.add(in.x + row * in.d, in.d, sums + cluster * in.d);
        }
    });
    return true;
}

}  // namespace alure
