"""Grid rd: importances, steps, costs, fitting a byte target, and an artifact round trip."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.artifact import fit
from pgolf_fast.artifact.fit import TOLERANCE, fit_to_target, mixed
from pgolf_fast.artifact.load import load_artifact, unpack
from pgolf_fast.artifact.pack import artifact_bytes, pack
from pgolf_fast.artifact.standalone import reader
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.calibration import (
    _fit_table,
    collect_fisher,
    collect_hessians,
    quantize_model,
    self_generate,
)
from pgolf_fast.quant.gptq import inverse_factor
from pgolf_fast.quant.rd import RateDistortion, code_costs, rate_distortion, short_floats, short_steps
from pgolf_fast.quant.state import (
    QuantizedTensor,
    bank_grids,
    code_bits,
    dequantize_state,
    group_of,
    quantize_state,
)

QUANT = QuantConfig(grid="rd", calibration_sequences=32, calibration_length=24, small_tensor=600)
RUN = RunConfig(name="test", model=tiny_config(), quant=QUANT)
FREE_CODE = PackConfig(code_bytes=0)
PRICE = 1e-7


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(RUN.model, torch.arange(RUN.model.vocab_size) % 3 == 0)
    randomize_(model, 0)
    return model


@pytest.fixture(scope="module")
def text(model):
    return self_generate(model, QUANT, 24)


@pytest.fixture(scope="module")
def fishers(model, text):
    return collect_fisher(model, text, collect_hessians(model, text))


@pytest.fixture(scope="module")
def grids(model, fishers):
    return RateDistortion(model.state_dict(), fishers, QUANT)


def size(state) -> int:
    return artifact_bytes(state, RUN, FREE_CODE)


def divergence(model: GPT, state, tokens) -> float:
    """KL divergence in nats per token from the model to its version with that state."""
    other = GPT(model.config, model.has_leading_space)
    other.load_state_dict(state)
    with torch.no_grad():
        p, q = (torch.log_softmax(m.logits(tokens).double(), dim=-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


# Importances


def test_recovers_the_factors_of_gradients():
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp(torch.randn(200, generator=generator))
    columns = torch.linalg.qr(torch.randn(12, 12, generator=generator)).Q * torch.linspace(0.3, 2, 12)
    gradients = rows.sqrt()[:, None] * torch.randn(64, 200, 12, generator=generator) @ columns.T
    fisher = _fit_table(gradients, 64)
    hessian = columns @ columns.T
    scale = hessian.diagonal().mean()
    torch.testing.assert_close(fisher.hessian, hessian / scale, atol=0.05, rtol=0.05)
    want = torch.lerp(rows, rows.mean(), 0.1) * scale
    assert (fisher.rows / want).log().abs().max() < 0.35


@pytest.mark.parametrize(
    ("bank", "slot", "name"),
    [
        ("qo_bank", 1, "blocks.1.attn.c_q.weight"),
        ("mlp_down_bank", 2, "blocks.2.mlp.proj.weight"),
        ("tok_emb.weight", None, "tok_emb.weight"),
    ],
)
def test_factors_foretell_the_divergence(model, text, fishers, bank, slot, name):
    """Errors spread as GPTQ leaves them cost 1/2 sum_r f_r e_r^T H e_r nats per token."""
    fisher, strength = fishers[name], 0.01
    order, factor = inverse_factor(fisher.hessian, fisher.damping)
    noise = torch.randn(len(fisher.rows), len(order), generator=torch.Generator().manual_seed(1))
    error = torch.empty_like(noise)
    error[:, order] = strength * noise @ factor / fisher.rows.sqrt()[:, None]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    (state[bank] if slot is None else state[bank][slot]).add_(error)
    expected = 0.5 * float((fisher.rows[:, None] * (error @ fisher.hessian) * error).sum())
    assert 0.5 < divergence(model, state, text[:, :-1]) / expected < 2


def test_importances_need_text_and_leave_the_model_alone(model, text):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = collect_fisher(model, text[:2], collect_hessians(model, text[:2]))
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert len(found) == 24 + 5  # bank matrices, three tables, two projections
    with pytest.raises(PgolfError, match="length of 2 or more"):
        collect_fisher(model, text[:, :1], {})


# Steps and costs


def test_short_steps_have_an_empty_lower_byte():
    steps = torch.logspace(-4, 4, 500)
    short = short_steps(steps)
    assert (short / steps).log().abs().max() <= math.log(9 / 8)
    assert torch.equal(short.half().float(), short)
    assert (short.half().view(torch.int16) & 0xFF == 0).all()
    assert torch.equal(short_floats(torch.tensor([-1.3, 0.0, 1e-9])), torch.tensor([-1.25, 0.0, 0.0]))


def test_costs_are_those_of_rounded_normal_numbers():
    costs = code_costs(torch.tensor([0.5, 4.0, 20.0]))
    assert ((2.0**-costs).sum(1) - 1).abs().max() < 1e-3
    values = torch.round(4 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).long()
    shares = torch.bincount(values + 128, minlength=256) / len(values)
    entropy = float(-(shares * shares.clamp_min(1e-9).log2()).sum())
    assert float(costs[1, values + 128].mean()) == pytest.approx(entropy, rel=0.01)
    assert torch.isfinite(code_costs(torch.tensor([0.01, 500.0]))).all()


def test_steps_are_the_formula(model, fishers, grids):
    """Rows 1 / sqrt(f_r), columns U_ii, together sqrt(12 price / ln 2): to the nearest short step."""
    for name in ("blocks.0.attn.c_v.weight", "tok_emb.weight"):
        fisher, tensor = fishers[name], grids.quantize(1e-5).tensors[name]
        order, factor = inverse_factor(fisher.hessian, fisher.damping)
        pivots = torch.empty(len(order))
        pivots[order] = factor.diagonal()
        want = math.sqrt(12 * 1e-5 / math.log(2)) * pivots / fisher.rows.sqrt()[:, None]
        off = (tensor.step() / want).log().abs()
        assert off.max() < 2.1 * math.log(9 / 8)


def test_steps_are_the_best_ones():
    """On weights and errors as in the derivation, coarser or finer steps cost more nats and bits together."""
    generator = torch.Generator().manual_seed(0)
    weights, price = torch.randn(1_000_000, generator=generator), 1e-9
    best = math.sqrt(12 * price / math.log(2))

    def total(step: float) -> float:
        codes = torch.round(weights / step)
        shares = codes.unique(return_counts=True)[1] / len(weights)
        bits = -float((shares * shares.log2()).sum())
        return float(0.5 * (weights - codes * step).double().square().mean()) + price * bits

    assert total(best) < min(total(0.8 * best), total(1.25 * best))


def test_every_matrix_takes_the_bits_it_needs(grids):
    coarse, fine = grids.quantize(1e-5), grids.quantize(1e-10)
    for name, tensor in fine.tensors.items():
        if isinstance(tensor, QuantizedTensor):
            assert tensor.bits == code_bits(tensor.codes) >= coarse.tensors[name].bits
    assert len({t.bits for t in coarse.matrices().values()}) > 1
    assert code_bits(torch.tensor([-4, 3])) == 4
    assert code_bits(torch.zeros(0)) == code_bits(torch.zeros(3)) == 2


def test_largest_weights_are_not_clipped(model, fishers):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state["mlp_up_bank"][0, :, 5] *= 50
    quantized = RateDistortion(state, fishers, QUANT).quantize(1e-8)
    up = quantized.tensors["blocks.0.mlp.fc.weight"]
    error = (state["mlp_up_bank"][0] - up.dequantized())[:, 5].abs()
    assert (error <= 0.51 * up.step()[:, 5]).float().mean() > 0.95


# Corrections of low rank


def test_a_correction_is_taken_where_it_pays(model, fishers):
    """A table's outlier column, too wide for 8 bits, is one direction of error."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state["tok_emb.weight"][:, 3] *= 300
    plain = RateDistortion(state, fishers, QUANT).quantize(PRICE).tensors
    mended = RateDistortion(state, fishers, replace(QUANT, rank=2)).quantize(PRICE).tensors
    table, before = mended["tok_emb.weight"], plain["tok_emb.weight"]
    assert table.low_rank is not None
    assert torch.equal(table.codes, before.codes)
    errors = [(state["tok_emb.weight"] - t.dequantized())[:, 3].square().mean() for t in (table, before)]
    assert errors[0] < 0.1 * errors[1]
    taken = [n for n, t in mended.items() if isinstance(t, QuantizedTensor) and t.low_rank is not None]
    assert len(taken) < 5


# Landing


@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
@pytest.mark.parametrize("rank", [0, 2])
def test_lands_under_the_target(model, fishers, share, rank):
    grids = RateDistortion(model.state_dict(), fishers, replace(QUANT, rank=rank))
    target = int(share * size(grids.quantize(1e-9)))
    landed = fit_to_target(grids, size, target)
    assert landed.artifact_bytes == size(landed.state)
    assert target - TOLERANCE <= landed.artifact_bytes <= target


def test_a_sample_saves_a_round(model, fishers, monkeypatch):
    """A large model's first price comes from some of its rows; the fit is as exact as without."""
    grids = RateDistortion(model.state_dict(), fishers, QUANT)
    target = int(0.6 * size(grids.quantize(1e-9)))
    monkeypatch.setattr(fit, "SAMPLE_WEIGHTS", grids.weights // 3)
    prices = []
    original = RateDistortion.quantize

    def counted(self, price, like=None):
        prices.append((price, self is grids))
        return original(self, price, like)

    monkeypatch.setattr(RateDistortion, "quantize", counted)
    landed = fit_to_target(grids, size, target)
    assert target - TOLERANCE <= landed.artifact_bytes <= target
    assert not prices[0][1]
    assert sum(whole for _, whole in prices) <= 4
    sampled = grids.sampled(3)
    for name, tensor in original(sampled, prices[0][0]).matrices().items():
        assert len(tensor.codes) == -(-len(grids.tensors[name]) // 3)


def test_stops_where_bits_buy_nothing(model, grids, text):
    landed = fit_to_target(grids, size, 10**9)
    assert landed.price == grids.finest_price
    # 8 bits are the limit of this model, whose weights are noise that it is sensitive to
    assert divergence(model, dequantize_state(landed.state), text[:, :-1]) < 5e-3


def test_what_cannot_land(grids):
    with pytest.raises(PgolfError, match="even with nearly all weights zero"):
        fit_to_target(grids, size, 500)


def test_rows_of_two_states_mix(grids):
    fine = grids.quantize(PRICE)
    coarse = grids.quantize(2 * PRICE, fine)
    first = next(iter(fine.matrices()))
    rows = len(fine.tensors[first].codes)
    for taken in (0, 5, rows + 3):
        state = mixed(fine, coarse, taken)
        for name, tensor in state.matrices().items():
            own = min(taken, rows) if name == first else max(0, taken - rows) if name != first else 0
            a, b = fine.tensors[name], coarse.tensors[name]
            if name == first:
                assert torch.equal(tensor.dequantized()[:own], b.dequantized()[:own])
                assert torch.equal(tensor.dequantized()[own:], a.dequantized()[own:])
            assert torch.equal(tensor.column_scale, a.column_scale)


@pytest.mark.parametrize("grid", ["reference", "percentile"])
def test_loses_less_than_other_grids_at_equal_bytes(model, text, grids, grid):
    other = quantize_model(model, replace(QUANT, grid=grid, bits=4), seq_len=24)
    landed = fit_to_target(grids, size, size(other))
    lost = [divergence(model, dequantize_state(s), text[:, :-1]) for s in (landed.state, other)]
    assert lost[0] < 0.7 * lost[1]


# To an artifact and back


@pytest.mark.parametrize("rank", [0, 2])
def test_pack_and_load_bit_for_bit(model, fishers, tmp_path, rank):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state["tok_emb.weight"][:, 3] *= 300
    quantized = RateDistortion(state, fishers, replace(QUANT, rank=rank)).quantize(PRICE)
    report = pack(quantized, RUN, tmp_path / "m", FREE_CODE)
    assert report.weights_bytes <= size(quantized)
    again = unpack(tmp_path / "m")[1]
    assert again.tensors.keys() == quantized.tensors.keys()
    for name, tensor in quantized.tensors.items():
        other = again.tensors[name]
        if isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor.codes, other.codes)
            assert torch.equal(tensor.dequantized(), other.dequantized())
            assert tensor.bits == other.bits
        else:
            assert torch.equal(tensor, other)
    assert (quantized.tensors["tok_emb.weight"].low_rank is not None) == (rank > 0)
    want = dequantize_state(quantized)
    assert all(torch.equal(t, want[n]) for n, t in load_artifact(tmp_path / "m")[1].items())
    alone, steps, shifts = reader.dequantized(reader.read_artifact((tmp_path / "m").read_bytes())[1])
    banks = dict(zip(BANK_NAMES, reader.banked(alone, RUN.model.num_layers), strict=True))
    assert all(torch.equal(t, want[n]) for n, t in {**alone, **banks}.items())
    assert torch.equal(steps["blocks.0.attn.c_v.weight"], again.tensors["blocks.0.attn.c_v.weight"].step())
    assert bool(shifts) == (rank > 0)


def test_banks_on_their_grid_do_not_change(model, grids):
    quantized = grids.quantize(PRICE)
    name = "blocks.1.mlp.fc.weight"
    fc = quantized.tensors[name]
    low_rank = torch.randn(len(fc.codes), 1).half(), torch.randn(1, fc.codes.shape[1]).half()
    quantized.tensors[name] = replace(fc, low_rank=low_rank)
    state = dequantize_state(quantized)
    for bank, grid in zip(BANK_NAMES, bank_grids(quantized), strict=True):
        assert torch.equal(grid(state[bank]), state[bank])
        moved = grid(state[bank] + 0.3 * grid.step)
        assert torch.equal(moved, state[bank])


def test_one_column_step_for_matrices_of_one_input(grids):
    tensors = grids.quantize(PRICE).tensors
    names = [f"blocks.2.attn.c_{x}.weight" for x in "qkv"]
    assert {group_of(n) for n in names} == {"blocks.2.attn_in"}
    assert group_of("tok_emb.weight") == "tok_emb.weight"
    assert all(torch.equal(tensors[n].column_scale, tensors[names[0]].column_scale) for n in names)


# Settings


def test_rd_needs_gptq_and_a_target(model):
    with pytest.raises(PgolfError, match=r"needs quant\.method gptq"):
        rate_distortion(model, replace(QUANT, method="round"), seq_len=24)
    with pytest.raises(PgolfError, match="needs a byte target"):
        quantize_state(model.state_dict(), QUANT)
    for bad in ({"target_bytes": 0}, {"rank": 9}):
        with pytest.raises(PgolfError):
            replace(QUANT, **bad)
