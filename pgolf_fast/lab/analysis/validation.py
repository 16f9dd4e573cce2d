"""Validation tokens of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pgolf_fast.data.source import Source, open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.lab.analysis.models import LoadedModel
from pgolf_fast.lab.analysis.options import Options


@dataclass(frozen=True)
class Validation:
    """The beginning of a validation stream, in whole windows."""

    source: Source
    seq_len: int
    tokens: np.ndarray
    """int64 (k * seq_len + 1,)."""

    def first(self, targets: int) -> np.ndarray:
        """Return the first `targets` targets, rounded up to whole windows, as tokens (n + 1,)."""
        return self.tokens[: -(-targets // self.seq_len) * self.seq_len + 1]

    def stream(self, device: torch.device) -> Stream:
        """Return a stream of all tokens on a device, with the bytes of every target."""
        return Stream(self.tokens, self.source.table, device)


def open_validation(models: Sequence[LoadedModel], options: Options) -> Validation:
    """Read `options.tokens` targets, rounded up to whole windows, or fewer if there are no more.

    They are from the folder in the options, or from that of the first model's run. Raises PgolfError if there
    is neither, if a model was trained with another tokenizer, and as `window_length`.
    """
    length, first = window_length(models), models[0]
    config = first.need_config()
    if options.data is None and first.folder is None and config.data.path is None:
        raise PgolfError(f"{first.path} does not name its data: give a folder of shards with --data.path")
    wanted = -(-options.tokens // length) * length
    data = replace(config.data, val_tokens=wanted)
    if options.data is not None:
        data = replace(data, path=str(options.data), tokenizer=None)
    if options.tokenizer is not None:
        data = replace(data, tokenizer=str(options.tokenizer))
    source = open_source(data, config.model.vocab_size)
    for model in models:
        own = model.tokenizer()
        # Files are compared, since the same vocabulary size does not mean the same tokens
        if own is not None and own.path.read_bytes() != source.tokenizer.path.read_bytes():
            raise PgolfError(
                f"the shards in {source.folder} belong to tokenizer {source.tokenizer.path}, {model.name} "
                f"to another ({own.path}): use shards made with that, or name it with --data.tokenizer"
            )
    return Validation(source, length, source.validation(length).astype(np.int64))


def window_length(models: Sequence[LoadedModel]) -> int:
    """Return the window length on which all models are scored.

    Raises PgolfError if a configuration is unknown, or if lengths differ: losses with more or less context
    cannot be compared.
    """
    first, *others = models
    length = first.need_config().eval_seq_len
    for other in others:
        if (own := other.need_config().eval_seq_len) != length:
            raise PgolfError(
                f"{first.name} is scored on windows of {length} tokens, {other.name} of {own}: their "
                "losses cannot be compared, analyze each model alone"
            )
    return length


def diverged(name: str, what: str) -> PgolfError:
    """Return the error for a model whose `what`, such as losses, are not finite."""
    return PgolfError(f"{name}: its {what} are not finite, it has diverged: use an earlier checkpoint")


def validation_or_why(models: Sequence[LoadedModel], options: Options) -> Validation | str:
    """Return `open_validation`, or the reason why there are no tokens.

    Raises PgolfError if the options name data that cannot be read.
    """
    try:
        window_length(models)
    except PgolfError as error:
        return str(error)
    try:
        return open_validation(models, options)
    except PgolfError as error:
        if options.data is not None:
            raise
        return str(error)
