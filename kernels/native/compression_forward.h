// Dot-linear compression of a block of users, forward.
//
// A user's X comes from memory once: Sᵀ = YᵀX and Z = W_L X grow while its rows stream in, then D = X S finds them in
// the second cache. The products of all users of the block wait as rows of one matrix, so that the hidden weights, the
// largest thing here, are read once a block.
#pragma once

#include "compression_kernels.h"
#include "products.h"
#include "scratch.h"

namespace alure {
namespace {

constexpr std::int64_t kVectorRows = 64;  // of X beside S in the first cache
constexpr std::int64_t kDepth = 256;      // hidden weights of this many products stay in the second cache
constexpr float kRmsEpsilon = 1e-6f;      // as kernels/compression/reference.py
constexpr float kL2Epsilon = 1e-12f;
constexpr float kLargestCode = 127.0f;
constexpr float kSmallestStep = 1.17549435e-38f;  // the smallest normal float

struct UserScratch {
    UserScratch(const DotLinearInputs& in, Arena& arena)
        : d_stride(round_up(in.d, kLanes)),
          products_stride(round_up(in.n * in.r, 16) + 16),  // room to overrun; not a multiple of 4096 bytes
          pairs_stride(round_up(2 * in.r, kLanes)),
          tile_stride(round_up(pairs_stride, 2 * kLanes)),
          tile_rows(rows_held(2 + pairs_stride / kLanes % 2)),
          vectors(arena.array<float>(in.n * d_stride)),
          pairs(arena.array<float>(d_stride / 2 * pairs_stride)),
          tile(arena.array<float>(tile_rows * tile_stride)),
          row(arena.array<float>(d_stride)) {}

    std::int64_t d_stride, products_stride, pairs_stride;
    std::int64_t tile_stride;  // even and odd sums of whole vectors of D
    std::int64_t tile_rows;    // as many as add_product holds in registers
    float* vectors;  // X [n, d_stride], where it does not lie in memory as it is needed
    float* pairs;    // S by pairs of channels [d_stride / 2, r, 2]
    float* tile;     // rows of D as sums over even and odd channels [tile_rows, r, 2]
    float* row;      // [d_stride]
};

struct BlockScratch : UserScratch {
    BlockScratch(const DotLinearInputs& in, std::int64_t users, Arena arena)
        : UserScratch(in, arena),
          products(arena.array<float>(users * products_stride)),
          scales(arena.array<float>(users)),
          summary(arena.array<float>(in.r * d_stride)),
          linear(arena.array<float>(users * in.k * d_stride)),
          hidden(arena.array<float>(users * in.hidden_weight.stride)),
          update(arena.array<float>(users * in.output_weight.stride)),
          bytes(arena.used()) {}

    float* products;  // D [users, n · r]
    float* scales;    // of RMSNorm [users]
    float* summary;   // Sᵀ [r, d_stride]
    float* linear;    // Z [users, k, d_stride]
    float* hidden;    // [users, hidden]
    float* update;    // [users, k · d]
    std::size_t bytes;
};

inline void fill_zeros(float* p, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) p[i] = 0.0f;
}

template <class T>
inline void copy_padded(const T* x, std::int64_t rows, std::int64_t columns, float* out, std::int64_t stride) {
    for (std::int64_t row = 0; row < rows; ++row, x += columns, out += stride) {
        std::int64_t i = 0;
        for (; i + kLanes <= columns; i += kLanes) store(out + i, load(x + i));
        for (; i < columns; ++i) out[i] = to_float(x[i]);
        fill_zeros(out + columns, stride - columns);
    }
}

// X of one user in whole vectors, rows d_stride apart.
inline const float* vectors_of(const DotLinearInputs& in, std::int64_t user, const UserScratch& s) {
    const std::int64_t at = user * in.n * in.d;
    if (in.x_bfloat16)
        copy_padded(reinterpret_cast<const Bfloat16*>(in.x_bfloat16) + at, in.n, in.d, s.vectors, s.d_stride);
    else if (s.d_stride != in.d)
        copy_padded(in.x + at, in.n, in.d, s.vectors, s.d_stride);
    else
        return in.x + at;
    return s.vectors;
}

// Sᵀ [r, d_stride] and Z of one user, channels in the lanes: d fills vectors better than r does. One copy, for both
// passes, with its products inlined: calls of them take a tenth longer.
[[gnu::noinline, gnu::flatten]] void summarize(const DotLinearInputs& in, const float* x, const UserScratch& s,
                                               float* summary, float* z) {
    fill_zeros(summary, in.r * s.d_stride);
    fill_zeros(z, in.k * s.d_stride);
    for (std::int64_t first = 0; first < in.n; first += kVectorRows) {
        const std::int64_t rows = smaller(kVectorRows, in.n - first);
        const float* block = x + first * s.d_stride;
        add_product(in.r, s.d_stride, {in.mix + first * in.r, 1, in.r}, block, s.d_stride, rows, summary, s.d_stride);
        add_product(in.k, s.d_stride, {in.linear + first, in.n, 1}, block, s.d_stride, rows, z, s.d_stride);
    }
}

// Sᵀ [r, d_stride] as pairs [d_stride / 2, r, 2], filled up with zeros.
inline void pack_pairs(const DotLinearInputs& in, const float* summary, const UserScratch& s) {
    float* pairs = s.pairs;
    for (std::int64_t channel = 0; channel < s.d_stride; channel += 2, pairs += s.pairs_stride) {
        for (std::int64_t i = 0; i < in.r; ++i)
            __builtin_memcpy(pairs + 2 * i, summary + i * s.d_stride + channel, 2 * sizeof(float));
        fill_zeros(pairs + 2 * in.r, s.pairs_stride - 2 * in.r);
    }
}

// D = X S of one user, rows r apart; returns 1 / RMS of all of it. `next`, X of the next user or else x, is fetched
// meanwhile. Inlined like summarize.
[[gnu::noinline, gnu::flatten]] float multiply_by_summary(const DotLinearInputs& in, const float* x, const float* next,
                                                          const float* summary, const UserScratch& s,
                                                          float* products) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    pack_pairs(in, summary, s);
    Floats squares{};
    for (std::int64_t first = 0; first < in.n; first += s.tile_rows) {
        const std::int64_t rows = smaller(s.tile_rows, in.n - first);
        fill_zeros(s.tile, rows * s.tile_stride);
        const std::int64_t at = first * s.d_stride;
        add_product(rows, s.pairs_stride, PairedMatrix{x + at, s.d_stride, next + at}, s.pairs, s.pairs_stride,
                    s.d_stride / 2, s.tile, s.tile_stride);
        for (std::int64_t row = 0; row < rows; ++row)
            for (std::int64_t i = 0; i < in.r; i += kLanes) {
                const float* sums = s.tile + row * s.tile_stride + 2 * i;
                const Floats values = sums_of_pairs(load(sums), load(sums + kLanes), lanes);
                squares += values * values;
                store(products + (first + row) * in.r + i, values);  // may overrun: the next row goes there
            }
    }
    const auto count = static_cast<float>(larger<std::int64_t>(in.n * in.r, 1));
    return 1.0f / __builtin_sqrtf(sum_of_lanes(squares) / count + kRmsEpsilon);
}

// GELU in its tanh form: x · sigmoid(2 √(2/π) (x + 0.044715 x³)).
inline Floats gelu(Floats x) {
    const Floats u = 1.5957691216f * (x + 0.044715f * x * x * x);
    const Floats e = exp_lanes(u < 0.0f ? u : -u);
    return x * ((u < 0.0f ? e : splat(1.0f)) / (1.0f + e));
}

// hidden = gelu(scale · D W₁ + b₁) of all users of the block; `before` [users, hidden] takes what the GELU sees.
inline void hidden_layer(const DotLinearInputs& in, std::int64_t users, const BlockScratch& s, float* before) {
    const std::int64_t stride = in.hidden_weight.stride, depth = in.n * in.r;
    fill_zeros(s.hidden, users * stride);
    for (std::int64_t first = 0; first < depth; first += kDepth)
        add_product(users, stride, {s.products + first, s.products_stride, 1}, in.hidden_weight.data + first * stride,
                    stride, smaller(kDepth, depth - first), s.hidden, stride);
    for (std::int64_t user = 0; user < users; ++user) {
        float* row = s.hidden + user * stride;
        for (std::int64_t i = 0; i < in.hidden; ++i) row[i] = row[i] * s.scales[user] + in.hidden_bias[i];
        if (before)
            for (std::int64_t i = 0; i < in.hidden; ++i) before[user * in.hidden + i] = row[i];
        for (std::int64_t i = 0; i < stride; i += kLanes) store(row + i, gelu(load(row + i)));
    }
}

// update [users, k · d] = hidden · W₂ + b₂, of hidden layers after their activation.
inline void output_layer(const DotLinearInputs& in, std::int64_t users, const float* hidden, float* update) {
    const std::int64_t stride = in.output_weight.stride;
    for (std::int64_t user = 0; user < users; ++user)
        copy_padded(in.output_bias, 1, in.k * in.d, update + user * stride, stride);
    add_product(users, stride, {hidden, in.hidden_weight.stride, 1}, in.output_weight.data, stride, in.hidden, update,
                stride);
}

struct Normalization {
    float rms, length;  // e = v · rms / length
    float largest;      // max |v|, NaN where a value is
};

inline Normalization measure(const float* v, std::int64_t d, std::int64_t stride) {
    const auto count = static_cast<float>(larger<std::int64_t>(d, 1));
    Floats squares{}, largest{};
    for (std::int64_t i = 0; i < stride; i += kLanes) {
        const Floats x = load(v + i);
        squares += x * x;
        largest = larger_lanes(larger_lanes(x, -x), largest);
    }
    const float sum = sum_of_lanes(squares);
    const float rms = 1.0f / __builtin_sqrtf(sum / count + kRmsEpsilon);
    Floats scaled_squares{};
    for (std::int64_t i = 0; i < stride; i += kLanes) {
        const Floats u = load(v + i) * rms;
        scaled_squares += u * u;
    }
    const float length = larger(__builtin_sqrtf(sum_of_lanes(scaled_squares)), kL2Epsilon);
    return {rms, length, sum == sum ? largest_of_lanes(largest) : sum};  // comparing lanes can lose a NaN
}

// z + gate ⊙ update, filled up with zeros.
inline void gated_sum(const float* z, const float* gate, const float* update, std::int64_t d, float* out,
                      std::int64_t stride) {
    for (std::int64_t i = 0; i < d; ++i) out[i] = z[i] + gate[i] * update[i];
    fill_zeros(out + d, stride - d);
}

// Codes v / step, rounded half to even, which stand for e = scale · code; as kernels/compression/reference.py.
inline void quantize(const float* v, std::int64_t d, const Normalization& by, std::int8_t* codes, float* scale) {
    const float step = by.largest / kLargestCode;
    const bool usable = step >= kSmallestStep && step < kInfinity;
    for (std::int64_t i = 0; i < d; ++i)
        codes[i] = usable ? static_cast<std::int8_t>(__builtin_rintf(v[i] / step)) : std::int8_t{0};
    *scale = step * by.rms / by.length;
}

// E = L2(RMSNorm(Z + gate ⊙ update)) of embedding `index` of user `user` of the block.
inline void write_embedding(const DotLinearInputs& in, const CompressionOutputs& outputs, std::int64_t first,
                            std::int64_t user, std::int64_t index, const BlockScratch& s) {
    const float* z = s.linear + (user * in.k + index) * s.d_stride;
    const float* update = s.update + user * in.output_weight.stride + index * in.d;
    const float* gate = in.gate + index * in.d;
    gated_sum(z, gate, update, in.d, s.row, s.d_stride);
    const Normalization by = measure(s.row, in.d, s.d_stride);
    const std::int64_t embedding = (first + user) * in.k + index;
    if (outputs.codes) return quantize(s.row, in.d, by, outputs.codes + embedding * in.d, outputs.scales + embedding);
    float* out = outputs.embeddings + embedding * in.d;
    for (std::int64_t i = 0; i < in.d; ++i) out[i] = s.row[i] * by.rms / by.length;
}

void compress(const DotLinearInputs& in, const CompressionOutputs& outputs, std::int64_t first, std::int64_t users,
              void* base) {
    const BlockScratch s(in, users, Arena(base));
    for (std::int64_t user = 0; user < users; ++user) {
        const float* x = vectors_of(in, first + user, s);
        summarize(in, x, s, s.summary, s.linear + user * in.k * s.d_stride);
        const float* next = x == s.vectors || user + 1 == users ? x : x + in.n * in.d;
        s.scales[user] = multiply_by_summary(in, x, next, s.summary, s, s.products + user * s.products_stride);
    }
    hidden_layer(in, users, s, outputs.hidden ? outputs.hidden + first * in.hidden : nullptr);
    output_layer(in, users, s.hidden, s.update);
    for (std::int64_t user = 0; user < users; ++user)
        for (std::int64_t index = 0; index < in.k; ++index) write_embedding(in, outputs, first, user, index, s);
}

std::size_t scratch_bytes(const DotLinearInputs& in, std::int64_t users) {
    return BlockScratch(in, users, Arena(nullptr)).bytes;
}

}  // namespace
}  // namespace alure
