// The sequential part of GPTQ, inside one block of columns. The rest is matrix products, left to BLAS.
//
// Matrices are stored column by column ("columns" x "rows"): the rows of a column are independent of each other, so
// they are contiguous, fill the lanes of SIMD registers, and are divided among threads.
// Frantar et al. 2022. pgolf_fast/quant/gptq.py has the rate-distortion formula in torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {

// Costs per class; code q is at index q + 128.
constexpr size_t kCostsPerClass = 256;

struct GptqBlock {
    size_t columns, rows;
    int clip_range;            // codes run from -clip_range to clip_range, which is 1..127
    const float* row_step;     // (rows,)
    const float* column_step;  // (columns,); an element's step is row_step * column_step
    const float* factor;       // (columns, columns), upper triangle: the block of the Cholesky factor of H^-1

    // Rate-distortion inputs; all null: nearest codes. Element (i, r) costs cost[row_class[r] + column_class[i]][q + 128].
    const float* cost;            // (classes, 256) bits
    const int32_t* row_class;     // (rows,)
    const int32_t* column_class;  // (columns,)
    const float* lam;             // (rows,) price of a bit
};

// Rounds the columns one after another, and after each updates the later columns to compensate for its errors.
// `work` (columns, rows) holds values and receives errors / factor[i, i]; `codes` (columns, rows) receives codes.
// Callers check classes and clip_range. Threads 0 means one per core.
void gptq_round_block(const GptqBlock& block, float* work, int8_t* codes, size_t threads);

}  // namespace pgolf
