"""Ablations: tables, processes and resumed runs, and that nothing is run twice."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from runs import make_dataset, pgolf, read_json, run_config, words

from pgolf_fast import cli
from pgolf_fast.config.presets import tiny
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.data.source import open_source
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import locked
from pgolf_fast.lab.compare.jobs import documents, fingerprint, finished, prepare, run_job, step_times
from pgolf_fast.lab.compare.plan import BASELINE, Job, make_jobs, make_variants
from pgolf_fast.lab.compare.processes import Task, make_slots, run_tasks
from pgolf_fast.lab.compare.table import (
    FinishedRun,
    commits,
    describe,
    draw_ablation,
    make_rows,
    pass_gains,
    read_runs,
    seed_differences,
    to_dict,
)
from pgolf_fast.train.checkpoint import newest_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def test_step_times_leave_out_the_first_and_repeated_steps(tmp_path):
    rows = [{"kind": "step", "step": s, "elapsed": e} for s, e in ((1, 9.0), (2, 10.0), (3, 12.0), (4, 15.0))]
    again = [
        {"kind": "resume", "step": 2},
        *({"kind": "step", "step": s, "elapsed": 10.0 + s} for s in (3, 4)),
    ]
    folder = RunFolder(tmp_path)

    def logged(*lines):
        folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder.history()

    assert step_times(logged(*rows)) == [1.0, 2.0, 3.0]
    assert step_times(logged(*rows, *again)) == [1.0, 3.0, 1.0]
    assert step_times(logged(*rows, *again[:2])) == [1.0, 3.0]  # ended earlier than the first time
    assert logged(*rows, again[0]) == [*rows[:2], again[0]]
    assert logged(*rows, *rows) == rows  # begun anew: there was no checkpoint yet


# The table


def made_up_run(folder, variant, seed, sliding, budget="steps", tokens=100):
    path = folder / budget / variant / f"seed{seed}"
    path.mkdir(parents=True)
    text_bytes = np.array([100, 150])
    nats = sliding * math.log(2) * text_bytes
    scores = {"sliding": {"bpb": sliding, "loss": 1.0, "tokens": tokens, "bytes": 250}}
    result = {"scores": scores, "steps": 8, "ms_per_step": 2.0, "ms_per_step_mean": 3.0, "commit": "c"}
    result |= {"artifact_bytes": 1000, "artifact_sha256": "none"}
    (path / "result.json").write_text(json.dumps(result))
    content = {"text_bytes": text_bytes.tolist(), "sliding": nats.tolist()}
    (path / "documents.json").write_text(json.dumps(content))
    return Job(budget, variant, seed, tiny(), path)


def test_table_pairs_seeds_and_says_which_sign_is_better(tmp_path):
    jobs = [made_up_run(tmp_path, BASELINE, seed, bpb) for seed, bpb in ((1, 2.0), (2, 2.1), (3, 2.2))]
    jobs += [made_up_run(tmp_path, "x", seed, bpb) for seed, bpb in ((3, 2.19), (1, 1.97))]
    runs = read_runs(jobs)
    base, other = make_rows(runs)
    assert base.difference is None
    assert other.difference.mean == pytest.approx(-0.02)  # not 2.08 - 2.1
    assert other.difference.high == pytest.approx(-0.02 + 12.7062 * 0.01, abs=1e-5)
    assert seed_differences(other, runs) == pytest.approx([-0.01, -0.03])
    text = describe([base, other])
    assert "negative is better than the baseline" in text
    assert "Student's t" in text
    assert "bootstrap" not in text
    assert "-0.02000" in text
    assert draw_ablation([base, other], runs, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_table_of_one_seed_names_what_its_interval_leaves_out(tmp_path):
    jobs = [made_up_run(tmp_path, BASELINE, 1, 2.0), made_up_run(tmp_path, "x", 1, 2.5)]
    rows = make_rows(read_runs(jobs))
    assert (rows[1].difference.over, rows[1].difference.count) == ("documents", 2)
    assert rows[1].difference.mean == pytest.approx(0.5)
    assert "NOT covered" in describe(rows)
    with pytest.raises(PgolfError, match="at least 2 seeds"):
        make_rows(read_runs(jobs), "seeds")
    jobs += [made_up_run(tmp_path, BASELINE, 2, 2.0), made_up_run(tmp_path, "x", 2, 2.5)]
    with pytest.raises(PgolfError, match="over documents takes one seed, and there are 2"):
        make_rows(read_runs(jobs), "documents")


def test_gain_of_a_pass_is_over_the_pass_before_it(tmp_path):
    """Sliding windows against non-overlapping ones, by seeds of one variant."""
    runs = read_runs([made_up_run(tmp_path, BASELINE, seed, bpb) for seed, bpb in ((1, 2.0), (2, 2.1))])
    assert pass_gains(runs) == []  # a single score
    for run, bpb in zip(runs, (2.1, 2.22), strict=True):
        run.result["scores"]["non_overlapping"] = {**run.result["scores"]["sliding"], "bpb": bpb}
    (gain,) = pass_gains(runs)
    assert (gain.before, gain.after, gain.difference.over) == ("non_overlapping", "sliding", "seeds")
    assert gain.difference.mean == pytest.approx(-0.11)
    assert "sliding  non-overlapping" in describe(make_rows(runs), [gain])
    assert to_dict([], [gain], [])["passes"][0]["variant"] == BASELINE


def test_runs_of_one_step_have_no_times(tmp_path):
    job = made_up_run(tmp_path, BASELINE, 1, 2.0)
    (run,) = read_runs([job])
    timeless = FinishedRun(job, {**run.result, "ms_per_step": None, "ms_per_step_mean": None})
    (row,) = make_rows([timeless])
    assert (row.ms_per_step, row.ms_per_step_mean) == (None, None)
    assert describe([row]).splitlines()[-1].split()[:6] == ["steps", BASELINE, "1", "8", "-", "-"]


def test_table_refuses_other_text(tmp_path):
    jobs = [made_up_run(tmp_path, BASELINE, 1, 2.0), made_up_run(tmp_path, "x", 1, 2.5, tokens=99)]
    with pytest.raises(PgolfError, match="not scored on the same text"):
        make_rows(read_runs(jobs))


# Processes


def test_slots(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("pgolf_fast.lab.compare.processes.available_cores", lambda: 8)
    assert make_slots(None, 0, timed=True) == [{}]
    assert make_slots(3, 0, timed=False) == 3 * [{"OMP_NUM_THREADS": "2"}]
    assert make_slots(None, 2, timed=True) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert make_slots(1, 2, timed=True) == [{"CUDA_VISIBLE_DEVICES": "5"}]
    for workers, devices, message in ((2, 0, "compete for this CPU"), (3, 2, "2 GPUs"), (0, 0, "at least 1")):
        with pytest.raises(PgolfError, match=message):
            make_slots(workers, devices, timed=True)


def test_tasks_run_in_parallel_and_failures_have_reasons(tmp_path):
    """Two tasks that wait for each other both end, which needs parallel processes; the third fails."""
    meet = "import sys, pathlib, time\nmine, other = map(pathlib.Path, sys.argv[1:])\nmine.touch()\n"
    meet += "while not other.exists(): time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = [("-c", meet, a, b), ("-c", meet, b, a), ("-c", "print('no disk'); raise SystemExit(2)")]
    commands.append(("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    tasks = [
        Task(f"task {i}", (sys.executable, *command), tmp_path / f"{i}.log")
        for i, command in enumerate(commands)
    ]
    failures = run_tasks(tasks, [{}, {}])
    assert failures == {"task 2": "no disk", "task 3": "ended by signal 9"}


def test_a_worker_ends_with_its_parent():
    code = "from pgolf_fast.lab.compare.processes import end_with_parent\nimport time\nend_with_parent()\n"
    code += "print('here', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"here\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=30) == 1


# Runs


def planned(data, out, **changes):
    config = run_config(data, **changes)
    source = open_source(config.data, config.model.vocab_size)
    jobs = make_jobs(make_variants(config, [["train.meta=none"]]), (42,), ["steps"], out)
    return jobs, fingerprint(source)


def shown(runs):
    """The rows of a table, without times."""
    rows = make_rows(runs)
    return [replace(row, ms_per_step=0.0, ms_per_step_mean=0.0) for row in rows]


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_table(data, tmp_path, capsys):
    """After kill -9 during training, the same command gives the same table; a third time nothing runs."""
    # An artifact holds the name of its run, and the command starts from the preset `tiny`
    changes = {"name": "tiny", "train__steps": 30, "train__checkpoint_minutes": 0.0, "eval__stride": 32}
    jobs, mark = planned(data, tmp_path / "straight", **changes)
    for job in jobs:
        assert prepare(job, mark, "sliding")
        run_job(job.path)
    out = tmp_path / "killed"
    arguments = ["ablate", "tiny", "--flip", "train.meta=none", "--scores", "sliding", "--out", str(out)]
    arguments += words(run_config(data, **changes))
    command = [sys.executable, "-m", "pgolf_fast.cli", *arguments]
    first = out / "steps" / BASELINE / "seed42"
    with subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 240
        while (newest := newest_checkpoint(first / "checkpoints")) is None or newest.stem < "step_00000005":
            assert time.monotonic() < deadline
            assert process.poll() is None, "the command ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (first / "model.safetensors").exists()
    done = pgolf(*arguments)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in (first / "train.log").read_text()
    found, _ = planned(data, out, **changes)
    assert shown(read_runs(found)) == shown(read_runs(jobs))
    comparison = read_json(out / "ablation.json")["comparison"]
    assert [(row["variant"], row["score"]) for row in comparison] == [
        (variant, score)
        for variant in (BASELINE, "train.meta=none")
        for score in ("non_overlapping", "sliding")
    ]
    assert comparison[3]["difference"]["over"] == "documents"
    assert (out / "ablation.png").is_file()
    before = (out / "ablation.json").read_text()
    assert cli.main(arguments) == 0
    assert "2 runs, 2 of them finished" in capsys.readouterr().err
    assert (out / "ablation.json").read_text() == before
    assert cli.main([*arguments, "--steps", "31"]) == 2
    assert "train.steps was 30 and is 31. Choose another --out" in capsys.readouterr().err


def test_more_scores_of_a_finished_run_do_not_retrain_it(data, tmp_path):
    jobs, mark = planned(data, tmp_path)
    job = jobs[0]
    assert prepare(job, mark, "plain")
    run_job(job.path)
    weights = (job.path / "model.safetensors").stat().st_mtime_ns
    first = finished(job)
    assert list(first["scores"]) == ["non_overlapping"]
    assert first["steps"] == 8
    assert first["artifact_bytes"] == (job.path / "model.pgolf").stat().st_size
    assert not prepare(job, mark, "plain")
    assert prepare(job, mark, "all")
    run_job(job.path)
    assert (job.path / "model.safetensors").stat().st_mtime_ns == weights
    scores = finished(job)["scores"]
    assert scores["non_overlapping"] == first["scores"]["non_overlapping"]
    assert scores == {name: read_json(job.path / "scores_artifact.json")[name] for name in scores}
    found = documents(job.path)
    for name, score in scores.items():
        bpb = found[name].sum() / (math.log(2) * found["text_bytes"].sum())
        assert bpb == pytest.approx(score["bpb"], rel=1e-12)
    assert not prepare(job, mark, "sliding")
    with pytest.raises(PgolfError, match="other tokens"):
        prepare(job, "another", "all")
    (job.path / "model.pgolf").unlink()
    (job.path / "result.json").unlink()
    assert prepare(job, mark, "all")


def test_prepared_job_refuses_another_variant_or_setting(data, tmp_path):
    (job, other), mark = planned(data, tmp_path)
    assert prepare(job, mark, "plain")
    assert prepare(job, mark, "plain")
    with pytest.raises(PgolfError, match=r"variant was 'baseline' and is 'train.meta=none'"):
        prepare(replace(job, variant=other.variant), mark, "plain")
    content = read_json(job.path / "job.json")
    content["config"]["train"]["seed"] = 7
    (job.path / "job.json").write_text(json.dumps(content))
    with pytest.raises(PgolfError, match=r"train\.seed was 7 and is 42"):
        prepare(job, mark, "plain")


def test_a_result_outlives_its_artifact_but_not_a_newer_one(tmp_path):
    job = made_up_run(tmp_path, BASELINE, 1, 2.0)
    assert finished(job) is not None  # deleted to save space
    (job.path / "model.pgolf.stale").touch()
    assert finished(job) is None


def test_folder_is_locked_while_a_command_runs(data, tmp_path, capsys, monkeypatch):
    """A second command is rejected in one line; a variant with a Reptile phase gets one line of warning."""
    begun = []
    monkeypatch.setattr(
        "pgolf_fast.lab.compare.processes.run_tasks", lambda tasks, _: begun.append(tasks) or {}
    )
    out = tmp_path / "out"
    arguments = ["ablate", "tiny", "--out", str(out), *words(run_config(data))]
    with locked(out / "ablation.lock", "busy"):
        assert cli.main([*arguments, "--flip", "model.trigram=false"]) == 2
    assert f"another pgolf ablate is running in {out}: wait" in capsys.readouterr().err
    assert not begun
    assert cli.main([*arguments, "--flip", "model.trigram=false"]) == 0
    assert "equal steps" not in capsys.readouterr().err
    assert cli.main([*arguments, "--flip", "train.reptile.share=0.5"]) == 0
    assert "equal steps are not equal work: compare these with --budget time" in capsys.readouterr().err
    assert len(begun) == 2


def test_folder_with_other_files_is_refused(data, tmp_path):
    jobs, mark = planned(data, tmp_path)
    jobs[0].path.mkdir(parents=True)
    (jobs[0].path / "thesis.txt").write_text("mine")
    with pytest.raises(PgolfError, match="holds something other"):
        prepare(jobs[0], mark, "plain")


def test_fingerprint_depends_on_the_tokens(data, tmp_path):
    config = run_config(data)
    before = fingerprint(open_source(config.data, config.model.vocab_size))
    for file in data.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = run_config(tmp_path)
    assert fingerprint(open_source(moved.data, config.model.vocab_size)) == before
    shard = next(tmp_path.glob("*_val_*.bin"))
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    assert fingerprint(open_source(moved.data, config.model.vocab_size)) != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny"], "nothing to compare"),
        (["--flip", "model.trigram=false"], "unknown preset 'model.trigram=false'"),
        (["tiny", "--flip", "model.trigram=false", "--interval", "seeds"], "at least 2 --seeds, and has 1"),
        (
            ["tiny", "--flip", "model.trigram=false", "--seeds", "1", "2", "--interval", "documents"],
            "takes one seed",
        ),
        (["small", "--flip", "model.trigram=false"], "give --steps"),
        (
            ["tiny", "--flip", "ttt.adapter=error_guided"],
            "ttt.adapter=error_guided: ttt.adapter error_guided breaks the rules",
        ),
        (["tiny", "--flip", "model.trigram=false", "--budget", "time"], "give --seconds"),
        (
            ["tiny", "--flip", "model.trigram=false", "--flop", "3"],
            "unknown option --flop: did you mean --flip",
        ),
    ],
)
def test_command_refuses_in_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ablate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_budget_time_on_a_shared_cpu_and_torchrun_are_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["ablate", "tiny", "--flip", "model.trigram=false"]
    assert cli.main([*words, "--budget", "both", "--seconds", "5", "--workers", "2"]) == 2
    assert "compete for this CPU" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(words) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_table_names_the_versions_that_made_its_runs(tmp_path):
    job = made_up_run(tmp_path, BASELINE, 1, 2.0)
    assert commits([FinishedRun(job, {"commit": commit}) for commit in "bab"]) == ["a", "b"]


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"scores": 3}', "[" * 99_999, "\udcff", '{"a": ' + "9" * 5000 + "}"]
)
def test_results_that_were_changed_are_named(content, tmp_path):
    """Reading keys alone would end in KeyError, TypeError, RecursionError or UnicodeDecodeError."""
    job = made_up_run(tmp_path, BASELINE, 1, 2.0)
    (job.path / "job.json").write_text("{}")
    (job.path / "result.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(PgolfError, match=r"(result|job)\.json"):
        prepare(job, "data", "sliding")


def test_documents_that_were_changed_are_named(tmp_path):
    job = made_up_run(tmp_path, BASELINE, 1, 2.0)
    for content in ('{"sliding": [1, "x"]}', '{"sliding": {}}', "3"):
        (job.path / "documents.json").write_text(content)
        with pytest.raises(PgolfError, match=r"documents\.json"):
            documents(job.path)
