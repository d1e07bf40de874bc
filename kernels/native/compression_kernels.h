// The boundary between compression.cpp (padded weights, blocks, threads) and the kernels of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alure {

// A row-major matrix whose rows are filled up with zeros to whole vectors.
struct PaddedMatrix {
    const float* data;
    std::int64_t stride;
};

// kernels/compression/ops.py has the formula. One of x and x_bfloat16 is null.
struct DotLinearInputs {
    const float* x;  // [users, n, d]
    const std::uint16_t* x_bfloat16;
    std::int64_t n, d, k, r, hidden;
    const float* linear;         // W_L [k, n]
    const float* mix;            // Y [n, r]
    PaddedMatrix hidden_weight;  // [n · r, hidden]
    const float* hidden_bias;    // [hidden]
    PaddedMatrix output_weight;  // [hidden, k · d]
    const float* output_bias;    // [k · d]
    const float* gate;           // [k, d]
};

// Embeddings as floats, or as codes with scales; the others are null.
struct CompressionOutputs {
    float* embeddings;    // [users, k, d]
    float* hidden;        // [users, hidden], the hidden layer before its activation; with `embeddings`
    std::int8_t* codes;   // [users, k, d]
    float* scales;        // [users, k]
};

// Users that backward handles together, and rows of the hidden weights.
constexpr std::int64_t kGroupUsers = 16;
constexpr std::int64_t kHiddenRows = 64;

// Like PaddedMatrix.
struct PaddedSums {
    float* data;
    std::int64_t stride;
};

struct CompressionGradients {
    const float* grad;                      // of the embeddings [users, k, d]
    const float* hidden;                    // of the forward [users, hidden]
    PaddedMatrix output_weight_transposed;  // [k · d, hidden]
    float* d_x;                             // [users, n, d]
    PaddedSums d_hidden_weight;             // [n · r, hidden]
    PaddedSums d_output_weight;             // [hidden, k · d]
};

// What the passes of backward hand on, a row a user of the round. Strides are those of the padded weights;
// d_stride is d in whole vectors.
struct BackwardRound {
    std::int64_t first, users;      // in all users
    std::int64_t products_stride;   // n · r and room to overrun by a vector; not a multiple of 4096 bytes
    float* products;                // D, then its gradient [users, products_stride]
    float* summaries;               // Sᵀ [users, r, d_stride]
    float* grad_linear;             // of Z [users, k, d_stride]
    float* activations;             // the hidden layer [users, hidden]
    float* grad_updates;            // of the output layer [users, k · d]
    float* grad_hidden;             // before the activation, times the scale of RMSNorm [users, hidden]
    float* grad_hidden_transposed;  // [users / kGroupUsers, hidden, kGroupUsers]
    float* factors;                 // of D in its gradient [users]
};

// Sums over the users of one group of each round.
struct GroupSums {
    float* linear;       // [k, n]
    float* mix;          // [n, r in whole vectors]
    float* hidden_bias;  // [hidden]
    float* output_bias;  // [k · d]
    float* gate;         // [k, d]
};

struct CompressionKernels {
    std::int64_t lanes;                                                        // floats in a vector
    std::size_t (*scratch_bytes)(const DotLinearInputs&, std::int64_t users);  // for one thread
    void (*compress)(const DotLinearInputs&, const CompressionOutputs&, std::int64_t first, std::int64_t users,
                     void* scratch);
    std::size_t (*backward_scratch_bytes)(const DotLinearInputs&);
    // The passes of backward, in order: users [begin, begin + users) of the round, at most kGroupUsers; at most
    // kHiddenRows rows of the hidden weights; rows of the output weights; the same users again.
    void (*differentiate_embeddings)(const DotLinearInputs&, const CompressionGradients&, const BackwardRound&,
                                     std::int64_t begin, std::int64_t users, const GroupSums&, void* scratch);
    void (*differentiate_hidden)(const DotLinearInputs&, const CompressionGradients&, const BackwardRound&,
                                 std::int64_t begin, std::int64_t rows, void* scratch);
    void (*differentiate_output)(const DotLinearInputs&, const CompressionGradients&, const BackwardRound&,
                                 std::int64_t begin, std::int64_t rows);
    void (*differentiate_vectors)(const DotLinearInputs&, const CompressionGradients&, const BackwardRound&,
                                  std::int64_t begin, std::int64_t users, const GroupSums&, void* scratch);
};

namespace portable {
extern const CompressionKernels compression_kernels;
}
namespace avx2 {
extern const CompressionKernels compression_kernels;
}
namespace avx512 {
extern const CompressionKernels compression_kernels;
}

}  // namespace alure
