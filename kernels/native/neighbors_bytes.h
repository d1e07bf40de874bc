// Products of vectors rounded to integers −31 … 31: twice as fast as in float32 with AVX2, with a bound on the error.
//
// The origin is the mean of a list, so that what is rounded is the difference to it, however alike the vectors are:
//   q·x = q·m + m·x' + q'·x'    −|q − x|²/2 = −|q'|²/2 − |x'|²/2 + q'·x'    with q' = q − m, x' = x − m
// Queries are stored with 31 added, as the instruction multiplies unsigned by signed bytes; `zero` takes it back. Two
// products make at most 2·62·31: eight such sums fit into 16 bits.
#pragma once

#include "neighbors_products.h"

#if ALURE_VECTOR_BYTES >= 32

namespace alure {
namespace {
namespace bytes {

typedef std::int32_t UnalignedInts __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(4), may_alias));
inline Ints load_ints(const void* p) { return *static_cast<const UnalignedInts*>(p); }

constexpr float kMost = 31.0f;
constexpr std::int64_t kGroup = 4;   // channels side by side in a 32-bit lane
constexpr std::int64_t kUnroll = 4;  // groups a pass of the innermost loop
constexpr std::int64_t kWindow = 8;  // groups summed in 16 bits

std::int64_t row_bytes(std::int64_t d) { return round_up(d, kGroup * kUnroll); }

// x rounded to multiples of `scale`; returns |x − scale · rounded|².
inline float rounded(const float* x, std::int64_t d, float scale, std::int32_t* to) {
    const float factor = scale > 0.0f ? 1.0f / scale : 0.0f;
    Floats squares{};
    std::int64_t i = 0;
    const auto round = [=](Floats value) { return value * factor + 12582912.0f - 12582912.0f; };  // 1.5·2^23
    for (; i + kLanes <= d; i += kLanes) {
        const Floats value = load(x + i), whole = round(value), left = value - whole * scale;
        squares += left * left;
        *reinterpret_cast<UnalignedInts*>(to + i) = __builtin_convertvector(whole, Ints);
    }
    float sum = sum_of_lanes(squares);
    for (; i < d; ++i) {
        const float whole = round(splat(x[i]))[0], left = x[i] - whole * scale;
        sum += left * left;
        to[i] = static_cast<std::int32_t>(whole);
    }
    return sum;
}

struct Centred {
    float peak, square, dot;  // the largest |x'|, Σ x'², Σ x · center
};

inline Centred centre(const float* x, const float* center, std::int64_t d, float* to) {
    Floats peaks{}, squares{}, dots{};
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) {
        const Floats value = load(x + i), origin = load(center + i), moved = value - origin;
        store(to + i, moved);
        peaks = larger_lanes(peaks, larger_lanes(moved, -moved));
        squares += moved * moved;
        dots += value * origin;
    }
    Centred all{largest_of_lanes(peaks), sum_of_lanes(squares), sum_of_lanes(dots)};
    for (; i < d; ++i) {
        const float moved = x[i] - center[i];
        to[i] = moved;
        all.peak = larger(all.peak, larger(moved, -moved));
        all.square += moved * moved;
        all.dot += x[i] * center[i];
    }
    return all;
}

constexpr std::int64_t kMostChannels = 4096;

RowsBound pack_rows(const float* x, std::int64_t rows, std::int64_t d, Metric metric, const PackedRows& to) {
    float moved[kMostChannels];
    std::int32_t whole[kMostChannels];
    RowsBound bound{0.0f, 0.0f};
    const std::int64_t columns = round_up(rows, kLanes), size = row_bytes(d);
    for (std::int64_t i = 0; i < columns * size; ++i) to.panels[i] = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
        to.bias[i] = -kInfinity;
        to.scale[i] = 0.0f;
        to.zero[i] = 0;
        if (i >= rows) continue;
        const Centred row = centre(x + i * d, to.center, d, moved);
        to.scale[i] = row.peak / kMost;
        const float left = rounded(moved, d, to.scale[i], whole);
        char* panel = to.panels + i / kLanes * kLanes * size + i % kLanes * kGroup;
        double dot = 0.0, square = 0.0;
        std::int64_t sum = 0, norm = 0;
        for (std::int64_t c = 0; c < d; ++c) {
            panel[c / kGroup * kLanes * kGroup + c % kGroup] = static_cast<char>(whole[c]);
            sum += whole[c];
            norm += whole[c] * whole[c];
            dot += double{to.center[c]} * moved[c];
            square += double{moved[c]} * moved[c];
        }
        to.zero[i] = static_cast<std::int32_t>(31 * sum);
        to.bias[i] = metric == Metric::kInnerProduct ? static_cast<float>(dot) : half_negated(square);
        bound.residual = larger(bound.residual, __builtin_sqrtf(left));
        bound.norm = larger(bound.norm, to.scale[i] * __builtin_sqrtf(static_cast<float>(norm)));
    }
    return bound;
}

PackedQuery pack_query(const float* query, const float* center, std::int64_t d, Metric metric, char* packed) {
    float moved[kMostChannels];
    std::int32_t whole[kMostChannels];
    const Centred q = centre(query, center, d, moved);
    const float scale = q.peak / kMost, left = rounded(moved, d, scale, whole);
    for (std::int64_t i = 0; i < d; ++i) packed[i] = static_cast<char>(whole[i] + 31);
    for (std::int64_t i = d; i < row_bytes(d); ++i) packed[i] = 0;
    return {scale, metric == Metric::kInnerProduct ? q.dot : -0.5f * q.square, __builtin_sqrtf(q.square),
            __builtin_sqrtf(left)};
}

// Unsigned bytes times signed bytes, neighbours added, in 16 bits; and 16-bit neighbours added, in 32.
inline Ints multiply_bytes(Ints a, Ints b) {
#if ALURE_VECTOR_BYTES == 64
    return reinterpret_cast<Ints>(_mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    return reinterpret_cast<Ints>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#endif
}
inline Ints add_neighbors(Ints a) {
#if ALURE_VECTOR_BYTES == 64
    return reinterpret_cast<Ints>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), _mm512_set1_epi16(1)));
#else
    return reinterpret_cast<Ints>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi16(1)));
#endif
}
typedef std::int16_t Shorts __attribute__((vector_size(ALURE_VECTOR_BYTES)));
inline Ints add_shorts(Ints a, Ints b) {
    return reinterpret_cast<Ints>(reinterpret_cast<Shorts>(a) + reinterpret_cast<Shorts>(b));
}
struct Products {
    static constexpr int kQueries = kRows;

    template <int Vectors>
    static void multiply(const ScoreTile& t, std::int64_t query, std::int64_t column,
                         Floats (&sums)[kQueries][Vectors]) {
        const std::int64_t groups = row_bytes(t.d) / kGroup;
        const char* panel = t.rows.panels + column * groups * kGroup;
        const char* queries = t.queries + query * groups * kGroup;
        Ints totals[kQueries][Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 16
            for (int row = 0; row < kQueries; ++row) totals[row][v] = -load_ints(t.rows.zero + column + v * kLanes);
        for (std::int64_t first = 0; first < groups; first += kWindow) {
            Ints window[kQueries][Vectors] = {};
            for (std::int64_t g = first; g < smaller(first + kWindow, groups); g += kUnroll) {
#pragma GCC unroll 4
                for (int i = 0; i < kUnroll; ++i) {
                    Ints right[Vectors];
#pragma GCC unroll 2
                    for (int v = 0; v < Vectors; ++v)
                        right[v] = load_ints(panel + (v * groups + g + i) * kLanes * kGroup);
#pragma GCC unroll 16
                    for (int row = 0; row < kQueries; ++row) {
                        std::int32_t four;
                        __builtin_memcpy(&four, queries + (row * groups + g + i) * kGroup, 4);
                        const Ints left = four - Ints{};
#pragma GCC unroll 2
                        for (int v = 0; v < Vectors; ++v) {
                            window[row][v] = add_shorts(window[row][v], multiply_bytes(left, right[v]));
                            asm("" : "+v"(window[row][v]));  // else GCC 12 multiplies first, adds later, and spills
                        }
                    }
                }
            }
#pragma GCC unroll 16
            for (int row = 0; row < kQueries; ++row)
#pragma GCC unroll 2
                for (int v = 0; v < Vectors; ++v) totals[row][v] += add_neighbors(window[row][v]);
        }
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

inline constexpr Filter kBytes{bytes::kMostChannels,
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
