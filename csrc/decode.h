// One block of the network for the newest position of a few texts, with packed 6-bit weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "passes.h"

namespace pgolf {

struct PackedWeights {
    const uint8_t* codes;  // rows of packed_row_bytes(columns, 6)
    const float* scale;    // (rows)
};

struct DecodeBlock {
    size_t batch, dim, heads, kv_heads, up_rows, hidden;
    size_t half;                 // half the number of channels that RoPE rotates
    size_t positions, position;  // of the caches; of the newest token
    PackedWeights attention;     // rows of q, k, v and the output projection
    PackedWeights up, down;
    const float *x_mix, *x0_mix, *attention_scale, *mlp_scale;  // (dim)
    const float *gain, *cos, *sin;                              // (heads), (positions, half), (positions, half)
    const float* value_embed;                                   // (batch, kv_heads * hd), or null
    float *keys, *values;                                       // (batch, kv_heads, positions, hd)
    float layer_scale;
    bool xsa;
    Activation activation;
};

// Advances x (batch, dim) by a block and writes the position's keys and values; x0 (batch, dim) is the block's second
// residual stream. The formulas are those of ops/reference.py. The results are the same for any number of threads.
void decode_block(const DecodeBlock& block, float* x, const float* x0, size_t threads, bool simd = true);

}  // namespace pgolf
