// What the bindings of all operators share: array types, checks, the choice of an instruction set.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "element.h"
#include "instruction_set.h"

namespace alure {

namespace nb = nanobind;
using namespace nanobind::literals;

// NumPy arrays, C-contiguous: inputs, and outputs that are written in place.
template <class T, std::size_t kDims>
using Array = nb::ndarray<const T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T, std::size_t kDims>
using Output = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;
template <class T>
using Vector = Array<T, 1>;

// An array argument that is taken as it is: a converted copy of an output would be written and thrown away.
inline auto exact(const char* name) { return nb::arg(name).noconvert(); }

inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

// bfloat16 comes as its bits, uint16.
template <class Values>
Element element_of(const Values& values, const char* message) {
    if (values.dtype() == nb::dtype<float>()) return Element::kFloat32;
    if (values.dtype() == nb::dtype<std::uint16_t>()) return Element::kBfloat16;
    throw nb::type_error(message);
}

template <class OptionalArray>
auto or_null(OptionalArray& array) {
    return array ? array->data() : nullptr;
}

// The compiled instruction set of that name; throws where this machine does not run it.
inline InstructionSet chosen(const std::string& name) {
    for (const InstructionSet set : instruction_sets())
        if (name == name_of(set)) return set;
    if (name == name_of(InstructionSet::kEmulatedAmx)) return InstructionSet::kEmulatedAmx;
    throw std::invalid_argument("instruction_set: this machine does not run '" + name + "'");
}

// One for each operator, each in its own bindings_*.cpp.
void bind_candidates(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_encoding(nb::module_& m);
void bind_neighbors(nb::module_& m);
void bind_compression(nb::module_& m);
void bind_rowwise(nb::module_& m);
void bind_pagerank(nb::module_& m);

}  // namespace alure
