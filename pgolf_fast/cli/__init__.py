"""The command line: `pgolf COMMAND ...`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from pgolf_fast.cli.commands import COMMANDS, GROUPS
from pgolf_fast.cli.output import print_out
from pgolf_fast.errors import PgolfError

_HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
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


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["help"]:  # `pgolf help train small` is `pgolf train small --help`
        words = [*words[1:], "--help"]
    if not words or words[0] in _HELP:
        print_out(_overview(GROUPS))
        return 0
    if words[0] == "--version":
        from pgolf_fast import __version__

        print_out(f"pgolf_fast {__version__}")
        return 0
    if words[0] == "data" and words[1:2] in ([], *([word] for word in _HELP)):
        if len(words) == 1:
            names = ", ".join(name.removeprefix("data ") for name in COMMANDS if name.startswith("data "))
            raise PgolfError(f"pgolf data needs one of {names}; for example `pgolf data info DIR`")
        print_out(_overview(["data"]))
        return 0
    name, rest = _find(words)
    from pgolf_fast.cli.options import parse

    function, kind = COMMANDS[name].load()
    options = parse(name, kind, rest)
    return 0 if options is None else function(options)


def _find(words: list[str]) -> tuple[str, list[str]]:
    """Return the command and the words after it. Raises PgolfError suggesting the nearest command."""
    length = 2 if words[0] == "data" else 1
    name = " ".join(words[:length])
    if name not in COMMANDS:
        known = [command for command in COMMANDS if (length == 2) == command.startswith("data ")]
        near = difflib.get_close_matches(name, [*known, *(["data"] if length == 1 else [])], n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(known)}"
        raise PgolfError(f"unknown command {name!r}: {hint}")
    return name, words[length:]


def _overview(groups: Sequence[str] | dict[str, str]) -> str:
    """Return the commands of some groups, one line each."""
    width = max(map(len, COMMANDS))
    lines = ["usage: pgolf COMMAND [options]", ""]
    if len(groups) > 1:
        lines += ["Train, quantize, pack and honestly score a small language model under a byte budget.", ""]
    for group in groups:
        lines.append(f"{group}: {GROUPS[group]}")
        lines += [
            f"  {name.ljust(width)}  {command.about}"
            for name, command in COMMANDS.items()
            if command.group == group
        ]
        lines.append("")
    return "\n".join(
        [*lines, "`pgolf help COMMAND` lists the options of a command. Start with `pgolf demo`."]
    )
