"""The tokens that models are run on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pgolf_fast.data.source import Source, open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.lab.analysis.options import Options
from pgolf_fast.lab.analysis.subject import Subject


@dataclass(frozen=True)
class Validation:
    """The beginning of a validation stream, in whole windows."""

    source: Source
    seq_len: int
    tokens: np.ndarray
    """int64 (k * seq_len + 1,)."""

    def first(self, targets: int) -> np.ndarray:
        """The first `targets` of it, rounded up to whole windows, as tokens (n + 1,)."""
        return self.tokens[: -(-targets // self.seq_len) * self.seq_len + 1]

    def stream(self, device: torch.device) -> Stream:
        """All of it, on a device, with the bytes of every target."""
        return Stream(self.tokens, self.source.table, device)


def open_validation(subjects: Sequence[Subject], options: Options) -> Validation:
    """`options.tokens` targets, rounded up to whole windows, or as many as there are.

    They are from the folder the options name, else from that of the first model's run. Raises PgolfError,
    saying what to give, where neither names any, or a model's run was trained with another tokenizer, and as
    `window_length`.
    """
    length, first = window_length(subjects), subjects[0]
    config = first.known()
    if options.data is None and first.folder is None and config.data.path is None:
        raise PgolfError(f"{first.path} does not name its data: give a folder of shards with --data.path")
    wanted = -(-options.tokens // length) * length
    data = replace(config.data, val_tokens=wanted)
    if options.data is not None:
        data = replace(data, path=str(options.data), tokenizer=None)
    if options.tokenizer is not None:
        data = replace(data, tokenizer=str(options.tokenizer))
    source = open_source(data, config.model.vocab_size)
    for subject in subjects:
        own = subject.tokenizer()
        if own is not None and own.path.read_bytes() != source.tokenizer.path.read_bytes():
            raise PgolfError(
                f"the shards in {source.folder} belong to tokenizer {source.tokenizer.path}, {subject.name} "
                f"to another ({own.path}): use shards made with that, or name it with --data.tokenizer"
            )
    return Validation(source, length, source.validation(length).astype(np.int64))


def window_length(subjects: Sequence[Subject]) -> int:
    """Tokens of the windows that all models are scored on.

    Raises PgolfError where a model's configuration is not known, or is for windows of another length: its
    loss would be that of a shorter or longer context.
    """
    first, *others = subjects
    length = first.known().eval_seq_len
    for other in others:
        if (own := other.known().eval_seq_len) != length:
            raise PgolfError(
                f"{first.name} is scored on windows of {length} tokens, {other.name} of {own}: their "
                "losses do not compare, analyse each alone"
            )
    return length


def diverged(name: str, what: str) -> PgolfError:
    """The error that a model's `what`, say losses, are not finite."""
    return PgolfError(f"{name}: its {what} are not finite, it has diverged: use an earlier checkpoint")


def validation_or_why(subjects: Sequence[Subject], options: Options) -> Validation | str:
    """`open_validation`, or in a line why there are no tokens.

    Raises PgolfError where data was asked for, unless the models are what does not fit.
    """
    try:
        window_length(subjects)
    except PgolfError as error:
        return str(error)
    try:
        return open_validation(subjects, options)
    except PgolfError as error:
        if options.data is not None:
            raise
        return str(error)
