// Small matrix products on packed panels. A panel is kLanes columns of a matrix, row after row: element (row, column)
// of a matrix with `rows` rows is at panels[column / kLanes][row][column % kLanes]. Missing columns are zeros.
#pragma once

#include "simd.h"

namespace alure {
namespace {

// x [rows, columns], `stride` floats from row to row, as panels of its columns; the last is filled up with zeros.
inline void pack_rows(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* panels) {
    const std::int64_t whole = columns / kLanes * kLanes;
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t column = 0; column < whole; column += kLanes)
            store(panels + column * rows + row * kLanes, load(x + row * stride + column));
        if (whole < columns) {
            float* last = panels + whole * rows + row * kLanes;
            store(last, Floats{});
            for (std::int64_t column = whole; column < columns; ++column)
                last[column - whole] = x[row * stride + column];
        }
    }
}

// The transpose of x [rows, columns] as panels of `depth` rows: x's channel c becomes row `first` + c of the panels.
inline void pack_transposed(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                            std::int64_t first, std::int64_t depth, float* panels) {
    for (std::int64_t row = 0; row < rows; row += kLanes) {
        float* panel = panels + row * depth + first * kLanes;
        const std::int64_t lanes = smaller<std::int64_t>(kLanes, rows - row);
        std::int64_t column = 0;
        if (lanes == kLanes)
            for (; column + kLanes <= columns; column += kLanes) {
                Floats block[kLanes];
                for (int i = 0; i < kLanes; ++i) block[i] = load(x + (row + i) * stride + column);
                transpose(block);
                for (int i = 0; i < kLanes; ++i) store(panel + (column + i) * kLanes, block[i]);
            }
        for (; column < columns; ++column)
            for (std::int64_t i = 0; i < kLanes; ++i)
                panel[column * kLanes + i] = i < lanes ? x[(row + i) * stride + column] : 0.0f;
    }
}

// How element (row, k) of the left matrix lies in memory.
enum class Left { kRowMajor, kColumnMajor };

// c [Rows, Vectors · kLanes] += a [Rows, depth] · b, where b is `Vectors` panels, `panel_size` floats apart.
template <Left kLeft, int Rows, int Vectors>
inline void multiply_block(const float* a, std::int64_t a_stride, const float* b, std::int64_t panel_size,
                           std::int64_t depth, float* c, std::int64_t c_stride) {
    Floats sums[Rows][Vectors];
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sums[row][v] = load(c + row * c_stride + v * kLanes);
    for (std::int64_t k = 0; k < depth; ++k) {
        Floats right[Vectors];
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * panel_size + k * kLanes);
#pragma GCC unroll 16
        for (int row = 0; row < Rows; ++row) {
            const Floats left = splat(kLeft == Left::kRowMajor ? a[row * a_stride + k] : a[k * a_stride + row]);
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) sums[row][v] += left * right[v];
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row)
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) store(c + row * c_stride + v * kLanes, sums[row][v]);
}

template <Left kLeft, int Vectors, int Rows = kRows>
inline void multiply_rows(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b,
                          std::int64_t panel_size, std::int64_t depth, float* c, std::int64_t c_stride) {
    if (rows == Rows)
        multiply_block<kLeft, Rows, Vectors>(a, a_stride, b, panel_size, depth, c, c_stride);
    else if constexpr (Rows > 1)
        multiply_rows<kLeft, Vectors, Rows - 1>(rows, a, a_stride, b, panel_size, depth, c, c_stride);
}

// c [rows, columns] += a [rows, depth] · b [depth, columns] in panels of `panel_size` floats; columns rounded up to
// whole panels. An element's sum runs over k in order, whatever the other rows and columns are.
template <Left kLeft>
inline void multiply(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b, std::int64_t panel_size,
                     std::int64_t columns, std::int64_t depth, float* c, std::int64_t c_stride) {
    const auto a_row = [=](std::int64_t row) { return a + row * (kLeft == Left::kRowMajor ? a_stride : 1); };
    std::int64_t column = 0;
    for (; column + kLanes < columns; column += 2 * kLanes)
        for (std::int64_t row = 0; row < rows; row += kRows)
            multiply_rows<kLeft, 2>(smaller<std::int64_t>(kRows, rows - row), a_row(row), a_stride,
                                    b + column / kLanes * panel_size, panel_size, depth, c + row * c_stride + column,
                                    c_stride);
    if (column < columns)
        for (std::int64_t row = 0; row < rows; row += kRows)
            multiply_rows<kLeft, 1>(smaller<std::int64_t>(kRows, rows - row), a_row(row), a_stride,
                                    b + column / kLanes * panel_size, panel_size, depth, c + row * c_stride + column,
                                    c_stride);
}

}  // namespace
}  // namespace alure
