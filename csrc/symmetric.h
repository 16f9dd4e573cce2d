// alpha x x^T + beta add of float32 matrices, of which only one triangle is computed. No include guard, as in simd.h.

// 12 vectors of sums, 2 of x^T and one factor fit into 16 registers.
constexpr size_t kTileRows = 6, kPanel = 2 * kLanes;

// Adds the products of kTileRows rows of x (their addresses in `row`) with a panel of x^T (depth, kPanel) to `sums`.
PGOLF_INLINE void multiply_tile(const float* const* row, const float* panel, size_t depth, vec sums[kTileRows][2]) {
    for (size_t k = 0; k < depth; k++) {
        const vec left = load(panel + k * kPanel), right = load(panel + k * kPanel + kLanes);
        for (size_t r = 0; r < kTileRows; r++) {
            const vec factor = splat(row[r][k]);
            sums[r][0] += factor * left;
            sums[r][1] += factor * right;
        }
    }
}

// The columns of one panel, from its diagonal down, and their mirror image. `panel` is scratch of (columns, kPanel).
inline void symmetric_panel(const float* x, const float* add, float* out, float alpha, float beta, size_t rows,
                            size_t columns, size_t first, float* panel) {
    const size_t width = std::min(kPanel, rows - first);
    for (size_t k = 0; k < columns; k++)
        for (size_t j = 0; j < kPanel; j++) panel[k * kPanel + j] = j < width ? x[(first + j) * columns + k] : 0.0f;
    for (size_t i = first; i < rows; i += kTileRows) {
        const float* row[kTileRows];
        for (size_t r = 0; r < kTileRows; r++) row[r] = x + std::min(i + r, rows - 1) * columns;
        vec sums[kTileRows][2] = {};
        multiply_tile(row, panel, columns, sums);
        for (size_t r = 0; r < kTileRows && i + r < rows; r++) {
            float line[kPanel];
            store(line, sums[r][0]);
            store(line + kLanes, sums[r][1]);
            for (size_t j = 0; j < width; j++) {
                const size_t at = (i + r) * rows + first + j;
                const float value = alpha * line[j] + (add ? beta * add[at] : 0.0f);
                out[at] = out[(first + j) * rows + i + r] = value;
            }
        }
    }
}

// outs (count, rows, rows) from xs (count, rows, columns); adds, if not null, holds symmetric (count, rows, rows).
void symmetric_product(const float* xs, const float* adds, float* outs, float alpha, float beta, size_t count,
                       size_t rows, size_t columns, size_t threads) {
    const size_t panels = (rows + kPanel - 1) / kPanel;
    share(count * panels, threads, columns * kPanel, [=](size_t item, float* panel) {
        const size_t matrix = item / panels, square = matrix * rows * rows;
        symmetric_panel(xs + matrix * rows * columns, adds ? adds + square : nullptr, outs + square, alpha, beta, rows,
                        columns, item % panels * kPanel, panel);
    });
}
