"""Options of the commands: dataclasses and configuration fields, parsed by tyro."""

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import itertools
import os
import re
import shutil
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, Suppress, arg

from pgolf_fast.cli.commands import COMMANDS
from pgolf_fast.config.fields import flip, without_none
from pgolf_fast.config.presets import PRESETS, is_preset, preset, shrink
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig
from pgolf_fast.errors import PgolfError

Words = tuple[str, ...]
Size = Literal["tiny", "small"]
Run = Annotated[Path, Positional, arg(metavar="RUN")]
RunOrFile = Annotated[Path, Positional, arg(metavar="RUN_OR_ARTIFACT")]
Preset = Annotated[str, Positional, arg(metavar="PRESET")]
AnyPreset = Annotated[str, Positional, arg(metavar="PRESET", help_behavior_hint="")]
_TypedDict: Any = typing.TypedDict  # made of names and types that are only known at run time
_HELP = ("-h", "--help", "--help-all")


@dataclass(frozen=True)
class Fields:
    """Annotates the field of an options class that collects configuration fields as FIELD=VALUE words.

    groups: groups of the configuration that the command takes; none means all.
    brief: fields, or GROUP.* for all of a group, that `--help` only names; `--help-all` describes them.
    """

    groups: tuple[str, ...] = ()
    brief: tuple[str, ...] = ()


AllFields = Annotated[Words, Fields()]


def _place(metavar: str, field: str) -> Any:
    """Return the settings of a path option whose alias is the configuration field that it overrides."""
    return arg(metavar=metavar, help_behavior_hint="", aliases=[f"--{field}"])


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Options of every command that reads the validation data of a run."""

    # Folder of validation shards; default: the run's (of several runs, the first one's).
    data: Annotated[Path | None, _place("DIR", "data.path")] = None
    # Tokenizer of those shards; default: the one that belongs to them.
    tokenizer: Annotated[Path | None, _place("FILE", "data.tokenizer")] = None

    @property
    def words(self) -> Words:
        return given({"data.path": self.data, "data.tokenizer": self.tokenizer})


def given(fields: dict[str, object]) -> Words:
    """Return FIELD=VALUE words for the values that are not None."""
    return tuple(f"{name}={value}" for name, value in fields.items() if value is not None)


def existing(path: Path, what: str) -> Path:
    """Return `path`. Raises PgolfError if it does not exist."""
    if not path.exists():
        raise PgolfError(f"{what} {path} does not exist")
    return path


def run_folder(path: Path, words: Words = ()) -> tuple[RunFolder, RunConfig]:
    """Return a run folder, and its configuration with the fields that the words set."""
    if not path.exists():
        raise PgolfError(f"run folder {path} does not exist: give the --out of a training run")
    folder = RunFolder(path)
    return folder, flip(folder.read_config(), words)


def preset_with(name: str, size: Size | None, words: Words) -> RunConfig:
    """Return a preset, at a smaller size if one is given, with the fields that the words set."""
    base = preset(name)
    return flip(base if size is None else shrink(base, size), words)


def pick(chosen: object, names: str) -> dict[str, Any]:
    """Return some options of a command by name; `names` are separated by spaces."""
    return {name: getattr(chosen, name) for name in names.split()}


def wrote(*paths: Path | None) -> None:
    """Print the names of the files that were written."""
    for path in filter(None, paths):
        print(f"wrote {path}")


# Options that have an effect only with one of some other options or values, or without all of them
_WORKS = """
pack: measure with table json
eval: figures allow_illegal out without estimate
generate: seed with temperature
audit: limit_bytes with only=C10
audit: train_limit eval_limit with only=C12
ablate: steps with budget=steps budget=both budget=measured
ablate: seconds with budget=time budget=both
seeds: margin with against
analyze: points with only=connectivity
analyze: hash_rows with only=hash
analyze: calibration_tokens with only=quant
analyze: curvature_tokens probes lanczos_steps seed with only=surface
doctor: check without table
bench: threshold with compare
bench: records plots without compare
bench: preset ops tokens modes peers dtype out quick minutes without compare records
"""


def check(command: str, options: Any) -> None:
    """Raise PgolfError for options that have no effect, and for fields that do not fit the preset.

    It runs before commands import what they need, so that mistakes are reported at once.
    """
    for names, kind, others in re.findall(rf"(?m)^{command}: (.*) (with|without) (.*)", _WORKS):
        works = any(_holds(options, word) for word in others.split()) == (kind == "with")
        for name in () if works else names.split():
            if getattr(options, name) != getattr(type(options), name):
                now = "without" if kind == "with" else "with"
                needs = " or ".join(f"--{word.replace('=', ' ')}" for word in others.split())
                raise PgolfError(f"--{name.replace('_', '-')} has no effect {now} {needs}: leave it out")
    paths = (p for value in vars(options).values() for p in (value if isinstance(value, tuple) else (value,)))
    for path in paths:
        if isinstance(path, Path) and path.is_fifo() and path.parts[1:2] != ("dev",):  # not <(command)
            raise PgolfError(f"{path} is a named pipe: give a regular file")
    if is_preset(str(getattr(options, "preset", ""))) and hasattr(options, "fields"):
        preset_with(options.preset, options.shrink, options.fields)


def _holds(options: Any, word: str) -> bool:
    """Return whether an option is given, or has the value after `=`; an empty list of names means all."""
    name, _, value = word.partition("=")
    given = getattr(options, name)
    return bool(given) if not value else given == value or given == () or value in given


# Parsing, with one line for every mistake


def parse(command: str, kind: Any, argv: Sequence[str]) -> Any:
    """Return the options of a command from words, or None after printing the help they ask for.

    Raises PgolfError in one line, naming the nearest option for one that does not exist.
    """
    words = [word for word in argv if word not in _HELP]
    if len(words) < len(argv):
        print(_help(command, kind, words, everything="--help-all" in argv))
        return None
    _check_empty(words)
    resolved = resolve(kind, preset("exp101"))
    width = 10_000 + 2 * sum(map(len, words))  # so that no message wraps
    parsed, text = run_tyro(resolved, width, prog=command, args=words, return_unknown_args=True)
    options, unknown = parsed or (None, ())
    if options is None or unknown:
        _check_names(command, resolved, words)
        extra = [f"{command} does not take {word!r}: see `pgolf {command} --help`" for word in unknown]
        raise PgolfError(extra[0] if extra else _message(command, text))
    typed = {} if _marker(kind) is None else {"fields": _words(options.fields)}
    return kind(**{**vars(options), **typed})


def _check_empty(words: Sequence[str]) -> None:
    """Raise PgolfError for an empty word, which as a path would mean the working directory."""
    option = "an argument"
    for word in words:
        name, sign, value = word.partition("=")
        option = name if word.startswith("--") else option
        # text, and a field that is a list, may be empty on purpose
        may_be = option in ("--prompt", "--blurb") or ("." in option and not option.startswith("--data."))
        if not may_be and not (value if sign and word.startswith("--") else word):
            raise PgolfError(f"{option} is empty: give a value, or leave it out")


def run_tyro(kind: Any, width: int = 10_000, **settings: Any) -> tuple[Any, str]:
    """Return the result of `tyro.cli` (None if it exits) and its output, wrapped at `width`."""
    before, box = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = str(width)
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return tyro.cli(kind, **settings), ""
    except SystemExit:
        return None, box.getvalue()
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def _message(command: str, box: str) -> str:
    """Return tyro's framed message as one line: title, what is wrong or missing, the option's help."""
    title, *lines = filter(None, (line.strip("╭╮╰╯│─- ") for line in box.splitlines()))
    quoted = re.findall("'([^']*)'", lines[0]) if lines else []
    if title == "Required options":
        return f"{command} needs {lines[1]}: for example `{COMMANDS[command].example}`"
    if title == "Invalid choice" and len(quoted) > 1:  # a value may hold quotes
        value, option, *choices = quoted
        return f"{option} is {value!r}; it must be one of {', '.join(sorted({*choices} - {'None'}))}"
    if title == "Value error" and "Argument helptext:" in lines:
        option, _, metavar = lines[lines.index("Argument helptext:") + 1].partition(" ")
        given = f"is {' '.join(quoted)!r}; it " if quoted else ""
        return f"--{option} {given}must be {metavar}"
    return lines[0].removeprefix("Error parsing ") if lines else title


def _check_names(command: str, resolved: Any, words: Sequence[str]) -> None:
    """Raise PgolfError naming the nearest option for the first one that does not exist."""
    known = re.findall(r"--([a-z][\w.-]*)", _tyro_help(command, resolved))
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0].lstrip("-").replace("_", "-")
        if re.match("--?[a-zA-Z]", word) and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}?" if near else f"see `pgolf {command} --help`"
            raise PgolfError(f"unknown option {word.partition('=')[0]}: {hint}")


# Fields of the configuration as options


def resolve(kind: Any, shown: RunConfig, *, brief: bool = False) -> Any:
    """Return `kind` with options for the fields of the configuration, whose defaults are those of `shown`."""
    annotations: dict[str, Any] = {}
    hints, marker = typing.get_type_hints(kind, include_extras=True), _marker(kind)
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field.default
        if field.name == "fields":
            fields = _fields(marker, shown, brief=brief)
            annotations["fields"] = Annotated[fields, arg(name="", help="")]
        elif not hasattr(hint, "__metadata__"):
            # the text says what None, False or nothing means, so "(default: None)" would only repeat it
            silent = default is None or default is False or default == ()
            _, metavar = _option(without_none(hint), optional=False)
            option = arg(metavar=metavar, help_behavior_hint="" if silent else None)
            annotations[field.name] = Annotated[hint, option]
    defaults = {name: getattr(kind, name) for name in annotations if hasattr(kind, name)}
    body = {"__annotations__": annotations, "__module__": kind.__module__, **defaults}
    return dataclass(frozen=True)(type(kind.__name__, (kind,), body))


def _marker(kind: Any) -> Any:
    """Return the `Fields` of an options class, or None if it takes no fields of the configuration."""
    hint = typing.get_type_hints(kind, include_extras=True).get("fields")
    return None if hint is None else hint.__metadata__[0]


def _fields(marker: Fields, shown: RunConfig, *, brief: bool) -> Any:
    """Return a TypedDict of groups, themselves TypedDicts of fields: only what is typed has a key."""
    groups: dict[str, Any] = {}
    for name, kind, value in _groups(RunConfig, shown):
        if not marker.groups or name.partition(".")[0] in marker.groups:
            fields = _group(name, kind, value, marker.brief if brief else ())
            groups[name] = Annotated[fields, arg(help="")]
    if not marker.groups:
        hint = f"(default: {shown.name})"
        groups["name"] = Annotated[str, arg(help="Name of the run.", help_behavior_hint=hint)]
    return _TypedDict("Groups", groups, total=False)


def _groups(kind: Any, shown: object, prefix: str = "") -> Iterator[tuple[str, Any, object]]:
    """Yield every group as (dotted name, class, its value in `shown`, None if it is off)."""
    for name, hint in typing.get_type_hints(kind).items():
        inner = without_none(hint)
        if dataclasses.is_dataclass(inner):
            value = getattr(shown, name, None)
            yield f"{prefix}{name}", inner, value
            yield from _groups(inner, value, f"{prefix}{name}.")


def _group(group: str, kind: Any, shown: object, hidden: Words) -> Any:
    """Return a TypedDict with an option for every field of a configuration class."""
    docs, fields = _docs(kind), {}
    when = "default" if shown is not None else "default when on"
    for name, hint in typing.get_type_hints(kind).items():
        inner = without_none(hint)
        value = getattr(kind() if shown is None else shown, name)
        if not dataclasses.is_dataclass(inner):
            parsed, metavar = _option(inner, optional=inner is not hint)
            about, word = docs.get(name, ""), _text(value, " ") or "empty"
        elif inner is not hint:
            parsed, metavar = str, "none"
            about, word = "none turns the group off.", "none" if value is None else "on"
        else:
            continue
        option = arg(help=about, metavar=metavar, help_behavior_hint=f"({when}: {word})")
        fields[name] = Annotated[parsed, option]
        if {f"{group}.*", f"{group}.{name}"} & {*hidden}:
            fields[name] = Annotated[fields[name], Suppress]
    return _TypedDict(kind.__name__, fields, total=False)


def _option(kind: Any, *, optional: bool) -> tuple[Any, str | None]:
    """Return the type that tyro parses for a field, and its placeholder in the help.

    Values stay text, which the configuration's own setter converts: options, --flip and environment variables
    have one set of rules and messages.
    """
    none = "|none" if optional else ""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return str, "{" + ",".join(map(str, arguments)) + "}" + none
    if typing.get_origin(kind) is tuple:
        items = ["..." if item is ... else _option(item, optional=False)[1] for item in arguments]
        return Words, " ".join(map(str, items))
    if kind is bool:
        return (str, "{true,false}" + none) if optional else (bool, None)
    return str, f"{kind.__name__.upper()}{none}"


def _text(value: object, separator: str) -> str:
    """Return a value as the user would type it."""
    if isinstance(value, tuple):
        return separator.join(_text(item, separator) for item in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _words(groups: dict[str, Any]) -> Words:
    """Return what was typed as FIELD=VALUE words."""
    return tuple(
        f"{group}.{name}={_text(value, ',')}" if name else f"{group}={value}"
        for group, fields in groups.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])
    )


@functools.cache
def _docs(kind: type) -> dict[str, str]:
    """Return the string below each field of a class, which Python itself does not keep."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    docs = {}
    for pair in itertools.pairwise(typing.cast(ast.ClassDef, tree).body):
        match pair:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                docs[name] = " ".join(text.split())
    return docs


# Help


def _tyro_help(command: str, resolved: Any) -> str:
    width = max(60, shutil.get_terminal_size().columns)  # tyro takes minutes at smaller widths
    return run_tyro(resolved, width, prog=f"pgolf {command}", args=["--help"], description="")[1].strip()


def _help(command: str, kind: Any, words: Sequence[str], *, everything: bool) -> str:
    """Return what a command does, an example, and its options."""
    named, shown = _shown(command, kind, words)
    text = _tyro_help(command, resolve(kind, shown, brief=not everything))
    text = re.sub(r"(?m)^ +-+\s*\n|^ *-h, --help.*\n( {8}.*\n)?|[ ]+$", "", text)
    entry, marker = COMMANDS[command], _marker(kind)
    lines = [f"{entry.about}.", f"Example: {entry.example}", "", text]
    if marker is not None:
        lines.append("")
        if marker.brief and not everything:
            more = ", ".join(f"--{name}".replace("_", "-") for name in marker.brief)
            lines.append(f"More options: {more}; `pgolf {command} --help-all` lists them.")
        lines.append(f"Defaults of --GROUP.FIELD options are those of {named}.")
        if not marker.groups:
            lines.append(f"Presets: {' '.join(PRESETS)}.")
            lines.append(f"`pgolf {command} small --help` shows the defaults of another preset.")
    return "\n".join(lines)


def _shown(command: str, kind: Any, words: Sequence[str]) -> tuple[str, RunConfig]:
    """Return the name and configuration whose defaults a help shows: the preset or run named, else exp101."""
    named, size = "exp101", None
    with contextlib.suppress(PgolfError):  # where nothing is named
        options = parse(command, kind, words)
        named = str(getattr(options, "preset", "") or getattr(options, "run", "") or named)
        size = getattr(options, "shrink", None)
    if Path(named).is_dir():
        return named, RunFolder(Path(named)).read_config()
    config = preset_with(named if is_preset(named) else "exp101", size, ())
    return config.name, config
