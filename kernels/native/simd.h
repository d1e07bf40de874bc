// Vectors of the instruction set this file is compiled for (GCC and Clang vector extensions).
//
// Included only by sources that are compiled once for each instruction set. Everything here has internal linkage:
// an inline function of the standard library, emitted with AVX-512 and merged by the linker with the portable one,
// would crash an older CPU. So no <algorithm>, <vector> or <cmath> here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(ALURE_VECTOR_BYTES)
#error "compile with -DALURE_VECTOR_BYTES=16, 32 or 64"
#endif

// For the bodies of inner loops, behind the parameters of a lambda: a call a vector costs more than its work.
#define ALURE_INLINE __attribute__((always_inline))

namespace alure {
namespace {

constexpr int kLanes = ALURE_VECTOR_BYTES / 4;
// Rows a micro-kernel holds in registers, two vectors each: 32 vector registers with AVX-512, 16 otherwise.
constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;

typedef float Floats __attribute__((vector_size(ALURE_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(ALURE_VECTOR_BYTES)));
typedef std::int64_t Longs __attribute__((vector_size(ALURE_VECTOR_BYTES)));
typedef float UnalignedFloats __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(4), may_alias));

constexpr float kInfinity = __builtin_inff();

// Sixteen bits a lane: indices, and bfloat16, whose bits are the upper half of a float's.
typedef std::uint16_t Halfs __attribute__((vector_size(ALURE_VECTOR_BYTES / 2)));
typedef std::uint16_t UnalignedHalfs __attribute__((vector_size(ALURE_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef std::int32_t UnalignedInts __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(4), may_alias));

struct Bfloat16 {
    std::uint16_t bits;
};

inline Ints load_ints(const std::int32_t* p) { return *reinterpret_cast<const UnalignedInts*>(p); }
inline void store_ints(std::int32_t* p, Ints x) { *reinterpret_cast<UnalignedInts*>(p) = x; }
inline bool differ(Ints a, Ints b) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
    return _mm512_cmpneq_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)) != 0;
#elif defined(__AVX2__) && ALURE_VECTOR_BYTES == 32
    return _mm256_movemask_epi8(reinterpret_cast<__m256i>(a == b)) != -1;
#else
    return __builtin_memcmp(&a, &b, sizeof(a)) != 0;
#endif
}
inline Ints load_indices(const std::uint16_t* p) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
    return reinterpret_cast<Ints>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p))));
#elif defined(__AVX2__) && ALURE_VECTOR_BYTES == 32  // GCC 12 converts each half on its own
    return reinterpret_cast<Ints>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
#else
    return __builtin_convertvector(*reinterpret_cast<const UnalignedHalfs*>(p), Ints);
#endif
}
inline void store_indices(std::uint16_t* p, Ints x) {
#if defined(__AVX2__) && ALURE_VECTOR_BYTES == 32
    const auto all = reinterpret_cast<__m256i>(x);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), packed);
#else
    *reinterpret_cast<UnalignedHalfs*>(p) = __builtin_convertvector(x, Halfs);
#endif
}

inline Floats load(const Bfloat16* p) {
    return reinterpret_cast<Floats>(load_indices(reinterpret_cast<const std::uint16_t*>(p)) << 16);
}
// Pairs of neighbours, the first one in the lower half of a lane.
typedef std::int32_t UnalignedPairs __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(2), may_alias));
inline Ints load_pairs(const Bfloat16* p) { return *reinterpret_cast<const UnalignedPairs*>(p); }
// The first `count` < 2 · kLanes values, zeros behind them.
inline Ints load_pairs(const Bfloat16* p, std::int64_t count) {
#if defined(__AVX512BW__) && ALURE_VECTOR_BYTES == 64
    return reinterpret_cast<Ints>(_mm512_maskz_loadu_epi16((std::uint32_t{1} << count) - 1, p));
#else
    Bfloat16 lanes[2 * kLanes] = {};
    __builtin_memcpy(lanes, p, count * sizeof(Bfloat16));
    return load_pairs(lanes);
#endif
}
inline void store_pairs(Bfloat16* p, Ints pairs) { *reinterpret_cast<UnalignedPairs*>(p) = pairs; }
inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16); }

inline Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
inline void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }
inline Floats splat(float x) { return x - Floats{}; }  // x − 0 is x, −0 included
inline Ints splat(std::int32_t x) { return x - Ints{}; }

// Of integers that may wrap around.
typedef std::uint32_t Unsigneds __attribute__((vector_size(ALURE_VECTOR_BYTES)));
inline Ints plus(Ints a, Ints b) {
    return reinterpret_cast<Ints>(reinterpret_cast<Unsigneds>(a) + reinterpret_cast<Unsigneds>(b));
}
inline Ints minus(Ints a, Ints b) {
    return reinterpret_cast<Ints>(reinterpret_cast<Unsigneds>(a) - reinterpret_cast<Unsigneds>(b));
}

// bfloat16 in the upper halves, the lower ones to be ignored. Rounds to the nearest, ties to even; NaN stays NaN.
inline Ints round_to_bfloat16(Floats x) {
    const Ints bits = reinterpret_cast<Ints>(x);
    return x == x ? plus(bits, 0x7fff + (bits >> 16 & 1)) : splat(std::int32_t{0x7fc00000});
}
inline Ints upper_halves(Ints x) { return reinterpret_cast<Ints>(reinterpret_cast<Unsigneds>(x) >> 16); }
// The upper halves of two vectors, side by side in every lane: those of `low` below.
inline Ints join_upper_halves(Ints low, Ints high) { return upper_halves(low) | (high & std::int32_t(0xffff0000)); }
inline void store(Bfloat16* p, Floats x) {
    store_indices(reinterpret_cast<std::uint16_t*>(p), upper_halves(round_to_bfloat16(x)));
}
inline void store(float* p, float x) { *p = x; }
inline void store(Bfloat16* p, float x) {
    const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, x);
    p->bits = x == x ? static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

template <class T>
constexpr T smaller(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T larger(T a, T b) {
    return a < b ? b : a;
}
constexpr std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

struct Range {
    std::int64_t begin, end;
    [[nodiscard]] bool empty() const { return begin >= end; }
};

inline void fill(float* row, Range range, Floats value) {
    for (std::int64_t i = range.begin; i < range.end; i += kLanes)
        store(row + i, value);  // may overrun by a vector less one
}

inline Floats larger_lanes(Floats a, Floats b) { return a > b ? a : b; }

template <int... I>
inline Ints lane_numbers(std::integer_sequence<int, I...>) {
    return Ints{I...};
}
inline Ints lane_numbers() { return lane_numbers(std::make_integer_sequence<int, kLanes>()); }

template <int Step, int... I>
inline Floats rotate(Floats x, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(x, x, (I + Step) % kLanes...);
}

// Sum and maximum over lanes, as a tree of fixed shape.
template <int Step = kLanes / 2>
inline float sum_of_lanes(Floats x) {
    x += rotate<Step>(x, std::make_integer_sequence<int, kLanes>());
    if constexpr (Step > 1)
        return sum_of_lanes<Step / 2>(x);
    else
        return x[0];
}
template <int Step = kLanes / 2>
inline float largest_of_lanes(Floats x) {
    x = larger_lanes(x, rotate<Step>(x, std::make_integer_sequence<int, kLanes>()));
    if constexpr (Step > 1)
        return largest_of_lanes<Step / 2>(x);
    else
        return x[0];
}

// y · 2^n, where the low bits of `exponent` are n.
inline Floats scale_by_power(Floats y, Ints exponent) {
    return reinterpret_cast<Floats>(plus(reinterpret_cast<Ints>(y), exponent << 23));
}

// exp(x) for x <= 0 or little above; at most 2 ulp; exactly 0 below −87 (where float would go denormal); NaN stays.
// Cody-Waite reduction x = n·ln 2 + r, the Cephes polynomial on |r| <= ln 2 / 2, n added to the exponent bits.
inline Floats exp_lanes(Floats x) {
    const Floats clamped = x < -87.0f ? splat(-87.0f) : x;
    const Floats shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5·2^23: the integer ends up in the low bits
    const Floats n = shifted - 12582912.0f;
    Floats r = clamped - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    Floats y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    const Floats scaled = scale_by_power(y, reinterpret_cast<Ints>(shifted));
    return x < -87.0f ? Floats{} : scaled;
}

// 2^x for −126 <= x < 128; NaN stays NaN. x = n + r: a minimax polynomial for 2^r, at most 3 ulp of degree 5, scaled by
// 2^n. Of degree 3 it is within 1e-4, enough for weights that are rounded to bfloat16.
template <int kDegree>
inline Floats exp2_lanes(Floats x) {
    static_assert(kDegree == 3 || kDegree == 5);
#if defined(__AVX512DQ__) && ALURE_VECTOR_BYTES == 64
    const Floats r = _mm512_reduce_ps(x, 9);  // x − floor(x)
    Floats y;
    if constexpr (kDegree == 3) {
        y = splat(7.7067069e-2f) * r + 2.2764496e-1f;
        y = y * r + 6.9511680e-1f;
    } else {
        y = splat(1.8671305e-3f) * r + 9.0170294e-3f;
        y = y * r + 5.5799914e-2f;
        y = y * r + 2.4016445e-1f;
        y = y * r + 6.9315131e-1f;
    }
    return _mm512_scalef_ps(y * r + 1.0f, x);
#else
    const Floats shifted = x + 12582912.0f;  // 1.5·2^23: the integer ends up in the low bits
    const Floats r = x - (shifted - 12582912.0f);
    Floats y;
    if constexpr (kDegree == 3) {
        y = splat(5.5008925e-2f) * r + 2.4221095e-1f;
        y = y * r + 6.9328290e-1f;
    } else {
        y = splat(1.3264726e-3f) * r + 9.6715130e-3f;
        y = y * r + 5.5507336e-2f;
        y = y * r + 2.4022242e-1f;
        y = y * r + 6.9314700e-1f;
    }
    y = y * r + 1.0f;
    return scale_by_power(y, reinterpret_cast<Ints>(shifted));
#endif
}

// The same for any x: at most 2^-126 far below, at least 2^127 far above.
template <int kDegree>
inline Floats exp2_clamped(Floats x) {
#if defined(__AVX512DQ__) && ALURE_VECTOR_BYTES == 64
    return exp2_lanes<kDegree>(x);
#elif defined(__AVX2__) && ALURE_VECTOR_BYTES == 32  // GCC 12 compares and blends, 5 % of a forward pass
    return exp2_lanes<kDegree>(_mm256_min_ps(splat(127.0f), _mm256_max_ps(splat(-126.0f), x)));
#else
    x = -126.0f > x ? splat(-126.0f) : x;
    return exp2_lanes<kDegree>(127.0f < x ? splat(127.0f) : x);
#endif
}

// The same, and 0 far below, so at −infinity too.
template <int kDegree>
inline Floats exp2_or_zero(Floats x) {
#if defined(__AVX512DQ__) && ALURE_VECTOR_BYTES == 64
    return exp2_lanes<kDegree>(x);
#else
    return x < -126.0f ? Floats{} : exp2_clamped<kDegree>(x);
#endif
}

// ln x of a normal x > 0, at most 2 ulp or 1e-7; NaN stays NaN. x = 2^e · m with m in [√½, √2): the Cephes polynomial.
inline Floats log_lanes(Floats x) {
    const Ints bits = reinterpret_cast<Ints>(x);
    const Ints exponent = minus(bits, splat(std::int32_t{0x3f3504f3})) >> 23;
    const Floats e = __builtin_convertvector(exponent, Floats);
    const Floats m = reinterpret_cast<Floats>(minus(bits, exponent << 23)) - 1.0f;
    Floats y = splat(7.0376836292e-2f);
    y = y * m - 1.1514610310e-1f;
    y = y * m + 1.1676998740e-1f;
    y = y * m - 1.2420140846e-1f;
    y = y * m + 1.4249322787e-1f;
    y = y * m - 1.6668057665e-1f;
    y = y * m + 2.0000714765e-1f;
    y = y * m - 2.4999993993e-1f;
    y = y * m + 3.3333331174e-1f;
    const Floats square = m * m;
    y = y * m * square - 2.12194440e-4f * e - 0.5f * square;
    const Floats result = m + y + 0.693359375f * e;
    return x == x ? result : x;
}

// Lane i is table[index[i]], 0 <= index < kLanes.
inline Floats permute(Floats table, Ints index) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), table);
#elif defined(__AVX2__) && ALURE_VECTOR_BYTES == 32
    return _mm256_permutevar8x32_ps(table, reinterpret_cast<__m256i>(index));
#else
    Floats result;
    for (int i = 0; i < kLanes; ++i) result[i] = table[index[i]];
    return result;
#endif
}

// Lane i is table[index[i]].
inline Floats gather(const float* table, Ints index) {
#if defined(__AVX512F__) && ALURE_VECTOR_BYTES == 64
    return _mm512_i32gather_ps(reinterpret_cast<__m512i>(index), table, 4);
#elif defined(__AVX2__) && ALURE_VECTOR_BYTES == 32
    return _mm256_i32gather_ps(table, reinterpret_cast<__m256i>(index), 4);
#else
    Floats result;
    for (int i = 0; i < kLanes; ++i) result[i] = table[index[i]];
    return result;
#endif
}
inline Ints gather(const std::int32_t* table, Ints index) {
    return reinterpret_cast<Ints>(gather(reinterpret_cast<const float*>(table), index));
}

template <int... I>
inline Floats interleave_low(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes + I / 2)...);
}
template <int... I>
inline Floats interleave_high(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (I % 2 * kLanes + kLanes / 2 + I / 2)...);
}

// The sums of neighbouring lanes, those of `a` below.
template <int... I>
inline Floats sums_of_pairs(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// Transposes kLanes × kLanes floats: log2(kLanes) perfect shuffles.
inline void transpose(Floats (&rows)[kLanes]) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    for (int stage = 1; stage < kLanes; stage *= 2) {
        Floats next[kLanes];
        for (int i = 0; i < kLanes / 2; ++i) {
            next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], lanes);
            next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], lanes);
        }
        for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
    }
}

// Every lane one vector's sum over its lanes, in no particular order.
inline Floats sums_of_rows(Floats (&rows)[kLanes]) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    for (int left = kLanes / 2; left > 0; left /= 2)
        for (int i = 0; i < left; ++i)
            rows[i] = interleave_low(rows[i], rows[i + left], lanes) + interleave_high(rows[i], rows[i + left], lanes);
    return rows[0];
}

}  // namespace
}  // namespace alure
