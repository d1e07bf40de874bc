// alure.kernels._native.Encoding, encode_events and encode_events_backward.
#include <optional>

#include "bindings.h"
#include "encoding.h"

namespace alure {
namespace {

using Table = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The arguments that forward and backward share; Python checks what they mean, `inputs` that all shapes fit together.
struct Encoding {
    Array<std::int64_t, 2> ids;
    Table table;
    Vector<std::int64_t> offsets, timestamps, reference_times;
    std::optional<Vector<std::int64_t>> counts;
    std::optional<Array<float, 2>> dense;
    std::optional<Vector<std::int64_t>> utc_offsets;
    Array<float, 3> id_weight;
    Array<float, 2> time_weight;
    Vector<float> bias;
    Table position_table, frequency_table;
    Vector<std::int64_t> periods;
    Vector<float> phases;
    double tau;
    std::optional<Array<float, 2>> dense_weight;

    [[nodiscard]] EncodingInputs inputs() const {
        const std::size_t total = ids.shape(0), width = bias.size();
        require(timestamps.size() == total && (!counts || counts->size() == total) &&
                    (!utc_offsets || utc_offsets->size() == total) && (!dense || dense->shape(0) == total),
                "timestamps, counts, utc_offsets, dense: expected one row an event");
        require(offsets.size() == reference_times.size() + 1, "offsets: expected [batch + 1]");
        require(id_weight.shape(0) == ids.shape(1) && id_weight.shape(1) == table.shape(1) &&
                    id_weight.shape(2) == width,
                "id_weight: expected [attributes, d_e, width]");
        require(dense.has_value() == dense_weight.has_value() &&
                    (!dense || (dense_weight->shape(0) == dense->shape(1) && dense_weight->shape(1) == width)),
                "dense_weight: expected [d_dense, width]");
        require(phases.size() == periods.size() && time_weight.shape(0) == 2 + 2 * periods.size() &&
                    time_weight.shape(1) == width,
                "time_weight, phases: expected [2 + 2P, width] and [P]");
        require(position_table.shape(0) > 0 && position_table.shape(1) == width && frequency_table.shape(0) > 0 &&
                    frequency_table.shape(1) == width,
                "position_table, frequency_table: expected at least a row of the width");
        require(position_table.dtype() == table.dtype() && frequency_table.dtype() == table.dtype(),
                "position_table, frequency_table: expected the table's type");
        const auto size = [](std::size_t n) { return static_cast<std::int64_t>(n); };
        return {
            .total = size(total),
            .num_sequences = size(reference_times.size()),
            .attributes = size(ids.shape(1)),
            .num_rows = size(table.shape(0)),
            .d_e = size(table.shape(1)),
            .d_dense = dense ? size(dense->shape(1)) : 0,
            .width = size(width),
            .num_periods = size(periods.size()),
            .num_positions = size(position_table.shape(0)),
            .num_frequencies = size(frequency_table.shape(0)),
            .ids = ids.data(),
            .offsets = offsets.data(),
            .timestamps = timestamps.data(),
            .reference_times = reference_times.data(),
            .counts = or_null(counts),
            .utc_offsets = or_null(utc_offsets),
            .dense = or_null(dense),
            .element = element_of(table, "table: expected float32, or bfloat16 as uint16"),
            .table = table.data(),
            .id_weight = id_weight.data(),
            .dense_weight = or_null(dense_weight),
            .time_weight = time_weight.data(),
            .bias = bias.data(),
            .position_table = position_table.data(),
            .frequency_table = frequency_table.data(),
            .periods = periods.data(),
            .phases = phases.data(),
            .tau = tau,
        };
    }
};

bool bound_forward(const Encoding& encoding, nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> out,
                   const std::string& instruction_set, int num_threads) {
    const EncodingInputs in = encoding.inputs();
    require(out.shape(0) == encoding.ids.shape(0) && out.shape(1) == encoding.bias.size() &&
                out.dtype() == encoding.table.dtype(),
            "out: expected [total, width] in the table's type");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    return encode_events(in, out.data(), set, num_threads);
}

// The table's, the position table's and the frequency table's gradients must hold zeros.
bool bound_backward(const Encoding& encoding, Array<float, 2> grad_out, Output<float, 2> d_table,
                    std::optional<Output<float, 2>> d_dense, Output<float, 3> d_id_weight,
                    std::optional<Output<float, 2>> d_dense_weight, Output<float, 2> d_time_weight,
                    Output<float, 1> d_bias, Output<float, 2> d_position, Output<float, 2> d_frequency,
                    Output<float, 1> d_phases, const std::string& instruction_set, int num_threads) {
    const EncodingInputs in = encoding.inputs();
    require(grad_out.shape(0) == encoding.ids.shape(0) && grad_out.shape(1) == encoding.bias.size(),
            "grad_out: expected [total, width]");
    require(d_table.size() == encoding.table.size() && d_id_weight.size() == encoding.id_weight.size() &&
                d_time_weight.size() == encoding.time_weight.size() && d_bias.size() == encoding.bias.size() &&
                d_position.size() == encoding.position_table.size() &&
                d_frequency.size() == encoding.frequency_table.size() && d_phases.size() == encoding.phases.size() &&
                (!d_dense || (encoding.dense && d_dense->size() == encoding.dense->size())) &&
                (d_dense_weight ? d_dense_weight->size() : 0) ==
                    (encoding.dense_weight ? encoding.dense_weight->size() : 0),
            "gradients: expected the shapes of their arguments");
    const EncodingGradients gradients{
        grad_out.data(),      d_table.data(), or_null(d_dense),  d_id_weight.data(), or_null(d_dense_weight),
        d_time_weight.data(), d_bias.data(),  d_position.data(), d_frequency.data(), d_phases.data()};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    return encode_events_backward(in, gradients, set, num_threads);
}

}  // namespace

void bind_encoding(nb::module_& m) {
    using Floats = std::optional<Array<float, 2>>;
    using Integers = std::optional<Vector<std::int64_t>>;
    nb::class_<Encoding>(m, "Encoding", "The arguments of one encoding, in the order of kernels/encoding/ops.py.")
        .def(nb::init<Array<std::int64_t, 2>, Table, Vector<std::int64_t>, Vector<std::int64_t>,
                      Vector<std::int64_t>, Integers, Floats, Integers, Array<float, 3>, Array<float, 2>,
                      Vector<float>, Table, Table, Vector<std::int64_t>, Vector<float>, double, Floats>(),
             exact("ids"), exact("table"), exact("offsets"), exact("timestamps"), exact("reference_times"),
             exact("counts").none(), exact("dense").none(), exact("utc_offsets").none(), exact("id_weight"),
             exact("time_weight"), exact("bias"), exact("position_table"), exact("frequency_table"),
             exact("periods"), exact("phases"), "tau"_a, exact("dense_weight").none());
    m.def("encode_events", &bound_forward, "encoding"_a, exact("out"), "instruction_set"_a, "num_threads"_a,
          "Fills `out`; False where a value is out of range.");
    m.def("encode_events_backward", &bound_backward, "encoding"_a, exact("grad_out"), exact("d_table"),
          exact("d_dense").none(), exact("d_id_weight"), exact("d_dense_weight").none(), exact("d_time_weight"),
          exact("d_bias"), exact("d_position"), exact("d_frequency"), exact("d_phases"), "instruction_set"_a,
          "num_threads"_a, "Fills the gradients; False where a value is out of range.");
}

}  // namespace alure
