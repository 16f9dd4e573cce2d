"""The exception for errors that a user can fix, and one-line messages for all exceptions."""

import os
import re

BAD_INPUT, BUG = 2, 70  # exit statuses; 70 is EX_SOFTWARE of sysexits.h
# Errors that users can cause: a pattern for the exception's class names and text, and the message
_CAUSES = {
    r"MemoryError|(?i:out of memory|not enough memory|(can't|cannot|unable to|failed to) allocate|bad_alloc)"
    r"|ALLOC_FAILED|array is too big|size calculation overflowed|multiplication overflow|start new thread": (
        "out of memory: {memory} ({first})"
    ),
    r"UnicodeDecodeError": "an input is not UTF-8 text ({first})",
    r"UnicodeEncodeError": "a name or text that is not Unicode cannot be written ({first})",
    r"ModuleNotFoundError.*named '(?!pgolf_fast)": "a package is not installed ({first})",
    r"RecursionError": "an input is nested too deeply",
    r"OverflowError|without overflow|Overflow when unpacking": "a number is too large ({first})",
    r"DistError|gloo|NCCL|Connection (closed|reset)": "another rank has ended or cannot be reached ({first})",
}
_LONGEST = 4000  # characters of a line


class PgolfError(Exception):
    """Bad input: what was given, what is needed, what to do. The command line prints it and exits with 2."""


def explain(error: BaseException, memory: str = "") -> tuple[int, str]:
    """Return the exit status and message for an exception; `memory` says what to lower if memory ran out."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, PgolfError):
        return BAD_INPUT, text
    first = re.sub(r"^\[enforce fail.*?\] \w+ == 0\. ", "", text.splitlines()[0])[:300]
    # match classes by name, because torch may not be imported
    named = " ".join(kind.__name__ for kind in type(error).__mro__) + f": {text}"
    for pattern, line in _CAUSES.items():
        if re.search(pattern, named):
            return BAD_INPUT, line.format(memory=memory or "use a machine with more", first=first)
    if isinstance(error, OSError):
        known = f"{error.filename or 'writing'}: {error.strerror}"
        return BAD_INPUT, known if error.strerror else f"system error: {text}"
    return BUG, (
        f"this is a bug in pgolf_fast: {type(error).__name__}: {first} ({_place(error)}); run it again with "
        "PGOLF_TRACEBACK=1 and report what it prints"
    )


def one_line(text: str, keep: str = "") -> str:
    """Return `text` with characters escaped that are neither printable nor in `keep`."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _place(error: BaseException) -> str:
    """Return the file and line of the innermost frame of this package in the traceback."""
    import traceback  # imported late to keep `pgolf --help` fast

    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(os.path.dirname(__file__))] or frames
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else "no traceback"
