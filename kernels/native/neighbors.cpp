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

#include "neighbors_lists.h"

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
        if (counts_[i] > in_.k) compact(i);
        const auto first = keys_.begin() + i * capacity_, last = first + counts_[i];
        std::sort(first, last, std::greater<>());
        std::fill(std::copy(first, last, keys), keys + in_.k, kMissing);
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

}  // namespace alure
