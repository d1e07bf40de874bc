// A thread's working memory: one allocation, cut into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alure {
namespace {

// Cuts one allocation into arrays aligned to 64 bytes; with a null base it measures.
class Arena {
public:
    explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* array(std::int64_t count) {
        char* p = base_ ? base_ + used_ : nullptr;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return reinterpret_cast<T*>(p);
    }
    [[nodiscard]] std::size_t used() const { return used_; }

private:
    char* base_;
    std::size_t used_ = 0;
};

}  // namespace
}  // namespace alure
