// Gradient of the attention in attention.h, included before; scores are computed again, tile by tile. No include guard,
// as in simd.h.

constexpr size_t kKeysBack = 96, kRowsBack = 48;  // keys and rows in a tile: multiples of kTall, and keys of kWide
constexpr size_t kQueriesBack = 32;               // queries whose rows one thread prepares or finishes at a time
constexpr size_t kEnoughPairs = 32;               // with fewer pairs, keys are divided into blocks, for more threads

// What backward computes before its products, and the part of dq that comes from each block of keys.
struct Workspace : Sizes {
    explicit Workspace(const AttentionShape& shape)
        : Sizes(shape, kKeysBack),
          block(pairs >= kEnoughPairs ? tiles : std::max<size_t>(4, (tiles + 7) / 8)),
          blocks((tiles + block - 1) / std::max<size_t>(1, block)),
          parts((queries + kQueriesBack - 1) / kQueriesBack),
          padded(rows + kTall),
          q(pairs * padded * ld),
          dy(pairs * padded * ld),
          k(pairs * tiles * tile * ld),
          turned_k(pairs * tiles * turned_tile()),
          turned_v(pairs * tiles * turned_tile()),
          own(xsa ? pairs * queries * ld : 0),
          lse(pairs * padded),
          delta(pairs * padded),
          dq(pairs * blocks * padded * ld),
          dgain(pairs * parts * group) {}
    const size_t block, blocks, parts, padded;  // a block is `block` tiles
    const Floats q, dy, k, turned_k, turned_v, own, lse, delta, dq, dgain;

    // The first row that attends to a key.
    size_t row_from(size_t key) const { return key < first ? 0 : (key - first) * group; }
    float* part_of_dq(size_t pair, size_t which) const { return dq + (pair * blocks + which) * padded * ld; }
    float* own_of(size_t pair, size_t query) const { return own + (pair * queries + query) * ld; }
};

// Gradient of y from that of the context before the gate, g = gate * dcontext: g - (g.w / w.w) w for the token's own
// value w; `dy` holds g and receives it. Adds to `down` the gradient of w: -((g.w) y + (y.w) g - 2 (g.w) (y.w) w / w.w) /
// w.w. Also writes the context again, and returns the gate's gradient.
template <class T>
PGOLF_INLINE float exclude_back(const Sizes& n, const T* dcontext, const T* y, const T* w, float gate, float* dy,
                                float* down, T* context) {
    const float square = std::max(dot(w, w, n.dim), kXsaEpsilon);
    const float gw = dot(dy, w, n.dim) / square, yw = dot(y, w, n.dim) / square;
    vec dgate{};
    sweep(0, n.dim, [&](size_t i, auto lanes) {
        const vec own = load(w + i, lanes), out = load(y + i, lanes), grad = load(dy + i, lanes);
        const vec kept = out - yw * own;
        dgate += load(dcontext + i, lanes) * kept;
        store(context + i, gate * kept, lanes);
        store(dy + i, grad - gw * own, lanes);
        store(down + i, load(down + i, lanes) - (gw * out + yw * grad - 2 * gw * yw * own), lanes);
    });
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

// dy.y summed in the order of `multiply_channels`: a token that attends to itself alone has a gradient of exactly zero.
template <class T>
PGOLF_INLINE float delta_of(const Sizes& n, const float* dy, const T* y) {
    float total = 0;
    for (size_t begin = 0; begin < n.dim; begin += kDepth) {
        float part = 0;
        for (size_t i = begin; i < std::min(n.dim, begin + kDepth); i++) part += dy[i] * load(y + i, Part{1})[0];
        total += part;
    }
    return total;
}

template <class T>
void prepare_rows(const Workspace& n, const AttentionBackward& io, size_t pair, size_t part) {
    const T *g = static_cast<const T*>(io.dcontext), *q = static_cast<const T*>(io.q), *v = static_cast<const T*>(io.v);
    const T* y = static_cast<const T*>(io.y);
    T* context = static_cast<T*>(io.context);
    const size_t end = std::min(n.rows, (part + 1) * kQueriesBack * n.group);
    for (size_t row = part * kQueriesBack * n.group; row < end; row++) {
        const size_t head = n.q_head(pair, row), at = head * n.dim, here = pair * n.padded + row;
        const size_t position = n.position(row);
        turn(n, q + at, position, 1, n.gain_of(pair, row) / std::sqrt(float(n.dim)), n.q + here * n.ld);
        const float gate = n.gate_of(head);
        float *dy = n.dy + here * n.ld, dgate = 0;
        widen(n, g + at, dy, gate);
        if (n.xsa) {
            float* down = n.own_of(pair, row / n.group);
            if (row % n.group == 0) std::fill(down, down + n.ld, 0.0f);
            const T* own = v + n.k_head(pair, position) * n.dim;
            dgate = exclude_back(n, g + at, y + at, own, gate, dy, down, context + at);
        } else if (n.gate) {
            dgate = dot(g + at, y + at, n.dim);
            sweep(at, at + n.dim, [=](size_t i, auto lanes) { store(context + i, gate * load(y + i, lanes), lanes); });
        }
        if (n.gate) io.dgate[head] = dgate;
        n.lse[here] = io.lse[n.lse_at(pair, row)];
        n.delta[here] = delta_of(n, dy, y + at);
    }
    if (end < n.rows) return;
    const size_t begin = pair * n.padded + n.rows, stop = (pair + 1) * n.padded;  // rows that fill a product
    for (const Floats* each : {&n.q, &n.dy}) std::fill(*each + begin * n.ld, *each + stop * n.ld, 0.0f);
    for (const Floats* each : {&n.lse, &n.delta}) std::fill(*each + begin, *each + stop, 0.0f);
}

template <class T>
void prepare_keys(const Workspace& n, const AttentionBackward& io, size_t item, float* values) {
    const T *k = static_cast<const T*>(io.k), *v = static_cast<const T*>(io.v);
    const size_t pair = item / n.tiles, begin = item % n.tiles * n.tile, count = std::min(n.tile, n.keys - begin);
    float* turned = n.k + item * n.tile * n.ld;
    for (size_t i = 0; i < count; i++) {
        const size_t at = n.k_head(pair, begin + i) * n.dim;
        turn(n, k + at, begin + i, 1, 1, turned + i * n.ld);
        widen(n, v + at, values + i * n.ld);
    }
    transpose(n, turned, count, n.turned_k + item * n.turned_tile());
    transpose(n, values, count, n.turned_v + item * n.turned_tile());
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

// The products of kRowsBack rows with one tile of keys: adds to dq (rows), dk and dv (keys), each of `ld` columns.
inline void attend_back(const Workspace& n, size_t pair, size_t which, size_t row, float* scores, float* dp, float* dq,
                        float* dk, float* dv) {
    const size_t key = which * n.tile, count = std::min(n.tile, n.keys - key), item = pair * n.tiles + which;
    const size_t height = std::min(kRowsBack, n.rows - row), here = pair * n.padded + row;
    const float *q = n.q + here * n.ld, *dy = n.dy + here * n.ld, *k = n.k + item * n.tile * n.ld;
    const float *turned_k = n.turned_k + item * n.turned_tile(), *turned_v = n.turned_v + item * n.turned_tile();
    const auto seen = [&](size_t r) { return std::min(count, n.position(row + r) + 1 - key); };
    const auto from = [&](size_t r) { return n.skipped(pair, row + r, key, count); };
    for (size_t j = 0; j < count; j += kWide)
        for (size_t r = 0; r < height; r += kTall)
            if (j < seen(r + kTall - 1) && j + kWide > from(r)) {
                const size_t at = r * n.ldt + j;
                multiply_channels(n.dim, q + r * n.ld, n.ld, turned_k + j, n.ldt, scores + at, n.ldt);
                multiply_channels(n.dim, dy + r * n.ld, n.ld, turned_v + j, n.ldt, dp + at, n.ldt);
            }
    for (size_t r = 0; r < height; r++) {
        const size_t begin = from(r), at = r * n.ldt + begin;
        for (float* each : {scores, dp}) std::fill(each + r * n.ldt, each + at, 0.0f);
        soften_back(scores + at, dp + at, seen(r) - begin, round_up(count, kTall) - begin, n.lse[here + r],
                    n.delta[here + r]);
    }
    for (size_t i = 0; i < n.dim; i += kWide) {
        for (size_t r = 0; r < height; r += kTall)
            if (const size_t begin = from(r); begin < count)
                multiply<false, true>(seen(r + kTall - 1) - begin, dp + r * n.ldt + begin, n.ldt, k + begin * n.ld + i,
                                      n.ld, dq + r * n.ld + i, n.ld);
        for (size_t j = 0; j < count; j += kTall) {
            const size_t top = std::max(row, n.row_from(key + j)) - row;
            if (top >= height) break;
            const size_t at = top * n.ldt + j, right = top * n.ld + i, to = j * n.ld + i;
            multiply<true, true>(height - top, dp + at, n.ldt, q + right, n.ld, dk + to, n.ld);
            multiply<true, true>(height - top, scores + at, n.ldt, dy + right, n.ld, dv + to, n.ld);
        }
    }
}

// One block of keys of a pair: writes their dk and dv and the block's part of dq.
template <class T>
void backward_block(const Workspace& n, const AttentionBackward& io, size_t pair, size_t which, float* scratch) {
    const T* k = static_cast<const T*>(io.k);
    T *to_k = static_cast<T*>(io.dk), *to_v = static_cast<T*>(io.dv);
    float *dk = scratch, *dv = dk + n.tile * n.ld, *scores = dv + n.tile * n.ld, *dp = scores + kRowsBack * n.ldt;
    float* dq = n.part_of_dq(pair, which);
    const size_t begin = which * n.block, end = std::min(n.tiles, begin + n.block);
    std::fill(dq + n.row_from(begin * n.tile) * n.ld, dq + n.padded * n.ld, 0.0f);
    for (size_t tile = begin; tile < end; tile++) {
        std::fill(dk, dk + 2 * n.tile * n.ld, 0.0f);
        const size_t stop = (tile + 1) * n.tile;  // no row of a segment after the tile's keys attends to them
        for (size_t row = n.row_from(tile * n.tile); row < n.rows && n.start(pair, row) < stop; row += kRowsBack)
            attend_back(n, pair, tile, row, scores, dp, dq + row * n.ld, dk, dv);
        for (size_t key = tile * n.tile, i = 0; i < n.tile && key < n.keys; i++, key++) {
            const size_t head = n.k_head(pair, key), at = head * n.dim;
            float *from_k = dk + i * n.ld, *from_v = dv + i * n.ld;
            normalize_back(n, from_k, k + at, key, 1, 1, io.k_rstd[head], to_k + at);
            const float* own = n.xsa && key >= n.first ? n.own_of(pair, key - n.first) : nullptr;
            sweep(0, n.dim, [=](size_t c, auto lanes) {
                const vec grad = load(from_v + c, lanes);
                store(to_v + at + c, own ? grad + load(own + c, lanes) : grad, lanes);
            });
        }
    }
}

// Sums the parts of dq in the order of the blocks and finishes it.
template <class T>
void finish_rows(const Workspace& n, const AttentionBackward& io, size_t pair, size_t part, float* grad) {
    const T* q = static_cast<const T*>(io.q);
    T* to = static_cast<T*>(io.dq);
    float* dgain = n.dgain + (pair * n.parts + part) * n.group;
    std::fill(dgain, dgain + n.group, 0.0f);
    const size_t end = std::min(n.rows, (part + 1) * kQueriesBack * n.group);
    for (size_t row = part * kQueriesBack * n.group; row < end; row++) {
        const size_t head = n.q_head(pair, row), at = head * n.dim;
        std::fill(grad, grad + n.ld, 0.0f);
        for (size_t which = 0; which < n.blocks && n.row_from(which * n.block * n.tile) <= row; which++) {
            const float* from = n.part_of_dq(pair, which) + row * n.ld;
            for (size_t i = 0; i < n.ld; i += kLanes) store(grad + i, load(grad + i) + load(from + i));
        }
        dgain[row % n.group] += normalize_back(n, grad, q + at, n.position(row), 1 / std::sqrt(float(n.dim)),
                                               n.gain_of(pair, row), io.q_rstd[head], to + at);
    }
}

template <class T>
void attention_backward_as(const AttentionShape& shape, const AttentionBackward& io, size_t threads) {
    const Workspace n(shape);
    share(n.pairs * n.parts, threads, 0, [&](size_t i, float*) { prepare_rows<T>(n, io, i / n.parts, i % n.parts); });
    share(n.pairs * n.tiles, threads, n.tile * n.ld, [&](size_t i, float* own) { prepare_keys<T>(n, io, i, own); });
    share(n.pairs * n.blocks, threads, 2 * n.tile * n.ld + 2 * kRowsBack * n.ldt, [&](size_t i, float* own) {
        backward_block<T>(n, io, i % n.pairs, i / n.pairs, own);  // the longest first
    });
    share(n.pairs * n.parts, threads, n.ld, [&](size_t i, float* own) {
        finish_rows<T>(n, io, i / n.parts, i % n.parts, own);
    });
    std::fill(io.dgain, io.dgain + n.heads, 0.0f);
    for (size_t i = 0; i < n.pairs * n.parts * n.group; i++)
        io.dgain[i / n.group / n.parts % n.kv_heads * n.group + i % n.group] += n.dgain[i];
}

void attention_backward(Type type, const AttentionShape& shape, const AttentionBackward& io, size_t threads) {
    (type == Type::f32 ? attention_backward_as<float> : attention_backward_as<bf16>)(shape, io, threads);
}
