"""C1, C6, C14: no score depends on the token it predicts or on a later one.

A part of the network is causal if changing the tokens from index t on leaves its values at positions before t
bit-identical. Parts are compared in the order of computation, so the first that differs is the cause.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pgolf_fast.evaluation.score import LossFunction
from pgolf_fast.lab.audit.check import AuditFinding
from pgolf_fast.model.gpt import GPT

SCORED = 4  # targets of a window whose other positions are context only
# Names of operations of the network: a target that enters one could change its predictions
_NETWORK = ("embed", "smear", "norm", "attention", "mlp", "mm", "linear", "conv")


def changed_from(tokens: Tensor, index: int, vocab_size: int, sampler: torch.Generator) -> Tensor:
    """Return `tokens` (T,) with each token from `index` on replaced by a different id below vocab_size."""
    shift = torch.randint(1, vocab_size, tokens.shape, generator=sampler).to(tokens.device)
    shift[:index] = 0
    return (tokens + shift) % vocab_size


class _Observer:
    """Record the inputs of attention and MLP layers in one forward, by the part that computed them."""

    def __init__(self, model: GPT):
        self._model, self.parts = model, dict[str, Tensor]()

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None:
        self.parts["input of layer 0" if layer == 0 else f"MLP of layer {layer - 1}"] = x

    def mlp_input(self, layer: int, x: Tensor) -> None:
        kind = "exclusive attention (XSA)" if self._model.uses_xsa(layer) else "attention"
        self.parts[f"{kind} of layer {layer}"] = x


@torch.no_grad()
def embedding_parts(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return every embedding looked up by the tokens (B, T), as (B, T, ...), in the order of computation."""
    parts = {}
    if model.bigram is not None:
        projection = model.bigram.proj.weight.to(model.compute_dtype)
        space, boost = model.has_leading_space, model.word_start_boost
        parts["hash n-grams"] = model.bigram(tokens, space, boost, projection)
    parts["embedding"] = model.embed(tokens)
    values = model.value_embeddings(tokens)
    return {**parts, **{f"value embedding of layer {layer}": value for layer, value in values.items()}}


@torch.no_grad()
def all_parts(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return the output of every part of a forward of tokens (B, T), as (B, T, ...), in computation order."""
    seen = _Observer(model)
    logits = model.head(model.hidden(tokens, observer=seen))
    parts = embedding_parts(model, tokens)
    smear = {"smear": model.smear(parts["embedding"])} if model.config.smear else {}
    return {**parts, **smear, **seen.parts, "logits": logits}


def causality(model: GPT, losses_of: LossFunction, tokens: Tensor, lengths: Sequence[int]) -> AuditFinding:
    """C1: check every part of the network, its logits, and the losses as scored, at several lengths.

    tokens: (N,) with N larger than every length; each length takes a prefix.
    """
    names: set[str] = set()
    changes = 0
    sampler = torch.Generator().manual_seed(1)
    for length in lengths:
        span = tokens[: length + 1]
        before = all_parts(model, span[None, :-1])
        names |= set(before)
        for index in _cuts(length):
            other = changed_from(span, index, model.config.vocab_size, sampler)
            after = all_parts(model, other[None, :-1])
            leak = _first_leak(before, after, index)
            if leak is not None:
                part, position = leak
                return AuditFinding(
                    False, f"{part}: position {position} of {length} changes with token {index}"
                )
            for scored in {min(SCORED, length), length}:
                late = _changed_losses(losses_of, span, other, scored, index)
                if late is not None:
                    text = f"the loss of token {late} of {length} changes with tokens from {index} on"
                    return AuditFinding(False, f"scoring: {text}")
            changes += 1
    return AuditFinding(
        True, f"{len(names)} parts are bit-identical before each of {changes} changes, T = {_all(lengths)}"
    )


def no_target_in_keys(
    model: GPT, losses_of: LossFunction, tokens: Tensor, lengths: Sequence[int]
) -> AuditFinding:
    """C6: check that embeddings at a position depend on tokens up to it, and targets reach only the loss."""
    sampler = torch.Generator().manual_seed(6)
    for length in lengths:
        span = tokens[:length]
        before = embedding_parts(model, span[None])
        for index in _cuts(length):
            after = embedding_parts(model, changed_from(span, index, model.config.vocab_size, sampler)[None])
            leak = _first_leak(before, after, index)
            if leak is not None:
                return AuditFinding(False, f"{leak[0]}: the key at position {leak[1]} holds token {index}")
    length = max(lengths)
    trace = _Taint(targets := tokens[None, 1 : length + 1].clone())
    with torch.no_grad(), trace:
        losses_of(tokens[None, :length], targets, length)
    if trace.network:
        return AuditFinding(False, f"targets enter {trace.network[0]}, before the loss")
    return AuditFinding(
        True, f"keys hold tokens up to their position; targets enter {', '.join(trace.ops)} only"
    )


@torch.no_grad()
def word_starts_of_inputs(model: GPT, tokens: Tensor) -> AuditFinding:
    """C14: check that the word-start gate at a position depends on its input token, not on the target."""
    if model.bigram is None or not (model.config.word_start_boost or model.config.pos_conditional):
        return AuditFinding(None, "the model does not use word starts")
    length = min(64, len(tokens) - 1)
    span = tokens[:length]
    whole = embedding_parts(model, span[None])["hash n-grams"][0]
    kept = model.has_leading_space.clone()
    tried = moved = 0
    try:
        for position in range(length - 1):
            target = span[position + 1]
            if bool((span[: position + 1] == target).any()):
                continue  # the target also occurs as an input, which may depend on the flag
            model.has_leading_space.copy_(kept)
            model.has_leading_space[target] = ~kept[target]
            flipped = embedding_parts(model, span[None])["hash n-grams"][0]
            tried += 1
            if not torch.equal(flipped[: position + 1], whole[: position + 1]):
                return AuditFinding(
                    False, f"position {position} changes with the word-start flag of its target"
                )
            moved += not torch.equal(flipped[position + 1], whole[position + 1])
    finally:
        model.has_leading_space.copy_(kept)
    return AuditFinding(
        True, f"of {tried} flipped flags, none has an effect before its token and {moved} have one at it"
    )


def _cuts(length: int) -> list[int]:
    return sorted({1, length // 2, length - 1} - {0})


def _all(values: Sequence[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _first_leak(before: dict[str, Tensor], after: dict[str, Tensor], index: int) -> tuple[str, int] | None:
    """Return the first part that differs before `index`, and its first such position."""
    for part, value in before.items():
        differs = (value != after[part])[0, :index].flatten(1).any(1)
        if bool(differs.any()):
            return part, int(differs.nonzero()[0])
    return None


def _changed_losses(
    losses_of: LossFunction, span: Tensor, other: Tensor, scored: int, index: int
) -> int | None:
    """Return the first token before `index`, among the last `scored` targets, whose loss differs."""
    length = len(span) - 1
    first, second = (losses_of(s[None, :-1], s[None, -scored:], length)[0] for s in (span, other))
    positions = torch.arange(length + 1 - scored, length + 1, device=span.device)
    wrong = positions[(first != second) & (positions < index)]
    return int(wrong[0]) if len(wrong) else None


class _Taint(TorchDispatchMode):
    """Trace one tensor through a forward: all `ops` that it enters, and those of the `network`."""

    def __init__(self, source: Tensor):
        super().__init__()
        self._held = [source]  # keeps storages alive, so that their addresses are not reused
        self._storages = {source.untyped_storage().data_ptr()}
        self.ops: list[str] = []
        self.network: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        entering = [t for t in _tensors((args, kwargs or {})) if self._is_tainted(t)]
        if entering:
            name = str(func).removesuffix(".default")
            loss = "cross_entropy" in name
            if (any(word in name for word in _NETWORK) and not loss) or (
                loss and any(t.is_floating_point() for t in entering)
            ):
                self.network.append(name)
            for tensor in _tensors(out):
                if tensor.untyped_storage().data_ptr() not in self._storages and tensor.numel():
                    self._held.append(tensor)
                    self._storages.add(tensor.untyped_storage().data_ptr())
                    if name not in self.ops:
                        self.ops.append(name)
        return out

    def _is_tainted(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._storages


def _tensors(tree: object) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from _tensors(item)
