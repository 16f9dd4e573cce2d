"""Packed rows: each segment as if it were alone."""

import pytest
import torch
from helpers import FRONTIER, randomize_, tiny_config

from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.segments import Segments

STARTS = [0, 5, 6, 14]
TOTAL, LONGEST = 23, 9


def packed():
    """A row of 23 tokens whose segments begin with BOS, and the segments, with empty ones at the end."""
    tokens = torch.randint(2, 96, (1, TOTAL))
    tokens[0, STARTS] = 1
    cu_seqlens = torch.tensor([*STARTS, TOTAL, TOTAL, TOTAL], dtype=torch.int32)
    return tokens, torch.randint(96, (1, TOTAL)), Segments(cu_seqlens, LONGEST)


def spans():
    return zip(STARTS, [*STARTS[1:], TOTAL], strict=True)


@pytest.mark.parametrize("name", ["exp101", *FRONTIER])
def test_a_packed_row_equals_its_segments(name):
    """Losses and every gradient, with value embeddings, hash n-grams, both SmearGates, loops and gates."""
    made = randomize_(GPT(tiny_config(**FRONTIER.get(name, {}), rope_train_seq_len=LONGEST)), 0)
    tokens, targets, segments = packed()
    losses = made.token_losses(tokens, targets, segments=segments)
    alone = [made.token_losses(tokens[:, a:b], targets[:, a:b], context=LONGEST) for a, b in spans()]
    torch.testing.assert_close(losses, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)
    named = {n: p for n, p in made.named_parameters() if p.requires_grad}
    got, want = (
        torch.autograd.grad(each.sum(), named.values(), allow_unused=True)
        for each in (losses, torch.cat(alone, dim=1))
    )
    for parameter, a, b in zip(named, got, want, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()), msg=parameter)
    mixed = made.token_losses(tokens, targets)
    assert (mixed - losses)[:, STARTS[1] :].abs().max() > 1e-3


def test_apart_gives_each_segment_a_row():
    _, _, segments = packed()
    row = torch.arange(TOTAL)[None]
    seen = []

    def function(rows):
        seen.append(rows)
        return rows.cumsum(1)

    out = segments.apart(function, row)
    assert seen[0].shape == (6, LONGEST)
    want = torch.cat([row[0, a:b].cumsum(0) for a, b in spans()])
    assert torch.equal(out[0], want)


@torch.no_grad()
def test_the_gated_smear_stops_at_bos_and_not_where_a_document_is_cut():
    """As in PR 1855: the embedding of the token before a cut is known, and read."""
    made = randomize_(GPT(tiny_config(**FRONTIER["record"])), 0)
    tokens, other = torch.tensor([[1, 7, 8, 1, 9]]), torch.tensor([[1, 7, 50, 1, 9]])
    cut = Segments(torch.tensor([0, 2, 3, 5], dtype=torch.int32), 2)
    changed = (made.embed(tokens, segments=cut) - made.embed(other, segments=cut)).abs().amax(-1)[0] > 0
    assert changed.tolist() == [False, False, True, False, False]
    before = torch.tensor([[1, 50, 8, 1, 9]])
    changed = (made.embed(tokens, segments=cut) - made.embed(before, segments=cut)).abs().amax(-1)[0] > 0
    assert changed.tolist() == [False, True, True, False, False]
