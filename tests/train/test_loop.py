"""Training runs: the effect of each switch, resuming, and errors that stop a run."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runs import (
    ALONE,
    assert_same,
    differs,
    make_dataset,
    make_trainer,
    read_json,
    run_config,
    run_steps,
    weights_after,
    words,
)
from safetensors.torch import load_file

from pgolf_fast import cli
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.config.presets import exp101
from pgolf_fast.config.schema import DataConfig
from pgolf_fast.console import read_metrics
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import three_scores
from pgolf_fast.io import load_tensors
from pgolf_fast.model.weights import load_weights, read_weights
from pgolf_fast.train.checkpoint import newest_checkpoint
from pgolf_fast.train.loop import build_model, train
from pgolf_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def test_run_folder_is_complete(data, tmp_path):
    config = run_config(data, train__val_every=4)
    result = train(config, tmp_path / "run")
    folder = result.folder
    assert result.steps == 8
    assert result.tokens == 8 * 128
    assert folder.read_config() == replace(
        config, train=replace(config.train, compile=False, cuda_graph=False)
    )
    assert read_json(folder.path / "env.json")["torch"] == torch.__version__
    rows = read_metrics(folder.metrics_file)
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, 9))
    assert [row["step"] for row in rows if row["kind"] == "val"] == [4, 8, 8, 8]
    log = folder.log_file.read_text()
    assert "step 8/8" in log
    assert "tok/s" in log
    assert "ETA" in log
    assert newest_checkpoint(folder.checkpoints).name == "step_00000008.safetensors"
    assert folder.tokenizer_file.read_bytes() == (data / "tokenizer.model").read_bytes()


def test_training_learns(data):
    losses = run_steps(make_trainer(run_config(data, train__steps=40)), 40)
    assert losses[0] == pytest.approx(math.log(384), abs=0.05)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_same_seed_gives_the_same_run_and_another_seed_another(data):
    first, second = (weights_after(run_config(data)).tensors() for _ in range(2))
    assert_same(first, second)
    assert differs(first, weights_after(run_config(data, train__seed=7)).tensors())


def test_accumulation_does_not_change_the_gradients(data):
    """Two micro-batches of 64 tokens are one of 128, but for the loader's extra token in each."""
    config = run_config(data, train__meta=None)
    split, whole = make_trainer(config), make_trainer(replace_train(config, micro_batch_tokens=128))
    tokens, targets = whole.loader.next_batch()
    batches = list(zip(tokens.split(2), targets.split(2), strict=True))
    split.loader.next_batch = iter(batches).__next__
    whole.loader.next_batch = lambda: (tokens, targets)
    split._accumulate()
    whole._accumulate()
    for (name, a), b in zip(split.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def replace_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


@pytest.mark.parametrize("loader", ["sequential", "shuffled"])
def test_restored_state_continues_bit_for_bit(data, loader):
    """Steps 1 to 8 at once, and steps 5 to 8 from a saved state: every tensor agrees."""
    config = run_config(data, data__loader=loader, train__meta__every=3)
    straight = weights_after(config)
    half = make_trainer(config)
    run_steps(half, 4)
    again = make_trainer(config)
    again.restore({k: v.clone() for k, v in half.tensors().items()}, half.metadata())
    run_steps(again, 4)
    assert_same(straight.tensors(), again.tensors())
    assert straight.metadata() == again.metadata()


def test_killed_run_resumes_bit_for_bit(data, tmp_path):
    """kill -9 in the middle, then --resume: the final weights are those of an uninterrupted run."""
    config = run_config(data, train__steps=60)
    saving = words(run_config(data, train__steps=60, train__checkpoint_minutes=0.0))
    straight = train(config, tmp_path / "straight")
    command = [sys.executable, "-m", "pgolf_fast.cli", "train", "tiny", "--out", str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen([*command, *saving], env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while (
            newest := newest_checkpoint(tmp_path / "killed" / "checkpoints")
        ) is None or newest.stem < "step_00000005":
            assert time.monotonic() < deadline
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert cli.main(["train", "tiny", "--out", str(tmp_path / "killed"), "--resume", *words(config)]) == 0
    assert "resumed from" in (tmp_path / "killed" / "train.log").read_text()
    assert_same(load_file(straight.folder.model_file), load_file(tmp_path / "killed" / "model.safetensors"))


def test_resume_refuses_other_settings_and_a_second_start(data, tmp_path):
    config = run_config(data)
    train(config, tmp_path / "run")
    with pytest.raises(PgolfError, match="already holds a run: pass --resume"):
        train(config, tmp_path / "run")
    with pytest.raises(PgolfError, match=r"train.seq_len was 32 and is 16"):
        train(run_config(data, train__seq_len=16), tmp_path / "run", resume=True)
    with pytest.raises(PgolfError, match=r"quant.bits was 6 and is 5"):
        train(run_config(data, quant__bits=5), tmp_path / "run", resume=True)
    longer = train(run_config(data, train__steps=10, optim__matrix_lr=0.5), tmp_path / "run", resume=True)
    assert longer.steps == 10
    (note,) = [row for row in read_metrics(longer.folder.metrics_file) if row["kind"] == "resume"]
    assert note["changed"] == ["optim.matrix_lr was 0.025 and is 0.5", "train.steps was 8 and is 10"]


def test_a_start_that_fails_leaves_the_folder_free(data, tmp_path):
    with pytest.raises(PgolfError, match="data folder /nowhere does not exist"):
        train(run_config(data, data__path="/nowhere"), tmp_path / "run")
    assert train(run_config(data), tmp_path / "run").steps == 8


def test_new_weights_retire_products_of_the_old_ones(data, tmp_path):
    folder = train(run_config(data), tmp_path / "run").folder
    quantize_run(folder, folder.read_config().quant)
    pack_run(folder, folder.read_config().pack)
    products = ["quantized.safetensors", "model.pgolf"]
    for name in ("scores_float.json", "scores_artifact.json", "ttt_sweep.json", "audit.json"):
        products.append(name)
        (folder.path / name).write_text("{}")
    train(run_config(data, train__steps=9), folder.path, resume=True)
    for name in products:
        assert not (folder.path / name).exists()
        assert (folder.path / f"{name}.stale").exists()
    with pytest.raises(PgolfError, match="run `pgolf quantize"):
        pack_run(folder, folder.read_config().pack)


def test_checkpoint_of_another_model_is_refused_by_name(data, tmp_path):
    config = run_config(data)
    trainer = weights_after(config, 1)
    source = open_source(config.data, 384)
    other = build_model(run_config(data, model__ve_enabled=False), source, ALONE)
    weights = dict(trainer.model.state_dict())
    with pytest.raises(PgolfError, match=r"x.safetensors holds another model, .*: nothing / ve_shared"):
        load_weights(other, weights, "x.safetensors")
    weights["qo_bank"] = weights["qo_bank"][:2]
    del weights["skip_weights"]
    with pytest.raises(PgolfError, match=r"skip_weights / nothing; qo_bank \(\d+, 32, 32\) / qo_bank \(2,"):
        load_weights(trainer.model, weights, "x.safetensors")


def test_weights_are_read_from_community_and_own_files(data, tmp_path):
    model = build_model(run_config(data), open_source(DataConfig(path=str(data)), 384), ALONE)
    torch.save(model.state_dict(), tmp_path / "final_model.pt")
    assert_same(read_weights(tmp_path / "final_model.pt"), dict(model.state_dict()))
    torch.save({"weights": [1, 2]}, tmp_path / "odd.pt")
    with pytest.raises(PgolfError, match=r"odd.pt is not a state dict of tensors"):
        read_weights(tmp_path / "odd.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(PgolfError, match=r"bad.safetensors is text, not weights"):
        read_weights(tmp_path / "bad.safetensors")


def test_non_finite_loss_stops_with_step_and_last_checkpoint(data, tmp_path, monkeypatch):
    config = run_config(data, train__checkpoint_minutes=0.0)
    original = Trainer._accumulate

    def poisoned(self):
        loss, tokens, targets = original(self)
        return (loss * math.nan if self.step == 5 else loss), tokens, targets

    monkeypatch.setattr(Trainer, "_accumulate", poisoned)
    with pytest.raises(PgolfError, match=r"loss at step 6 is nan. Last good checkpoint: .*step_00000005"):
        train(config, tmp_path / "run")
    tensors, _ = load_tensors(newest_checkpoint(tmp_path / "run" / "checkpoints"))
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_non_finite_gradient_stops_before_the_update(data, tmp_path, monkeypatch):
    """A finite loss with a gradient that is not finite: no weight changes."""
    original = Trainer._mask_frozen_skips

    def poisoned(self):
        original(self)
        if self.step == 7:
            self.model.smear.gate.grad[0] = math.nan

    monkeypatch.setattr(Trainer, "_mask_frozen_skips", poisoned)
    config = run_config(data, optim__grad_clip=None)
    with pytest.raises(PgolfError, match=r"the gradient norm at step 8 is nan"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_diverging_run_is_stopped(data, tmp_path):
    """No monkeypatch: weights that overflow give a non-finite loss by themselves."""
    with pytest.raises(
        PgolfError, match=r"training stopped: the (loss|meta loss|gradient norm) at step \d+ is (nan|inf)"
    ):
        train(run_config(data, optim__embed_lr=1e38, optim__scalar_lr=1e38), tmp_path / "run")


def test_late_qat_acts_on_the_banks_once_it_is_due(data):
    """Losses agree before it starts and differ after; banks=False means no quantization."""
    off = make_trainer(run_config(data, train__qat=None))
    on = make_trainer(run_config(data, train__qat__below=0.8))
    idle = make_trainer(run_config(data, train__qat__below=0.8, train__qat__banks=False))
    flags = []
    losses = {"off": [], "on": [], "idle": []}
    for _ in range(8):
        losses["off"].append(off.advance().loss)
        result = on.advance()
        losses["on"].append(result.loss)
        flags.append(result.qat)
        losses["idle"].append(idle.advance().loss)
    assert losses["idle"] == losses["off"]
    first = flags.index(True)
    assert 0 < first < 7
    assert losses["on"][:first] == losses["off"][:first]
    assert all(a != b for a, b in zip(losses["on"][first:], losses["off"][first:], strict=True))


def test_qat_forward_reads_weights_on_the_grid(data):
    """The loss of a QAT step is that of rounded weights, and the gradient reaches the real ones."""
    trainer = make_trainer(run_config(data, train__qat__below=2.0, train__meta=None, quant__bits=3))
    seen = []
    model_loss = trainer.model.loss
    trainer.loss_function = lambda x, y, banks: (seen.append(banks), model_loss(x, y, banks))[1]
    before = trainer.model.qo_bank.detach().clone()
    trainer.advance()
    rows = seen[0].qo.reshape(-1, 32)
    assert max(len(row.unique()) for row in rows) <= 8
    assert not torch.equal(seen[0].qo, before)
    assert differs({"qo": trainer.model.qo_bank.detach()}, {"qo": before})


def test_swa_is_the_mean_of_ema_snapshots(data):
    config = run_config(data)
    trainer = make_trainer(config)
    snapshots = []
    for _ in range(8):
        result = trainer.advance()
        if result.multiplier < config.average.swa_below:
            snapshots.append({name: value.clone() for name, value in trainer.average.ema.items()})
    trainer.loader.close()
    assert len(snapshots) >= 1
    assert trainer.average.swa_count == len(snapshots)
    final = trainer.average.final()
    for name in final:
        want = torch.stack([snapshot[name] for snapshot in snapshots]).mean(0)
        torch.testing.assert_close(final[name], want, msg=name)
    as_run = weights_after(run_config(data, average__swa_apply=False))
    assert as_run.average.swa_count == trainer.average.swa_count
    assert_same(as_run.average.final(), trainer.average.ema)


def test_swa_changes_the_final_weights(data):
    applied = weights_after(run_config(data, average__swa_below=1.0)).average
    assert applied.swa_count > 2
    assert differs(applied.final(), applied.ema)


def test_meta_step_changes_training_and_stops_with_the_learning_rate(data):
    with_meta, without = make_trainer(run_config(data)), make_trainer(run_config(data, train__meta=None))
    results = [with_meta.advance() for _ in range(8)]
    assert [r.meta_loss is not None for r in results] == [
        step % 4 == 0 and r.multiplier > 0.5 for step, r in enumerate(results)
    ]
    run_steps(without, 8)
    assert differs(with_meta.tensors(), without.tensors())


def test_frozen_skips_stay_at_zero(data):
    config = run_config(data, model__num_layers=4, model__ve_layers=(3,), model__frozen_skips=1)
    model = weights_after(config).model
    assert not model.skip_weights[1].any()
    assert model.skip_weights[0].any()


def test_warm_up_leaves_no_trace(data):
    fresh, warmed = make_trainer(run_config(data)), make_trainer(run_config(data))
    warmed.warm_up(3)
    assert_same(fresh.tensors(), warmed.tensors())
    run_steps(fresh, 4)
    run_steps(warmed, 4)
    assert_same(fresh.tensors(), warmed.tensors())


def test_compiled_training_equals_eager(data):
    config = run_config(data, model__num_layers=2, model__ve_layers=(1,), model__xsa_last_n=2)
    eager, compiled = make_trainer(config), make_trainer(config)
    compiled.loss_function = torch.compile(
        compiled.model.loss, dynamic=False, fullgraph=True, backend="aot_eager"
    )
    a, b = run_steps(eager, 4), run_steps(compiled, 4)
    assert a == pytest.approx(b, rel=1e-4)


def test_bfloat16_tables_and_compute_train(data):
    config = run_config(data, train__compute_dtype="bfloat16", train__table_dtype="bfloat16")
    trainer = make_trainer(config)
    assert trainer.model.tok_emb.weight.dtype == torch.bfloat16
    assert trainer.model.qo_bank.dtype == torch.float32
    bf16 = run_steps(trainer, 8)
    full = run_steps(make_trainer(run_config(data)), 8)
    assert bf16 == pytest.approx(full, rel=0.03)
    assert bf16 != full


def test_ttt_with_quantized_forward_changes_the_score(data):
    config = run_config(data, ttt__lr=0.05, ttt__epochs=2, data__val_tokens=1024)
    trainer = weights_after(config)
    source = open_source(config.data, 384)
    stream = Stream(source.validation(32), source.table, ALONE.device)
    scores = {}
    for mode in ("none", "banks", "projections"):
        changed = replace(config, ttt=replace(config.ttt, quantize_forward=mode))
        scores[mode] = three_scores(trainer.model, stream, changed)
    assert scores["none"].sliding == scores["banks"].sliding
    assert len({s.ttt.score.nats for s in scores.values()}) == 3
    assert scores["none"].ttt.score.nats != scores["none"].sliding.nats
    assert scores["none"].ttt.trainable == sum(p.numel() for p in trainer.model.bank_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("below", "steps"), [(0.0, 6), (2.0, 2)], ids=["float", "qat"])
def test_inductor_training_equals_eager(data, below, steps):
    """The compiler that CUDA runs use: losses and gradients over accumulation.

    The first step is compared to rounding. Later ones drift: Newton-Schulz runs in bfloat16, and under QAT a
    weight on a rounding boundary of the grid may be rounded either way.
    """
    config = run_config(data, train__qat__below=below, train__meta=None)
    eager, compiled = make_trainer(config), make_trainer(replace_train(config, compile=True))
    a, b = [[trainer.advance() for _ in range(steps)] for trainer in (eager, compiled)]
    eager.loader.close()
    compiled.loader.close()
    assert (a[0].loss, a[0].grad_norm) == pytest.approx((b[0].loss, b[0].grad_norm), rel=1e-5)
    assert [r.loss for r in a] == pytest.approx([r.loss for r in b], rel=2e-4)


def test_dilute_divides_the_meta_weight_by_micro_batches(data):
    diluted, whole = (weights_after(run_config(data, train__meta__dilute=d), 1) for d in (True, False))
    assert differs(diluted.tensors(), whole.tensors())


@pytest.mark.slow
def test_two_processes_equal_one(data, tmp_path):
    """Two ranks of one micro-batch read the same tokens as one rank of two, and end with the same weights."""
    config = run_config(data, train__meta=None, train__steps=4)
    alone = train(config, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "pgolf_fast.cli", "train", "tiny", "--out", str(tmp_path / "two"), *words(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stderr
    one, two = load_file(alone.folder.model_file), load_file(tmp_path / "two" / "model.safetensors")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.slow
def test_processes_keep_one_clock(data, tmp_path):
    """Under a time schedule the learning rate depends on the clock, so both ranks must read the same one."""
    config = run_config(data, train__steps=1000, train__max_seconds=2.0, train__schedule="time")
    script = tmp_path / "both.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from safetensors.torch import save_file\n"
        "from pgolf_fast.train import loop\n"
        "from pgolf_fast import cli\n"
        "finish = loop._Run._finish\n"
        "def keep(self):\n"
        "    weights = {n: t.clone() for n, t in self.model.state_dict().items()}\n"
        "    save_file(weights, Path(sys.argv[1]) / f'rank{os.environ[\"RANK\"]}.safetensors')\n"
        "    return finish(self)\n"
        "loop._Run._finish = keep\n"
        "sys.exit(cli.main(sys.argv[2:]))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    command += [str(tmp_path), "train", "tiny", "--out", str(tmp_path / "run"), *words(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("run folder") == 1
    assert_same(load_file(tmp_path / "rank0.safetensors"), load_file(tmp_path / "rank1.safetensors"))


@pytest.mark.slow
def test_two_steps_of_the_whole_exp101_on_real_data():
    """26,960,991 parameters, real tokens, every feature on; a small batch."""
    from data_helpers import real_data

    data = real_data() / "datasets" / "smoke_sp1024"
    base = exp101()
    train_config = replace(
        base.train,
        batch_tokens=512,
        micro_batch_tokens=512,
        seq_len=256,
        compute_dtype="float32",
        lr_hold_steps=0,
    )
    config = replace(base, train=train_config, data=replace(base.data, path=str(data)))
    trainer = make_trainer(config)
    assert sum(p.numel() for p in trainer.model.parameters()) == 26_960_991
    losses = run_steps(trainer, 2)
    assert losses[0] == pytest.approx(6.93, abs=0.02)
    assert all(math.isfinite(loss) for loss in losses)
