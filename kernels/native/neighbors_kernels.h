// The boundary between neighbors.cpp (lists, thresholds, the k best) and the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alure {

// Inner products, or −|q − x|² / 2: both are larger for nearer rows.
enum class Metric { kInnerProduct, kSquaredDistance };

// The rows of a list packed as panels, and what turns a product into a score. A filter may move the origin to the
// list's `center`, and may round: |score + shift − exact score| ≤ residual · |q'| + norm · |q' − rounded q'|, beside
// float32's rounding; q' is the query as the filter sees it.
struct PackedRows {
    const float* center;  // [d]
    char* panels;         // [columns, row_bytes], columns a multiple of panel_rows
    float* bias;          // [columns], −inf where there is no row
    float* scale;         // [columns]
    std::int32_t* zero;   // [columns]
};

struct RowsBound {
    float residual, norm;  // the largest |x' − rounded x'| and |rounded x'| of a list
};

struct PackedQuery {
    float scale, shift;    // exact score ≈ kernel's score + shift
    float norm, residual;  // bounds on |q'| and |q' − rounded q'|
};

// Queries against columns: score(query, column) = bias + query scale · column scale · (product − zero).
struct ScoreTile {
    const char* queries;        // [num_queries, query_bytes], zeros beyond up to a multiple of query_rows
    const float* query_scales;  // [num_queries], zeros beyond
    std::int64_t num_queries, d;
    PackedRows rows;
    std::int64_t columns;
};

struct Hit {
    std::int32_t query, column;
};

// Fast scores of many queries with many rows.
struct Filter {
    std::int64_t most_channels;
    std::int64_t panel_rows;  // rows of a panel
    std::int64_t query_rows;  // queries of a register tile
    std::int64_t (*row_bytes)(std::int64_t d);
    std::int64_t (*query_bytes)(std::int64_t d);
    RowsBound (*pack_rows)(const float* x, std::int64_t rows, std::int64_t d, Metric, const PackedRows&);
    PackedQuery (*pack_query)(const float* query, const float* center, std::int64_t d, Metric, char* packed);
    // scores [num_queries rounded up to query_rows, columns].
    void (*scores)(const ScoreTile&, float* scores);
    // Scores of at least their query's threshold (+inf beyond num_queries), from column `first` on, until `out` might
    // not hold those of two more panels: returns the column to go on from, and their number in `count`.
    std::int64_t (*hits)(const ScoreTile&, const float* thresholds, std::int64_t first, Hit* out,
                         std::int64_t capacity, std::int64_t* count);
};

struct NeighborKernels {
    Filter exact;   // float32 sums in the order of d
    Filter filter;  // the fastest
    // Arrays of values are whole vectors, `count` a multiple of panel_rows; −inf is none of the values.
    //
    // The k-th largest, or a little less with no value between; −inf where there are fewer than k.
    float (*kth_largest)(const float* values, std::int64_t count, std::int64_t k);
    // The k largest, largest first, of equal ones the first first; there must be k.
    // scratch: 8 · (k + panel_rows) bytes.
    void (*largest)(const float* values, std::int64_t count, std::int64_t k, void* scratch, float* best,
                    std::int32_t* index);
    // Places of the values within `width` of the largest, in order; returns their number.
    std::int64_t (*near_largest)(const float* values, std::int64_t count, float width, std::int32_t* places);
    // sums [d] += sign · x.
    void (*add)(const float* x, std::int64_t d, double sign, double* sums);
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
namespace avx512_vnni {
extern const NeighborKernels neighbor_kernels;
}
namespace amx {
extern const NeighborKernels neighbor_kernels;
}
namespace emulated_amx {
extern const NeighborKernels neighbor_kernels;
}

}  // namespace alure
