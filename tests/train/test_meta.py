"""Meta steps against their formulas by autograd in float64, and slot rates in a run."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import randomize_, tiny_config
from runs import assert_same, differs, make_dataset, make_trainer, run_config, run_steps, weights_after
from safetensors.torch import load_file

from pgolf_fast.artifact.load import load_artifact
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.config.schema import MetaConfig, RunConfig, TrainConfig
from pgolf_fast.console import read_metrics
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors
from pgolf_fast.model.bank import BANK_NAMES, Banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.train.checkpoint import newest_checkpoint
from pgolf_fast.train.loop import train
from pgolf_fast.train.meta import SlotRates, meta_step

RATED = {"train__meta__method": "cross_chunk", "train__meta__slot_rates": True, "train__meta__every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def wide_model():
    model = randomize_(GPT(tiny_config(), compute_dtype=torch.float64), seed=5)
    return model.double()


def batch(sequences=4, length=12):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (sequences, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def random_rates(model):
    rates = SlotRates(model)
    with torch.no_grad():
        for rate in rates.parameters():
            rate.uniform_(0.5, 1.5)
    return rates


def by_hand(model, tokens, targets, config, scale, rates):
    """Return the outer loss and every gradient from the definition, by autograd without banks."""
    banks = dict(zip(BANK_NAMES, model.bank_parameters(), strict=True))
    others = {n: p for n, p in model.named_parameters() if n not in banks}
    layers = model.config.num_layers
    blocks = [torch.arange(len(bank))[:, None, None] % layers for bank in banks.values()]
    if config.method == "fomaml" or len(tokens) == 1:
        half = tokens.shape[1] // 2
        inner, outer = [(t[:, :half], t[:, half:]) for t in (tokens, targets)]
    else:
        half = len(tokens) // 2
        inner, outer = [(t[:half], t[half:]) for t in (tokens, targets)]
    (x, outer_x), (y, outer_y) = inner, outer

    def gradient_at(weights):
        leaves = [w.detach().requires_grad_() for w in weights]
        found = torch.autograd.grad(model.loss(x, y, Banks(*leaves)), leaves)
        return [g * (block >= config.freeze_blocks) for g, block in zip(found, blocks, strict=True)]

    step = gradient_at(banks.values())
    if config.method == "sam":
        norm = torch.cat([g.flatten() for g in step]).norm()
        uphill = [config.sam_radius * g / norm for g in step]
        step = gradient_at([b + up for b, up in zip(banks.values(), uphill, strict=True)])
    factors = [1.0] * 4 if rates is None else [rate[:, None, None] for rate in rates.parameters()]
    stepped = [
        b.detach() - config.inner_lr * f * g for b, f, g in zip(banks.values(), factors, step, strict=True)
    ]
    if rates is None:
        stepped = [s.requires_grad_() for s in stepped]
    after = model.loss(outer_x, outer_y, Banks(*stepped))
    before = model.loss(outer_x, outer_y, Banks(*banks.values()))
    objective = scale * ((config.weight + config.delta_weight) * after - config.delta_weight * before)
    learned = {} if rates is None else dict(rates.named_parameters())
    wanted = [*others.values(), *stepped, *banks.values(), *learned.values()]
    found = torch.autograd.grad(objective, wanted, allow_unused=True, materialize_grads=True)
    gradients = dict(zip(others, found, strict=False))
    found = found[len(others) :]
    gradients |= {n: s + b for n, s, b in zip(banks, found[:4], found[4:8], strict=True)}
    return after.detach(), gradients, dict(zip(learned, found[8:], strict=True))


@pytest.mark.parametrize("rated", [False, True], ids=["plain", "rates"])
@pytest.mark.parametrize("delta", [0.0, 0.3])
@pytest.mark.parametrize("method", ["fomaml", "cross_chunk", "sam"])
def test_every_gradient_is_that_of_the_definition(method, delta, rated):
    config = MetaConfig(
        method=method,
        inner_lr=0.3,
        weight=0.7,
        delta_weight=delta,
        freeze_blocks=1,
        slot_rates=rated,
        sam_radius=0.4,
    )
    model, (tokens, targets) = wide_model(), batch(sequences=5)
    rates = random_rates(model) if rated else None
    want, gradients, rate_gradients = by_hand(model, tokens, targets, config, 0.25, rates)
    model.allocate_gradient_banks()
    before, learned = {}, {} if rates is None else dict(rates.named_parameters())
    for parameter in (*model.parameters(), *learned.values()):  # a meta step adds to what is there
        parameter.grad = torch.randn_like(parameter)
        before[parameter] = parameter.grad.clone()
    got = meta_step(model, tokens, targets, config, loss_scale=0.25, rates=rates)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    for name, parameter in model.named_parameters():
        added = parameter.grad - before[parameter]
        torch.testing.assert_close(added, gradients[name], rtol=1e-7, atol=1e-10, msg=name)
    for name, wanted in rate_gradients.items():
        added = learned[name].grad - before[learned[name]]
        torch.testing.assert_close(added, wanted, rtol=1e-7, atol=1e-12, msg=name)
        assert wanted.abs().max() > 1e-6
        assert not wanted[0]  # the first block is frozen


def gradients_of(config, tokens, targets, rates=None):
    model = wide_model()
    meta_step(model, tokens, targets, config, loss_scale=1.0, rates=rates)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_methods_agree_where_their_formulas_do():
    """Every method splits a single sequence in time; a radius near 0 and rates of 1 have no effect."""
    fomaml = MetaConfig(inner_lr=0.3, freeze_blocks=1)
    chunks = replace(fomaml, method="cross_chunk")
    one, several = batch(sequences=1), batch()
    assert_same(gradients_of(fomaml, *one), gradients_of(chunks, *one))
    assert differs(gradients_of(fomaml, *several), gradients_of(chunks, *several))
    plain = gradients_of(chunks, *several)
    assert_same(plain, gradients_of(chunks, *several, rates=SlotRates(wide_model())))
    near = gradients_of(replace(chunks, method="sam", sam_radius=1e-9), *several)
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, near[name], msg=name)
    assert differs(plain, gradients_of(replace(chunks, method="sam"), *several))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MetaConfig(inner_lr=-1.0), "train.meta.inner_lr is -1.0; it must not be negative"),
        (lambda: MetaConfig(weight=-0.5), "train.meta.weight is -0.5; it must not be negative"),
        (lambda: MetaConfig(sam_radius=0.0), "train.meta.sam_radius is 0.0; it must be positive"),
        (lambda: MetaConfig(weight=0.0), "would change nothing: raise one, or pass --train.meta none"),
        (lambda: MetaConfig(inner_lr=0.0, slot_rates=True), "train.meta.slot_rates needs it positive"),
        (lambda: MetaConfig(inner_lr=0.0, delta_weight=0.1), "train.meta.delta_weight needs it positive"),
        (
            lambda: RunConfig(train=TrainConfig(meta=MetaConfig(freeze_blocks=11, slot_rates=True))),
            "freezes all 11 layers, so nothing adapts: train.meta.slot_rates needs one that does",
        ),
    ],
)
def test_invalid_settings_are_refused(make, message):
    with pytest.raises(PgolfError, match=message):
        make()


def test_rates_are_trained_by_adamw_at_meta_steps_only(data):
    """They are clipped with the model's gradients, and constant between meta steps."""
    trainer = make_trainer(run_config(data, **RATED, train__meta__freeze_blocks=0, optim__grad_clip=1e-3))
    assert trainer.rates is not None
    mirror = {n: torch.nn.Parameter(p.detach().clone()) for n, p in trainer.rates.named_parameters()}
    c = trainer.config.optim
    adamw = torch.optim.AdamW(
        mirror.values(), betas=(c.adam_beta1, c.adam_beta2), eps=c.adam_eps, weight_decay=c.weight_decay
    )
    clip, step = trainer.optimizer.clip, trainer.optimizer.step

    def watched(number, multiplier):
        gradients = {n: p.grad for n, p in trainer.rates.named_parameters()}
        if gradients["qo_bank"] is not None:
            for name, parameter in mirror.items():
                parameter.grad = gradients[name].clone()
            adamw.param_groups[0]["lr"] = c.scalar_lr * multiplier
            adamw.step()
        step(number, multiplier)

    def clipped():
        grads = [p.grad.clone() for p in trainer.optimizer.parameters if p.grad is not None]
        norm = clip()
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-5)
        now = [p.grad for p in trainer.optimizer.parameters if p.grad is not None]
        for before, after in zip(grads, now, strict=True):
            torch.testing.assert_close(after, before * (c.grad_clip / norm), rtol=1e-3, atol=1e-9)
        return norm

    trainer.optimizer.step, trainer.optimizer.clip = watched, clipped
    for number in range(4):
        before = {n: p.detach().clone() for n, p in trainer.rates.named_parameters()}
        result = trainer.advance()
        assert (result.meta_loss is not None) == (number % 2 == 0)
        now = {n: p.detach() for n, p in trainer.rates.named_parameters()}
        assert differs(before, now) == (number % 2 == 0)
        for name, value in now.items():
            torch.testing.assert_close(value, mirror[name].detach(), rtol=1e-6, atol=1e-7, msg=name)
    trainer.loader.close()


def test_rates_do_not_change_the_first_step(data):
    """Rates are initially 1, so without clipping a run's first step is the same."""
    plain, rated = (
        weights_after(
            run_config(data, **{**RATED, "train__meta__slot_rates": rates}, optim__grad_clip=None), 1
        )
        for rates in (False, True)
    )
    assert_same(dict(plain.model.state_dict()), dict(rated.model.state_dict()))


def test_rates_resume_bit_for_bit(data):
    config = run_config(data, **RATED)
    straight = weights_after(config)
    half = make_trainer(config)
    run_steps(half, 5)
    again = make_trainer(config)
    again.restore({k: v.clone() for k, v in half.tensors().items()}, json.loads(json.dumps(half.metadata())))
    run_steps(again, 3)
    assert_same(straight.tensors(), again.tensors())
    assert differs(
        {n: v for n, v in straight.tensors().items() if n.startswith("slot_rates.")},
        {f"slot_rates.{n}": torch.ones_like(v) for n, v in straight.rates.named_parameters()},
    )


def test_rates_are_in_checkpoint_metrics_and_log_but_not_in_the_artifact(data, tmp_path):
    config = run_config(data, **RATED)
    folder = train(config, tmp_path / "run").folder
    tensors, _ = load_tensors(newest_checkpoint(folder.checkpoints))
    rows = [row for row in read_metrics(folder.metrics_file) if row["kind"] == "slot_rates"]
    assert [row["step"] for row in rows] == [4, 8]
    for name in BANK_NAMES:
        assert rows[-1][name] == tensors[f"slot_rates.{name}"].tolist()
        assert len(rows[-1][name]) == (6 if name in ("qo_bank", "kv_bank") else 3)
    assert rows[0]["qo_bank"] != rows[-1]["qo_bank"]
    low, high = min(rows[-1]["kv_bank"]), max(rows[-1]["kv_bank"])
    assert f"kv_bank {low:.3f} to {high:.3f}, mean" in folder.log_file.read_text()
    quantize_run(folder, config.quant)
    pack_run(folder, config.pack)
    kept = set(load_file(folder.model_file))
    assert kept == {n.removeprefix("model.") for n in tensors if n.startswith("model.")}
    assert set(load_artifact(folder.artifact_file)[1]) == kept
