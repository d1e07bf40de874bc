// What the search and the clustering share: lists packed for products, and how exact a packed product is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "aligned.h"
#include "instruction_set.h"
#include "neighbors_kernels.h"
#include "parallel.h"

namespace alure {

inline const NeighborKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
#if defined(ALURE_HAS_AMX)
    if (set == InstructionSet::kAmx) return amx::neighbor_kernels;
#endif
    const InstructionSet vectors = vectors_of(set);
    if (vectors == InstructionSet::kAvx512 && __builtin_cpu_supports("avx512vnni"))
        return avx512_vnni::neighbor_kernels;
    if (vectors == InstructionSet::kAvx512 || vectors == InstructionSet::kAvx2) return avx2::neighbor_kernels;
#endif
    if (set == InstructionSet::kEmulatedAmx) return emulated_amx::neighbor_kernels;
    return portable::neighbor_kernels;
}

inline std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

inline double squared_norm(const float* x, std::int64_t d) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < d; ++i) sum += double{x[i]} * x[i];
    return sum;
}

// Kernels halve squared distances.
inline float factor(Metric metric) { return metric == Metric::kInnerProduct ? 1.0f : 2.0f; }

inline auto exact_score(const NeighborKernels& kernels, Metric metric) {
    return metric == Metric::kInnerProduct ? kernels.inner_product : kernels.negated_distance;
}

// Rows of lists as panels; every list begins with a panel of its own. `center` [d] is the origin of all lists, where it
// is given; otherwise each has its mean.
class PackedLists {
public:
    PackedLists(const Filter& filter, const float* x, std::int64_t d, std::span<const std::int64_t> offsets,
                Metric metric, int num_threads, const float* center = nullptr)
        : filter_(filter),
          d_(d),
          metric_(metric),
          begins_(offsets.size()),
          norms_(offsets.size() - 1),
          center_norms_(offsets.size() - 1),
          bounds_(offsets.size() - 1) {
        const std::int64_t nlist = static_cast<std::int64_t>(bounds_.size());
        for (std::int64_t list = 0; list < nlist; ++list)
            begins_[list + 1] = begins_[list] + round_up(offsets[list + 1] - offsets[list], filter.panel_rows);
        centers_ = std::make_unique_for_overwrite<float[]>(nlist * d);
        panels_.emplace(begins_.back() * filter.row_bytes(d));
        bias_ = std::make_unique_for_overwrite<float[]>(begins_.back());
        scale_ = std::make_unique_for_overwrite<float[]>(begins_.back());
        zero_ = std::make_unique_for_overwrite<std::int32_t[]>(begins_.back());
        parallel_for(nlist, num_threads, [&] { return std::vector<double>(d); },
            [&](std::vector<double>& mean, std::int64_t list) {
                const std::int64_t rows = offsets[list + 1] - offsets[list];
                const float* first = x + offsets[list] * d;
                std::fill(mean.begin(), mean.end(), 0.0);
                double largest = 0.0;
                for (std::int64_t i = 0; i < rows; ++i) {
                    largest = std::max(largest, squared_norm(first + i * d, d));
                    for (std::int64_t c = 0; c < d; ++c) mean[c] += double{first[i * d + c]};
                }
                const double share = 1.0 / static_cast<double>(std::max<std::int64_t>(rows, 1));
                for (std::int64_t c = 0; c < d; ++c)
                    centers_[list * d + c] = center ? center[c] : static_cast<float>(mean[c] * share);
                norms_[list] = static_cast<float>(std::sqrt(largest));
                center_norms_[list] = static_cast<float>(std::sqrt(squared_norm(centers_.get() + list * d, d)));
                bounds_[list] = filter.pack_rows(first, rows, d, metric, this->rows(list, 0));
            });
    }

    [[nodiscard]] PackedRows rows(std::int64_t list, std::int64_t first) const {
        const std::int64_t at = begins_[list] + first;
        return {centers_.get() + list * d_, static_cast<char*>(panels_->get()) + at * filter_.row_bytes(d_),
                bias_.get() + at, scale_.get() + at, zero_.get() + at};
    }
    [[nodiscard]] std::int64_t columns(std::int64_t list) const { return begins_[list + 1] - begins_[list]; }

    // How far exact scores of a list's rows may be from factor(metric) · (kernel's score + shift).
    [[nodiscard]] float margin(std::int64_t list, const PackedQuery& q) const {
        // Twice the bound d·2⁻²⁴·|q||x| on a float32 product's rounding, and some for the roundings around it.
        const float roundings = static_cast<float>(d_ + 16), center = center_norms_[list], norm = norms_[list];
        const float reach = q.norm + center + norm;
        const float exactly = roundings * 0x1p-23f * reach *
                              (metric_ == Metric::kInnerProduct ? std::max(norm, center) : reach);
        const float vanished = roundings * 0x1p-126f;  // denormals, also where they are flushed to zero
        return exactly + factor(metric_) * (1.0001f * (q.norm * bounds_[list].residual +
                                                       q.residual * bounds_[list].norm) + vanished);
    }

private:
    const Filter& filter_;
    std::int64_t d_;
    Metric metric_;
    std::vector<std::int64_t> begins_;  // columns
    std::optional<AlignedBytes> panels_;
    std::unique_ptr<float[]> centers_, bias_, scale_;
    std::unique_ptr<std::int32_t[]> zero_;
    std::vector<float> norms_;  // the largest of each list
    std::vector<float> center_norms_;
    std::vector<RowsBound> bounds_;
};

}  // namespace alure
