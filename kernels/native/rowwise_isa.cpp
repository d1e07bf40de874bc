// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "rowwise_kernels.h"
#include "simd.h"

namespace alure {
namespace {

// A vector of a row, and the last one of a row that is not made of whole vectors: its other lanes are zeros.
struct Whole {};
struct Part {
    std::int64_t count;
};

template <class T>
inline Floats load(const T* p, Whole) {
    return load(p);
}
template <class T>
inline Floats load(const T* p, Part part) {
    Floats x{};
    for (std::int64_t i = 0; i < part.count; ++i) x[i] = to_float(p[i]);
    return x;
}
template <class T>
inline void store(T* p, Whole, Floats x) {
    store(p, x);
}
template <class T>
inline void store(T* p, Part part, Floats x) {
    for (std::int64_t i = 0; i < part.count; ++i) store(p + i, x[i]);
}

// visit(i, lanes) for every vector of a row of `size` values.
template <class Visit>
inline void for_vectors(std::int64_t size, Visit visit) {
    std::int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) visit(i, Whole{});
    if (i < size) visit(i, Part{size - i});
}

// 1 / RMS of up to kLanes rows, each by the same tree of sums.
template <class T>
inline Floats scales_of(const RmsNormInputs& in, const T* x, std::int64_t rows) {
    Floats squares[kLanes] = {};
    for (std::int64_t row = 0; row < rows; ++row, x += in.columns) {
        Floats sum{};
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            const Floats value = load(x + i, lanes);
            sum += value * value;
        });
        squares[row] = sum;
    }
    Floats scales = sums_of_rows(squares) / static_cast<float>(in.columns) + in.epsilon;
    for (int i = 0; i < kLanes; ++i) scales[i] = __builtin_sqrtf(scales[i]);
    return 1.0f / scales;
}

// visit(x, scale, row) for rows [begin, end).
template <class T, class Visit>
inline void for_scaled_rows(const RmsNormInputs& in, std::int64_t begin, std::int64_t end, Visit visit) {
    for (std::int64_t first = begin; first < end; first += kLanes) {
        const std::int64_t rows = smaller<std::int64_t>(kLanes, end - first);
        const T* x = static_cast<const T*>(in.x) + first * in.columns;
        const Floats scales = scales_of(in, x, rows);
        for (std::int64_t i = 0; i < rows; ++i) visit(x + i * in.columns, scales[i], first + i);
    }
}

template <class T>
void normalize_rows(const RmsNormInputs& in, std::int64_t begin, std::int64_t end, T* out) {
    for_scaled_rows<T>(in, begin, end, [&](const T* x, float scale, std::int64_t row) ALURE_INLINE {
        T* y = out + row * in.columns;
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            store(y + i, lanes, load(x + i, lanes) * scale * load(in.weight + i, lanes));
        });
    });
}

// y = x s w with s = 1 / RMS(x): dx = s w g − x s³ / columns Σ w g x, and dw = Σ over rows of g x s.
template <class T>
void differentiate_norm(const RmsNormInputs& in, const T* grad, std::int64_t begin, std::int64_t end, T* d_x,
                        float* d_weight) {
    for_scaled_rows<T>(in, begin, end, [&](const T* x, float scale, std::int64_t row) ALURE_INLINE {
        const T* g = grad + row * in.columns;
        T* dx = d_x + row * in.columns;
        Floats products{};
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            products += load(in.weight + i, lanes) * load(g + i, lanes) * load(x + i, lanes);
        });
        const float of_x = sum_of_lanes(products) * scale * scale * scale / static_cast<float>(in.columns);
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            const Floats value = load(x + i, lanes), gradient = load(g + i, lanes);
            store(dx + i, lanes, scale * load(in.weight + i, lanes) * gradient - of_x * value);
            store(d_weight + i, lanes, load(d_weight + i, lanes) + gradient * value * scale);
        });
    });
}

// 1 / (1 + e^−x); the power of 2 is cut off where 1 + it is 1, and where it is infinite.
inline Floats sigmoid(Floats x) {
    Floats power = x * -1.44269504f;
    power = power > 128.0f ? splat(128.0f) : power;
    power = power < -126.0f ? splat(-126.0f) : power;
    return 1.0f / (1.0f + exp2_lanes<5>(power));
}

template <class T>
void gate_rows(const SwigluInputs& in, std::int64_t begin, std::int64_t end, T* out) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T *gate = static_cast<const T*>(in.gate_up) + row * 2 * in.columns, *up = gate + in.columns;
        T* y = out + row * in.columns;
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            const Floats x = load(gate + i, lanes);
            store(y + i, lanes, x * sigmoid(x) * load(up + i, lanes));
        });
    }
}

// silu'(x) = σ(x) (1 + x (1 − σ(x)))
template <class T>
void differentiate_gate(const SwigluInputs& in, const T* grad, std::int64_t begin, std::int64_t end, T* d_gate_up) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T *gate = static_cast<const T*>(in.gate_up) + row * 2 * in.columns, *up = gate + in.columns;
        const T* g = grad + row * in.columns;
        T *d_gate = d_gate_up + row * 2 * in.columns, *d_up = d_gate + in.columns;
        for_vectors(in.columns, [&](std::int64_t i, auto lanes) ALURE_INLINE {
            const Floats x = load(gate + i, lanes), s = sigmoid(x), gradient = load(g + i, lanes);
            store(d_gate + i, lanes, gradient * load(up + i, lanes) * s * (1.0f + x * (1.0f - s)));
            store(d_up + i, lanes, gradient * x * s);
        });
    }
}

void rms_norm(const RmsNormInputs& in, std::int64_t begin, std::int64_t end, void* out) {
    if (in.element == Element::kFloat32)
        normalize_rows(in, begin, end, static_cast<float*>(out));
    else
        normalize_rows(in, begin, end, static_cast<Bfloat16*>(out));
}

void rms_norm_backward(const RmsNormInputs& in, const void* grad, std::int64_t begin, std::int64_t end, void* d_x,
                       float* d_weight) {
    if (in.element == Element::kFloat32)
        differentiate_norm(in, static_cast<const float*>(grad), begin, end, static_cast<float*>(d_x), d_weight);
    else
        differentiate_norm(in, static_cast<const Bfloat16*>(grad), begin, end, static_cast<Bfloat16*>(d_x), d_weight);
}

void swiglu(const SwigluInputs& in, std::int64_t begin, std::int64_t end, void* out) {
    if (in.element == Element::kFloat32)
        gate_rows(in, begin, end, static_cast<float*>(out));
    else
        gate_rows(in, begin, end, static_cast<Bfloat16*>(out));
}

void swiglu_backward(const SwigluInputs& in, const void* grad, std::int64_t begin, std::int64_t end,
                     void* d_gate_up) {
    if (in.element == Element::kFloat32)
        differentiate_gate(in, static_cast<const float*>(grad), begin, end, static_cast<float*>(d_gate_up));
    else
        differentiate_gate(in, static_cast<const Bfloat16*>(grad), begin, end, static_cast<Bfloat16*>(d_gate_up));
}

}  // namespace

namespace ALURE_ISA {
const RowwiseKernels rowwise_kernels{rms_norm, rms_norm_backward, swiglu, swiglu_backward};
}

}  // namespace alure
