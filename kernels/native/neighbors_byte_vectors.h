// Products of bytes in vectors: four neighbours at once with VNNI, two with AVX2, twice as fast as float32's.
#pragma once

#include "neighbors_bytes.h"

#if defined(ALURE_BYTE_VECTORS)

namespace alure {
namespace {
namespace bytes {

inline Ints load_bytes(const char* p) { return *reinterpret_cast<const UnalignedInts*>(p); }
inline Ints splat_group(const char* p) {
    std::int32_t group;
    __builtin_memcpy(&group, p, kGroup);
    return splat(group);
}

#if defined(__AVX512VNNI__)

// totals += unsigned queries · signed rows.
template <int Vectors>
inline void add_products(const char* queries, const char* panel, std::int64_t groups, Ints (&totals)[kRows][Vectors]) {
    for (std::int64_t g = 0; g < groups; ++g) {
        Ints right[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) right[v] = load_bytes(panel + (v * groups + g) * kLanes * kGroup);
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            const Ints left = splat_group(queries + (row * groups + g) * kGroup);
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v)
                totals[row][v] = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(totals[row][v]),
                                                                            reinterpret_cast<__m512i>(left),
                                                                            reinterpret_cast<__m512i>(right[v])));
        }
    }
}

#else

constexpr std::int64_t kUnroll = 4;  // groups a pass of the innermost loop
constexpr std::int64_t kWindow = 8;  // groups summed in 16 bits: two products make at most 2·62·31

typedef std::int16_t Shorts __attribute__((vector_size(ALURE_VECTOR_BYTES)));
inline Ints add_shorts(Ints a, Ints b) {
    return reinterpret_cast<Ints>(reinterpret_cast<Shorts>(a) + reinterpret_cast<Shorts>(b));
}
// Unsigned bytes times signed bytes, neighbours added, in 16 bits; and 16-bit neighbours added, in 32.
inline Ints multiply_bytes(Ints a, Ints b) {
    return reinterpret_cast<Ints>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
inline Ints add_neighbors(Ints a) {
    return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi16(1)));
}

// totals += unsigned queries · signed rows.
template <int Vectors>
inline void add_products(const char* queries, const char* panel, std::int64_t groups, Ints (&totals)[kRows][Vectors]) {
    for (std::int64_t first = 0; first < groups; first += kWindow) {
        Ints window[kRows][Vectors] = {};
        for (std::int64_t g = first; g < smaller(first + kWindow, groups); g += kUnroll) {
#pragma GCC unroll 4
            for (int i = 0; i < kUnroll; ++i) {
                Ints right[Vectors];
#pragma GCC unroll 2
                for (int v = 0; v < Vectors; ++v) right[v] = load_bytes(panel + (v * groups + g + i) * kLanes * kGroup);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    const Ints left = splat_group(queries + (row * groups + g + i) * kGroup);
#pragma GCC unroll 2
                    for (int v = 0; v < Vectors; ++v) {
                        window[row][v] = add_shorts(window[row][v], multiply_bytes(left, right[v]));
                        asm("" : "+v"(window[row][v]));  // else GCC 12 multiplies first, adds later, and spills
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) totals[row][v] += add_neighbors(window[row][v]);
    }
}

#endif

struct Products {
    static constexpr int kQueries = kRows;

    template <int Vectors>
    static void multiply(const ScoreTile& t, std::int64_t query, std::int64_t column,
                         Floats (&sums)[kQueries][Vectors]) {
        const std::int64_t size = row_bytes(t.d);
        Ints totals[kQueries][Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 16
            for (int row = 0; row < kQueries; ++row) totals[row][v] = -load_ints(t.rows.zero + column + v * kLanes);
        add_products(t.queries + query * size, t.rows.panels + column * size, size / kGroup, totals);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
            const Floats scale = load(t.rows.scale + column + v * kLanes);
            const Floats bias = load(t.rows.bias + column + v * kLanes);
#pragma GCC unroll 16
            for (int row = 0; row < kQueries; ++row)
                sums[row][v] =
                    bias + __builtin_convertvector(totals[row][v], Floats) * scale * t.query_scales[query + row];
        }
    }
};

}  // namespace bytes

inline constexpr Filter kByteVectors{bytes::kMostChannels,
                                     kLanes,
                                     bytes::Products::kQueries,
                                     bytes::row_bytes,
                                     bytes::row_bytes,
                                     bytes::pack_rows,
                                     bytes::pack_query,
                                     scores<bytes::Products>,
                                     hits<bytes::Products>};

}  // namespace
}  // namespace alure

#endif
