// The planes of one packed row, shared by bits.cpp and bits_avx2.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pgolf {

// Pointers into the planes of one row at a column that is a multiple of 8. Byte is uint8_t or const uint8_t.
template <int bits, class Byte>
struct Planes {
    static_assert(bits == 6, "8-bit codes are not packed");
    Byte *low, *two;

    Planes(Byte* row, size_t columns) : low(row), two(row + (columns + 7) / 8 * 4) {}

    void skip(size_t columns) {
        low += columns / 2;
        two += columns / 4;
    }
};

inline float rounded(float value, const float*) { return value; }

// Rounds to bfloat16: nearest, ties to even.
inline uint16_t rounded(float value, const uint16_t*) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    const uint32_t near = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    return uint16_t((word & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : near);  // rounding could turn a NaN into zero
}

// A plain loop that compilers vectorize, inlined so that it is compiled for its caller's target.
template <class Value>
__attribute__((always_inline)) inline void scale_codes(const int8_t* codes, size_t count, float scale, Value* values) {
    for (size_t i = 0; i < count; i++) values[i] = rounded(float(codes[i]) * scale, values);
}

// The AVX2 path. Callers check has_avx2() first; outside x86-64 it is false and the rest is never called.
#if defined(__x86_64__)
#define PGOLF_AVX2 __attribute__((target("avx2")))
#else
#define PGOLF_AVX2
#endif

bool has_avx2();

// Packs whole blocks of 32 codes; returns the number of codes packed, and clears `good` when one is out of range.
// Planes are passed by value: behind a reference, compilers must assume that a stored byte changes its pointers.
template <int bits>
PGOLF_AVX2 size_t pack_blocks_avx2(const int8_t* codes, size_t count, Planes<bits, uint8_t> planes, bool& good);

template <int bits>
PGOLF_AVX2 size_t unpack_blocks_avx2(Planes<bits, const uint8_t> planes, size_t count, int8_t* codes);

PGOLF_AVX2 void scale_codes_avx2(const int8_t* codes, size_t count, float scale, float* values);
PGOLF_AVX2 void scale_codes_avx2(const int8_t* codes, size_t count, float scale, uint16_t* values);

}  // namespace pgolf
