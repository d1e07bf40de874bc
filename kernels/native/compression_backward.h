// Dot-linear compression, backward, in the passes that compression.h describes. Nothing but the hidden layer is kept
// from the forward: S and D are computed again, a fifth of the arithmetic of both.
#pragma once

#include "compression_forward.h"

namespace alure {
namespace {

constexpr std::int64_t kGradientRows = 24;  // of dX: beside S and its gradient in the first cache
constexpr std::int64_t kOutputs = 32;       // summed at once: long sums of few parts are less exact
constexpr std::int64_t kSumUsers = 64;      // whose products and hidden gradients stay in the first caches

static_assert(kGroupUsers % kLanes == 0 && kHiddenRows % kLanes == 0);

struct BackwardScratch : UserScratch {
    BackwardScratch(const DotLinearInputs& in, Arena arena)
        : UserScratch(in, arena),
          linear(arena.array<float>(in.k * d_stride * kGroupUsers)),
          update(arena.array<float>(in.output_weight.stride * kGroupUsers)),
          grad_activation(arena.array<float>(in.hidden_weight.stride * kGroupUsers)),
          hidden_tile(arena.array<float>(kHiddenRows * kGroupUsers)),
          r_stride(round_up(in.r, kLanes)),
          grad_summary(arena.array<float>(d_stride * r_stride)),
          grad_summary_transposed(arena.array<float>(r_stride * d_stride)),
          grad_vectors(arena.array<float>(kGradientRows * d_stride)),
          bytes(arena.used()) {}

    float* linear;           // Z [users, k, d_stride]
    float* update;           // [users, k · d]
    float* grad_activation;  // of the hidden layer [users, hidden]
    float* hidden_tile;      // [kHiddenRows, kGroupUsers]
    std::int64_t r_stride;
    float* grad_summary;             // dS [d_stride, r_stride]
    float* grad_summary_transposed;  // [r_stride, d_stride]
    float* grad_vectors;             // rows of dX [kGradientRows, d_stride]
    std::size_t bytes;
};

// rows × columns, both multiples of kLanes, to columns × rows.
inline void transpose(std::int64_t rows, std::int64_t columns, const float* from, std::int64_t from_stride, float* to,
                      std::int64_t to_stride) {
    for (std::int64_t row = 0; row < rows; row += kLanes)
        for (std::int64_t column = 0; column < columns; column += kLanes) {
            Floats square[kLanes];
            for (int i = 0; i < kLanes; ++i) square[i] = load(from + (row + i) * from_stride + column);
            transpose(square);
            for (int i = 0; i < kLanes; ++i) store(to + (column + i) * to_stride + row, square[i]);
        }
}

inline Floats gelu_derivative(Floats x) {
    const Floats u = 1.5957691216f * (x + 0.044715f * x * x * x);
    const Floats e = exp_lanes(u < 0.0f ? u : -u);
    const Floats smaller_part = e / (1.0f + e), larger_part = 1.0f / (1.0f + e);  // of sigmoid(u) and sigmoid(−u)
    const Floats slope = 1.5957691216f * (1.0f + 0.134145f * x * x);
    return (u < 0.0f ? smaller_part : larger_part) + x * smaller_part * larger_part * slope;
}

// Gradient of v [d] for that of L2(RMSNorm(v)); as kernels/compression/reference.py.
inline void normalize_backward(const float* v, const float* grad, std::int64_t d, std::int64_t stride, float* out) {
    const Normalization by = measure(v, d, stride);
    const float to_e = by.rms / by.length;
    float along = 0.0f;  // below the smallest length the divisor is constant, so nothing is projected out
    if (by.length > kL2Epsilon)
        for (std::int64_t i = 0; i < d; ++i) along += v[i] * to_e * grad[i];
    float mean = 0.0f;
    for (std::int64_t i = 0; i < d; ++i) {
        out[i] = (grad[i] - v[i] * to_e * along) / by.length;
        mean += v[i] * by.rms * out[i];
    }
    mean /= static_cast<float>(d);
    for (std::int64_t i = 0; i < d; ++i) out[i] = by.rms * (out[i] - v[i] * by.rms * mean);
    fill_zeros(out + d, stride - d);
}

// Gradients of one user before the normalisation: of Z and of the MLP's update.
inline void differentiate_gate(const DotLinearInputs& in, const float* grad, const float* z, const float* update,
                               const BackwardScratch& s, float* grad_linear, float* grad_update,
                               const GroupSums& sums) {
    for (std::int64_t index = 0; index < in.k; ++index) {
        const std::int64_t at = index * in.d;
        float* grad_v = grad_linear + index * s.d_stride;
        gated_sum(z + index * s.d_stride, in.gate + at, update + at, in.d, s.row, s.d_stride);
        normalize_backward(s.row, grad + at, in.d, s.d_stride, grad_v);
        for (std::int64_t i = 0; i < in.d; ++i) {
            grad_update[at + i] = grad_v[i] * in.gate[at + i];
            sums.gate[at + i] += grad_v[i] * update[at + i];
            sums.output_bias[at + i] += grad_update[at + i];
        }
    }
    fill_zeros(grad_update + in.k * in.d, in.output_weight.stride - in.k * in.d);
}

// Gradient of one user's hidden layer, times the scale of RMSNorm. Returns the factor of D in the gradient of D: with
// u = s D that is s (g − u mean(u g)), and Σ u g = Σ over the hidden layer, which is far smaller.
inline float differentiate_activation(const DotLinearInputs& in, const float* hidden, const float* grad_activation,
                                      float scale, float* grad_hidden, const GroupSums& sums) {
    const std::int64_t stride = in.hidden_weight.stride;
    copy_padded(hidden, 1, in.hidden, grad_hidden, stride);
    for (std::int64_t i = 0; i < stride; i += kLanes)
        store(grad_hidden + i, load(grad_activation + i) * gelu_derivative(load(grad_hidden + i)));
    float along = 0.0f;
    for (std::int64_t i = 0; i < in.hidden; ++i) {
        along += grad_hidden[i] * (hidden[i] - in.hidden_bias[i]);
        sums.hidden_bias[i] += grad_hidden[i];
        grad_hidden[i] *= scale;
    }
    return scale * scale * along / static_cast<float>(larger<std::int64_t>(in.n * in.r, 1));
}

void differentiate_embeddings(const DotLinearInputs& in, const CompressionGradients& to, const BackwardRound& round,
                              std::int64_t begin, std::int64_t users, const GroupSums& sums, void* base) {
    const BackwardScratch s(in, Arena(base));
    const std::int64_t hidden_stride = in.hidden_weight.stride, output_stride = in.output_weight.stride,
                       linear_size = in.k * s.d_stride;
    float scales[kGroupUsers];
    for (std::int64_t user = 0; user < users; ++user) {
        const std::int64_t row = begin + user;
        const float* x = vectors_of(in, round.first + row, s);
        float* summary = round.summaries + row * in.r * s.d_stride;
        summarize(in, x, s, summary, s.linear + user * linear_size);
        scales[user] = multiply_by_summary(in, x, x, summary, s, round.products + row * round.products_stride);
    }

    const float* hidden = to.hidden + (round.first + begin) * in.hidden;
    float* activation = round.activations + begin * hidden_stride;
    copy_padded(hidden, users, in.hidden, activation, hidden_stride);
    for (std::int64_t i = 0; i < users * hidden_stride; i += kLanes) store(activation + i, gelu(load(activation + i)));
    output_layer(in, users, activation, s.update);

    float* grad_update = round.grad_updates + begin * output_stride;
    for (std::int64_t user = 0; user < users; ++user)
        differentiate_gate(in, to.grad + (round.first + begin + user) * in.k * in.d, s.linear + user * linear_size,
                           s.update + user * output_stride, s, round.grad_linear + (begin + user) * linear_size,
                           grad_update + user * output_stride, sums);

    fill_zeros(s.grad_activation, users * hidden_stride);
    for (std::int64_t first = 0, outputs = in.k * in.d; first < outputs; first += kOutputs)
        add_product(users, hidden_stride, {grad_update + first, output_stride, 1},
                    to.output_weight_transposed.data + first * hidden_stride, hidden_stride,
                    smaller(kOutputs, outputs - first), s.grad_activation, hidden_stride);
    float* grad_hidden = round.grad_hidden + begin * hidden_stride;
    for (std::int64_t user = 0; user < users; ++user)
        round.factors[begin + user] =
            differentiate_activation(in, hidden + user * in.hidden, s.grad_activation + user * hidden_stride,
                                     scales[user], grad_hidden + user * hidden_stride, sums);
    fill_zeros(grad_hidden + users * hidden_stride, (kGroupUsers - users) * hidden_stride);
    transpose(kGroupUsers, hidden_stride, grad_hidden, hidden_stride,
              round.grad_hidden_transposed + begin * hidden_stride, kGroupUsers);
}

// D of a group of users becomes its gradient, in `rows` columns from `begin`; s.hidden_tile has what comes through W₁.
inline void differentiate_products(const BackwardRound& round, std::int64_t user, std::int64_t users,
                                   std::int64_t begin, std::int64_t rows, const BackwardScratch& s) {
    for (std::int64_t first = 0; first < users; first += kLanes)
        for (std::int64_t row = 0; row < rows; row += kLanes) {
            Floats square[kLanes];
            for (int i = 0; i < kLanes; ++i) square[i] = load(s.hidden_tile + (row + i) * kGroupUsers + first);
            transpose(square);
            const std::int64_t count = smaller<std::int64_t>(kLanes, users - first);
            for (std::int64_t i = 0; i < count; ++i) {
                float* p = round.products + (user + first + i) * round.products_stride + begin + row;
                store(p, square[i] - load(p) * round.factors[user + first + i]);  // may overrun, in the last rows
            }
        }
}

void differentiate_hidden(const DotLinearInputs& in, const CompressionGradients& to, const BackwardRound& round,
                          std::int64_t begin, std::int64_t rows, void* base) {
    const BackwardScratch s(in, Arena(base));
    const std::int64_t stride = in.hidden_weight.stride;
    float* sums = to.d_hidden_weight.data + begin * stride;
    if (round.first == 0) fill_zeros(sums, rows * stride);
    for (std::int64_t user = 0; user < round.users; user += kSumUsers)
        add_product(rows, stride, {round.products + user * round.products_stride + begin, 1, round.products_stride},
                    round.grad_hidden + user * stride, stride, smaller(kSumUsers, round.users - user), sums, stride);
    fill_zeros(s.hidden_tile, kHiddenRows * kGroupUsers);
    for (std::int64_t user = 0; user < round.users; user += kGroupUsers) {
        fill_zeros(s.hidden_tile, rows * kGroupUsers);
        add_product(rows, kGroupUsers, {in.hidden_weight.data + begin * stride, stride, 1},
                    round.grad_hidden_transposed + user * stride, kGroupUsers, in.hidden, s.hidden_tile, kGroupUsers);
        differentiate_products(round, user, smaller(kGroupUsers, round.users - user), begin, rows, s);
    }
}

void differentiate_output(const DotLinearInputs& in, const CompressionGradients& to, const BackwardRound& round,
                          std::int64_t begin, std::int64_t rows) {
    const std::int64_t stride = in.output_weight.stride;
    float* sums = to.d_output_weight.data + begin * stride;
    if (round.first == 0) fill_zeros(sums, rows * stride);
    add_product(rows, stride, {round.activations + begin, 1, in.hidden_weight.stride}, round.grad_updates, stride,
                round.users, sums, stride);
}

// Σ of the outer products of one user's grad_linear [k, d] and X.
inline void add_linear_gradient(const DotLinearInputs& in, const float* x, const float* grad_linear,
                                std::int64_t stride, float* sums) {
    for (std::int64_t row = 0; row < in.n; ++row)
        for (std::int64_t index = 0; index < in.k; ++index) {
            Floats sum{};
            for (std::int64_t i = 0; i < stride; i += kLanes)
                sum += load(x + row * stride + i) * load(grad_linear + index * stride + i);
            sums[index * in.n + row] += sum_of_lanes(sum);
        }
}

// dS = Xᵀ dD; then, rows of X block by block, dY += X dS and dX = dD Sᵀ + Y dSᵀ + W_Lᵀ dZ.
void differentiate_vectors(const DotLinearInputs& in, const CompressionGradients& to, const BackwardRound& round,
                           std::int64_t begin, std::int64_t users, const GroupSums& sums, void* base) {
    const BackwardScratch s(in, Arena(base));
    const std::int64_t stride = s.r_stride;
    for (std::int64_t row = begin; row < begin + users; ++row) {
        const float* x = vectors_of(in, round.first + row, s);
        const float* grad_products = round.products + row * round.products_stride;
        const float* grad_linear = round.grad_linear + row * in.k * s.d_stride;
        const float* summary = round.summaries + row * in.r * s.d_stride;
        fill_zeros(s.grad_summary, s.d_stride * stride);
        for (std::int64_t first = 0; first < in.n; first += kVectorRows)
            add_product(in.d, stride, {x + first * s.d_stride, 1, s.d_stride}, grad_products + first * in.r, in.r,
                        smaller(kVectorRows, in.n - first), s.grad_summary, stride);
        transpose(s.d_stride, stride, s.grad_summary, stride, s.grad_summary_transposed, s.d_stride);
        for (std::int64_t first = 0; first < in.n; first += kGradientRows) {
            const std::int64_t rows = smaller(kGradientRows, in.n - first);
            add_product(rows, stride, {x + first * s.d_stride, s.d_stride, 1}, s.grad_summary, stride, in.d,
                        sums.mix + first * stride, stride);
            float* tile = s.grad_vectors;
            fill_zeros(tile, rows * s.d_stride);
            add_product(rows, s.d_stride, {grad_products + first * in.r, in.r, 1}, summary, s.d_stride, in.r, tile,
                        s.d_stride);
            add_product(rows, s.d_stride, {in.mix + first * in.r, in.r, 1}, s.grad_summary_transposed, s.d_stride,
                        in.r, tile, s.d_stride);
            add_product(rows, s.d_stride, {in.linear + first, 1, in.n}, grad_linear, s.d_stride, in.k, tile,
                        s.d_stride);
            float* out = to.d_x + ((round.first + row) * in.n + first) * in.d;
            for (std::int64_t i = 0; i < rows; ++i)
                for (std::int64_t j = 0; j < in.d; ++j) out[i * in.d + j] = tile[i * s.d_stride + j];
        }
        add_linear_gradient(in, x, grad_linear, s.d_stride, sums.linear);
    }
}

std::size_t backward_scratch_bytes(const DotLinearInputs& in) { return BackwardScratch(in, Arena(nullptr)).bytes; }

}  // namespace
}  // namespace alure
