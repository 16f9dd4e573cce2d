"""`pgolf bench` measures right results only; its peers compute the same as ours."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pgolf_fast.bench import peers, plots, registry, run, store, timer
from pgolf_fast.bench.roofline import Roof
from pgolf_fast.bench.run import bench_plan
from pgolf_fast.cli import kernels, main
from pgolf_fast.cli.options import parse
from pgolf_fast.config.presets import exp101, tiny
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import cases, judge

CPU = torch.device("cpu")
TOKENS = 48


def config(length=16):
    preset = tiny()
    train = replace(preset.train, seq_len=length, micro_batch_tokens=length, batch_tokens=length)
    return replace(preset, train=train, eval=replace(preset.eval, seq_len=None, stride=1))


def preset_cases():
    return [(op, m) for op in registry.timed() for m in registry.token_counts(op, (TOKENS,)) if m < 4096]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "tokens"), preset_cases())
def test_every_formula_computes_the_same_at_preset_shapes(op, tokens, dtype):
    case = registry.make_case(op, config(), tokens, dtype, CPU)
    truth = judge.truth_of(case)
    contenders = [case.ours(), *(peers.build(p, case) for p in peers.PLAIN if peers.applies(p, case))]
    assert len(contenders) > 1
    for contender in contenders:
        verdict = judge.judge(case, contender, truth)
        assert verdict.ok, f"{contender.name}: {verdict}"
        if truth.douts:
            judged = set(
                case.by_weight({f"d {name}": t for name, t in contender.results(truth.douts)[1].items()})
            )
            assert judged == {name for name in truth.exact if name.startswith("d ")}


def test_flops_and_bytes_are_those_of_the_design():
    """Costs at 98,304 tokens, computed by hand for exp101."""
    names = ("mlp-leaky_relu_squared", "gqa_attention", "softcap_cross_entropy")
    mlp, attention, loss = (
        registry.make_case(name, exp101(), 98_304, torch.bfloat16, "meta") for name in names
    )
    assert mlp.work.forward_flops == pytest.approx(2 * 154.6e9, rel=1e-3)
    assert mlp.work.backward_flops == pytest.approx(4 * 154.6e9, rel=1e-3)
    assert loss.work.forward_flops == pytest.approx(103.1e9, rel=1e-3)
    per_token = 23.08e6 / 11  # attention without projections, forward
    projections = 2 * 2 * 512 * (512 + 256)
    assert attention.work.forward_flops / 98_304 == pytest.approx(per_token + projections, rel=1e-3)
    assert mlp.work.forward_bytes == pytest.approx(98_304 * 2 * 1024 + 2 * 512 * 1536 * 2)


def test_cpu_timer_takes_turns_and_counts_runs():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = timer.time_in_turn(calls, CPU, seconds=5.0, runs=6)
    assert order == list("ab" * 7)
    assert [len(t.samples) for t in times.values()] == [6, 6]
    slow = timer.time_in_turn({"slow": lambda: time.sleep(0.02)}, CPU, seconds=0.01)["slow"]
    assert len(slow.samples) == 5
    assert slow.quantile(0.2) <= slow.median <= slow.quantile(0.8)
    assert slow.median > 15
    threads = torch.get_num_threads()
    with timer.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


def test_gpu_timer_with_events_of_a_pretended_gpu(monkeypatch):
    """At least five runs each however slow, twenty if time allows, warmed up and in turn."""
    order, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def call(name, ms):
        order.append(name)
        now[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timer, "FLUSH_BYTES", 16)
    calls = {"quick": lambda: call("quick", 0.5), "slow": lambda: call("slow", 300.0)}
    times = timer._time_cuda(calls, CPU, 0.5, 5, 20)
    assert len(times["quick"].samples) == 20
    assert len(times["slow"].samples) == 5
    assert times["quick"].median == pytest.approx(0.5)
    assert times["slow"].median == pytest.approx(300.0)
    warm = order[: -(20 + 5)]
    assert (warm.count("quick"), warm.count("slow")) == (5, 3)
    assert order[-(20 + 5) :] == 5 * (4 * ["quick"] + ["slow"])


def quick_plan(**changes):
    values = {
        "config": config(),
        "ops": ["smear_gate", "int6_matmul"],
        "tokens": (32,),
        "peers": ("eager", "dense"),
        "dtype": torch.float32,
        "device": CPU,
        "seconds": 0.001,
        "runs": 5,
    }
    return run.Plan(**{**values, **changes})


def measured(plan):
    records = []
    run.measure(plan, records.append)
    return records


def test_records_hold_what_a_reader_needs(tmp_path):
    results = store.Store(tmp_path / "r.jsonl")
    run.measure(quick_plan(), results.add)
    results.close()
    records = store.read_records(tmp_path / "r.jsonl")
    assert [r for r in records if "error" in r] == []
    keys = {(r["op"], r["mode"], r["tokens"], r["peer"]) for r in records}
    assert keys == {
        *{("smear_gate", mode, 32, peer) for mode in ("fwd", "fwd+bwd") for peer in ("ours", "eager")},
        *{("int6_matmul", "fwd", m, p) for m in (1, 8, 64, 4096) for p in ("ours", "eager", "dense")},
    }
    for record in records:
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["runs"] == 5
        for name in ("tflops", "gbytes_per_second", "roofline_percent", "largest_error"):
            assert record[name] >= 0, name
        assert {"commit", "time", "shape", "dtype", "device", "peak_bytes"} <= set(record)
        assert record["environment"]["torch"] == torch.__version__
    flops = records[0]["tflops"] * 1e12 * records[0]["median_ms"] / 1e3
    assert flops == pytest.approx(records[0]["flops"])
    assert len(store.summary(records)) == 2 + 4


def replace_case(monkeypatch, name, change):
    """Make the catalog build `change(case)` under that name."""
    entry = cases.CASES[name]
    monkeypatch.setitem(cases.CASES, name, replace(entry, make=lambda builder: change(entry.make(builder))))


def test_a_wrong_op_is_refused(monkeypatch):
    def spoil(case):
        return replace(case, op=lambda **t: tuple(out + 0.01 for out in case.op(**t)))

    replace_case(monkeypatch, "smear_gate", spoil)
    records = measured(quick_plan(ops=["smear_gate"]))
    assert {r["peer"] for r in records} == {"ours"}
    assert all(r["error"].startswith("refused, wrong result: out0") for r in records)
    assert store.timed(records) == []


def test_a_peer_that_fails_is_a_record(monkeypatch):
    known = peers.formulas_of

    def broken(**inputs):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setattr(peers, "formulas_of", lambda case: {**known(case), "dense": peers.Formula(broken)})
    records = measured(quick_plan(ops=["smear_gate"], peers=("eager", "dense", "liger")))
    errors = {(r["peer"], r["error"]) for r in records if "error" in r}
    assert errors == {("dense", "RuntimeError: no such kernel")}  # liger has no smear gate: not a record
    assert {r["peer"] for r in store.timed(records)} == {"ours", "eager"}


def test_missing_packages_are_reported():
    records = measured(quick_plan(ops=["residual_norm", "int6_matmul"], peers=("liger", "gemlite")))
    assert {r["peer"] for r in records if r.get("error", "").startswith("unavailable:")} == {
        "liger",
        "gemlite",
    }


def test_nothing_new_starts_after_the_deadline():
    records = measured(quick_plan(deadline=time.monotonic() - 1))
    assert {r["error"] for r in records} == {"skipped: out of time"}


@pytest.mark.slow
def test_compiled_peers_run():
    records = measured(quick_plan(ops=["smear_gate"], peers=("compile-mix-off",), modes=("fwd",)))
    assert {r["peer"] for r in store.timed(records)} == {"ours", "compile-mix-off"}


def test_compile_settings_are_refused_where_torch_lacks_them(monkeypatch):
    assert peers.compile_settings("compile") == {}
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["max_autotune"])
    with pytest.raises(peers.UnavailableError, match=r"no Inductor option triton\.mix_order_reduction"):
        peers.compile_settings("compile-mix-off")


def record(peer="ours", ms=1.0, **changes):
    values = {
        "preset": "tiny",
        "op": "mlp",
        "mode": "fwd",
        "tokens": 64,
        "dtype": "float32",
        "device": "cpu",
        "peer": peer,
        "median_ms": ms,
        "roofline_percent": 10.0,
        "flops": 1e9,
        "ideal_bytes": 1e6,
        "tflops": 1.0,
        "roof_tflops": 2.0,
        "roof_gbytes_per_second": 10.0,
        "roof_source": "measured",
        "environment": {"gpu": None, "processor": "x", "torch": "2"},
    }
    return {**values, **changes}


def written(path, *records):
    lines = [json.dumps({"kind": "bench", **r}) for r in records]
    path.write_text("\n".join(lines) + "\n{cut")
    return path


def test_compare_finds_slower_and_missing_ops(tmp_path, capsys):
    before = written(tmp_path / "a", record(), record("eager", 5.0), record(op="hash"))
    after = written(tmp_path / "b", record(ms=1.2), record("eager", 50.0))
    assert main(["bench", "--compare", str(before), str(after)]) == 1
    text = capsys.readouterr().out
    assert "mlp fwd 64 ours: 1.200 times as long" in text
    assert "hash fwd 64 ours is missing" in text
    assert "eager: " not in text.split("slower than allowed:")[1]
    assert main(["bench", "--compare", str(before), str(before)]) == 0
    assert "1.000" in capsys.readouterr().out
    # one op is missing
    assert main(["bench", "--compare", str(before), str(after), "--threshold", "1.3"]) == 1


def test_compare_refuses_files_without_records_in_common(tmp_path):
    one, other = written(tmp_path / "a", record()), written(tmp_path / "b", record(dtype="bfloat16"))
    with pytest.raises(PgolfError, match="no measurement in common"):
        kernels.Bench(compare=(one, other)).main()
    (tmp_path / "c").write_text("")
    with pytest.raises(PgolfError, match="holds no benchmark records"):
        kernels.Bench(compare=(one, tmp_path / "c")).main()
    with pytest.raises(PgolfError, match="no file"):
        kernels.Bench(records=tmp_path / "d").main()


def test_summary_takes_the_best_peer_and_the_last_time():
    records = [record(ms=9.0), record(ms=2.0), record("eager", 5.0), record("compile", 4.0)]
    assert store.summary(records) == [("mlp", "fwd", "64", "2.0000", "10%", "compile", "4.0000", "2.00")]


def test_a_cut_line_does_not_spoil_the_next(tmp_path):
    path = written(tmp_path / "r", record())
    results = store.Store(path)
    results.add(record(ms=3.0))
    results.close()
    assert [r["median_ms"] for r in store.read_records(path)] == [1.0, 3.0]


def test_plots_are_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = written(tmp_path / "r", record(), record("eager", 5.0), record("compile", 0.5))
    assert kernels.Bench(records=path, plots=tmp_path / "plots").main() == 0
    text = capsys.readouterr().out
    for name in ("roofline.png", "ratios.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert name in text
    with pytest.raises(PgolfError, match="no op with both"):
        plots.plot_ratios([record()], tmp_path / "x.png")


def test_roofline_is_the_nearer_limit():
    limit = Roof(flops=100.0, bytes=10.0, source="")
    assert limit.seconds(flops=1000, moved=1) == 10
    assert limit.seconds(flops=1, moved=1000) == 100


def test_options_become_a_plan():
    wanted = bench_plan("exp101", ops=("mlp",), quick=True, modes=("fwd+bwd",))
    assert wanted.ops == ["mlp-leaky_relu_squared", "mlp-swiglu", "mlp-relu_squared"]
    assert list(wanted.modes) == ["fwd+bwd"]
    for wrong, message in (
        ({"ops": ("conv",)}, "no op 'conv' to measure"),
        ({"peer_names": ("cublas",)}, "unknown peer 'cublas'"),
        ({"tokens": (0,)}, "must be positive"),
    ):
        with pytest.raises(PgolfError, match=message):
            bench_plan("exp101", **wrong)
    with pytest.raises(PgolfError, match="not whole sequences"):
        registry.make_case("smear_gate", config(), 17, torch.float32, CPU)


def test_command_lines_become_options(tmp_path):
    words = "--ops mlp smear_gate --tokens 32 64 --modes fwd+bwd --peers eager --quick --minutes 0.5"
    parsed = parse("bench", kernels.Bench, words.split())
    assert (parsed.ops, parsed.tokens, parsed.modes) == (("mlp", "smear_gate"), (32, 64), ("fwd+bwd",))
    assert (parsed.peers, parsed.quick, parsed.minutes) == (("eager",), True, 0.5)
    assert parse("bench", kernels.Bench, ["--compare", "a", "b"]).compare == (Path("a"), Path("b"))
    assert parse("tune", kernels.Tune, ["--kernels", "mlp_up", "--tokens", "64"]).kernels == ("mlp_up",)
    with pytest.raises(PgolfError, match="did you mean --tokens"):
        parse("bench", kernels.Bench, ["--token", "3"])
