// alpha x x^T + beta add of matrices of float32 or bf16, of which only one triangle is computed. Products are in elements
// E (simd.h). No include guard, as in simd.h.

constexpr size_t kTileRows = kLanes == 16 ? 12 : 6, kPanel = 2 * kLanes;  // sums of a tile stay in registers

// Adds the products of kTileRows rows of x (their addresses in `row`) with a panel of x^T (depth, kPanel) to `sums`.
template <class E>
PGOLF_INLINE void multiply_tile(const E* const* row, const E* panel, size_t depth, vec sums[kTileRows][2]) {
    for (size_t k = 0; k < depth; k++) {
        const auto left = load_terms(panel + k * kPanel), right = load_terms(panel + k * kPanel + kLanes);
#pragma GCC unroll 12
        for (size_t r = 0; r < kTileRows; r++) {
            const auto factor = spread_terms(row[r] + k);
            add_product(sums[r][0], factor, left);
            add_product(sums[r][1], factor, right);
        }
    }
}

// The columns of one panel, from its diagonal down, and their mirror image. `x` has rows of `depth` elements, and
// `panel` is scratch of (depth, kPanel).
template <class T, class E>
void symmetric_panel(const E* x, const T* add, T* out, float alpha, float beta, size_t rows, size_t depth, size_t first,
                     E* panel) {
    const size_t width = std::min(kPanel, rows - first);
    std::fill(panel, panel + depth * kPanel, E{});
    for (size_t j = 0; j < width; j++)
        for (size_t k = 0; k < depth; k++) panel[k * kPanel + j] = x[(first + j) * depth + k];
    for (size_t i = first; i < rows; i += kTileRows) {
        const E* row[kTileRows];
        for (size_t r = 0; r < kTileRows; r++) row[r] = x + std::min(i + r, rows - 1) * depth;
        vec sums[kTileRows][2] = {};
        multiply_tile(row, panel, depth, sums);
        for (size_t r = 0; r < kTileRows && i + r < rows; r++) {
            const size_t at = (i + r) * rows + first;
            T line[kPanel];
            sweep(0, width, [&](size_t j, auto lanes) {
                vec value = alpha * sums[r][j / kLanes];
                if (add) value += beta * load(add + at + j, lanes);
                store(line + j, value, lanes);
                store(out + at + j, value, lanes);
            });
            for (size_t j = 0; j < width; j++) out[(first + j) * rows + i + r] = line[j];
        }
    }
}

template <class T>
void symmetric_product_as(const T* xs, const T* adds, T* outs, float alpha, float beta, size_t count, size_t rows,
                          size_t columns, size_t threads) {
    using E = Element<T>;
    const size_t panels = (rows + kPanel - 1) / kPanel, depth = elements<E>(columns);
    const Array<E> copies(std::is_same_v<T, float> ? 0 : count * rows * depth);  // a row may hold half an element
    const E* from = copies + 0;
    if constexpr (std::is_same_v<T, float>)
        from = xs;
    else
        over_rows(count * rows, 64, threads, [=, to = copies + 0](size_t row, size_t) {
            if (depth) to[(row + 1) * depth - 1] = E{};
            sweep(0, columns, [=](size_t i, auto lanes) {
                store(items(to + row * depth) + i, load(xs + row * columns + i, lanes), lanes);
            });
        });
    share(count * panels, threads, depth * kPanel, [=](size_t item, float* panel) {
        const size_t matrix = item / panels, square = matrix * rows * rows;
        symmetric_panel(from + matrix * rows * depth, adds ? adds + square : nullptr, outs + square, alpha, beta, rows,
                        depth, item % panels * kPanel, reinterpret_cast<E*>(panel));
    });
}

// outs (count, rows, rows) from xs (count, rows, columns); adds, if not null, holds symmetric (count, rows, rows).
void symmetric_product(Type type, const void* xs, const void* adds, void* outs, float alpha, float beta, size_t count,
                       size_t rows, size_t columns, size_t threads) {
    as_type(type, [=](auto item) {
        using T = decltype(item);
        symmetric_product_as(static_cast<const T*>(xs), static_cast<const T*>(adds), static_cast<T*>(outs), alpha, beta,
                             count, rows, columns, threads);
    });
}
