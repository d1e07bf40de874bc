// The native CPU kernels as one Python module, alure.kernels._native: NumPy arrays in, NumPy arrays out.
#include <vector>

#include "bindings.h"

NB_MODULE(_native, m) {
    using namespace alure;
    m.doc() = "Native CPU kernels of alure.";
    m.def(
        "instruction_set", [] { return std::string(name_of(instruction_sets().front())); },
        "The instruction set the kernels use on this machine.");
    m.def(
        "instruction_sets",
        [] {
            std::vector<std::string> names;
            for (const InstructionSet set : instruction_sets()) names.emplace_back(name_of(set));
            return names;
        },
        "The compiled instruction sets this machine runs, best first.");
    bind_candidates(m);
    bind_attention(m);
    bind_encoding(m);
    bind_neighbors(m);
    bind_compression(m);
    bind_rowwise(m);
    bind_pagerank(m);
}
