// The native CPU kernels as one Python module, alure.kernels._native. Only bindings: NumPy arrays in, NumPy arrays out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "instruction_set.h"
#include "join.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <class T>
std::span<const T> as_span(const Vector<T>& array) {
    return {array.data(), array.size()};
}

// A NumPy array that owns the vector.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> to_numpy(std::vector<T>&& values) {
    auto owned = std::make_unique<std::vector<T>>(std::move(values));
    T* data = owned->data();
    const std::size_t size = owned->size();
    nb::capsule owner(owned.release(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
    return {data, {size}, owner};
}

nb::tuple join_candidates(Vector<std::int64_t> neighbor_offsets, Vector<std::int32_t> neighbor_ids,
                          Vector<float> similarities, Vector<std::int64_t> engagement_offsets,
                          Vector<std::int32_t> items, Vector<float> weights, Vector<std::uint8_t> reasons,
                          std::optional<Vector<std::int64_t>> exclude_offsets,
                          std::optional<Vector<std::int32_t>> exclude_items, std::int64_t cap, std::int64_t num_items,
                          int num_threads) {
    const alure::NeighborLists neighbors{as_span(neighbor_offsets), as_span(neighbor_ids), as_span(similarities)};
    const alure::Engagements engagements{as_span(engagement_offsets), as_span(items), as_span(weights),
                                         as_span(reasons)};
    alure::Exclusions exclusions;
    if (exclude_offsets && exclude_items) exclusions = {as_span(*exclude_offsets), as_span(*exclude_items)};
    alure::Candidates out;
    {
        const nb::gil_scoped_release release;
        out = alure::join_candidates(neighbors, engagements, exclusions, {cap, num_items, num_threads});
    }
    return nb::make_tuple(to_numpy(std::move(out.offsets)), to_numpy(std::move(out.items)),
                          to_numpy(std::move(out.scores)), to_numpy(std::move(out.reasons)));
}

template <class T, std::size_t kDims>
using Array = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T, std::size_t kDims>
using Output = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

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

    [[nodiscard]] alure::BucketTable table(const std::optional<Vector<std::int64_t>>& thresholds,
                                           const std::optional<Array<float, 2>>& values) const {
        if (!thresholds || !values) return {nullptr, 0, nullptr};
        require(values->shape(0) == q.shape(1) && values->shape(1) == thresholds->size() + 1,
                "bias table: expected shape [heads, thresholds + 1]");
        return {thresholds->data(), static_cast<std::int64_t>(thresholds->size()), values->data()};
    }

    [[nodiscard]] alure::AttentionInputs inputs() const {
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

alure::InstructionSet chosen(const std::string& name) {
    for (const alure::InstructionSet set : alure::instruction_sets())
        if (name == alure::name_of(set)) return set;
    throw std::invalid_argument("instruction_set: this machine does not run '" + name + "'");
}

template <class Outputs>
float* or_null(std::optional<Outputs>& array) {
    return array ? array->data() : nullptr;
}

void attention_forward(const Attention& attention, Output<float, 3> out, Output<float, 2> lse,
                       const std::string& instruction_set, int num_threads) {
    const alure::AttentionInputs in = attention.inputs();
    const auto total_q = static_cast<std::int64_t>(attention.q.shape(0));
    require(out.size() == attention.q.size(), "out: expected the shape of q");
    require(lse.shape(0) == attention.q.shape(1) && lse.shape(1) == attention.q.shape(0),
            "lse: expected [heads, total_q]");
    const alure::InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    alure::attention_forward(in, {out.data(), lse.data(), total_q}, static_cast<std::int64_t>(attention.k.shape(0)),
                             set, num_threads);
}

// dq, d_q_cyclic and d_k_cyclic must hold zeros.
void attention_backward(const Attention& attention, Array<float, 3> grad_out, Array<float, 3> out, Array<float, 2> lse,
                        Output<float, 3> dq, Output<float, 3> dk, Output<float, 3> dv,
                        std::optional<Output<float, 2>> d_time_table, std::optional<Output<float, 2>> d_position_table,
                        std::optional<Output<float, 3>> d_q_cyclic, std::optional<Output<float, 2>> d_k_cyclic,
                        const std::string& instruction_set, int num_threads) {
    const alure::AttentionInputs in = attention.inputs();
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
    const alure::AttentionGradients gradients{
        grad_out.data(),    out.data(), lse.data(), static_cast<std::int64_t>(q.shape(0)),
        dq.data(),          dk.data(),  dv.data(),  or_null(d_q_cyclic),
        or_null(d_k_cyclic)};
    const alure::TableGradients tables{or_null(d_time_table), or_null(d_position_table)};
    const alure::InstructionSet set = chosen(instruction_set);
    const nb::gil_scoped_release release;
    alure::attention_backward(in, gradients, tables, static_cast<std::int64_t>(k.shape(0)), set, num_threads);
}

// An array argument that is taken as it is: a converted copy of an output would be written and thrown away.
auto exact(const char* name) { return nb::arg(name).noconvert(); }

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native CPU kernels of alure.";
    m.def("join_candidates", &join_candidates, exact("neighbor_offsets"), exact("neighbor_ids"), exact("similarities"),
          exact("engagement_offsets"), exact("items"), exact("weights"), exact("reasons"),
          exact("exclude_offsets").none(), exact("exclude_items").none(), "cap"_a, "num_items"_a, "num_threads"_a);

    m.def(
        "instruction_set", [] { return std::string(alure::name_of(alure::instruction_sets().front())); },
        "The instruction set the kernels use on this machine.");
    m.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const alure::InstructionSet set : alure::instruction_sets()) names.emplace_back(alure::name_of(set));
            return names;
        },
        "The compiled instruction sets this machine runs, best first.");

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
    m.def("attention_forward", &attention_forward, "attention"_a, exact("out"), exact("lse"), "instruction_set"_a,
          "num_threads"_a);
    m.def("attention_backward", &attention_backward, "attention"_a, exact("grad_out"), exact("out"), exact("lse"),
          exact("dq"), exact("dk"), exact("dv"), exact("d_time_table").none(), exact("d_position_table").none(),
          exact("d_q_cyclic").none(), exact("d_k_cyclic").none(), "instruction_set"_a, "num_threads"_a);
}
