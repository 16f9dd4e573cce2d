"""Trackers, with fake packages: nothing here needs wandb, TensorBoard or a network."""

import sys
import types

import pytest
from runs import make_dataset, run_config, words

from pgolf_fast import cli
from pgolf_fast.console import MetricsWriter, read_metrics
from pgolf_fast.errors import PgolfError
from pgolf_fast.train import loop
from pgolf_fast.train.loop import train
from pgolf_fast.train.track import Metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


class FakeRun:
    def __init__(self, settings):
        self.settings, self.logged, self.metrics, self.finished = settings, [], [], 0
        self.fail_at = None

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, values):
        if self.fail_at is not None and values["step"] >= self.fail_at:
            raise ConnectionError("the server is gone\nand so on")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """A module that records its runs; with `fail_at`, their log fails from that step on."""
    module = types.ModuleType("wandb")
    module.runs, module.fail_at = [], None

    def init(**settings):
        module.runs.append(FakeRun(settings))
        module.runs[-1].fail_at = module.fail_at
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def writers(monkeypatch):
    """Every SummaryWriter that was made."""
    made = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            self.log_dir, self.purge_step, self.closed = log_dir, purge_step, 0
            self.scalars, self.texts = [], {}
            made.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

        def add_text(self, name, text, step):
            self.texts[name] = text

        def close(self):
            self.closed += 1

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_wandb_receives_the_numbers_of_metrics_jsonl(data, tmp_path, wandb):
    config = run_config(data, train__val_every=4)
    folder = train(config, tmp_path / "run", track="wandb").folder
    (run,) = wandb.runs
    assert run.finished == 1
    assert run.metrics == [("*", "step")]
    settings = run.settings
    assert (settings["name"], settings["resume"], settings["dir"]) == ("run", "allow", str(folder.path))
    assert settings["config"]["train.meta.every"] == 4
    assert settings["config"]["optim.matrix_lr"] == 0.025
    steps = [row for row in read_metrics(folder.metrics_file) if row["kind"] == "step"]
    sent = [row for row in run.logged if "train/loss" in row]
    assert [row["step"] for row in sent] == list(range(1, 9))
    assert [row["train/loss"] for row in sent] == [row["loss"] for row in steps]
    assert [row["step"] for row in sent if "train/meta_loss" in row] == [1, 5]
    pace = steps[2]["elapsed"] - steps[1]["elapsed"]
    assert sent[2]["train/tokens_per_second"] == pytest.approx(128 / pace)
    values = [(row["step"], row["val/raw_weights/bpb"]) for row in run.logged if "val/raw_weights/bpb" in row]
    lines = [row for row in read_metrics(folder.metrics_file) if row.get("weights") == "raw weights"]
    assert values == [(row["step"], row["bpb"]) for row in lines]
    assert len(values) == 3


def test_a_resumed_run_keeps_its_id_and_steps(data, tmp_path, wandb, writers):
    def config(steps):
        return run_config(data, train__steps=steps, train__checkpoint_minutes=0.0)

    out = tmp_path / "run"
    train(config(5), out, track="wandb")
    train(config(8), out, resume=True, track="wandb")
    first, second = wandb.runs
    assert first.settings["id"] == second.settings["id"]
    sent = [row for row in second.logged if "train/loss" in row]
    assert [row["step"] for row in sent] == [6, 7, 8]
    lines = [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "step"]
    pace = lines[5]["elapsed"] - lines[4]["elapsed"]  # not since the start of the run
    assert sent[0]["train/tokens_per_second"] == pytest.approx(128 / pace, rel=1e-6)
    train(config(9), out, resume=True, track="tensorboard")
    (writer,) = writers
    assert writer.purge_step == 9
    assert {step for _, _, step in writer.scalars} == {9}


def test_tensorboard_receives_scalars_and_the_configuration(data, tmp_path, writers):
    folder = train(run_config(data), tmp_path / "run", track="tensorboard").folder
    (writer,) = writers
    assert (writer.log_dir, writer.purge_step, writer.closed) == (str(folder.path / "tensorboard"), 1, 1)
    assert "model.trigram: True" in writer.texts["config"]
    losses = [(step, value) for name, value, step in writer.scalars if name == "train/loss"]
    lines = [row for row in read_metrics(folder.metrics_file) if row["kind"] == "step"]
    assert losses == [(row["step"], row["loss"]) for row in lines]
    assert {"val/raw_weights/bpb", "train/tokens_per_second"} <= {name for name, _, _ in writer.scalars}


def test_a_tracker_that_fails_is_dropped_and_training_continues(data, tmp_path, wandb):
    wandb.fail_at = 4
    result = train(run_config(data), tmp_path / "run", track="wandb")
    assert result.steps == 8
    assert [row["step"] for row in wandb.runs[0].logged] == [1, 2, 3]
    assert wandb.runs[0].finished == 0
    log = result.folder.log_file.read_text()
    assert log.count("tracking stopped (the server is gone)") == 1
    steps = [row["step"] for row in read_metrics(result.folder.metrics_file) if row["kind"] == "step"]
    assert steps == list(range(1, 9))


def test_rates_of_slots_are_tracked_one_by_one(data, tmp_path, writers):
    changes = {"train__meta__method": "cross_chunk", "train__meta__slot_rates": True}
    folder = train(run_config(data, **changes), tmp_path / "run", track="tensorboard").folder
    (*_, last) = [row for row in read_metrics(folder.metrics_file) if row["kind"] == "slot_rates"]
    sent = {name: value for name, value, step in writers[0].scalars if step == last["step"]}
    for slot, rate in enumerate(last["kv_bank"]):
        assert sent[f"slot_rates/kv_bank/{slot}"] == rate
    assert len(last["kv_bank"]) == 6


def test_a_tracker_that_fails_at_its_end_changes_nothing(tmp_path):
    class Bad:
        def log(self, step, values):
            pass

        def close(self):
            raise OSError

    metrics = Metrics(MetricsWriter(tmp_path / "m.jsonl"))
    metrics.track(Bad(), 0.0)
    metrics.write("step", step=1, elapsed=0.0, loss=1.0)
    metrics.close()
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1


def test_a_tracker_that_does_not_start_stops_the_run(data, tmp_path, wandb):
    def init(**settings):
        raise RuntimeError("no API key configured")

    wandb.init = init
    with pytest.raises(PgolfError, match=r"did not start .no API key configured.: fix this or drop --track"):
        train(run_config(data), tmp_path / "run", track="wandb")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_named_before_anything_is_written(name, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    out = tmp_path / "run"
    assert cli.main(["train", "tiny", "--track", name, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'pgolf-fast[{name}]'" in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_command_passes_the_tracker_on(data, tmp_path, monkeypatch, wandb):
    asked = {}

    def fake(config, out, **options):
        asked.update(options)
        raise PgolfError("enough")

    monkeypatch.setattr(loop, "train", fake)
    assert cli.main(["train", "tiny", *words(run_config(data)), "--track", "wandb"]) == 2
    assert asked == {"resume": False, "track": "wandb"}


def test_other_ranks_track_nothing(data, tmp_path, wandb, monkeypatch):
    world = property(lambda self: False)
    monkeypatch.setattr("pgolf_fast.distributed.World.is_main", world)
    train(run_config(data, train__steps=2), tmp_path / "run", track="wandb")
    assert wandb.runs == []
