// The boundary between rowwise.cpp (threads, order of sums) and the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "element.h"

namespace alure {

// kernels/rowwise/ops.py has the formulas. Matrices are packed, row after row, and all of one type.
struct RmsNormInputs {
    Element element;
    std::int64_t rows, columns;
    const void* x;        // [rows, columns]
    const float* weight;  // [columns]
    float epsilon;
};

struct SwigluInputs {
    Element element;
    std::int64_t rows, columns;  // of the output
    const void* gate_up;         // [rows, 2 · columns]
};

// Each handles rows [begin, end).
struct RowwiseKernels {
    void (*rms_norm)(const RmsNormInputs&, std::int64_t begin, std::int64_t end, void* out);
    // d_weight [columns] is added to.
    void (*rms_norm_backward)(const RmsNormInputs&, const void* grad, std::int64_t begin, std::int64_t end, void* d_x,
                              float* d_weight);
    void (*swiglu)(const SwigluInputs&, std::int64_t begin, std::int64_t end, void* out);
    void (*swiglu_backward)(const SwigluInputs&, const void* grad, std::int64_t begin, std::int64_t end,
                            void* d_gate_up);
};

namespace portable {
extern const RowwiseKernels rowwise_kernels;
}
namespace avx2 {
extern const RowwiseKernels rowwise_kernels;
}
namespace avx512 {
extern const RowwiseKernels rowwise_kernels;
}

}  // namespace alure
