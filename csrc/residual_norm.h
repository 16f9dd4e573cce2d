// Scaled residual sums and RMS norms, and their gradients; ops/reference.py has the formulas. Gradients
// of scales are sums over fixed blocks of kSumRows rows. No include guard, as in simd.h.

constexpr float kNormEps = 1.1920928955078125e-07f;  // reference.RMS_EPS

template <class T>
void residual_norm_as(const ResidualNorm& given, size_t threads) {
    const T *x = static_cast<const T*>(given.x), *branch = static_cast<const T*>(given.branch);
    T *mixed = static_cast<T*>(given.mixed), *normed = static_cast<T*>(given.normed);
    over_rows(given.rows, kSumRows, threads, [=](size_t row, size_t) {
        const size_t at = row * given.width;
        const T* values = branch ? mixed + at : x + at;
        vec squares{};
        sweep(0, given.width, [&](size_t i, auto n) {
            vec value = load(x + at + i, n);
            if (branch) {
                if (given.x_scale) value *= load(given.x_scale + i, n);
                store(mixed + at + i, value + load(branch + at + i, n) * load(given.branch_scale + i, n), n);
                value = load(values + i, n);  // as rounded
            }
            squares += value * value;
        });
        const float rstd = 1 / std::sqrt(sum(squares) / float(std::max<size_t>(given.width, 1)) + kNormEps);
        given.rstd[row] = rstd;
        sweep(0, given.width, [&](size_t i, auto n) {
            store(normed + at + i, load(values + i, n) * (rstd * given.scale), n);
        });
    });
}

template <class T>
void residual_norm_backward_as(const ResidualNormBackward& given, size_t threads) {
    const T *dmixed = static_cast<const T*>(given.dmixed), *dnormed = static_cast<const T*>(given.dnormed),
            *x = static_cast<const T*>(given.x), *branch = static_cast<const T*>(given.branch),
            *mixed = static_cast<const T*>(given.mixed);
    T *dx = static_cast<T*>(given.dx), *dbranch = static_cast<T*>(given.dbranch);
    over_rows(given.rows, kSumRows, threads, [=](size_t row, size_t block) {
        const size_t width = given.width, at = row * width;
        const float rstd = given.rstd[row];
        float* sums = given.sums + block * (given.x_scale ? 2 : 1) * width;
        vec along{};
        sweep(0, width, [&](size_t i, auto n) {
            along += load(dnormed + at + i, n) * (load(mixed + at + i, n) * rstd);
        });
        // d rms_norm = rstd (g - unit mean(g unit)), where g is the gradient of the normalized value
        const float mean = sum(along) * given.scale / float(width) * rstd;
        sweep(0, width, [&](size_t i, auto n) {
            vec total = (load(dnormed + at + i, n) * given.scale - load(mixed + at + i, n) * mean) * rstd;
            if (branch) {
                total += load(dmixed + at + i, n);
                store(sums + i, load(sums + i, n) + total * load(branch + at + i, n), n);
                store(dbranch + at + i, total * load(given.branch_scale + i, n), n);
            }
            if (given.x_scale) {
                float* more = sums + width;
                store(more + i, load(more + i, n) + total * load(x + at + i, n), n);
                total *= load(given.x_scale + i, n);
            }
            store(dx + at + i, total, n);
        });
    });
}

void residual_norm(Type type, const ResidualNorm& given, size_t threads) {
    (type == Type::f32 ? residual_norm_as<float> : residual_norm_as<bf16>)(given, threads);
}

void residual_norm_backward(Type type, const ResidualNormBackward& given, size_t threads) {
    (type == Type::f32 ? residual_norm_backward_as<float> : residual_norm_backward_as<bf16>)(given, threads);
}
