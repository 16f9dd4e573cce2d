// Products of a few rows with a matrix of packed 6-bit codes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bits.h"
#include "pool.h"

namespace pgolf {

// Multiplications that are worth another thread: 2^17 take 10 us on one core, and waking a thread of the pool 1 us.
constexpr size_t kSharedWork = size_t(1) << 17;

// y[m][n] = scale[n] * sum over k of x[m][k] * code[n][k], summed in float, for x (rows, depth), y (rows, columns) and
// packed codes (columns, depth). The results are the same for any number of threads.
void int6_matmul(const float* x, size_t rows, size_t depth, const uint8_t* packed, const float* scale, size_t columns,
                 float* y, BitsOptions options = {});

// The same for bfloat16 x and y, rounded once (nearest, ties to even).
void int6_matmul(const uint16_t* x, size_t rows, size_t depth, const uint8_t* packed, const float* scale,
                 size_t columns, uint16_t* y, BitsOptions options = {});

// Returns whether this processor runs the AVX2 form; it also needs FMA.
bool int6_simd();

}  // namespace pgolf
