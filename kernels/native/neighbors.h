// Nearest neighbours on the CPU in float32: threads, lists, thresholds. The arithmetic is in neighbors_isa.cpp.
#pragma once

#include <cstdint>

#include "instruction_set.h"
#include "neighbors_kernels.h"

namespace alure {

struct SearchInputs {
    const float* queries;   // [num_queries, d]
    const float* database;  // [num_rows, d], rows of a list side by side
    std::int64_t num_queries, num_rows, d;
    const std::int64_t* list_offsets;  // [nlist + 1]
    std::int64_t nlist;
    const std::int64_t* probes;  // [num_queries, nprobe], −1 = none; a list named twice is searched once
    std::int64_t nprobe;
    const std::int64_t* rank;         // [num_rows], the order of equal scores
    const std::int64_t* exclude_row;  // [num_queries], a row not to return, or −1
    std::int64_t k;
    Metric metric;
};

// keys [num_queries, k]: the k best of every query, best first, as in kernels/neighbors/scores.py. They depend on that
// query and the database alone. Returns false where offsets, probes or ranks are out of range.
bool search(const SearchInputs& in, std::int64_t* keys, InstructionSet set, int num_threads);

}  // namespace alure
