// The k largest of an array of scores, without sorting it: bisection of the threshold, then the few that reach it.
// Arrays are whole vectors; what is no score is −inf.
#pragma once

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace alure {
namespace {

constexpr float kLargestFloat = 3.402823466e38f;

// Bit i is set where lane i of a comparison's result is.
inline unsigned lane_mask(Ints lanes) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(lanes));
#elif defined(__AVX2__)
    return static_cast<unsigned>(_mm256_movemask_ps(reinterpret_cast<__m256>(lanes)));
#else
    unsigned mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<unsigned>(lanes[i] & 1) << i;
    return mask;
#endif
}

// Bit i is set where a[i] >= b[i].
inline unsigned mask_at_least(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ);
#else
    return lane_mask(a >= b);
#endif
}

// Float32 bits as integers of the same order.
inline std::int32_t ordered_bits(float x) {
    const std::int32_t bits = __builtin_bit_cast(std::int32_t, x);
    return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}
inline float from_ordered_bits(std::int64_t bits) {
    const std::int32_t low = static_cast<std::int32_t>(bits);
    return __builtin_bit_cast(float, low < 0 ? low ^ 0x7FFFFFFF : low);
}

inline std::int64_t count_at_least(const float* values, std::int64_t count, float least) {
    std::int64_t total = 0;
#if defined(__AVX512F__)
    for (std::int64_t i = 0; i < count; i += kLanes)
        total += __builtin_popcount(mask_at_least(load(values + i), splat(least)));
#else
    Ints counts{};
    for (std::int64_t i = 0; i < count; i += kLanes) counts -= load(values + i) >= least;
    for (int lane = 0; lane < kLanes; ++lane) total += counts[lane];
#endif
    return total;
}

inline float maximum(const float* values, std::int64_t count) {
    Floats tops[2] = {splat(-kInfinity), splat(-kInfinity)};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
        tops[0] = larger_lanes(tops[0], larger_lanes(load(values + i), load(values + i + kLanes)));
        tops[1] = larger_lanes(tops[1], larger_lanes(load(values + i + 2 * kLanes), load(values + i + 3 * kLanes)));
    }
    for (; i < count; i += kLanes) tops[0] = larger_lanes(tops[0], load(values + i));
    return largest_of_lanes(larger_lanes(tops[0], tops[1]));
}

// The smallest value that is not −inf.
inline float finite_minimum(const float* values, std::int64_t count) {
    Floats negated = splat(-kLargestFloat);
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const Floats x = load(values + i);
        negated = larger_lanes(negated, x < -kLargestFloat ? splat(-kLargestFloat) : -x);
    }
    return -largest_of_lanes(negated);
}

float kth_largest(const float* values, std::int64_t count, std::int64_t k) {
    const float smallest = finite_minimum(values, count);
    if (count_at_least(values, count, smallest) < k) return -kInfinity;
    // At least k values reach `low`, fewer reach `high`.
    std::int64_t low = ordered_bits(smallest), high = std::int64_t{ordered_bits(maximum(values, count))} + 1;
    for (int step = 0; high - low > 1; ++step) {
        // Halves of the range of values first: half of all floats lie around zero.
        std::int64_t middle = ordered_bits(0.5f * from_ordered_bits(low) + 0.5f * from_ordered_bits(high - 1));
        if (step >= 24 || middle <= low || middle >= high) middle = low + (high - low) / 2;
        const std::int64_t reach = count_at_least(values, count, from_ordered_bits(middle));
        (reach >= k ? low : high) = middle;
        if (reach == k) break;
    }
    return from_ordered_bits(low);
}

// Sorts pairs largest value first, equals in their order: the place of each is the number of those before it.
// Reads whole vectors of `values`; what is beyond `count` is overwritten.
inline void sort_by_rank(float* values, const std::int32_t* index, std::int64_t count, float* sorted,
                         std::int32_t* sorted_index) {
    for (std::int64_t i = count; i < round_up(count, kLanes); ++i) values[i] = -kInfinity;
    for (std::int64_t first = 0; first < count; first += kLanes) {
        const Floats own = load(values + first);
        const std::int64_t last = smaller<std::int64_t>(first + kLanes, count);
        Ints places{};
        for (std::int64_t j = 0; j < first; ++j) places -= splat(values[j]) >= own;
        for (std::int64_t j = first; j < last; ++j) {
            const Floats other = splat(values[j]);
            const Ints after = lane_numbers() > static_cast<std::int32_t>(j - first);
            places -= (other > own) | ((other == own) & after);
        }
        for (std::int64_t j = last; j < count; ++j) places -= splat(values[j]) > own;
        for (std::int64_t i = first; i < last; ++i) {
            sorted[places[i - first]] = values[i];
            sorted_index[places[i - first]] = index[i];
        }
    }
}

std::int64_t near_largest(const float* values, std::int64_t count, float width, std::int32_t* places) {
    constexpr std::int64_t kBits = 64;  // values that are looked at together: few of them are near, so few branches
    const Floats least = splat(maximum(values, count) - width);
    std::int32_t* end = places;
    const auto add = [&](std::int64_t first, std::uint64_t near) ALURE_INLINE {
        for (; near != 0; near &= near - 1) *end++ = static_cast<std::int32_t>(first) + __builtin_ctzll(near);
    };
    std::int64_t i = 0;
    for (; i + kBits <= count; i += kBits) {
        std::uint64_t near = 0;
#pragma GCC unroll 16
        for (std::int64_t j = 0; j < kBits; j += kLanes)
            near |= std::uint64_t{mask_at_least(load(values + i + j), least)} << j;
        add(i, near);
    }
    for (; i < count; i += kLanes) add(i, mask_at_least(load(values + i), least));
    return end - places;
}

void largest(const float* values, std::int64_t count, std::int64_t k, void* scratch, float* best,
             std::int32_t* index) {
    const float least = kth_largest(values, count, k);
    // Of values equal to `least` the last may have to stay out.
    std::int64_t equals = k;
    for (std::int64_t i = 0; i < count; ++i) equals -= values[i] > least;
    float* kept = static_cast<float*>(scratch);
    std::int32_t* kept_index = reinterpret_cast<std::int32_t*>(kept + round_up(k, kLanes));
    std::int64_t n = 0;
    const auto keep = [&](std::int64_t i) {
        if (values[i] == least && equals-- <= 0) return;
        kept[n] = values[i];
        kept_index[n++] = static_cast<std::int32_t>(i);
    };
    for (std::int64_t i = 0; i < count; i += kLanes)
        for (unsigned mask = mask_at_least(load(values + i), splat(least)); mask != 0; mask &= mask - 1)
            keep(i + __builtin_ctz(mask));
    sort_by_rank(kept, kept_index, n, best, index);
}

}  // namespace
}  // namespace alure
