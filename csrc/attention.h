// Causal grouped-query attention of projected heads: RMS norm, partial RoPE, gain, softmax and XSA in one pass;
// ops/reference.py has the formulas. No include guard, as in simd.h.
//
// Work is divided by (sequence, KV head), called a pair. Its rows are the queries of all heads that share the KV head,
// query by query. Products run on tiles of keys, so that no T x T matrix is stored, and sum in float32. Their elements
// E (simd.h) are float32, or pairs of bf16 where the CPU multiplies those: P and turned q and k are then rounded to
// bf16, as other attention kernels do. Every piece of work has a fixed size and its own results, so that no result
// depends on the number of threads.

constexpr size_t kTall = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;  // rows and columns of a product that stay in
constexpr size_t kWide = 2 * kLanes;                               // registers
constexpr size_t kKeys = 192;                                      // keys in a tile: a multiple of both
constexpr size_t kRows = 24;                                       // rows that share a tile while it is in L1
constexpr size_t kDepth = 64;                                      // channels summed in one chain
constexpr size_t kEnoughPairs = 32;                                // from then on, one thread does all of a pair
constexpr float kRmsEpsilon = 1.1920929e-7f, kXsaEpsilon = 1e-24f;  // added to a mean square; least squared norm

PGOLF_INLINE size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

// Floats from one row of a matrix to the next: whole registers, and an odd number of cache lines, since rows that are
// a power of two apart would share few cache sets.
PGOLF_INLINE size_t stride_of(size_t columns) { return (round_up(columns, std::max<size_t>(16, kWide)) / 16 | 1) * 16; }

// Uninitialized memory.
template <class E>
class Array {
   public:
    explicit Array(size_t count) : data_(static_cast<E*>(::operator new(sizeof(E) * count, std::align_val_t{64}))) {}
    ~Array() { ::operator delete(data_, std::align_val_t{64}); }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    E* operator+(size_t at) const { return data_ + at; }
    E& operator[](size_t at) const { return data_[at]; }

   private:
    E* data_;
};
using Floats = Array<float>;

template <class E>
using Item = std::conditional_t<kTerms<E> == 2, bf16, float>;  // what an element holds

template <class E>
PGOLF_INLINE Item<E>* items(E* elements) {
    return reinterpret_cast<Item<E>*>(elements);
}
// Elements that hold `count` items.
template <class E>
PGOLF_INLINE size_t elements(size_t count) {
    return (count + kTerms<E> - 1) / kTerms<E>;
}

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
          blocks((rows + kRows - 1) / kRows),
          ld(stride_of(dim)),
          ldt(stride_of(tile)) {}
    const size_t group, rows, first, pairs, tile, tiles, blocks, ld, ldt;  // `ldt` floats from row to row of a tile

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

// c (kTall, kWide) = a b, or c += a b, where a has `depth` > 0 columns of elements, or rows if it is transposed.
template <bool kTransposed, bool kAdd, class E>
void multiply(size_t depth, const E* a, size_t lda, const E* b, size_t ldb, float* c, size_t ldc) {
    vec sums[kTall][2] = {};
    size_t k = 0;
    do {
        const auto left = load_terms(b + k * ldb), right = load_terms(b + k * ldb + kLanes);
#pragma GCC unroll 12
        for (size_t r = 0; r < kTall; r++) {
            const auto x = spread_terms(a + (kTransposed ? k * lda + r : r * lda + k));
            add_product(sums[r][0], x, left);
            add_product(sums[r][1], x, right);
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
template <class E>
void multiply_channels(size_t dim, const E* a, size_t lda, const E* b, size_t ldb, float* c, size_t ldc) {
    const size_t depth = elements<E>(dim), step = kDepth / kTerms<E>;
    multiply<false, false>(std::min(depth, step), a, lda, b, ldb, c, ldc);
    for (size_t i = step; i < depth; i += step)
        multiply<false, true>(std::min(depth - i, step), a + i, lda, b + i * ldb, ldb, c, ldc);
}

template <class A, class B>
PGOLF_INLINE float dot(const A* a, const B* b, size_t count) {
    vec total{};
    sweep(0, count, [&](size_t i, auto n) { total += load(a + i, n) * load(b + i, n); });
    return sum(total);
}

// to = scale * from, and zeros up to whole registers.
template <class T, class Out>
PGOLF_INLINE void copy_head(const Sizes& n, const T* from, Out* to, float scale = 1) {
    sweep(0, n.dim, [=](size_t i, auto lanes) { store(to + i, scale * load(from + i, lanes), lanes); });
    std::fill(to + n.dim, to + round_up(n.dim, kWide), Out{});
}

// Writes `count` rows of heads, where row(i) is, so that a product can sum over them: each element of `to` holds kTerms
// rows of one channel, and those beyond the last row are zero.
template <class Row>
PGOLF_INLINE void stack(const Sizes& n, size_t count, const Row& row, float* to) {
    for (size_t i = 0; i < count; i++) copy_head(n, row(i), to + i * n.ld);
}
template <class Row>
PGOLF_INLINE void stack(const Sizes& n, size_t count, const Row& row, bf16x2* to) {
    const bf16 none[kLanes] = {};
    for (size_t i = 0; i < count; i += 2) {
        const bf16* from[2] = {row(i), i + 1 < count ? row(i + 1) : none};
        const size_t step = i + 1 < count;
        sweep(0, n.dim, [&, out = to + i / 2 * n.ld](size_t c, auto lanes) {
            const uvec low = (uvec)load(from[0] + c, lanes), high = (uvec)load(from[1] + step * c, lanes);
            const uvec both = low >> 16 | high;
            __builtin_memcpy(out + c, &both, 4 * lanes.lanes);
        });
        std::fill(to + i / 2 * n.ld + n.dim, to + i / 2 * n.ld + round_up(n.dim, kWide), 0);
    }
}

// to = scale * from, with channels turned by the angles of a position (-1 turns back), and zeros.
template <class T, class Out>
PGOLF_INLINE void turn(const Sizes& n, const T* from, size_t position, float direction, float scale, Out* to) {
    const float *cos = n.cos + position * n.turned, *sin = n.sin + position * n.turned;
    sweep(0, n.turned, [=](size_t i, auto lanes) {
        const vec a = load(from + i, lanes), b = load(from + n.turned + i, lanes);
        const vec c = scale * load(cos + i, lanes), s = scale * direction * load(sin + i, lanes);
        store(to + i, a * c + b * s, lanes);
        store(to + n.turned + i, b * c - a * s, lanes);
    });
    sweep(2 * n.turned, n.dim, [=](size_t i, auto lanes) { store(to + i, scale * load(from + i, lanes), lanes); });
    std::fill(to + n.dim, to + round_up(n.dim, kWide), Out{});
}

// Divides a head by its root mean square and returns the factor.
template <class T>
PGOLF_INLINE float normalize(T* head, size_t dim) {
    const float factor = 1 / std::sqrt(dot(head, head, dim) / float(dim) + kRmsEpsilon);
    sweep(0, dim, [=](size_t i, auto lanes) { store(head + i, factor * load(head + i, lanes), lanes); });
    return factor;
}

// Writes a tile of keys with channels as rows: to[channel * ldt + key]. Beyond the last key, there are zeros.
template <class E>
void transpose(const Sizes& n, const E* keys, size_t count, E* to) {
    for (size_t channel = 0; channel < elements<E>(n.dim); channel++) {
        E* row = to + channel * n.ldt;
        for (size_t key = 0; key < count; key++) std::memcpy(row + key, keys + key * n.ld + channel, sizeof(E));
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

// Replaces the scores from `begin` to `end` by items of E, e^(score - the largest so far), and those before, from `low`
// on, and after, up to `width`, by zero. Returns the factor that rescales sums over earlier tiles.
template <class E>
PGOLF_INLINE float soften(float* scores, size_t low, size_t begin, size_t end, size_t width, Softmax& state) {
    Item<E>* to = reinterpret_cast<Item<E>*>(scores);
    const size_t whole = begin + (end - begin) / kLanes * kLanes;
    float factor = 1;
    if (begin < end) {
        const ivec seen = lanes_below(end - whole);
        const vec tail = seen ? load(scores + whole) : splat(-INFINITY);
        vec top = max(splat(state.top), tail), total{};
        for (size_t i = begin; i < whole; i += kLanes) top = max(top, load(scores + i));
        const float most = largest(top);
        for (size_t i = begin; i < whole; i += kLanes) {
            const vec e = exp(load(scores + i) - most);
            store(to + i, e);
            total += e;
        }
        const vec e = seen ? exp(tail - most) : vec{};
        store(to + whole, e);
        factor = std::exp(state.top - most);
        state = {most, state.total * factor + sum(total + e)};
    }
    for (size_t i = low; i < begin; i++) to[i] = {};
    for (size_t i = end; i < width; i++) to[i] = {};
    return factor;
}

// Attention of `height` rows (a multiple of kTall) from `row` on. Reads q (height, ld), rotated and scaled; writes sums
// of values (height, ld), not yet divided by the softmax's denominator, and each row's softmax state.
template <class E>
void attend(const Sizes& n, size_t pair, size_t row, size_t height, const E* q, const E* turned_keys, const E* values,
            float* scores, float* sums, Softmax* states) {
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
            const size_t top = r / kTall * kTall, low = from[top] / kTerms<E> * kTerms<E>;
            const size_t most = round_up(seen(top + kTall - 1), kTerms<E>);
            const float factor = soften<E>(scores + r * n.ldt, low, from[r], seen(r), most, states[r]);
            float* kept = sums + r * n.ld;
            for (size_t i = 0; tile != first_tile && i < n.ld; i += kLanes) store(kept + i, factor * load(kept + i));
        }
        for (size_t i = 0; i < n.dim; i += kWide)
            for (size_t r = 0; r < height; r += kTall) {
                const size_t low = from[r] / kTerms<E>, end = elements<E>(seen(r + kTall - 1));
                if (low < end)
                    multiply<false, true>(end - low, reinterpret_cast<const E*>(scores + r * n.ldt) + low, n.ldt,
                                          values + (elements<E>(key) + low) * n.ld + i, n.ld, sums + r * n.ld + i, n.ld);
            }
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

// Normalizes a tile of keys, and writes them turned, with channels as rows, and the values beside them.
template <class T, class E>
void prepare_tile(const Sizes& n, const AttentionForward& io, size_t pair, size_t tile, E* turned_keys, E* values,
                  E* turned) {
    T* k = static_cast<T*>(io.k);
    const size_t begin = tile * kKeys, count = std::min(n.keys - begin, kKeys);
    for (size_t i = 0; i < count; i++) {
        const size_t head = n.k_head(pair, begin + i);
        io.k_rstd[head] = normalize(k + head * n.dim, n.dim);
        turn(n, k + head * n.dim, begin + i, 1, 1, items(turned + i * n.ld));
    }
    const auto value = [&](size_t i) { return static_cast<const T*>(io.v) + n.k_head(pair, begin + i) * n.dim; };
    stack(n, count, value, values + elements<E>(begin) * n.ld);
    transpose(n, turned, count, turned_keys + tile * n.turned_tile());
}

// Attention of one block of rows, from projections to the context.
template <class T, class E>
void attend_block(const Sizes& n, const AttentionForward& io, size_t pair, size_t block, const E* turned_keys,
                  const E* values, float* scratch) {
    T *q = static_cast<T*>(io.q), *y = static_cast<T*>(io.y);
    T* context = n.xsa || n.gate ? static_cast<T*>(io.context) : y;
    const T* v = static_cast<const T*>(io.v);
    const size_t row = block * kRows, count = std::min(kRows, n.rows - row), height = round_up(count, kTall);
    E* turned = reinterpret_cast<E*>(scratch);
    float *sums = scratch + kRows * n.ld, *scores = sums + kRows * n.ld;
    Softmax states[kRows];
    for (size_t r = 0; r < height; r++) {
        const size_t head = n.q_head(pair, row + r);
        if (r < count) {
            const float scale = n.gain_of(pair, row + r) / std::sqrt(float(n.dim));
            io.q_rstd[head] = normalize(q + head * n.dim, n.dim);
            turn(n, q + head * n.dim, n.position(row + r), 1, scale, items(turned + r * n.ld));
        } else {
            std::fill(turned + r * n.ld, turned + (r + 1) * n.ld, E{});
        }
    }
    attend(n, pair, row, height, turned, turned_keys, values, scores, sums, states);
    for (size_t r = 0; r < count; r++) {
        const size_t head = n.q_head(pair, row + r), at = head * n.dim;
        const T* own = v + n.k_head(pair, n.position(row + r)) * n.dim;
        finish(n, sums + r * n.ld, states[r].total, own, n.gate_of(head), y + at, context + at);
        io.lse[n.lse_at(pair, row + r)] = states[r].top + std::log(states[r].total);
    }
}

template <class T>
void attention_as(const AttentionShape& shape, const AttentionForward& io, size_t threads) {
    using E = Element<T>;
    const Sizes n(shape, kKeys);
    const size_t keys = n.tiles * n.turned_tile(), values = elements<E>(n.keys) * n.ld, scratch = kKeys * n.ld;
    const size_t rows = kRows * (2 * n.ld + n.ldt);
    if (n.pairs >= kEnoughPairs) {  // what a pair needs stays in the caches
        share(n.pairs, threads, keys + values + std::max(scratch, rows), [&](size_t pair, float* own) {
            E *turned = reinterpret_cast<E*>(own), *v = turned + keys;
            float* rest = own + keys + values;
            for (size_t tile = 0; tile < n.tiles; tile++)
                prepare_tile<T>(n, io, pair, tile, turned, v, reinterpret_cast<E*>(rest));
            for (size_t block = 0; block < n.blocks; block++) attend_block<T>(n, io, pair, block, turned, v, rest);
        });
        return;
    }
    const Array<E> prepared(n.pairs * (keys + values));
    const auto of = [&](size_t pair) { return prepared + pair * (keys + values); };
    share(n.pairs * n.tiles, threads, scratch, [&](size_t i, float* own) {
        E* turned = of(i / n.tiles);
        prepare_tile<T>(n, io, i / n.tiles, i % n.tiles, turned, turned + keys, reinterpret_cast<E*>(own));
    });
    share(n.pairs * n.blocks, threads, rows, [&](size_t i, float* own) {
        const E* turned = of(i / n.blocks);
        attend_block<T>(n, io, i / n.blocks, n.blocks - 1 - i % n.blocks, turned, turned + keys, own);  // longest first
    });
}

void attention(Type type, const AttentionShape& shape, const AttentionForward& io, size_t threads) {
    (type == Type::f32 ? attention_as<float> : attention_as<bf16>)(shape, io, threads);
}
