"""The baseline of training: the same network and step in plain PyTorch, for eager and torch.compile.

Inside `plain_ops`, the model's calls to `pgolf_fast.ops` run the reference formulas with PyTorch's attention
and autograd, so that Inductor can fuse everything and none of our kernels runs. Banks are unbound once, so
that their gradients are stacked once instead of allocating a zero-filled bank per slice.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pgolf_fast import ops
from pgolf_fast.bench import peers
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.model.bank import Banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import attention_backend, reference, tiles
from pgolf_fast.optim.optimizer import Optimizer
from pgolf_fast.optim.schedule import Schedule

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}  # others choose none


@torch.library.custom_op("pgolf_bench::fa3", mutates_args=())
def fa3(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """FlashAttention 3 of (B, T, heads, hd), and its logsumexp, for `torch.compile`."""
    y, lse = attention_backend.forward("fa3", q, k, v)
    return y.contiguous(), lse.contiguous()


@torch.library.custom_op("pgolf_bench::fa3_backward", mutates_args=())
def fa3_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = attention_backend.backward("fa3", dy.contiguous(), q, k, v, y, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@fa3.register_fake
def _(q, k, v):
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@fa3_backward.register_fake
def _(dy, q, k, v, y, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


fa3.register_autograd(
    lambda ctx, dy, _: fa3_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


def attention(
    x, qo_bank, kv_bank, q_gain, value_embed, cos, sin, slot, *, num_kv_heads, xsa, options=None, **_
) -> Tensor:
    """Compute `ops.gqa_attention` by PyTorch's scaled dot-product attention, or as `options` say."""
    n = len(qo_bank) // 2
    weights = qo_bank[slot], kv_bank[slot], kv_bank[n + slot], qo_bank[n + slot]
    settings = {"value_embed": value_embed, "num_kv_heads": num_kv_heads, "xsa": xsa, **(options or {})}
    return peers.sdpa_attention(x, *weights, q_gain, cos=cos, sin=sin, **settings)


def variant(backend: str, fused: bool) -> dict[str, Callable[..., object]]:
    """Return the functions that differ from PLAIN with FlashAttention 3, or with q, k and v as one product.

    Raises UnavailableError without FlashAttention 3.
    """
    options: dict[str, object] = {"fused": True} if fused else {}
    if backend == "fa3":
        shape = attention_backend.Shape(torch.device("cuda"), torch.bfloat16, 64)
        if reason := attention_backend.why_not("fa3", shape):
            raise peers.UnavailableError(reason)
        options["inner"] = lambda q, k, v: fa3(q, k, v)[0]
    return {"gqa_attention": functools.partial(attention, options=options)} if options else {}


def ngram(tokens, table, spaces, scale, boost, *, pos_conditional, trigram, out_dtype=None) -> Tensor:
    rows = reference.ngram_hash_embed(tokens, table, spaces, scale, boost, pos_conditional, trigram)
    return rows.to(out_dtype or table.dtype)


PLAIN: dict[str, Callable[..., object]] = {
    "gqa_attention": attention,
    "mlp": lambda x, up, down, slot, kind, **_: peers.plain_mlp(x, up[slot], down[slot], kind),
    "residual_norm": reference.residual_norm,
    "smear_gate": reference.smear_gate,
    "softcap_cross_entropy": reference.softcap_cross_entropy,
    "ngram_hash_embed": ngram,
    "newton_schulz": reference.newton_schulz,
}


@contextlib.contextmanager
def plain_ops(
    backend: str = "any", functions: Mapping[str, Callable[..., object]] | None = None
) -> Iterator[None]:
    """Run models and optimizers in plain PyTorch within this block, with the given attention backend.

    `functions` replaces some of PLAIN, for example by compiled ones.
    """
    kernel = BACKENDS.get(backend)
    # Ops called inside other ops (Muon's) take their PyTorch path.
    inner = mock.patch.dict(tiles._chosen, dict.fromkeys(tiles.DEFAULTS, "torch"))
    attention = contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)
    with mock.patch.multiple(ops, **PLAIN | dict(functions or {})), inner, attention:
        yield


def plain_banks(model: GPT) -> Banks:
    """Return the model's banks in the compute dtype, unbound: they can only be indexed by slot."""
    weights = [m.to(model.compute_dtype).unbind() for m in model.bank_parameters()]
    return Banks(*weights)  # type: ignore[arg-type]


def plain_loss(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the mean loss as a function of a batch, to be called inside `plain_ops`."""
    return lambda tokens, targets: model.loss(tokens, targets, plain_banks(model))


class PlainTrainer:
    """The training step of `pgolf_fast.train.Trainer`: same optimizer, schedule and clipping."""

    def __init__(
        self,
        model: GPT,
        config: RunConfig,
        next_batch: Callable[[], tuple[Tensor, Tensor]],
        *,
        backend: str = "any",
        compile: dict[str, object] | None = None,
        functions: Mapping[str, Callable[..., object]] | None = None,
    ):
        self.model, self.config, self.next_batch, self.backend = model, config, next_batch, backend
        self.optimizer, self.schedule = Optimizer(model, config.optim), Schedule(config.train)
        self.micro_steps = config.train.batch_tokens // config.train.micro_batch_tokens
        self.loss, self.functions, self.step = plain_loss(model), dict(functions or {}), 0
        if compile is not None:
            self.loss = torch.compile(self.loss, dynamic=False, fullgraph=True, **compile)  # type: ignore[call-overload]
            if "backend" not in compile:  # else a rehearsal
                self.functions["newton_schulz"] = torch.compile(reference.newton_schulz, dynamic=False)

    def advance(self) -> Tensor:
        """Make one optimizer step; return the mean loss of its batch without synchronizing."""
        with plain_ops(self.backend, self.functions):
            total = torch.zeros((), device=self.model.qo_bank.device)
            for _ in range(self.micro_steps):
                loss = self.loss(*self.next_batch())
                (loss / self.micro_steps).backward()
                total += loss.detach()
            frozen, gradient = self.config.model.frozen_skips, self.model.skip_weights.grad
            if frozen and gradient is not None:
                gradient[len(gradient) - frozen :] = 0
            self.optimizer.clip()
            self.optimizer.step(self.step, self.schedule.multiplier(self.step, 0.0))
            self.optimizer.zero_grad()
        self.step += 1
        return total / self.micro_steps

    def warm_up(self) -> None:
        """Make one step, then restore weights and optimizer."""
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        muon = {name: value.clone() for name, value in self.optimizer.muon.state().items()}
        self.advance()
        self.model.load_state_dict(weights)
        self.optimizer.adamw.state.clear()
        self.optimizer.muon.load_state(muon)
        self.step = 0
