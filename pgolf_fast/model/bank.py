"""Weight banks: four stacks of matrices that hold almost every parameter of the network.

With n layers, `qo` is (2n, D, D), queries then output projections; `kv` is (2n, KV*hd, D), keys then values;
`up` is (n, M, D) and `down` (n, D, M). Every slot belongs to one layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BANK_NAMES = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


@dataclass(frozen=True)
class Banks:
    """The four banks as forward reads them (compute dtype), and where backward adds gradients.

    Gradient banks are all given or all None; None leaves gradients to autograd. The projections of the hash
    n-gram and value embeddings are read from the model unless they are given here.
    """

    qo: Tensor
    kv: Tensor
    up: Tensor
    down: Tensor
    grad_qo: Tensor | None = None
    grad_kv: Tensor | None = None
    grad_up: Tensor | None = None
    grad_down: Tensor | None = None
    ngram_projection: Tensor | None = None
    value_projection: Tensor | None = None

    def weights(self) -> Iterator[Tensor]:
        yield from (self.qo, self.kv, self.up, self.down)


def make_banks(weights: list[Tensor], grads: list[Tensor] | None = None) -> Banks:
    """Return `Banks` from lists in the order of BANK_NAMES.

    With gradient banks the weights become leaves that require grad: backward must always reach the ops.
    """
    if grads is None:
        return Banks(*weights)
    return Banks(*(w.detach().requires_grad_() for w in weights), *grads)


# Maps master banks to what forward reads: one function for all, one for each, or None for the masters
Transform = Callable[[Tensor], Tensor] | tuple[Callable[[Tensor], Tensor], ...] | None


def transformed(masters: Sequence[Tensor], transform: Transform) -> list[Tensor]:
    """Return the four banks after `transform`."""
    if transform is None:
        return list(masters)
    functions = transform if isinstance(transform, tuple) else (transform,) * len(masters)
    return [function(master) for function, master in zip(functions, masters, strict=True)]


class Shadow:
    """Compute-dtype copies of the master banks, refreshed only when a master has changed."""

    def __init__(self) -> None:
        self._key: object = None
        self._weights: list[Tensor] = []

    def get(self, masters: list[Tensor], dtype: torch.dtype, transform: Transform) -> list[Tensor]:
        """Return `masters` after `transform` in `dtype`; the masters themselves if nothing changes them."""
        if transform is None and all(m.dtype == dtype for m in masters):
            return [m.detach() for m in masters]
        key = self._key_of(masters, dtype, transform)
        if key != self._key:
            with torch.no_grad(), torch.inference_mode(False):
                new = [w.to(dtype) for w in transformed(masters, transform)]
            kept = [(w.shape, w.dtype, w.device) for w in self._weights]
            if kept == [(w.shape, w.dtype, w.device) for w in new]:
                for old, fresh in zip(self._weights, new, strict=True):
                    old.copy_(fresh)  # compiled and captured graphs need stable addresses
            else:
                self._weights = new
            self._key = key
        return self._weights

    def current(self, masters: list[Tensor], dtype: torch.dtype) -> list[Tensor] | None:
        """Return the copies if they are up to date; an optimizer may then write them with the masters."""
        held = self._weights and self._key == self._key_of(masters, dtype, None)
        return self._weights if held else None

    def written(self, masters: list[Tensor], dtype: torch.dtype) -> None:
        """Record that the copies were written together with the masters."""
        self._key = self._key_of(masters, dtype, None)

    @staticmethod
    def _key_of(masters: list[Tensor], dtype: torch.dtype, transform: Transform) -> object:
        return (dtype, transform, *((id(m), m.data_ptr(), m._version) for m in masters))
