#include "rowwise.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace alure {
namespace {

constexpr std::int64_t kUnitValues = 1 << 14;  // of the output, that one thread handles at a time
constexpr std::int64_t kSummedRows = 128;      // in float32, of the weight's gradient

const RowwiseKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    set = vectors_of(set);
    if (set == InstructionSet::kAvx512) return avx512::rowwise_kernels;
    if (set == InstructionSet::kAvx2) return avx2::rowwise_kernels;
#endif
    return portable::rowwise_kernels;
}

// visit(begin, end) for all rows, `unit` at a time.
template <class Visit>
void for_units(std::int64_t rows, std::int64_t unit, int num_threads, Visit visit) {
    parallel_for((rows + unit - 1) / unit, num_threads, [] { return 0; },
        [&](int, std::int64_t u) { visit(u * unit, std::min((u + 1) * unit, rows)); });
}

std::int64_t unit_of(std::int64_t columns) {
    return std::max<std::int64_t>(1, kUnitValues / std::max<std::int64_t>(1, columns));
}

}  // namespace

void rms_norm(const RmsNormInputs& in, void* out, InstructionSet set, int num_threads) {
    const RowwiseKernels& kernels = kernels_of(set);
    for_units(in.rows, unit_of(in.columns), num_threads,
              [&](std::int64_t begin, std::int64_t end) { kernels.rms_norm(in, begin, end, out); });
}

void rms_norm_backward(const RmsNormInputs& in, const void* grad, void* d_x, float* d_weight, InstructionSet set,
                       int num_threads) {
    const RowwiseKernels& kernels = kernels_of(set);
    std::vector<float> partials((in.rows + kSummedRows - 1) / kSummedRows * in.columns, 0.0f);
    for_units(in.rows, kSummedRows, num_threads, [&](std::int64_t begin, std::int64_t end) {
        kernels.rms_norm_backward(in, grad, begin, end, d_x, partials.data() + begin / kSummedRows * in.columns);
    });
    std::vector<double> sums(in.columns);
    for (std::size_t i = 0; i < partials.size(); ++i) sums[i % sums.size()] += partials[i];
    std::copy(sums.begin(), sums.end(), d_weight);
}

void swiglu(const SwigluInputs& in, void* out, InstructionSet set, int num_threads) {
    const RowwiseKernels& kernels = kernels_of(set);
    for_units(in.rows, unit_of(in.columns), num_threads,
              [&](std::int64_t begin, std::int64_t end) { kernels.swiglu(in, begin, end, out); });
}

void swiglu_backward(const SwigluInputs& in, const void* grad, void* d_gate_up, InstructionSet set, int num_threads) {
    const RowwiseKernels& kernels = kernels_of(set);
    for_units(in.rows, unit_of(in.columns), num_threads, [&](std::int64_t begin, std::int64_t end) {
        kernels.swiglu_backward(in, grad, begin, end, d_gate_up);
    });
}

}  // namespace alure
