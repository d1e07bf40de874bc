// Float32 products of a few queries with packed rows: all scores, or those that reach a threshold.
#pragma once

#include "neighbors_kernels.h"
#include "neighbors_selection.h"
#include "panels.h"

namespace alure {
namespace {

// Panels are taken in pairs: kPair columns and a few queries are a register tile.
constexpr std::int64_t kPair = 2 * kLanes;

inline double squared_norm(const float* x, std::int64_t d) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < d; ++i) sum += double{x[i]} * x[i];
    return sum;
}

inline float half_negated(double square) { return static_cast<float>(-0.5 * square); }

namespace float32 {

std::int64_t row_bytes(std::int64_t d) { return d * 4; }

RowsBound pack_rows(const float* x, std::int64_t rows, std::int64_t d, Metric metric, const PackedRows& to) {
    pack_transposed(x, d, rows, d, 0, d, reinterpret_cast<float*>(to.panels));
    for (std::int64_t i = 0; i < round_up(rows, kLanes); ++i)
        to.bias[i] = i >= rows                          ? -kInfinity
                     : metric == Metric::kInnerProduct ? 0.0f
                                                       : half_negated(squared_norm(x + i * d, d));
    return {0.0f, 0.0f};
}

PackedQuery pack_query(const float* query, const float*, std::int64_t d, Metric metric, char* packed) {
    float* to = reinterpret_cast<float*>(packed);
    for (std::int64_t i = 0; i < d; ++i) to[i] = query[i];
    const double square = squared_norm(query, d);
    return {1.0f, metric == Metric::kInnerProduct ? 0.0f : half_negated(square),
            static_cast<float>(__builtin_sqrt(square)), 0.0f};
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

struct Products {
    static constexpr int kQueries = kRows;

    // The scores of kQueries queries and Vectors panels.
    template <int Vectors>
    static void multiply(const ScoreTile& t, std::int64_t query, std::int64_t column, Floats (&sums)[kRows][Vectors]) {
        multiply_tile<kRows, Vectors>(reinterpret_cast<const float*>(t.queries) + query * t.d, t.d,
                                      reinterpret_cast<const float*>(t.rows.panels) + column * t.d,
                                      t.rows.bias + column, sums);
    }
};

}  // namespace float32

// visit(first query, first column, sums) for the register tiles of one or two panels; returns the next column.
template <class Products, class Visit>
inline std::int64_t visit_panels(const ScoreTile& t, std::int64_t column, Visit visit) {
    if (column + kPair <= t.columns) {
        for (std::int64_t query = 0; query < t.num_queries; query += Products::kQueries) {
            Floats sums[Products::kQueries][2];
            Products::multiply(t, query, column, sums);
            visit(query, column, sums);
        }
        return column + kPair;
    }
    for (std::int64_t query = 0; query < t.num_queries; query += Products::kQueries) {
        Floats sums[Products::kQueries][1];
        Products::multiply(t, query, column, sums);
        visit(query, column, sums);
    }
    return column + kLanes;
}

template <class Products>
void scores(const ScoreTile& t, float* out) {
    for (std::int64_t column = 0; column < t.columns;)
        column = visit_panels<Products>(t, column, [&]<int Rows, int Vectors>(std::int64_t query, std::int64_t first,
                                                                             const Floats(&sums)[Rows][Vectors]) {
            for (int row = 0; row < Rows; ++row)
                for (int v = 0; v < Vectors; ++v)
                    store(out + (query + row) * t.columns + first + v * kLanes, sums[row][v]);
        });
}

// The hits of kPair scores that reach a threshold; returns the end. Apart, since they are rare.
[[gnu::noinline]] Hit* add_hits(unsigned reach, std::int64_t query, std::int64_t column, Hit* end) {
    for (; reach != 0; reach &= reach - 1)
        *end++ = {static_cast<std::int32_t>(query), static_cast<std::int32_t>(column + __builtin_ctz(reach))};
    return end;
}

template <class Products>
std::int64_t hits(const ScoreTile& t, const float* thresholds, std::int64_t first, Hit* out, std::int64_t capacity,
                  std::int64_t* count) {
    Hit* end = out;
    while (first < t.columns && end - out + kPair * t.num_queries <= capacity)
        first = visit_panels<Products>(t, first, [&]<int Rows, int Vectors>(std::int64_t query, std::int64_t column,
                                                                           const Floats(&sums)[Rows][Vectors]) {
            const float* threshold = thresholds + query;
            Floats above = splat(-kInfinity);
#pragma GCC unroll 16
            for (int row = 0; row < Rows; ++row) {
                Floats best = sums[row][0];
                if constexpr (Vectors == 2) best = larger_lanes(best, sums[row][1]);
                above = larger_lanes(above, best - threshold[row]);
            }
            if (mask_at_least(above, Floats{}) == 0) [[likely]] return;
#pragma GCC unroll 16
            for (int row = 0; row < Rows; ++row) {
                unsigned reach = mask_at_least(sums[row][0], splat(threshold[row]));
                if constexpr (Vectors == 2) reach |= mask_at_least(sums[row][1], splat(threshold[row])) << kLanes;
                if (reach != 0) end = add_hits(reach, query + row, column, end);
            }
        });
    *count = end - out;
    return first;
}

inline constexpr Filter kFloat32{std::int64_t{1} << 31,
                                 kLanes,
                                 kRows,
                                 float32::row_bytes,
                                 float32::row_bytes,
                                 float32::pack_rows,
                                 float32::pack_query,
                                 scores<float32::Products>,
                                 hits<float32::Products>};

}  // namespace
}  // namespace alure
