"""The exception for errors that a user can fix, and the line that any exception ends with."""

import re
from pathlib import Path
from traceback import extract_tb

BAD_INPUT, BUG = 2, 70  # exit statuses; 70 is EX_SOFTWARE of sysexits.h
_MEMORY = re.compile(
    r"out of memory|not enough memory|(can't|cannot|unable to|failed to) allocate|bad_alloc|ALLOC_FAILED"
    r"|array is too big|size calculation overflowed|multiplication overflow|can't start new thread",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"without overflow|too large to (convert|fit)|Overflow when unpacking")
_LONGEST = 4000  # characters of a line


class PgolfError(Exception):
    """Bad input: what was given, what is needed, what to do. The command line prints it and exits with 2."""


def explain(error: BaseException, memory: str = "") -> tuple[int, str]:
    """Return the exit status of an exception, and the line that says what happened and what to do.

    memory: what to lower if memory ran out.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, because torch may not be imported
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    match error:
        case PgolfError():
            return BAD_INPUT, text
        case _ if kinds & {"MemoryError", "OutOfMemoryError"} or _MEMORY.search(text):
            asked = re.search(r"allocate ([\d.]+ ?\w+)", text)
            more = f" ({asked[1]} were asked for)" if asked else ""
            return BAD_INPUT, f"out of memory{more}: {memory or 'free some, or use a machine with more'}"
        case UnicodeDecodeError(start=start, object=content):
            return BAD_INPUT, f"an input is not UTF-8 text: byte {start} is {content[start]:#04x}"
        case UnicodeEncodeError(start=start, object=content):
            return BAD_INPUT, f"{content!r:.200} cannot be written as text: character {start} is not Unicode"
        case OSError():
            what = error.strerror or text
            return BAD_INPUT, f"{error.filename or 'writing' if error.strerror else 'system error'}: {what}"
        case ModuleNotFoundError(name=str(name)) if not name.startswith("pgolf_fast"):
            return BAD_INPUT, f"this needs the package {name.partition('.')[0]}, which is not installed"
        case RecursionError():
            return BAD_INPUT, "an input is nested too deeply"
        case _ if isinstance(error, OverflowError) or _TOO_LARGE.search(text):
            return BAD_INPUT, f"a number is too large ({first})"
        case _ if "DistError" in kinds or re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)", text):
            return BAD_INPUT, f"another rank has ended or cannot be reached ({first})"
    return BUG, (
        f"this is a bug in pgolf_fast: {type(error).__name__}: {first} ({_place(error)}); run it again with "
        "PGOLF_TRACEBACK=1 and report what it prints"
    )


def one_line(text: str, keep: str = "") -> str:
    """Return `text` in characters that print, with those in `keep`; others are written as their escapes."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    shown = (c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


def _place(error: BaseException) -> str:
    """Return the file and line where the exception was raised: the innermost of this package."""
    frames = extract_tb(error.__traceback__)
    root = str(Path(__file__).parent)
    own = [frame for frame in frames if frame.filename.startswith(root)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "no traceback"
