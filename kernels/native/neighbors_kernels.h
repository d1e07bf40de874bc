// The boundary between neighbors.cpp (lists, thresholds, the k best) and the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alure {

// Queries against rows packed as panels: score(query, row) = bias[row] + query · row, a float32 sum in the order of d.
struct ScoreTile {
    const float* queries;  // [num_queries, d]
    std::int64_t num_queries, d;
    const float* panels;  // of `columns` rows, whole panels
    const float* bias;    // [columns], −inf where the panel holds no row
    std::int64_t columns;
};

struct Hit {
    std::int32_t query, column;
    float score;
};

struct NeighborKernels {
    std::int64_t panel_rows;  // rows of a panel
    std::int64_t query_rows;  // num_queries is best a multiple of it
    // Packs `rows` rows, row after row, as panels of round_up(rows, panel_rows) rows.
    void (*pack)(const float* x, std::int64_t rows, std::int64_t d, float* panels);
    // scores [num_queries, columns].
    void (*scores)(const ScoreTile&, float* scores);
    // Scores of at least their query's threshold, from column `first` on, until `out` might not hold those of two
    // more panels: returns the column to go on from, and their number in `count`.
    std::int64_t (*hits)(const ScoreTile&, const float* thresholds, std::int64_t first, Hit* out,
                         std::int64_t capacity, std::int64_t* count);
    // The k-th largest of `count` ≥ k values, or a little less with no value between; values may be −inf.
    float (*kth_largest)(const float* values, std::int64_t count, std::int64_t k);
    // The k largest of `count` ≥ k values, largest first, of equal ones the first first; none may be NaN or infinite.
    // scratch: 8 · (k + panel_rows) bytes.
    void (*largest)(const float* values, std::int64_t count, std::int64_t k, void* scratch, float* best,
                    std::int32_t* index);
    // Σ x·y, or −Σ (x − y)², in float64 in an order of its own, the same for every instruction set, rounded once.
    float (*inner_product)(const float* x, const float* y, std::int64_t d);
    float (*negated_distance)(const float* x, const float* y, std::int64_t d);
};

namespace portable {
extern const NeighborKernels neighbor_kernels;
}
namespace avx2 {
extern const NeighborKernels neighbor_kernels;
}
namespace avx512 {
extern const NeighborKernels neighbor_kernels;
}

}  // namespace alure
