// Attention of each text's newest position to its cached keys and values, for decoding; norm, RoPE, softmax and XSA
// are those of attention.h. No include guard, as in simd.h.

constexpr size_t kCached = 8;  // cached values added to a vector of sums between its load and its store

void decode_attention(const AttentionShape& shape, const DecodeAttention& io, size_t threads) {
    const Sizes n(shape, kKeys);
    const size_t dim = n.dim, last = n.keys - 1;
    share(n.pairs, threads, 2 * n.ld + n.keys + kLanes, [&](size_t pair, float* scratch) {
        const size_t head = pair % n.kv_heads, cache = pair * io.positions * dim;
        float* qkv = io.qkv + pair / n.kv_heads * (n.heads + 2 * n.kv_heads) * dim;
        float *k = qkv + (n.heads + head) * dim, *turned = scratch, *sums = turned + n.ld, *scores = sums + n.ld;
        float *keys = io.keys + cache, *values = io.values + cache, *own = values + last * dim;
        const float *v = k + n.kv_heads * dim, *more = io.value_embed ? io.value_embed + pair * dim : nullptr;
        normalize(k, dim);
        turn(n, k, last, 1, 1, turned);
        std::copy_n(turned, dim, keys + last * dim);
        sweep(0, dim, [=](size_t i, auto lanes) {
            store(own + i, more ? load(v + i, lanes) + load(more + i, lanes) : load(v + i, lanes), lanes);
        });
        for (size_t row = 0; row < n.group; row++) {
            float *q = qkv + (head * n.group + row) * dim, *y = io.context + n.q_head(pair, row) * dim;
            normalize(q, dim);
            turn(n, q, last, 1, n.gain_of(pair, row) / std::sqrt(float(dim)), turned);
            for (size_t key = 0; key < n.keys; key++) scores[key] = dot(turned, keys + key * dim, dim);
            Softmax state;
            soften<float>(scores, 0, 0, n.keys, n.keys, state);
            std::fill_n(sums, dim, 0.0f);
            for (size_t key = 0; key < n.keys; key += kCached) {
                const size_t end = std::min(n.keys, key + kCached);
                sweep(0, dim, [=](size_t i, auto lanes) {
                    vec total = load(sums + i, lanes);
                    for (size_t at = key; at < end; at++) total += scores[at] * load(values + at * dim + i, lanes);
                    store(sums + i, total, lanes);
                });
            }
            finish(n, sums, state.total, own, n.gate_of(n.q_head(pair, row)), y, y);
        }
    });
}
