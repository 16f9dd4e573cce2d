"""Commands from text to a submission: demo, train, import, quantize, pack, eval, submit, generate, ..."""

import contextlib
import itertools
import json
import math
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

import tyro
from tyro.conf import Positional, arg

from pgolf_fast import console
from pgolf_fast.cli import options
from pgolf_fast.cli.commands import COMMANDS, GROUPS
from pgolf_fast.cli.options import AllFields, AnyPreset, Fields, Preset, Run, RunOrFile, Shards, Size, Words
from pgolf_fast.config.fields import field_type, flatten, flip
from pgolf_fast.config.presets import PRESETS, is_preset, preset
from pgolf_fast.config.run_folder import RunFolder, Weights, read_scores
from pgolf_fast.config.schema import Codec, RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import need_writable, write_text

_QUANT_FIELDS = (
    *("quant.percentiles", "quant.block_size", "quant.damping", "quant.small_tensor", "quant.lqer_group"),
    *("quant.mlp_sigmas", "quant.attention_sigmas", "quant.table_sigmas", "quant.table_bits"),
    *("quant.calibration_batch", "quant.temperature"),
)
_COPY = "Copy the run, without its checkpoints, to this folder and write there, not into the run."
OutCopy = Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="", help=_COPY)]
TTT_FIELDS = ("ttt.*", "ttt.lora.*", "ttt.guided.*")
_NEED = {  # fields that have an effect only if another field has one of these values
    r"quant\.target_bytes": ("quant.grid", ("rd",)),
    r"quant\.rank": ("quant.grid", ("rd", "sdclip")),
    r"quant\.(\w+_sigmas|table_bits|lqer_\w+|protect_group)": ("quant.grid", ("sdclip",)),
    r"quant\.(bits|small_tensor)": ("quant.grid", ("percentile", "reference", "sdclip")),
    r"quant\.percentiles": ("quant.grid", ("percentile", "reference")),
    r"quant\.(block_size|damping|temperature|seed|calibration\w*)": ("quant.method", ("gptq",)),
    r"pack\.lzma_\w+": ("pack.codecs", ("lzma", "rans")),
}


@contextlib.contextmanager
def results_in(
    run: Path, out: Path | None, words: Words, shards: Shards | None = None, world: Any = None
) -> Iterator[tuple[RunFolder, RunConfig]]:
    """Yield the locked run folder for results and log lines, and its configuration with `words` set.

    It is the run itself or, with `out`, a copy of it there. With `shards`, `run` may be an artifact file,
    whose run folder is created in `out` or in a temporary folder. Only the main rank copies, locks and logs.
    """
    with contextlib.ExitStack() as stack:
        main, alone = world is None or world.is_main, shards is not None and run.is_file()
        place = out or (Path(stack.enter_context(tempfile.TemporaryDirectory())) if alone else run)
        if main or (alone and out is None):
            need_writable(place)
            if alone and shards is not None:
                from pgolf_fast.artifact.load import artifact_run, stored_config

                config = stored_config(run, shards.data)
                flip(config, words)  # fail before a folder is created
                artifact_run(run, flip(config, shards.words), place)
            elif out is not None:
                options.run_folder(run, words)[0].copy_to(out)
        if world is not None:
            world.barrier()
        folder, config = options.run_folder(place, words)
        if main:
            stack.enter_context(folder.lock())
        console.setup_logging(folder.log_file if main else None, quiet=not main)
        stack.callback(console.setup_logging)  # later lines do not belong in the run's log
        yield folder, config


@dataclass(frozen=True)
class Demo:
    seconds: float = 70.0  # Training time in seconds; quantizing and scoring take extra.
    out: Path = Path("runs/demo")  # Run folder; an earlier demo there is replaced.
    seed: int = 42  # Seed of the weights.

    def main(self) -> None:
        if self.seconds <= 0:
            raise PgolfError(f"--seconds is {self.seconds}; it must be positive")
        from pgolf_fast.cli.demo import run_demo

        print(run_demo(self.out, seconds=self.seconds, seed=self.seed))


@dataclass(frozen=True)
class Train:
    fields: AllFields
    # Configuration to start from; `pgolf config` lists the presets. With --resume, also a run folder.
    preset: AnyPreset = ""
    out: Path | None = None  # Run folder; default: runs/PRESET.
    resume: bool = False  # Continue the run from its newest checkpoint; `pgolf train --resume RUN` suffices.
    track: Literal["wandb", "tensorboard"] | None = None  # Send metrics there as well as to metrics.jsonl.
    # Train the preset at this size, under the name PRESET_SIZE; other options change it from there.
    shrink: Size | None = None

    def main(self) -> int:
        from pgolf_fast.train.interrupt import Interrupted
        from pgolf_fast.train.loop import train

        out, config = self._run_and_settings()
        try:
            result = train(config, out, resume=self.resume, track=self.track)
        except Interrupted as stop:  # the last line of the log says what is kept
            return stop.status
        if result.is_main:
            print(result)
        return 0

    def _run_and_settings(self) -> tuple[Path, RunConfig]:
        """Return the run folder and its configuration: that of the preset, or the resumed run's own."""
        run = self.out if self.preset == "" else Path(self.preset)
        if self.resume and run is not None and not is_preset(self.preset):
            if self.shrink is not None or self.out not in (None, run):
                raise PgolfError(f"--resume {run} takes no --shrink and no other --out: leave them out")
            return run, options.run_folder(run, self.fields)[1]
        if self.preset == "":
            raise PgolfError(f"train needs PRESET: for example `{COMMANDS['train'].example}`")
        config = options.preset_with(self.preset, self.shrink, self.fields)
        return self.out or Path("runs", config.name), config


@dataclass(frozen=True)
class Import:
    # Weights in safetensors or torch.save format, detected by content; no pickled code is run.
    weights: Annotated[Path, Positional, arg(metavar="FILE")]
    preset: Preset  # Preset that the weights were trained with.
    fields: AllFields
    out: Path | None = None  # Run folder; default: runs/ plus the name of the weights file.
    shrink: Size | None = None  # Size of the preset, if the weights are of a shrunken one.
    key: str | None = None  # Weights to take if the file holds several, for example ema.

    def main(self) -> None:
        from pgolf_fast.train.checkpoint import import_weights

        weights = options.existing(self.weights, "weights file")
        config = options.preset_with(self.preset, self.shrink, self.fields)
        folder = RunFolder(self.out or Path("runs", weights.stem))
        import_weights(weights, config, folder, self.key)
        print(f"wrote {folder.model_file}; continue with `{console.command('quantize', folder.path)}`")


@dataclass(frozen=True)
class Quantize:
    run: Run  # Run folder.
    fields: Annotated[Words, Fields(("quant",), brief=_QUANT_FIELDS)]
    grid: Literal["reference", "percentile", "sdclip", "rd"] | None = None  # Short for --quant.grid.
    target_bytes: int | None = None  # Short for --quant.target-bytes.
    # Also score this many validation tokens with the weights before and after, on non-overlapping windows.
    score: int | None = None
    out: OutCopy = None

    def main(self) -> None:
        from pgolf_fast.artifact.pack import quantize_run
        from pgolf_fast.evaluation.run import quick_score

        short = options.given({"quant.grid": self.grid, "quant.target_bytes": self.target_bytes})
        words = (*self.fields, *short)
        _refuse_unused(words, options.run_folder(self.run, words)[1])
        with results_in(self.run, self.out, words) as (folder, config):
            before = None if self.score is None else quick_score(folder, config, self.score)
            print(quantize_run(folder, config.quant))
            if self.score is not None and before is not None:
                after = quick_score(folder, config, self.score, quantized=True)
                print(f"\nbpb on {before.tokens:,} tokens: {before.bpb:.4f} before, {after.bpb:.4f} after")
        options.wrote(folder.quantized_file)


def _refuse_unused(words: Words, config: RunConfig) -> None:
    """Raise PgolfError for an option that has no effect in the configuration."""
    chosen = dict(flatten(config))
    for word, (pattern, (field, choices)) in itertools.product(words, _NEED.items()):
        name, _, value = word.partition("=")
        used = any(choice in str(chosen[field]) for choice in choices)
        if re.fullmatch(pattern, name) and value != "none" and not used:
            needed = f"--{field} {' or '.join(choices)}"
            raise PgolfError(f"--{name.replace('_', '-')} has no effect: it needs {needed}")


@dataclass(frozen=True)
class Pack:
    run: Run  # Run folder, quantized.
    fields: Annotated[Words, Fields(("pack",))]
    # Also print bytes by section and tensor, entropy bounds, and the artifact's size under every codec.
    table: bool = False
    # Codecs that --table measures, if installed; at full size lzma, zstd and brotli take a minute each.
    measure: tuple[Codec, ...] = get_args(Codec)
    json: Path | None = None  # File for the table as JSON.
    treemap: Path | None = None  # PNG file for a treemap of the bytes.
    out: OutCopy = None

    def main(self) -> None:
        from pgolf_fast.artifact.pack import pack_run

        _refuse_unused(self.fields, options.run_folder(self.run, self.fields)[1])
        with results_in(self.run, self.out, self.fields) as (folder, config):
            packed = pack_run(folder, config.pack)
        print(packed)
        options.wrote(packed.path)
        if not (self.table or self.json or self.treemap):
            return
        from pgolf_fast.lab.analysis.artifact_bytes import artifact_table
        from pgolf_fast.lab.report.plots import plot_treemap

        table = artifact_table(packed.path, self.measure if self.table or self.json else ())
        if self.table:
            print("\n" + table.text())
        if self.json is not None:
            write_text(self.json, json.dumps(table.to_dict(), indent=1) + "\n")
        if self.treemap is not None:
            plot_treemap(table, self.treemap)
        options.wrote(self.json, self.treemap)


@dataclass(frozen=True)
class Eval(Shards):
    run: RunOrFile  # Run folder or artifact file; with --estimate, also a preset.
    fields: Annotated[Words, Fields(("eval", "ttt", "kernels"), brief=TTT_FIELDS)]
    # Weights to score: the artifact, with float banks or with its 6-bit codes (packed: less memory, the same
    # scores), or the float ones before quantization.
    weights: Weights = "artifact"
    figures: bool = False  # Print all tables, not just the one by token class.
    estimate: bool = False  # Print the amount of work and how long it would take here, without scoring.
    allow_illegal: bool = False  # Also score test-time training that breaks the rules, labeled ILLEGAL.
    out: OutCopy = None

    def main(self) -> None:
        words, name = (*self.fields, *self.words), str(self.run)
        if self.estimate and is_preset(name) and not self.run.exists():
            self._estimate(None, flip(preset(name), words))
        elif self.estimate:
            self._estimate(*options.run_folder(self.run, words))
        else:
            self._score(words)

    def _score(self, words: Words) -> None:
        if not self.run.is_file():
            options.run_folder(self.run, words)  # refuse before PyTorch is imported, which takes 2 s
        from pgolf_fast.distributed import join_world
        from pgolf_fast.evaluation.figures import tables
        from pgolf_fast.evaluation.run import score_run
        from pgolf_fast.lab.report.plots import draw_scores

        if self.run.is_file() and self.weights == "float":
            raise PgolfError(f"{self.run} is a file: float weights are scored in a run folder")
        written: tuple[Path | None, ...] = ()
        with join_world() as world, results_in(self.run, self.out, words, self, world) as (folder, config):
            scores = score_run(folder, config, self.weights, world, allow_illegal=self.allow_illegal)
            if not world.is_main:
                return
            path = folder.scores_file(self.weights)
            content = read_scores(path)
            if self.out or self.run.is_dir():
                written = path, draw_scores(content, path.with_suffix(".png"))
        print(scores.table())
        if scores.illegal:
            print(f"\nThe third score BREAKS THE RULES of the challenge: {scores.illegal}.")
        for table in tables(content["figures"], every=self.figures, illegal=scores.illegal):
            print(f"\n{table}")
        print()
        options.wrote(*written)

    def _estimate(self, folder: RunFolder | None, config: RunConfig) -> None:
        from pgolf_fast.evaluation.run import estimate_run
        from pgolf_fast.evaluation.scores import TTT, labeled

        start = time.perf_counter()
        estimates, source = estimate_run(folder, config, self.weights)
        header = ("estimate", "windows", "scored targets", "updates", "TFLOP", "time")
        rows = []
        for e in estimates:
            name = labeled(e.name, e.name == TTT and config.ttt.illegal)
            counts = (f"{count:,}" for count in (e.windows, e.tokens, e.updates))
            rows.append((name, *counts, f"{e.flops / 1e12:,.2f}", console.duration(e.seconds)))
        print(console.Table(header, rows))
        taken = console.duration(time.perf_counter() - start)
        total = console.duration(sum(e.seconds for e in estimates))
        print(f"\nabout {total} in total on this machine, measured with {source}; the estimate took {taken}")
        if not estimates[-1].updates:
            last = f"{estimates[-1].tokens:,} targets and chunks of {config.ttt.chunk_tokens:,}"
            print(f"Test-time training learns nothing here: with {last}, no chunk follows the first one.")


@dataclass(frozen=True)
class Submit:
    run: Run  # Run folder, packed and scored.
    out: Path | None = None  # Folder to write; default: RUN/submission.
    author: str = "your name"  # Author of the submission.
    github_id: str = "your-github-id"  # GitHub handle of the author.
    name: str | None = None  # Title; default: the preset's name.
    blurb: str | None = None  # One or two sentences about it; default: made from the configuration.
    track: str = "non_record_16mb"  # Track to submit to.
    readable: bool = False  # Write the script as readable source instead of compressed, and count its bytes.

    def main(self) -> None:
        from pgolf_fast.artifact.submission import About, write_submission

        folder, _ = options.run_folder(self.run)
        out = self.out or folder.path / "submission"
        about = About(self.author, self.github_id, self.name, self.blurb, self.track)
        written = write_submission(folder, out, about, readable=self.readable)
        print(console.Table(("part", "bytes"), [(part, f"{size:,}") for part, size in written.items()]))
        options.wrote(out)


@dataclass(frozen=True)
class Generate:
    run: RunOrFile  # Run folder, or artifact file.
    prompt: str = ""  # Text to continue; an empty prompt starts a document.
    tokens: int = 200  # Tokens to generate.
    temperature: float = 0.8  # Sampling temperature; 0 takes the most likely token.
    seed: int = 0  # Sampling seed.
    tokenizer: Path | None = None  # Tokenizer; default: that of the run, or next to the artifact.

    def main(self) -> None:
        from pgolf_fast.artifact.load import generate, load

        if self.tokens < 1:
            raise PgolfError(f"--tokens is {self.tokens}; it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise PgolfError(f"--temperature is {self.temperature}; it must be finite and not negative")
        run = options.existing(self.run, "run folder or artifact")
        loaded = load(run, tokenizer=self.tokenizer, packed=True)
        print(generate(loaded, self.prompt, self.tokens, temperature=self.temperature, seed=self.seed))


@dataclass(frozen=True)
class Config:
    fields: AllFields
    preset: AnyPreset = ""  # Preset to print; without one, all presets are listed.
    diff: str | None = None  # Print only the fields that differ from this preset.
    shrink: Size | None = None  # Print the preset at this size.
    from_env: Path | None = None  # Translate the environment variables of a run script; it is not executed.
    # With --from-env: the preset to change, which PRESET also sets; default: exp101_as_run.
    base: str | None = None
    command: int | None = None  # With --from-env: the command to translate, if a script has several.

    def main(self) -> None:
        changes = self.fields or self.diff or self.shrink
        if self.from_env is not None:
            if changes or (self.preset and self.base not in (None, self.preset)):
                takes = "takes one preset, --command and no other option"
                raise PgolfError(f"--from-env {takes}: leave the rest out")
            base = preset(self.preset or self.base or "exp101_as_run")
            _print_translation(options.existing(self.from_env, "run script"), base, self.command)
        elif self.base is not None or self.command is not None:
            option = "--base" if self.base is not None else "--command"
            raise PgolfError(f"{option} is for --from-env; name the preset itself: pgolf config PRESET")
        elif self.preset:
            config = options.preset_with(self.preset, self.shrink, self.fields)
            if self.diff is not None:
                print(_difference(config, preset(self.diff)))
            else:
                parameters = ("parameters", f"{config.model.num_parameters():,}")
                print(console.Table(None, [*_shown(config).items(), parameters]))
        elif changes:
            raise PgolfError("config needs a preset, for example exp101; `pgolf config` lists them")
        else:
            rows = [(n, f"{f().model.num_parameters():,}", f.__doc__ or "") for n, f in PRESETS.items()]
            print(console.Table(("preset", "parameters", "description"), rows))


def _shown(config: RunConfig) -> dict[str, str]:
    """Return every field as text that the command line takes back: true, 0.5, none."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flatten(config)}
    return {name: "none" if text == "null" else text for name, text in texts.items()}


def _difference(ours: RunConfig, theirs: RunConfig) -> str:
    """Return a table of the fields in which two configurations differ."""
    left, right = ({**_shown(c), "parameters": str(c.model.num_parameters())} for c in (ours, theirs))
    rows = [(name, left.get(name, "none"), right.get(name, "none")) for name in {**left, **right}]
    rows = [(name, old, new) for name, old, new in rows if old != new and name != "name"]
    if not rows:
        return f"{ours.name} and {theirs.name} do not differ"
    return console.Table(("field", ours.name, theirs.name), rows).text()


def _print_translation(path: Path, base: RunConfig, number: int | None) -> None:
    from pgolf_fast.cli.run_script import is_secret, read_script
    from pgolf_fast.config.env import FIELDS, translate

    script = read_script(path)
    chosen = script.choose(number)
    left_out, texts = {}, {}
    for name, word in chosen.known.items():
        if is_secret(chosen, name):
            left_out[name] = "its value looks like a credential"
        elif word.why:
            left_out[name] = f"it is not constant: {word.why}"
        else:
            texts[name] = word.text
    translation = translate(texts, base)
    left_out |= translation.refused
    rows = [(n, field, texts[n], chosen.known[n].note) for n, field in translation.used.items()]
    if rows:
        print(console.Table(("variable", "field", "value", "note"), rows))
        print(f"\nchanges to {base.name}:")
        print(_difference(base, replace(translation.config, name=path.name)))
    if left_out:
        kept = {**_shown(base), **_shown(translation.config)}
        names = {n: f"{n}={texts[n]}" if n in texts else n for n in left_out}
        lost = [(names[n], FIELDS[n], kept.get(FIELDS[n], "none"), why) for n, why in left_out.items()]
        print("\nleft out; set the field yourself if the run needs it:")
        print(console.Table(("variable", "field", "stays", "because"), lost))
    if lines := [*translation.adjusted, *script.lines(chosen)]:
        print("\n" + "\n".join(lines))
    if not rows:
        raise PgolfError(f"no variable of {path} could be translated: `pgolf train --help` lists the fields")
    print(f"\n{_train_command(base, translation.config)}")


def _train_command(base: RunConfig, config: RunConfig) -> str:
    """Return the shell command that trains `config`, given as changes to `base`."""
    words, theirs = ["pgolf", "train", base.name], dict(flatten(base))
    for name, value in flatten(config):
        group, _, last = name.replace("_", "-").rpartition(".")
        if name == "name" or (name in theirs and theirs[name] == value):
            continue
        if field_type(RunConfig, name) is bool:
            words.append(f"--{group}.{'' if value else 'no-'}{last}")
        elif isinstance(value, tuple):
            words += [f"--{group}.{last}", *map(str, value)]
        else:
            text = "none" if value is None else str(value)
            words += [f"--{group}.{last}={text}"] if text.startswith("-") else [f"--{group}.{last}", text]
    return shlex.join(words)


@dataclass(frozen=True)
class Completion:
    # Shell to write for. For zsh: pgolf completion zsh > DIR/_pgolf, where DIR is in fpath.
    shell: Annotated[Literal["bash", "zsh"], Positional]

    def main(self) -> None:
        union: Any = Union  # of types that are only known at run time
        kinds: dict[str, list[Any]] = {"": [], "data": []}
        for name, command in COMMANDS.items():
            group, _, last = name.rpartition(" ")
            about = tyro.conf.subcommand(last, description=command.about)
            kinds[group].append(Annotated[options.resolve(command.load(), preset("exp101")), about])
        about = tyro.conf.subcommand("data", description=GROUPS["data"])
        kinds[""].append(Annotated[union[tuple(kinds["data"])], about])
        words = ["--tyro-print-completion", self.shell]
        print(options.run_tyro(union[tuple(kinds[""])], prog="pgolf", args=words)[1].rstrip())
