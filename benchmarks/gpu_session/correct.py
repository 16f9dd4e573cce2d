"""Session part `correct`: every op against float64 on this GPU, also beyond 2^31 elements."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu_session.session import PartFile, Session
from pgolf_fast.bench import peers, registry
from pgolf_fast.bench.doctor import check_ops
from pgolf_fast.bench.run import attempt
from pgolf_fast.config.presets import preset
from pgolf_fast.ops import judge
from pgolf_fast.ops.case import Case, Contender

TESTS = Path(__file__).parents[2] / "tests" / "ops"
# Ops tested with tensors of more than 2^31 elements, and the width of these tensors
LARGE = {"residual_norm": 512, "smear_gate": 512, "ngram_hash_embed": 64, "mlp-leaky_relu_squared": 512}
LARGE_BYTES = 80 << 30


def run(session: Session) -> bool:
    """Write correct.json; return whether everything that was compared is right."""
    file = PartFile(session, "correct")
    rows: list[dict[str, object]] = []

    def note(**row: object) -> None:
        rows.append(row)
        print(f"{row['what']}: {row['verdict']}", flush=True)
        file.write(checks=rows)

    doctor_rows(session, note)
    preset_shapes(session, note)
    large_offsets(session, note)
    tests = run_tests(session)
    wrong = [row for row in rows if row["ok"] is False]
    ok = not wrong and tests.get("status") in (0, None)
    file.finish(ok, tests=tests, wrong=len(wrong), skipped=sum(row["ok"] is None for row in rows))
    return ok


def doctor_rows(session: Session, note) -> None:
    """Record the rows of `pgolf doctor --check`."""
    rows = attempt(lambda: check_ops(session.device, torch.bfloat16))
    if isinstance(rows, str):
        note(what="doctor", ok=False, verdict=rows)
        return
    for row in rows:
        note(what=f"doctor: {' '.join(row[:3])}", ok=row[-1] == "ok", verdict=" ".join(row[3:]))


def preset_shapes(session: Session, note) -> None:
    """Compare every op at the preset's widths with float64, forward and every gradient."""
    config = preset(session.preset)
    tokens = 64 if session.dry else 4 * config.train.seq_len
    names = registry.select(session.ops)
    sizes = [(name, m) for name in names for m in registry.token_counts(name, (tokens,))]
    for dtype in (torch.bfloat16,) if session.first else (torch.bfloat16, torch.float32):
        for name, count in sizes:
            what = f"{name}, {count} tokens, {str(dtype).removeprefix('torch.')}"
            if session.left < 0.3 * session.seconds:
                note(what=what, ok=None, verdict="skipped: out of time")
                continue
            shape = (config, count, dtype, session.device)
            verdicts = attempt(lambda name=name, shape=shape: judge_case(registry.make_case(name, *shape)))
            if isinstance(verdicts, str):
                verdicts = {"ours": verdicts}
            for contender, verdict in verdicts.items():
                ok = not isinstance(verdict, str) and verdict.ok
                note(what=f"{what}, {contender}", ok=ok, verdict=str(verdict))


def judge_case(case: Case) -> dict[str, judge.Verdict | str]:
    """Compare our default implementation and every other choice on this machine with float64."""
    truth = judge.truth_of(case)
    contenders = [case.ours(), *(v for v in peers.variants(case).values() if isinstance(v, Contender))]
    return {c.name: attempt(lambda c=c: judge.judge(case, c, truth)) for c in contenders}


def large_offsets(session: Session, note) -> None:
    """Check that the last sequences of tensors with more than 2^31 elements come out as if computed alone."""
    config = preset(session.preset)
    for name, width in LARGE.items():
        what = f"{name}, more than 2^31 elements, bfloat16"
        length = min(64, config.train.seq_len) if session.dry else config.train.seq_len
        sequences = 4 if session.dry else 2**31 // (width * length) + 16
        if session.left < 0.15 * session.seconds:
            note(what=what, ok=None, verdict="skipped: out of time")
            continue
        if not session.dry and torch.cuda.mem_get_info()[0] < LARGE_BYTES:
            note(what=what, ok=None, verdict=f"skipped: less than {LARGE_BYTES >> 30} GiB of memory free")
            continue
        shape = (config, sequences * length, torch.bfloat16, session.device)
        verdict = attempt(lambda name=name, shape=shape: judge_end(registry.make_case(name, *shape)))
        note(what=what, ok=not isinstance(verdict, str) and verdict.ok, verdict=str(verdict))
        if not session.dry:
            torch.cuda.empty_cache()


def judge_end(case: Case) -> judge.Verdict:
    """Judge the last two sequences, computed in the full batch and alone."""
    return judge.judge_tail(case, case.ours(), entries=2)


def run_tests(session: Session) -> dict[str, object]:
    """Run the GPU cases of the op tests, if pytest is installed and there is time."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return {"status": None, "summary": f"not run: {missing[0]} is not installed"}
    if session.left < 15 and not session.dry:
        return {"status": None, "summary": "not run: out of time"}
    tests = str(TESTS / "test_residual_norm.py" if session.dry else TESTS)
    command = [sys.executable, "-m", "pytest", tests, "-q", "-k", "cuda", "-p", "no:cacheprovider"]
    root, limit = TESTS.parent.parent, max(20.0, session.left - 5)
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return {"status": None, "summary": "stopped: out of time", "output": output[-4000:]}
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-15:]), flush=True)
    status = 0 if done.returncode == 5 else done.returncode  # 5: pytest selected no test
    return {"status": status, "summary": lines[-1] if lines else "", "output": done.stdout[-4000:]}
