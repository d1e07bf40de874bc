// What the attention kernels read of the biases, made once a call: tables in units of log 2 with padding behind every
// head's row, and thresholds of times in 32 bits.
#pragma once

#include <vector>

#include "attention_kernels.h"

namespace alure {

class TableStorage {
public:
    explicit TableStorage(const AttentionInputs& in);
    [[nodiscard]] BiasTables tables() const;  // points into this

private:
    void find_cells(const BucketTable& time);

    std::vector<float> time_, position_;
    std::vector<std::int32_t> thresholds_, cells_;
    std::int64_t time_stride_ = 0, position_stride_ = 0, most_in_cell_ = 0;
};

}  // namespace alure
