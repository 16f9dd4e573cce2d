"""CUDA-graph capture, with a fake graph that reruns its step instead of a GPU."""

from contextlib import nullcontext

import pytest
import torch

from pgolf_fast.model.compiled import WARM_UP_RUNS, CapturedStep


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def replays(monkeypatch):
    """Replace CUDA's graphs; return the list of calls that a replay makes, for the test to fill."""
    calls = []

    class FakeGraph:
        def replay(self):
            for call in calls:
                call()

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    return calls


def test_capture_restores_what_it_changed_and_replays_on_fixed_inputs(replays):
    total, seen = torch.nn.Parameter(torch.tensor([5.0])), []

    def step(x):
        seen.append(x)
        with torch.no_grad():
            total.add_(x)
        return x

    given = torch.tensor([2.0])
    captured = CapturedStep(step, (given,), (total,))
    assert total.item() == 5  # as if the warm-up runs and the capture had not happened
    assert len(seen) == WARM_UP_RUNS + 1
    assert all(x is seen[0] and x is not given for x in seen)
    replays.append(lambda: step(seen[0]))
    assert captured(torch.tensor([7.0])) is seen[0]
    assert total.item() == 12
    with pytest.raises(ValueError, match="shorter"):
        captured()
