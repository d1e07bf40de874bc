// Products of row-major matrices as they lie in memory, without packing: for a right matrix whose rows stay in a cache
// anyway. panels.h is for right matrices that are packed first.
#pragma once

#include "simd.h"

namespace alure {
namespace {

// Element (row, k) of the left matrix is data[row · row_stride + k · k_stride].
struct LeftMatrix {
    const float* data;
    std::int64_t row_stride, k_stride;
    static Floats lanes(const float* element) { return splat(*element); }
    template <int Rows>
    void fetch(std::int64_t) const {}
    [[nodiscard]] LeftMatrix from(std::int64_t row) const { return {data + row * row_stride, row_stride, k_stride}; }
};

// Its elements are pairs of neighbours, the first for the even lanes and the second for the odd ones: two products with
// 24 columns take 3 vectors of 16 lanes instead of 4. Rows lie side by side, and as many from `next` are fetched, a line
// or two a step: all at once they would wait for each other.
struct PairedMatrix {
    const float* data;
    std::int64_t row_stride;
    const float* next;
    static constexpr std::int64_t k_stride = 2;
    static Floats lanes(const float* element) {
        std::int64_t pair;
        __builtin_memcpy(&pair, element, sizeof pair);
        return reinterpret_cast<Floats>(pair - Longs{});
    }
    template <int Rows>
    void fetch(std::int64_t k) const {
        for (int i = 0; i < 2 * Rows; i += 16) __builtin_prefetch(next + 2 * Rows * k + i);
    }
    [[nodiscard]] PairedMatrix from(std::int64_t row) const {
        return {data + row * row_stride, row_stride, next + row * row_stride};
    }
};

// Rows summed at once beside `vectors` vectors of columns: the sums, a row of b and a value of a fill the registers.
constexpr int rows_held(int vectors) { return vectors < 3 ? kRows : kLanes == 16 ? 8 : 4; }

template <int Rows, int Vectors, class Left>
inline void product_block(Left a, const float* b, std::int64_t b_stride, std::int64_t depth, float* c,
                          std::int64_t c_stride) {
    Floats sums[Rows][Vectors] = {};
    const float* left = a.data;
    for (std::int64_t k = 0; k < depth; ++k, left += a.k_stride, b += b_stride) {
        a.template fetch<Rows>(k);
        Floats right[Vectors];
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
            const Floats x = Left::lanes(left + row * a.row_stride);
#pragma GCC unroll 3
            for (int v = 0; v < Vectors; ++v) sums[row][v] += x * right[v];
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) {
            float* p = c + row * c_stride + v * kLanes;
            store(p, load(p) + sums[row][v]);
        }
}

template <int Vectors, int Rows = rows_held(Vectors), class Left>
inline void product_rows(std::int64_t rows, Left a, const float* b, std::int64_t b_stride, std::int64_t depth,
                         float* c, std::int64_t c_stride) {
    if (rows == Rows)
        product_block<Rows, Vectors>(a, b, b_stride, depth, c, c_stride);
    else if constexpr (Rows > 1)
        product_rows<Vectors, Rows - 1>(rows, a, b, b_stride, depth, c, c_stride);
}

template <int Vectors, class Left>
inline void product_columns(std::int64_t rows, std::int64_t columns, Left a, const float* b, std::int64_t b_stride,
                            std::int64_t depth, float* c, std::int64_t c_stride) {
    constexpr int kHeld = rows_held(Vectors);
    for (std::int64_t row = 0; row < rows; row += kHeld)
        for (std::int64_t column = 0; column < columns; column += Vectors * kLanes)
            product_rows<Vectors>(smaller<std::int64_t>(kHeld, rows - row), a.from(row), b + column, b_stride, depth,
                                  c + row * c_stride + column, c_stride);
}

// c [rows, columns] += a [rows, depth] · b [depth, columns]; `columns` is a multiple of kLanes. The sum over k runs in
// order and is then added to c, whatever the other rows and columns are.
template <class Left = LeftMatrix>
inline void add_product(std::int64_t rows, std::int64_t columns, Left a, const float* b, std::int64_t b_stride,
                        std::int64_t depth, float* c, std::int64_t c_stride) {
    std::int64_t done = 0;
    if (columns == kLanes) {
        product_columns<1>(rows, done = kLanes, a, b, b_stride, depth, c, c_stride);
    } else if (columns / kLanes % 2) {
        product_columns<3>(rows, done = 3 * kLanes, a, b, b_stride, depth, c, c_stride);
    }
    product_columns<2>(rows, columns - done, a, b + done, b_stride, depth, c + done, c_stride);
}

}  // namespace
}  // namespace alure
