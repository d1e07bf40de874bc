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
    PaddedMatrix mix;            // Y [n, r]
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

struct CompressionKernels {
    std::int64_t lanes;                                                        // floats in a vector
    std::size_t (*scratch_bytes)(const DotLinearInputs&, std::int64_t users);  // for one thread
    void (*compress)(const DotLinearInputs&, const CompressionOutputs&, std::int64_t first, std::int64_t users,
                     void* scratch);
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
