// alure.kernels._native.DotLinear, compress_dot_linear, its backward, and compress_dot_linear_int8.
#include <nanobind/stl/tuple.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "compression.h"

namespace alure {
namespace {

// x [users, n, d], float32 or bfloat16 (as its bits), and the weights in float32.
struct DotLinear {
    std::optional<Array<float, 3>> x;
    std::optional<Array<std::uint16_t, 3>> x_bfloat16;
    Array<float, 2> linear, mix, hidden_weight;
    Vector<float> hidden_bias;
    Array<float, 2> output_weight;
    Vector<float> output_bias;
    Array<float, 2> gate;

    [[nodiscard]] std::int64_t size(std::size_t axis) const {
        return static_cast<std::int64_t>(x ? x->shape(axis) : x_bfloat16->shape(axis));
    }
    [[nodiscard]] std::int64_t users() const { return size(0); }

    [[nodiscard]] DotLinearInputs inputs() const {
        require(x.has_value() != x_bfloat16.has_value(), "x, x_bfloat16: expected one of them");
        const std::int64_t n = size(1), d = size(2);
        const auto k = static_cast<std::int64_t>(linear.shape(0)), r = static_cast<std::int64_t>(mix.shape(1)),
                   hidden = static_cast<std::int64_t>(hidden_bias.size());
        const auto is = [](const Array<float, 2>& matrix, std::int64_t rows, std::int64_t columns) {
            return static_cast<std::int64_t>(matrix.shape(0)) == rows &&
                   static_cast<std::int64_t>(matrix.shape(1)) == columns;
        };
        require(is(linear, k, n) && is(mix, n, r) && is(gate, k, d),
                "linear, mix, gate: expected shapes [k, n], [n, r], [k, d]");
        require(is(hidden_weight, n * r, hidden) && is(output_weight, hidden, k * d) &&
                    static_cast<std::int64_t>(output_bias.size()) == k * d,
                "hidden_weight, output_weight, output_bias: expected shapes [n * r, hidden], [hidden, k * d], [k * d]");
        return {or_null(x),
                or_null(x_bfloat16),
                n,
                d,
                k,
                r,
                hidden,
                linear.data(),
                mix.data(),
                {hidden_weight.data(), hidden},
                hidden_bias.data(),
                {output_weight.data(), k * d},
                output_bias.data(),
                gate.data()};
    }
};

template <class Out>
void require_shape(const Out& out, std::initializer_list<std::int64_t> shape, const char* message) {
    std::size_t axis = 0;
    for (const std::int64_t size : shape) require(static_cast<std::int64_t>(out.shape(axis++)) == size, message);
}

void bound_compress(const DotLinear& given, Output<float, 3> embeddings, Output<float, 2> hidden,
                    const std::string& instruction_set, int num_threads) {
    const DotLinearInputs in = given.inputs();
    const std::int64_t users = given.users();
    require_shape(embeddings, {users, in.k, in.d}, "embeddings: expected shape [users, k, d]");
    require_shape(hidden, {users, in.hidden}, "hidden: expected shape [users, hidden]");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    compress_dot_linear(in, {embeddings.data(), hidden.data(), nullptr, nullptr}, users, set, num_threads);
}

void bound_compress_int8(const DotLinear& given, Output<std::int8_t, 3> codes, Output<float, 2> scales,
                         const std::string& instruction_set, int num_threads) {
    const DotLinearInputs in = given.inputs();
    const std::int64_t users = given.users();
    require_shape(codes, {users, in.k, in.d}, "codes: expected shape [users, k, d]");
    require_shape(scales, {users, in.k}, "scales: expected shape [users, k]");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    compress_dot_linear(in, {nullptr, nullptr, codes.data(), scales.data()}, users, set, num_threads);
}

// Gradients [users, n, d] of x and of the weights in their order.
using WeightGradients = std::tuple<Output<float, 2>, Output<float, 2>, Output<float, 2>, Output<float, 1>,
                                   Output<float, 2>, Output<float, 1>, Output<float, 2>>;

void bound_compress_backward(const DotLinear& given, Array<float, 3> grad, Array<float, 2> hidden,
                             Output<float, 3> d_x, const WeightGradients& d_weights,
                             const std::string& instruction_set, int num_threads) {
    const DotLinearInputs in = given.inputs();
    const std::int64_t users = given.users();
    const auto& [linear, mix, hidden_weight, hidden_bias, output_weight, output_bias, gate] = d_weights;
    require_shape(grad, {users, in.k, in.d}, "grad: expected shape [users, k, d]");
    require_shape(hidden, {users, in.hidden}, "hidden: expected shape [users, hidden]");
    require_shape(d_x, {users, in.n, in.d}, "d_x: expected shape [users, n, d]");
    require_shape(linear, {in.k, in.n}, "gradient of linear: expected shape [k, n]");
    require_shape(mix, {in.n, in.r}, "gradient of mix: expected shape [n, r]");
    require_shape(hidden_weight, {in.n * in.r, in.hidden}, "gradient of hidden_weight: expected shape [n * r, hidden]");
    require_shape(hidden_bias, {in.hidden}, "gradient of hidden_bias: expected shape [hidden]");
    require_shape(output_weight, {in.hidden, in.k * in.d}, "gradient of output_weight: expected shape [hidden, k * d]");
    require_shape(output_bias, {in.k * in.d}, "gradient of output_bias: expected shape [k * d]");
    require_shape(gate, {in.k, in.d}, "gradient of gate: expected shape [k, d]");
    const InstructionSet set = chosen(instruction_set);
    const DotLinearGradients gradients{grad.data(),          hidden.data(),      d_x.data(),
                                       linear.data(),        mix.data(),         hidden_weight.data(),
                                       hidden_bias.data(),   output_weight.data(), output_bias.data(),
                                       gate.data()};
    const nb::gil_scoped_release release;
    compress_dot_linear_backward(in, gradients, users, set, num_threads);
}

}  // namespace

void bind_compression(nb::module_& m) {
    nb::class_<DotLinear>(m, "DotLinear", "x and the parameters of one dot-linear compression.")
        .def(nb::init<std::optional<Array<float, 3>>, std::optional<Array<std::uint16_t, 3>>, Array<float, 2>,
                      Array<float, 2>, Array<float, 2>, Vector<float>, Array<float, 2>, Vector<float>,
                      Array<float, 2>>(),
             exact("x").none(), exact("x_bfloat16").none(), exact("linear"), exact("mix"), exact("hidden_weight"),
             exact("hidden_bias"), exact("output_weight"), exact("output_bias"), exact("gate"));
    m.def("compress_dot_linear", &bound_compress, "given"_a, exact("embeddings"), exact("hidden"), "instruction_set"_a,
          "num_threads"_a);
    m.def("compress_dot_linear_backward", &bound_compress_backward, "given"_a, exact("grad"), exact("hidden"),
          exact("d_x"), exact("d_weights"), "instruction_set"_a, "num_threads"_a);
    m.def("compress_dot_linear_int8", &bound_compress_int8, "given"_a, exact("codes"), exact("scales"),
          "instruction_set"_a, "num_threads"_a);
}

}  // namespace alure
