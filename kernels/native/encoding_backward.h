// Backward of one block of events, and the sums of its rows into the tables.
#pragma once

#include "encoding_forward.h"
#include "panels.h"

namespace alure {
namespace {

constexpr std::int64_t kAhead = 12;   // events whose rows of the table are on their way
constexpr std::int64_t kDepth = 256;  // of a product at a time: two panels of it are 32 KiB at most

// Floats from one event's gathered rows to the next's. An odd number of cache lines: the columns of a block must not
// share cache sets.
inline std::int64_t id_stride(const EncodingInputs& in) { return (round_up(in.id_features(), 16) / 16 | 1) * 16; }

// Weights transposed, as panels [width, features]: of ids, then of content.
struct TransposedWeights {
    TransposedWeights(const EncodingInputs& in, float* base)
        : ids(base), dense(ids + in.width * round_up(in.id_features(), kLanes)) {}

    float *ids, *dense;
};

inline void pack_backward(const EncodingInputs& in, float* base) {
    const TransposedWeights packed(in, base);
    pack_transposed(in.id_weight, in.width, in.id_features(), in.width, 0, in.width, packed.ids);
    if (in.dense) pack_transposed(in.dense_weight, in.width, in.d_dense, in.width, 0, in.width, packed.dense);
}

inline std::int64_t packed_floats(const EncodingInputs& in) {
    const std::int64_t transposed = round_up(in.id_features(), kLanes) + round_up(in.d_dense, kLanes);
    return larger(in.features() * padded_width(in), in.width * transposed);
}

template <class T>
inline void gather(const EncodingInputs& in, const T* table, const EventRows& rows, float* found) {
    const std::int64_t stride = id_stride(in);
    for (std::int64_t row = rows.begin; row < rows.end; ++row, found += stride) {
        if (row + kAhead < rows.end)
            for (std::int64_t a = 0; a < in.attributes; ++a) {
                const std::int64_t id = in.ids[(row + kAhead) * in.attributes + a];
                if (id >= 0) prefetch_row(table + id * in.d_e, in.d_e);
            }
        for (std::int64_t a = 0; a < in.attributes; ++a) {
            const std::int64_t id = in.ids[row * in.attributes + a];
            float* to = found + a * in.d_e;
            if (id >= 0)
                copy_row(table + id * in.d_e, in.d_e, to);
            else
                for (std::int64_t d = 0; d < in.d_e; ++d) to[d] = 0.0f;
        }
    }
}

// found [rows, id_stride]: the table's rows of every event's ids as floats, zeros where one is missing.
inline void gather(const EncodingInputs& in, const EventRows& rows, float* found) {
    if (in.element == Element::kFloat32)
        gather(in, static_cast<const float*>(in.table), rows, found);
    else
        gather(in, static_cast<const Bfloat16*>(in.table), rows, found);
}

struct BackwardScratch {
    BackwardScratch(const EncodingInputs& in, void* base)
        : arena(base),
          found(arena.array<float>(kEventBlock * id_stride(in))),
          times(arena.array<float>(kEventBlock * (in.time_features() + 1))),
          grad(arena.array<float>(kEventBlock * padded_width(in))),
          d_dense(arena.array<float>(kEventBlock * round_up(in.d_dense, kLanes))) {}

    Arena arena;
    float *found, *times, *grad, *d_dense;
};

// x [rows, depth] times a transposed weight in panels, into y [rows, columns], whose stride holds whole panels.
inline void multiply_transposed(std::int64_t rows, const float* x, std::int64_t depth, const float* weight,
                                std::int64_t columns, float* y, std::int64_t stride) {
    for (std::int64_t i = 0; i < rows; ++i) fill(y + i * stride, {0, columns}, Floats{});
    for (std::int64_t k = 0; k < depth; k += kDepth)
        multiply<Left::kRowMajor>(rows, x + k, depth, weight + k * kLanes, depth * kLanes, columns,
                                  smaller(kDepth, depth - k), y, stride);
}

bool backward(const EncodingInputs& in, const float* packed_weights, const EventRows& rows, const BlockGradients& to,
              void* base) {
    EventColumns columns;
    if (!read_columns(in, rows, columns)) return false;
    const BackwardScratch s(in, base);
    const TransposedWeights packed(in, const_cast<float*>(packed_weights));
    const std::int64_t num_rows = rows.end - rows.begin, stride = padded_width(in);
    const float* grad_out = to.grad_out + rows.begin * in.width;
    const float* dense = in.dense ? in.dense + rows.begin * in.d_dense : nullptr;
    gather(in, rows, s.found);
    time_features(in, columns, s.times);
    // the bias is the weight of a feature that is always 1
    fill(s.times + in.time_features() * kEventBlock, {0, kEventBlock}, splat(1.0f));

    pack_rows(grad_out, in.width, num_rows, in.width, s.grad);
    float* d_weights = to.d_weights;
    const auto add = [&]<Left kLeft>(const float* features, std::int64_t features_stride, std::int64_t count) {
        multiply<kLeft>(count, features, features_stride, s.grad, num_rows * kLanes, in.width, num_rows, d_weights,
                        stride);
        d_weights += count * stride;
    };
    add.template operator()<Left::kColumnMajor>(s.found, id_stride(in), in.id_features());
    if (dense) add.template operator()<Left::kColumnMajor>(dense, in.d_dense, in.d_dense);
    add.template operator()<Left::kRowMajor>(s.times, kEventBlock, in.time_features() + 1);

    multiply_transposed(num_rows, grad_out, in.width, packed.ids, in.id_features(), to.d_found, id_stride(in));
    if (!to.d_dense) return true;
    const std::int64_t dense_stride = round_up(in.d_dense, kLanes);
    multiply_transposed(num_rows, grad_out, in.width, packed.dense, in.d_dense, s.d_dense, dense_stride);
    for (std::int64_t i = 0; i < num_rows; ++i)
        copy_row(s.d_dense + i * dense_stride, in.d_dense, to.d_dense + (rows.begin + i) * in.d_dense);
    return true;
}

inline void add_row(const float* from, std::int64_t size, float* to) {
    std::int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(to + d, load(to + d) + load(from + d));
    for (; d < size; ++d) to[d] += from[d];
}

inline Range share_of(const Share& share, std::int64_t rows) {
    return {rows * share.index / share.count, rows * (share.index + 1) / share.count};
}

inline bool contains(const Range& range, std::int64_t i) { return range.begin <= i && i < range.end; }

void scatter(const EncodingInputs& in, const EventRows& rows, const float* grad_out, const float* d_found,
             const Share& share, const TableSums& sums) {
    const Range ids = share_of(share, in.num_rows), positions = share_of(share, in.num_positions);
    const Range frequencies = share_of(share, in.num_frequencies);
    const std::int64_t stride = id_stride(in);
    std::int64_t sequence = rows.sequence;
    for (std::int64_t row = rows.begin; row < rows.end; ++row, d_found += stride) {
        if (row + kAhead < rows.end)
            for (std::int64_t a = 0; a < in.attributes; ++a) {
                const std::int64_t id = in.ids[(row + kAhead) * in.attributes + a];
                if (contains(ids, id)) prefetch_row(sums.table + id * in.d_e, in.d_e);
            }
        for (std::int64_t a = 0; a < in.attributes; ++a) {
            const std::int64_t id = in.ids[row * in.attributes + a];
            if (contains(ids, id)) add_row(d_found + a * in.d_e, in.d_e, sums.table + id * in.d_e);
        }
        while (row >= in.offsets[sequence + 1]) ++sequence;
        const std::int64_t position = smaller(in.offsets[sequence + 1] - 1 - row, in.num_positions - 1);
        const float* grad = grad_out + row * in.width;
        if (contains(positions, position)) add_row(grad, in.width, sums.position + position * in.width);
        if (!in.counts) continue;
        const std::int64_t frequency = frequency_of(in, row);
        if (contains(frequencies, frequency)) add_row(grad, in.width, sums.frequency + frequency * in.width);
    }
}

}  // namespace
}  // namespace alure
