#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "parallel.h"

namespace alure {
namespace {

// Work counts pairs of a query and a key over all heads, about a nanosecond each. Sequences of less are worked on in
// groups, so that handing out a unit costs nothing beside its work.
constexpr std::int64_t kSmallWork = 1 << 17;
constexpr std::int64_t kGroupWork = 1 << 19;

const AttentionKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    if (set == InstructionSet::kAvx512) return avx512::attention_kernels;
    if (set == InstructionSet::kAvx2) return avx2::attention_kernels;
#endif
    return portable::attention_kernels;
}

void check_offsets(const std::int64_t* offsets, std::int64_t num_sequences, std::int64_t total, const char* name) {
    bool sound = offsets[0] == 0 && offsets[num_sequences] == total;
    for (std::int64_t i = 0; i < num_sequences; ++i) sound = sound && offsets[i] <= offsets[i + 1];
    if (!sound)
        throw std::invalid_argument(std::string(name) + ": expected offsets that begin at 0, never decrease and end at " +
                                    std::to_string(total));
}

// A thread's scratch: one allocation, aligned to a cache line, reused for every unit.
class Scratch {
public:
    explicit Scratch(std::size_t bytes) : p_(::operator new(bytes, kAlignment)) {}
    [[nodiscard]] void* get() const { return p_.get(); }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(void* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<void, Delete> p_;
};

// Work of one thread at a time: a part of one sequence, or sequences [part.sequence, last_sequence) whole, all heads.
struct Unit {
    Part part;
    std::int64_t last_sequence;
    [[nodiscard]] bool is_group() const { return last_sequence > part.sequence; }
};

struct Lengths {
    std::int64_t queries, keys;
};

Lengths lengths_of(const AttentionInputs& in, std::int64_t s) {
    return {in.q_offsets[s + 1] - in.q_offsets[s], in.k_offsets[s + 1] - in.k_offsets[s]};
}

// Units in an order that depends on the batch alone: large sequences first, largest first, each cut by `cut`; then groups
// of small ones.
template <class Cut>
std::vector<Unit> units_of(const AttentionInputs& in, Cut cut) {
    std::vector<std::int64_t> large;
    std::vector<Unit> groups;
    std::int64_t begin = 0, work = 0;
    const auto close = [&](std::int64_t end) {
        if (end > begin) groups.push_back({{begin, 0, 0, 0}, end});
        work = 0;
    };
    for (std::int64_t s = 0; s < in.num_sequences; ++s) {
        const auto [queries, keys] = lengths_of(in, s);
        const std::int64_t own = in.heads * (queries * keys + 32 * (queries + keys)) + 64;
        if (own >= kSmallWork) {
            close(s);
            begin = s + 1;
            large.push_back(s);
        } else if ((work += own) >= kGroupWork) {
            close(s + 1);
            begin = s + 1;
        }
    }
    close(in.num_sequences);
    std::stable_sort(large.begin(), large.end(), [&](std::int64_t a, std::int64_t b) {
        const Lengths x = lengths_of(in, a), y = lengths_of(in, b);
        return x.queries * x.keys > y.queries * y.keys;
    });
    std::vector<Unit> units;
    for (const std::int64_t s : large) cut(s, units);
    units.insert(units.end(), groups.begin(), groups.end());
    return units;
}

// Cuts `length` rows into parts of at most `most` rows and calls visit(part) for every part and head, parts outermost.
template <class Visit>
void for_each_part(std::int64_t sequence, std::int64_t length, std::int64_t most, std::int64_t heads, Visit visit) {
    for (std::int64_t begin = 0; begin < length; begin += most)
        for (std::int64_t head = 0; head < heads; ++head)
            visit(Part{sequence, head, begin, std::min(length, begin + most)});
}

// How many units have added to each tile of queries of one (sequence, head). A unit waits only for units that were
// handed out before it, so waiting ends.
using Counters = std::unique_ptr<std::atomic<std::int64_t>[]>;

void wait_for_turn(void* counters, std::int64_t tile, std::int64_t turn) {
    auto& counter = static_cast<std::atomic<std::int64_t>*>(counters)[tile];
    while (counter.load(std::memory_order_acquire) != turn) std::this_thread::yield();
}

void pass_turn(void* counters, std::int64_t tile, std::int64_t turn) {
    static_cast<std::atomic<std::int64_t>*>(counters)[tile].store(turn + 1, std::memory_order_release);
}

// float64 sums by bucket, one set a unit (a group has one for each head), added up in the order of the units.
class BucketSums {
public:
    BucketSums(const AttentionInputs& in, const std::vector<Unit>& units, bool with_time, bool with_position)
        : time_(with_time ? in.time.num_thresholds + 1 : 0), position_(with_position ? in.position.num_thresholds + 1 : 0) {
        starts_.reserve(units.size());
        std::int64_t sets = 0;
        for (const Unit& unit : units) {
            starts_.push_back(sets);
            sets += unit.is_group() ? in.heads : 1;
        }
        values_.assign(sets * (time_ + position_), 0.0);
    }

    double* time(std::int64_t unit, std::int64_t set) { return time_ ? at(unit, set) : nullptr; }
    double* position(std::int64_t unit, std::int64_t set) { return position_ ? at(unit, set) + time_ : nullptr; }

    void write(const std::vector<Unit>& units, std::int64_t heads, float* d_time, float* d_position) {
        std::vector<double> totals(heads * (time_ + position_), 0.0);
        for (std::size_t u = 0; u < units.size(); ++u) {
            const std::int64_t first = units[u].is_group() ? 0 : units[u].part.head;
            const std::int64_t sets = units[u].is_group() ? heads : 1;
            const double* sums = at(static_cast<std::int64_t>(u), 0);
            double* out = totals.data() + first * (time_ + position_);
            for (std::int64_t i = 0; i < sets * (time_ + position_); ++i) out[i] += sums[i];
        }
        for (std::int64_t head = 0; head < heads; ++head) {
            const double* sums = totals.data() + head * (time_ + position_);
            for (std::int64_t b = 0; b < time_; ++b) d_time[head * time_ + b] = static_cast<float>(sums[b]);
            for (std::int64_t b = 0; b < position_; ++b) d_position[head * position_ + b] = static_cast<float>(sums[time_ + b]);
        }
    }

private:
    double* at(std::int64_t unit, std::int64_t set) { return values_.data() + (starts_[unit] + set) * (time_ + position_); }
    std::int64_t time_, position_;  // buckets
    std::vector<std::int64_t> starts_;
    std::vector<double> values_;
};

}  // namespace

void attention_forward(const AttentionInputs& in, const AttentionOutputs& outputs, std::int64_t total_k,
                       InstructionSet set, int num_threads) {
    check_offsets(in.q_offsets, in.num_sequences, outputs.total_q, "q_offsets");
    check_offsets(in.k_offsets, in.num_sequences, total_k, "k_offsets");
    const AttentionKernels& kernels = kernels_of(set);
    const std::size_t scratch_bytes = kernels.scratch_bytes(in);
    const auto parts = [&](std::int64_t s, auto visit) {
        for_each_part(s, lengths_of(in, s).queries, kernels.query_tile, in.heads, visit);
    };
    const std::vector<Unit> units = units_of(in, [&](std::int64_t s, std::vector<Unit>& out) {
        parts(s, [&](const Part& part) { out.push_back({part, 0}); });
    });
    parallel_for(static_cast<std::int64_t>(units.size()), num_threads, [=] { return Scratch(scratch_bytes); },
                 [&](const Scratch& scratch, std::int64_t u) {
        const auto run = [&](const Part& part) { kernels.forward(in, outputs, part, scratch.get()); };
        if (!units[u].is_group()) return run(units[u].part);
        for (std::int64_t s = units[u].part.sequence; s < units[u].last_sequence; ++s) parts(s, run);
    });
}

void attention_backward(const AttentionInputs& in, const AttentionGradients& gradients, const TableGradients& tables,
                        std::int64_t total_k, InstructionSet set, int num_threads) {
    check_offsets(in.q_offsets, in.num_sequences, gradients.total_q, "q_offsets");
    check_offsets(in.k_offsets, in.num_sequences, total_k, "k_offsets");
    const AttentionKernels& kernels = kernels_of(set);
    const std::size_t scratch_bytes = kernels.scratch_bytes(in);
    const auto parts = [&](std::int64_t s, auto visit) {
        for_each_part(s, lengths_of(in, s).keys, kernels.key_block, in.heads, visit);
    };
    std::vector<Counters> all_counters;
    std::vector<void*> counters;  // of each unit; null where it is alone with its rows of dq
    const std::vector<Unit> units = units_of(in, [&](std::int64_t s, std::vector<Unit>& out) {
        const auto [queries, keys] = lengths_of(in, s);
        const std::size_t first = all_counters.size();
        const std::int64_t tiles = (queries + kernels.backward_tile - 1) / kernels.backward_tile;
        for (std::int64_t head = 0; head < in.heads && keys > kernels.key_block; ++head)
            all_counters.push_back(std::make_unique<std::atomic<std::int64_t>[]>(tiles));
        parts(s, [&](const Part& part) {
            out.push_back({part, 0});
            counters.push_back(keys > kernels.key_block ? all_counters[first + part.head].get() : nullptr);
        });
    });
    counters.resize(units.size(), nullptr);
    BucketSums sums(in, units, tables.d_time != nullptr, tables.d_position != nullptr);
    parallel_for(static_cast<std::int64_t>(units.size()), num_threads, [=] { return Scratch(scratch_bytes); },
                 [&](const Scratch& scratch, std::int64_t u) {
        const Turn turn{wait_for_turn, pass_turn, counters[u]};
        const auto run = [&](const Part& part) {
            const std::int64_t sums_of = units[u].is_group() ? part.head : 0;
            kernels.backward(in, gradients, part, turn, sums.time(u, sums_of), sums.position(u, sums_of), scratch.get());
        };
        if (!units[u].is_group()) return run(units[u].part);
        for (std::int64_t s = units[u].part.sequence; s < units[u].last_sequence; ++s) parts(s, run);
    });

    sums.write(units, in.heads, tables.d_time, tables.d_position);
    if (tables.d_k_cyclic == nullptr) return;
    for (std::int64_t row = 0; row < total_k; ++row)
        for (std::int64_t c = 0; c < in.num_cyclic; ++c) {
            float sum = 0.0f;
            for (std::int64_t head = 0; head < in.heads; ++head)
                sum += gradients.d_k_cyclic[(row * in.heads + head) * in.num_cyclic + c];
            tables.d_k_cyclic[row * in.num_cyclic + c] = sum;
        }
}

}  // namespace alure
