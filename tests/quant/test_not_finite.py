"""NaN, infinity and overflow in what is quantized: named, never written."""

from __future__ import annotations

import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.decoding import sample
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.calibration import collect_hessians, quantize_model
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor

QUICK = QuantConfig(calibration_sequences=6, calibration_length=24, calibration_batch=4, small_tensor=600)


@pytest.mark.parametrize("suffix", [".scale", ".columns"])
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.nan, "values are NaN"),
        (torch.inf, "values are infinite"),
        (-1.0, "a step is 0 or less"),
        (0.0, "a step"),
    ],
)
def test_steps_that_are_no_steps_are_named(tmp_path, suffix, value, problem):
    """A step of zero divides by zero in test-time training; an infinite one makes NaN of the codes 0."""
    one = QuantizedTensor(torch.ones(4, 6, dtype=torch.int8), torch.ones(4).half(), 2, torch.ones(6).half())
    state = QuantizedState({"blocks.0.mlp.fc.weight": one, "smear.gate": torch.ones(3).half()})
    assert state.check() is state
    state.save(tmp_path / "w", QUICK)
    (one.scale if suffix == ".scale" else one.column_scale)[1] = value
    with pytest.raises(PgolfError, match=rf"^blocks.0.mlp.fc.weight{suffix}: .*{problem}"):
        state.check()
    state.save(tmp_path / "w", QUICK)
    with pytest.raises(PgolfError, match=rf"w holds no quantized model \(blocks.*{suffix}: .*{problem}"):
        QuantizedState.load(tmp_path / "w")


def test_overflow_while_calibrating_names_the_block():
    """Sampling from NaN ended in a traceback of torch; squares alone overflow before the values do."""
    for name, first, size, problem in (
        ("mlp_up_bank", 2, 1e19, r"block 2 \(blocks.2.mlp_hidden\)"),
        ("kv_bank", 5, 1e25, r"block 1 \(blocks.1.attn_out\)"),  # V of block 1
    ):
        model = randomize_(GPT(tiny_config()), 0)
        with torch.no_grad():
            getattr(model, name)[first] *= size
        with pytest.raises(PgolfError, match=rf"^activations overflow in {problem}: the run diverged"):
            quantize_model(model, QUICK, seq_len=24)
        tokens = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(0))
        with pytest.raises(PgolfError, match=problem):
            collect_hessians(model, tokens)


def test_text_is_not_sampled_from_logits_that_are_not_finite():
    """argmax takes NaN for the most likely token, without a word."""
    for value in (torch.nan, torch.inf):
        logits = torch.zeros(2, 5)
        logits[1, 2] = value
        for temperature in (0.0, 0.8):
            with pytest.raises(PgolfError, match="logits are not finite: its activations overflow"):
                sample(logits, temperature=temperature)
