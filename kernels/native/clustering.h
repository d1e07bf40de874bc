// The nearest centroids of points, and the sums of clusters, on the CPU in float32: assignment and k-means.
#pragma once

#include <cstdint>
#include <vector>

#include "aligned.h"
#include "instruction_set.h"
#include "neighbors_kernels.h"

namespace alure {

struct AssignInputs {
    const float* x;          // [num_rows, d]
    const float* centroids;  // [num_centroids, d]
    std::int64_t num_rows, num_centroids, d;
    std::int64_t nprobe;
    Metric metric;
};

// scores and index [num_rows, nprobe]: inner products or squared distances of the nprobe best centroids, best first.
// Of one they are exact, of more those of one float32 matrix product.
void assign(const AssignInputs& in, float* scores, std::int64_t* index, InstructionSet set, int num_threads);

// Points that are assigned to ever new centroids: packed once, around a mean of theirs.
class ClusterPoints {
public:
    // x [num_rows, d] must outlive this.
    ClusterPoints(const float* x, std::int64_t num_rows, std::int64_t d, Metric metric, InstructionSet set,
                  int num_threads);

    // nearest [num_rows]: of the exact scores the best, of equal ones the first.
    void assign(const float* centroids, std::int64_t num_centroids, std::int64_t* nearest, int num_threads) const;

    // The same, faster, where `nearest` holds centroids that most rows are still near to. Returns false, and changes
    // nothing, where one of them is out of range.
    bool reassign(const float* centroids, std::int64_t num_centroids, std::int64_t* nearest, int num_threads) const;

    [[nodiscard]] std::int64_t num_rows() const { return num_rows_; }
    [[nodiscard]] std::int64_t d() const { return d_; }

private:
    const float* x_;
    std::int64_t num_rows_, d_;
    Metric metric_;
    const NeighborKernels& kernels_;
    const Filter& filter_;
    std::vector<float> center_;  // [d]
    AlignedBytes packed_;        // [num_rows padded, query_bytes]
    std::vector<float> scales_;  // [num_rows padded]
    std::vector<PackedQuery> terms_;
};

// A change of clusters: rows x [num_rows, d] leave those of `before`, unless it is null, and join those of `nearest`.
struct Moves {
    const float* x;
    const std::int64_t *before, *nearest;  // [num_rows]
    std::int64_t num_rows, d, num_clusters;
};

// Adds the rows to sums [num_clusters, d], and takes them away, in their order whatever the threads, in float64.
// Returns false, and changes nothing, where a cluster is out of range.
bool add_to_clusters(const Moves& moves, double* sums, InstructionSet set, int num_threads);

}  // namespace alure
