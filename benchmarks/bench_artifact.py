"""The export path beside its peers, in one command and one run: bytes, seconds and memory, with bounds.

    python benchmarks/bench_artifact.py --run runs/small

`codecs`: three artifacts (a trained model, given by --run; PR 1501's size and statistics with equal rows; the
same with rows and columns of different scale), each through general compressors on the layout of PR 1501 and
through our container, beside the entropies that bound every static coder. `pipeline`: GPTQ, packing, loading
and pruning at full size. Each measurement runs in a process of its own, one after another, on this machine's
CPU; keep it quiet. Writes artifact.json, after every measurement, and artifact.txt, the tables printed.

A full run takes most of an hour: zpaq needs minutes there and back for each of the large artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]  # the package need not be installed

import artifact_codecs  # noqa: E402 - after the path is set
import artifact_files  # noqa: E402
import artifact_verdict  # noqa: E402
from synthetic_artifact import synthetic  # noqa: E402

from pgolf_fast.artifact.steps import read_quantized  # noqa: E402
from pgolf_fast.bench.store import provenance  # noqa: E402
from pgolf_fast.config.presets import exp101, tiny  # noqa: E402
from pgolf_fast.config.run_folder import RunFolder  # noqa: E402
from pgolf_fast.config.schema import RunConfig  # noqa: E402
from pgolf_fast.io import write_text  # noqa: E402
from pgolf_fast.lab.analysis.entropy_bounds import static_bounds  # noqa: E402
from pgolf_fast.quant.state import QuantizedState  # noqa: E402

Found = dict[str, Any]
PARTS = ("codecs", "pipeline")
STEPS = ("gptq", "pack", "load", "prune")
SPREADS = {"equal": 0.0, "spread": 0.25}
ARTIFACTS = ("trained", *SPREADS)
TRAIN_ONE = (
    "pgolf train small --data.path DATA/datasets/webmix_sp1024 --out runs/small && pgolf quantize runs/small"
)


@dataclass(frozen=True, eq=False)
class Artifact:
    """What is packed, and the bits that its bank codes need at least, where that is known."""

    name: str
    quantized: QuantizedState
    config: RunConfig
    oracle_bits: float | None = None


def main() -> int:
    arguments = parse()
    results = Results(arguments.out, arguments.smoke)
    with tempfile.TemporaryDirectory() as temporary:
        if "codecs" in arguments.parts:
            for artifact in artifacts(arguments):
                folder = Path(temporary) / artifact.name
                artifact_files.write_artifact(folder, artifact.quantized, artifact.config)
                results.begin(artifact, folder)
                for name in arguments.contenders:
                    results.add_contender(artifact.name, name, child("artifact_codecs.py", name, folder))
        if "pipeline" in arguments.parts:
            folder = Path(temporary) / "pipeline"
            artifact_files.write_config(folder, config_of(arguments))
            for step in STEPS:
                found = child("artifact_pipeline.py", step, folder)
                results.add_step(step, found)
                if "error" in found:  # the next one has nothing to go on from
                    break
    text = artifact_verdict.report_text(results.content)
    print(text)
    results.finish(text)
    return 1 if artifact_verdict.failures(results.content) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run folder of a trained and quantised model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--artifacts", nargs="+", default=list(ARTIFACTS), choices=ARTIFACTS)
    names = artifact_codecs.CONTENDERS
    parser.add_argument("--contenders", nargs="+", default=list(names), choices=names)
    parser.add_argument("--out", type=Path, help="folder; default benchmarks/results, none with --smoke")
    parser.add_argument("--smoke", action="store_true", help="at a toy size: does everything run?")
    arguments = parser.parse_args()
    if arguments.out is None and not arguments.smoke:
        arguments.out = HERE / "results"
    return arguments


def artifacts(arguments: argparse.Namespace) -> Iterator[Artifact]:
    if "trained" in arguments.artifacts:
        if arguments.run is None:
            say(f"trained model: skipped, because --run is not given; to make one: {TRAIN_ONE}")
        else:
            run = RunFolder(arguments.run)
            yield Artifact("trained", read_quantized(run)[0], run.read_config())
    config = config_of(arguments)
    for name, spread in SPREADS.items():
        if name in arguments.artifacts:
            made = synthetic(config.model, spread=spread)
            yield Artifact(name, made.quantized, config, made.oracle_bits)


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """What is made up: exp101, or something that takes seconds."""
    if not arguments.smoke:
        return exp101()
    base = tiny()
    model = replace(base.model, num_layers=2, ve_layers=(1,), frozen_skips=0)
    return replace(base, name="smoke", model=model, quant=exp101().quant)


def child(script: str, *words: object) -> Found:
    """What the script found, {"skipped": why} or {"error": its last line}."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]}
    found: Found = json.loads(done.stdout.splitlines()[-1])
    return found


class Results:
    """The JSON file: rewritten, whole, after every measurement."""

    def __init__(self, folder: Path | None, smoke: bool):
        self.folder = folder
        machine = {**provenance(), "cores": os.cpu_count(), "peers": artifact_codecs.versions()}
        self.content: Found = {**machine, "smoke": smoke, "artifacts": {}, "pipeline": {}}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def begin(self, artifact: Artifact, folder: Path) -> None:
        matrices = [matrix.codes.numpy() for matrix in artifact.quantized.matrices().values()]
        found = static_bounds(matrices)
        bounds = {name: asdict(bound) for name, bound in found.items()}
        if artifact.oracle_bits is not None:
            bounds["oracle"] = {"bytes": artifact.oracle_bits / 8, "side_bytes": 0.0}
        self.content["artifacts"][artifact.name] = {
            "model": artifact.config.name,
            "codes": sum(m.size for m in matrices),
            "reference_bytes": (folder / artifact_files.REFERENCE).stat().st_size,
            "bounds": bounds,
            "best_bound": min(found, key=lambda name: found[name].bytes),
            "contenders": {},
        }

    def add_contender(self, artifact: str, name: str, found: Found) -> None:
        self.content["artifacts"][artifact]["contenders"][name] = found
        self._note(f"{artifact}, {name}", found)

    def add_step(self, step: str, found: Found) -> None:
        self.content["pipeline"][step] = found
        self._note(step, found)

    def finish(self, text: str) -> None:
        if self.folder is not None:
            write_text(self.folder / "artifact.txt", text + "\n")

    def _note(self, what: str, found: Found) -> None:
        say(f"{what}: " + ", ".join(f"{key} {artifact_verdict.shown(value)}" for key, value in found.items()))
        if self.folder is not None:
            write_text(self.folder / "artifact.json", json.dumps(self.content, indent=1) + "\n")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
