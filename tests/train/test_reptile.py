"""The Reptile phase: its updates, its data, resuming, and the weights it ends with."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from runs import assert_same, differs, make_dataset, make_trainer, run_config, run_steps, words
from safetensors.torch import load_file

from pgolf_fast import cli
from pgolf_fast.config.schema import ReptileConfig, TrainConfig
from pgolf_fast.console import read_metrics
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import Banks
from pgolf_fast.optim.schedule import Schedule
from pgolf_fast.quant.grid import make_fake
from pgolf_fast.train.checkpoint import newest_checkpoint
from pgolf_fast.train.loop import train

MLP = ("mlp_up_bank", "mlp_down_bank")
PHASE = {"train__reptile__share": 0.5, "train__reptile__inner_lr": 0.5, "train__reptile__outer_lr": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def at_the_phase(config):
    """Return a trainer whose next step is the first of the phase, and a list its batches will be added to."""
    trainer = make_trainer(config)
    while not trainer.schedule.over(trainer.step, trainer.elapsed):
        trainer.advance()
    seen, next_batch = [], trainer.loader.next_batch

    def watched():
        seen.append(next_batch())
        return seen[-1]

    trainer.loader.next_batch = watched
    return trainer, seen


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("qat", [False, True], ids=["float", "qat"])
def test_an_outer_step_interpolates_toward_plain_sgd(data, qat):
    """From the averaged weights, on successive segments, in the last block's MLP and nowhere else."""
    config = run_config(
        data, **PHASE, train__reptile__batch_seqs=2, train__meta=None, train__qat__below=2.0 if qat else 0.0
    )
    trainer, seen = at_the_phase(config)
    position = trainer.loader.state()["position"]
    base = {name: value.clone() for name, value in trainer.average.final().items()}
    assert differs(base, snapshot(trainer.model))
    result = trainer.advance()
    trainer.loader.close()
    assert [x.shape for x, _ in seen] == [(2, 32)] * 3
    assert not any(torch.equal(seen[i][0], seen[j][0]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert trainer.loader.state()["position"] == position + 3 * 65
    assert result.tokens == 3 * 64

    rounding = make_fake(6, config.quant.scale_floor) if qat else (lambda w: w)
    model, losses = trainer.model, []
    ends = [base[name].clone() for name in MLP]
    fixed = [rounding(base[name]) for name in ("qo_bank", "kv_bank")]
    now = snapshot(model)
    model.load_state_dict(base)
    for tokens, targets in seen:
        leaves = [end.clone().requires_grad_() for end in ends]
        loss = model.loss(tokens, targets, Banks(*fixed, *(rounding(leaf) for leaf in leaves)))
        losses.append(float(loss.detach()))
        for end, gradient in zip(ends, torch.autograd.grad(loss, leaves), strict=True):
            end[2:] -= 0.5 * gradient[2:]
    assert result.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, end in zip(MLP, ends, strict=True):
        want = base[name] + 0.25 * (end - base[name])
        assert differs({"a": want[2]}, {"a": base[name][2]})
        torch.testing.assert_close(now[name], want, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(now[name][:2], base[name][:2])
    for name in base.keys() - set(MLP):
        assert torch.equal(now[name], base[name]), name


def test_the_outer_step_is_an_exact_interpolation(data):
    """For one step: weights + outer_lr * (adapted - weights), bit for bit, and no gradient remains."""
    trainer, _ = at_the_phase(run_config(data, **PHASE))
    results, adapt = [], trainer.reptile.adapt
    trainer.reptile.adapt = lambda *a: (results.append(adapt(*a)), results[0])[1]
    base = {name: value.clone() for name, value in trainer.average.final().items()}
    trainer.advance()
    trainer.loader.close()
    for name, end in zip(MLP, results[0].ends, strict=True):
        start = base[name][2:]
        assert torch.equal(getattr(trainer.model, name).detach()[2:], torch.lerp(start, end, 0.25))
        torch.testing.assert_close(getattr(trainer.model, name).detach()[2:], start + 0.25 * (end - start))
    assert not any(p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


def test_compute_copies_follow_the_weights(data):
    config = run_config(data, **PHASE, train__compute_dtype="bfloat16")
    trainer, _ = at_the_phase(config)
    trainer.advance()
    before = trainer.model.mlp_up_bank.detach().bfloat16()
    trainer.advance()
    trainer.loader.close()
    banks = trainer.model.banks()
    for weight, master in zip(banks.weights(), trainer.model.bank_parameters(), strict=True):
        assert torch.equal(weight.detach(), master.detach().bfloat16())
    assert not torch.equal(banks.up.detach(), before)


def test_averages_optimizer_and_schedule_do_not_change_in_the_phase(data):
    adaptive = {"adaptive_warmdown": True, "adaptive_min_step": 4, "adaptive_every": 1}
    config = run_config(data, **PHASE, **{f"train__{name}": value for name, value in adaptive.items()})
    trainer, _ = at_the_phase(config)
    before = {n: v.clone() for n, v in trainer.tensors().items() if not n.startswith("model.")}
    schedule = replace(trainer.schedule.state)
    run_steps(trainer, 3)
    assert_same(before, {n: v for n, v in trainer.tensors().items() if not n.startswith("model.")})
    assert trainer.schedule.state == schedule


@pytest.mark.parametrize("stop", [3, 4, 6], ids=["before", "at the border", "inside"])
@pytest.mark.parametrize("loader", ["sequential", "shuffled"])
def test_a_phase_is_resumed_bit_for_bit(data, loader, stop):
    config = run_config(data, **PHASE, data__loader=loader, average__swa_below=2.0)
    straight, half, again = (make_trainer(config) for _ in range(3))
    run_steps(straight, 8)
    run_steps(half, stop)
    again.restore({k: v.clone() for k, v in half.tensors().items()}, json.loads(json.dumps(half.metadata())))
    run_steps(again, 8 - stop)
    assert_same(straight.tensors(), again.tensors())
    assert straight.metadata() == again.metadata()
    assert straight.reptile_from == 4
    assert straight.tokens == again.tokens == 4 * 128 + 4 * 3 * 32


@pytest.mark.parametrize(
    ("share", "seconds", "end"), [(0.2, None, 80.0), (0.25, 60.0, 45.0), (None, 60.0, 60.0)]
)
def test_the_learning_rate_ends_where_the_phase_begins(share, seconds, end):
    schedule = Schedule(
        TrainConfig(
            schedule="steps" if seconds is None else "time",
            steps=100,
            max_seconds=seconds,
            warmdown_steps=None,
            warmdown_fraction=0.5,
            lr_hold_steps=0,
            reptile=None if share is None else ReptileConfig(share=share),
        )
    )
    places = [(int(p), p) for p in (0.5 * end, 0.75 * end, end)]
    assert [schedule.multiplier(*place) for place in places] == pytest.approx([1.0, 0.5, 0.0])
    assert not schedule.over(int(end) - 1, end - 0.5)
    assert schedule.over(int(end), end)


def test_a_run_ends_with_the_weights_of_the_phase(data, tmp_path):
    config = run_config(data, **PHASE, train__val_every=3)
    result = train(config, tmp_path / "run")
    folder = result.folder
    rows = read_metrics(folder.metrics_file)
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["reptile"] for row in steps] == [False] * 4 + [True] * 4
    assert [row["tokens"] for row in steps] == [128] * 4 + [96] * 4
    assert result.tokens == sum(row["tokens"] for row in steps)
    assert all(row["multiplier"] == 0 for row in steps[4:])
    weights = [(row["step"], row["weights"]) for row in rows if row["kind"] == "val"]
    assert weights[:3] == [(3, "raw weights"), (6, "after Reptile"), (8, "after Reptile")]
    assert weights[3][1].startswith(("EMA", "mean of"))
    assert result.keeps_raw
    scores = {row["weights"]: row["bpb"] for row in rows if row["kind"] == "val"}
    assert scores["after Reptile"] == result.raw.bpb != result.averaged.bpb
    kept, checkpoint = load_file(folder.model_file), load_file(newest_checkpoint(folder.checkpoints))
    assert_same(kept, {n[6:]: v for n, v in checkpoint.items() if n.startswith("model.")})
    log = folder.log_file.read_text()
    assert "step 5: Reptile starts from the averaged weights (" in log
    assert "the MLP of blocks 2 to 2" in log
    assert "step 8/8" in log
    assert "reptile" in log.split("step 8/8")[1]


def test_a_run_that_never_reaches_its_phase_says_so(data, tmp_path):
    config = run_config(data, **PHASE, train__max_seconds=1e6, train__schedule="time")
    result = train(config, tmp_path / "run")
    assert not result.keeps_raw
    log = result.folder.log_file.read_text()
    assert "the run ended at step 8" in log
    assert "before its Reptile phase, which train.schedule time puts later" in log


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReptileConfig(share=1.0), "train.reptile.share is 1.0; it must be between 0 and 1"),
        (lambda: ReptileConfig(inner_steps=0), "train.reptile.inner_steps is 0; it must be positive"),
        (lambda: ReptileConfig(outer_lr=-0.1), "train.reptile.outer_lr is -0.1; it must not be negative"),
        (lambda: ReptileConfig(block_share=0.0), "train.reptile.block_share is 0.0; it must be above 0"),
        (
            lambda: TrainConfig(schedule="steps", steps=2, reptile=ReptileConfig(share=0.2)),
            "train.reptile.share of train.steps 2 leaves none; change one of them",
        ),
        (
            lambda: TrainConfig(schedule="steps", steps=2, reptile=ReptileConfig(share=0.9)),
            "needs a step, and one before it",
        ),
    ],
)
def test_impossible_phases_are_refused(make, message):
    with pytest.raises(PgolfError, match=message):
        make()


def test_number_of_trained_blocks():
    """A quarter of eleven is two, which the text of PR 296 counts as three; there is always one."""
    assert [ReptileConfig().blocks(n) for n in (1, 3, 4, 8, 11, 12)] == [1, 1, 1, 2, 2, 3]
    assert ReptileConfig(block_share=0.29).blocks(100) == 29
    assert ReptileConfig(block_share=1.0).blocks(7) == 7


def test_options_switch_the_phase_on_and_off(capsys):
    words = ["--train.reptile.inner-steps", "5", "--train.meta.slot-rates", "--train.meta.method=sam"]
    assert cli.main(["config", "exp101", *words]) == 0
    fields = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (fields["train.reptile.inner_steps"], fields["train.reptile.share"]) == ("5", "0.2")
    assert (fields["train.meta.slot_rates"], fields["train.meta.method"]) == ("true", "sam")
    assert cli.main(["config", "pr296_reptile", "--train.reptile", "none"]) == 0
    fields = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert fields["train.reptile"] == "none"
    assert cli.main(["config", "exp101", "--train.reptile.share", "0.1", "--train.reptile", "none"]) == 2
    assert "contradict" in capsys.readouterr().err
    assert cli.main(["config", "exp101", "--train.reptile", "0.1"]) == 2
    assert "train.reptile is '0.1'; it is a group: set its fields" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_share_the_work_of_the_phase_and_of_rates(data, tmp_path):
    """Two processes train on different segments, and both end with the mean of their results."""
    rated = {"train__meta__method": "cross_chunk", "train__meta__slot_rates": True}
    config = run_config(data, **{**PHASE, **rated, "train__reptile__share": 0.15})  # the last step
    script = tmp_path / "both.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from pgolf_fast import cli\n"
        "from pgolf_fast.train import loop\n"
        "from pgolf_fast.train.reptile import Reptile\n"
        "kept, adapt, finish = {}, Reptile.adapt, loop._Run._finish\n"
        "def watched(self, *rest):\n"
        "    inner = adapt(self, *rest)\n"
        "    for name, end, bank in zip(('up', 'down'), inner.ends, self.banks):\n"
        "        kept[f'end.{name}'] = end.clone()\n"
        "        kept[f'base.{name}'] = bank.detach()[self.first:].clone()\n"
        "    return inner\n"
        "def keep(self):\n"
        "    tensors = {n: t.clone() for n, t in self.trainer.tensors().items()}\n"
        "    save_file({**tensors, **kept}, Path(sys.argv[1]) / f'rank{os.environ[\"RANK\"]}.safetensors')\n"
        "    return finish(self)\n"
        "Reptile.adapt, loop._Run._finish = watched, keep\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(script)]
    command += [str(tmp_path), "train", "tiny", "--out", str(tmp_path / "run"), *words(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(2)]
    same = [{n: v for n, v in rank.items() if not n.startswith("end.")} for rank in ranks]
    assert_same(*same)
    assert differs({"r": same[0]["slot_rates.qo_bank"]}, {"r": torch.ones(6)})
    for name in ("up", "down"):
        ends = [rank[f"end.{name}"] for rank in ranks]
        assert not torch.equal(*ends)
        want = torch.lerp(ranks[0][f"base.{name}"], (ends[0] + ends[1]) / 2, 0.25)
        torch.testing.assert_close(ranks[0][f"model.mlp_{name}_bank"][2:], want, rtol=1e-6, atol=1e-8)
