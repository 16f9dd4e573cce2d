"""pgolf::softcap_cross_entropy: tied head, softcap and cross-entropy without the logits in memory."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgolf_fast.ops import checks, native, tiles
from pgolf_fast.ops.checks import expect_ids, expect_integer, expect_shape, same_device, unit_inner_stride
from pgolf_fast.ops.tiles import Tile

_ROWS = 4096  # rows of logits alive at once: 16 MB at vocabulary 1024
# The most elements of d loss / d logits that the CPU's forward keeps for backward, 64 MiB in float32: 16,384
# rows at vocabulary 1024. If there are more, backward computes the logits again.
_KEPT = 2**24

# Two blocks overlap each other's epilogues; in tiles of 128 x 128 (162 registers), only one of dlogits fits.
tiles.declare("softcap_cross_entropy_fwd", sm90=Tile(128, 128, 64, num_warps=8, num_stages=2), blocks=2)
tiles.declare("softcap_cross_entropy_dlogits", sm90=Tile(128, 64, 64, num_warps=8, num_stages=3), blocks=2)

# Elements of d loss / d logits alive at once in the kernels' backward: 64 MiB in 16 bits, 32,768 rows at
# vocabulary 1024. One tile kernel writes them and two library products read them. A backward without them
# would compute each tile of logits twice, for dx and for dW, with accumulators of the whole width in
# registers: four matrix products instead of three, the added one at a fraction of a library's speed.
_DLOGITS = 2**25


def softcap_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float = 0.0
) -> Tensor:
    """Return the loss of each token, `-log softmax(softcap * tanh(x W^T / softcap))[target]`, in nats.

    `z_loss * log(Z)^2` is added, Z the denominator of the softmax, which keeps logits from drifting
    (Chowdhery et al. 2022, section 5; PR 301).
    x (..., D), weight (V, D) of x's dtype, targets (...) integers in 0..V-1; the result has the shape of
    targets, in float32 (float64 for float64 input).
    Raises ValueError if shapes or dtypes do not match, IndexError for a target outside the vocabulary. On a
    GPU that check would synchronize: there, kernels return NaN losses and gradients for such a target, and
    PyTorch fails with a device-side assertion.
    """
    expect_shape("softcap_cross_entropy", "targets", targets, tuple(x.shape[:-1]))
    differentiated = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    flat = torch.ops.pgolf.softcap_cross_entropy(
        x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), softcap, z_loss, differentiated
    )
    return flat[0].view(targets.shape)


def _check(x: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float) -> None:
    expect_shape("softcap_cross_entropy", "weight", weight, (None, x.shape[-1]))
    expect_shape("softcap_cross_entropy", "targets", targets, (x.shape[0],))
    checks.same_dtype_device("softcap_cross_entropy", x=x, weight=weight)
    same_device("softcap_cross_entropy", x=x, targets=targets)
    expect_integer("softcap_cross_entropy", "targets", targets)
    if not 0 < softcap <= 1e38:  # float32 overflows beyond
        why = f"softcap is {softcap}; it must be positive and at most 1e38"
        raise ValueError(f"pgolf::softcap_cross_entropy: {why}")
    if not z_loss >= 0:
        raise ValueError(f"pgolf::softcap_cross_entropy: z_loss is {z_loss}; it must not be negative")


@torch.library.custom_op("pgolf::softcap_cross_entropy", mutates_args=())
def _softcap_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, z_loss: float = 0.0, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, logsumexps and d loss / d logits: (rows, V) if kept and written by a pass, or (0, V)."""
    _check(x, weight, targets, softcap, z_loss)
    expect_ids("softcap_cross_entropy", "targets", targets, "the vocabulary", weight.shape[0])
    dlogits = x.new_empty(_kept_rows(x, weight, keep), weight.shape[0])
    if tiles.uses_kernels("softcap_cross_entropy", x):
        return *_forward_cuda(x, weight, targets, softcap, z_loss), dlogits
    return *_forward_cpu(x, weight, targets, softcap, z_loss, dlogits), dlogits


def _kept_rows(x: Tensor, weight: Tensor, keep: bool) -> int:
    kept = keep and native.passes("softcap_cross_entropy", x) and x.shape[0] * weight.shape[0] <= _KEPT
    return x.shape[0] if kept else 0


def _forward_cpu(x, weight, targets, softcap: float, z_loss: float, dlogits: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and logsumexps; a pass writes d loss / d logits unless `dlogits` has no rows."""
    fused = native.passes("softcap_cross_entropy", x)
    wide = torch.promote_types(x.dtype, torch.float32)
    loss, logsumexp = (x.new_empty(x.shape[0], dtype=wide) for _ in range(2))
    for start in range(0, x.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        logits = torch.mm(x[rows], weight.T, out=dlogits[rows]) if len(dlogits) else x[rows] @ weight.T
        chosen = targets[rows].long()
        if fused:
            operands = (logits, chosen, loss[rows], logsumexp[rows])
            native.call(fused.softcap_loss, *operands, softcap, z_loss, len(dlogits) > 0)
            continue
        logits = logits.to(wide).div_(softcap).tanh_().mul_(softcap)
        loss[rows] = -logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        # |logit| <= softcap, so exp cannot overflow below softcap 88 and needs no maximum
        logsumexp[rows] = logits.exp_().sum(1).log_() if softcap < 80 else logits.logsumexp(1)
        loss[rows] += logsumexp[rows] + z_loss * logsumexp[rows].square()
    return loss, logsumexp


@_softcap_cross_entropy.register_fake
def _(x, weight, targets, softcap, z_loss=0.0, keep=False):
    _check(x, weight, targets, softcap, z_loss)
    wide = torch.promote_types(x.dtype, torch.float32)
    loss, logsumexp = x.new_empty(x.shape[0], dtype=wide), x.new_empty(x.shape[0], dtype=wide)
    return loss, logsumexp, x.new_empty(_kept_rows(x, weight, keep), weight.shape[0])


def _tile(kernel: str, x: Tensor) -> Tile:
    """Look up the tile; float32 gets at most 64 x 64, because its products would spill registers."""
    tile = tiles.lookup(kernel, x)
    if x.element_size() <= 2:
        return tile
    return replace(tile, block_m=min(tile.block_m, 64), block_n=min(tile.block_n, 64))


def _forward_cuda(x, weight, targets, softcap: float, z_loss: float) -> tuple[Tensor, Tensor]:
    from pgolf_fast.kernels.softcap_cross_entropy import launch_softcap_cross_entropy_fwd

    loss, logsumexp = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    if x.shape[0]:
        inputs = (unit_inner_stride(x), unit_inner_stride(weight), targets)
        options = {"softcap": softcap, "z_loss": z_loss, "tile": _tile("softcap_cross_entropy_fwd", x)}
        with tiles.on_device_of(x):
            launch_softcap_cross_entropy_fwd(*inputs, loss, logsumexp, **options)
    return loss, logsumexp


@torch.library.custom_op(
    "pgolf::softcap_cross_entropy_backward",
    mutates_args=(),
    schema="(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, Tensor dlogits, "
    "float softcap, float z_loss) -> (Tensor, Tensor)",
)
def _softcap_cross_entropy_backward(dloss, x, weight, targets, lse, dlogits, softcap, z_loss):
    if tiles.uses_kernels("softcap_cross_entropy", x):
        return _backward_cuda(dloss, x, weight, targets, lse, softcap, z_loss)
    fused = native.passes("softcap_cross_entropy", x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    accumulator = weight.new_zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for start in range(0, x.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        scale, inputs = dloss[rows].unsqueeze(1), (x[rows], weight, targets[rows], softcap, z_loss)
        if fused:  # the pass does not multiply by dloss: the products do
            low = dlogits[rows] if len(dlogits) else x.new_empty(len(x[rows]), weight.shape[0])
            if not len(dlogits):
                _forward_cpu(*inputs, low)
            torch.mm(low, weight, out=dx[rows]).mul_(scale)
            accumulator += low.T @ (x[rows] * scale).to(x.dtype)
        else:
            low = _dlogits(*inputs, lse[rows].unsqueeze(1)).mul_(scale).to(x.dtype)
            dx[rows] = low @ weight
            accumulator += low.T @ x[rows]
    return dx, accumulator.to(weight.dtype)


def _dlogits(x, weight, targets, softcap: float, z_loss: float, lse: Tensor) -> Tensor:
    """Return ((1 + 2 z_loss log Z) softmax - onehot) (1 - tanh^2), d loss / d raw for raw = x W^T."""
    tanh = (x @ weight.T).to(lse.dtype).div_(softcap).tanh_()
    grad = torch.exp(tanh * softcap - lse).mul_(1 + 2 * z_loss * lse)
    grad.scatter_add_(1, targets.long().unsqueeze(1), grad.new_full((len(x), 1), -1.0))
    return grad.mul_(tanh.square_().neg_().add_(1.0))


@_softcap_cross_entropy_backward.register_fake
def _(dloss, x, weight, targets, lse, dlogits, softcap, z_loss):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _backward_cuda(dloss, x, weight, targets, lse, softcap: float, z_loss: float) -> tuple[Tensor, Tensor]:
    from pgolf_fast.kernels.softcap_cross_entropy import launch_softcap_cross_entropy_dlogits

    x, weight = unit_inner_stride(x), unit_inner_stride(weight)
    dx, (vocab, _), count = x.new_empty(x.shape), weight.shape, x.shape[0]
    tile = _tile("softcap_cross_entropy_dlogits", x)
    size = min(count, max(tile.block_m, _DLOGITS // max(vocab, 1)))
    dlogits = x.new_empty(size, vocab)
    dweight = None if 0 < count <= size else weight.new_zeros(weight.shape, dtype=torch.float32)
    for start in range(0, count, max(size, 1)):
        rows = slice(start, min(start + size, count))
        low = dlogits[: rows.stop - start]
        inputs = (x[rows], weight, targets[rows], lse[rows], dloss[rows])
        with tiles.on_device_of(x):
            launch_softcap_cross_entropy_dlogits(*inputs, low, softcap=softcap, z_loss=z_loss, tile=tile)
        torch.mm(low, weight, out=dx[rows])
        dweight = low.T @ x[rows] if dweight is None else dweight.add_(low.T @ x[rows])
    assert dweight is not None
    return dx, dweight.to(weight.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, targets, ctx.softcap, ctx.z_loss, _ = inputs
    ctx.save_for_backward(x, weight, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.pgolf.softcap_cross_entropy_backward(
        dloss, *ctx.saved_tensors, ctx.softcap, ctx.z_loss
    )
    return dx, dweight, None, None, None, None


_softcap_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
