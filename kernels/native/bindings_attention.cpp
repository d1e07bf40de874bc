// alure.kernels._native.Attention, attention_forward and attention_backward.
#include <optional>

#include "attention.h"
#include "bindings.h"

namespace alure {
namespace {

// [rows, heads, head_dim] of any strides whose channels are neighbours; bfloat16 comes as its bits, uint16.
using Values = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
constexpr const char* kTypes = "q, k, v: expected float32, or bfloat16 as uint16";

Rows rows_of(const Values& values) {
    require(values.size() == 0 || values.shape(2) == 1 || values.stride(2) == 1,
            "q, k, v: expected channels that are neighbours in memory");
    return {values.data(), values.stride(0), values.stride(1)};
}

std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(n); }

// The arguments that forward and backward share; Python checks what they mean, `inputs` that all shapes fit together.
struct Attention {
    Values q, k, v;
    Vector<std::int64_t> q_offsets, k_offsets;
    std::optional<Vector<std::int64_t>> q_times, k_times;
    std::optional<Array<std::int64_t, 2>> rules;
    std::optional<Vector<std::int64_t>> groups, time_thresholds;
    std::optional<Array<float, 3>> time_table;
    std::optional<Vector<std::int64_t>> position_thresholds;
    std::optional<Array<float, 3>> position_table;
    std::optional<Array<float, 3>> q_cyclic;
    std::optional<Array<float, 2>> k_cyclic;
    float scale;

    [[nodiscard]] BucketTable table(const std::optional<Vector<std::int64_t>>& thresholds,
                                    const std::optional<Array<float, 3>>& values, std::int64_t num_groups) const {
        if (!thresholds || !values) return {nullptr, 0, nullptr};
        require(size(values->shape(0)) == num_groups && values->shape(1) == q.shape(1) &&
                    values->shape(2) == thresholds->size() + 1,
                "bias table: expected shape [groups, heads, thresholds + 1]");
        return {thresholds->data(), size(thresholds->size()), values->data()};
    }

    [[nodiscard]] AttentionInputs inputs() const {
        require(k.shape(1) >= 1 && q.shape(1) % k.shape(1) == 0 && k.shape(2) == q.shape(2) &&
                    v.shape(0) == k.shape(0) && v.shape(1) == k.shape(1) && v.shape(2) == k.shape(2),
                "q, k, v: expected one head_dim, heads of q a multiple of those of k, and v of the shape of k");
        const Element element = element_of(q, kTypes);
        require(element_of(k, kTypes) == element && element_of(v, kTypes) == element, "q, k, v: expected one type");
        require(q_offsets.size() >= 1 && q_offsets.size() == k_offsets.size(),
                "q_offsets, k_offsets: expected one length, [batch + 1]");
        const std::size_t batch = q_offsets.size() - 1;
        require(!rules || (rules->shape(0) == batch && rules->shape(1) == 4), "rules: expected shape [batch, 4]");
        require(!groups || groups->size() == batch, "groups: expected shape [batch]");
        const bool has_times = time_thresholds && time_table;
        require(!has_times || (q_times && k_times && q_times->size() == q.shape(0) && k_times->size() == k.shape(0)),
                "q_timestamps, k_timestamps: expected one time a row with a time table");
        require(q_cyclic.has_value() == k_cyclic.has_value(), "q_cyclic, k_cyclic: expected both or neither");
        require(!k_cyclic || (q_cyclic->shape(0) == q.shape(0) && q_cyclic->shape(1) == q.shape(1) &&
                              q_cyclic->shape(2) == k_cyclic->shape(1) && k_cyclic->shape(0) == k.shape(0)),
                "q_cyclic, k_cyclic: expected shapes [total_q, heads, C] and [total_k, C]");
        AttentionInputs in{};
        in.element = element;
        in.q = rows_of(q);
        in.k = rows_of(k);
        in.v = rows_of(v);
        in.heads = size(q.shape(1));
        in.key_heads = size(k.shape(1));
        in.head_dim = size(q.shape(2));
        in.total_q = size(q.shape(0));
        in.total_k = size(k.shape(0));
        in.num_sequences = size(batch);
        in.q_offsets = q_offsets.data();
        in.k_offsets = k_offsets.data();
        in.q_times = has_times ? q_times->data() : nullptr;
        in.k_times = has_times ? k_times->data() : nullptr;
        static_assert(sizeof(Rules) == 4 * sizeof(std::int64_t));
        in.rules = rules ? reinterpret_cast<const Rules*>(rules->data()) : nullptr;
        in.groups = or_null(groups);
        in.num_groups = time_table ? size(time_table->shape(0)) : position_table ? size(position_table->shape(0)) : 1;
        if (!time_table && !position_table) in.groups = nullptr;  // nothing to choose
        in.time = table(time_thresholds, time_table, in.num_groups);
        in.position = table(position_thresholds, position_table, in.num_groups);
        in.num_cyclic = k_cyclic ? size(k_cyclic->shape(1)) : 0;
        in.q_cyclic = or_null(q_cyclic);
        in.k_cyclic = or_null(k_cyclic);
        in.scale = scale;
        return in;
    }
};

void bound_forward(const Attention& attention, nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu> out,
                   Output<float, 2> lse, const std::string& instruction_set, int num_threads) {
    const AttentionInputs in = attention.inputs();
    require(out.size() == attention.q.size() && out.dtype() == attention.q.dtype(),
            "out: expected the shape and type of q");
    require(size(lse.shape(0)) == in.heads && size(lse.shape(1)) == in.total_q, "lse: expected [heads, total_q]");
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    attention_forward(in, {out.data(), lse.data()}, set, num_threads);
}

using Gradient = nb::ndarray<nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // of q, k or v

template <class Other>
bool alike(const Other& a, const Values& b) {
    return a.shape(0) == b.shape(0) && a.shape(1) == b.shape(1) && a.shape(2) == b.shape(2) && a.dtype() == b.dtype();
}

// d_k_cyclic must hold zeros. dk_sums and dv_sums may be dk and dv, if they are float32.
void bound_backward(const Attention& attention, const Values& grad_out, const Values& out, Array<float, 2> grad_lse,
                    Array<float, 2> lse, Gradient dq, Gradient dk, Gradient dv, Output<float, 3> dk_sums,
                    Output<float, 3> dv_sums, std::optional<Output<float, 3>> d_time_table,
                    std::optional<Output<float, 3>> d_position_table, std::optional<Output<float, 3>> d_q_cyclic,
                    std::optional<Output<float, 2>> d_k_cyclic, const std::string& instruction_set, int num_threads) {
    const AttentionInputs in = attention.inputs();
    const auto& q = attention.q;
    const auto& k = attention.k;
    require(alike(grad_out, q) && alike(out, q) && alike(dq, q), "grad_out, out, dq: expected the shape and type of q");
    require(alike(dk, k) && alike(dv, k) && dk_sums.size() == k.size() && dv_sums.size() == k.size(),
            "dk, dv, dk_sums, dv_sums: expected the shape of k, and the type but for the sums");
    for (const auto* x : {&grad_lse, &lse})
        require(size(x->shape(0)) == in.heads && size(x->shape(1)) == in.total_q,
                "grad_lse, lse: expected [heads, total_q]");
    require((d_time_table ? d_time_table->size() : 0) == (in.time.table ? attention.time_table->size() : 0) &&
                (d_position_table ? d_position_table->size() : 0) ==
                    (in.position.table ? attention.position_table->size() : 0),
            "d_time_table, d_position_table: expected the shapes of the tables");
    require(!attention.k_cyclic || (d_q_cyclic && d_k_cyclic && d_q_cyclic->size() == attention.q_cyclic->size() &&
                                    d_k_cyclic->size() == attention.k_cyclic->size()),
            "d_q_cyclic, d_k_cyclic: expected the shapes of the channels");
    const BackwardArguments arguments{rows_of(grad_out), rows_of(out),        grad_lse.data(),    lse.data(),
                                      dq.data(),         dk.data(),           dv.data(),          dk_sums.data(),
                                      dv_sums.data(),    or_null(d_q_cyclic), or_null(d_k_cyclic)};
    const TableGradients tables{or_null(d_time_table), or_null(d_position_table)};
    const InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    attention_backward(in, arguments, tables, set, num_threads);
}

}  // namespace

void bind_attention(nb::module_& m) {
    nb::class_<Attention>(m, "Attention", "The arguments of one attention, as kernels/attention/arguments.py has them.")
        .def(nb::init<Values, Values, Values, Vector<std::int64_t>, Vector<std::int64_t>,
                      std::optional<Vector<std::int64_t>>, std::optional<Vector<std::int64_t>>,
                      std::optional<Array<std::int64_t, 2>>, std::optional<Vector<std::int64_t>>,
                      std::optional<Vector<std::int64_t>>, std::optional<Array<float, 3>>,
                      std::optional<Vector<std::int64_t>>, std::optional<Array<float, 3>>,
                      std::optional<Array<float, 3>>, std::optional<Array<float, 2>>, float>(),
             exact("q"), exact("k"), exact("v"), exact("q_offsets"), exact("k_offsets"), exact("q_timestamps").none(),
             exact("k_timestamps").none(), exact("rules").none(), exact("groups").none(),
             exact("time_thresholds").none(), exact("time_table").none(), exact("position_thresholds").none(),
             exact("position_table").none(), exact("q_cyclic").none(), exact("k_cyclic").none(), "scale"_a);
    m.def("attention_forward", &bound_forward, "attention"_a, exact("out"), exact("lse"), "instruction_set"_a,
          "num_threads"_a);
    m.def("attention_backward", &bound_backward, "attention"_a, exact("grad_out"), exact("out"), exact("grad_lse"),
          exact("lse"), exact("dq"), exact("dk"), exact("dv"), exact("dk_sums"), exact("dv_sums"),
          exact("d_time_table").none(), exact("d_position_table").none(), exact("d_q_cyclic").none(),
          exact("d_k_cyclic").none(), "instruction_set"_a, "num_threads"_a);
}

}  // namespace alure
