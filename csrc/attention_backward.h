// Gradient of the attention in attention.h, included before; scores are computed again, tile by tile. No include guard,
// as in simd.h.

constexpr size_t kKeysBack = 96, kRowsBack = 48;  // keys and rows in a tile: multiples of kTall, and keys of kWide
constexpr size_t kQueriesBack = 32;               // queries whose rows one thread prepares or finishes at a time

struct BackwardSizes : Sizes {
    explicit BackwardSizes(const AttentionShape& shape)
        : Sizes(shape, kKeysBack),
          block(pairs >= kEnoughPairs ? tiles : std::max<size_t>(4, (tiles + 7) / 8)),
          key_blocks((tiles + block - 1) / std::max<size_t>(1, block)),
          parts((queries + kQueriesBack - 1) / kQueriesBack),
          padded(round_up(rows + kTall, 2)) {}
    const size_t block, key_blocks, parts, padded;  // a block is `block` tiles

    // The first row that attends to a key, or the one before it if that is even.
    size_t row_from(size_t key) const { return key < first ? 0 : (key - first) * group / 2 * 2; }
};

// What backward computes for a pair before its products, and the part of dq that comes from each block of keys. The
// memory is the caller's.
template <class E>
struct Workspace {
    static constexpr bool kStacked = kTerms<E> == 2;  // sums over rows need them two by two; else q and dy serve

    Workspace(const BackwardSizes& n, float* memory) : memory_(memory) {
        const size_t rows = n.padded * n.ld, keys = n.tiles * n.turned_tile();
        take(q, n.padded * row_of(n)), take(dy, n.padded * row_of(n));
        take(stacked_q, kStacked ? rows / 2 : 0), take(stacked_dy, kStacked ? rows / 2 : 0);
        take(k, n.tiles * n.tile / kTerms<E> * n.ld), take(turned_k, keys), take(turned_v, keys);
        take(own, n.xsa ? n.queries * n.ld : 0), take(lse, n.padded), take(delta, n.padded);
        take(dq, n.key_blocks * rows), take(dgain, n.parts * n.group);
    }
    static size_t size(const BackwardSizes& n) { return Workspace(n, nullptr).used_; }  // in floats
    static size_t row_of(const BackwardSizes& n) { return stride_of(elements<E>(n.dim)); }  // elements of a row of q

    E *q, *dy, *stacked_q, *stacked_dy, *k, *turned_k, *turned_v;
    float *own, *lse, *delta, *dq, *dgain;

   private:
    template <class X>
    void take(X*& array, size_t count) {
        array = memory_ ? reinterpret_cast<X*>(memory_ + used_) : nullptr;
        used_ += round_up(count, 16);
    }
    float* memory_;
    size_t used_ = 0;
};

// Gradient of y from that of the context before the gate, g = gate * dcontext: g - (g.w / w.w) w for the token's own
// value w. Adds to `down` the gradient of w: -((g.w) y + (y.w) g - 2 (g.w) (y.w) w / w.w) / w.w. Also writes the context
// again, and returns the gate's gradient.
template <class T, class Out>
PGOLF_INLINE float exclude_back(const Sizes& n, const T* dcontext, const T* y, const T* w, float gate, Out* dy,
                                float* down, T* context) {
    const float square = std::max(dot(w, w, n.dim), kXsaEpsilon);
    const float gw = gate * dot(dcontext, w, n.dim) / square, yw = dot(y, w, n.dim) / square;
    vec dgate{};
    sweep(0, n.dim, [&](size_t i, auto lanes) {
        const vec own = load(w + i, lanes), out = load(y + i, lanes), given = load(dcontext + i, lanes);
        const vec grad = gate * given, kept = out - yw * own;
        dgate += given * kept;
        store(context + i, gate * kept, lanes);
        store(dy + i, grad - gw * own, lanes);
        store(down + i, load(down + i, lanes) - (gw * out + yw * grad - 2 * gw * yw * own), lanes);
    });
    std::fill(dy + n.dim, dy + round_up(n.dim, kWide), Out{});
    return sum(dgate);
}

// Through RoPE and RMS norm: from the gradient of a turned head to that of its projection; returns d gain.
template <class T>
PGOLF_INLINE float normalize_back(const Sizes& n, float* grad, const T* unit, size_t position, float scale, float gain,
                                  float rstd, T* to) {
    turn(n, grad, position, -1, scale, grad);
    const float dgain = dot(grad, unit, n.dim), along = dgain / float(n.dim);
    sweep(0, n.dim, [=](size_t i, auto lanes) {
        store(to + i, rstd * gain * (load(grad + i, lanes) - along * load(unit + i, lanes)), lanes);
    });
    return dgain;
}

template <class T, class E>
void prepare_rows(const BackwardSizes& n, const Workspace<E>& own, const AttentionBackward& io, size_t pair,
                  size_t part) {
    const T *g = static_cast<const T*>(io.dcontext), *q = static_cast<const T*>(io.q), *v = static_cast<const T*>(io.v);
    const T* y = static_cast<const T*>(io.y);
    T* context = static_cast<T*>(io.context);
    const size_t step = own.row_of(n), begin = part * kQueriesBack * n.group;
    const size_t end = std::min(n.rows, begin + kQueriesBack * n.group);
    for (size_t row = begin; row < end; row++) {
        const size_t head = n.q_head(pair, row), at = head * n.dim, position = n.position(row);
        const float scale = n.gain_of(pair, row) / std::sqrt(float(n.dim));
        turn(n, q + at, position, 1, scale, items(own.q + row * step));
        Item<E>* dy = items(own.dy + row * step);
        const float gate = n.gate_of(head);
        float dgate = 0;
        if (n.xsa) {
            float* down = own.own + row / n.group * n.ld;
            if (row % n.group == 0) std::fill(down, down + n.ld, 0.0f);
            const T* value = v + n.k_head(pair, position) * n.dim;
            dgate = exclude_back(n, g + at, y + at, value, gate, dy, down, context + at);
        } else {
            copy_head(n, g + at, dy, gate);
            if (n.gate) {
                dgate = dot(g + at, y + at, n.dim);
                sweep(at, at + n.dim, [=](size_t i, auto lanes) { store(context + i, gate * load(y + i, lanes), lanes); });
            }
        }
        if (n.gate) io.dgate[head] = dgate;
        own.lse[row] = io.lse[n.lse_at(pair, row)];
        own.delta[row] = dot(dy, y + at, n.dim);
    }
    if (end == n.rows) {  // rows that fill a product
        for (E* rows : {own.q, own.dy}) std::fill(rows + n.rows * step, rows + n.padded * step, E{});
        for (float* row : {own.lse, own.delta}) std::fill(row + n.rows, row + n.padded, 0.0f);
    }
    if constexpr (Workspace<E>::kStacked) {
        const size_t at = begin / 2 * n.ld;
        stack(n, end - begin, [&](size_t i) { return items(own.q + (begin + i) * step); }, own.stacked_q + at);
        stack(n, end - begin, [&](size_t i) { return items(own.dy + (begin + i) * step); }, own.stacked_dy + at);
    }
}

template <class T, class E>
void prepare_keys(const BackwardSizes& n, const Workspace<E>& own, const AttentionBackward& io, size_t pair,
                  size_t tile, float* scratch) {
    const T *k = static_cast<const T*>(io.k), *v = static_cast<const T*>(io.v);
    const size_t begin = tile * n.tile, count = std::min(n.tile, n.keys - begin);
    E* rows = reinterpret_cast<E*>(scratch);
    const auto row = [&](size_t i) { return items(rows + i * n.ld); };
    for (size_t i = 0; i < count; i++) turn(n, k + n.k_head(pair, begin + i) * n.dim, begin + i, 1, 1, row(i));
    transpose(n, rows, count, own.turned_k + tile * n.turned_tile());
    stack(n, count, row, own.k + begin / kTerms<E> * n.ld);
    for (size_t i = 0; i < count; i++) copy_head(n, v + n.k_head(pair, begin + i) * n.dim, row(i));
    transpose(n, rows, count, own.turned_v + tile * n.turned_tile());
}

// Replaces a row's scores by probabilities P = e^(score - lse) and dP by P (dP - delta): zero from `count` to `width`.
PGOLF_INLINE void soften_back(float* scores, float* dp, size_t count, size_t width, float lse, float delta) {
    const auto both = [=](size_t i, ivec seen) {
        const vec p = seen ? exp(load(scores + i) - lse) : vec{};
        store(scores + i, p);
        store(dp + i, seen ? p * (load(dp + i) - delta) : vec{});
    };
    const size_t whole = count / kLanes * kLanes;
    for (size_t i = 0; i < whole; i += kLanes) both(i, ivec{} == 0);
    if (whole < width) both(whole, lanes_below(count - whole));
    for (size_t i = whole + kLanes; i < width; i += kLanes) {
        store(scores + i, vec{});
        store(dp + i, vec{});
    }
}

#ifdef PGOLF_AVX512
// The same for two rows: `scores` and `dp` become elements of both rows, and `ds` two rows of items, `ldt` apart.
PGOLF_INLINE void soften_back(float* scores, float* dp, size_t ldt, const size_t* begins, const size_t* ends,
                              size_t width, const float* lse, const float* delta, bf16* ds) {
    for (size_t i = 0; i < width; i += kLanes) {
        vec p[2], down[2];
        for (size_t r = 0; r < 2; r++) {
            const ivec seen = lanes_below(ends[r] > i ? ends[r] - i : 0) & ~lanes_below(begins[r] > i ? begins[r] - i : 0);
            p[r] = seen ? exp(load(scores + r * ldt + i) - lse[r]) : vec{};
            down[r] = seen ? p[r] * (load(dp + r * ldt + i) - delta[r]) : vec{};
        }
        const uvec both = zip(p[0], p[1]), both_down = zip(down[0], down[1]);
        std::memcpy(scores + i, &both, sizeof both);
        std::memcpy(dp + i, &both_down, sizeof both);
        for (size_t r = 0; r < 2; r++) {
            const hvec items = truncate(both_down >> 16 * r);
            std::memcpy(ds + r * ldt + i, &items, sizeof items);
        }
    }
}
#endif

// The products of kRowsBack rows with one tile of keys: adds to dq (rows), dk and dv (keys), each of `ld` columns.
// `scores`, `dp` and, for pairs of bf16, `ds` are scratch.
template <class E>
void attend_back(const BackwardSizes& n, const Workspace<E>& own, size_t pair, size_t tile, size_t row, float* scores,
                 float* dp, [[maybe_unused]] float* ds, float* dq, float* dk, float* dv) {
    const size_t key = tile * n.tile, count = std::min(n.tile, n.keys - key), width = round_up(count, kTall);
    const size_t height = std::min(kRowsBack, n.rows - row), step = own.row_of(n);
    const E *q = own.q + row * step, *dy = own.dy + row * step, *k = own.k + key / kTerms<E> * n.ld;
    const E *turned_k = own.turned_k + tile * n.turned_tile(), *turned_v = own.turned_v + tile * n.turned_tile();
    float *lse = own.lse + row, *delta = own.delta + row;
    const auto seen = [&](size_t r) { return std::min(count, n.position(row + r) + 1 - key); };
    const auto from = [&](size_t r) { return n.skipped(pair, row + r, key, count); };
    for (size_t j = 0; j < count; j += kWide)
        for (size_t r = 0; r < height; r += kTall)
            if (j < seen(r + kTall - 1) && j + kWide > from(r)) {
                const size_t at = r * n.ldt + j;
                multiply_channels(n.dim, q + r * step, step, turned_k + j, n.ldt, scores + at, n.ldt);
                multiply_channels(n.dim, dy + r * step, step, turned_v + j, n.ldt, dp + at, n.ldt);
            }
    // A token that attends to itself alone has a gradient of exactly zero, in whatever order its sums were taken
    for (size_t r = 0; r < height; r++)
        if (n.start(pair, row + r) == n.position(row + r) && seen(r) > from(r)) delta[r] = dp[r * n.ldt + seen(r) - 1];
    // Left operands: dS by rows for dq, dS and P by columns for dk and dv; right ones: rows of q and dy
    const E *ds_rows = reinterpret_cast<E*>(dp), *ds_columns = ds_rows, *p_columns = reinterpret_cast<E*>(scores);
    const E *q_rows = q, *dy_rows = dy;
    size_t ds_step = n.ldt;
#ifdef PGOLF_AVX512
    if constexpr (Workspace<E>::kStacked) {
        for (size_t r = 0; r < height; r += 2) {
            const size_t begins[2] = {from(r), from(r + 1)}, ends[2] = {seen(r), r + 1 < height ? seen(r + 1) : 0};
            soften_back(scores + r * n.ldt, dp + r * n.ldt, n.ldt, begins, ends, width, lse + r, delta + r,
                        reinterpret_cast<bf16*>(ds) + r * n.ldt);
        }
        ds_rows = reinterpret_cast<E*>(ds), ds_step = n.ldt / 2;
        q_rows = own.stacked_q + row / 2 * n.ld, dy_rows = own.stacked_dy + row / 2 * n.ld;
    } else
#endif
        for (size_t r = 0; r < height; r++) {
            const size_t begin = from(r), at = r * n.ldt + begin;
            for (float* each : {scores, dp}) std::fill(each + r * n.ldt, each + at, 0.0f);
            soften_back(scores + at, dp + at, seen(r) - begin, width - begin, lse[r], delta[r]);
        }
    for (size_t i = 0; i < n.dim; i += kWide) {
        for (size_t r = 0; r < height; r += kTall)
            if (const size_t low = from(r) / kTerms<E>; from(r) < count)
                multiply<false, true>(elements<E>(seen(r + kTall - 1)) - low, ds_rows + r * ds_step + low, ds_step,
                                      k + low * n.ld + i, n.ld, dq + r * n.ld + i, n.ld);
        for (size_t j = 0; j < count; j += kTall) {
            const size_t top = std::max(row, n.row_from(key + j)) - row;
            if (top >= height) break;
            const size_t depth = elements<E>(height - top), to = j * n.ld + i;
            const size_t at = top * n.ldt + j, right = top / kTerms<E> * n.ld + i, lda = kTerms<E> * n.ldt;
            multiply<true, true>(depth, ds_columns + at, lda, q_rows + right, n.ld, dk + to, n.ld);
            multiply<true, true>(depth, p_columns + at, lda, dy_rows + right, n.ld, dv + to, n.ld);
        }
    }
}

// One block of keys: writes their dk and dv and the block's part of dq.
template <class T, class E>
void backward_block(const BackwardSizes& n, const Workspace<E>& own, const AttentionBackward& io, size_t pair,
                    size_t which, float* scratch) {
    const T* k = static_cast<const T*>(io.k);
    T *to_k = static_cast<T*>(io.dk), *to_v = static_cast<T*>(io.dv);
    float *dk = scratch, *dv = dk + n.tile * n.ld, *scores = dv + n.tile * n.ld, *dp = scores + kRowsBack * n.ldt;
    float *ds = dp + kRowsBack * n.ldt, *dq = own.dq + which * n.padded * n.ld;
    const size_t begin = which * n.block, end = std::min(n.tiles, begin + n.block);
    std::fill(dq + n.row_from(begin * n.tile) * n.ld, dq + n.padded * n.ld, 0.0f);
    for (size_t tile = begin; tile < end; tile++) {
        std::fill(dk, dk + 2 * n.tile * n.ld, 0.0f);
        const size_t stop = (tile + 1) * n.tile;  // no row of a segment after the tile's keys attends to them
        for (size_t row = n.row_from(tile * n.tile); row < n.rows && n.start(pair, row) < stop; row += kRowsBack)
            attend_back(n, own, pair, tile, row, scores, dp, ds, dq + row * n.ld, dk, dv);
        for (size_t key = tile * n.tile, i = 0; i < n.tile && key < n.keys; i++, key++) {
            const size_t head = n.k_head(pair, key), at = head * n.dim;
            float *from_k = dk + i * n.ld, *from_v = dv + i * n.ld;
            normalize_back(n, from_k, k + at, key, 1, 1, io.k_rstd[head], to_k + at);
            const float* more = n.xsa && key >= n.first ? own.own + (key - n.first) * n.ld : nullptr;
            sweep(0, n.dim, [=](size_t c, auto lanes) {
                const vec grad = load(from_v + c, lanes);
                store(to_v + at + c, more ? grad + load(more + c, lanes) : grad, lanes);
            });
        }
    }
}

// Sums the parts of dq in the order of the blocks and finishes it.
template <class T, class E>
void finish_rows(const BackwardSizes& n, const Workspace<E>& own, const AttentionBackward& io, size_t pair, size_t part,
                 float* grad) {
    const T* q = static_cast<const T*>(io.q);
    T* to = static_cast<T*>(io.dq);
    float* dgain = own.dgain + part * n.group;
    std::fill(dgain, dgain + n.group, 0.0f);
    const size_t end = std::min(n.rows, (part + 1) * kQueriesBack * n.group);
    for (size_t row = part * kQueriesBack * n.group; row < end; row++) {
        const size_t head = n.q_head(pair, row), at = head * n.dim;
        std::fill(grad, grad + n.ld, 0.0f);
        for (size_t which = 0; which < n.key_blocks && n.row_from(which * n.block * n.tile) <= row; which++) {
            const float* from = own.dq + (which * n.padded + row) * n.ld;
            for (size_t i = 0; i < n.ld; i += kLanes) store(grad + i, load(grad + i) + load(from + i));
        }
        dgain[row % n.group] += normalize_back(n, grad, q + at, n.position(row), 1 / std::sqrt(float(n.dim)),
                                               n.gain_of(pair, row), io.q_rstd[head], to + at);
    }
}

template <class T>
void attention_backward_as(const AttentionShape& shape, const AttentionBackward& io, size_t threads) {
    using Space = Workspace<Element<T>>;
    const BackwardSizes n(shape);
    const size_t size = Space::size(n), scratch = 2 * n.tile * n.ld + (2 + Space::kStacked) * kRowsBack * n.ldt;
    const Floats dgain(n.pairs * n.parts * n.group);
    const auto keep = [&](size_t pair, const Space& own) {
        std::copy_n(own.dgain, n.parts * n.group, dgain + pair * n.parts * n.group);
    };
    if (n.pairs >= kEnoughPairs) {  // what a pair needs stays in the caches
        share(n.pairs, threads, size + scratch, [&](size_t pair, float* memory) {
            const Space own(n, memory);
            float* rest = memory + size;
            for (size_t i = 0; i < n.parts; i++) prepare_rows<T>(n, own, io, pair, i);
            for (size_t i = 0; i < n.tiles; i++) prepare_keys<T>(n, own, io, pair, i, rest);
            for (size_t i = 0; i < n.key_blocks; i++) backward_block<T>(n, own, io, pair, i, rest);
            for (size_t i = 0; i < n.parts; i++) finish_rows<T>(n, own, io, pair, i, rest);
            keep(pair, own);
        });
    } else {
        const Floats memory(n.pairs * size);
        const auto of = [&](size_t pair) { return Space(n, memory + pair * size); };
        const size_t parts = n.pairs * n.parts;
        share(parts, threads, 0, [&](size_t i, float*) {
            prepare_rows<T>(n, of(i / n.parts), io, i / n.parts, i % n.parts);
        });
        share(n.pairs * n.tiles, threads, scratch, [&](size_t i, float* rest) {
            prepare_keys<T>(n, of(i / n.tiles), io, i / n.tiles, i % n.tiles, rest);
        });
        share(n.pairs * n.key_blocks, threads, scratch, [&](size_t i, float* rest) {
            backward_block<T>(n, of(i % n.pairs), io, i % n.pairs, i / n.pairs, rest);  // the longest first
        });
        share(parts, threads, scratch, [&](size_t i, float* rest) {
            finish_rows<T>(n, of(i / n.parts), io, i / n.parts, i % n.parts, rest);
        });
        for (size_t pair = 0; pair < n.pairs; pair++) keep(pair, of(pair));
    }
    std::fill(io.dgain, io.dgain + n.heads, 0.0f);
    for (size_t i = 0; i < n.pairs * n.parts * n.group; i++)
        io.dgain[i / n.group / n.parts % n.kv_heads * n.group + i % n.group] += dgain[i];
}

void attention_backward(Type type, const AttentionShape& shape, const AttentionBackward& io, size_t threads) {
    (type == Type::f32 ? attention_backward_as<float> : attention_backward_as<bf16>)(shape, io, threads);
}
