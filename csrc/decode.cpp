#include "decode.h"

#include <algorithm>
#include <vector>

#include "int6_matmul.h"

namespace pgolf {

void decode_block(const DecodeBlock& b, float* x, const float* x0, size_t threads, bool simd) {
    const size_t dim = b.dim, width = dim / b.heads, in_rows = dim + 2 * b.kv_heads * width;
    const BitsOptions options{threads, simd};
    const Passes& run = passes();
    std::vector<float> normed(b.batch * dim), branch(b.batch * dim), wide(b.batch * std::max(in_rows, b.up_rows)),
        hidden(b.batch * b.hidden), rstd(b.batch);
    const auto mix = [&](const float* x_scale, const float* added, const float* scale) {
        run.residual_norm(Type::f32,
                          {x, added, x_scale, scale, x, normed.data(), rstd.data(), b.batch, dim, b.layer_scale}, 1);
    };
    mix(b.x_mix, x0, b.x0_mix);
    int6_matmul(normed.data(), b.batch, dim, b.attention.codes, b.attention.scale, in_rows, wide.data(), options);
    const bool many = b.batch * dim * (b.position + 1) >= kSharedWork;
    run.decode_attention({b.batch, 1, b.position + 1, b.heads, b.kv_heads, width, b.half, b.xsa, b.gain, b.cos, b.sin},
                         {wide.data(), b.value_embed, b.keys, b.values, normed.data(), b.positions},
                         many ? threads : 1);
    const uint8_t* out = b.attention.codes + in_rows * packed_row_bytes(dim, 6);
    int6_matmul(normed.data(), b.batch, dim, out, b.attention.scale + in_rows, dim, branch.data(), options);
    mix(nullptr, branch.data(), b.attention_scale);
    int6_matmul(normed.data(), b.batch, dim, b.up.codes, b.up.scale, b.up_rows, wide.data(), options);
    run.activate(Type::f32, wide.data(), hidden.data(), b.batch * b.hidden, b.activation, 1);
    int6_matmul(hidden.data(), b.batch, b.hidden, b.down.codes, b.down.scale, dim, branch.data(), options);
    mix(nullptr, branch.data(), b.mlp_scale);
}

}  // namespace pgolf
