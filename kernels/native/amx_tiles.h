// The eight tile registers of AMX, 16 rows of 64 bytes each, or their emulation in plain C++, with which tests run the
// kernels that use them on any machine.
#pragma once

#if defined(__AMX_TILE__) || defined(ALURE_EMULATED_AMX)
#define ALURE_TILES 1
#else
#define ALURE_TILES 0
#endif

#include "simd.h"

namespace alure {
namespace {

#if !defined(ALURE_EMULATED_AMX)

// The configuration is a thread's own: every thread loads it before its first tile and releases it after its last.
inline void begin_tiles() {
    struct alignas(64) {
        std::uint8_t palette, start_row, reserved[14];
        std::uint16_t bytes_a_row[16];
        std::uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes_a_row[tile] = 64;
        config.rows[tile] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
}
inline void end_tiles() { asm volatile("tilerelease" : : : "memory"); }

// By loads of one line of zeros: after tilezero, four products of zeroed sums wait.
alignas(64) inline constexpr float kZeroRow[16] = {};
template <int kTile>
inline void zero_tile() {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(kZeroRow), "r"(std::int64_t{0}), "i"(kTile) : "memory");
}
// The same where one sum at a time is zeroed: a load less.
template <int kTile>
inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Rows `stride` bytes apart.
template <int kTile>
inline void load_tile(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void store_tile(void* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(kTile) : "memory");
}
// c [16, 16] float32 += a [16, 32] · b [32, 16], bfloat16, where b's rows lie in pairs: [16 pairs, 16 columns, 2].
template <int kC, int kA, int kB>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}
// c [16, 16] int32 += a [16, 64] · b [64, 16], int8, where b's rows lie in fours: [16 fours, 16 columns, 4].
template <int kC, int kA, int kB>
inline void multiply_byte_tiles() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

#else

struct EmulatedTile {
    alignas(64) char rows[16][64];
};
inline thread_local EmulatedTile emulated_tiles[8];

inline void begin_tiles() {}
inline void end_tiles() {}

template <int kTile>
inline void zero_tile() {
    emulated_tiles[kTile] = {};
}
template <int kTile>
inline void clear_tile() {
    zero_tile<kTile>();
}
template <int kTile>
inline void load_tile(const void* p, std::int64_t stride) {
    for (int row = 0; row < 16; ++row)
        __builtin_memcpy(emulated_tiles[kTile].rows[row], static_cast<const char*>(p) + row * stride, 64);
}
template <int kTile>
inline void store_tile(void* p, std::int64_t stride) {
    for (int row = 0; row < 16; ++row)
        __builtin_memcpy(static_cast<char*>(p) + row * stride, emulated_tiles[kTile].rows[row], 64);
}
template <int kC, int kA, int kB>
inline void multiply_tiles() {
    float b[32][16];
    for (int k = 0; k < 32; ++k)
        for (int column = 0; column < 16; ++column) {
            Bfloat16 x;
            __builtin_memcpy(&x, emulated_tiles[kB].rows[k / 2] + (2 * column + k % 2) * 2, 2);
            b[k][column] = to_float(x);
        }
    for (int row = 0; row < 16; ++row) {
        float sums[16];
        __builtin_memcpy(sums, emulated_tiles[kC].rows[row], 64);
        for (int k = 0; k < 32; ++k) {
            Bfloat16 a;
            __builtin_memcpy(&a, emulated_tiles[kA].rows[row] + k * 2, 2);
            for (int column = 0; column < 16; ++column) sums[column] += to_float(a) * b[k][column];
        }
        __builtin_memcpy(emulated_tiles[kC].rows[row], sums, 64);
    }
}
template <int kC, int kA, int kB>
inline void multiply_byte_tiles() {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) {
            std::int32_t sum;
            char* c = emulated_tiles[kC].rows[row] + column * 4;
            __builtin_memcpy(&sum, c, 4);
            for (int k = 0; k < 64; ++k)
                sum += static_cast<signed char>(emulated_tiles[kA].rows[row][k]) *
                       static_cast<signed char>(emulated_tiles[kB].rows[k / 4][column * 4 + k % 4]);
            __builtin_memcpy(c, &sum, 4);
        }
}

#endif

}  // namespace
}  // namespace alure
