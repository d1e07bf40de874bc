// Forward of one block of events, a few at a time: their features, read where they lie, times all weights in one
// product. The table's rows of the next events are fetched meanwhile.
#pragma once

#include "encoding_features.h"
#include "scratch.h"

namespace alure {
namespace {

// Events and vectors of columns that a product holds in registers.
constexpr int kEvents = kLanes == 16 ? 6 : kRows, kVectors = kLanes == 16 ? 4 : 2;
constexpr std::int64_t kColumns = kVectors * kLanes;

inline std::int64_t padded_width(const EncodingInputs& in) { return round_up(in.width, kLanes); }

// Inlined, here and below: GCC drops calls of a function that does nothing but fetch.
template <class T>
[[gnu::always_inline]] inline void prefetch_row(const T* row, std::int64_t size) {
    for (std::int64_t d = 0; d < size; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

template <class From, class To>
inline void copy_row(const From* from, std::int64_t size, To* to) {
    std::int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
    for (; d < size; ++d) store(to + d, to_float(from[d]));
}

// Weights of all features, rows of kColumns columns side by side [features, kColumns], then the next columns; the last
// vector is filled up with zeros.
inline void pack_forward(const EncodingInputs& in, float* packed) {
    std::int64_t feature = 0;
    const auto pack = [&](const float* weight, std::int64_t rows) {
        for (std::int64_t row = 0; row < rows; ++row, ++feature)
            for (std::int64_t first = 0; first < in.width; first += kColumns) {
                const std::int64_t columns = smaller(kColumns, in.width - first), padded = round_up(columns, kLanes);
                float* to = packed + first * in.features() + feature * padded;
                copy_row(weight + row * in.width + first, columns, to);
                for (std::int64_t i = columns; i < padded; ++i) to[i] = 0.0f;
            }
    };
    pack(in.id_weight, in.id_features());
    pack(in.dense_weight, in.d_dense);
    pack(in.time_weight, in.time_features());
}

// Features of an event that lie side by side: those of an attribute, content, or time.
using Segment = const float* [kEvents];

inline std::int64_t num_segments(const EncodingInputs& in) { return in.attributes + 2; }
inline std::int64_t segment_size(const EncodingInputs& in, std::int64_t segment) {
    return segment < in.attributes ? in.d_e : segment == in.attributes ? in.d_dense : in.time_features();
}

struct ForwardScratch {
    ForwardScratch(const EncodingInputs& in, void* base)
        : arena(base),
          zeros(arena.array<float>(in.d_e)),
          next(arena.array<const void*>(in.attributes * kEvents)),
          segments(arena.array<Segment>(num_segments(in))),
          widened(arena.array<float>(in.element == Element::kFloat32 ? 0 : kEvents * in.id_features())),
          time_columns(arena.array<float>(in.time_features() * kEventBlock)),
          times(arena.array<float>(kEventBlock * in.time_features())),
          sums(arena.array<float>(kEvents * padded_width(in))) {
        if (base) fill(zeros, {0, in.d_e}, Floats{});
    }

    Arena arena;
    float* zeros;        // for an id that is missing
    const void** next;   // rows of the table [attributes, kEvents]
    Segment* segments;
    float* widened;      // rows of a table in bfloat16 [attributes, kEvents, d_e]
    float* time_columns;
    float* times;        // their transpose
    float* sums;
};

// Finds the table's rows of the events from `row` on; behind the last event, it counts again.
template <class T>
inline void find_rows(const EncodingInputs& in, std::int64_t row, std::int64_t end, const ForwardScratch& s) {
    const auto* table = static_cast<const T*>(in.table);
    for (int i = 0; i < kEvents; ++i) {
        const std::int64_t* ids = in.ids + smaller(row + i, end - 1) * in.attributes;
        for (std::int64_t a = 0; a < in.attributes; ++a)
            s.next[a * kEvents + i] = ids[a] < 0 ? static_cast<const void*>(s.zeros) : table + ids[a] * in.d_e;
    }
}

// Fetches a segment of the events that have been found, `next` in the batch; times are at hand.
template <class T>
[[gnu::always_inline]] inline void fetch_next(const EncodingInputs& in, std::int64_t segment, Range next,
                                              const ForwardScratch& s) {
    if (segment < in.attributes)
        for (int i = 0; i < kEvents; ++i) prefetch_row(static_cast<const T*>(s.next[segment * kEvents + i]), in.d_e);
    else if (segment == in.attributes)
        prefetch_row(in.dense + next.begin * in.d_dense, (next.end - next.begin) * in.d_dense);
}

// Points the segments at what has been found, as floats, and at the rest of these events.
template <class T>
inline void take_next(const EncodingInputs& in, const EventRows& rows, std::int64_t row, const ForwardScratch& s) {
    for (std::int64_t a = 0; a < in.attributes; ++a)
        for (int i = 0; i < kEvents; ++i) {
            const auto* found = static_cast<const T*>(s.next[a * kEvents + i]);
            if constexpr (sizeof(T) == sizeof(float)) {
                s.segments[a][i] = found;
            } else {
                float* widened = s.widened + (a * kEvents + i) * in.d_e;
                copy_row(found, in.d_e, widened);
                s.segments[a][i] = widened;
            }
        }
    for (int i = 0; i < kEvents; ++i) {
        const std::int64_t event = smaller(row + i, rows.end - 1);
        s.segments[in.attributes][i] = in.dense + event * in.d_dense;
        s.segments[in.attributes + 1][i] = s.times + (event - rows.begin) * in.time_features();
    }
}

// sums [kEvents, Vectors · kLanes] += features · packed weights; beside(segment) is called before each segment.
template <int Vectors, class Beside>
inline void multiply_segments(const EncodingInputs& in, const Segment* segments, const float* packed, float* sums,
                              Beside beside) {
    const std::int64_t stride = padded_width(in), count = num_segments(in);
    Floats held[kEvents][Vectors];
#pragma GCC unroll 16
    for (int i = 0; i < kEvents; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) held[i][v] = load(sums + i * stride + v * kLanes);
    for (std::int64_t segment = 0; segment < count; ++segment) {
        beside(segment);
        const float* rows[kEvents];
#pragma GCC unroll 16
        for (int i = 0; i < kEvents; ++i) rows[i] = segments[segment][i];
        const std::int64_t size = segment_size(in, segment);
        for (std::int64_t k = 0; k < size; ++k, packed += Vectors * kLanes) {
            Floats right[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) right[v] = load(packed + v * kLanes);
#pragma GCC unroll 16
            for (int i = 0; i < kEvents; ++i) {
                const Floats left = splat(rows[i][k]);
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) held[i][v] += left * right[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kEvents; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(sums + i * stride + v * kLanes, held[i][v]);
}

template <int Vectors = kVectors, class Beside>
inline void multiply_columns(std::int64_t vectors, const EncodingInputs& in, const Segment* segments,
                             const float* packed, float* sums, Beside beside) {
    if (vectors == Vectors)
        multiply_segments<Vectors>(in, segments, packed, sums, beside);
    else if constexpr (Vectors > 1)
        multiply_columns<Vectors - 1>(vectors, in, segments, packed, sums, beside);
}

// What needs no product: the bias and the rows of the position and the frequency table.
template <class T>
inline void begin_sums(const EncodingInputs& in, std::int64_t row, std::int64_t end, const std::int64_t* positions,
                       float* sums) {
    for (; row < end; ++row, ++positions, sums += padded_width(in)) {
        const T* position = static_cast<const T*>(in.position_table) + *positions * in.width;
        for (std::int64_t d = 0; d < in.width; ++d) sums[d] = in.bias[d] + to_float(position[d]);
        if (!in.counts) continue;
        const T* frequency = static_cast<const T*>(in.frequency_table) + frequency_of(in, row) * in.width;
        for (std::int64_t d = 0; d < in.width; ++d) sums[d] += to_float(frequency[d]);
    }
}

template <class T>
bool encode(const EncodingInputs& in, const float* packed, const EventRows& rows, T* out, void* base) {
    EventColumns columns;
    if (!read_columns(in, rows, columns)) return false;
    const ForwardScratch s(in, base);
    const auto events_from = [&](std::int64_t row) { return Range{row, smaller(row + kEvents, rows.end)}; };
    find_rows<T>(in, rows.begin, rows.end, s);
    for (std::int64_t i = 0; i < num_segments(in); ++i) fetch_next<T>(in, i, events_from(rows.begin), s);
    time_features(in, columns, s.time_columns);
    for (std::int64_t i = 0; i < kEventBlock; ++i)
        for (std::int64_t f = 0; f < in.time_features(); ++f)
            s.times[i * in.time_features() + f] = s.time_columns[f * kEventBlock + i];

    for (std::int64_t row = rows.begin; row < rows.end; row += kEvents) {
        const std::int64_t end = events_from(row).end;
        const Range next = events_from(end);
        take_next<T>(in, rows, row, s);
        if (end < rows.end) find_rows<T>(in, end, rows.end, s);
        begin_sums<T>(in, row, end, columns.position + (row - rows.begin), s.sums);
        for (std::int64_t first = 0; first < in.width; first += kColumns) {
            const std::int64_t vectors = smaller(kColumns, padded_width(in) - first) / kLanes;
            multiply_columns(vectors, in, s.segments, packed + first * in.features(), s.sums + first,
                             [&](std::int64_t segment) ALURE_INLINE {
                                 if (first == 0) fetch_next<T>(in, segment, next, s);
                             });
        }
        for (std::int64_t i = row; i < end; ++i)
            copy_row(s.sums + (i - row) * padded_width(in), in.width, out + i * in.width);
    }
    return true;
}

bool forward(const EncodingInputs& in, const float* packed, const EventRows& rows, void* out, void* base) {
    if (in.element == Element::kFloat32) return encode(in, packed, rows, static_cast<float*>(out), base);
    return encode(in, packed, rows, static_cast<Bfloat16*>(out), base);
}

}  // namespace
}  // namespace alure
