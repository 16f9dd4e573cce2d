// GPTQ inside one block of columns: what is sequential in it. The rest is matrix products, which BLAS does better.
//
// Matrices lie column after column ("columns" x "rows"): the rows of a column, which do not influence each other, are
// neighbours in memory, so that they are the lanes of SIMD registers and are shared out among threads.
// Frantar et al. 2022; the rate-distortion choice is pgolf_fast/quant/gptq.py's, where the formula stands in torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pgolf {

// Codes have 256 costs, code q at index q + 128.
constexpr size_t kCostsPerClass = 256;

struct GptqBlock {
    size_t columns, rows;
    int clip_range;            // codes run from -clip_range to clip_range, which is 1..127
    const float* row_step;     // (rows,)
    const float* column_step;  // (columns,); an element's step is row_step * column_step
    const float* factor;       // (columns, columns), upper triangle: the block's part of the factor of H^-1

    // Rate and distortion; all null: nearest codes. Element (i, r) pays cost[row_class[r] + column_class[i]][q + 128].
    const float* cost;            // (classes, 256) bits
    const int32_t* row_class;     // (rows,)
    const int32_t* column_class;  // (columns,)
    const float* lam;             // (rows,) price of a bit
};

// Rounds the columns one after another, and after each lets the others of the block make up for its errors.
// `work` (columns, rows) holds values and receives errors / factor[i, i]; `codes` (columns, rows) receives codes.
// Classes and clip_range are the caller's to check. Threads: 0 for as many as the machine has cores.
void gptq_round_block(const GptqBlock& block, float* work, int8_t* codes, size_t threads);

}  // namespace pgolf
