// Forward of one block of events: gather, then one product a kind of feature, summed in one accumulator.
#pragma once

#include "encoding_features.h"
#include "panels.h"
#include "scratch.h"

namespace alure {
namespace {

constexpr std::int64_t kDepth = 256;  // of a product at a time: two panels of it are 32 KiB at most

inline std::int64_t padded_width(const EncodingInputs& in) { return round_up(in.width, kLanes); }

// Gathered embeddings of an event. An odd number of cache lines: the columns of a block must not share cache sets.
inline std::int64_t id_stride(const EncodingInputs& in) { return (round_up(in.id_features(), 16) / 16 | 1) * 16; }

// Weights as panels: of ids, dense and time features (forward), or transposed of ids and dense (backward).
struct PackedWeights {
    PackedWeights(const EncodingInputs& in, float* base, bool transposed)
        : ids(base),
          dense(ids + (transposed ? in.width * round_up(in.id_features(), kLanes)
                                  : in.id_features() * padded_width(in))),
          time(dense + (transposed ? in.width * round_up(in.d_dense, kLanes) : in.d_dense * padded_width(in))) {}

    float *ids, *dense, *time;
};

inline std::int64_t packed_floats(const EncodingInputs& in) {
    const PackedWeights forward(in, nullptr, false), backward(in, nullptr, true);
    const std::int64_t forward_floats = forward.time - forward.ids + in.time_features() * padded_width(in);
    return larger<std::int64_t>(forward_floats, backward.time - backward.ids);
}

inline void pack_forward(const EncodingInputs& in, float* base) {
    const PackedWeights packed(in, base, false);
    pack_rows(in.id_weight, in.width, in.id_features(), in.width, packed.ids);
    if (in.dense) pack_rows(in.dense_weight, in.width, in.d_dense, in.width, packed.dense);
    pack_rows(in.time_weight, in.width, in.time_features(), in.width, packed.time);
}

template <class T>
inline void prefetch_row(const T* row, std::int64_t size) {
    for (std::int64_t d = 0; d < size; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

template <class From, class To>
inline void copy_row(const From* from, std::int64_t size, To* to) {
    std::int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
    for (; d < size; ++d) store(to + d, to_float(from[d]));
}

template <class T>
inline void gather(const EncodingInputs& in, const T* table, const EventRows& rows, float* found) {
    constexpr std::int64_t kAhead = 12;  // events whose rows of the table are on their way
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

// `multiply` with the depth cut so that a cut of the panels stays in the first cache; the order of sums is the same.
template <Left kLeft>
inline void multiply_deep(std::int64_t rows, const float* a, std::int64_t a_stride, const float* b,
                          std::int64_t columns, std::int64_t depth, float* c, std::int64_t c_stride) {
    for (std::int64_t k = 0; k < depth; k += kDepth)
        multiply<kLeft>(rows, a + k * (kLeft == Left::kRowMajor ? 1 : a_stride), a_stride, b + k * kLanes,
                        depth * kLanes, columns, smaller(kDepth, depth - k), c, c_stride);
}

struct ForwardScratch {
    ForwardScratch(const EncodingInputs& in, void* base)
        : arena(base),
          found(arena.array<float>(kEventBlock * id_stride(in))),
          times(arena.array<float>(kEventBlock * in.time_features())),
          sums(arena.array<float>(kEventBlock * padded_width(in))) {}

    Arena arena;
    float *found, *times, *sums;
};

// What needs no product: the bias and the rows of the position and the frequency table.
template <class T>
inline void begin_sums(const EncodingInputs& in, const EventRows& rows, const EventColumns& columns, float* sums) {
    const std::int64_t stride = padded_width(in);
    for (std::int64_t row = rows.begin; row < rows.end; ++row, sums += stride) {
        const T* position = static_cast<const T*>(in.position_table) + columns.position[row - rows.begin] * in.width;
        for (std::int64_t d = 0; d < in.width; ++d) sums[d] = in.bias[d] + to_float(position[d]);
        if (!in.counts) continue;
        const T* frequency = static_cast<const T*>(in.frequency_table) + frequency_of(in, row) * in.width;
        for (std::int64_t d = 0; d < in.width; ++d) sums[d] += to_float(frequency[d]);
    }
}

template <class T>
bool encode(const EncodingInputs& in, const float* packed_weights, const EventRows& rows, T* out, void* base) {
    EventColumns columns;
    if (!read_columns(in, rows, columns)) return false;
    const ForwardScratch s(in, base);
    const PackedWeights packed(in, const_cast<float*>(packed_weights), false);
    const std::int64_t num_rows = rows.end - rows.begin, stride = padded_width(in);
    gather(in, rows, s.found);
    time_features(in, columns, s.times);
    begin_sums<T>(in, rows, columns, s.sums);
    multiply_deep<Left::kRowMajor>(num_rows, s.found, id_stride(in), packed.ids, in.width, in.id_features(), s.sums,
                                   stride);
    if (in.dense)
        multiply_deep<Left::kRowMajor>(num_rows, in.dense + rows.begin * in.d_dense, in.d_dense, packed.dense,
                                       in.width, in.d_dense, s.sums, stride);
    multiply_deep<Left::kColumnMajor>(num_rows, s.times, kEventBlock, packed.time, in.width, in.time_features(),
                                      s.sums, stride);
    for (std::int64_t i = 0; i < num_rows; ++i)
        copy_row(s.sums + i * stride, in.width, out + (rows.begin + i) * in.width);
    return true;
}

bool forward(const EncodingInputs& in, const float* packed_weights, const EventRows& rows, void* out, void* base) {
    if (in.element == Element::kFloat32) return encode(in, packed_weights, rows, static_cast<float*>(out), base);
    return encode(in, packed_weights, rows, static_cast<Bfloat16*>(out), base);
}

}  // namespace
}  // namespace alure
