// Backward of one block of events, and the sums of its rows into the tables.
#pragma once

#include "encoding_forward.h"

namespace alure {
namespace {

inline void pack_backward(const EncodingInputs& in, float* base) {
    const PackedWeights packed(in, base, true);
    pack_transposed(in.id_weight, in.width, in.id_features(), in.width, 0, in.width, packed.ids);
    if (in.dense) pack_transposed(in.dense_weight, in.width, in.d_dense, in.width, 0, in.width, packed.dense);
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
    multiply_deep<Left::kRowMajor>(rows, x, depth, weight, columns, depth, y, stride);
}

bool backward(const EncodingInputs& in, const float* packed_weights, const EventRows& rows, const BlockGradients& to,
              void* base) {
    EventColumns columns;
    if (!read_columns(in, rows, columns)) return false;
    const BackwardScratch s(in, base);
    const PackedWeights packed(in, const_cast<float*>(packed_weights), true);
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
    constexpr std::int64_t kAhead = 12;
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
