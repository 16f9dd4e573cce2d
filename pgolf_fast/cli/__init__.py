"""The command line: `pgolf COMMAND ...`. Nothing heavy is imported before a command needs it."""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Iterable, Sequence

from pgolf_fast.cli.commands import COMMANDS, GROUPS, Command
from pgolf_fast.errors import PgolfError, explain, one_line

_DATA = [name for name in COMMANDS if name.startswith("data ")]
_TELL = {  # per command: what to do if memory runs out, and what is kept after an interrupt
    "train": ("lower train.micro_batch_tokens", "`pgolf train` resumes with --resume"),
    "ablate": ("lower train.micro_batch_tokens", "the same command resumes"),
    "quantize": ("lower --quant.calibration-sequences", ""),
    "eval": ("lower eval.batch_seqs", "the same command continues from the state that was saved last"),
    "audit": ("lower eval.batch_seqs", ""),
    "ttt-sweep": ("", "the same command keeps the adapters that are finished"),
    "analyze": ("lower --tokens, or choose fewer analyses with --only", ""),
    "bench": ("lower --tokens", "the records written so far are kept"),
    "tune": ("lower --tokens", "the tiles found so far are kept"),
    "data download": ("", "the same command keeps the files that are complete"),
    "data tokenize": ("lower --workers", ""),
}
_OWN_LOG = ("train", "generate", "doctor")  # these log nothing, or set up logging themselves


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0 for success, 1 for a failed check, 2 for bad input, 70 for a bug, 128 + N if signal N ended it.
    """
    _prepare_process()
    words = list(sys.argv[1:] if argv is None else argv)
    memory, kept = _TELL.get(" ".join(words[: 2 if words[:1] == ["data"] else 1]), ("", ""))
    try:
        status = _dispatch(words) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except KeyboardInterrupt as error:
        number = next((a for a in error.args if isinstance(a, int)), signal.SIGINT)
        what = next((a for a in error.args if isinstance(a, str)), "interrupted")
        _complain(f"{what}{'; ' if kept else ''}{kept}")
        return getattr(error, "status", 128 + number)
    except Exception as error:  # noqa: BLE001 - any error is reported in one line
        if os.environ.get("PGOLF_TRACEBACK", "0") not in ("", "0"):
            import traceback

            traceback.print_exc()
        status, line = explain(error, memory)
        _complain(line, keep="" if any("\n" in word for word in words) else "\n")
        if isinstance(error, OSError) and error.filename is None:
            sys.stdout = None  # type: ignore[assignment]  # its buffer cannot be written either
        return status


def _complain(text: str, keep: str = "") -> None:
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"pgolf: {one_line(text, keep)}", file=sys.stderr)


def _prepare_process() -> None:
    """Escape unencodable output, replace closed standard streams, and handle signals like Ctrl-C."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a file opened later must not become standard output
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # with several ranks, a signal ends the process: a rank may be in a call that no handler interrupts
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)) if alone else ():
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _end)


def _end(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
    raise KeyboardInterrupt(number)


def _dispatch(words: list[str]) -> int | None:
    if words[:1] == ["help"]:  # `pgolf help train small` is `pgolf train small --help`
        words = [*words[1:], "--help"]
    match words:
        case [] | ["-h" | "--help", *_]:
            print(_overview(GROUPS))
        case ["--version" | "-V", *_]:
            from pgolf_fast import __version__

            print(f"pgolf_fast {__version__}")
        case ["data"]:
            names = ", ".join(name.split()[1] for name in _DATA)
            raise PgolfError(f"pgolf data needs one of {names}; for example `pgolf data info DIR`")
        case ["data", "-h" | "--help" | "help", *_]:
            print(_overview(["data"]))
        case _:
            import logging

            from pgolf_fast import console
            from pgolf_fast.cli.options import check, parse

            logging.raiseExceptions = False  # no traceback per line on a full disk or a closed pipe
            length = 2 if words[0] == "data" else 1
            command = _find(" ".join(words[:length]))
            options = parse(command.name, command.load(), words[length:])
            if options is None:
                return 0
            check(command.name, options)
            if command.name not in _OWN_LOG:
                console.setup_logging()
            return options.main()
    return 0


def _find(name: str) -> Command:
    """Return a command by name. Raises PgolfError suggesting the nearest one."""
    if name not in COMMANDS:
        known = _DATA if name.startswith("data ") else [*(n for n in COMMANDS if n not in _DATA), "data"]
        near = difflib.get_close_matches(name, [*known, "help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(known)}"
        raise PgolfError(f"unknown command {name!r}: {hint}")
    return COMMANDS[name]


def _overview(groups: Iterable[str]) -> str:
    """Return the commands of some groups, one line each."""
    parts = ["usage: pgolf COMMAND [options]"]
    if groups is GROUPS:
        parts.append("Train, quantize, pack and honestly score a small language model under a byte budget.")
    width = max(map(len, COMMANDS))
    for group in groups:
        lines = (f"  {c.name:{width}}  {c.about}" for c in COMMANDS.values() if c.group == group)
        parts.append("\n".join([f"{group}: {GROUPS[group]}", *lines]))
    parts.append("`pgolf help COMMAND` lists the options of a command. Start with `pgolf demo`.")
    return "\n\n".join(parts)
