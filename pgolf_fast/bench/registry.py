"""Cases of `pgolf_fast.ops.cases` at the shapes of a preset."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import cases
from pgolf_fast.ops.case import Case
from pgolf_fast.ops.cases import Sizes


def sizes_of(config: RunConfig, tokens: int) -> Sizes:
    """Return the sizes of a preset's network for `tokens` tokens at once.

    An MLP of the other kind than the preset's gets the hidden width with the same number of weights: two
    thirds for a gated one, three halves for an ungated one.
    """
    model, length = config.model, min(config.train.seq_len, tokens)
    hidden, gated = model.mlp_hidden, model.mlp_activation == "swiglu"
    return Sizes(
        batch=tokens // length,
        length=length,
        dim=model.model_dim,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        rotary=model.rotary_dims,
        hidden=hidden * 3 // 2 if gated else hidden,
        gated_hidden=hidden if gated else hidden * 2 // 3,
        up_rows=model.mlp_up_rows,
        layers=model.num_layers,
        vocab=model.vocab_size,
        bigram_rows=model.bigram_vocab_size,
        bigram_dim=model.bigram_dim,
        softcap=model.logit_softcap,
        pos_conditional=model.pos_conditional,
        trigram=model.trigram,
    )


def timed() -> list[str]:
    """Return the names of the cases that are measured."""
    return [name for name, entry in cases.CASES.items() if entry.timed]


def select(words: Sequence[str]) -> list[str]:
    """Return measured cases that begin with one of `words`, or all. Raises PgolfError for an unknown word."""
    for word in words:
        if not any(name.startswith(word) for name in timed()):
            raise PgolfError(f"no op {word!r} to measure: ops are {', '.join(timed())}")
    return [name for name in timed() if not words or any(name.startswith(word) for word in words)]


def token_counts(name: str, tokens: Sequence[int]) -> Sequence[int]:
    """Return the token counts of a case: its own, or `tokens`."""
    return cases.CASES[name].rows or tokens


def make_case(
    name: str, config: RunConfig, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> Case:
    """Build a case at a preset's shapes. Raises PgolfError if `tokens` are not whole sequences."""
    sizes = sizes_of(config, tokens)
    if cases.CASES[name].rows is not None:  # rows of x rather than sequences
        sizes = replace(sizes, batch=1, length=tokens)
    elif sizes.tokens != tokens:
        raise PgolfError(
            f"{tokens} tokens are not whole sequences of {sizes.length}: change --tokens or the preset"
        )
    return cases.make(name, sizes, dtype, device)
