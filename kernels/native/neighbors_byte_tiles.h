// Products of bytes in AMX tiles: 16 queries × 32 rows at a time.
#pragma once

#include "neighbors_bytes.h"

#if defined(ALURE_BYTE_TILES)

#include "amx_tiles.h"

namespace alure {
namespace {
namespace bytes {

constexpr std::int64_t kTileRows = 16, kTileColumns = 32;  // queries and rows of one product

// sums [kTileRows, kTileColumns] = queries · rows, of one panel or two. Of two sets of tiles one is stored while the
// other multiplies.
template <int kSet, int Panels>
inline void multiply(const char* queries, const char* panel, std::int64_t size, std::int32_t* sums) {
    constexpr int kSums = 2 * kSet, kQueries = 4 + kSet;
    zero_tile<kSums>();
    if constexpr (Panels == 2) zero_tile<kSums + 1>();
    for (std::int64_t first = 0; first < size; first += kChannels) {
        load_tile<kQueries>(queries + first, size);
        load_tile<6>(panel + first * kLanes, kChannels);
        multiply_byte_tiles<kSums, kQueries, 6>();
        if constexpr (Panels == 2) {
            load_tile<7>(panel + (first + size) * kLanes, kChannels);
            multiply_byte_tiles<kSums + 1, kQueries, 7>();
        }
    }
    constexpr std::int64_t stride = kTileColumns * sizeof(std::int32_t);
    store_tile<kSums>(sums, stride);
    if constexpr (Panels == 2) store_tile<kSums + 1>(sums + kLanes, stride);
}

// visit(query, scores) for every query. The tiles multiply for the next ones meanwhile; both blocks of sums lie in one
// page, so that no load looks like one of what is being stored.
template <int Panels, class Visit>
inline void visit_queries(const ScoreTile& t, std::int64_t column, Visit visit) {
    alignas(64) std::int32_t sums[2][kTileRows * kTileColumns];
    const std::int64_t size = row_bytes(t.d), num_queries = t.num_queries;
    const char *queries = t.queries, *panel = t.rows.panels + column * size;
    const float* query_scales = t.query_scales;
    Floats scale[Panels], bias[Panels];
    for (int v = 0; v < Panels; ++v) {
        scale[v] = load(t.rows.scale + column + v * kLanes);
        bias[v] = load(t.rows.bias + column + v * kLanes);
    }
    const auto visit_rows = [&](std::int64_t query, const std::int32_t* row) ALURE_INLINE {
#pragma GCC unroll 4
        for (std::int64_t i = query; i < query + kTileRows; ++i, row += kTileColumns) {
            Floats scores[Panels];
#pragma GCC unroll 2
            for (int v = 0; v < Panels; ++v)
                scores[v] = bias[v] + __builtin_convertvector(load_ints(row + v * kLanes), Floats) * scale[v] *
                                          query_scales[i];  // the product of two scales might be denormal
            visit(i, scores);
        }
    };
    multiply<0, Panels>(queries, panel, size, sums[0]);
    for (std::int64_t query = 0; query < num_queries; query += 2 * kTileRows) {
        const std::int64_t second = query + kTileRows, next = second + kTileRows;
        if (second < num_queries) multiply<1, Panels>(queries + second * size, panel, size, sums[1]);
        visit_rows(query, sums[0]);
        if (second >= num_queries) break;
        if (next < num_queries) multiply<0, Panels>(queries + next * size, panel, size, sums[0]);
        visit_rows(second, sums[1]);
    }
}

// visit(query, first column, scores) for one or two panels; returns the next column.
template <class Visit>
inline std::int64_t visit_columns(const ScoreTile& t, std::int64_t column, Visit visit) {
    const auto from = [=](std::int64_t query, const auto& scores) ALURE_INLINE { visit(query, column, scores); };
    if (column + kTileColumns <= t.columns) {
        visit_queries<2>(t, column, from);
        return column + kTileColumns;
    }
    visit_queries<1>(t, column, from);
    return column + kLanes;
}

void tile_scores(const ScoreTile& t, float* out) {
    begin_tiles();
    for (std::int64_t column = 0; column < t.columns;)
        column = visit_columns(t, column, [&]<int Panels>(std::int64_t query, std::int64_t first,
                                                          const Floats(&scores)[Panels]) ALURE_INLINE {
            for (int v = 0; v < Panels; ++v) store(out + query * t.columns + first + v * kLanes, scores[v]);
        });
    end_tiles();
}

std::int64_t tile_hits(const ScoreTile& t, const float* thresholds, std::int64_t first, Hit* out,
                       std::int64_t capacity, std::int64_t* count) {
    Hit* end = out;
    begin_tiles();
    while (first < t.columns && end - out + kTileColumns * t.num_queries <= capacity)
        first = visit_columns(t, first, [thresholds, &end]<int Panels>(std::int64_t query, std::int64_t column,
                                                                       const Floats(&scores)[Panels]) ALURE_INLINE {
            const float threshold = thresholds[query];
            Floats best = scores[0];
            if constexpr (Panels == 2) best = larger_lanes(best, scores[1]);
            if (mask_at_least(best, splat(threshold)) == 0) [[likely]] return;
            for (int v = 0; v < Panels; ++v)
                end = add_hits(mask_at_least(scores[v], splat(threshold)), query, column + v * kLanes, end);
        });
    end_tiles();
    *count = end - out;
    return first;
}

}  // namespace bytes

inline constexpr Filter kByteTiles{bytes::kMostChannels,
                                   kLanes,
                                   bytes::kTileRows,
                                   bytes::row_bytes,
                                   bytes::row_bytes,
                                   bytes::pack_rows,
                                   bytes::pack_query,
                                   bytes::tile_scores,
                                   bytes::tile_hits};

}  // namespace
}  // namespace alure

#endif
