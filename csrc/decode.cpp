#include "decode.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "int6_matmul.h"

// Inlined in two functions, of which one is compiled for AVX2.
#define PGOLF_INLINE __attribute__((always_inline)) inline
#if defined(__x86_64__)
#define PGOLF_FMA __attribute__((target("avx2,fma")))
#else
#define PGOLF_FMA
#endif

namespace pgolf {
namespace {

PGOLF_INLINE float dot(const float* a, const float* b, size_t count) {
    float lanes[8] = {}, rest = 0;  // eight sums, which compilers vectorize
    size_t k = 0;
    for (; k + 8 <= count; k += 8)
        for (size_t i = 0; i < 8; i++) lanes[i] += a[k + i] * b[k + i];
    for (; k < count; k++) rest += a[k] * b[k];
    for (float lane : lanes) rest += lane;
    return rest;
}

PGOLF_INLINE void scale_to(const float* x, float factor, size_t count, float* y) {
    for (size_t i = 0; i < count; i++) y[i] = x[i] * factor;
}

// RMS norm of a head, RoPE on its first 2 * half channels, and its gain.
PGOLF_INLINE void turn(const float* x, size_t width, const DecodeBlock& b, float gain, float* y) {
    scale_to(x, 1 / std::sqrt(dot(x, x, width) / float(width) + b.eps), width, y);
    for (size_t i = 0; i < b.half; i++) {
        const float first = y[i], second = y[b.half + i];
        y[i] = first * b.cos[i] + second * b.sin[i];
        y[b.half + i] = second * b.cos[i] - first * b.sin[i];
    }
    scale_to(y, gain, width, y);
}

// Attention of the query heads that share KV head `kv` of text `t`: qkv is the text's row, context its result.
PGOLF_INLINE void attend(const DecodeBlock& b, size_t t, size_t kv, const float* qkv, float* context) {
    const size_t width = b.dim / b.heads, group = b.heads / b.kv_heads, kv_dim = b.kv_heads * width;
    const size_t place = (t * b.kv_heads + kv) * b.positions * width, last = b.position * width, count = b.position + 1;
    float *keys = b.keys + place, *values = b.values + place, *value = values + last;
    turn(qkv + b.dim + kv * width, width, b, 1, keys + last);
    for (size_t i = 0; i < width; i++) {
        const float more = b.value_embed ? b.value_embed[t * kv_dim + kv * width + i] : 0;
        value[i] = qkv[b.dim + kv_dim + kv * width + i] + more;
    }
    const float root = 1 / std::sqrt(float(width)), norm = std::max(std::sqrt(dot(value, value, width)), 1e-12f);
    std::vector<float> query(width), weights(count);
    for (size_t h = kv * group; h < (kv + 1) * group; h++) {
        turn(qkv + h * width, width, b, b.gain[h], query.data());
        for (size_t p = 0; p < count; p++) weights[p] = root * dot(query.data(), keys + p * width, width);
        const float largest = *std::max_element(weights.begin(), weights.end());
        float sum = 0;
        float* y = context + h * width;
        std::fill_n(y, width, 0.0f);
        for (size_t p = 0; p < count; p++) {
            const float weight = std::exp(weights[p] - largest);
            sum += weight;
            for (size_t i = 0; i < width; i++) y[i] += weight * values[p * width + i];
        }
        scale_to(y, 1 / sum, width, y);
        if (!b.xsa) continue;
        const float along = dot(y, value, width) / (norm * norm);
        for (size_t i = 0; i < width; i++) y[i] -= along * value[i];
    }
}

void attend_portable(const DecodeBlock& b, size_t t, size_t kv, const float* qkv, float* context) {
    attend(b, t, kv, qkv, context);
}

PGOLF_FMA void attend_avx2(const DecodeBlock& b, size_t t, size_t kv, const float* qkv, float* context) {
    attend(b, t, kv, qkv, context);
}

}  // namespace

void decode_block(const DecodeBlock& b, float* x, const float* x0, size_t threads, bool simd) {
    const size_t dim = b.dim, width = dim / b.heads, in_rows = dim + 2 * b.kv_heads * width;
    const BitsOptions options{threads, simd};
    const auto attend_one = simd && int6_simd() ? attend_avx2 : attend_portable;
    std::vector<float> normed(b.batch * dim), branch(b.batch * dim), wide(b.batch * std::max(in_rows, b.up_rows)),
        hidden(b.batch * b.hidden);
    const auto norm = [&] {
        for (size_t t = 0; t < b.batch; t++) {
            const float* row = x + t * dim;
            const float rms = std::sqrt(dot(row, row, dim) / float(dim) + b.eps);
            scale_to(row, b.layer_scale / rms, dim, normed.data() + t * dim);
        }
    };
    const auto add_branch = [&](const float* scale) {
        for (size_t i = 0; i < b.batch * dim; i++) x[i] += scale[i % dim] * branch[i];
    };
    for (size_t i = 0; i < b.batch * dim; i++) x[i] = b.x_mix[i % dim] * x[i] + b.x0_mix[i % dim] * x0[i];
    norm();
    int6_matmul(normed.data(), b.batch, dim, b.attention.codes, b.attention.scale, in_rows, wide.data(), options);
    const bool many = b.batch * dim * (b.position + 1) >= kSharedWork;
    run_on_pool(b.batch * b.kv_heads, many ? threads : 1, [&](size_t i) {
        const size_t t = i / b.kv_heads;
        attend_one(b, t, i % b.kv_heads, wide.data() + t * in_rows, normed.data() + t * dim);
    });
    const uint8_t* out = b.attention.codes + in_rows * packed_row_bytes(dim, 6);
    int6_matmul(normed.data(), b.batch, dim, out, b.attention.scale + in_rows, dim, branch.data(), options);
    add_branch(b.attention_scale);
    norm();
    int6_matmul(normed.data(), b.batch, dim, b.up.codes, b.up.scale, b.up_rows, wide.data(), options);
    passes().activate(Type::f32, wide.data(), hidden.data(), b.batch * b.hidden, b.activation, 1);
    int6_matmul(hidden.data(), b.batch, b.hidden, b.down.codes, b.down.scale, dim, branch.data(), options);
    add_branch(b.mlp_scale);
}

}  // namespace pgolf
