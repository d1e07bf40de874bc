#include "encoding.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace alure {
namespace {

// Backward works on rounds of rows, cut into units. Each unit of a round has its own sums of the weights' gradients,
// each thread its share of the tables' rows: both orders of sums are those of the rows, whatever the threads.
constexpr std::int64_t kUnitBlocks = 2;
constexpr std::int64_t kMostUnits = 32;
constexpr std::int64_t kMostPartialFloats = std::int64_t{1} << 24;

const EncodingKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    set = vectors_of(set);
    if (set == InstructionSet::kAvx512) return avx512::encoding_kernels;
    if (set == InstructionSet::kAvx2) return avx2::encoding_kernels;
#endif
    return portable::encoding_kernels;
}

bool sound(const EncodingInputs& in) {
    bool sound = in.offsets[0] == 0 && in.offsets[in.num_sequences] == in.total;
    for (std::int64_t i = 0; i < in.num_sequences; ++i) sound = sound && in.offsets[i] <= in.offsets[i + 1];
    for (std::int64_t p = 0; p < in.num_periods; ++p)
        sound = sound && in.periods[p] >= 1 && in.periods[p] <= std::int64_t{1} << 61;
    for (std::int64_t i = 0; i < in.num_sequences; ++i)
        sound = sound && in.reference_times[i] >= -(std::int64_t{1} << 61) &&
                in.reference_times[i] <= std::int64_t{1} << 61;
    return sound;
}

EventRows rows_from(const EncodingInputs& in, std::int64_t begin, std::int64_t end) {
    const std::int64_t* after = std::upper_bound(in.offsets, in.offsets + in.num_sequences + 1, begin);
    return {begin, end, after - in.offsets - 1};
}

// visit(rows) for [begin, end) cut into blocks, until one returns false.
template <class Visit>
bool for_each_block(const EncodingInputs& in, std::int64_t begin, std::int64_t end, std::int64_t block, Visit visit) {
    for (; begin < end; begin += block)
        if (!visit(rows_from(in, begin, std::min(begin + block, end)))) return false;
    return true;
}

// The units' sums [features, stride] added up in their order: gradients of the weights, the bias and the phases.
void write_weights(const EncodingInputs& in, const std::vector<float>& partials, std::int64_t units,
                   std::int64_t stride, const EncodingGradients& to) {
    const std::int64_t features = in.id_features() + in.d_dense + in.time_features() + 1;
    std::vector<double> sums(features * in.width);
    for (std::int64_t f = 0; f < features; ++f)
        for (std::int64_t u = 0; u < units; ++u)
            for (std::int64_t d = 0; d < in.width; ++d)
                sums[f * in.width + d] += partials[(u * features + f) * stride + d];
    const double* from = sums.data();
    const auto write = [&](float* weight, std::int64_t rows) {
        for (std::int64_t i = 0; i < rows * in.width; ++i) weight[i] = static_cast<float>(from[i]);
        from += rows * in.width;
    };
    write(to.d_id_weight, in.id_features());
    write(to.d_dense_weight, in.d_dense);
    // A phase turns its sine into its cosine and its cosine into minus its sine, in every event alike, so its gradient
    // is made of theirs: Σ_d sine_weight · d cosine_weight − cosine_weight · d sine_weight.
    const std::int64_t half = in.num_periods * in.width;
    const float* sine_weight = in.time_weight + 2 * in.width;
    const double* d_sine_weight = from + 2 * in.width;
    for (std::int64_t p = 0; p < in.num_periods; ++p) {
        double sum = 0.0;
        for (std::int64_t i = p * in.width; i < (p + 1) * in.width; ++i)
            sum += sine_weight[i] * d_sine_weight[half + i] - sine_weight[half + i] * d_sine_weight[i];
        to.d_phases[p] = static_cast<float>(sum);
    }
    write(to.d_time_weight, in.time_features());
    write(to.d_bias, 1);
}

}  // namespace

bool encode_events(const EncodingInputs& in, void* out, InstructionSet set, int num_threads) {
    if (!sound(in)) return false;
    const EncodingKernels& kernels = kernels_of(set);
    const AlignedBytes packed_memory(kernels.packed_floats(in) * sizeof(float));
    auto* const packed = static_cast<float*>(packed_memory.get());
    kernels.pack_forward(in, packed);
    std::atomic<bool> all_sound{true};
    const std::int64_t unit = 4 * kernels.block;
    parallel_for((in.total + unit - 1) / unit, num_threads, [&] { return AlignedBytes(kernels.scratch_bytes(in)); },
        [&](const AlignedBytes& scratch, std::int64_t u) {
            const std::int64_t begin = u * unit, end = std::min(begin + unit, in.total);
            const bool fine = for_each_block(in, begin, end, kernels.block, [&](const EventRows& rows) {
                return kernels.forward(in, packed, rows, out, scratch.get());
            });
            if (!fine) all_sound = false;
        });
    return all_sound;
}

bool encode_events_backward(const EncodingInputs& in, const EncodingGradients& gradients, InstructionSet set,
                            int num_threads) {
    if (!sound(in)) return false;
    const EncodingKernels& kernels = kernels_of(set);
    const AlignedBytes packed_memory(kernels.packed_floats(in) * sizeof(float));
    auto* const packed = static_cast<float*>(packed_memory.get());
    kernels.pack_backward(in, packed);

    const std::int64_t unit = kUnitBlocks * kernels.block, stride = kernels.weight_stride(in);
    const std::int64_t partial = (in.id_features() + in.d_dense + in.time_features() + 1) * stride;
    const std::int64_t units = std::clamp<std::int64_t>(
        std::min(kMostPartialFloats / std::max<std::int64_t>(partial, 1), (in.total + unit - 1) / unit), 1, kMostUnits);
    std::vector<float> partials(units * partial, 0.0f);
    const std::int64_t id_stride = kernels.id_stride(in), round = units * unit;
    const AlignedBytes d_found_memory(round * id_stride * sizeof(float));
    auto* const d_found = static_cast<float*>(d_found_memory.get());
    const TableSums sums{gradients.d_table, gradients.d_position, gradients.d_frequency};
    const Share shares{0, std::max(num_threads, 1)};

    std::atomic<bool> all_sound{true};
    for (std::int64_t first = 0; first < in.total; first += round) {
        const std::int64_t last = std::min(first + round, in.total);
        const auto found_of = [&](std::int64_t row) { return d_found + (row - first) * id_stride; };
        parallel_for((last - first + unit - 1) / unit, num_threads,
            [&] { return AlignedBytes(kernels.scratch_bytes(in)); },
            [&](const AlignedBytes& scratch, std::int64_t u) {
                const std::int64_t begin = first + u * unit, end = std::min(begin + unit, last);
                const bool fine = for_each_block(in, begin, end, kernels.block, [&](const EventRows& rows) {
                    const BlockGradients to{gradients.grad_out, partials.data() + u * partial, found_of(rows.begin),
                                            gradients.d_dense};
                    return kernels.backward(in, packed, rows, to, scratch.get());
                });
                if (!fine) all_sound = false;
            });
        if (!all_sound) return false;
        parallel_for(shares.count, num_threads, [] { return 0; }, [&](int, std::int64_t i) {
            kernels.scatter(in, rows_from(in, first, last), gradients.grad_out, d_found, {i, shares.count},
                            sums);
        });
    }
    write_weights(in, partials, units, stride, gradients);
    return true;
}

}  // namespace alure
