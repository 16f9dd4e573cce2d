"""What each `pgolf` command does. Printing results is the command line's part; the rooms do the work."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from pgolf_fast import console
from pgolf_fast.cli.arguments import existing, first_run, parse, preset_and_overrides
from pgolf_fast.cli.output import print_out
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import PRESETS, preset
from pgolf_fast.config.schema import Codec, PackConfig, QuantConfig, RunConfig
from pgolf_fast.errors import PgolfError

_Flat = tyro.conf.arg(name="")
Size = Literal["tiny", "small"]


@dataclass(frozen=True)
class _Train:
    config: Annotated[RunConfig, _Flat]
    out: Path | None = None
    """Run folder; default runs/PRESET."""
    resume: bool = False
    """Continue the run in that folder from its newest checkpoint."""
    track: Literal["wandb", "tensorboard"] | None = None
    """Send metrics there too; metrics.jsonl is always written."""
    shrink: Size | None = None
    """Train the preset at that size, under the name PRESET_SIZE; settings change it from there."""


def train(argv: list[str]) -> int:
    """pgolf train PRESET [--shrink SIZE] [--out RUN] [--resume] [--track NAME] [--group.field value ...]"""
    config, rest = preset_and_overrides(argv)
    arguments = parse("train PRESET", _Train, rest, _Train(config))
    from pgolf_fast.train.loop import train as run_training

    out = arguments.out or Path("runs") / arguments.config.name
    result = run_training(arguments.config, out, resume=arguments.resume, track=arguments.track)
    if not result.is_main:
        return 0
    rate = result.tokens / result.seconds if result.seconds else 0.0
    rows = [
        ("steps", f"{result.steps:,}"),
        ("tokens", f"{result.tokens:,}"),
        ("tokens/s", f"{rate:,.0f}"),
        ("training time", console.duration(result.seconds)),
        ("bpb, after Reptile" if result.keeps_raw else "bpb, raw weights", f"{result.raw.bpb:.4f}"),
        ("bpb, averaged weights", f"{result.averaged.bpb:.4f}"),
        ("run folder", str(result.folder.path)),
    ]
    print_out(console.table(rows))
    return 0


@dataclass(frozen=True)
class _Import:
    config: Annotated[RunConfig, _Flat]
    out: Path | None = None
    """Run folder; default runs/NAME of the weights file."""


def import_(argv: list[str]) -> int:
    """pgolf import FILE PRESET --data.path DIR [--out RUN] [--group.field value ...]"""
    if argv and argv[0] in ("-h", "--help"):
        parse("import FILE PRESET", _Import, argv, _Import(preset("exp101")))
    if len(argv) < 2 or argv[0].startswith("-"):
        raise PgolfError("give a weights file (.pt or .safetensors) and the preset it was trained as")
    from pgolf_fast.config.run_folder import RunFolder
    from pgolf_fast.train.importing import import_weights

    weights = existing(Path(argv[0]), "weights file")
    config, rest = preset_and_overrides(argv[1:])
    arguments = parse("import FILE PRESET", _Import, rest, _Import(config))
    folder = RunFolder(arguments.out or Path("runs") / weights.stem)
    import_weights(weights, arguments.config, folder)
    print_out(f"wrote {folder.model_file}; go on with `pgolf quantize {folder.path}`")
    return 0


@dataclass(frozen=True)
class _Quantize:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantisation settings; default: the run's."""
    grid: Literal["reference", "percentile", "rd"] | None = None
    """Short for --quant.grid."""
    target_bytes: int | None = None
    """Short for --quant.target-bytes."""


def quantize(argv: list[str]) -> int:
    """pgolf quantize RUN [--grid reference|percentile|rd] [--target-bytes N] [--quant.field value ...]"""
    from dataclasses import replace

    from pgolf_fast.artifact.steps import quantize_run
    from pgolf_fast.config.run_folder import RunFolder

    folder = first_run(argv, RunFolder)
    arguments = parse("quantize", _Quantize, argv, _Quantize(folder.path, folder.read_config().quant))
    console.setup_logging(folder.log_file)
    quant = arguments.quant
    if arguments.grid is not None:
        quant = replace(quant, grid=arguments.grid)
    if arguments.target_bytes is not None:
        quant = replace(quant, target_bytes=arguments.target_bytes)
    counts = quantize_run(folder, quant)
    print_out(console.table([(what, f"{count:,}") for what, count in counts.items()]))
    print_out(f"wrote {folder.quantized_file}")
    return 0


@dataclass(frozen=True)
class _Pack:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    pack: PackConfig = field(default_factory=PackConfig)
    """Artifact settings; default: the run's."""
    table: bool = False
    """Also print bytes by section and tensor, entropy bounds, and what every codec makes of the artifact."""
    measure: tuple[Codec, ...] = get_args(Codec)
    """Codecs that --table measures, if installed; at full size lzma, zstd and brotli take a minute each."""
    json: Path | None = None
    """File for the table as JSON."""
    treemap: Path | None = None
    """PNG file for a treemap of the bytes."""


def pack(argv: list[str]) -> int:
    """pgolf pack RUN [--table] [--json FILE] [--treemap FILE.png] [--pack.field value ...]"""
    from pgolf_fast.artifact.steps import pack_run
    from pgolf_fast.config.run_folder import RunFolder

    folder = first_run(argv, RunFolder)
    arguments = parse("pack", _Pack, argv, _Pack(folder.path, folder.read_config().pack))
    console.setup_logging(folder.log_file)
    packed = pack_run(folder, arguments.pack)
    print_out(packed.table().text())
    print_out(f"wrote {packed.path}")
    if arguments.table or arguments.json or arguments.treemap:
        _show_bytes(packed.path, arguments)
    return 0


def _show_bytes(path: Path, arguments: _Pack) -> None:
    from pgolf_fast.io import write_text
    from pgolf_fast.lab.analysis.artifact_bytes import artifact_table
    from pgolf_fast.lab.report.treemap import plot_treemap

    found = artifact_table(path, arguments.measure if arguments.table or arguments.json else ())
    if arguments.table:
        print_out("\n" + found.text())
    if arguments.json is not None:
        write_text(arguments.json, json.dumps(found.to_dict(), indent=1) + "\n")
        print_out(f"wrote {arguments.json}")
    if arguments.treemap is not None:
        plot_treemap(found, arguments.treemap)
        print_out(f"wrote {arguments.treemap}")


def eval(argv: list[str]) -> int:
    """pgolf eval RUN [--weights artifact|float] [--figures] [--estimate] [--allow-illegal] [...]"""
    from pgolf_fast.cli.evaluate import evaluate

    return evaluate(argv)


def seeds(argv: list[str]) -> int:
    """pgolf seeds RUN RUN ... [--against RUN RUN ...] [--margin NATS]"""
    from pgolf_fast.cli.evaluate import seeds as compare

    return compare(argv)


def ablate(argv: list[str]) -> int:
    """pgolf ablate PRESET --flip FIELD=VALUE ... [--flip ...] [--seeds N ...] [--budget steps|time|both]"""
    from pgolf_fast.cli.ablate import ablate as run

    return run(argv)


def audit(argv: list[str]) -> int:
    """pgolf audit RUN_OR_ARTIFACT [--tokens N] [--only C1 C2 ...] [--json FILE] [--ttt.field value]"""
    from pgolf_fast.cli.audit import audit as run

    return run(argv)


def report_(argv: list[str]) -> int:
    """pgolf report RUN [--out FILE.html] [--audit]"""
    from pgolf_fast.cli.report import report_run

    return report_run(argv)


def analyze(argv: list[str]) -> int:
    """pgolf analyze A [B ...] [--only deltas quant ...] [--out DIR] [--data.path DIR] [--tokens N]"""
    from pgolf_fast.cli.analyze import analyze as run

    return run(argv)


def ttt_sweep(argv: list[str]) -> int:
    """pgolf ttt-sweep RUN [--adapters NAME ...] [--stride N] [--tokens N] [--after N] [--allow-illegal]"""
    from pgolf_fast.cli.ttt_sweep import sweep

    return sweep(argv)


@dataclass(frozen=True)
class _Submit:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, packed and scored."""
    out: Path | None = None
    """Folder to write; default RUN/submission."""
    author: str = "your name"
    """Who submits it."""
    github_id: str = "your-github-id"
    """That person's account."""
    name: str | None = None
    """Title; default: the preset's name."""
    blurb: str | None = None
    """What it is in a sentence or two; default: made from the configuration."""
    track: str = "non_record_16mb"
    """The track it is for."""
    readable: bool = False
    """Write the script's readable source, and count that."""


def submit(argv: list[str]) -> int:
    """pgolf submit RUN [--out DIR] [--author NAME] [--github-id ID] [--name TITLE] [--readable]"""
    from pgolf_fast.artifact.submit import About, write_submission
    from pgolf_fast.config.run_folder import RunFolder

    arguments = parse("submit", _Submit, argv)
    folder = RunFolder(existing(arguments.run, "run folder"))
    out = arguments.out or folder.path / "submission"
    a = arguments
    about = About(a.author, a.github_id, a.name, a.blurb, a.track)
    written = write_submission(folder, out, about, readable=a.readable)
    print_out(console.table([(what, f"{size:,}") for what, size in written.items()], ("part", "bytes")))
    print_out(f"wrote {out}")
    return 0


@dataclass(frozen=True)
class _Generate:
    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    prompt: str = ""
    """Text to continue; empty starts a document."""
    tokens: int = 200
    """Tokens to write."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the most likely token."""
    seed: int = 0
    """Seed of the sampling."""


def generate(argv: list[str]) -> int:
    """pgolf generate RUN --prompt TEXT [--tokens N] [--temperature T] [--seed S]"""
    from pgolf_fast.config.run_folder import RunFolder
    from pgolf_fast.evaluation.steps import continue_text

    arguments = parse("generate", _Generate, argv)
    if arguments.tokens < 1:
        raise PgolfError(f"--tokens is {arguments.tokens}; it must be at least 1")
    if arguments.temperature < 0:
        raise PgolfError(f"--temperature is {arguments.temperature}; it must not be negative")
    folder = RunFolder(existing(arguments.run, "run folder"))
    print_out(
        continue_text(
            folder, arguments.prompt, arguments.tokens, temperature=arguments.temperature, seed=arguments.seed
        )
    )
    return 0


@dataclass(frozen=True)
class _Config:
    config: Annotated[RunConfig, _Flat]
    diff: str | None = None
    """Print only what differs from this other preset."""
    shrink: Size | None = None
    """Print the preset at that size."""


@dataclass(frozen=True)
class _FromEnv:
    from_env: Path
    """Run script with the community's environment variables."""
    base: str = "exp101_as_run"
    """Preset the variables change."""


def config(argv: list[str]) -> int:
    """pgolf config PRESET [--shrink SIZE] [--diff OTHER] [--group.field value ...], or --from-env run.sh"""
    if any(word.split("=")[0] in ("--from-env", "--from_env") for word in argv):
        return _from_env(parse("config", _FromEnv, argv))
    if not argv:
        presets = [(name, make(), (make.__doc__ or "").strip()) for name, make in PRESETS.items()]
        lines = [(name, f"{made.model.num_parameters():,}", what) for name, made, what in presets]
        print_out(console.table(lines, ("preset", "parameters", "what it is")))
        return 0
    base, rest = preset_and_overrides(argv)
    arguments = parse("config PRESET", _Config, rest, _Config(base))
    if arguments.diff is not None:
        _print_difference(arguments.config, preset(arguments.diff))
        return 0
    rows = [(name, _shown(value)) for name, value in flatten(arguments.config)]
    print_out(console.table([*rows, ("parameters", f"{arguments.config.model.num_parameters():,}")]))
    return 0


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print_difference(ours: RunConfig, theirs: RunConfig) -> None:
    left, right = dict(flatten(ours)), dict(flatten(theirs))
    left["parameters"], right["parameters"] = ours.model.num_parameters(), theirs.model.num_parameters()
    rows = [
        (name, _shown(left.get(name)), _shown(right.get(name)))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name) and name != "name"
    ]
    if rows:
        print_out(console.table(rows, ("field", ours.name, theirs.name)))
    else:
        print_out(f"{ours.name} and {theirs.name} do not differ")


def _from_env(arguments: _FromEnv) -> int:
    from pgolf_fast.config.env import translate

    script = existing(arguments.from_env, "run script").read_text(encoding="utf-8")
    base = preset(arguments.base)
    found = translate(script, base)
    rows = [(name, target) for name, target in sorted(found.used.items())]
    print_out(console.table(rows, ("variable", "field")) if rows else "no known variables")
    print_out(f"\nwhat they change in {base.name}:")
    _print_difference(found.config, base)
    if found.unknown:
        print_out(
            f"\nunknown, not translated: {', '.join(f'{n}={v}' for n, v in sorted(found.unknown.items()))}"
        )
    return 0


@dataclass(frozen=True)
class _Demo:
    seconds: float = 100.0
    """Training time; quantising and scoring come on top."""
    out: Path = Path("runs/demo")
    """Run folder; an earlier demo there is replaced."""
    seed: int = 42
    """Seed of the weights."""


def demo(argv: list[str]) -> int:
    """pgolf demo [--seconds S] [--out RUN]"""
    arguments = parse("demo", _Demo, argv)
    if arguments.seconds <= 0:
        raise PgolfError(f"--seconds is {arguments.seconds}; it must be positive")
    from pgolf_fast.cli.demo import run_demo

    print_out(run_demo(arguments.out, seconds=arguments.seconds, seed=arguments.seed))
    return 0


def doctor(argv: list[str]) -> int:
    """pgolf doctor [--check] [--table]"""
    from pgolf_fast.bench.doctor import Doctor, examine

    arguments = parse("doctor", Doctor, argv)
    text, healthy = examine(check=arguments.check, table=arguments.table)
    print_out(text)
    return 0 if healthy else 1


@dataclass(frozen=True)
class _Aot:
    presets: tyro.conf.Positional[tuple[str, ...]] = ("exp101", "exp101_swiglu")
    """Presets whose shapes are compiled."""
    arch: tuple[int, ...] = (80, 90, 100)
    """Compute capabilities: 80 (A100), 86, 89, 90 (H100, H200), 100 (B200), 120."""
    out: Path | None = None
    """JSON file for the table."""


def aot(argv: list[str]) -> int:
    """pgolf aot [PRESET ...] [--arch 80 90 100] [--out FILE.json]"""
    arguments = parse("aot", _Aot, argv)
    from pgolf_fast.bench import aot as bench

    rows, misfits = bench.compile_presets(arguments.presets, arguments.arch)
    print_out(bench.table(rows))
    wrong = [*misfits, *bench.problems(rows)]
    if arguments.out is not None:
        bench.write(arguments.out, rows, arguments.presets)
        print_out(f"wrote {arguments.out}")
    for name in bench.unreached(rows):
        print_out(f"{name}: not launched at these shapes")
    for line in wrong:
        print_out(line)
    return 1 if wrong else 0


def bench(argv: list[str]) -> int:
    """pgolf bench [--preset P] [--ops ...] [--out FILE.jsonl] | --compare A B | --records FILE"""
    from pgolf_fast.cli import bench as bench_commands

    arguments = parse("bench", bench_commands.Bench, argv)
    console.setup_logging()
    text, status = bench_commands.bench(arguments)
    print_out(text)
    return status


def tune(argv: list[str]) -> int:
    """pgolf tune [--preset P] [--ops ...] [--kernels ...] [--minutes M]"""
    from pgolf_fast.cli import bench as bench_commands

    arguments = parse("tune", bench_commands.Tune, argv)
    console.setup_logging()
    text, status = bench_commands.tune_kernels(arguments)
    print_out(text)
    return status


def data(argv: list[str]) -> int:
    """pgolf data info|tokenize|download ..."""
    from pgolf_fast.cli import data as data_commands

    names = ("info", "tokenize", "download")
    if not argv or argv[0] not in names:
        raise PgolfError(f"pgolf data needs one of {', '.join(names)}; for example `pgolf data info DIR`")
    return getattr(data_commands, argv[0])(argv[1:])
