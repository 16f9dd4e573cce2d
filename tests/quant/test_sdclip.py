"""Grid sdclip: steps, GPTQ of the token table, quantized corrections, a protected group, training text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import gptq_alone, randomize_, tiny_config

from pgolf_fast.artifact.load import load, load_artifact, unpack
from pgolf_fast.artifact.pack import pack
from pgolf_fast.artifact.standalone import reader
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.data.shards import random_windows, write_shard
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant import sdclip
from pgolf_fast.quant.calibration import collect_hessians, quantize_model
from pgolf_fast.quant.grid import dequantize, round_to_grid, sdclip_scale
from pgolf_fast.quant.state import TOKEN_TABLE, QuantizedState, QuantizedTensor, dequantize_state, unbank

SDCLIP = QuantConfig(
    grid="sdclip",
    rank=4,
    lqer_group=48,
    calibration_sequences=6,
    calibration_length=24,
    calibration_batch=4,
    small_tensor=600,
)


def random_model(**changes: object) -> GPT:
    config = tiny_config(**changes)
    return randomize_(GPT(config, torch.arange(config.vocab_size) % 3 == 0), 0)


def problem(rows: int = 48, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.176 * torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) * columns**-0.5
    return weight, inputs.T @ inputs / 8


def test_steps_are_multiples_of_the_standard_deviation():
    weight, _ = problem()
    weight[3] = 0
    scale = sdclip_scale(weight, 31, 11.5)
    want = 11.5 * weight.double().std(dim=1) / 31
    torch.testing.assert_close(scale.double()[want > 0], want[want > 0], rtol=1e-3, atol=0)
    assert scale[3] > 0


def test_table_reads_the_final_states():
    model, tokens = random_model(), torch.randint(96, (5, 13))
    hessians = collect_hessians(model, tokens, batch=2, means=True)
    with torch.no_grad():
        rows = model.hidden(tokens[:, :-1]).flatten(0, 1).double()
    torch.testing.assert_close(
        hessians[TOKEN_TABLE].double(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5
    )
    sums = collect_hessians(model, tokens)
    assert set(hessians) == {*sums, TOKEN_TABLE}
    name = "blocks.1.mlp_in"
    plain = sums[name] * 5 / len(rows)
    off = ~torch.eye(len(plain), dtype=torch.bool)
    torch.testing.assert_close(hessians[name][off], plain[off], rtol=1e-4, atol=1e-5)


def test_the_largest_errors_are_corrected():
    model = random_model()
    state = {**model.state_dict(), "blocks.1.attn.attn_gate_w": torch.randn(4, 12)}
    hessians = collect_hessians(model, torch.randint(96, (6, 17)), means=True)
    done = sdclip.quantize_sdclip(state, SDCLIP, hessians).tensors
    plain = sdclip.quantize_sdclip(state, replace(SDCLIP, rank=0), hessians).tensors
    matrices = [n for n, t in plain.items() if isinstance(t, QuantizedTensor) and t.bits < 8]
    errors = {n: unbank(state)[n] - plain[n].dequantized() for n in matrices}
    assert TOKEN_TABLE in matrices
    assert done[TOKEN_TABLE].bits == 7
    worst = sorted(matrices, key=lambda n: -errors[n].norm())[:3]
    assert {n for n in matrices if done[n].low_rank is not None} == set(worst)
    for name in worst:
        left, right = done[name].low_rank
        assert (int(left.codes.min()), int(left.codes.max())) <= (-1, 1)
        assert left.codes.abs().max() <= 2 < right.codes.abs().max() <= 8
        assert torch.equal(done[name].codes, plain[name].codes)
    gate = done["blocks.1.attn.attn_gate_w"]
    assert gate.bits == 8
    assert gate.codes.abs().amax(1).tolist() == [127] * 4


@pytest.mark.parametrize("settings", [{}, {"rank": 0}, {"method": "round"}, {"protect_group": True}])
def test_artifact_round_trip(settings, tmp_path, monkeypatch):
    """Packed, loaded and read by the standalone script, all tensors are the same."""
    model = random_model(model_dim=64) if settings.get("protect_group") else random_model()
    config = replace(SDCLIP, **settings)
    quantized = quantize_model(model, config, seq_len=24)
    run = RunConfig(name="test", model=model.config, quant=config)
    path = tmp_path / "model.pgolf"
    pack(quantized, run, path, PackConfig(code_bytes=0))
    state = dequantize_state(quantized)
    again = unpack(path)[1]
    before, after = quantized.to_named(), again.to_named()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    stored, loaded = load_artifact(path)
    assert stored.quant == config
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    alone, steps, shifts = reader.dequantized(reader.read_artifact(path.read_bytes())[1])
    matrices = unbank(state)
    assert alone.keys() == matrices.keys()
    assert all(torch.equal(alone[name], tensor) for name, tensor in matrices.items())
    for name, tensor in quantized.matrices().items():
        assert torch.equal(steps[name].expand(tensor.codes.shape), tensor.step().expand(tensor.codes.shape))
        if shifts and tensor.low_rank is not None:
            assert torch.equal(shifts[name], tensor.correction())
    quantized.save(tmp_path / "state", config)
    named = QuantizedState.load(tmp_path / "state")[0].to_named()
    assert all(torch.equal(named[n], before[n]) for n in before)
    tokens = torch.randint(96, (2, 24))
    with torch.no_grad():
        dense = load(path, "artifact").model
        packed = load(path, "packed").model
        torch.testing.assert_close(packed.logits(tokens), dense.logits(tokens), rtol=1e-4, atol=1e-4)


def test_a_protected_group_has_8_bits():
    weight, hessian = problem(40, 128)
    got = sdclip.protect(weight, hessian, 64, sigmas=11.5, bits=6)
    plain = gptq_alone(weight, hessian, sigmas=11.5)
    assert got.codes[:, 64:].abs().max() > 31 >= got.codes[:, :64].abs().max()
    errors = [weight - whole for whole in (got.dequantized(), dequantize(*plain))]
    of_group, of_plain = (((e @ hessian) * e).sum() for e in errors)
    assert of_group < 0.8 * of_plain
    nothing = sdclip.protect(weight, hessian, 128, sigmas=11.5, bits=6)
    assert (nothing.codes == plain[0]).float().mean() >= 0.999


def test_round_needs_no_hessian():
    model = random_model()
    done = quantize_model(model, replace(SDCLIP, method="round", rank=0), seq_len=24).tensors
    table = done[TOKEN_TABLE]
    scale = sdclip_scale(model.tok_emb.weight, 63, 14.0)
    assert torch.equal(table.codes, round_to_grid(model.tok_emb.weight.detach(), scale, 63))
    with pytest.raises(PgolfError, match=r"needs the Hessian blocks\.0\.attn_in"):
        sdclip.quantize_sdclip(model.state_dict(), SDCLIP, {})


def test_damaged_factors_are_refused():
    named = quantize_model(random_model(), SDCLIP, seq_len=24).to_named()
    part = next(name for name in named if name.endswith(".right.q"))
    for broken in ({**named, part: named[part][1:]}, {n: t for n, t in named.items() if n != part}):
        with pytest.raises(PgolfError, match="correction of"):
            QuantizedState.from_named(broken, {"codes": 6, "embeddings": 7})


def test_windows_of_training_text(tmp_path):
    shards = [
        write_shard(tmp_path / f"x_train_{i}.bin", np.arange(101, dtype=np.uint16) + 200 * i) for i in (0, 1)
    ]
    windows = random_windows(shards, 18, 10, seed=3)
    assert windows.shape == (18, 11)
    assert (np.diff(windows) == 1).all()
    assert len(set(windows[:, 0])) == 18
    for i in (0, 1):  # one phase for each shard
        first = windows[windows[:, 0] // 200 == i, 0] % 200
        assert len(set(first % 10)) == 1
    assert not (np.diff(windows[:, 0]) > 0).all()
    assert np.array_equal(windows, random_windows(shards, 18, 10, seed=3))
    with pytest.raises(PgolfError, match=r"have \d+ windows of 50 tokens, not 4: lower"):
        random_windows(shards, 4, 50, seed=0)


@pytest.mark.parametrize(
    ("field", "value"), [("mlp_sigmas", 0.0), ("lqer_tensors", -1), ("table_bits", 9), ("lqer_group", 0)]
)
def test_settings_out_of_range(field, value):
    with pytest.raises(PgolfError, match=f"quant.{field} is {value}; it must"):
        QuantConfig(**{field: value})
