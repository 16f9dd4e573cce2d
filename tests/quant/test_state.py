"""Grids, GPTQ, fake quantization, calibration and the quantized state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import gptq_alone, randomize_, tiny_config

from pgolf_fast.artifact.load import build_model, load_artifact
from pgolf_fast.artifact.pack import pack
from pgolf_fast.artifact.standalone import reader
from pgolf_fast.config.presets import exp101
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.ops import reference
from pgolf_fast.quant.calibration import collect_hessians, quantize_model, self_generate
from pgolf_fast.quant.gptq import gptq
from pgolf_fast.quant.grid import (
    dequantize,
    fake_int6,
    fake_quantize_rows,
    make_fake,
    quantize_int8_rows,
    quantize_rows,
    round_to_grid,
    row_clips,
    row_scale,
)
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import (
    READERS,
    TABLES,
    QuantizedState,
    QuantizedTensor,
    dequantize_state,
    hessian_name,
    quantize_state,
    rebank,
    unbank,
)

GOLDEN = Path(__file__).parents[1] / "golden"
QUICK = QuantConfig(calibration_sequences=6, calibration_length=24, calibration_batch=4, small_tensor=600)


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"gptq_{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def problem(rows: int = 48, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.176 * torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator) * columns**-0.5
    return weight, inputs.T @ inputs / 8


def hessian_error(
    weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor
) -> float:
    error = (weight - dequantize(codes, scale)).double()
    return float(((error @ hessian.double()) * error).sum())


def random_model(seed: int = 0, **changes: object) -> GPT:
    config = tiny_config(**changes)
    spaces = torch.arange(config.vocab_size) % 3 == 0
    model = GPT(config, spaces)
    randomize_(model, seed)
    return model


# Grids


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["a", "b"])
def test_golden_codes_and_scales(name, native, monkeypatch):
    if not native:
        monkeypatch.setattr("pgolf_fast.quant.gptq.extension", lambda: None)
    expected = golden(name)
    weight = expected["weight"]
    results = {
        "per_row": quantize_rows(weight),
        "int8": quantize_int8_rows(weight),
        "gptq": gptq_alone(weight, expected["hessian"]),
    }
    for kind, (codes, scale) in results.items():
        assert torch.equal(scale.float(), expected[f"scale_{kind}"]), kind
        assert (codes == expected[f"q_{kind}"]).float().mean() >= 0.999, kind


def test_step_floor():
    clip = torch.tensor([0.0, 0.5, 1.0, 3.1])
    assert row_scale(clip, 31).tolist() == torch.tensor([1 / 31, 1 / 31, 1 / 31, 0.1]).half().tolist()
    assert row_scale(clip, 127)[0].item() == 0.00787353515625
    free = row_scale(clip, 31, floor=False)
    assert free[0] > 0
    assert torch.equal(free[1:], (clip[1:] / 31).half())


def test_one_percentile_serves_the_whole_matrix():
    weight, _ = problem()
    weight[0, 0] = 4.0
    codes, scale = quantize_rows(weight, scale_floor=False)
    percentiles = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    candidates = [row_scale(weight.abs().quantile(p, dim=1), 31, floor=False) for p in percentiles]
    errors = [(weight - dequantize(round_to_grid(weight, s, 31), s)).square().mean() for s in candidates]
    best = int(torch.stack(errors).argmin())
    assert torch.equal(scale, candidates[best])
    assert torch.equal(codes, round_to_grid(weight, scale, 31))


@pytest.mark.parametrize("columns", [1, 2, 33, 1000])
def test_row_clips_are_quantiles_to_the_bit(columns):
    weight = torch.randn(10, columns)
    percentiles = (0.97, 1.0, 0.5, 0.999, 0.0, 0.99999)
    want = torch.quantile(weight.abs(), torch.tensor(percentiles), dim=1)
    assert torch.equal(row_clips(weight, percentiles), want)
    assert torch.equal(row_clips(weight, (1.0,))[0], weight.abs().amax(1))


def test_without_floor_the_error_is_smaller():
    weight, _ = problem()
    floored, free = (quantize_rows(weight, scale_floor=floor) for floor in (True, False))
    errors = [(weight - dequantize(*q)).square().mean() for q in (floored, free)]
    assert errors[1] < 0.5 * errors[0]
    table = 0.005 * torch.randn(40, 16)
    errors = [
        (table - dequantize(*quantize_int8_rows(table, scale_floor=f))).square().mean() for f in (True, False)
    ]
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.full((2, 2), torch.nan), torch.zeros(0, 4)])
def test_rejects_what_is_no_finite_matrix(bad):
    for quantize in (quantize_rows, quantize_int8_rows):
        with pytest.raises(PgolfError, match=r"shape|4 of 4 values are NaN"):
            quantize(bad)


# GPTQ


def test_gptq_beats_rounding_in_hessian_error():
    weight, hessian = problem(512, 512)
    codes, scale = gptq_alone(weight, hessian)
    plain = quantize_rows(weight)
    assert scale.unique().tolist() == [0.032257080078125]
    assert hessian_error(weight, codes, scale, hessian) < 0.9 * hessian_error(weight, *plain, hessian)
    assert (weight - dequantize(codes, scale)).square().mean() > 8.67e-5


def test_gptq_with_an_uncorrelated_hessian_is_rounding():
    weight, _ = problem()
    codes, scale = gptq_alone(weight, torch.eye(96))
    want = quantize_rows(weight)
    assert torch.equal(codes, want[0])
    assert torch.equal(scale, want[1])


def test_gptq_matches_the_papers_algorithm():
    """Column by column with an explicit inverse, removing each column from the inverse by elimination."""
    weight, hessian = problem(20, 40, seed=3)
    codes, scale = gptq_alone(weight, hessian, damping=0.01, block_size=7)
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(40)
    left = hessian.diagonal().argsort(descending=True).tolist()
    w, step, inverse = weight.double(), scale.double()[:, None], torch.linalg.inv(h)
    want = torch.zeros_like(codes)
    for column in list(left):
        q = (w[:, column : column + 1] / step).round().clamp(-31, 31)
        want[:, column] = q.squeeze(1).to(torch.int8)
        error = (w[:, column : column + 1] - q * step) / inverse[column, column]
        left.remove(column)
        w = w - error * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (codes == want).float().mean() >= 0.999


@pytest.mark.parametrize("floor", [True, False])
@pytest.mark.parametrize("block_size", [1, 32, 500])
def test_sharing_and_blocks_change_nothing(floor, block_size):
    _, hessian = problem()
    weights = {str(rows): problem(rows, seed=rows)[0] for rows in (5, 48, 13)}
    together = gptq([(weights, hessian)], scale_floor=floor, block_size=block_size)
    for name, weight in weights.items():
        codes, scale = gptq_alone(weight, hessian, scale_floor=floor)
        assert torch.equal(together[name][1], scale)
        assert (together[name][0] == codes).float().mean() >= 0.999


def test_groups_are_independent(device):
    """A GPU stacks groups of equal shape: here two of three, one of which has more candidates."""
    groups = []
    for index, (rows, columns, largest) in enumerate([(20, 96, 0.5), (20, 96, 0.5), (33, 40, 4.0)]):
        weight, hessian = problem(rows, columns, seed=index)
        weight[0, 0] = largest
        groups.append(({f"{index}.a": weight, f"{index}.b": weight[:7] * 0.5}, hessian))
    together = gptq([({n: w.to(device) for n, w in ws.items()}, h.to(device)) for ws, h in groups])
    assert list(together) == [name for weights, _ in groups for name in weights]
    assert all(codes.untyped_storage().nbytes() == codes.numel() for codes, _ in together.values())
    for weights, hessian in groups:
        for name, (codes, scale) in gptq([(weights, hessian)]).items():
            assert torch.equal(together[name][1].cpu(), scale)
            assert (together[name][0].cpu() == codes).float().mean() >= 0.995


def test_other_widths_and_unchanged_inputs():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    weight = torch.nn.Parameter(weight)
    codes, _ = gptq_alone(weight, hessian, clip_range=3)
    assert codes.abs().max() <= 3
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_dead_inputs_and_singular_hessians_are_damped():
    weight, hessian = problem()
    hessian[7] = hessian[:, 7] = 0
    codes, _ = gptq_alone(weight, hessian)
    assert torch.equal(codes[:, 7], torch.zeros(48, dtype=torch.int8))
    one = torch.ones(96, 96)
    assert torch.isfinite(dequantize(*gptq_alone(weight, one))).all()
    slightly_negative = one - 1.5 * torch.eye(96) * 0.03
    assert gptq_alone(weight, slightly_negative)[0].abs().max() > 0


def test_rejects_bad_hessians():
    weight, hessian = problem()
    with pytest.raises(PgolfError, match=r"blocks\.3.*not positive definite"):
        gptq_alone(weight, -hessian, name="blocks.3.mlp.fc.weight")
    with pytest.raises(PgolfError, match=r"\(96, 96\)"):
        gptq_alone(weight, hessian[:5, :5])
    with pytest.raises(PgolfError, match="Hessian of weight has values that are not finite"):
        gptq_alone(weight, hessian * torch.inf)


# Fake quantization


@pytest.mark.parametrize("shape", [(6, 10), (3, 6, 10)])
def test_fake_quantization_computes_the_formula(shape):
    weight = 0.7 * torch.randn(shape)
    weight[..., 0, 0] = 5.0
    weight.requires_grad_()
    out = fake_int6(weight)
    for rows, got in zip(weight.detach().reshape(-1, 10), out.detach().reshape(-1, 10), strict=True):
        step = max(rows.abs().max().item() / 31, 1 / 31)
        torch.testing.assert_close(got, torch.clamp(torch.round(rows / step), -32, 31) * step)
    upstream = torch.randn(shape)
    out.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_fake_quantization_agrees_with_the_stored_grid():
    weight, _ = problem()
    codes, scale = quantize_rows(weight, percentiles=(1.0,))
    # the stored step is rounded to float16, which moves 31 steps by less than 0.001
    torch.testing.assert_close(fake_int6(weight), dequantize(codes, scale), atol=1e-3, rtol=0)


def test_make_fake_returns_one_object_per_width():
    assert make_fake(6) is fake_int6
    assert make_fake(4) is make_fake(4)
    weight = torch.randn(4, 8)
    assert torch.equal(make_fake(4)(weight), fake_quantize_rows(weight, 7))
    with pytest.raises(PgolfError, match="9 bits"):
        make_fake(9)


def test_fake_quantized_banks_reach_the_loss_and_the_masters():
    model, tokens = random_model(), torch.randint(96, (2, 9))
    with torch.no_grad():
        model.qo_bank[:, 0, 0] = 3.0
        plain = model.loss(tokens, tokens)
        fake = model.loss(tokens, tokens, model.banks(transform=fake_int6))
        assert plain != fake
        rounded = random_model()
        rounded.load_state_dict(
            {n: fake_int6(t) if n.endswith("_bank") else t for n, t in model.state_dict().items()}
        )
        torch.testing.assert_close(rounded.loss(tokens, tokens), fake)
    model.loss(tokens, tokens, model.banks(transform=fake_int6)).backward()
    assert all(bank.grad.abs().max() > 0 for bank in model.bank_parameters())


# Calibration


def test_self_generated_text():
    model = random_model()
    text = self_generate(model, QUICK, seq_len=16)
    assert text.shape == (6, 16)
    assert text.dtype == torch.long
    assert 0 <= text.min() <= text.max() < 96
    assert torch.equal(text, self_generate(model, QUICK, seq_len=16))
    assert self_generate(model, QUICK, seq_len=100).shape == (6, 24)
    other = self_generate(model, replace(QUICK, seed=1), seq_len=16)
    assert not torch.equal(text, other)
    with pytest.raises(PgolfError, match="at least 2"):
        self_generate(model, QUICK, seq_len=1)


def test_self_generated_text_is_likely_to_the_model():
    model = random_model()
    text = self_generate(model, replace(QUICK, temperature=0.2), seq_len=24)
    noise = torch.randint(96, text.shape)
    with torch.no_grad():
        assert model.loss(text[:, :-1], text[:, 1:]) < model.loss(noise[:, :-1], noise[:, 1:]) - 1


class Recorder:
    """Records the input of every matrix, layer by layer, by the reference formulas."""

    def __init__(self, model: GPT, length: int):
        self.model, self.inputs = model, dict[str, torch.Tensor]()
        self.tables = rope_tables(model.config, length, torch.device("cpu"))

    def attention_input(self, layer, x, value_embed):
        m, c = self.model, self.model.config
        qo_bank = m.qo_bank.clone()
        qo_bank[c.num_layers + layer] = torch.eye(c.model_dim)  # leaves the input of the output projection
        args = qo_bank, m.kv_bank, m.blocks[layer].attn.q_gain, value_embed, *self.tables
        self.inputs[hessian_name(layer, "attn_in")] = x
        self.inputs[hessian_name(layer, "attn_out")] = reference.gqa_attention(
            x, *args, layer, c.num_kv_heads, m.uses_xsa(layer)
        )

    def mlp_input(self, layer, x):
        self.inputs[hessian_name(layer, "mlp_in")] = x
        pre = x @ self.model.mlp_up_bank[layer].T
        self.inputs[hessian_name(layer, "mlp_hidden")] = reference.activation(
            pre, self.model.config.mlp_activation
        )


@pytest.mark.parametrize("changes", [{}, {"mlp_activation": "swiglu", "mlp_mult": 2.0, "xsa_last_n": 2}])
@torch.no_grad()
def test_hessians_are_the_sums_of_squares(changes):
    model, tokens = random_model(**changes), torch.randint(96, (5, 13))
    recorder = Recorder(model, 12)
    model.hidden(tokens[:, :-1], observer=recorder)
    hessians = collect_hessians(model, tokens, batch=2)
    assert set(hessians) == {hessian_name(i, which) for i in range(4) for which in READERS}
    for name, inputs in recorder.inputs.items():
        rows = inputs.flatten(0, 1).double()
        want = rows.T @ rows / 5
        want += 0.01 * want.diagonal().mean() * torch.eye(len(want))
        assert hessians[name].dtype == torch.float32
        torch.testing.assert_close(
            hessians[name].double(), want, atol=1e-3 * want.abs().max().item(), rtol=1e-3
        )


def test_hessians_need_text():
    for shape in ((0, 5), (3, 1), (3,)):
        with pytest.raises(PgolfError, match="length of 2 or more"):
            collect_hessians(random_model(), torch.zeros(shape, dtype=torch.long))


# The quantized state


@pytest.mark.parametrize(
    "changes", [{}, {"mlp_activation": "swiglu", "mlp_mult": 2.0}, {"ve_enabled": False}]
)
def test_unbank_and_rebank(changes):
    state = random_model(**changes).state_dict()
    split = unbank(state)
    assert torch.equal(split["blocks.2.attn.proj.weight"], state["qo_bank"][4 + 2])
    assert torch.equal(split["blocks.1.attn.c_v.weight"], state["kv_bank"][4 + 1])
    assert torch.equal(split["blocks.3.mlp.proj.weight"], state["mlp_down_bank"][3])
    back = rebank(split)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_unbank_and_rebank_name_what_is_missing():
    state = dict(random_model().state_dict())
    split = unbank(state)
    del split["blocks.1.attn.c_v.weight"], state["kv_bank"]
    with pytest.raises(PgolfError, match=r"kv_bank .* blocks\.1\.attn\.c_v\.weight is missing"):
        rebank(split)
    with pytest.raises(PgolfError, match="no kv_bank"):
        unbank(state)
    with pytest.raises(PgolfError, match="every matrix"):
        rebank({})


def test_exp101_gets_66_int6_3_int8_and_55_float16_tensors():
    with torch.device("meta"):
        model = GPT(exp101().model, torch.zeros(1024, dtype=torch.bool))
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    done = quantize_state(state, QuantConfig(method="round", percentiles=(1.0,))).tensors
    bits = {name: t.bits if isinstance(t, QuantizedTensor) else 16 for name, t in done.items()}
    assert len(bits) == 124
    assert [list(bits.values()).count(b) for b in (6, 8, 16)] == [66, 3, 55]
    assert {n for n, b in bits.items() if b == 8} == {
        "tok_emb.weight",
        "bigram.embed.weight",
        "ve_shared.embed.weight",
    }
    assert sum(t.numel() for t in done.values() if isinstance(t, torch.Tensor)) == 91_231


@pytest.mark.parametrize("grid", ["reference", "percentile", "rd"])
def test_tables_that_stay_float16(grid, tmp_path):
    """Only the tables lose their codes, and they come back from an artifact as float16."""
    model = random_model()
    config = replace(QUICK, grid=grid, tables="float16", small_tensor=10)

    def quantized(config):
        if grid == "rd":
            return rate_distortion(model, config, seq_len=24).quantize(1e-6)
        return quantize_model(model, config, seq_len=24)

    found, usual = quantized(config).tensors, quantized(replace(config, tables="int8")).tensors
    codes, more = ({n for n, t in s.items() if isinstance(t, QuantizedTensor)} for s in (found, usual))
    assert more - codes == set(TABLES)
    run = RunConfig(name="test", model=model.config, quant=config)
    pack(QuantizedState(found), run, tmp_path / "m", PackConfig(code_bytes=0))
    stored, state = load_artifact(tmp_path / "m")
    again = build_model(stored, state, model.has_leading_space)
    assert stored.quant.tables == "float16"
    _, arrays = reader.read_artifact((tmp_path / "m").read_bytes())
    alone = reader.dequantized(arrays)[0]
    for name in TABLES:
        table = model.get_parameter(name).detach().half().float()
        assert torch.equal(again.get_parameter(name), table)
        assert torch.equal(alone[name], table)


@pytest.mark.parametrize("method", ["gptq", "round"])
def test_quantized_model_is_close_to_the_model(method):
    model = random_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = replace(QUICK, method=method)
    quantized = quantize_model(model, config, seq_len=24)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert isinstance(quantized.tensors["tok_emb.weight"], QuantizedTensor)
    assert quantized.tensors["blocks.0.attn_scale"].dtype == torch.float16
    assert len(quantized.matrices()) == 24
    state = dequantize_state(quantized)
    assert all(t.dtype == torch.float32 for t in state.values())
    other = GPT(model.config, model.has_leading_space)
    other.load_state_dict(state)
    tokens = torch.randint(96, (4, 24))
    with torch.no_grad():
        difference = (other.logits(tokens) - model.logits(tokens)).square().mean().sqrt()
        assert 0 < difference < 0.25 * model.logits(tokens).std()


def test_gptq_moves_the_model_less_than_rounding():
    model = random_model()
    text = self_generate(model, replace(QUICK, calibration_sequences=32), seq_len=24)
    hessians = collect_hessians(model, text)
    tokens = self_generate(model, replace(QUICK, calibration_sequences=32, seed=9), seq_len=24)
    differences = {}
    for method in ("gptq", "round"):
        other = GPT(model.config, model.has_leading_space)
        quantized = quantize_state(model.state_dict(), replace(QUICK, method=method, bits=4), hessians)
        other.load_state_dict(dequantize_state(quantized))
        with torch.no_grad():
            differences[method] = (other.logits(tokens) - model.logits(tokens)).square().mean().item()
    assert differences["gptq"] < 0.9 * differences["round"]


def test_quantize_state_errors():
    state = dict(random_model().state_dict())
    with pytest.raises(PgolfError, match=r"needs the Hessian blocks\.0\.attn_in"):
        quantize_state(state, QUICK)
    plain = replace(QUICK, method="round")
    for name, value in (("kv_bank", torch.nan), ("skip_weights", 1e6), ("tok_emb.weight", torch.inf)):
        broken = {**state, name: torch.full_like(state[name], value)}
        label = "blocks" if name == "kv_bank" else name
        with pytest.raises(PgolfError, match=rf"{label}.*values are (NaN|infinite)"):
            quantize_state(broken, plain)
