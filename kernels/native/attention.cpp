#include "attention.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "aligned.h"
#include "bias_tables.h"
#include "parallel.h"

namespace alure {
namespace {

// Work counts pairs of a query and a key over all heads, about a nanosecond each. Sequences of less are worked on in
// groups, so that handing out a unit costs nothing beside its work.
constexpr std::int64_t kSmallWork = 1 << 17;
constexpr std::int64_t kGroupWork = 1 << 19;

const AttentionKernels& kernels_of(InstructionSet set) {
#if defined(__x86_64__)
    set = vectors_of(set);
    if (set == InstructionSet::kAvx512) return avx512::attention_kernels;
    if (set == InstructionSet::kAvx2) return avx2::attention_kernels;
#endif
    return portable::attention_kernels;
}

const ForwardKernel& forward_kernel_of(InstructionSet set, Element element) {
    const AttentionKernels& kernels = kernels_of(set);
    if (element == Element::kFloat32) return kernels.forward_float32;
    if (set == InstructionSet::kEmulatedAmx) return emulated_amx::forward_bfloat16;
#if defined(ALURE_HAS_AMX)
    if (set == InstructionSet::kAmx) return amx::forward_bfloat16;
#endif
#if defined(ALURE_HAS_AVX512_BF16)
    if (set == InstructionSet::kAvx512Bf16) return avx512_bf16::forward_bfloat16;
#endif
    return kernels.forward_bfloat16;
}

const BackwardKernel& backward_kernel_of(InstructionSet set, Element element) {
    const AttentionKernels& kernels = kernels_of(set);
    if (element == Element::kFloat32) return kernels.backward_float32;
    if (set == InstructionSet::kEmulatedAmx) return emulated_amx::backward_bfloat16;
#if defined(ALURE_HAS_AMX)
    if (set == InstructionSet::kAmx) return amx::backward_bfloat16;
#endif
#if defined(ALURE_HAS_AVX512_BF16)
    if (set == InstructionSet::kAvx512Bf16) return avx512_bf16::backward_bfloat16;
#endif
    return kernels.backward_bfloat16;
}

void check_offsets(const std::int64_t* offsets, std::int64_t num_sequences, std::int64_t total, const char* name) {
    bool sound = offsets[0] == 0 && offsets[num_sequences] == total;
    for (std::int64_t i = 0; i < num_sequences; ++i) sound = sound && offsets[i] <= offsets[i + 1];
    if (!sound)
        throw std::invalid_argument(std::string(name) +
                                    ": expected offsets that begin at 0, never decrease and end at " +
                                    std::to_string(total));
}

void check(const AttentionInputs& in) {
    check_offsets(in.q_offsets, in.num_sequences, in.total_q, "q_offsets");
    check_offsets(in.k_offsets, in.num_sequences, in.total_k, "k_offsets");
    for (std::int64_t s = 0; in.groups && s < in.num_sequences; ++s)
        if (in.groups[s] < 0 || in.groups[s] >= in.num_groups)
            throw std::invalid_argument("groups: expected 0 to " + std::to_string(in.num_groups - 1) + ", got " +
                                        std::to_string(in.groups[s]));
}

// Work of one thread at a time: a part of one sequence, or sequences [part.sequence, group_end) whole.
struct Unit {
    Part part;
    std::int64_t group_end;  // 0: not a group
    void* counters = nullptr;
};

struct Lengths {
    std::int64_t queries, keys;
};

Lengths lengths_of(const AttentionInputs& in, std::int64_t s) {
    return {in.q_offsets[s + 1] - in.q_offsets[s], in.k_offsets[s + 1] - in.k_offsets[s]};
}

// Units in an order that depends on the batch alone: large sequences first, largest first, each cut by `cut`; then
// groups of small ones.
template <class Cut>
std::vector<Unit> units_of(const AttentionInputs& in, Cut cut) {
    std::vector<std::int64_t> large;
    std::vector<Unit> groups;
    std::int64_t begin = 0, work = 0;
    const auto close = [&](std::int64_t end) {
        if (end > begin) groups.push_back({{begin, 0, 0}, end});
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

// Cuts `length` rows of a sequence into parts of at most `most` rows.
template <class Visit>
void for_each_part(std::int64_t sequence, std::int64_t length, std::int64_t most, Visit visit) {
    for (std::int64_t begin = 0; begin < length; begin += most)
        visit(Part{sequence, begin, std::min(length, begin + most)});
}

// How many units have added to each block of keys and key head of one sequence. A unit waits only for units that were
// handed out before it, so waiting ends.
using Counters = std::unique_ptr<std::atomic<std::int64_t>[]>;

void wait_for_turn(void* counters, std::int64_t place, std::int64_t turn) {
    auto& counter = static_cast<std::atomic<std::int64_t>*>(counters)[place];
    while (counter.load(std::memory_order_acquire) != turn) std::this_thread::yield();
}

void pass_turn(void* counters, std::int64_t place, std::int64_t turn) {
    static_cast<std::atomic<std::int64_t>*>(counters)[place].store(turn + 1, std::memory_order_release);
}

// float64 sums by bucket [groups, heads, buckets], one set a unit, added up in the order of the units.
class BucketSums {
public:
    BucketSums(const AttentionInputs& in, const BucketTable& table, std::size_t num_units)
        : group_size_(table.table ? in.heads * (table.num_thresholds + 1) : 0),
          size_(group_size_ * in.num_groups),
          sums_(size_ * num_units, 0.0) {}

    double* of(std::int64_t unit, std::int64_t group) { return sums_.data() + unit * size_ + group * group_size_; }

    void write(float* total) const {
        for (std::int64_t i = 0; i < size_; ++i) {
            double sum = 0.0;
            for (std::size_t u = i; u < sums_.size(); u += size_) sum += sums_[u];
            total[i] = static_cast<float>(sum);
        }
    }

private:
    std::int64_t group_size_, size_;
    std::vector<double> sums_;
};

// What a thread holds while it works.
template <class Kernel>
class Worker {
public:
    Worker(const Kernel& kernel, std::size_t scratch_bytes) : scratch_(scratch_bytes), kernel_(kernel) {
        kernel_.begin_thread();
    }
    ~Worker() { kernel_.end_thread(); }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;
    [[nodiscard]] void* get() const { return scratch_.get(); }

private:
    AlignedBytes scratch_;
    const Kernel& kernel_;
};

// Runs the parts of every unit: work(part, unit index, scratch); begin() makes a thread's scratch.
template <class Begin, class Parts, class Work>
void run_units(const std::vector<Unit>& units, int num_threads, Begin begin, Parts parts, Work work) {
    parallel_for(static_cast<std::int64_t>(units.size()), num_threads, begin, [&](const auto& scratch, std::int64_t u) {
        const auto run = [&](const Part& part) { work(part, u, scratch.get()); };
        if (units[u].group_end == 0) return run(units[u].part);
        for (std::int64_t s = units[u].part.sequence; s < units[u].group_end; ++s) parts(s, run);
    });
}

}  // namespace

void attention_forward(const AttentionInputs& in, const ForwardOutputs& outputs, InstructionSet set, int num_threads) {
    check(in);
    const ForwardKernel& kernel = forward_kernel_of(set, in.element);
    const auto parts = [&](std::int64_t s, auto visit) {
        for_each_part(s, lengths_of(in, s).queries, kernel.queries, visit);
    };
    const std::vector<Unit> units = units_of(in, [&](std::int64_t s, std::vector<Unit>& out) {
        parts(s, [&](const Part& part) { out.push_back({part, 0}); });
    });
    const TableStorage storage(in);
    const BiasTables tables = storage.tables();
    const std::size_t scratch_bytes = kernel.scratch_bytes(in);
    const auto begin = [&] { return Worker(kernel, scratch_bytes); };
    run_units(units, num_threads, begin, parts,
              [&](const Part& part, std::int64_t, void* scratch) { kernel.run(in, tables, outputs, part, scratch); });
}

void attention_backward(const AttentionInputs& in, const BackwardArguments& arguments,
                        const TableGradients& table_gradients, InstructionSet set, int num_threads) {
    check(in);
    const BackwardKernel& kernel = backward_kernel_of(set, in.element);
    const auto parts = [&](std::int64_t s, auto visit) {
        const std::int64_t queries = lengths_of(in, s).queries;
        if (queries == 0) return visit(Part{s, 0, 0});  // the gradients of its keys are zeros
        for_each_part(s, queries, kernel.queries, visit);
    };
    std::vector<Counters> counters;
    const std::vector<Unit> units = units_of(in, [&](std::int64_t s, std::vector<Unit>& out) {
        const auto [queries, keys] = lengths_of(in, s);
        void* own = nullptr;
        if (queries > kernel.queries) {
            const std::int64_t blocks = (keys + kernel.keys - 1) / kernel.keys;
            counters.push_back(std::make_unique<std::atomic<std::int64_t>[]>(blocks * in.key_heads));
            own = counters.back().get();
        }
        parts(s, [&](const Part& part) { out.push_back({part, 0, own}); });
    });
    const TableStorage storage(in);
    const BiasTables tables = storage.tables();
    BucketSums d_time(in, in.time, units.size()), d_position(in, in.position, units.size());
    const std::size_t scratch_bytes = kernel.scratch_bytes(in);
    const auto begin = [&] { return Worker(kernel, scratch_bytes); };
    run_units(units, num_threads, begin, parts, [&](const Part& part, std::int64_t u, void* scratch) {
        const Turn turn{wait_for_turn, pass_turn, units[u].counters};
        const std::int64_t group = in.groups ? in.groups[part.sequence] : 0;
        kernel.run(in, tables, arguments, part, turn, d_time.of(u, group), d_position.of(u, group), scratch);
    });
    d_time.write(table_gradients.d_time);
    d_position.write(table_gradients.d_position);
}

}  // namespace alure
