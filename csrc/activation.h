// The MLP's activation and its gradient; ops/reference.py has the formulas. No include guard, as in simd.h.

constexpr size_t kActivationBlock = 16384;  // elements for one thread at a time: 64 KiB of float32

struct LeakyReluSquared {
    PGOLF_INLINE vec hidden(vec pre) { return max(pre, pre * 0.5f) * max(pre, pre * 0.5f); }
    PGOLF_INLINE vec slope(vec pre) { return pre > 0 ? 2.0f * pre : 0.5f * pre; }
};

struct ReluSquared {  // in this order, max keeps NaN
    PGOLF_INLINE vec hidden(vec pre) { return max(vec{}, pre) * max(vec{}, pre); }
    PGOLF_INLINE vec slope(vec pre) { return 2.0f * max(vec{}, pre); }
};

// Alternating values gate, up as two vectors, and back: on little-endian machines gate is the low half of a pair.
typedef uint64_t pairs __attribute__((vector_size(8 * PGOLF_LANES)));
struct Pairs {
    vec gate, up;
};

template <class Lanes>
PGOLF_INLINE Pairs load_pairs(const float* p, Lanes n) {
    pairs x{};
    __builtin_memcpy(&x, p, 8 * n.lanes);
    return {(vec)__builtin_convertvector(x, uvec), (vec)__builtin_convertvector(x >> 32, uvec)};
}
template <class Lanes>
PGOLF_INLINE Pairs load_pairs(const bf16* p, Lanes n) {
    uvec x{};
    __builtin_memcpy(&x, p, 4 * n.lanes);
    return {(vec)(x << 16), (vec)(x & 0xffff0000u)};
}
template <class Lanes>
PGOLF_INLINE void store_pairs(float* p, const Pairs& x, Lanes n) {
    const pairs both =
        __builtin_convertvector((uvec)x.gate, pairs) | (__builtin_convertvector((uvec)x.up, pairs) << 32);
    __builtin_memcpy(p, &both, 8 * n.lanes);
}
template <class Lanes>
PGOLF_INLINE void store_pairs(bf16* p, const Pairs& x, Lanes n) {
    const uvec both =
        __builtin_convertvector(narrow(x.gate), uvec) | (__builtin_convertvector(narrow(x.up), uvec) << 16);
    __builtin_memcpy(p, &both, 4 * n.lanes);
}

template <class Body>
void in_blocks(size_t count, size_t threads, const Body& body) {
    run_on_pool((count + kActivationBlock - 1) / kActivationBlock, threads, [&](size_t block) {
        const size_t begin = block * kActivationBlock;
        sweep(begin, std::min(count, begin + kActivationBlock), body);
    });
}

template <class Kind, class T>
void activate_each(const T* pre, T* hidden, size_t count, size_t threads) {
    in_blocks(count, threads, [=](size_t i, auto n) { store(hidden + i, Kind::hidden(load(pre + i, n)), n); });
}

template <class Kind, class T>
void activate_each_backward(const T* dhidden, const T* pre, T* dpre, T* hidden, size_t count, size_t threads) {
    in_blocks(count, threads, [=](size_t i, auto n) {
        const vec x = load(pre + i, n), grad = load(dhidden + i, n);
        store(dpre + i, Kind::slope(x) * grad, n);
        store(hidden + i, Kind::hidden(x), n);
    });
}

template <class T>
void swiglu(const T* pre, T* hidden, size_t count, size_t threads) {
    in_blocks(count, threads, [=](size_t i, auto n) {
        const Pairs x = load_pairs(pre + 2 * i, n);
        store(hidden + i, x.gate * sigmoid(x.gate) * x.up, n);
    });
}

template <class T>
void swiglu_backward(const T* dhidden, const T* pre, T* dpre, T* hidden, size_t count, size_t threads) {
    in_blocks(count, threads, [=](size_t i, auto n) {
        const Pairs x = load_pairs(pre + 2 * i, n);
        const vec grad = load(dhidden + i, n), s = sigmoid(x.gate);
        store_pairs(dpre + 2 * i, {grad * x.up * s * (1.0f + x.gate * (1.0f - s)), grad * x.gate * s}, n);
        store(hidden + i, x.gate * s * x.up, n);
    });
}

template <class T>
void activate_as(const void* pre, void* hidden, size_t count, Activation kind, size_t threads) {
    const auto run = kind == Activation::swiglu          ? swiglu<T>
                     : kind == Activation::relu_squared ? activate_each<ReluSquared, T>
                                                        : activate_each<LeakyReluSquared, T>;
    run(static_cast<const T*>(pre), static_cast<T*>(hidden), count, threads);
}

template <class T>
void activate_backward_as(const void* dhidden, const void* pre, void* dpre, void* hidden, size_t count,
                          Activation kind, size_t threads) {
    const auto run = kind == Activation::swiglu          ? swiglu_backward<T>
                     : kind == Activation::relu_squared ? activate_each_backward<ReluSquared, T>
                                                        : activate_each_backward<LeakyReluSquared, T>;
    run(static_cast<const T*>(dhidden), static_cast<const T*>(pre), static_cast<T*>(dpre), static_cast<T*>(hidden),
        count, threads);
}

void activate(Type type, const void* pre, void* hidden, size_t count, Activation kind, size_t threads) {
    (type == Type::f32 ? activate_as<float> : activate_as<bf16>)(pre, hidden, count, kind, threads);
}

void activate_backward(Type type, const void* dhidden, const void* pre, void* dpre, void* hidden, size_t count,
                       Activation kind, size_t threads) {
    (type == Type::f32 ? activate_backward_as<float> : activate_backward_as<bf16>)(dhidden, pre, dpre, hidden, count,
                                                                                  kind, threads);
}
