// Products of a few queries with packed rows, in float32: all scores, or those that reach a threshold.
#pragma once

#include "neighbors_kernels.h"
#include "neighbors_selection.h"
#include "panels.h"

namespace alure {
namespace {

// Panels are taken in pairs: kPair columns and kRows queries are a register tile.
constexpr std::int64_t kPair = 2 * kLanes;

inline void pack(const float* x, std::int64_t rows, std::int64_t d, float* panels) {
    pack_transposed(x, d, rows, d, 0, d, panels);
}

// sums [Rows, Vectors · kLanes] = bias + queries · panels, in registers.
template <int Rows, int Vectors>
inline void multiply_tile(const float* queries, std::int64_t d, const float* panels, const float* bias,
                          Floats (&sums)[Rows][Vectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) sums[row][v] = load(bias + v * kLanes);
    for (std::int64_t k = 0; k < d; ++k) {
        Floats right[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) right[v] = load(panels + (v * d + k) * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
            const Floats left = splat(queries[row * d + k]);
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) sums[row][v] += left * right[v];
        }
    }
}

// visit(first query, first column, sums) for every register tile of the columns [begin, end) of the scores.
template <int Vectors, int Rows = kRows, class Visit>
inline void visit_rows(const ScoreTile& t, std::int64_t query, std::int64_t column, Visit visit) {
    if constexpr (Rows == kRows)
        for (; query + kRows <= t.num_queries; query += kRows) {
            Floats sums[Rows][Vectors];
            multiply_tile<Rows, Vectors>(t.queries + query * t.d, t.d, t.panels + column * t.d, t.bias + column, sums);
            visit(query, column, sums);
        }
    else if (query + Rows == t.num_queries) {
        Floats sums[Rows][Vectors];
        multiply_tile<Rows, Vectors>(t.queries + query * t.d, t.d, t.panels + column * t.d, t.bias + column, sums);
        visit(query, column, sums);
        return;
    }
    if constexpr (Rows > 1) visit_rows<Vectors, Rows - 1>(t, query, column, visit);
}

template <class Visit>
inline std::int64_t visit_pair(const ScoreTile& t, std::int64_t column, Visit visit) {
    if (column + kPair <= t.columns) {
        visit_rows<2>(t, 0, column, visit);
        return column + kPair;
    }
    visit_rows<1>(t, 0, column, visit);
    return column + kLanes;
}

void scores(const ScoreTile& t, float* out) {
    for (std::int64_t column = 0; column < t.columns;)
        column = visit_pair(t, column, [&]<int Rows, int Vectors>(std::int64_t query, std::int64_t first,
                                                                  const Floats(&sums)[Rows][Vectors]) {
            for (int row = 0; row < Rows; ++row)
                for (int v = 0; v < Vectors; ++v)
                    store(out + (query + row) * t.columns + first + v * kLanes, sums[row][v]);
        });
}

std::int64_t hits(const ScoreTile& t, const float* thresholds, std::int64_t first, Hit* out, std::int64_t capacity,
                  std::int64_t* count) {
    std::int64_t found = 0;
    while (first < t.columns && found + kPair * t.num_queries <= capacity)
        first = visit_pair(t, first, [&]<int Rows, int Vectors>(std::int64_t query, std::int64_t column,
                                                                const Floats(&sums)[Rows][Vectors]) {
            const float* threshold = thresholds + query;
            Floats above = splat(-kInfinity);
#pragma GCC unroll 16
            for (int row = 0; row < Rows; ++row) {
                Floats best = sums[row][0];
                if constexpr (Vectors == 2) best = larger_lanes(best, sums[row][1]);
                above = larger_lanes(above, best - threshold[row]);
            }
            if (lane_mask(above >= 0.0f) == 0) [[likely]] return;
            for (int row = 0; row < Rows; ++row)
                for (int v = 0; v < Vectors; ++v)
                    for (unsigned mask = lane_mask(sums[row][v] >= threshold[row]); mask; mask &= mask - 1) {
                        const int lane = __builtin_ctz(mask);
                        out[found++] = {static_cast<std::int32_t>(query + row),
                                        static_cast<std::int32_t>(column + v * kLanes + lane), sums[row][v][lane]};
                    }
        });
    *count = found;
    return first;
}

}  // namespace
}  // namespace alure
