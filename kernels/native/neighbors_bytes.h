// Vectors rounded to integers of a byte, with a bound on what that changes.
//
// The origin is the mean of a list, so that what is rounded is the difference to it, however alike the vectors are:
//   q·x = q·m + m·x' + q'·x'    −|q − x|²/2 = −|q'|²/2 − |x'|²/2 + q'·x'    with q' = q − m, x' = x − m
// Panels hold four channels of each of their rows side by side: the operand of maddubs, of VNNI and of byte tiles.
#pragma once

#include "neighbors_products.h"

// Tiles multiply signed bytes. Vectors multiply unsigned by signed bytes, so kOffset is added to a query's, and `zero`
// takes it back; AVX2 adds pairs of products in 16 bits, which leaves room for integers up to 31 only.
#if defined(__AMX_INT8__) || defined(ALURE_EMULATED_AMX)
#define ALURE_BYTE_TILES
#elif defined(__AVX512VNNI__) || defined(__AVX2__)
#define ALURE_BYTE_VECTORS
#endif

#if defined(ALURE_BYTE_TILES) || defined(ALURE_BYTE_VECTORS)

namespace alure {
namespace {
namespace bytes {

constexpr std::int64_t kGroup = 4;  // channels side by side in a 32-bit lane
#if defined(ALURE_BYTE_TILES)
constexpr int kMost = 127, kOffset = 0;
constexpr std::int64_t kChannels = 64;  // bytes of a query are a multiple of it
#elif defined(__AVX512VNNI__)
constexpr int kMost = 127, kOffset = 128;
constexpr std::int64_t kChannels = 16;
#else
constexpr int kMost = 31, kOffset = 31;
constexpr std::int64_t kChannels = 16;
#endif

std::int64_t row_bytes(std::int64_t d) { return round_up(d, kChannels); }

// The low byte of every lane. GCC 12 converts vectors lane by lane.
inline void store_low_bytes(char* p, Ints x) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
    const __m256i low = reinterpret_cast<__m256i>(x & 0xFF);
    const __m128i shorts = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(shorts, shorts));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<char>(x[i]);
#endif
}

struct Rounded {
    float scale, norm, residual;  // x' ≈ scale · bytes; bounds on |x'| and |x' − scale · bytes|
    std::int32_t sum;             // of the bytes
};

// The bytes are x' / scale rounded, with kOffset added where they are a query's.
template <int kAdded>
inline Rounded round_to_bytes(const float* x, std::int64_t d, float peak, char* to) {
    constexpr float kMagic = 12582912.0f;  // 1.5·2²³: the integer ends up in the low bits
    if (peak < 1e-36f) {                   // the scale's inverse would overflow
        for (std::int64_t i = 0; i < d; ++i) to[i] = kAdded;
        const float norm = peak * __builtin_sqrtf(static_cast<float>(d));
        return {0.0f, norm, norm, 0};
    }
    const float scale = peak / kMost, factor = kMost / peak;
    Floats residuals{}, squares{}, sums{};
    const auto round = [&](Floats value) ALURE_INLINE {
        const Floats exact = value * factor, magic = exact + kMagic, whole = magic - kMagic, left = exact - whole;
        residuals += left * left;
        squares += whole * whole;
        sums += whole;
        return reinterpret_cast<Ints>(magic) + kAdded;
    };
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store_low_bytes(to + i, round(load(x + i)));
    if (i < d) {
        Floats rest{};
        for (std::int64_t lane = 0; i + lane < d; ++lane) rest[lane] = x[i + lane];
        const Ints rounded = round(rest);
        for (; i < d; ++i) to[i] = static_cast<char>(rounded[i % kLanes]);
    }
    const float residual = scale * __builtin_sqrtf(sum_of_lanes(residuals));
    return {scale, scale * __builtin_sqrtf(sum_of_lanes(squares)) + residual, residual,
            static_cast<std::int32_t>(sum_of_lanes(sums))};
}

struct Centred {
    float peak, product;  // the largest |x'|; Σ x · center, or Σ x'²
};

// x' = x − center.
template <Metric kMetric>
inline Centred centre(const float* x, const float* center, std::int64_t d, float* to) {
    Floats peaks{}, products{};
    const auto move = [&](Floats value, Floats origin) ALURE_INLINE {
        const Floats moved = value - origin;
        const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Ints>(moved) & 0x7FFFFFFF);
        peaks = larger_lanes(size, peaks);
        products += kMetric == Metric::kInnerProduct ? value * origin : moved * moved;
        return moved;
    };
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store(to + i, move(load(x + i), load(center + i)));
    if (i < d) {
        Floats value{}, origin{};
        for (std::int64_t lane = 0; i + lane < d; ++lane) {
            value[lane] = x[i + lane];
            origin[lane] = center[i + lane];
        }
        const Floats moved = move(value, origin);
        for (; i < d; ++i) to[i] = moved[i % kLanes];
    }
    return {largest_of_lanes(peaks), sum_of_lanes(products)};
}

constexpr std::int64_t kMostChannels = 4096;

RowsBound pack_rows(const float* x, std::int64_t rows, std::int64_t d, Metric metric, const PackedRows& to) {
    float moved[kMostChannels];
    char bytes[kMostChannels];
    RowsBound bound{0.0f, 0.0f};
    const std::int64_t columns = round_up(rows, kLanes), size = row_bytes(d);
    for (std::int64_t i = 0; i < columns * size; ++i) to.panels[i] = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
        to.bias[i] = -kInfinity;
        to.scale[i] = 0.0f;
        to.zero[i] = 0;
        if (i >= rows) continue;
        const Centred centred = centre<Metric::kInnerProduct>(x + i * d, to.center, d, moved);
        const Rounded row = round_to_bytes<0>(moved, d, centred.peak, bytes);
        char* panel = to.panels + i / kLanes * kLanes * size + i % kLanes * kGroup;
        double dot = 0.0, square = 0.0;
        for (std::int64_t c = 0; c < d; ++c) {
            panel[c / kGroup * kLanes * kGroup + c % kGroup] = bytes[c];
            dot += double{to.center[c]} * moved[c];
            square += double{moved[c]} * moved[c];
        }
        to.scale[i] = row.scale;
        to.zero[i] = kOffset * row.sum;
        to.bias[i] = metric == Metric::kInnerProduct ? static_cast<float>(dot) : half_negated(square);
        bound.residual = larger(bound.residual, row.residual);
        bound.norm = larger(bound.norm, row.norm);
    }
    return bound;
}

template <Metric kMetric>
inline PackedQuery pack_query(const float* query, const float* center, std::int64_t d, char* packed) {
    float moved[kMostChannels];
    const Centred centred = centre<kMetric>(query, center, d, moved);
    const Rounded q = round_to_bytes<kOffset>(moved, d, centred.peak, packed);
    for (std::int64_t i = d; i < row_bytes(d); ++i) packed[i] = 0;
    return {q.scale, kMetric == Metric::kInnerProduct ? centred.product : -0.5f * centred.product, q.norm, q.residual};
}

PackedQuery pack_query(const float* query, const float* center, std::int64_t d, Metric metric, char* packed) {
    return metric == Metric::kInnerProduct ? pack_query<Metric::kInnerProduct>(query, center, d, packed)
                                           : pack_query<Metric::kSquaredDistance>(query, center, d, packed);
}

}  // namespace bytes
}  // namespace
}  // namespace alure

#endif
