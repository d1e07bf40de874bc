#include "compression.h"

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "parallel.h"

namespace alure {
namespace {

// A block of users shares one pass over the hidden weights; its products wait in the last cache meanwhile.
constexpr std::int64_t kBlockUsers = 48;
constexpr std::int64_t kBlockProducts = 1 << 19;  // floats, 2 MiB

const CompressionKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    set = vectors_of(set);
    if (set == InstructionSet::kAvx512) return avx512::compression_kernels;
    if (set == InstructionSet::kAvx2) return avx2::compression_kernels;
#endif
    return portable::compression_kernels;
}

// The matrix as it is where its rows are whole vectors, else a copy whose rows are.
class Padded {
public:
    Padded(PaddedMatrix matrix, std::int64_t rows, std::int64_t lanes) : matrix_(matrix) {
        const std::int64_t columns = matrix.stride, stride = (columns + lanes - 1) / lanes * lanes;
        if (stride == columns) return;
        copy_.resize(rows * stride);
        for (std::int64_t row = 0; row < rows; ++row)
            std::copy_n(matrix.data + row * columns, columns, copy_.data() + row * stride);
        matrix_ = {copy_.data(), stride};
    }
    [[nodiscard]] PaddedMatrix get() const { return matrix_; }

private:
    PaddedMatrix matrix_;
    std::vector<float> copy_;
};

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Users a block: few enough for the cache, and about as many in each block of each thread.
std::int64_t users_a_block(const DotLinearInputs& in, std::int64_t users, std::int64_t threads) {
    const std::int64_t most = std::clamp<std::int64_t>(
        kBlockProducts / std::max<std::int64_t>(in.n * in.r, 1), 1, kBlockUsers);
    return ceil_div(users, ceil_div(ceil_div(users, most), threads) * threads);
}

}  // namespace

void compress_dot_linear(const DotLinearInputs& given, const CompressionOutputs& outputs, std::int64_t users,
                         InstructionSet set, int num_threads) {
    if (users == 0) return;
    const CompressionKernels& kernels = kernels_of(set);
    const Padded mix(given.mix, given.n, kernels.lanes);
    const Padded hidden_weight(given.hidden_weight, given.n * given.r, kernels.lanes);
    const Padded output_weight(given.output_weight, given.hidden, kernels.lanes);
    DotLinearInputs in = given;
    in.mix = mix.get();
    in.hidden_weight = hidden_weight.get();
    in.output_weight = output_weight.get();

    const std::int64_t block = users_a_block(in, users, std::max(num_threads, 1));
    parallel_for(
        ceil_div(users, block), num_threads, [&] { return AlignedBytes(kernels.scratch_bytes(in, block)); },
        [&](const AlignedBytes& scratch, std::int64_t i) {
            kernels.compress(in, outputs, i * block, std::min(block, users - i * block), scratch.get());
        });
}

}  // namespace alure
