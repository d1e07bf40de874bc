// OpenMP loops out of which exceptions reach the caller (one that leaves a parallel region ends the process).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

namespace alure {

// Calls body(context, i) for every i in [0, count), with one context made by make_context() a thread.
// The order of the calls is not fixed: each must write its own part of the result only.
template <class MakeContext, class Body>
void parallel_for(std::int64_t count, int num_threads, MakeContext make_context, Body body) {
    const int threads = static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(num_threads, 1)));
    std::exception_ptr error;
    std::mutex error_mutex;
    std::atomic<bool> failed{false};
    const auto note_error = [&] {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        failed = true;
    };
    std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        try {
            auto context = make_context();
            for (std::int64_t i; !failed && (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
                body(context, i);
        } catch (...) {
            note_error();
        }
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace alure
