"""C1, C6, C14: no score depends on the token it predicts or on a later one.

A part of the network is causal if changing the tokens from index t on leaves its values at positions before t
bit-identical. Parts are compared in the order of computation, so the first that differs is the cause.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf_fast.evaluation.score import LossFunction
from pgolf_fast.lab.audit.check import AuditFinding, fails, holds, undecided
from pgolf_fast.lab.audit.target import Audit
from pgolf_fast.model.gpt import GPT

SCORED = 4  # targets of a window whose other positions are context only
# Names of operations of the network: a target that enters one could change its predictions
_NETWORK = ("embed", "smear", "norm", "attention", "mlp", "mm", "linear", "conv")


class _Observer:
    """Record the inputs of attention and MLP layers in one forward, by the part that computed them."""

    def __init__(self, model: GPT):
        self._model, self.parts, self._before = model, dict[str, Tensor](), "input of layer 0"
        self._passes = Counter[str]()

    def attention_input(self, layer: int, x: Tensor, value_embed: Tensor | None) -> None:
        self._add(self._before, x)
        self._before = f"MLP of layer {layer}"

    def mlp_input(self, layer: int, x: Tensor) -> None:
        kind = "exclusive attention (XSA)" if self._model.uses_xsa(layer) else "attention"
        self._add(f"{kind} of layer {layer}", x)

    def _add(self, part: str, x: Tensor) -> None:
        self._passes[part] += 1
        count = self._passes[part]  # of a loop
        self.parts[part if count == 1 else f"{part}, pass {count}"] = x


@torch.no_grad()
def _embedding_parts(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
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
def _all_parts(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return the output of every part of a forward of tokens (B, T), as (B, T, ...), in computation order."""
    seen = _Observer(model)
    logits = model.head(model.hidden(tokens, observer=seen))
    parts = _embedding_parts(model, tokens)
    smear = {"smear": model.smear(parts["embedding"])} if model.config.smear else {}
    return {**parts, **smear, **seen.parts, "logits": logits}


def _changed_spans(audit: Audit) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Yield prefixes (length + 1,), each with copies, by index, whose tokens from there on differ."""
    sampler = torch.Generator().manual_seed(1)
    for length in audit.lengths:
        span, changed = audit.stream.tokens[: length + 1], {}
        for index in sorted({1, length // 2, length - 1}):
            shift = torch.randint(1, audit.vocab_size, span.shape, generator=sampler).to(span.device)
            shift[:index] = 0
            changed[index] = (span + shift) % audit.vocab_size
        yield span, changed


def causality(audit: Audit) -> AuditFinding:
    """C1: check every part of the network, its logits, and the losses as scored, at several lengths."""
    names, count, model = set[str](), 0, audit.model
    with audit.fresh_losses() as losses_of:
        for span, changed in _changed_spans(audit):
            length, before = len(span) - 1, _all_parts(model, span[None, :-1])
            names |= before.keys()
            count += len(changed)
            for index, other in changed.items():
                if leak := _first_leak(before, _all_parts(model, other[None, :-1]), index):
                    return fails(f"{leak[0]}: position {leak[1]} of {length} changes with token {index}")
                for scored in {min(SCORED, length), length}:
                    # Token 0 is never a target, so a loss that differs is not 0.
                    if late := _changed_loss(losses_of, span, other, scored, index):
                        text = f"the loss of token {late} of {length} changes with tokens from {index} on"
                        return fails(f"scoring: {text}")
    shown = ", ".join(f"{length:,}" for length in audit.lengths)
    return holds(f"{len(names)} parts are bit-identical before each of {count} changes, T = {shown}")


def no_target_in_keys(audit: Audit) -> AuditFinding:
    """C6: check that embeddings at a position depend on tokens up to it, and targets reach only the loss."""
    model, tokens = audit.model, audit.stream.tokens
    for span, changed in _changed_spans(audit):
        before = _embedding_parts(model, span[None, :-1])
        for index, other in changed.items():
            if leak := _first_leak(before, _embedding_parts(model, other[None, :-1]), index):
                return fails(f"{leak[0]}: the key at position {leak[1]} holds token {index}")
    length = max(audit.lengths)
    trace = _Taint(targets := tokens[None, 1 : length + 1].clone())
    with audit.fresh_losses() as losses_of, torch.no_grad(), trace:
        losses_of(tokens[None, :length], targets, length)
    if trace.network:
        return fails(f"targets enter {trace.network[0]}, before the loss")
    return holds(f"keys hold tokens up to their position; targets enter {', '.join(trace.ops)} only")


@torch.no_grad()
def word_starts_of_inputs(audit: Audit) -> AuditFinding:
    """C14: check that the word-start gate at a position depends on its input token, not on the target."""
    model, tokens = audit.model, audit.stream.tokens
    if model.bigram is None or not (model.config.word_start_boost or model.config.pos_conditional):
        return undecided("the model does not use word starts")
    length = min(64, len(tokens) - 1)
    span = tokens[:length]
    whole = _embedding_parts(model, span[None])["hash n-grams"][0]
    kept = model.has_leading_space.clone()
    tried = moved = 0
    try:
        for position in range(length - 1):
            target = span[position + 1]
            if bool((span[: position + 1] == target).any()):
                continue  # the target also occurs as an input, which may depend on the flag
            model.has_leading_space.copy_(kept)
            model.has_leading_space[target] = ~kept[target]
            flipped = _embedding_parts(model, span[None])["hash n-grams"][0]
            tried += 1
            if not torch.equal(flipped[: position + 1], whole[: position + 1]):
                return fails(f"position {position} changes with the word-start flag of its target")
            moved += not torch.equal(flipped[position + 1], whole[position + 1])
    finally:
        model.has_leading_space.copy_(kept)
    return holds(f"of {tried} flipped flags, none has an effect before its token and {moved} have one at it")


def _first_leak(before: dict[str, Tensor], after: dict[str, Tensor], index: int) -> tuple[str, int] | None:
    """Return the first part that differs before `index`, and its first such position."""
    for part, value in before.items():
        differs = (value != after[part])[0, :index].flatten(1).any(1)
        if bool(differs.any()):
            return part, int(differs.nonzero()[0])
    return None


def _changed_loss(
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
        entering = [t for t in _tensors((args, kwargs)) if t.untyped_storage().data_ptr() in self._storages]
        if not entering:
            return out
        name = str(func).removesuffix(".default")
        floats, network = any(t.is_floating_point() for t in entering), any(word in name for word in _NETWORK)
        predicts = floats if "cross_entropy" in name else network
        self.network += [name] if predicts else []
        for tensor in _tensors(out):
            storage = tensor.untyped_storage().data_ptr()
            if storage not in self._storages and tensor.numel():
                self._held.append(tensor)
                self._storages.add(storage)
                self.ops += [name] if name not in self.ops else []
        return out


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
