"""Session parts `ops` and `tune`: `pgolf bench` and `pgolf tune` within the session's time."""

import contextlib
from dataclasses import asdict, replace
from unittest import mock

import torch

from benchmarks.gpu_session.session import PartFile, Session
from pgolf_fast.bench import peers, registry, run, store, tune
from pgolf_fast.bench.roofline import measured_roof, roof
from pgolf_fast.bench.run import GPU_TOKENS
from pgolf_fast.bench.store import describe
from pgolf_fast.bench.tune import tune_table
from pgolf_fast.config.presets import preset
from pgolf_fast.ops import cases, tiles, tuned
from pgolf_fast.ops.case import MODES

# Peers that compile in seconds; slower settings of torch.compile follow if there is time left
FIRST = (*peers.OWN, "eager", "dense", "sdpa-flash", "sdpa-cudnn", "compile", "liger", "gemlite")
SLOW = ("compile", "compile-mix-off", "compile-cudnn", "compile-max-autotune")


def run_ops(session: Session) -> bool:
    """Write ops.json and ops.jsonl; return whether our ops were right wherever they were measured."""
    file = PartFile(session, "ops")
    tuned.load_tuned()
    (session.out / "ops.jsonl").unlink(missing_ok=True)
    results = store.Store(session.out / "ops.jsonl")

    def add(record: store.Record) -> None:
        results.add(record)
        file.write(measured=len(results.records), table=[describe(results.records)])

    try:
        for plan in plans(session):
            run.measure(plan, add)
    finally:
        results.close()
    late = "skipped: out of time"
    wrong = [r for r in results.records if r["peer"] == "ours" and r.get("error", late) != late]
    ok = not wrong and bool(store.timed(results.records))
    kind = session.device, dtype_of(session)
    roofs = {"used": asdict(roof(*kind))}
    if session.left > 5:
        roofs["measured"] = asdict(measured_roof(*kind))
    file.finish(ok, roof=roofs)
    return ok


def dtype_of(session: Session) -> torch.dtype:
    return torch.float32 if session.dry else torch.bfloat16


def plans(session: Session) -> list[run.Plan]:
    """Return plans: the most important size, the other sizes, then the slow settings of torch.compile."""
    names = registry.select(session.ops)

    def plan(tokens: tuple[int, ...], peers_wanted: tuple[str, ...], ops: list[str], modes=MODES) -> run.Plan:
        return run.Plan(
            config=preset(session.preset),
            ops=ops,
            tokens=tokens,
            peers=peers_wanted,
            dtype=dtype_of(session),
            device=session.device,
            modes=modes,
            seconds=0.01 if session.dry else 0.3,
            runs=5 if session.dry else 20,
            deadline=session.deadline(0.95),
        )

    if session.dry:
        compiled = [name for name in names if name == "smear_gate"]
        return [plan((64,), peers.QUICK, names), plan((64,), ("compile",), compiled, ("fwd",))]
    tokens = session.tokens or GPU_TOKENS
    if session.peers:
        return [plan(tokens, session.peers, names)]
    free = [name for name in names if cases.CASES[name].rows is None]
    found = [plan(tokens[:1], FIRST, names)]
    found += [plan(tokens[1:], FIRST, free)] if tokens[1:] else []
    return [*found, plan(tokens[:1], SLOW, names)]


def run_tune(session: Session) -> bool:
    """Write tune.json and tiles.json; return whether any kernel was tuned."""
    file = PartFile(session, "tune")
    config = preset(session.preset)
    longest = ("gqa_attention", "mlp") if session.first and not session.dry else ()
    plan = tune.TunePlan(
        config=config,
        ops=registry.select(session.ops or longest),
        tokens=64 if session.dry else config.train.micro_batch_tokens,
        dtype=dtype_of(session),
        device=session.device,
        candidates=3 if session.dry else 24,
        runs=2 if session.dry else 10,
        deadline=session.deadline(0.9),
    )
    found: list[tune.Found] = []

    def done(one: tune.Found) -> None:
        found.append(one)
        tuned.save_rows(session.out / tuned.FILE_NAME, [tune.as_tuned(one, plan)])
        file.write(kernels=[asdict(each) for each in found], table=[tune_table(found)])

    with rehearsed_kernel() if session.dry else contextlib.nullcontext():
        tune.tune(plan, done)
    reached = {one.kernel for one in found}
    file.finish(bool(found), not_reached=[name for name in tiles.kernels() if name not in reached])
    return bool(found)


def rehearsed_kernel():
    """Let smear_gate look up its tile, as ops do only on a GPU."""
    entry = cases.CASES["smear_gate"]

    def make(builder):
        case = entry.make(builder)

        def op(**inputs):
            with tiles.kernels_on_cpu("sm90"):
                tiles.lookup("smear_gate_fwd", inputs["x"])
            return case.op(**inputs)

        return replace(case, op=op)

    return mock.patch.dict(cases.CASES, {"smear_gate": replace(entry, make=make)})
