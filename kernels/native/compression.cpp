#include "compression.h"

#include <algorithm>
#include <vector>

#include "aligned.h"
#include "parallel.h"
#include "scratch.h"

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

std::int64_t round_up_to(std::int64_t x, std::int64_t step) { return ceil_div(x, step) * step; }

// Users a block: few enough for the cache, and about as many in each block of each thread.
std::int64_t users_a_block(const DotLinearInputs& in, std::int64_t users, std::int64_t threads) {
    const std::int64_t most = std::clamp<std::int64_t>(
        kBlockProducts / std::max<std::int64_t>(in.n * in.r, 1), 1, kBlockUsers);
    return ceil_div(users, ceil_div(ceil_div(users, most), threads) * threads);
}

// W [rows, columns] as Wᵀ, its rows filled up with zeros to whole vectors.
std::vector<float> transposed(const float* matrix, std::int64_t rows, std::int64_t columns, std::int64_t stride) {
    std::vector<float> result(columns * stride);
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column)
            result[column * stride + row] = matrix[row * columns + column];
    return result;
}

// Sums in place where the rows are whole vectors, else in memory of its own that is copied when all are done.
class Sums {
public:
    Sums(float* out, std::int64_t rows, std::int64_t columns, std::int64_t lanes)
        : out_(out), rows_(rows), columns_(columns), sums_{out, round_up_to(columns, lanes)} {
        if (sums_.stride == columns) return;
        own_.resize(rows * sums_.stride);
        sums_.data = own_.data();
    }
    [[nodiscard]] PaddedSums get() const { return sums_; }
    void finish() const {
        if (sums_.data == out_) return;
        for (std::int64_t row = 0; row < rows_; ++row)
            std::copy_n(sums_.data + row * sums_.stride, columns_, out_ + row * columns_);
    }

private:
    float* out_;
    std::int64_t rows_, columns_;
    PaddedSums sums_;
    std::vector<float> own_;
};

// Backward's products of a round, 8 MiB, stay in the last cache from pass to pass.
constexpr std::int64_t kRoundProducts = 1 << 21;
constexpr std::int64_t kMostRoundUsers = 512;

std::int64_t users_a_round(const DotLinearInputs& in, std::int64_t users) {
    const std::int64_t most = std::clamp<std::int64_t>(kRoundProducts / std::max<std::int64_t>(in.n * in.r, 1),
                                                       kGroupUsers, kMostRoundUsers);
    return std::min(most / kGroupUsers * kGroupUsers, round_up_to(users, kGroupUsers));
}

BackwardRound make_round(const DotLinearInputs& in, std::int64_t users, std::int64_t lanes, Arena& arena) {
    const std::int64_t d_stride = round_up_to(in.d, lanes), products_stride = round_up_to(in.n * in.r, 16) + 16;
    return {.first = 0,
            .users = users,
            .products_stride = products_stride,
            .products = arena.array<float>(users * products_stride),
            .summaries = arena.array<float>(users * in.r * d_stride),
            .grad_linear = arena.array<float>(users * in.k * d_stride),
            .activations = arena.array<float>(users * in.hidden_weight.stride),
            .grad_updates = arena.array<float>(users * in.output_weight.stride),
            .grad_hidden = arena.array<float>(users * in.hidden_weight.stride),
            .grad_hidden_transposed = arena.array<float>(users * in.hidden_weight.stride),
            .factors = arena.array<float>(users)};
}

GroupSums make_group_sums(const DotLinearInputs& in, std::int64_t lanes, Arena& arena) {
    return {.linear = arena.array<float>(in.k * in.n),
            .mix = arena.array<float>(in.n * round_up_to(in.r, lanes)),
            .hidden_bias = arena.array<float>(in.hidden),
            .output_bias = arena.array<float>(in.k * in.d),
            .gate = arena.array<float>(in.k * in.d)};
}

// out [rows, columns]: the groups' sums, rows `stride` apart, in the order of the groups.
void add_groups(const std::vector<GroupSums>& groups, float* GroupSums::* sums, std::int64_t rows, std::int64_t columns,
                std::int64_t stride, float* out) {
    for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t column = 0; column < columns; ++column) {
            double sum = 0.0;
            for (const GroupSums& group : groups) sum += (group.*sums)[row * stride + column];
            out[row * columns + column] = static_cast<float>(sum);
        }
}

}  // namespace

void compress_dot_linear(const DotLinearInputs& given, const CompressionOutputs& outputs, std::int64_t users,
                         InstructionSet set, int num_threads) {
    if (users == 0) return;
    const CompressionKernels& kernels = kernels_of(set);
    const Padded hidden_weight(given.hidden_weight, given.n * given.r, kernels.lanes);
    const Padded output_weight(given.output_weight, given.hidden, kernels.lanes);
    DotLinearInputs in = given;
    in.hidden_weight = hidden_weight.get();
    in.output_weight = output_weight.get();

    const std::int64_t block = users_a_block(in, users, std::max(num_threads, 1));
    parallel_for(
        ceil_div(users, block), num_threads, [&] { return AlignedBytes(kernels.scratch_bytes(in, block)); },
        [&](const AlignedBytes& scratch, std::int64_t i) {
            kernels.compress(in, outputs, i * block, std::min(block, users - i * block), scratch.get());
        });
}

void compress_dot_linear_backward(const DotLinearInputs& given, const DotLinearGradients& gradients, std::int64_t users,
                                  InstructionSet set, int num_threads) {
    const CompressionKernels& kernels = kernels_of(set);
    const std::int64_t outputs = given.k * given.d, depth = given.n * given.r;
    const Padded hidden_weight(given.hidden_weight, depth, kernels.lanes);
    const Padded output_weight(given.output_weight, given.hidden, kernels.lanes);
    DotLinearInputs in = given;
    in.hidden_weight = hidden_weight.get();
    in.output_weight = output_weight.get();

    const Sums d_hidden_weight(gradients.d_hidden_weight, depth, in.hidden, kernels.lanes);
    const Sums d_output_weight(gradients.d_output_weight, in.hidden, outputs, kernels.lanes);
    const std::vector<float> output_weight_transposed =
        transposed(given.output_weight.data, in.hidden, outputs, in.hidden_weight.stride);
    const CompressionGradients to{gradients.grad,
                                  gradients.hidden,
                                  {output_weight_transposed.data(), in.hidden_weight.stride},
                                  gradients.d_x,
                                  d_hidden_weight.get(),
                                  d_output_weight.get()};

    const std::int64_t most = users_a_round(in, users), groups = most / kGroupUsers;
    Arena measured(nullptr);
    make_round(in, most, kernels.lanes, measured);
    const AlignedBytes round_memory(measured.used());
    Arena round_arena(round_memory.get());
    BackwardRound round = make_round(in, most, kernels.lanes, round_arena);
    Arena measured_sums(nullptr);
    make_group_sums(in, kernels.lanes, measured_sums);
    std::vector<GroupSums> sums;
    const AlignedBytes sums_memory(groups * measured_sums.used());
    std::fill_n(static_cast<char*>(sums_memory.get()), groups * measured_sums.used(), char{0});
    Arena sums_arena(sums_memory.get());
    for (std::int64_t group = 0; group < groups; ++group) sums.push_back(make_group_sums(in, kernels.lanes, sums_arena));

    const auto scratch = [&] { return AlignedBytes(kernels.backward_scratch_bytes(in)); };
    do {  // once where there are no users, for the zeros
        round.users = std::min(most, users - round.first);
        const auto users_of = [&](std::int64_t group) {
            return std::min(kGroupUsers, round.users - group * kGroupUsers);
        };
        parallel_for(ceil_div(round.users, kGroupUsers), num_threads, scratch,
                     [&](const AlignedBytes& memory, std::int64_t i) {
                         kernels.differentiate_embeddings(in, to, round, i * kGroupUsers, users_of(i), sums[i],
                                                          memory.get());
                     });
        parallel_for(ceil_div(depth, kHiddenRows), num_threads, scratch,
                     [&](const AlignedBytes& memory, std::int64_t i) {
                         const std::int64_t begin = i * kHiddenRows;
                         kernels.differentiate_hidden(in, to, round, begin, std::min(kHiddenRows, depth - begin),
                                                      memory.get());
                     });
        parallel_for(ceil_div(in.hidden, kHiddenRows), num_threads, [] { return 0; }, [&](int, std::int64_t i) {
            const std::int64_t begin = i * kHiddenRows;
            kernels.differentiate_output(in, to, round, begin, std::min(kHiddenRows, in.hidden - begin));
        });
        parallel_for(ceil_div(round.users, kGroupUsers), num_threads, scratch,
                     [&](const AlignedBytes& memory, std::int64_t i) {
                         kernels.differentiate_vectors(in, to, round, i * kGroupUsers, users_of(i), sums[i],
                                                       memory.get());
                     });
        round.first += most;
    } while (round.first < users);
    d_hidden_weight.finish();
    d_output_weight.finish();
    add_groups(sums, &GroupSums::linear, in.k, in.n, in.n, gradients.d_linear);
    add_groups(sums, &GroupSums::mix, in.n, in.r, round_up_to(in.r, kernels.lanes), gradients.d_mix);
    add_groups(sums, &GroupSums::hidden_bias, 1, in.hidden, in.hidden, gradients.d_hidden_bias);
    add_groups(sums, &GroupSums::output_bias, 1, outputs, outputs, gradients.d_output_bias);
    add_groups(sums, &GroupSums::gate, 1, outputs, outputs, gradients.d_gate);
}

}  // namespace alure
