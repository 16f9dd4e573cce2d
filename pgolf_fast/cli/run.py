"""Commands that make and use a run: demo, train, import, generate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pgolf_fast.cli.options import AllFields, Preset, Run, Size, existing, preset_with, run_folder
from pgolf_fast.cli.output import print_out
from pgolf_fast.errors import PgolfError


@dataclass(frozen=True)
class Demo:
    seconds: float = 100.0
    """Training time. Quantizing and scoring come on top."""
    out: Path = Path("runs/demo")
    """Run folder; an earlier demo there is replaced."""
    seed: int = 42
    """Seed of the weights."""


def demo(options: Demo) -> int:
    if options.seconds <= 0:
        raise PgolfError(f"--seconds is {options.seconds}; it must be positive")
    from pgolf_fast.cli.demo import run_demo

    print_out(run_demo(options.out, seconds=options.seconds, seed=options.seed))
    return 0


@dataclass(frozen=True)
class Train:
    preset: Preset
    """Configuration to start from; `pgolf config` lists the presets."""
    fields: AllFields
    out: Path | None = None
    """Run folder; default: runs/PRESET."""
    resume: bool = False
    """Continue the run in that folder from its newest checkpoint."""
    track: Literal["wandb", "tensorboard"] | None = None
    """Also send metrics there; metrics.jsonl is always written."""
    shrink: Size | None = None
    """Train the preset at this size, under the name PRESET_SIZE; other options change it from there."""


def train(options: Train) -> int:
    from pgolf_fast.train.loop import train as run_training

    config = preset_with(options.preset, options.shrink, options.fields)
    out = options.out or Path("runs") / config.name
    result = run_training(config, out, resume=options.resume, track=options.track)
    if not result.is_main:
        return 0
    print_out(str(result))
    return 0


@dataclass(frozen=True)
class Import:
    weights: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Weights, .pt or .safetensors; a .pt file is read without running pickled code."""
    preset: Preset
    """Preset the weights were trained as."""
    fields: AllFields
    out: Path | None = None
    """Run folder; default: runs/NAME of the weights file."""
    shrink: Size | None = None
    """Size of the preset that the weights have."""


def import_weights(options: Import) -> int:
    from pgolf_fast.config.run_folder import RunFolder
    from pgolf_fast.train.checkpoint import import_weights as write_run

    weights = existing(options.weights, "weights file")
    config = preset_with(options.preset, options.shrink, options.fields)
    folder = RunFolder(options.out or Path("runs") / weights.stem)
    write_run(weights, config, folder)
    print_out(f"wrote {folder.model_file}; continue with `pgolf quantize {folder.path}`")
    return 0


@dataclass(frozen=True)
class Generate:
    run: Run
    """Run folder."""
    prompt: str = ""
    """Text to continue; an empty prompt starts a document."""
    tokens: int = 200
    """Tokens to generate."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the most likely token."""
    seed: int = 0
    """Seed of the sampling."""


def generate(options: Generate) -> int:
    from pgolf_fast.artifact.load import generate as generate_text

    if options.tokens < 1:
        raise PgolfError(f"--tokens is {options.tokens}; it must be at least 1")
    if options.temperature < 0:
        raise PgolfError(f"--temperature is {options.temperature}; it must not be negative")
    folder, _ = run_folder(options.run)
    text = generate_text(
        folder, options.prompt, options.tokens, temperature=options.temperature, seed=options.seed
    )
    print_out(text)
    return 0
