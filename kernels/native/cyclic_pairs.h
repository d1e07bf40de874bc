// A float32 channel as three of bfloat16: x = high + low, and of the four products of two such sums the three largest.
//
// Of `count` channels a query has pairs (high, high) and then rests, low; a key pairs (high, low) and rests, high. They
// begin at an even channel, so that a pair is in one lane.
#pragma once

#include "simd.h"

namespace alure {
namespace {

class CyclicPairs {
public:
    CyclicPairs(std::int64_t head_dim, std::int64_t count)
        : count_(count), first_(count ? round_up(head_dim, 2) : head_dim) {}

    [[nodiscard]] std::int64_t first() const { return first_; }
    [[nodiscard]] std::int64_t end() const { return first_ + 3 * count_; }
    // Channel c is a pair and a rest. The gradient of a query's is Σ dS · key over the pair, that of a key's
    // Σ dS · query over the first of the pair and the rest.
    [[nodiscard]] std::int64_t pair(std::int64_t c) const { return first_ + 2 * c; }
    [[nodiscard]] std::int64_t rest(std::int64_t c) const { return first_ + 2 * count_ + c; }

    // Calls put(channel, value) for all of them.
    template <class Put>
    void of_query(const float* x, float factor, Put put) const {
        for (std::int64_t c = 0; c < count_; ++c) {
            const Split split(factor * x[c]);
            put(pair(c), split.high);
            put(pair(c) + 1, split.high);
            put(rest(c), split.low);
        }
    }
    template <class Put>
    void of_key(const float* x, Put put) const {
        for (std::int64_t c = 0; c < count_; ++c) {
            const Split split(x[c]);
            put(pair(c), split.high);
            put(pair(c) + 1, split.low);
            put(rest(c), split.high);
        }
    }

private:
    struct Split {
        explicit Split(float x) {
            store(&high, x);
            store(&low, x - to_float(high));
        }
        Bfloat16 high, low;
    };

    std::int64_t count_, first_;
};

}  // namespace
}  // namespace alure
