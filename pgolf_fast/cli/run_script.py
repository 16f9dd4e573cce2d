"""Run scripts: their training commands, the variables of each, and notes about them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgolf_fast.cli.shell import HOLE, NOT_EXPORTED, Command, Shell, Word
from pgolf_fast.config.env import FIELDS
from pgolf_fast.errors import PgolfError

_SECRET = re.compile(r"(?i)key|token(?!i[sz]|s)|secret|passw(or)?d|credential|auth(?!or)")
_CREDENTIAL = re.compile(
    rf"//[^/\s@]+@|({_SECRET.pattern[4:]})\w*[=:]|\b(hf_|sk-|gh[opsu]_|github_pat_|xox[abp]-|AKIA)\w",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Script:
    """The commands of a file, known variables that no command has (name -> line), and notes."""

    path: Path
    commands: list[Command]
    unread: dict[str, int]
    notes: list[str]

    def choose(self, number: int | None) -> Command:
        """Return a command by its number, or the first that has known variables and is sure to run."""
        if number is not None and not 1 <= number <= len(self.commands):
            raise PgolfError(f"--command is {number}; it must be 1 to {len(self.commands)} for {self.path}")
        first = min(self.commands, key=lambda c: (not c.known, not c.taken))
        return first if number is None else self.commands[number - 1]

    def lines(self, chosen: Command) -> Iterator[str]:
        """Yield the other lines to print: notes, other commands, and variables that are not translated."""
        yield from self.notes
        if len(self.commands) > 1:
            number = next(i for i, c in enumerate(self.commands, 1) if c is chosen)
            yield f"command {number} of {len(self.commands)} is translated; --command N chooses another:"
            for i, c in enumerate(self.commands, 1):
                case = "" if c.taken else " in a branch that is not taken"
                yield f"  {i}: line {c.line}{case}, {c.program}: {_differences(c, chosen)}"
        if self.unread:
            places = ", ".join(f"{name} (line {line})" for name, line in self.unread.items())
            yield f"mentioned, but not set for any command: {places}"
        unknown = [n for n, w in chosen.variables.items() if n not in FIELDS and w.note != NOT_EXPORTED]
        if unknown:
            yield f"unknown, not translated: {', '.join(sorted(unknown))}"


def read_script(path: Path) -> Script:
    """Read a shell script, a file of NAME=value lines, or the shell snippets of a Markdown file.

    Raises PgolfError if the file is empty or not text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PgolfError(f"{path} is not UTF-8 text ({error.reason}): give a run script") from None
    if not text.strip() or "\0" in text:
        raise PgolfError(f"{path} is {'not text' if text.strip() else 'empty'}: give a run script")
    shell, ends = Shell(), []
    for block in _snippets(text) if path.suffix.lower() in (".md", ".markdown") else [text]:
        state = shell.fork()
        try:
            state.source(block, 1)
            for body in [] if shell.commands else [*state.functions.values()]:
                state.fork(taken=False).run(body)
        except RecursionError:
            raise PgolfError(f"{path} is nested too deeply: give the part that sets the variables") from None
        variables = {name: words[0] for name, words in state.vars.items()}
        ends.append(Command(block.count("\n") + 1, "end of the file", variables))
    ends = ends or [Command(1, path.name, {})]
    choices = ([c for c in shell.commands if c.trains], shell.commands, ends)
    commands = next((some for some in choices if any(c.known for c in some)), ends)
    found: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        for name in FIELDS.keys() & re.findall(r"[A-Za-z0-9_]+", line):
            found.setdefault(name, number)
    unread = {n: at for n, at in found.items() if not any(n in c.variables for c in commands)}
    return Script(path, commands, unread, shell.notes)


def is_secret(command: Command, name: str) -> bool:
    """Return True if a variable is named like a credential, or its value looks like or contains one."""
    names = [n for n in command.variables if n not in FIELDS and _SECRET.search(n)]
    text, hidden = command.variables[name].text, (command.variables[n].text for n in names)
    inside = any(len(h) > 5 and h in text for h in hidden)
    return name in names or inside or bool(_CREDENTIAL.search(text))


def _differences(command: Command, other: Command) -> str:
    """Return how the known variables of a command differ from those of another."""
    ours, theirs = command.known, other.known
    changed = {n: w.text for n, w in ours.items() if theirs.get(n, Word("⟪")).text != w.text}
    words = [f"{n}={'...' if HOLE.search(t) or is_secret(command, n) else t}" for n, t in changed.items()]
    missing = [n for n in theirs if n not in ours]
    return " ".join(words + (["without", *missing] if missing else [])) or "the same variables"


def _snippets(text: str) -> Iterator[str]:
    """Yield the fenced shell snippets of Markdown, padded with empty lines to keep line numbers."""
    for match in re.finditer(r"(?ms)^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\1", text + "\n```\n```"):
        if match[2].lower() in ("", "bash", "sh", "shell", "zsh", "console", "env", "dotenv"):
            yield "\n" * text.count("\n", 0, match.start(3)) + re.sub(r"(?m)^( *)[$>] ", r"\1", match[3])
