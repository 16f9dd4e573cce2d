// Cross-entropy of rows of softcapped logits and its gradient, in place; ops/reference.py has the formula. No include
// guard, as in simd.h.

constexpr size_t kLossRows = 8;           // rows for one thread at a time
constexpr size_t kLossSum = 64 * kLanes;  // columns summed at a time: one chain of 8,200 was off by 1.1e-5
constexpr size_t kLossColumns = 8192;     // columns kept between the sweeps, 64 KiB of stack; others are computed again

struct Capped {
    vec tanh, exp;  // exp is e^(softcap * (tanh - the row's largest))
};

template <class T>
void softcap_loss_row(T* row, size_t vocab, size_t target, const SoftcapLoss& options, float* loss, float* logsumexp) {
    const float cap = options.softcap, inverse = 1 / cap;
    Capped kept[kLossColumns / kLanes];
    vec top = splat(-INFINITY), total{};
    sweep(0, vocab, [&](size_t i, auto n) { top = max(select(load(row + i, n), splat(-INFINITY), n), top); });
    const float largest_tanh = tanh(splat(largest(top) * inverse))[0];
    const auto capped = [&](vec raw) {
        const vec t = tanh(raw * inverse);
        return Capped{t, exp(cap * (t - largest_tanh))};
    };
    for (size_t begin = 0; begin < vocab; begin += kLossSum) {
        vec part{};
        sweep(begin, std::min(vocab, begin + kLossSum), [&](size_t i, auto n) {
            const Capped x = capped(load(row + i, n));
            if (i < kLossColumns) kept[i / kLanes] = x;
            part += select(x.exp, vec{}, n);
        });
        total += part;
    }
    const float z = sum(total), log_z = std::log(z);
    const Capped own = capped(load(row + target, Part{1}));
    *logsumexp = cap * largest_tanh + log_z;
    *loss = log_z + cap * (largest_tanh - own.tanh[0]) + options.z_loss * *logsumexp * *logsumexp;
    if (!options.gradient) return;
    // d loss / d raw = ((1 + 2 z_loss log Z) softmax - onehot) (1 - tanh^2)
    const float factor = (1 + 2 * options.z_loss * *logsumexp) / z;
    sweep(0, vocab, [&](size_t i, auto n) {
        const Capped x = i < kLossColumns ? kept[i / kLanes] : capped(load(row + i, n));
        store(row + i, x.exp * factor * (1.0f - x.tanh * x.tanh), n);
    });
    store(row + target, (own.exp * factor - 1.0f) * (1.0f - own.tanh * own.tanh), Part{1});
}

void softcap_loss(Type type, void* logits, const int64_t* targets, size_t rows, size_t vocab,
                  const SoftcapLoss& options, float* loss, float* logsumexp, size_t threads) {
    as_type(type, [=](auto kind) {
        using T = decltype(kind);
        over_rows(rows, kLossRows, threads, [=](size_t i, size_t) {
            const size_t target = static_cast<size_t>(targets[i]);
            softcap_loss_row(static_cast<T*>(logits) + i * vocab, vocab, target, options, loss + i, logsumexp + i);
        });
    });
}
