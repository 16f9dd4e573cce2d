// Causal grouped-query attention of projected heads: RMS norm, partial RoPE, gain, softmax and XSA in one pass;
// ops/reference.py has the formulas. No include guard, as in simd.h.
//
// Work is divided by (sequence, KV head), called a pair. Its rows are the queries of all heads that share the KV head,
// query by query. Products run in float32 on tiles of keys, so that no T x T matrix is stored. Every piece of work has
// a fixed size and its own results, so that no result depends on the number of threads.

constexpr size_t kTall = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // rows and columns of a product that stay in
constexpr size_t kWide = 2 * kLanes;                               // registers
constexpr size_t kKeys = 192;                                      // keys in a tile: a multiple of both
constexpr size_t kRows = 24;                                       // rows that share a tile while it is in L1
constexpr size_t kDepth = 64;                                      // channels summed in one chain
constexpr float kRmsEpsilon = 1.1920929e-7f, kXsaEpsilon = 1e-24f;  // added to a mean square; least squared norm

PGOLF_INLINE size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Floats from one row of a matrix to the next: whole registers, and an odd number of cache lines, since rows that are
// a power of two apart would share few cache sets.
PGOLF_INLINE size_t stride_of(size_t columns) { return (round_up(columns, std::max<size_t>(16, kWide)) / 16 | 1) * 16; }

// Uninitialized memory.
class Floats {
   public:
    explicit Floats(size_t count) : data_(static_cast<float*>(::operator new(4 * count, std::align_val_t{64}))) {}
    ~Floats() { ::operator delete(data_, std::align_val_t{64}); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float* operator+(size_t at) const { return data_ + at; }
    float& operator[](size_t at) const { return data_[at]; }

   private:
    float* data_;
};

// Calls work(i, scratch) once for every i < count on the pool, with `floats` of scratch memory for each thread.
template <class Work>
void share(size_t count, size_t threads, size_t floats, const Work& work) {
    if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
    threads = std::min(threads, count);
    const Floats scratch(threads * floats);
    std::atomic<size_t> next{0};
    run_on_pool(threads, threads, [&](size_t thread) {
        for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i, scratch + thread * floats);
    });
}

struct Sizes : AttentionShape {
    Sizes(const AttentionShape& shape, size_t tile_keys)
        : AttentionShape(shape),
          group(heads / kv_heads),
          rows(queries * group),
          first(keys - queries),
          pairs(batch * kv_heads),
          tile(tile_keys),
          tiles((keys + tile - 1) / tile),
          ld(stride_of(dim)),
          ldt(stride_of(tile)) {}
    const size_t group, rows, first, pairs, tile, tiles, ld, ldt;  // `ldt` floats from row to row of a tile

    size_t turned_tile() const { return dim * ldt; }  // floats of a tile of keys with channels as rows
    size_t position(size_t row) const { return first + std::min(row, rows - 1) / group; }
    // Number of a head among those of q, of a row of lse, and of a head among those of k and v.
    size_t q_head(size_t pair, size_t row) const {
        return (pair / kv_heads * queries + row / group) * heads + pair % kv_heads * group + row % group;
    }
    size_t lse_at(size_t pair, size_t row) const {
        return (pair / kv_heads * heads + pair % kv_heads * group + row % group) * queries + row / group;
    }
    size_t k_head(size_t pair, size_t key) const { return (pair / kv_heads * keys + key) * kv_heads + pair % kv_heads; }
    float gain_of(size_t pair, size_t row) const { return gain[pair % kv_heads * group + row % group]; }
    float gate_of(size_t head) const { return gate ? gate[head] : 1; }
    // The first key that a row attends to.
    size_t start(size_t pair, size_t row) const {
        return starts ? size_t(starts[pair / kv_heads * keys + position(row)]) : 0;
    }
    // The number of a row's keys that a tile from `key` on holds before the first one to which the row attends.
    size_t skipped(size_t pair, size_t row, size_t key, size_t width) const {
        const size_t begin = start(pair, row);
        return begin < key ? 0 : std::min(width, begin - key);
    }
};

// c (kTall, kWide) = a b, or c += a b, where a has `depth` > 0 columns, or rows if it is transposed.
template <bool kTransposed, bool kAdd>
void multiply(size_t depth, const float* a, size_t lda, const float* b, size_t ldb, float* c, size_t ldc) {
    vec sums[kTall][2] = {};
    size_t k = 0;
    do {
        const vec left = load(b + k * ldb), right = load(b + k * ldb + kLanes);
#pragma GCC unroll 12
        for (size_t r = 0; r < kTall; r++) {
            const vec x = splat(a[kTransposed ? k * lda + r : r * lda + k]);
            sums[r][0] += x * left;
            sums[r][1] += x * right;
        }
    } while (++k < depth);
#pragma GCC unroll 12
    for (size_t r = 0; r < kTall; r++) {
        float* row = c + r * ldc;
        store(row, kAdd ? load(row) + sums[r][0] : sums[r][0]);
        store(row + kLanes, kAdd ? load(row + kLanes) + sums[r][1] : sums[r][1]);
    }
}

// c = a b over the channels. More than kDepth terms are summed in parts: with one chain of 128 terms, gradients had a
// quarter more error than PyTorch's.
inline void multiply_channels(size_t dim, const float* a, size_t lda, const float* b, size_t ldb, float* c,
                              size_t ldc) {
    multiply<false, false>(std::min(dim, kDepth), a, lda, b, ldb, c, ldc);
    for (size_t i = kDepth; i < dim; i += kDepth)
        multiply<false, true>(std::min(dim - i, kDepth), a + i, lda, b + i * ldb, ldb, c, ldc);
}

template <class A, class B>
PGOLF_INLINE float dot(const A* a, const B* b, size_t count) {
    vec total{};
    sweep(0, count, [&](size_t i, auto n) { total += load(a + i, n) * load(b + i, n); });
    return sum(total);
}

// to = scale * from, and zeros up to whole registers.
template <class T>
PGOLF_INLINE void widen(const Sizes& n, const T* from, float* to, float scale = 1) {
    sweep(0, n.dim, [=](size_t i, auto lanes) { store(to + i, scale * load(from + i, lanes), lanes); });
    std::fill(to + n.dim, to + round_up(n.dim, kWide), 0.0f);
}

// to = scale * from, with channels turned by the angles of a position (-1 turns back), and zeros.
template <class T>
PGOLF_INLINE void turn(const Sizes& n, const T* from, size_t position, float direction, float scale, float* to) {
    const float *cos = n.cos + position * n.turned, *sin = n.sin + position * n.turned;
    sweep(0, n.turned, [=](size_t i, auto lanes) {
        const vec a = load(from + i, lanes), b = load(from + n.turned + i, lanes);
        const vec c = scale * load(cos + i, lanes), s = scale * direction * load(sin + i, lanes);
        store(to + i, a * c + b * s, lanes);
        store(to + n.turned + i, b * c - a * s, lanes);
    });
    sweep(2 * n.turned, n.dim, [=](size_t i, auto lanes) { store(to + i, scale * load(from + i, lanes), lanes); });
    std::fill(to + n.dim, to + round_up(n.dim, kWide), 0.0f);
}

// Divides a head by its root mean square and returns the factor.
template <class T>
PGOLF_INLINE float normalize(T* head, size_t dim) {
    const float factor = 1 / std::sqrt(dot(head, head, dim) / float(dim) + kRmsEpsilon);
    sweep(0, dim, [=](size_t i, auto lanes) { store(head + i, factor * load(head + i, lanes), lanes); });
    return factor;
}

// Writes a tile of keys with channels as rows: to[channel * ldt + key]. Beyond the last key, there are zeros.
PGOLF_INLINE void transpose(const Sizes& n, const float* keys, size_t count, float* to) {
    for (size_t channel = 0; channel < n.dim; channel++) {
        float* row = to + channel * n.ldt;
        for (size_t key = 0; key < count; key++) row[key] = keys[key * n.ld + channel];
        for (size_t key = count; key < round_up(count, kWide); key++) row[key] = 0;
    }
}

PGOLF_INLINE ivec lanes_below(size_t count) {
    ivec lane;
    for (size_t i = 0; i < kLanes; i++) lane[i] = int32_t(i);
    return lane < int32_t(count);
}

struct Softmax {
    float top = -INFINITY, total = 0;
};

// Replaces the first `count` scores by e^(score - the largest so far), and those up to `width` by zero. Returns the
// factor that rescales sums over earlier tiles.
PGOLF_INLINE float soften(float* scores, size_t count, size_t width, Softmax& state) {
    const size_t whole = count / kLanes * kLanes;
    float factor = 1;
    if (count) {
        const ivec seen = lanes_below(count - whole);
        const vec tail = seen ? load(scores + whole) : splat(-INFINITY);
        vec top = max(splat(state.top), tail), total{};
        for (size_t i = 0; i < whole; i += kLanes) top = max(top, load(scores + i));
        const float most = largest(top);
        for (size_t i = 0; i < whole; i += kLanes) {
            const vec e = exp(load(scores + i) - most);
            store(scores + i, e);
            total += e;
        }
        const vec e = seen ? exp(tail - most) : vec{};
        store(scores + whole, e);
        factor = std::exp(state.top - most);
        state = {most, state.total * factor + sum(total + e)};
    }
    for (size_t i = count; i < width; i++) scores[i] = 0;
    return factor;
}

// Attention of `height` rows (a multiple of kTall) from `row` on. Reads q (height, ld), rotated and scaled; writes sums
// of values (height, ld), not yet divided by the softmax's denominator, and each row's softmax state.
inline void attend(const Sizes& n, size_t pair, size_t row, size_t height, const float* q, const float* turned_keys,
                   const float* values, float* scores, float* sums, Softmax* states) {
    std::fill(sums, sums + height * n.ld, 0.0f);
    const size_t first_tile = n.start(pair, row) / kKeys;
    for (size_t tile = first_tile; tile < n.tiles && tile * kKeys <= n.position(row + height - 1); tile++) {
        const size_t key = tile * kKeys, width = std::min(kKeys, n.keys - key);
        const auto seen = [&](size_t r) {  // keys of the tile that row + r attends to
            const size_t end = n.position(row + r) + 1;
            return end < key ? 0 : std::min(width, end - key);
        };
        size_t from[kRows];
        for (size_t r = 0; r < height; r++) from[r] = std::min(n.skipped(pair, row + r, key, width), seen(r));
        for (size_t j = 0; j < width; j += kWide)
            for (size_t r = 0; r < height; r += kTall)
                if (j < seen(r + kTall - 1) && j + kWide > from[r])
                    multiply_channels(n.dim, q + r * n.ld, n.ld, turned_keys + tile * n.turned_tile() + j, n.ldt,
                                      scores + r * n.ldt + j, n.ldt);
        for (size_t r = 0; r < height; r++) {
            const size_t top = r / kTall * kTall, width_of = seen(top + kTall - 1) - from[r];
            std::fill(scores + r * n.ldt + from[top], scores + r * n.ldt + from[r], 0.0f);
            const float factor = soften(scores + r * n.ldt + from[r], seen(r) - from[r], width_of, states[r]);
            float* kept = sums + r * n.ld;
            for (size_t i = 0; tile != first_tile && i < n.ld; i += kLanes) store(kept + i, factor * load(kept + i));
        }
        for (size_t i = 0; i < n.dim; i += kWide)
            for (size_t r = 0; r < height; r += kTall)
                if (const size_t depth = seen(r + kTall - 1) - from[r])
                    multiply<false, true>(depth, scores + r * n.ldt + from[r], n.ldt,
                                          values + (key + from[r]) * n.ld + i, n.ld, sums + r * n.ld + i, n.ld);
    }
}

// Writes y of a row and, with XSA or a gate, the gate times y less its component along the token's own value.
template <class T>
PGOLF_INLINE void finish(const Sizes& n, const float* sums, float total, const T* own, float gate, T* y, T* context) {
    sweep(0, n.dim, [=](size_t i, auto lanes) { store(y + i, load(sums + i, lanes) / total, lanes); });
    if (n.xsa) {
        const float along = dot(y, own, n.dim) / std::max(dot(own, own, n.dim), kXsaEpsilon);
        sweep(0, n.dim, [=](size_t i, auto lanes) {
            store(context + i, gate * (load(y + i, lanes) - along * load(own + i, lanes)), lanes);
        });
    } else if (n.gate) {
        sweep(0, n.dim, [=](size_t i, auto lanes) { store(context + i, gate * load(y + i, lanes), lanes); });
    }
}

template <class T>
void attention_as(const AttentionShape& shape, const AttentionForward& io, size_t threads) {
    const Sizes n(shape, kKeys);
    T *q = static_cast<T*>(io.q), *k = static_cast<T*>(io.k);
    T *y = static_cast<T*>(io.y), *context = n.xsa || n.gate ? static_cast<T*>(io.context) : y;
    const T* v = static_cast<const T*>(io.v);
    const Floats turned_keys(n.pairs * n.tiles * n.turned_tile()), values(n.pairs * n.keys * n.ld);
    share(n.pairs * n.tiles, threads, kKeys * n.ld, [&](size_t item, float* turned) {
        const size_t pair = item / n.tiles, begin = item % n.tiles * kKeys, end = std::min(n.keys, begin + kKeys);
        for (size_t key = begin; key < end; key++) {
            const size_t head = n.k_head(pair, key);
            io.k_rstd[head] = normalize(k + head * n.dim, n.dim);
            turn(n, k + head * n.dim, key, 1, 1, turned + (key - begin) * n.ld);
            widen(n, v + head * n.dim, values + (pair * n.keys + key) * n.ld);
        }
        transpose(n, turned, end - begin, turned_keys + item * n.turned_tile());
    });
    const size_t blocks = (n.rows + kRows - 1) / kRows;
    share(n.pairs * blocks, threads, kRows * (2 * n.ld + n.ldt), [&](size_t item, float* scratch) {
        const size_t pair = item / blocks, row = (blocks - 1 - item % blocks) * kRows;  // the longest first
        const size_t count = std::min(kRows, n.rows - row), height = round_up(count, kTall);
        float *turned = scratch, *sums = turned + kRows * n.ld, *scores = sums + kRows * n.ld;
        Softmax states[kRows];
        for (size_t r = 0; r < height; r++) {
            const size_t head = n.q_head(pair, row + r);
            if (r < count) {
                const float scale = n.gain_of(pair, row + r) / std::sqrt(float(n.dim));
                io.q_rstd[head] = normalize(q + head * n.dim, n.dim);
                turn(n, q + head * n.dim, n.position(row + r), 1, scale, turned + r * n.ld);
            } else {
                std::fill(turned + r * n.ld, turned + (r + 1) * n.ld, 0.0f);
            }
        }
        attend(n, pair, row, height, turned, turned_keys + pair * n.tiles * n.turned_tile(),
               values + pair * n.keys * n.ld, scores, sums, states);
        for (size_t r = 0; r < count; r++) {
            const size_t head = n.q_head(pair, row + r), at = head * n.dim;
            const T* own = v + n.k_head(pair, n.position(row + r)) * n.dim;
            finish(n, sums + r * n.ld, states[r].total, own, n.gate_of(head), y + at, context + at);
            io.lse[n.lse_at(pair, row + r)] = states[r].top + std::log(states[r].total);
        }
    });
}

void attention(Type type, const AttentionShape& shape, const AttentionForward& io, size_t threads) {
    (type == Type::f32 ? attention_as<float> : attention_as<bf16>)(shape, io, threads);
}
