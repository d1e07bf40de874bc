// Sums of 32 × 32 products of bfloat16: in four tiles of AMX, or in vectors that multiply pairs (AVX512_BF16).
#pragma once

#include "amx_tiles.h"

namespace alure {
namespace {

#if !ALURE_TILES

constexpr std::int64_t kDepthStep = 2, kRowStep = 8;  // channels to sum over, and rows of the left, are padded to these

inline void begin_squares() {}
inline void end_squares() {}

template <bool kAdd, int kRowCount, class Left, class Right>
inline void multiply_square_rows(std::int64_t first, std::int64_t pairs, Left left, std::int64_t left_stride,
                                 Right right, std::int64_t right_stride, float* sums, std::int64_t stride) {
    Floats held[kRowCount][2];
    sums += first * stride;
#pragma GCC unroll 16
    for (int row = 0; row < kRowCount; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) held[row][v] = kAdd ? load(sums + row * stride + v * kLanes) : Floats{};
    for (std::int64_t s = 0; s * 16 < pairs; ++s) {
        const char* a = reinterpret_cast<const char*>(left(s)) + first * left_stride;
        const char* b = reinterpret_cast<const char*>(right(s));
        for (std::int64_t n = smaller<std::int64_t>(16, pairs - s * 16); n > 0; --n, a += 4, b += right_stride) {
            __m512bh columns[2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(b + v * 64);
#pragma GCC unroll 16
            for (int row = 0; row < kRowCount; ++row) {
                std::int32_t x;
                __builtin_memcpy(&x, a + row * left_stride, 4);
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v)
                    held[row][v] = _mm512_dpbf16_ps(held[row][v], (__m512bh)_mm512_set1_epi32(x), columns[v]);
            }
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < kRowCount; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) store(sums + row * stride + v * kLanes, held[row][v]);
}

#else

constexpr std::int64_t kDepthStep = 32, kRowStep = 32;

// A thread needs these around its products.
inline void begin_squares() { begin_tiles(); }
inline void end_squares() { end_tiles(); }

#endif

// sums [rows, 32] (+)= Σ left(s) [rows, 32] · right(s) [32, 32], where the rows of the right lie in pairs: `pairs` of
// them in all, 16 for each s. Rows are padded to kRowStep, with any values, and pairs to kDepthStep / 2, with zeros.
// Strides of left and right are in bytes.
template <bool kAdd, class Left, class Right>
inline void multiply_square([[maybe_unused]] std::int64_t rows, std::int64_t pairs, Left left,
                            std::int64_t left_stride, Right right, std::int64_t right_stride, float* sums,
                            std::int64_t stride) {
#if !ALURE_TILES
    // 22 sums, two rows of the right and a pair of the left fill the registers
    const auto multiply = [&]<int kRowCount>(std::int64_t first) ALURE_INLINE {
        multiply_square_rows<kAdd, kRowCount>(first, pairs, left, left_stride, right, right_stride, sums, stride);
    };
    if (rows > 28) {
        multiply.template operator()<11>(0);
        multiply.template operator()<11>(11);
        multiply.template operator()<10>(22);
    } else {
        for (std::int64_t first = 0; first < rows; first += 8)
            if (rows - first > 4)
                multiply.template operator()<8>(first);
            else
                multiply.template operator()<4>(first);
    }
#else
    if constexpr (kAdd) {
        load_tile<0>(sums, stride * 4);
        load_tile<1>(sums + 16, stride * 4);
        load_tile<2>(sums + 16 * stride, stride * 4);
        load_tile<3>(sums + 16 * stride + 16, stride * 4);
    } else {
        zero_tile<0>();
        zero_tile<1>();
        zero_tile<2>();
        zero_tile<3>();
    }
    for (std::int64_t s = 0; s * 16 < pairs; ++s) {
        const auto* a = reinterpret_cast<const char*>(left(s));
        const auto* b = reinterpret_cast<const char*>(right(s));
        load_tile<4>(a, left_stride);
        load_tile<6>(b, right_stride);
        multiply_tiles<0, 4, 6>();
        load_tile<7>(b + 64, right_stride);
        multiply_tiles<1, 4, 7>();
        load_tile<5>(a + 16 * left_stride, left_stride);
        multiply_tiles<2, 5, 6>();
        multiply_tiles<3, 5, 7>();
    }
    store_tile<0>(sums, stride * 4);
    store_tile<1>(sums + 16, stride * 4);
    store_tile<2>(sums + 16 * stride, stride * 4);
    store_tile<3>(sums + 16 * stride + 16, stride * 4);
#endif
}

}  // namespace
}  // namespace alure
