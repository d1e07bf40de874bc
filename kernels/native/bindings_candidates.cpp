// alure.kernels._native.join_candidates.
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "bindings.h"
#include "join.h"

namespace alure {
namespace {

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

template <class T>
std::span<const T> as_span(const std::optional<Vector<T>>& array) {
    return array ? as_span(*array) : std::span<const T>();
}

nb::tuple bound_join(Vector<std::int64_t> neighbor_offsets, Vector<std::int32_t> neighbor_ids,
                     Vector<float> similarities, Vector<std::int64_t> engagement_offsets, Vector<std::int32_t> items,
                     Vector<float> weights, Vector<std::uint8_t> reasons,
                     std::optional<Vector<std::int64_t>> exclude_offsets,
                     std::optional<Vector<std::int32_t>> exclude_items, std::optional<Vector<bool>> eligible,
                     std::optional<Vector<std::int32_t>> groups, std::int64_t group_cap, std::int64_t cap,
                     std::int64_t num_items, int num_threads) {
    const NeighborLists neighbors{as_span(neighbor_offsets), as_span(neighbor_ids), as_span(similarities)};
    const Engagements engagements{as_span(engagement_offsets), as_span(items), as_span(weights), as_span(reasons)};
    const ItemRules rules{as_span(exclude_offsets), as_span(exclude_items), as_span(eligible), as_span(groups),
                          group_cap};
    Candidates out;
    {
        const nb::gil_scoped_release release;
        out = join_candidates(neighbors, engagements, rules, {cap, num_items, num_threads});
    }
    return nb::make_tuple(to_numpy(std::move(out.offsets)), to_numpy(std::move(out.items)),
                          to_numpy(std::move(out.scores)), to_numpy(std::move(out.reasons)));
}

}  // namespace

void bind_candidates(nb::module_& m) {
    m.def("join_candidates", &bound_join, exact("neighbor_offsets"), exact("neighbor_ids"), exact("similarities"),
          exact("engagement_offsets"), exact("items"), exact("weights"), exact("reasons"),
          exact("exclude_offsets").none(), exact("exclude_items").none(), exact("eligible").none(),
          exact("groups").none(), "group_cap"_a, "cap"_a, "num_items"_a, "num_threads"_a);
}

}  // namespace alure
