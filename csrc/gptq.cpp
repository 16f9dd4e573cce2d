#include "gptq.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

// Compiles a function for several instruction sets; the loader picks the best one for the machine.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define PGOLF_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PGOLF_CLONES
#endif

namespace pgolf {
namespace {

// Rows of a tile: 128 of its columns are 16 KiB, half of an L1 cache.
constexpr size_t kLanes = 32;

// Rows that are processed together, copied so that the rows of a column are contiguous. Lanes past the last row hold
// zeros.
struct Tile {
    explicit Tile(size_t columns) : work(columns * kLanes), codes(columns * kLanes) {}
    std::vector<float> work;
    std::vector<int8_t> codes;
    float step[kLanes], lam[kLanes];
    int32_t row_class[kLanes];
};

// Rounds to the nearest integer, ties to even, for |x| < 2^22: the sum has no bits left for a fraction. Unlike
// std::nearbyint, it is vectorized for every instruction set.
inline float nearest(float x) {
    constexpr float no_fraction = 12582912.0f;  // 1.5 * 2^23
    return (x + no_fraction) - no_fraction;
}

inline float clamped(float x, float limit) {
    x = x > -limit ? x : -limit;  // NaN becomes -limit, too
    return x < limit ? x : limit;
}

PGOLF_CLONES void round_tile(const GptqBlock& block, Tile& tile) {
    const float limit = float(block.clip_range);
    float step[kLanes], code[kLanes], error[kLanes];
    for (size_t i = 0; i < block.columns; i++) {
        float* value = &tile.work[i * kLanes];
        const float* factor = block.factor + i * block.columns;
        const float column_step = block.column_step[i], own = factor[i];
        for (size_t r = 0; r < kLanes; r++) {
            step[r] = tile.step[r] * column_step;
            code[r] = nearest(clamped(value[r] / step[r], limit));
        }
        if (block.cost) {
            const float* costs = block.cost + size_t(block.column_class[i]) * kCostsPerClass + kCostsPerClass / 2;
            const float own_square = own * own;
            for (size_t r = 0; r < kLanes; r++) {
                const int32_t row = tile.row_class[r] * int32_t(kCostsPerClass);
                const float inner = code[r] - (code[r] > 0 ? 1.0f : code[r] < 0 ? -1.0f : 0.0f);
                const auto price = [&](float q) {
                    const float off = value[r] - q * step[r];
                    return off * off / own_square + tile.lam[r] * costs[row + int32_t(q)];
                };
                float best = code[r], least = price(best);
                const float inner_price = price(inner), zero_price = price(0.0f);
                best = inner_price < least ? inner : best;
                least = inner_price < least ? inner_price : least;
                code[r] = zero_price < least ? 0.0f : best;
            }
        }
        for (size_t r = 0; r < kLanes; r++) {
            error[r] = (value[r] - code[r] * step[r]) / own;
            value[r] = error[r];
            tile.codes[i * kLanes + r] = int8_t(code[r]);
        }
        for (size_t j = i + 1; j < block.columns; j++) {
            float* later = &tile.work[j * kLanes];
            const float share = factor[j];
            for (size_t r = 0; r < kLanes; r++) later[r] -= share * error[r];
        }
    }
}

}  // namespace

void gptq_round_block(const GptqBlock& block, float* work, int8_t* codes, size_t threads) {
    const size_t tiles = (block.rows + kLanes - 1) / kLanes;
    // A thread takes several tiles, so that its buffers are allocated once.
    const size_t stretch = 4;
    parallel_for((tiles + stretch - 1) / stretch, threads, [&](size_t piece) {
        Tile tile(block.columns);
        for (size_t t = piece * stretch; t < std::min(tiles, (piece + 1) * stretch); t++) {
            const size_t first = t * kLanes, count = std::min(kLanes, block.rows - first);
            std::fill(tile.step, tile.step + kLanes, 1.0f);
            std::fill(tile.lam, tile.lam + kLanes, 0.0f);
            std::fill(tile.row_class, tile.row_class + kLanes, 0);
            std::fill(tile.work.begin(), tile.work.end(), 0.0f);
            std::copy_n(block.row_step + first, count, tile.step);
            if (block.cost) {
                std::copy_n(block.lam + first, count, tile.lam);
                std::copy_n(block.row_class + first, count, tile.row_class);
            }
            for (size_t i = 0; i < block.columns; i++)
                std::copy_n(work + i * block.rows + first, count, &tile.work[i * kLanes]);
            round_tile(block, tile);
            for (size_t i = 0; i < block.columns; i++) {
                std::copy_n(&tile.work[i * kLanes], count, work + i * block.rows + first);
                std::copy_n(&tile.codes[i * kLanes], count, codes + i * block.rows + first);
            }
        }
    });
}

}  // namespace pgolf
