// alure.kernels._native.rms_norm, swiglu and their backward passes.
#include "bindings.h"
#include "rowwise.h"

namespace alure {
namespace {

// Matrices of one type, packed; bfloat16 comes as its bits, uint16.
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutputMatrix = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

template <class Other>
void require_alike(const Other& matrix, const Matrix& x, std::size_t columns, const char* message) {
    require(matrix.shape(0) == x.shape(0) && matrix.shape(1) == columns && matrix.dtype() == x.dtype(), message);
}

RmsNormInputs norm_inputs(const Matrix& x, const Vector<float>& weight, float epsilon) {
    require(weight.size() == x.shape(1), "weight: expected [columns]");
    const Element element = element_of(x, "x: expected float32, or bfloat16 as uint16");
    return {element, size(x.shape(0)), size(x.shape(1)), x.data(), weight.data(), epsilon};
}

void bound_rms_norm(const Matrix& x, const Vector<float>& weight, float epsilon, const OutputMatrix& out,
                    const std::string& instruction_set, int num_threads) {
    const RmsNormInputs in = norm_inputs(x, weight, epsilon);
    require_alike(out, x, x.shape(1), "out: expected the shape and type of x");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    rms_norm(in, out.data(), set, num_threads);
}

void bound_rms_norm_backward(const Matrix& grad, const Matrix& x, const Vector<float>& weight, float epsilon,
                             const OutputMatrix& d_x, const Output<float, 1>& d_weight,
                             const std::string& instruction_set, int num_threads) {
    const RmsNormInputs in = norm_inputs(x, weight, epsilon);
    require_alike(grad, x, x.shape(1), "grad: expected the shape and type of x");
    require_alike(d_x, x, x.shape(1), "d_x: expected the shape and type of x");
    require(d_weight.size() == weight.size(), "d_weight: expected [columns]");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    rms_norm_backward(in, grad.data(), d_x.data(), d_weight.data(), set, num_threads);
}

SwigluInputs gate_inputs(const Matrix& gate_up) {
    require(gate_up.shape(1) % 2 == 0, "gate_up: expected an even number of columns");
    const Element element = element_of(gate_up, "gate_up: expected float32, or bfloat16 as uint16");
    return {element, size(gate_up.shape(0)), size(gate_up.shape(1) / 2), gate_up.data()};
}

void bound_swiglu(const Matrix& gate_up, const OutputMatrix& out, const std::string& instruction_set,
                  int num_threads) {
    const SwigluInputs in = gate_inputs(gate_up);
    require_alike(out, gate_up, gate_up.shape(1) / 2, "out: expected half the columns of gate_up, in its type");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    swiglu(in, out.data(), set, num_threads);
}

void bound_swiglu_backward(const Matrix& grad, const Matrix& gate_up, const OutputMatrix& d_gate_up,
                           const std::string& instruction_set, int num_threads) {
    const SwigluInputs in = gate_inputs(gate_up);
    require_alike(grad, gate_up, gate_up.shape(1) / 2, "grad: expected half the columns of gate_up, in its type");
    require_alike(d_gate_up, gate_up, gate_up.shape(1), "d_gate_up: expected the shape and type of gate_up");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    swiglu_backward(in, grad.data(), d_gate_up.data(), set, num_threads);
}

}  // namespace

void bind_rowwise(nb::module_& m) {
    m.def("rms_norm", &bound_rms_norm, exact("x"), exact("weight"), "epsilon"_a, exact("out"), "instruction_set"_a,
          "num_threads"_a, "Fills `out`.");
    m.def("rms_norm_backward", &bound_rms_norm_backward, exact("grad"), exact("x"), exact("weight"), "epsilon"_a,
          exact("d_x"), exact("d_weight"), "instruction_set"_a, "num_threads"_a, "Fills the gradients.");
    m.def("swiglu", &bound_swiglu, exact("gate_up"), exact("out"), "instruction_set"_a, "num_threads"_a,
          "Fills `out`.");
    m.def("swiglu_backward", &bound_swiglu_backward, exact("grad"), exact("gate_up"), exact("d_gate_up"),
          "instruction_set"_a, "num_threads"_a, "Fills the gradient.");
}

}  // namespace alure
