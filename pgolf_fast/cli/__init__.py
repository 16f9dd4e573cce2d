"""The words a person types: `pgolf COMMAND ...`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pgolf_fast.cli.output import print_out
from pgolf_fast.errors import PgolfError

COMMANDS = {
    "demo": "train, quantise, pack and score a small model on text this machine already has",
    "train": "train a preset into a run folder: pgolf train exp101 --data.path DIR --out RUN",
    "import": "make a run folder of published weights: pgolf import FILE.pt exp101 --data.path DIR --out RUN",
    "quantize": "turn a run's weights into integers",
    "pack": "write a run's artifact and count its bytes against the limit",
    "eval": "score a run's artifact: non-overlapping, sliding, sliding with test-time training",
    "audit": "check a run or an artifact against the rules: what a score may depend on, and what it may not",
    "report": "one page about a run that opens offline: curves, scores, bytes, audit, and what is missing",
    "ablate": "train a preset and variants of it under one budget, and compare their scores with intervals",
    "seeds": "mean and deviation of scored runs, and whether they beat others by 0.005 nats",
    "ttt-sweep": "compare adapters of test-time training on a run's artifact, with intervals",
    "analyze": "study models: weights, spectra, rounding, curvature; as published and as it should be",
    "submit": "write a run as a folder for a pull request: README, submission.json, log, artifact, script",
    "generate": "let a run continue a prompt",
    "data": "info, tokenize, download: token shards and tokenizers",
    "config": "print a preset, compare two, or translate a run script's environment variables",
    "doctor": "what this machine has and which implementation each op uses",
    "aot": "compile every Triton kernel for GPUs that need not be here: registers, spills, tensor cores",
    "bench": "measure ops beside their peers, compare two results files, draw them",
    "tune": "measure launch rows of the Triton kernels on this GPU and keep them",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, or 2 for bad input, or 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print_out(_help())
            return 0
        if arguments[0] == "--version":
            from pgolf_fast import __version__

            print_out(f"pgolf_fast {__version__}")
            return 0
        return _command(arguments[0])(arguments[1:])
    except PgolfError as error:
        print(f"pgolf: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except OSError as error:  # a full disk, a folder that may not be written, a file where a folder should be
        if error.filename is None and error.strerror is None:
            raise
        print(f"pgolf: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pgolf: interrupted; a training run continues with --resume", file=sys.stderr)
        return 130


def _command(name: str) -> Callable[[list[str]], int]:
    import difflib

    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        raise PgolfError(f"unknown command {name!r}: {hint}")
    from pgolf_fast.cli import commands

    function = name.replace("-", "_")
    # `import` and `report` mean something else there, so these have an underscore behind them
    return getattr(commands, f"{function}_", None) or getattr(commands, function)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pgolf COMMAND [arguments]",
            "",
            "Train, quantise, pack and honestly score a small language model under a byte budget.",
            "",
            *lines,
            "",
            "`pgolf COMMAND --help` lists a command's arguments. Start with `pgolf demo`.",
        ]
    )
