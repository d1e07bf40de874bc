// alure.kernels._native.Attention, attention_forward and attention_backward.
#include <optional>

#include "attention.h"
#include "bindings.h"

namespace alure {
namespace {

// The arguments that forward and backward share; Python checks what they mean, `inputs` that all shapes fit together.
struct Attention {
    Array<float, 3> q, k, v;
    Vector<std::int64_t> q_offsets, k_offsets;
    std::optional<Vector<std::int64_t>> q_times, k_times, time_thresholds;
    std::optional<Array<float, 2>> time_table;
    std::optional<Vector<std::int64_t>> position_thresholds;
    std::optional<Array<float, 2>> position_table;
    std::optional<Array<float, 3>> q_cyclic;
    std::optional<Array<float, 2>> k_cyclic;
    bool causal;
    std::int64_t window_left, window_right;
    float scale;

    [[nodiscard]] BucketTable table(const std::optional<Vector<std::int64_t>>& thresholds,
                                           const std::optional<Array<float, 2>>& values) const {
        if (!thresholds || !values) return {nullptr, 0, nullptr};
        require(values->shape(0) == q.shape(1) && values->shape(1) == thresholds->size() + 1,
                "bias table: expected shape [heads, thresholds + 1]");
        return {thresholds->data(), static_cast<std::int64_t>(thresholds->size()), values->data()};
    }

    [[nodiscard]] AttentionInputs inputs() const {
        require(k.shape(1) == q.shape(1) && k.shape(2) == q.shape(2) && v.shape(0) == k.shape(0) &&
                    v.shape(1) == k.shape(1) && v.shape(2) == k.shape(2),
                "q, k, v: expected the same heads and head_dim, and v of the shape of k");
        require(q_offsets.size() >= 1 && q_offsets.size() == k_offsets.size(),
                "q_offsets, k_offsets: expected one length, [batch + 1]");
        const bool has_times = time_thresholds && time_table;
        require(!has_times || (q_times && k_times && q_times->size() == q.shape(0) && k_times->size() == k.shape(0)),
                "q_timestamps, k_timestamps: expected one time a row with a time table");
        require(q_cyclic.has_value() == k_cyclic.has_value(), "q_cyclic, k_cyclic: expected both or neither");
        const std::int64_t num_cyclic = k_cyclic ? static_cast<std::int64_t>(k_cyclic->shape(1)) : 0;
        require(!k_cyclic || (q_cyclic->shape(0) == q.shape(0) && q_cyclic->shape(1) == q.shape(1) &&
                              q_cyclic->shape(2) == k_cyclic->shape(1) && k_cyclic->shape(0) == k.shape(0)),
                "q_cyclic, k_cyclic: expected shapes [total_q, heads, C] and [total_k, C]");
        return {q.data(),
                k.data(),
                v.data(),
                static_cast<std::int64_t>(q.shape(1)),
                static_cast<std::int64_t>(q.shape(2)),
                static_cast<std::int64_t>(q_offsets.size()) - 1,
                q_offsets.data(),
                k_offsets.data(),
                has_times ? q_times->data() : nullptr,
                has_times ? k_times->data() : nullptr,
                table(time_thresholds, time_table),
                table(position_thresholds, position_table),
                q_cyclic ? q_cyclic->data() : nullptr,
                k_cyclic ? k_cyclic->data() : nullptr,
                num_cyclic,
                causal,
                window_left,
                window_right,
                scale};
    }
};

void bound_forward(const Attention& attention, Output<float, 3> out, Output<float, 2> lse,
                       const std::string& instruction_set, int num_threads) {
    const AttentionInputs in = attention.inputs();
    const auto total_q = static_cast<std::int64_t>(attention.q.shape(0));
    require(out.size() == attention.q.size(), "out: expected the shape of q");
    require(lse.shape(0) == attention.q.shape(1) && lse.shape(1) == attention.q.shape(0),
            "lse: expected [heads, total_q]");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    alure::attention_forward(in, {out.data(), lse.data(), total_q}, static_cast<std::int64_t>(attention.k.shape(0)),
                             set, num_threads);
}

// dq, d_q_cyclic and d_k_cyclic must hold zeros.
void bound_backward(const Attention& attention, Array<float, 3> grad_out, Array<float, 3> out, Array<float, 2> lse,
                        Output<float, 3> dq, Output<float, 3> dk, Output<float, 3> dv,
                        std::optional<Output<float, 2>> d_time_table, std::optional<Output<float, 2>> d_position_table,
                        std::optional<Output<float, 3>> d_q_cyclic, std::optional<Output<float, 2>> d_k_cyclic,
                        const std::string& instruction_set, int num_threads) {
    const AttentionInputs in = attention.inputs();
    const auto& q = attention.q;
    const auto& k = attention.k;
    require(grad_out.size() == q.size() && out.size() == q.size() && dq.size() == q.size(),
            "grad_out, out, dq: expected the shape of q");
    require(dk.size() == k.size() && dv.size() == k.size(), "dk, dv: expected the shape of k");
    require(lse.shape(0) == q.shape(1) && lse.shape(1) == q.shape(0), "lse: expected [heads, total_q]");
    require((d_time_table ? d_time_table->size() : 0) == (in.time.table ? attention.time_table->size() : 0) &&
                (d_position_table ? d_position_table->size() : 0) ==
                    (in.position.table ? attention.position_table->size() : 0),
            "d_time_table, d_position_table: expected the shapes of the tables");
    require(!attention.k_cyclic || (d_q_cyclic && d_k_cyclic && d_q_cyclic->size() == attention.q_cyclic->size() &&
                                    d_k_cyclic->size() == attention.k_cyclic->size()),
            "d_q_cyclic, d_k_cyclic: expected the shapes of the channels");
    const AttentionGradients gradients{
        grad_out.data(),    out.data(), lse.data(), static_cast<std::int64_t>(q.shape(0)),
        dq.data(),          dk.data(),  dv.data(),  or_null(d_q_cyclic),
        or_null(d_k_cyclic)};
    const TableGradients tables{or_null(d_time_table), or_null(d_position_table)};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    alure::attention_backward(in, gradients, tables, static_cast<std::int64_t>(k.shape(0)), set, num_threads);
}

}  // namespace

void bind_attention(nb::module_& m) {
    nb::class_<Attention>(m, "Attention", "The arguments of one attention, in the order of kernels/attention/ops.py.")
        .def(nb::init<Array<float, 3>, Array<float, 3>, Array<float, 3>, Vector<std::int64_t>, Vector<std::int64_t>,
                      std::optional<Vector<std::int64_t>>, std::optional<Vector<std::int64_t>>,
                      std::optional<Vector<std::int64_t>>, std::optional<Array<float, 2>>,
                      std::optional<Vector<std::int64_t>>, std::optional<Array<float, 2>>,
                      std::optional<Array<float, 3>>, std::optional<Array<float, 2>>, bool, std::int64_t, std::int64_t,
                      float>(),
             exact("q"), exact("k"), exact("v"), exact("q_offsets"), exact("k_offsets"), exact("q_timestamps").none(),
             exact("k_timestamps").none(), exact("time_thresholds").none(), exact("time_table").none(),
             exact("position_thresholds").none(), exact("position_table").none(), exact("q_cyclic").none(),
             exact("k_cyclic").none(), "causal"_a, "window_left"_a, "window_right"_a, "scale"_a);
    m.def("attention_forward", &bound_forward, "attention"_a, exact("out"), exact("lse"), "instruction_set"_a,
          "num_threads"_a);
    m.def("attention_backward", &bound_backward, "attention"_a, exact("grad_out"), exact("out"), exact("lse"),
          exact("dq"), exact("dk"), exact("dv"), exact("d_time_table").none(), exact("d_position_table").none(),
          exact("d_q_cyclic").none(), exact("d_k_cyclic").none(), "instruction_set"_a, "num_threads"_a);
}

}  // namespace alure
