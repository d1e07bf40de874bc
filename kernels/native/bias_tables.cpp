#include "bias_tables.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <stdexcept>
#include <string>

namespace alure {
namespace {

constexpr std::int64_t kMostThresholds = 65535;  // an index of buckets has 16 bits
constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::max();

// `rows` rows of a table times log2 e, padded.
std::vector<float> pad(const BucketTable& table, std::int64_t rows, std::int64_t stride) {
    const std::int64_t buckets = table.num_thresholds + 1;
    std::vector<float> padded(rows * stride);
    for (std::int64_t row = 0; row < rows; ++row) {
        const float* from = table.table + row * buckets;
        float* to = padded.data() + row * stride;
        for (std::int64_t b = 0; b < buckets; ++b) to[b] = from[b] * kLog2E;
    }
    return padded;
}

std::uint32_t cell_of(std::int64_t x) {
    return std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<std::int32_t>(x))) >> kCellShift;
}

struct Cell {
    std::uint32_t bits;
    std::int32_t first, last;  // the int32 of this cell, an interval
};

// Cells in increasing order. A float is rounded, so an end is found by bisection, not from the bits.
std::vector<Cell> all_cells() {
    constexpr std::int64_t kLeast = std::numeric_limits<std::int32_t>::min(), kMost = kNever;
    constexpr std::int64_t kHalf = kCells / 2;  // of negative numbers
    const auto order = [](std::int64_t bits) { return bits < kHalf ? bits : kHalf - 1 - bits; };
    std::vector<Cell> cells;
    for (std::int64_t first = kLeast; first <= kMost;) {
        const std::uint32_t bits = cell_of(first);
        std::int64_t last = first, end = kMost + 1;
        while (end - last > 1) {
            const std::int64_t middle = last + (end - last) / 2;
            (order(cell_of(middle)) <= order(bits) ? last : end) = middle;
        }
        cells.push_back({bits, static_cast<std::int32_t>(first), static_cast<std::int32_t>(last)});
        first = end;
    }
    return cells;
}

}  // namespace

TableStorage::TableStorage(const AttentionInputs& in) {
    const std::int64_t rows = in.num_groups * in.heads;
    if (in.time.table) {
        if (in.time.num_thresholds > kMostThresholds)
            throw std::invalid_argument("time_thresholds: expected at most " + std::to_string(kMostThresholds) +
                                        ", got " + std::to_string(in.time.num_thresholds));
        time_stride_ = in.time.num_thresholds + 1 + kTablePadding;
        time_ = pad(in.time, rows, time_stride_);
        find_cells(in.time);
    }
    if (in.position.table) {
        position_stride_ = in.position.num_thresholds + 1 + kTablePadding;
        position_ = pad(in.position, rows, position_stride_);
    }
}

void TableStorage::find_cells(const BucketTable& time) {
    for (std::int64_t i = 0; i < time.num_thresholds; ++i)
        thresholds_.push_back(static_cast<std::int32_t>(
            std::clamp<std::int64_t>(time.thresholds[i], std::numeric_limits<std::int32_t>::min(), kNever)));
    static const std::vector<Cell> all = all_cells();
    cells_.assign(kCells + kTablePadding, 0);
    std::size_t bucket = 0;  // of what is passed
    const auto pass = [&](std::int32_t x) {
        while (bucket < thresholds_.size() && thresholds_[bucket] <= x) ++bucket;
        return static_cast<std::int32_t>(bucket);
    };
    for (const Cell& cell : all) {
        const std::int32_t first = cells_[cell.bits] = pass(cell.first);
        most_in_cell_ = std::max<std::int64_t>(most_in_cell_, pass(std::min(cell.last, kNever - 1)) - first);
    }
    thresholds_.insert(thresholds_.end(), most_in_cell_ + 1, kNever);
}

BiasTables TableStorage::tables() const {
    return {time_.data(),       time_stride_,  position_.data(), position_stride_,
            thresholds_.data(), cells_.data(), most_in_cell_};
}

}  // namespace alure
