// Every fused pass, for one instruction set. passes_<set>.cpp includes this inside the set's namespace, after the
// standard headers, PGOLF_LANES and the compiler's target. No include guard, as in simd.h.
#include "simd.h"

#include "activation.h"
#include "attention.h"
#include "attention_backward.h"
#include "decode_attention.h"
#include "symmetric.h"
#include "residual_norm.h"
#include "smear_gate.h"
#include "softcap_loss.h"

constexpr Passes table(const char* name) {
    Passes all{};
    all.name = name;
    all.activate = activate;
    all.activate_backward = activate_backward;
    all.symmetric_product = symmetric_product;
    all.attention = attention;
    all.attention_backward = attention_backward;
    all.decode_attention = decode_attention;
    all.softcap_loss = softcap_loss;
    all.residual_norm = residual_norm;
    all.residual_norm_backward = residual_norm_backward;
    all.smear_gate = smear_gate;
    all.smear_gate_backward = smear_gate_backward;
    return all;
}
