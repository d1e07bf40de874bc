// The native CPU kernels as one Python module, alure.kernels._native. Only bindings: NumPy arrays in, NumPy arrays out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>

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
    const alure::Engagements engagements{as_span(engagement_offsets), as_span(items), as_span(weights), as_span(reasons)};
    alure::Exclusions exclusions;
    if (exclude_offsets && exclude_items) exclusions = {as_span(*exclude_offsets), as_span(*exclude_items)};
    alure::Candidates out;
    {
        const nb::gil_scoped_release release;
        out = alure::join_candidates(neighbors, engagements, exclusions, {cap, num_items, num_threads});
    }
    return nb::make_tuple(to_numpy(std::move(out.offsets)), to_numpy(std::move(out.items)), to_numpy(std::move(out.scores)),
                          to_numpy(std::move(out.reasons)));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Native CPU kernels of alure.";
    m.def("join_candidates", &join_candidates, "neighbor_offsets"_a, "neighbor_ids"_a, "similarities"_a,
          "engagement_offsets"_a, "items"_a, "weights"_a, "reasons"_a, "exclude_offsets"_a.none(), "exclude_items"_a.none(),
          "cap"_a, "num_items"_a, "num_threads"_a);
}
