"""Schedules, parameter groups, Muon and weight averages."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import randomize_, tiny_config
from torch import nn

from pgolf_fast import ops
from pgolf_fast.config.presets import exp101, preset
from pgolf_fast.config.schema import AverageConfig, OptimConfig, QATConfig, TrainConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.gpt import GPT
from pgolf_fast.optim.average import WeightAverage
from pgolf_fast.optim.muon import Muon
from pgolf_fast.optim.optimizer import Optimizer
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.quant.grid import fake_int6


def triggered_at(seconds):
    schedule = Schedule(TrainConfig())
    schedule.state.decay_start = seconds
    return schedule


@pytest.mark.parametrize(
    ("elapsed", "multiplier"), [(1530.6, 1.0), (3165.3, 0.5), (3710.2, 0.25), (3835.0, 0.2), (4800.0, 0.0)]
)
def test_time_cosine_of_the_published_run(elapsed, multiplier):
    """Milestones that the logs of PR 1501 show, with the decay starting at 1530.6 s of 4800 s."""
    assert triggered_at(1530.6).multiplier(5000, elapsed) == pytest.approx(multiplier, abs=3e-4)


def test_multiplier_holds_at_the_start_and_waits_for_the_warmdown():
    schedule = Schedule(TrainConfig())
    assert schedule.multiplier(24, 4700.0) == 1.0  # the first 25 steps, regardless of the clock
    # untriggered: the last 2500 steps' worth of time; at 0.68 s a step that begins at 3100 s
    assert schedule.multiplier(4000, 2720.0) == 1.0
    assert 0 < schedule.multiplier(6000, 4080.0) < 1


def test_step_schedule_ends_at_zero():
    schedule = Schedule(
        TrainConfig(schedule="steps", max_seconds=None, steps=100, warmdown_steps=40, lr_hold_steps=0)
    )
    assert schedule.multiplier(60, 1e9) == 1.0
    assert schedule.multiplier(80, 0.0) == pytest.approx(0.5)
    assert schedule.multiplier(100, 0.0) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("length", "wanted"), [(40, [1, 1, 1, 1, 0.5, 0]), (100, [1, 0.8, 0.6, 0.4, 0.2, 0]), (200, None)]
)
def test_linear_decay(length, wanted):
    """A line to zero at the end; one that is longer than the run begins below 1 (PR 301: 0.6)."""
    config = TrainConfig(
        schedule="steps",
        max_seconds=None,
        steps=100,
        warmdown_steps=length,
        warmdown_shape="linear",
        lr_hold_steps=0,
    )
    found = [Schedule(config).multiplier(step, 0.0) for step in range(0, 101, 20)]
    assert found == pytest.approx(wanted or [0.5, 0.4, 0.3, 0.2, 0.1, 0])


def test_the_rate_of_pr_1855_ends_at_a_tenth():
    schedule = Schedule(preset("pr1855").train)
    shares = [0.1, 0.149, 0.575, 0.9, 0.95, 1.0]
    found = [schedule.multiplier(round(4900 * share) + 1, 599.5 * share) for share in shares]
    assert found == pytest.approx([1, 1, 0.5, 0.1 / 0.85, 0.1, 0.1])


@pytest.mark.parametrize("name", ["train.qat.below", "average.swa_below"])
def test_thresholds_that_the_floor_of_the_rate_hides_are_refused(name):
    low = {"train__qat__below": 0.25, "average__swa_below": 0.2} | {name.replace(".", "__"): 0.1}
    with pytest.raises(
        PgolfError, match=rf"{name} is 0\.1, which the rate never falls below: train\.min_lr is 0\.1"
    ):
        preset("exp101", train__min_lr=0.1, **low)
    assert preset("exp101", train__min_lr=0.05, **low).train.min_lr == 0.05


def test_linear_decay_of_pr_301():
    """20,000 steps of 49.7 ms are 994 s of a run of 600 s."""
    schedule = Schedule(preset("pr301").train)
    assert schedule.multiplier(0, 0.0) == 1
    for elapsed in (60.0, 300.0, 480.0):
        step = round(elapsed / 0.0497)
        assert schedule.multiplier(step, elapsed) == pytest.approx((600 - elapsed) / 994, rel=1e-3)
    assert schedule.multiplier(12072, 600.0) == 0


@pytest.mark.parametrize("pace", [0.0497, 0.4], ids=["eight GPUs", "one GPU"])
def test_qat_of_pr_301_is_the_last_fifth_of_the_time(pace):
    schedule = Schedule(preset("pr301").train)
    steps = [step for step in range(round(600 / pace)) if schedule.quantizes(step, step * pace)]
    assert steps == list(range(math.ceil(480 / pace), round(600 / pace)))


def test_qat_of_pr_301_is_the_last_fifth_of_the_steps():
    train = preset("pr301_tiny").train
    last = range(round(0.8 * train.steps), train.steps)
    assert [step for step in range(train.steps) if Schedule(train).quantizes(step, 1.0)] == list(last)


def test_qat_start_is_given_once():
    assert not Schedule(TrainConfig(qat=None)).quantizes(7499, 4799.0)
    with pytest.raises(PgolfError, match=r"below is 0\.25 and .*from_share is 0\.8; give one and set"):
        QATConfig(from_share=0.8)
    with pytest.raises(PgolfError, match="give one and set the other to None"):
        QATConfig(below=None)
    for share in (-0.1, 1.0):
        with pytest.raises(PgolfError, match=r"from_share is .*; it must be at least 0 and below 1"):
            QATConfig(below=None, from_share=share)


def test_adaptive_trigger_watches_every_hundredth_training_loss():
    """The first check sets the average; the decay starts at the first one that is not 0.05 nats better."""
    schedule = Schedule(TrainConfig())
    assert not schedule.observe(1999, 2.0, 1000.0)
    assert not schedule.observe(2000, 2.1, 1300.0)
    assert not schedule.observe(2050, 9.9, 1350.0)  # not due
    assert not schedule.observe(2100, 2.0, 1400.0)  # 0.1 better: average falls by 0.001
    assert schedule.observe(2200, 2.09, 1530.6)
    assert schedule.state.decay_start == 1530.6
    assert schedule.state.trigger_step == 2200
    assert not schedule.observe(2300, 2.09, 1600.0)  # fires once
    again = Schedule(TrainConfig())
    again.state = schedule.state
    assert again.multiplier(5000, 3165.3) == schedule.multiplier(5000, 3165.3)


def test_adaptive_trigger_can_be_switched_off():
    schedule = Schedule(replace(TrainConfig(), adaptive_warmdown=False))
    for step in range(2000, 3000, 100):
        assert not schedule.observe(step, 2.0, 0.0)


def test_muon_momentum_rises_linearly():
    optimizer = Optimizer(GPT(tiny_config()), OptimConfig())
    assert optimizer.muon_momentum(0) == pytest.approx(0.92)
    assert optimizer.muon_momentum(750) == pytest.approx(0.955)
    assert optimizer.muon_momentum(1500) == optimizer.muon_momentum(9999) == 0.99


def test_every_parameter_is_in_one_group_with_its_rate():
    model = GPT(exp101().model)
    optimizer = Optimizer(model, OptimConfig())
    names = {id(p): n for n, p in model.named_parameters()}
    adamw = {names[id(p)]: g["base_lr"] for g in optimizer.adamw.param_groups for p in g["params"]}
    assert set(optimizer.muon.banks) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    assert set(adamw) | set(optimizer.muon.banks) == set(names.values())
    assert not set(adamw) & set(optimizer.muon.banks)
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"}
    assert {n for n, lr in adamw.items() if lr == 0.035} == tables
    assert adamw["bigram.proj.weight"] == adamw["skip_weights"] == adamw["word_start_boost"] == 0.025


def test_weight_decays_of_pr_1855():
    """Tables and scalars have their own; without them, both take that of the banks."""
    model = GPT(tiny_config())
    for optim, wanted in (
        (preset("pr1855").optim, (0.095, 0.085, 0.02)),
        (OptimConfig(), (0.04, 0.04, 0.04)),
    ):
        optimizer = Optimizer(model, optim)
        *tables, scalars = (group["weight_decay"] for group in optimizer.adamw.param_groups)
        assert (optimizer.muon.weight_decay, *set(tables), scalars) == wanted


def test_rows_of_equal_norm_before_newton_schulz():
    """A row that is a thousand times as large as another has no more weight; a row of zeros stays zero."""
    g = torch.randn(1, 6, 9, dtype=torch.double)
    scaled = g * torch.tensor([1, 1000, 1, 1e-3, 1, 0]).double().unsqueeze(1)
    muon = Muon({}, weight_decay=0, newton_schulz_steps=5, row_norm=True)
    rows = scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    torch.testing.assert_close(muon.orthogonalize(scaled), ops.newton_schulz(rows))
    assert not muon.orthogonalize(scaled)[0, 5].any()


def test_polar_express_has_five_steps():
    with pytest.raises(PgolfError, match=r"muon_newton_schulz_steps is 4; Polar Express has 5 steps"):
        OptimConfig(muon_polar_express=True, muon_newton_schulz_steps=4)


def test_muon_scales_tall_banks_and_decays():
    """One step from zero momentum: each slot moves by lr * sqrt(rows/cols) along an orthogonal matrix."""
    bank = nn.Parameter(torch.ones(2, 48, 16))
    bank.grad = torch.randn_like(bank)
    Muon({"b": bank}, weight_decay=0.5, newton_schulz_steps=5).step(lr=0.1, momentum=0.0)
    moved = (bank.detach() - 1 + 0.05) / (0.1 * math.sqrt(3))
    singular = torch.linalg.svdvals(moved)
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_muon_without_gradient_says_so():
    with pytest.raises(RuntimeError, match="b has no gradient"):
        Muon({"b": nn.Parameter(torch.ones(1, 2, 2))}, weight_decay=0, newton_schulz_steps=1).step(
            lr=0.1, momentum=0.9
        )


def test_clip_bounds_the_global_norm():
    model = GPT(tiny_config())
    optimizer = Optimizer(model, OptimConfig(grad_clip=0.3))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = optimizer.clip()
    assert float(before) > 1
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert norm == pytest.approx(0.3, rel=1e-4)


def test_ema_uses_the_decay_of_the_steps_between_updates():
    model = nn.Linear(2, 2, bias=False)
    start = model.weight.detach().clone()
    average = WeightAverage(model, AverageConfig(ema_decay=0.998, ema_every=10, swa_every=None))
    with torch.no_grad():
        model.weight.add_(1.0)
    for step in range(1, 11):
        average.update(step, 1.0)
    torch.testing.assert_close(average.ema["weight"], start + (1 - 0.980179), atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", [None, fake_int6], ids=["plain", "qat"])
def test_shadows_are_written_with_the_masters(transform):
    """After a step the compute-dtype banks are the new masters', in the same memory, without another cast."""
    model = randomize_(GPT(tiny_config(), compute_dtype=torch.bfloat16), seed=1)
    model.allocate_gradient_banks()
    optimizer = Optimizer(model, OptimConfig())
    tokens = torch.randint(0, 96, (2, 16))
    for step in range(2):
        banks = model.banks(transform)
        addresses = [w.data_ptr() for w in banks.weights()]
        model.loss(tokens, tokens, banks).backward()
        optimizer.step(step, 1.0)
        assert (model.current_shadows() is not None) == (transform is None)
        again = list(model.banks(transform).weights())
        assert [w.data_ptr() for w in again] == addresses
        for weight, master in zip(again, model.bank_parameters(), strict=True):
            want = (master if transform is None else transform(master)).detach().bfloat16()
            assert torch.equal(weight.detach(), want)
