"""The benchmarks of training and scoring on a CPU run at toy sizes and sum up correctly."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgolf_fast.cores import SPIN_COUNT
from pgolf_fast.model.gpt import GPT

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """Let scripts be imported as when they are run, and keep the number of threads."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def toy(length=32):
    import bench_growth

    config = bench_growth.point_config("tiny", length, 128)
    train = replace(config.train, micro_batch_tokens=2 * length, batch_tokens=2 * length)
    lora = replace(config.ttt, lora=replace(config.ttt.lora, documents=2))
    return replace(config, train=train, ttt=lora, model=replace(config.model, bigram_vocab_size=64))


@pytest.mark.parametrize("adapter", ["lora", "sgd"])
def test_test_time_training_learns_and_scores_every_target(adapter, monkeypatch):
    import cpu_jobs

    config = toy()
    if adapter == "sgd":
        config = replace(config, ttt=replace(config.ttt, adapter="sgd", chunk_tokens=64))
    evaluator, windows, chunks = cpu_jobs.adapting(config)
    job = cpu_jobs.ttt(config)
    assert sum(next(job) for _ in chunks) == evaluator.stream.num_targets == int(windows.places()[-1])
    assert any(chunk.starts for chunk in chunks[:-1])  # something is learned from


def test_training_and_scoring_count_their_tokens():
    import cpu_jobs

    config = toy()
    found = cpu_jobs.run_for(cpu_jobs.train(config), 0.0)
    assert found["tokens"] == 64
    assert found["seconds"] > 0
    assert cpu_jobs.run_for(cpu_jobs.score(config), 0.0)["tokens"] == 8 * 4096


def run_main(module, monkeypatch, words, *more):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words.split(), *map(str, more)])
    return module.main()


def test_steps_agree_and_a_way_that_fails_keeps_the_others(tmp_path, monkeypatch, capsys):
    import bench_step

    def broken(config, pool):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setitem(bench_step.WAYS, "compile", broken)
    words = "--preset tiny --micro-batch 64 --threads 1 --rounds 2 --ways compile ours eager"
    assert run_main(bench_step, monkeypatch, words, "--json", tmp_path / "step.json") == 0
    (record,) = json.loads((tmp_path / "step.json").read_text())["records"]
    ours, eager = record["ways"]
    assert (ours["way"], ours["over_ours"], eager["way"]) == ("ours", 1.0, "eager")
    assert len(ours["losses"]) == 2 + bench_step.WARM_UP
    assert len(set(ours["losses"])) > 1
    assert ours["loss_gap"] < bench_step.AGREE
    assert record["failed"] == {"compile": "no compiler"}
    assert 0 < len(record["profile"]) <= bench_step.LONGEST
    assert "compile failed: no compiler" in capsys.readouterr().out


def test_losses_that_disagree_are_an_error(monkeypatch, capsys):
    import bench_step

    def other(config, pool):
        return lambda: 1.0

    monkeypatch.setitem(bench_step.WAYS, "compile", other)
    words = "--preset tiny --micro-batch 64 --threads 1 --rounds 1 --ways eager compile"
    assert run_main(bench_step, monkeypatch, words) == 1
    assert "losses differ by more than 0.01 nats: compile" in capsys.readouterr().out


def test_load_is_measured_in_processes_of_their_own(tmp_path):
    command = [sys.executable, str(FOLDER / "bench_load.py"), "--json", str(tmp_path / "load.json")]
    words = "--jobs train --settings before after --loads 0 1 --seconds 0.01 --rounds 1"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command += words.split()
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False, timeout=550)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "load.json").read_text())["records"]
    assert [(r["setting"], r["load"], r["spin_count"]) for r in records] == [
        ("before", 0, "300000"),
        ("after", 0, SPIN_COUNT),
        ("before", 1, "300000"),
        ("after", 1, SPIN_COUNT),
    ]
    assert all(r["speeds"][0] > 0 for r in records)


def test_shares_of_the_load_table():
    import bench_load

    common = {"job": "train", "threads": 2}
    speeds = {("before", 0): 100, ("before", 2): 10, ("after", 0): 98, ("after", 2): 49}
    records = [
        {**common, "setting": name, "load": load, "speeds": [value, value]}
        for (name, load), value in speeds.items()
    ]
    lines = bench_load.describe_speeds(records, cores=2).splitlines()
    assert lines[2].split() == ["train", "before", "2", "100", "10", "10%", "50%"]
    assert lines[3].split() == ["train", "after", "2", "98", "49", "50%", "50%"]
    assert lines[4] == "after / before, beside 0: train 0.980"


def test_busy_loops_end_with_their_block_and_with_their_parent():
    import bench_load

    with bench_load.busy_loops(1):
        pass  # waits for the loop, so none is left when this returns
    code = f"""if True:
        import os, subprocess, sys
        command = [sys.executable, "-c", {bench_load.BUSY!r}, str(os.getpid())]
        print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loop = int(done.stdout)
    end = time.monotonic() + 60
    while Path(f"/proc/{loop}").exists() and "zombie" not in Path(f"/proc/{loop}/status").read_text():
        assert time.monotonic() < end, "the loop outlives its parent"
        time.sleep(0.1)


def test_growth_at_toy_size(tmp_path, monkeypatch, capsys):
    import bench_growth

    monkeypatch.setattr(bench_growth, "TOKENS", 64)
    monkeypatch.setitem(bench_growth.AXES, "length", (32, 64))
    monkeypatch.setattr(
        bench_growth, "measured", lambda point, job, seconds, _: bench_growth.work(point, job, seconds)
    )
    words = "--axes length --jobs train ttt --seconds 0 --json"
    files = [tmp_path / "growth.json", "--plot", tmp_path / "growth.png"]
    assert run_main(bench_growth, monkeypatch, words, *files) == 0
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [(r["job"], r["value"]) for r in found["records"]] == [
        ("train", 32),
        ("train", 64),
        ("ttt", 32),
        ("ttt", 64),
    ]
    assert [s["points"] for s in found["slopes"]] == [2, 2]
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "exponents" in capsys.readouterr().out


def test_growth_leaves_out_what_is_larger_than_a_failure(monkeypatch, capsys):
    import bench_growth

    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: (_ for _ in ()).throw(subprocess.TimeoutExpired(command, 1))
    )
    words = "--axes vocabulary --jobs eval --limit 1"
    assert run_main(bench_growth, monkeypatch, words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vocabulary 1024, eval: more than 1 s"
    assert lines[1:] == [
        f"vocabulary {n}, eval: left out: a smaller one failed (more than 1 s)" for n in (2048, 4096, 8192)
    ]


def test_exponents_and_arithmetic(monkeypatch):
    import bench_growth

    def record(x):
        work = {"tokens_per_second": 1 / x**2, "cpu_seconds_per_token": x**2, "flops_per_token": x**1.5}
        return {"axis": "length", "job": "eval", "value": x, "threads": 1, "bytes": 7 * x, **work}

    (slope,) = bench_growth.slopes([record(x) for x in (256, 512, 2048)])
    assert slope["points"] == 3
    want = {"seconds": 2.0, "cpu_seconds": 2.0, "arithmetic": 1.5, "memory": 1.0}
    assert {name: slope[name] for name in want} == pytest.approx(want)
    config = bench_growth.point_config("tiny", 256, None)
    shapes = [tuple(bank.shape) for bank in GPT(config.model).bank_parameters()]
    assert bench_growth.bank_shapes(config) == shapes
    assert bench_growth.flops_per_token("train", config) > 3 * bench_growth.flops_per_token("eval", config)
    monkeypatch.setattr(bench_growth, "bank_shapes", lambda config: [(2, 3, 5), (1, 5, 3)])
    # two multiply-adds each: (3, 5) (5, 3), (3, 3) (3, 3) and (3, 3) (3, 5), five times for three matrices
    assert bench_growth.newton_schulz_flops(config) == 2 * (45 + 27 + 45) * 5 * 3
