// The time features of a block of events: exact integers first, then vectors over events.
#pragma once

#include "encoding_kernels.h"
#include "simd.h"

namespace alure {
namespace {

// Divisible by kRows. What the backward gathers, 160 floats an event, is 60 KiB then and stays in the second cache.
constexpr std::int64_t kEventBlock = 96;
constexpr std::int64_t kFarthest = std::int64_t{1} << 61;  // arguments.py: differences of times stay within int64
constexpr std::int64_t kMostCounts = (std::int64_t{1} << 62) - 1;
constexpr std::int64_t kExactTime = std::int64_t{1} << 51, kExactPeriod = std::int64_t{1} << 50;

typedef double Doubles __attribute__((vector_size(ALURE_VECTOR_BYTES)));
typedef double UnalignedDoubles __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(8), may_alias));
constexpr int kDoubles = kLanes / 2;

inline Doubles load(const double* p) { return *reinterpret_cast<const UnalignedDoubles*>(p); }
inline void store(double* p, Doubles x) { *reinterpret_cast<UnalignedDoubles*>(p) = x; }
inline void store_as_floats(float* p, Doubles x) {
    typedef float Half __attribute__((vector_size(ALURE_VECTOR_BYTES / 2)));
    typedef float UnalignedHalf __attribute__((vector_size(ALURE_VECTOR_BYTES / 2), aligned(4), may_alias));
    *reinterpret_cast<UnalignedHalf*>(p) = __builtin_convertvector(x, Half);
}

// x to the nearest integer, |x| < 2^51.
inline Doubles nearest(Doubles x) { return (x + 6755399441055744.0) - 6755399441055744.0; }  // 1.5·2^52

// log(1 + x) for x >= 0, to a few ulp of itself however small x: what 1 + x rounds away is divided out.
inline Floats log1p_lanes(Floats x) {
    const Floats u = x + 1.0f, rest = u - 1.0f;
    const Floats y = log_lanes(u) * (x / (u == 1.0f ? splat(1.0f) : rest));
    return (u == 1.0f) | (x == kInfinity) ? x : y;
}

// Turns of a circle as the nearest quarter, −2 … 2, and the angle from there in radians, |angle| <= π/4.
// sin and cos by the polynomials of Cephes' sinf and cosf, at most 2 ulp of 1.
inline void sine_and_cosine(Floats quarter, Floats angle, float* sine, float* cosine) {
    const Floats z = angle * angle;
    const Floats s =
        angle + angle * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
    const Floats c = 1.0f - 0.5f * z +
                     z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const Floats half = quarter * quarter == 4.0f ? splat(-1.0f) : splat(1.0f);  // half a turn changes both signs
    const auto odd = quarter * quarter == 1.0f;
    store(sine, odd ? quarter * c : half * s);
    store(cosine, odd ? -quarter * s : half * c);
}

// Integers of a block of events, read and checked.
struct EventColumns {
    std::int64_t local[kEventBlock];     // time of the cycles
    std::int64_t position[kEventBlock];  // row of the position table
    double age[kEventBlock], gap[kEventBlock];
    bool exact;  // whether all local times are integers that doubles, and their products below, hold exactly
};

inline bool within(std::int64_t x, std::int64_t low, std::int64_t high) { return low <= x && x <= high; }

inline std::int64_t frequency_of(const EncodingInputs& in, std::int64_t row) {
    const int octave = 63 - __builtin_clzll(static_cast<unsigned long long>(in.counts[row]) + 1);
    return smaller<std::int64_t>(octave, in.num_frequencies - 1);
}

// False where a value is out of range or a sequence is not sorted by time. Rows beyond the block's last are zeros.
inline bool read_columns(const EncodingInputs& in, const EventRows& rows, EventColumns& columns) {
    bool sound = true;
    columns.exact = true;
    std::uint64_t largest = 0;  // of ids + 1
    for (std::int64_t i = rows.begin * in.attributes; i < rows.end * in.attributes; ++i)
        largest = larger(largest, static_cast<std::uint64_t>(in.ids[i]) + 1);
    if (largest > static_cast<std::uint64_t>(in.num_rows)) return false;
    std::int64_t sequence = rows.sequence;
    for (std::int64_t row = rows.begin; row < rows.end; ++row) {
        while (row >= in.offsets[sequence + 1]) ++sequence;
        const std::int64_t time = in.timestamps[row], reference = in.reference_times[sequence];
        const std::int64_t previous = row > in.offsets[sequence] ? in.timestamps[row - 1] : time;
        const std::int64_t offset = in.utc_offsets ? in.utc_offsets[row] : 0;
        sound &= within(time, -kFarthest, kFarthest) && within(reference, -kFarthest, kFarthest) &&
                 within(offset, -kFarthest, kFarthest) && previous <= time && previous >= -kFarthest &&
                 (!in.counts || within(in.counts[row], 0, kMostCounts));
        if (!sound) return false;
        const std::int64_t i = row - rows.begin;
        columns.local[i] = time + offset;
        columns.exact &= within(columns.local[i], -kExactTime, kExactTime);
        columns.age[i] = static_cast<double>(larger<std::int64_t>(0, reference - time));
        columns.gap[i] = static_cast<double>(time - previous);
        columns.position[i] = smaller(in.offsets[sequence + 1] - 1 - row, in.num_positions - 1);
    }
    for (std::int64_t i = rows.end - rows.begin; i < kEventBlock; ++i) {
        columns.local[i] = columns.position[i] = 0;
        columns.age[i] = columns.gap[i] = 0.0;
    }
    return sound;
}

// t mod p in [0, p), exactly, as doubles. The quotient t · (1/p) is off by less than one, and its product with p is an
// integer below 2^53, so the remainder is exact once p is added or taken away.
inline void remainders(const EventColumns& columns, const double* times, std::int64_t period, double* rest) {
    if (!columns.exact || period > kExactPeriod) {
        for (std::int64_t i = 0; i < kEventBlock; ++i) {
            const std::int64_t r = columns.local[i] % period;
            rest[i] = static_cast<double>(r < 0 ? r + period : r);
        }
        return;
    }
    const double p = static_cast<double>(period), inverse = 1.0 / p;
    for (std::int64_t i = 0; i < kEventBlock; i += kDoubles) {
        const Doubles t = load(times + i);
        Doubles r = t - nearest(t * inverse) * p;
        r = r < 0.0 ? r + p : r;
        r = r >= p ? r - p : r;
        store(rest + i, r);
    }
}

// features [2 + 2P, kEventBlock]: age, gap, P sines, P cosines. An event's features depend on its own integers alone.
inline void time_features(const EncodingInputs& in, const EventColumns& columns, float* features) {
    alignas(64) double times[kEventBlock], rest[kEventBlock];
    alignas(64) float quarters[kEventBlock], angles[kEventBlock];
    for (std::int64_t i = 0; i < kEventBlock; ++i) times[i] = static_cast<double>(columns.local[i]);
    for (std::int64_t i = 0; i < kEventBlock; i += kDoubles) {
        store_as_floats(features + i, load(columns.age + i) / in.tau);
        store_as_floats(features + kEventBlock + i, load(columns.gap + i) / in.tau);
    }
    for (std::int64_t i = 0; i < 2 * kEventBlock; i += kLanes) store(features + i, log1p_lanes(load(features + i)));
    for (std::int64_t p = 0; p < in.num_periods; ++p) {
        remainders(columns, times, in.periods[p], rest);
        const double inverse = 1.0 / static_cast<double>(in.periods[p]);
        const double phase = static_cast<double>(in.phases[p]) * 0.15915494309189535;  // in turns
        for (std::int64_t i = 0; i < kEventBlock; i += kDoubles) {
            Doubles turns = load(rest + i) * inverse + phase;
            turns -= nearest(turns);
            const Doubles quarter = nearest(turns * 4.0);
            store_as_floats(quarters + i, quarter);
            store_as_floats(angles + i, (turns - quarter * 0.25) * 6.283185307179586);
        }
        float* sines = features + (2 + p) * kEventBlock;
        float* cosines = sines + in.num_periods * kEventBlock;
        for (std::int64_t i = 0; i < kEventBlock; i += kLanes)
            sine_and_cosine(load(quarters + i), load(angles + i), sines + i, cosines + i);
    }
}

}  // namespace
}  // namespace alure
