"""The inner step of a meta step, as `benchmarks/inner_step.py` measures it."""

import sys
from pathlib import Path

import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.config.schema import MetaConfig
from pgolf_fast.model.gpt import GPT

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from inner_step import InnerStep, lengths, one


def measured(dtype, **fields):
    torch.manual_seed(0)
    model = GPT(tiny_config(), torch.arange(96) % 3 == 0, compute_dtype=dtype)
    randomize_(model, 1)
    model.allocate_gradient_banks()
    return InnerStep("", *one(model, torch.randint(96, (2, 4, 24)).unbind(), MetaConfig(**fields)))


def test_a_small_inner_step_is_lost_in_bfloat16():
    exact, rounded = (measured(dtype, inner_lr=1e-5) for dtype in (torch.float32, torch.bfloat16))
    assert exact.exact == pytest.approx(rounded.exact, rel=0.1)
    assert exact.rounded == pytest.approx(exact.exact, rel=0.05)
    assert exact.cosine > 0.99
    assert rounded.cosine < 0.5


def test_a_large_inner_step_survives():
    found = measured(torch.float32, inner_lr=0.05)
    assert found.after < found.before
    assert found.outer < 0.999
    assert measured(torch.float32, inner_lr=1e-5).outer > 0.99999
    assert measured(torch.bfloat16, inner_lr=0.05).cosine > 0.9


def test_lengths_are_of_all_parts_together():
    a, b = [torch.tensor([3.0]), torch.zeros(2)], [torch.zeros(1), torch.tensor([0.0, 4.0])]
    assert lengths(a, b) == (3.0, 4.0, 0.0)
