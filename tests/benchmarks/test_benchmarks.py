"""The peers of the benchmarks compute the same network, and the GPU session runs from end to end."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast import ops
from pgolf_fast.config.presets import exp101, tiny
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import attention_backend, tiles

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent))


def test_plain_pytorch_computes_the_same_network():
    from benchmarks.gpu_session.plain import plain_loss, plain_ops

    model = GPT(tiny_config(), torch.arange(96) % 3 == 0)
    randomize_(model, 1)
    tokens, targets = torch.randint(96, (2, 24)), torch.randint(96, (2, 24))
    loss = model.loss(tokens, targets)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    ours = ops.mlp
    with plain_ops():
        assert ops.mlp is not ours
        assert {tiles.implementation(op) for op in tiles.DEFAULTS} == {"torch"}
        plain = plain_loss(model)(tokens, targets)
        plain.backward()
    assert ops.mlp is ours
    assert {tiles.implementation(op) for op in tiles.DEFAULTS} == set(tiles.DEFAULTS.values())
    torch.testing.assert_close(plain, loss, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        scale = grads[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4 * scale, msg=name)


def session(tmp_path):
    from benchmarks.gpu_session.session import Session

    return Session(out=tmp_path, seconds=60.0, started=0.0, dry=True, preset="tiny")


def test_both_trainers_take_the_same_steps(tmp_path):
    """In float32, from the same weights, both give the same losses; warming up has no effect."""
    from benchmarks.gpu_session import step

    config = step.run_config(session(tmp_path))
    config = replace(config, train=replace(config.train, compute_dtype="float32", table_dtype="float32"))
    pool = step.make_pool(config, torch.device("cpu"), 8)
    runners = [
        step.prepare(one, config, pool, session(tmp_path))
        for one in (step.Contender("ours, eager", True), step.Contender(step.REFERENCE, False))
    ]
    for _ in range(6):
        for runner in runners:
            runner.step()
    found = step.loss_differences(runners)["ours, eager"]
    assert found["steps"] == 6
    assert found["largest"] < 2e-3
    assert runners[0].losses[-1] < runners[0].losses[0]  # the model learns
    ours, plain = (dict(r.trainer.model.named_parameters()) for r in runners)
    for name in (*BANK_NAMES, "blocks.1.mlp_scale"):  # Adam makes noise of gradients near zero
        torch.testing.assert_close(ours[name], plain[name], rtol=0.05, atol=0.01, msg=name)


def test_flops_of_a_token_are_those_of_the_design():
    from benchmarks.gpu_session import step

    assert step.flops_per_token(exp101().model, 2048) == pytest.approx(228.49e6, rel=1e-3)


def test_flops_of_scoring_are_those_of_the_design():
    """76.16 MFLOP per position; last block and head for 64 of 2,048 positions save 9.3 %."""
    from pgolf_fast.evaluation.estimate import forward_flops

    full = forward_flops(exp101().model, 2048, 2048)
    assert full / 2048 == pytest.approx(76.16e6, rel=1e-3)
    assert forward_flops(exp101().model, 2048, 64) / full == pytest.approx(0.907, abs=2e-3)


def test_naive_evaluation_is_ours():
    """The naive evaluator gives our losses, also with test-time training."""
    import naive_eval

    from pgolf_fast.config.schema import TTTConfig
    from pgolf_fast.data.tokenizer import ByteTable
    from pgolf_fast.evaluation.adapters.base import borrowed
    from pgolf_fast.evaluation.adapters.descent import SGD
    from pgolf_fast.evaluation.protocol import score_and_adapt, target_chunks
    from pgolf_fast.evaluation.score import Scorer, Stream
    from pgolf_fast.evaluation.windows import sliding_windows

    model = randomize_(GPT(tiny_config(), torch.arange(96) % 3 == 0), 1)
    table = ByteTable(np.ones(96, np.int16), np.arange(96) % 3 == 0, np.arange(96) < 4)
    stream = Stream(np.random.default_rng(0).integers(0, 96, 250), table, torch.device("cpu"))
    windows = sliding_windows(249, 16, 4)
    chunks = target_chunks(windows, 249, 64)
    config = TTTConfig(epochs=2, lr=0.1, batch_seqs=2, parameters="banks", quantize_forward="none")
    scorer = Scorer(stream, windows, 16, lambda length: 5)
    with borrowed(model):
        score_and_adapt(SGD(model, config, 16), scorer, chunks, "test")
    learner = naive_eval.SGD(model.loss, model.bank_parameters(), config, 16)
    naive = naive_eval.score_and_adapt(model.token_losses, learner, stream.tokens, windows, chunks, 16, 5)
    torch.testing.assert_close(scorer.losses, naive, rtol=1e-4, atol=1e-4)


def test_tokens_of_a_session_can_be_learned():
    from benchmarks.gpu_session import step

    tokens = step.markov_tokens(50, 200, 100)
    assert tokens.shape == (200, 100)
    assert tokens.min() >= 0
    assert tokens.max() < 50
    counts = np.zeros((50, 50))
    np.add.at(counts, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    top_four = np.sort(counts, axis=1)[:, -4:].sum() / counts.sum()
    assert top_four > 0.85
    np.testing.assert_array_equal(tokens, step.markov_tokens(50, 200, 100))


def run_session(*words, timeout=300):
    command = [sys.executable, str(FOLDER / "gpu_session"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_one_part_can_be_rehearsed(tmp_path):
    """The short proof: the process, its file and the summary. The slow test runs all five parts."""
    done = run_session("--dry-run", "--out", str(tmp_path), "--minutes", "5", "--parts", "tune")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert read(tmp_path, "summary")["parts"]["tune"]["ok"]
    tuned = read(tmp_path, "tune")
    assert (tuned["status"], tuned["dry_run"]) == ("done", True)
    assert [kernel["kernel"] for kernel in tuned["kernels"]] == ["smear_gate_fwd"]


@pytest.mark.slow
def test_whole_session_can_be_rehearsed(tmp_path):
    done = run_session("--dry-run", "--out", str(tmp_path), "--minutes", "8", timeout=560)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    summary = read(tmp_path, "summary")
    assert {part: state["ok"] for part, state in summary["parts"].items()} == {
        "correct": True,
        "ops": True,
        "step": True,
        "eval": True,
        "tune": True,
    }
    for part in summary["parts"]:
        found = read(tmp_path, part)
        assert found["status"] == "done", part
        assert found["dry_run"], part
        assert found["environment"]["torch"] == torch.__version__, part
        assert {"commit", "time", "gpu_before", "gpu_after"} <= set(found), part
    correct = read(tmp_path, "correct")
    assert correct["wrong"] == 0
    assert {row["ok"] for row in correct["checks"]} == {True}
    assert any("2^31" in row["what"] for row in correct["checks"])
    assert correct["tests"]["status"] == 0
    records = [json.loads(line) for line in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert {"ours", "eager", "dense", "compile"} <= {r["peer"] for r in records if "median_ms" in r}
    step = read(tmp_path, "step")
    measured = {row["contender"]: row for row in step["T1"]}
    assert set(measured) == {"ours, compile", "plain, compile, cudnn", "ours, eager", "plain, eager, cudnn"}
    assert all(row["in_turn"] for row in measured.values())
    assert all(row["median_ms"] > 0 and row["mfu_percent"] > 0 for row in measured.values())
    assert max(gap["largest"] for gap in step["T3"].values()) < 0.05
    assert len(step["T2"]) == 2
    assert set(step["profiles"]) == set(measured)
    assert step["failed"] == {}
    evaluated = read(tmp_path, "eval")
    assert {row["contender"] for row in evaluated["E1"]} == {"ours, eager", "plain, eager"}
    assert evaluated["E2"]["largest_difference_nats"] < 1e-3
    assert evaluated["failed"] == {}
    tuned = read(tmp_path, "tune")
    assert [kernel["kernel"] for kernel in tuned["kernels"]] == ["smear_gate_fwd"]
    assert len(list(tmp_path.iterdir())) <= 8  # as many files as come back from a machine


@pytest.mark.slow
@pytest.mark.parametrize("part", ["step", "eval"])
@pytest.mark.parametrize("which", [0, 1])
def test_slow_compile_costs_one_way(part, which, tmp_path):
    """A way that does not end in time leaves the rows of every other."""
    from benchmarks.gpu_session import evaluate, step

    ways = [c.name for c in (step if part == "step" else evaluate).CONTENDERS if c.dry]
    words = ["--minutes", "9", "--parts", part, "--slow", ways[which], "--way-seconds", "120"]
    run_session("--dry-run", "--out", str(tmp_path), *words, timeout=560)
    found = read(tmp_path, part)
    assert found["failed"] == {ways[which]: "stopped after 120 s"}
    rows = {row["contender"] for row in found["T1" if part == "step" else "E1"]}
    assert rows == set(ways) - {ways[which]}


def quick_session(tmp_path, seconds, **settings):
    from benchmarks.gpu_session.session import Session

    now = time.monotonic()
    return Session(out=tmp_path, seconds=seconds, started=now, dry=True, preset="tiny", **settings)


def test_ways_are_measured_alone(tmp_path, monkeypatch):
    """Each in its own process with half of the time left: what hangs, crashes or is missing costs one way."""
    from benchmarks.gpu_session import session as module

    script = tmp_path / "gpu_session.py"
    script.write_text(f"""
import json, os, sys, time
way = sys.argv[sys.argv.index("--way") + 1]
if way == "hangs":
    time.sleep(100)
if way == "crashes":
    os._exit(3)
found = {{"failed": "not installed"}} if way == "missing" else {{"ms": [1.0], "words": sys.argv[1:]}}
open({str(tmp_path / "way.json")!r}, "w").write(json.dumps(found))
""")
    monkeypatch.setattr(module, "__file__", str(script / "session.py"))  # its folder is what is run
    noted = {}

    def note(name, found):
        noted[name] = found

    one = quick_session(tmp_path, 40.0, way_seconds=6.0, command=("--worker", "step"))
    ways = {"hangs": True, "first": False, "crashes": True, "missing": True, "second": True}
    failed = module.each_alone(ways, one, one.deadline(), note, "--micro", "2")
    assert set(noted) == {"first", "second"}
    assert noted["first"]["words"][:4] == ["--worker", "step", "--way", "first"]
    assert noted["first"]["words"][-2:] == ["--micro", "2"]
    assert failed == {
        "hangs": "stopped after 6 s",
        "crashes": "crashed with exit status 3",
        "missing": "not installed",
    }


def test_no_way_starts_that_cannot_end(tmp_path, monkeypatch):
    from benchmarks.gpu_session import session as module

    started = []

    def alone(session, name, limit):
        started.append(name)
        time.sleep(0.4 if name.startswith("slow") else 0.0)
        return {"ms": [1.0]}

    monkeypatch.setattr(module, "alone", alone)
    one = quick_session(tmp_path, 5.0)
    ways = {"slow": True, "eager": False, "compiled": True, "late": False}
    failed = module.each_alone(ways, one, one.deadline(), lambda name, found: None)
    assert (started, failed) == (list(ways), {})
    one = quick_session(tmp_path, 1.0, way_seconds=0.3)  # less than the slow one took
    started.clear()
    monkeypatch.setattr(module, "FIRST_WAY", 0.0)
    failed = module.each_alone(ways, one, one.deadline(), lambda name, found: None)
    assert started == ["slow", "eager", "late"]
    assert failed == {"compiled": "not started: out of time"}
    started.clear()
    failed = module.each_alone(ways, quick_session(tmp_path, 5.0), time.monotonic(), lambda *_: None)
    assert started == ["slow", "eager"]  # after the deadline, two are enough
    assert set(failed) == {"compiled", "late"}


def test_ours_eager_comes_first():
    from benchmarks.gpu_session import evaluate, runner, step

    for part in (step, evaluate):
        assert part.CONTENDERS[0].name == "ours, eager"
        assert not part.CONTENDERS[0].compile
    assert list(runner.FIRST)[:2] == ["correct", "step"]
    assert set(runner.FIRST) == set(runner.PARTS)


@pytest.mark.parametrize("kind", ["fused", "fa3"])
def test_other_forms_of_plain_attention_are_the_same(kind, monkeypatch):
    """One product for q, k and v; FlashAttention 3 as an op that torch.compile can see (here a stand-in)."""
    from benchmarks.gpu_session import plain

    runs = (attention_backend._plain, attention_backend._plain_backward)
    monkeypatch.setitem(attention_backend._RUN, "fa3", runs)
    monkeypatch.setattr(attention_backend, "why_not", lambda name, shape: None)
    functions = plain.variant("fa3" if kind == "fa3" else "cudnn", kind == "fused")
    assert set(functions) == {"gqa_attention"}
    assert plain.variant("cudnn", False) == {}
    x, qo, kv = torch.randn(2, 24, 32), torch.randn(4, 32, 32) / 6, torch.randn(4, 16, 32) / 6
    gain, tables = torch.tensor([1.5, -0.7]), [torch.ones(24, 0)] * 2
    grads = []
    for function in (plain.attention, functions["gqa_attention"]):
        leaves = [t.clone().requires_grad_() for t in (x, qo, kv, gain)]
        out = function(*leaves, None, *tables, 1, num_kv_heads=1, xsa=True)
        grads.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    if kind == "fa3":
        inputs = [torch.randn(1, 8, n, 8, requires_grad=True) for n in (2, 1, 1)]
        torch.library.opcheck(plain.fa3, inputs)


def test_plain_attention_names_what_is_missing(monkeypatch):
    from benchmarks.gpu_session import plain

    monkeypatch.setattr(attention_backend, "why_not", lambda name, shape: "package x is not installed")
    with pytest.raises(plain.peers.UnavailableError, match="package x is not installed"):
        plain.variant("fa3", False)


def test_part_that_crashes_or_overruns_is_recorded(tmp_path, monkeypatch):
    from benchmarks.gpu_session import runner

    script = tmp_path / "worker.py"
    monkeypatch.setattr(runner, "PROGRAM", script)
    monkeypatch.setattr(runner, "GRACE", 0.0)
    monkeypatch.setattr(sys, "argv", ["gpu_session"])
    arguments = runner.parse()
    content = json.dumps({"measured": 3, "status": "running"})
    begin = f"import sys, time, os\nopen({str(tmp_path / 'ops.json')!r}, 'w').write({content!r})\n"
    for body, status in (
        ("print('last words'); os._exit(7)", "crashed with exit status 7"),
        ("print('last words', flush=True); time.sleep(100)", "stopped: out of time"),
        ("print('last words'); raise ValueError", "crashed"),
    ):
        script.write_text(begin + body)
        state = runner.run_part("ops", 5.0, arguments, tmp_path)
        assert (state["status"], state["ok"]) == (status, False)
        left = read(tmp_path, "ops")
        assert left["measured"] == 3  # earlier results are kept
        assert left["status"] == status
        assert "last words" in left["output_tail"]
    state = runner.run_part("ops", 1.0, arguments, tmp_path)
    assert state["status"] == "skipped: out of time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_session_says_when_there_is_no_gpu(tmp_path):
    done = run_session("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "no CUDA GPU; rehearse with --dry-run" in done.stderr
    assert not (tmp_path / "out").exists()


def test_session_needs_neither_tyro_nor_platformdirs(tmp_path):
    """A GPU machine may have only PyTorch, Triton and NumPy: no pytest either."""
    code = f"""
import sys
for name in ("tyro", "platformdirs", "matplotlib", "tqdm", "sentencepiece", "pytest"):
    sys.modules[name] = None
sys.path[:0] = [{str(FOLDER.parent)!r}]
from benchmarks.gpu_session import correct, evaluate, ops, runner, session, step
assert tuple(runner.PARTS) == ("correct", "ops", "step", "eval", "tune")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_rehearsal_preset_is_small():
    from benchmarks.gpu_session import runner

    assert runner.DRY_PRESET == "tiny"
    assert tiny().model.num_parameters() < 2_000_000


@pytest.mark.slow
def test_calibration_benchmark_runs(tmp_path):
    """The short proof of the export benchmark; the slow test runs all of its parts."""
    out = tmp_path / "export.json"
    command = [sys.executable, str(FOLDER / "bench_export.py"), "calibration", "--smoke", "--out", str(out)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(out.read_text())["calibration"]["largest logit difference"] < 1e-4


@pytest.mark.slow
def test_export_benchmark_runs(tmp_path):
    out = tmp_path / "export.json"
    command = [sys.executable, str(FOLDER / "bench_export.py"), "--smoke", "--out", str(out)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "uncached / cached" in shown
    results = json.loads(out.read_text())
    assert {"commit", "environment"} <= results["provenance"].keys()
    assert all(row["matrices"] == 24 and row["same codes"] > 0.999 for row in results["gptq"])
    assert {row["steps"] for row in results["gptq"]} == {"free", "1/31 or more"}
    assert results["calibration"]["largest logit difference"] < 1e-4
    lengths = [int(length) for length in results["calibration"]["lengths"]]
    assert lengths[0] == 1
    assert lengths[-1] == 39
