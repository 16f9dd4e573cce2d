"""Benchmark the export path against its peers: bytes, seconds and memory, with entropy bounds.

    python benchmarks/bench_artifact.py --run runs/small

`codecs`: four artifacts, each through general compressors (layout of PR 1501) and our container:
a trained model (--run); codes of PR 1501's size and statistics with equal rows, with rows of different
scale, and with rows and columns of different scale. `pipeline`: GPTQ, packing, loading, pruning to a byte
target and fitting grid `rd` to one, at full size. Each measurement runs in its own process, one at a time;
keep the machine quiet. Writes artifact.json after every measurement and artifact.txt, the tables printed.

A full run takes most of an hour: zpaq needs minutes per direction for each of the large artifacts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]  # the package need not be installed

from artifact_worker import BASELINE, OURS, PEERS, STEPS, versions  # noqa: E402 - after the path is set
from synthetic_artifact import REFERENCE, Synthetic, synthetic, write_artifact, write_config  # noqa: E402

from pgolf_fast import console  # noqa: E402
from pgolf_fast.artifact.pack import read_quantized  # noqa: E402
from pgolf_fast.bench.store import provenance  # noqa: E402
from pgolf_fast.config.presets import exp101, tiny  # noqa: E402
from pgolf_fast.config.run_folder import RunFolder  # noqa: E402
from pgolf_fast.config.schema import RunConfig  # noqa: E402
from pgolf_fast.io import write_text  # noqa: E402
from pgolf_fast.lab.analysis.artifact_bytes import static_bounds  # noqa: E402

Record = dict[str, Any]
PARTS = ("codecs", "pipeline")
CONTENDERS = (*PEERS, *OURS)
# Made-up artifacts: standard deviation of the log scale of rows and of columns
SPREADS = {"equal": (0.0, 0.0), "rows": (0.25, 0.0), "spread": (0.25, 0.25)}
ARTIFACTS = ("trained", *SPREADS)
TRAIN_ONE = (
    "pgolf train small --data.path DATA/datasets/webmix_sp1024 --out runs/small && pgolf quantize runs/small"
)
# Limits that the results are compared with
CONTAINER = "container"
OVER_BOUND = 0.5  # percent
OF_BASELINE = {"equal": 0.945, "spread": 0.92}  # bytes of the codes
FASTER_ENCODE, FASTER_DECODE = 100.0, 3.0
PLAIN_READER, PLAIN_READER_SECONDS = "container, read in Python", 20.0
SECONDS = {"gptq": 20.0, "pack": 3.0, "load": 2.0, "prune": 10.0}
BYTES_BELOW = 200
PEAK_MIB = 4096.0


def main() -> int:
    arguments = parse()
    results = Results(arguments.out, arguments.smoke)
    with tempfile.TemporaryDirectory() as temporary:
        if "codecs" in arguments.parts:
            for artifact, config, made in artifacts(arguments):
                folder = Path(temporary) / artifact
                write_artifact(folder, made.quantized, config)
                results.begin(artifact, config, made, (folder / REFERENCE).stat().st_size)
                for name in arguments.contenders:
                    results.add(name, measured(name, folder), artifact)
        if "pipeline" in arguments.parts:
            folder = Path(temporary) / "pipeline"
            write_config(folder, config_of(arguments))
            for step in STEPS:
                found = measured(step, folder)
                results.add(step, found)
                if "error" in found:  # later steps need its files
                    break
    text = report_text(results.content)
    print(text)
    results.write("artifact.txt", text)
    return 1 if failures(results.content) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder of a trained and quantized model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=ARTIFACTS)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results, none with --smoke")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, to check that everything runs")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.smoke:
        arguments.out = HERE / "results"
    return arguments


def artifacts(arguments: argparse.Namespace) -> Iterator[tuple[str, RunConfig, Synthetic]]:
    """Yield names, configurations and models; of a trained model, the bits of an oracle are unknown."""
    if "trained" in arguments.artifacts:
        if arguments.run is None:
            say(f"trained model: skipped, because --run is not given; to make one: {TRAIN_ONE}")
        else:
            run = RunFolder(arguments.run)
            yield "trained", run.read_config(), Synthetic(read_quantized(run)[0])
    config = config_of(arguments)
    for name, (rows, columns) in SPREADS.items():
        if name in arguments.artifacts:
            yield name, config, synthetic(config.model, rows=rows, columns=columns)


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """Return the configuration of synthetic models: exp101, or with --smoke one that takes seconds."""
    if not arguments.smoke:
        return exp101()
    base = tiny()
    model = replace(base.model, num_layers=2, ve_layers=(1,), frozen_skips=0)
    return replace(base, name="smoke", model=model, quant=exp101().quant)


def measured(name: str, folder: Path) -> Record:
    """Measure in a separate process; return the record, {"skipped": reason} or {"error": last line}."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    command = [sys.executable, str(HERE / "artifact_worker.py"), name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


class Results:
    """The JSON file, rewritten after every measurement."""

    def __init__(self, folder: Path | None, smoke: bool):
        self.folder = folder
        machine = {**provenance(), "cores": os.cpu_count(), "peers": versions()}
        self.content: Record = {**machine, "smoke": smoke, "artifacts": {}, "pipeline": {}}

    def begin(self, name: str, config: RunConfig, made: Synthetic, reference_bytes: int) -> None:
        matrices = [matrix.codes.numpy() for matrix in made.quantized.matrices().values()]
        static = static_bounds(matrices)
        bounds = {name: asdict(bound) for name, bound in static.items()}
        if made.oracle_bits is not None:
            bounds["oracle"] = {"bytes": made.oracle_bits / 8, "side_bytes": 0.0}
        self.content["artifacts"][name] = {
            "model": config.name,
            "codes": sum(m.size for m in matrices),
            "reference_bytes": reference_bytes,
            "bounds": bounds,
            "best_bound": min(static, key=lambda name: static[name].bytes),
            "contenders": {},
        }

    def add(self, name: str, found: Record, artifact: str | None = None) -> None:
        """Record measurements of a contender on an artifact, or of a step of the pipeline."""
        artifacts = self.content["artifacts"]
        place = self.content["pipeline"] if artifact is None else artifacts[artifact]["contenders"]
        place[name] = found
        values = ", ".join(f"{key} {shown(value)}" for key, value in found.items())
        say(f"{name if artifact is None else f'{artifact}, {name}'}: {values}")
        self.write("artifact.json", json.dumps(self.content, indent=1))

    def write(self, name: str, text: str) -> None:
        if self.folder is not None:
            write_text(self.folder / name, text + "\n")


say = partial(print, file=sys.stderr, flush=True)


# Tables


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def report_text(content: Record) -> str:
    """Return all tables of a run. The limits are for full size, so a smoke run leaves them out."""
    parts = []
    for name, found in content["artifacts"].items():
        parts += [heading(name, found), bound_table(found), contender_table(found)]
    if content["pipeline"]:
        steps = content["pipeline"].items()
        rows = [(step, *(shown(found.get(key, "-")) for key in _STEP)) for step, found in steps]
        parts.append(console.Table(("step", *_STEP), rows).text())
        parts += [f"{step}: FAILED, {found['error']}" for step, found in steps if "error" in found]
    checks = [] if content["smoke"] else verdicts(content)
    if checks:
        parts.append(console.Table(("what", "measured", "limit", "kept"), checks).text())
    return "\n\n".join(parts)


_STEP = ("seconds", "peak_mib", "bytes", "target_bytes", "bytes_below")


def heading(name: str, found: Record) -> str:
    bits = 8 * found["bounds"]["order 0"]["bytes"] / max(found["codes"], 1)
    return (
        f"{name}: {found['codes']:,} codes of {found['model']}, order-0 entropy {bits:.3f} bits; "
        f"{found['reference_bytes']:,} bytes as the compressors get it"
    )


def bound_table(found: Record) -> str:
    rows = []
    for name, b in found["bounds"].items():
        size, side = round(b["bytes"]), round(b["side_bytes"])
        rows.append((name, shown(size), shown(8 * b["bytes"] / found["codes"]), shown(side)))
    return console.Table(
        ("bound of the codes", "bytes", "bits a code", "side information, about"), rows
    ).text()


def contender_table(found: Record) -> str:
    """Tabulate sizes with their ratio to the baseline, and the codes over their best static bound."""
    rows, notes = [], []
    base = found["contenders"].get(BASELINE, {})
    for name, c in found["contenders"].items():
        if "encode_s" not in c:
            why = f"skipped, {c['skipped']}" if "skipped" in c else f"FAILED, {c['error']}"
            notes.append(f"{name}: {why}")
            continue
        rows.append(
            (
                name,
                shown(c.get("bytes", "-")),
                _ratio(c, base, "bytes"),
                shown(c.get("codes_bytes", "-")),
                _ratio(c, base, "codes_bytes"),
                f"{over_bound(found, c['codes_bytes']):+.2f}%" if "codes_bytes" in c else "-",
                f"{c['encode_s']:.3f}",
                f"{c['decode_s']:.3f}",
                f"{c['memory_mib']:.0f}",
            )
        )
    header = ("contender", "bytes", "ratio", "codes", "ratio", "over bound", "encode s", "decode s", "MiB")
    lines = [console.Table(header, rows).text()] if rows else []
    if packed := found["contenders"].get(CONTAINER, {}).get("sections"):
        notes.append("container: " + ", ".join(f"{s} {c} {n:,}" for s, (c, n) in packed.items()))
    return "\n".join([*lines, *notes])


def _ratio(found: Record, base: Record, key: str) -> str:
    return f"{found[key] / base[key]:.4f}" if key in found and key in base else "-"


def over_bound(found: Record, codes_bytes: int) -> float:
    """Return by how many percent the codes exceed the best static bound."""
    return 100 * (codes_bytes / found["bounds"][found["best_bound"]]["bytes"] - 1)


Verdict = tuple[str, str, str, str]


def verdicts(content: Record) -> list[Verdict]:
    """Return (what, measured, limit, "yes" or "NO") for every limit that this run can be compared with."""
    rows: list[Verdict] = []
    for name, found in content["artifacts"].items():
        rows += _codec_verdicts(name, found)
    for step, found in content["pipeline"].items():
        if step in SECONDS and "seconds" in found:
            rows.append(_at_most(f"{step}: seconds", found["seconds"], SECONDS[step]))
            rows.append(_at_most(f"{step}: peak MiB", found["peak_mib"], PEAK_MIB))
        if "bytes_below" in found:
            below = found["bytes_below"]
            kept = "yes" if 0 <= below <= BYTES_BELOW else "NO"
            rows.append((f"{step}: bytes below the target", shown(below), f"0 to {BYTES_BELOW}", kept))
    return rows


def _codec_verdicts(name: str, found: Record) -> list[Verdict]:
    measured = {n: c for n, c in found["contenders"].items() if "encode_s" in c}
    ours, base = measured.get(CONTAINER), measured.get(BASELINE)
    peers = {n: c for n, c in measured.items() if n in PEERS}
    if ours is None or base is None:
        return []
    rows = []
    for key, what in {"bytes": "bytes", "codes_bytes": "bytes of the codes"}.items():
        peer = min((n for n in peers if key in peers[n]), key=lambda n: peers[n][key])
        rows.append(_at_most(f"{name}: {what}, best peer {peer}", ours[key], peers[peer][key]))
    over = over_bound(found, ours["codes_bytes"])
    rows.append(_at_most(f"{name}: codes over the bound '{found['best_bound']}', percent", over, OVER_BOUND))
    if PLAIN_READER in measured:
        seconds = measured[PLAIN_READER]["decode_s"]
        rows.append(_at_most(f"{name}: {PLAIN_READER}, seconds", seconds, PLAIN_READER_SECONDS))
    if name in OF_BASELINE:
        ratio = ours["codes_bytes"] / base["codes_bytes"]
        rows.append(_at_most(f"{name}: codes / {BASELINE}", ratio, OF_BASELINE[name]))
        least = found["bounds"]["oracle"]["bytes"] / base["codes_bytes"]
        rows.append((f"{name}: oracle / {BASELINE}: no coder can be below", shown(least), "-", "-"))
        for key, wanted in {"encode_s": FASTER_ENCODE, "decode_s": FASTER_DECODE}.items():
            faster = base[key] / ours[key]
            kept = "yes" if faster >= wanted else "NO"
            rows.append((f"{name}: times as fast, {key[:-2]}", shown(faster), f"at least {wanted:g}", kept))
    return rows


def _at_most(what: str, value: float, limit: float) -> Verdict:
    return what, shown(value), f"at most {shown(limit)}", "yes" if value <= limit else "NO"


def failures(content: Record) -> list[str]:
    """Return contenders and steps that raised. A missed limit is a result, not a failure."""
    every = [c for found in content["artifacts"].values() for c in found["contenders"].items()]
    return [name for name, found in [*every, *content["pipeline"].items()] if "error" in found]


if __name__ == "__main__":
    sys.exit(main())
