// Uninitialised memory aligned to a cache line, freed at the end of the scope.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace alure {

class AlignedBytes {
public:
    explicit AlignedBytes(std::size_t size) : p_(::operator new(size, kAlignment)) {}
    [[nodiscard]] void* get() const { return p_.get(); }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Delete {
        void operator()(void* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<void, Delete> p_;
};

}  // namespace alure
