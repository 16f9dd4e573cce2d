"""The command line: `pgolf COMMAND ...`. Nothing heavy is imported before a command needs it."""

import difflib
import sys
from collections.abc import Iterable, Sequence

from pgolf_fast.cli.commands import COMMANDS, GROUPS, Command
from pgolf_fast.errors import PgolfError

_DATA = [name for name in COMMANDS if name.startswith("data ")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv)) or 0
    except PgolfError as error:
        print(f"pgolf: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except OSError as error:  # a full disk, a read-only folder, a file where a folder should be
        if error.filename is None and error.strerror is None:
            raise
        print(f"pgolf: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pgolf: interrupted; `pgolf train` resumes with --resume", file=sys.stderr)
        return 130


def _dispatch(words: list[str]) -> int | None:
    if words[:1] == ["help"]:  # `pgolf help train small` is `pgolf train small --help`
        words = [*words[1:], "--help"]
    match words:
        case [] | ["-h" | "--help", *_]:
            print(_overview(GROUPS))
        case ["--version", *_]:
            from pgolf_fast import __version__

            print(f"pgolf_fast {__version__}")
        case ["data"]:
            names = ", ".join(name.split()[1] for name in _DATA)
            raise PgolfError(f"pgolf data needs one of {names}; for example `pgolf data info DIR`")
        case ["data", "-h" | "--help" | "help", *_]:
            print(_overview(["data"]))
        case _:
            from pgolf_fast.cli.options import parse

            length = 2 if words[0] == "data" else 1
            command = _find(" ".join(words[:length]))
            options = parse(command.name, command.load(), words[length:])
            return None if options is None else options.main()
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
