// Compiled once for each instruction set: CMakeLists.txt sets ALURE_ISA (a namespace) and ALURE_VECTOR_BYTES.
#include "neighbors_byte_tiles.h"
#include "neighbors_byte_vectors.h"
#include "neighbors_products.h"

namespace alure {
namespace {

// Eight sums, whatever the instruction set, added up in a tree. Products of float32 are exact in float64.
constexpr int kSums = 8, kDoubles = kLanes / 2;
typedef double Doubles __attribute__((vector_size(ALURE_VECTOR_BYTES)));

// kDoubles floats as doubles. GCC 12 cuts __builtin_convertvector of them into pieces.
inline Doubles widened(const float* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Doubles>(_mm512_cvtps_pd(_mm256_loadu_ps(p)));
#elif defined(__AVX2__)
    return reinterpret_cast<Doubles>(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#else
    Doubles wide;
    for (int i = 0; i < kDoubles; ++i) wide[i] = p[i];
    return wide;
#endif
}

void add(const float* x, std::int64_t d, double sign, double* sums) {
    typedef double UnalignedDoubles __attribute__((vector_size(ALURE_VECTOR_BYTES), aligned(8), may_alias));
    std::int64_t i = 0;
    for (; i + kDoubles <= d; i += kDoubles) *reinterpret_cast<UnalignedDoubles*>(sums + i) += sign * widened(x + i);
    for (; i < d; ++i) sums[i] += sign * double{x[i]};
}

// add(a, b, c) is c + a term of a and b, of vectors or of doubles.
template <class Add>
inline float sum_of_terms(const float* x, const float* y, std::int64_t d, Add add) {
    Doubles vectors[kSums / kDoubles] = {};
    std::int64_t i = 0;
    for (; i + kSums <= d; i += kSums)
        for (int v = 0; v < kSums / kDoubles; ++v)
            vectors[v] = add(widened(x + i + v * kDoubles), widened(y + i + v * kDoubles), vectors[v]);
    double sums[kSums];
    for (int lane = 0; lane < kSums; ++lane) sums[lane] = vectors[lane / kDoubles][lane % kDoubles];
    for (int lane = 0; i < d; ++i, ++lane) sums[lane] = add(double{x[i]}, double{y[i]}, sums[lane]);
    const double even = (sums[0] + sums[4]) + (sums[2] + sums[6]), odd = (sums[1] + sums[5]) + (sums[3] + sums[7]);
    return static_cast<float>(even + odd);
}

float inner_product(const float* x, const float* y, std::int64_t d) {
    return sum_of_terms(x, y, d, [](auto a, auto b, auto c) { return c + a * b; });
}

float negated_distance(const float* x, const float* y, std::int64_t d) {
    return sum_of_terms(x, y, d, [](auto a, auto b, auto c) { return c - (a - b) * (a - b); });
}

#if defined(ALURE_BYTE_TILES)
constexpr const Filter& kFastest = kByteTiles;
#elif defined(ALURE_BYTE_VECTORS)
constexpr const Filter& kFastest = kByteVectors;
#else
constexpr const Filter& kFastest = kFloat32;
#endif

}  // namespace

namespace ALURE_ISA {
const NeighborKernels neighbor_kernels{kFloat32,     kFastest, kth_largest,   largest,
                                       near_largest, add,      inner_product, negated_distance};
}

}  // namespace alure
