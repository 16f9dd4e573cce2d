// The smear gate and its gradient; ops/reference.py has the formula, `gate` is the sigmoid. No include guard, as in
// simd.h.

void smear_gate(Type type, const void* x, const float* gate, void* out, const Sequences& shape, size_t threads) {
    as_type(type, [=](auto kind) {
        using T = decltype(kind);
        const size_t width = shape.width;
        over_rows(shape.count * shape.length, kSumRows, threads, [=](size_t row, size_t) {
            const T* now = static_cast<const T*>(x) + row * width;
            T* into = static_cast<T*>(out) + row * width;
            sweep(0, width, [&](size_t i, auto n) {
                const vec s = load(gate + i, n), before = row % shape.length ? load(now - width + i, n) : vec{};
                store(into + i, (1.0f - s) * load(now + i, n) + s * before, n);
            });
        });
    });
}

// `sums` holds, for each block of kSumRows rows, the sum of dout * (x_{t-1} - x_t).
void smear_gate_backward(Type type, const void* dout, const void* x, const float* gate, void* dx, float* sums,
                         const Sequences& shape, size_t threads) {
    as_type(type, [=](auto kind) {
        using T = decltype(kind);
        const size_t width = shape.width;
        over_rows(shape.count * shape.length, kSumRows, threads, [=](size_t row, size_t block) {
            const T *now = static_cast<const T*>(x) + row * width, *grad = static_cast<const T*>(dout) + row * width;
            T* into = static_cast<T*>(dx) + row * width;
            float* own = sums + block * width;
            const bool first = row % shape.length == 0, last = (row + 1) % shape.length == 0;
            sweep(0, width, [&](size_t i, auto n) {
                const vec s = load(gate + i, n), g = load(grad + i, n);
                const vec before = first ? vec{} : load(now - width + i, n);
                const vec after = last ? vec{} : load(grad + width + i, n);
                store(own + i, load(own + i, n) + g * (before - load(now + i, n)), n);
                store(into + i, (1.0f - s) * g + s * after, n);
            });
        });
    });
}
