"""Comparison of adapters on one model, and the bootstrap of their gains."""

import json
from dataclasses import replace

import numpy as np
import pytest
from evaluations import SEQ, STRIDE, adapted, stream_of, text, tiny_model
from helpers import tiny_config

from pgolf_fast.config.schema import RunConfig
from pgolf_fast.config.ttt import LoraConfig, TTTConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.documents import document_starts
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.lab.compare.sweep import sweep

BASE = TTTConfig(
    chunk_tokens=64,
    epochs=2,
    lr=0.02,
    decay="constant",
    batch_seqs=2,
    parameters="all",
    freeze_blocks=1,
    quantize_forward="none",
    lora=LoraConfig(rank=3, lr=0.02, segment_tokens=16, epochs=2, documents=3),
)


def run(model, config):
    return adapted(model, stream_of(text()), sliding_windows(len(text()) - 1, SEQ, STRIDE), config)


def test_sweep_compares_on_the_same_windows_and_repeats_nothing(tmp_path, monkeypatch):
    model = tiny_model()
    config = RunConfig(model=tiny_config())
    config = replace(config, eval=replace(config.eval, stride=STRIDE, seq_len=SEQ))
    chosen = {"adamw": replace(BASE, adapter="adamw"), "lora": replace(BASE, adapter="lora")}
    rows = sweep(model, stream_of(text()), config, chosen, None, tmp_path)
    assert [row.name for row in rows] == ["sliding", "adamw", "lora"]
    assert (rows[0].gain, rows[0].updates) == (0, 0)
    for row in rows[1:]:
        assert row.gain == pytest.approx(rows[0].bpb - row.bpb)
        assert row.low <= row.gain <= row.high
        assert row.bpb == pytest.approx(run(model, chosen[row.name]).score.bpb, abs=1e-6)
    monkeypatch.setattr("pgolf_fast.evaluation.scores.Evaluator.adapted", None)
    assert sweep(model, stream_of(text()), config, chosen, None, tmp_path) == rows
    starts = document_starts(text())
    after = int(starts[len(starts) // 2])
    later = sweep(model, stream_of(text()), config, chosen, None, tmp_path, after=after)
    nats = [json.loads((tmp_path / f"{n}.json").read_text())["nats"] for n in ("sliding", "lora")]
    gained = sum(nats[0][len(starts) // 2 :]) - sum(nats[1][len(starts) // 2 :])
    size = stream_of(text()).target_bytes[after:].sum()
    assert later[2].gain == pytest.approx(gained / np.log(2) / size)
    assert later[2].gain != pytest.approx(rows[2].gain)
    with pytest.raises(PgolfError, match="no document begins at target 1,000,000 or later"):
        sweep(model, stream_of(text()), config, chosen, None, tmp_path, after=10**6)
    other = {"lora": replace(chosen["lora"], grad_clip=0.1)}
    with pytest.raises(TypeError):
        sweep(model, stream_of(text()), config, other, None, tmp_path)
