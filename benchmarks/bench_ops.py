"""Training ops at the shapes of `small`, forward and backward, beside eager and compiled PyTorch.

Run with `make bench`; pytest-benchmark prints one table per op.
"""

import pytest
import torch

from pgolf_fast import ops
from pgolf_fast.config.presets import small
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import reference

CONFIG = small().model
BATCH, LENGTH = 8, small().train.seq_len
PEERS = ("pgolf", "eager", "compile")


def weight(*shape):
    return (torch.randn(*shape) / shape[-1] ** 0.5).requires_grad_()


def mlp_case():
    d, n = CONFIG.model_dim, CONFIG.num_layers
    up, down = weight(n, CONFIG.mlp_up_rows, d), weight(n, d, CONFIG.mlp_hidden)
    grads = torch.zeros_like(up), torch.zeros_like(down)
    x = torch.randn(BATCH, LENGTH, d, requires_grad=True)
    kind = CONFIG.mlp_activation
    return (
        lambda: ops.mlp(x, up, down, 1, kind, grad_up=grads[0], grad_down=grads[1]),
        lambda: reference.mlp(x, up, down, 1, kind),
    )


def attention_case():
    d, n = CONFIG.model_dim, CONFIG.num_layers
    qo, kv = weight(2 * n, d, d), weight(2 * n, CONFIG.kv_dim, d)
    grads = torch.zeros_like(qo), torch.zeros_like(kv)
    x = torch.randn(BATCH, LENGTH, d, requires_grad=True)
    gain = torch.full((CONFIG.num_heads,), 1.5, requires_grad=True)
    cos, sin = rope_tables(CONFIG, LENGTH, x.device)
    heads = CONFIG.num_kv_heads
    return (
        lambda: ops.gqa_attention(
            x,
            qo,
            kv,
            gain,
            None,
            cos,
            sin,
            1,
            num_kv_heads=heads,
            xsa=True,
            grad_qo=grads[0],
            grad_kv=grads[1],
        ),
        lambda: reference.gqa_attention(x, qo, kv, gain, None, cos, sin, 1, heads, True),
    )


def residual_norm_case():
    d = CONFIG.model_dim
    x, branch = (torch.randn(BATCH, LENGTH, d, requires_grad=True) for _ in range(2))
    scales = [torch.randn(d, requires_grad=True) for _ in range(2)]
    return (
        lambda: sum(ops.residual_norm(x, branch, *scales, 0.5)),
        lambda: sum(reference.residual_norm(x, branch, *scales, 0.5)),
    )


def cross_entropy_case():
    x = torch.randn(BATCH * LENGTH, CONFIG.model_dim, requires_grad=True)
    head, targets = weight(CONFIG.vocab_size, CONFIG.model_dim), torch.randint(CONFIG.vocab_size, (len(x),))
    return (
        lambda: ops.softcap_cross_entropy(x, head, targets, 30.0),
        lambda: reference.softcap_cross_entropy(x, head, targets, 30.0),
    )


CASES = {
    "mlp": mlp_case,
    "gqa_attention": attention_case,
    "residual_norm": residual_norm_case,
    "softcap_cross_entropy": cross_entropy_case,
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("op", CASES)
def test_forward_and_backward(benchmark, op, peer):
    benchmark.group = f"{op}, forward and backward"
    torch.manual_seed(0)
    ours, formula = CASES[op]()
    run = {"pgolf": ours, "eager": formula, "compile": torch.compile(formula) if peer == "compile" else None}[
        peer
    ]
    torch.testing.assert_close(ours(), formula(), rtol=1e-3, atol=1e-3)
    dout = torch.randn_like(run())
    benchmark.extra_info.update(dtype="float32", threads=torch.get_num_threads(), tokens=BATCH * LENGTH)
    benchmark.pedantic(lambda: run().backward(dout), rounds=10, warmup_rounds=2)
