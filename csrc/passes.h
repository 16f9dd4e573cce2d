// Fused CPU passes: one table of functions for each instruction set, of which the best one is chosen at run time.
// Every pass is a header of its own that is compiled once for each set (passes_<set>.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace pgolf {

struct bf16 {
    uint16_t bits;
};

enum class Type { f32, bf16 };
enum class Activation { leaky_relu_squared, relu_squared, swiglu };

// Causal attention of the last `queries` of `keys` positions. Heads have `dim` channels; the first 2 * `turned` rotate.
// `gate` (batch, queries, heads) multiplies heads of the context, and `starts` (batch, keys) is the first position that
// each position attends to: nondecreasing and not after the position. Both may be null.
struct AttentionShape {
    size_t batch, queries, keys, heads, kv_heads, dim, turned;
    bool xsa;
    const float *gain, *cos, *sin;  // (heads), (keys, turned), (keys, turned)
    const float* gate = nullptr;
    const int32_t* starts = nullptr;
};

// Arrays of heads are (batch, positions, heads, dim) in the pass's type; all others are float32.
struct AttentionForward {
    void *q, *k;  // projections; the pass normalizes them in place
    const void* v;
    void *y, *context;             // before and after XSA and gate; `context` is not used without either
    float *q_rstd, *k_rstd, *lse;  // 1 / RMS of each head; logsumexp (batch, heads, queries)
};

struct AttentionBackward {
    const void *dcontext, *q, *k, *v, *y;  // q and k normalized
    const float *q_rstd, *k_rstd, *lse;
    void *context, *dq, *dk, *dv;  // the context again, with XSA or gate only; gradients of the projections
    float *dgain, *dgate = nullptr;
};

// All float32. `qkv` (batch, heads + 2 kv_heads, dim) is a row of projections for each text; the pass overwrites it.
struct DecodeAttention {
    float* qkv;
    const float* value_embed;  // (batch, kv_heads, dim), added to v, or null
    float *keys, *values;      // (batch, kv_heads, positions, dim); the pass writes those of the newest position
    float* context;            // (batch, heads, dim)
    size_t positions;
};

struct SoftcapLoss {
    float softcap, z_loss;
    bool gradient;  // of each row's loss, written over the row's logits
};

// mixed = x_scale * x + branch_scale * branch and normed = scale * rms_norm(mixed), rows of `width`. A null x_scale is
// 1; with a null branch, mixed is x and is not written.
struct ResidualNorm {
    const void *x, *branch;
    const float *x_scale, *branch_scale;
    void *mixed, *normed;
    float* rstd;  // (rows)
    size_t rows, width;
    float scale;
};

// `sums` holds, for each block of kSumRows rows, the gradient of branch_scale (width) and then that of x_scale, if not
// null; it starts with zeros.
struct ResidualNormBackward {
    const void *dmixed, *dnormed, *x, *branch, *mixed;
    const float *x_scale, *branch_scale, *rstd;
    void *dx, *dbranch;
    float* sums;
    size_t rows, width;
    float scale;
};

struct Sequences {
    size_t count, length, width;
};

// Sums over rows are taken in blocks of this size, whatever the number of threads, and added up in float64. With 128,
// the float32 sums of a block were less accurate than PyTorch's.
constexpr size_t kSumRows = 32;

// `threads` is the most threads that a pass may use (0: one per core); no result depends on it.
struct Passes {
    const char* name;
    // hidden (count) from pre (count, or 2 * count alternating gate and up for swiglu).
    void (*activate)(Type, const void* pre, void* hidden, size_t count, Activation, size_t threads);
    // Gradient of pre from that of hidden; also writes hidden again.
    void (*activate_backward)(Type, const void* dhidden, const void* pre, void* dpre, void* hidden, size_t count,
                              Activation, size_t threads);
    // alpha x x^T + beta add (count, rows, rows) of x (count, rows, columns); add is symmetric, or null.
    void (*symmetric_product)(Type, const void* x, const void* add, void* out, float alpha, float beta, size_t count,
                              size_t rows, size_t columns, size_t threads);
    void (*attention)(Type, const AttentionShape&, const AttentionForward&, size_t threads);
    void (*attention_backward)(Type, const AttentionShape&, const AttentionBackward&, size_t threads);
    // For one query, the newest of `keys` positions.
    void (*decode_attention)(const AttentionShape&, const DecodeAttention&, size_t threads);
    // Losses and logsumexps (rows) of logits (rows, vocab) before the softcap; the logits become d loss / d logits if
    // asked for, and stay as they are otherwise.
    void (*softcap_loss)(Type, void* logits, const int64_t* targets, size_t rows, size_t vocab, const SoftcapLoss&,
                         float* loss, float* logsumexp, size_t threads);
    void (*residual_norm)(Type, const ResidualNorm&, size_t threads);
    void (*residual_norm_backward)(Type, const ResidualNormBackward&, size_t threads);
    // `gate` (width) is after the sigmoid; `sums` (width) for each block of kSumRows rows, of dout * (x_{t-1} - x_t).
    void (*smear_gate)(Type, const void* x, const float* gate, void* out, const Sequences&, size_t threads);
    void (*smear_gate_backward)(Type, const void* dout, const void* x, const float* gate, void* dx, float* sums,
                                const Sequences&, size_t threads);
};

extern const Passes passes_portable, passes_avx2, passes_avx512;

// Returns the table in use: the best that this CPU can run, or the one given to `choose_passes`.
const Passes& passes();
// Uses the table of that name, or the best one for "auto"; returns false if this CPU cannot run it.
bool choose_passes(const std::string& name);
// Names of the tables that this CPU can run, best first.
std::vector<std::string> runnable_passes();

}  // namespace pgolf
