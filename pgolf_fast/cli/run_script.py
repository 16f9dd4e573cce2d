"""The training commands of a shell script, each with its environment. Nothing is executed."""

import fnmatch
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from pgolf_fast.config.env import FIELDS
from pgolf_fast.errors import PgolfError

_LAUNCHER = re.compile(r"(.*/)?(python[\d.]*|torchrun|accelerate|deepspeed|uv|poetry)")
_WRAPPERS = {*"env nohup sudo time timeout exec nice setsid numactl taskset srun mpirun docker podman".split()}
_SHELLS = {*"bash sh zsh ssh su tmux screen docker podman kubectl srun gcloud sbatch".split()}  # run strings
_QUIET = {*"echo printf cat grep sed awk tee log info test [ git cp mv rm ls mkdir pkill pgrep".split()}
_SECRET = r"(?i:key|token(?!i[sz]|s)|secret|passw(or)?d|credential|auth(?!or))"
_CREDENTIAL = re.compile(rf"//[^/\s@]+@|{_SECRET}\w*[=:]|\b(hf_|sk-|gh[opsu]_|github_pat_|glpat-|xox[abp]-|AKIA)\w")
_HOLE = re.compile("⟪+(.*?)⟫")  # text that only running the script would tell; ⟪$NAME⟫ if it is not set
_COMPARE = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_SUMS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv, "%": operator.mod}
_STEPS, _DEPTH = 50_000, 40  # limits on what is followed


class Word(NamedTuple):
    """Text after expansion, and a note if it is one of several values."""

    text: str
    note: str = ""

    @property
    def why(self) -> str | None:
        """Why the text is not constant, or None if it is."""
        hole = _HOLE.search(self.text)
        what = hole and hole[1]
        return what and (f"{what} is not set in the script" if what[0] == "$" else f"it is {what.replace('_', ' ')}")

    @property
    def set_text(self) -> str:
        """The text with variables that are not set as empty."""
        return re.sub(r"⟪+\$.*?⟫", "", self.text)


@dataclass(frozen=True)
class Command:
    """A command and its environment. `trains` is False if it only has variables, `reached` if tests skip it."""

    line: int
    program: str
    variables: dict[str, Word]
    trains: bool = False
    reached: bool = True

    def known(self) -> dict[str, Word]:
        """Return the variables that stand for fields."""
        return {name: word for name, word in self.variables.items() if name in FIELDS}


@dataclass(frozen=True)
class Script:
    """The commands to choose from, known variables that none of them has (name -> line), and sourced files."""

    commands: list[Command]
    unread: dict[str, int]
    notes: list[str]


def read_script(path: Path) -> Script:
    """Read a shell script, a file of NAME=value lines, or the shell snippets of a Markdown file.

    Raises PgolfError if the file is empty or no text.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise PgolfError(f"{path} is not UTF-8 text ({error.reason}): give a run script") from None
    if not text.strip() or "\0" in text:
        raise PgolfError(f"{path} is {'not text' if text.strip() else 'empty'}: give a run script")
    shell, ends = _Shell(), []
    for block in _snippets(text) if path.suffix.lower() in (".md", ".markdown") else [text]:
        state = shell.fork()
        try:
            state.source(block, 1)
            for name in state.functions.keys() - state.called:
                state.fork(reached=False).run(state.functions[name])
        except RecursionError:
            raise PgolfError(f"{path} is nested too deeply: give the part that sets the variables") from None
        variables = {name: words[0] for name, words in state.vars.items()}
        ends.append(Command(block.count("\n") + 1, "end of the file", variables))
    choices = ([c for c in shell.commands if c.trains], shell.commands, ends)
    commands = next((some for some in choices if any(c.known() for c in some)), ends)
    found: dict[str, int] = {}
    for match in re.finditer(r"[A-Za-z0-9_]+", text):
        if match[0] in FIELDS and match[0] not in found:
            found[match[0]] = text.count("\n", 0, match.start()) + 1
    unread = {n: at for n, at in found.items() if not any(n in c.variables for c in commands)}
    return Script(commands, unread, shell.notes)


def is_secret(name: str, text: str, others: dict[str, Word]) -> bool:
    """Return True if a variable is named like a credential, or its value looks like one or contains another."""
    if name not in FIELDS and re.search(_SECRET, name):
        return True
    hidden = [w.text for n, w in others.items() if n not in FIELDS and re.search(_SECRET, n)]
    return bool(_CREDENTIAL.search(text)) or any(len(part) > 5 and part in text for part in hidden)


def _snippets(text: str) -> Iterator[str]:
    """Yield the fenced shell snippets of Markdown, each below as many empty lines as stand before it."""
    for match in re.finditer(r"(?ms)^ *(```+|~~~+) *(\w*)[^\n]*\n(.*?)^ *\1", text):
        if match[2].lower() in ("", "bash", "sh", "shell", "zsh", "console", "env", "dotenv"):
            yield "\n" * text.count("\n", 0, match.start(3)) + re.sub(r"(?m)^( *)[$>] ", r"\1", match[3])


@dataclass
class _Shell:
    """A walk over a syntax tree that follows variables; all are arrays, a scalar of one word."""

    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    vars: dict[str, list[Word]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    functions: dict[str, Any] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    args: list[Word] = field(default_factory=list)
    local: set[str] = field(default_factory=set)
    steps: list[int] = field(default_factory=lambda: [0])
    reached: bool = True
    note: str = ""  # about values set here
    line: int = 1
    depth: int = 0

    def fork(self, **changes: Any) -> "_Shell":
        """Return a copy that assigns for itself, as a subshell does."""
        return replace(self, vars={**self.vars}, exported={*self.exported}, **changes)

    def source(self, text: str, line: int) -> None:
        """Follow a text as a script that begins at `line`."""
        import tree_sitter_bash
        from tree_sitter import Language, Parser

        before, self.line = self.line, line
        self.run(*Parser(Language(tree_sitter_bash.language())).parse(text.encode()).root_node.children)
        self.line = before

    def run(self, *nodes: Any) -> None:
        for node in nodes:
            self.steps[0] += 1
            if self.steps[0] > _STEPS:
                raise PgolfError(f"the script has more than {_STEPS:,} steps: give the part that trains")
            getattr(self, f"_{node.type}", self._others)(node)

    def _others(self, node: Any) -> None:
        if node.is_named and node.type not in ("comment", "heredoc_body"):
            self.run(*node.children)

    # Statements, named like the nodes of the grammar

    def _variable_assignment(self, node: Any) -> None:
        self.assign(*self.assigned(node))

    def _declaration_command(self, node: Any) -> None:
        keyword, *rest = node.children
        exports = keyword.type == "export"
        for child in (c for c in rest if c.is_named):
            if child.type == "variable_assignment":
                pairs = [self.assigned(child)]
            else:
                words = self.fields(child)
                exports |= any(re.match(r"-\w*x", w.text) for w in words)
                split = [(w.text.partition("="), w) for w in words]
                pairs = [(n, [w._replace(text=v)] if e else self.vars.get(n, [])) for (n, e, v), w in split]
            for name, words in pairs:
                if keyword.type != "export":
                    self.local.add(name)
                if words:
                    self.assign(name, words, export=exports)

    def _unset_command(self, node: Any) -> None:
        for word in (w for child in node.children[1:] for w in self.fields(child)):
            self.vars.pop(word.text, None)

    def _function_definition(self, node: Any) -> None:
        self.functions[_text(node.child_by_field_name("name"))] = node.child_by_field_name("body")

    def _subshell(self, node: Any) -> None:
        self.fork().run(*node.named_children)

    def _pipeline(self, node: Any) -> None:
        for child in node.named_children:
            self.fork().run(child)

    def _list(self, node: Any) -> None:
        left, kind, right = (c for c in node.children if c.type != "comment")
        verdict = self.test(left)
        self.branch(verdict is not False if kind.type == "&&" else verdict is False, [right], "")

    def _redirected_statement(self, node: Any) -> None:
        body = node.child_by_field_name("body")
        self.run(*filter(None, [body]))
        words = (_text(body) if body is not None else "").split()
        for text in (n for c in node.children for n in c.children if n.type == "heredoc_body"):
            if _SHELLS & {*words} and not _QUIET & {*words}:
                self.fork().source(_text(text), self.at(text))

    def _if_statement(self, node: Any) -> None:
        clauses = [node, *(c for c in node.children if c.type in ("elif_clause", "else_clause"))]
        for clause in clauses:
            then = next((i for i, c in enumerate(clause.children) if c.type == "then"), 0)
            verdicts = [self.test(c) for c in clause.children[1:then] if c.is_named]
            body = [c for c in clause.children[then + 1 :] if c not in clauses]
            verdict = self.branch(verdicts[-1] if then else True, body, f"line {self.at(clause)} taken as true")
            if verdict is not False:
                break
        for clause in clauses[clauses.index(clause) + 1 :]:
            self.fork(reached=False).run(*clause.children)

    def _case_statement(self, node: Any) -> None:
        subject = self.text(node.child_by_field_name("value"))
        items = {i: i.children_by_field_name("value") for i in node.named_children if i.type == "case_item"}
        texts = {item: [_text(v).strip("\"'") for v in values] for item, values in items.items()}
        fits = [i for i in items if any(fnmatch.fnmatchcase(subject.set_text, pattern) for pattern in texts[i])]
        sure = bool(fits) and not (subject.why and texts[fits[0]] == ["*"])
        chosen = fits[0] if sure else next(iter(items), None)
        for item, values in items.items():
            body = [c for c in item.named_children if c not in values]
            self.branch((sure or None) if item == chosen else False, body, f"first case, on line {self.at(item)}")

    def _for_statement(self, node: Any) -> None:
        words = [w for child in node.children_by_field_name("value") for w in self.fields(child)]
        first = words[0] if words else Word("⟪a_value_of_a_loop⟫")
        if len(words) > 1:
            first = first._replace(note=f"first of {len(words)} values of the loop on line {self.at(node)}")
        self.assign(_text(node.child_by_field_name("variable")), [first])
        self.run(node.child_by_field_name("body"))

    def _c_style_for_statement(self, node: Any) -> None:
        self.branch(None, node.children_by_field_name("initializer"), f"first of the loop on line {self.at(node)}")
        self.run(node.child_by_field_name("body"))

    def _while_statement(self, node: Any) -> None:
        ends = self.test(node.child_by_field_name("condition")) is (node.children[0].type == "until")
        body, note = [node.child_by_field_name("body")], f"first pass of the loop on line {self.at(node)}"
        self.branch(False if ends else None, body, note)

    def _compound_statement(self, node: Any) -> None:
        if not _text(node).startswith("(("):
            return self.run(*node.named_children)
        for name in re.findall(r"([A-Za-z_]\w*)\s*(?:[-+*/%]?=(?!=)|\+\+|--)", _text(node)):
            self.assign(name, [Word("⟪computed⟫")])

    def _command(self, node: Any) -> None:
        own: dict[str, Word] = {}
        words: list[Word] = []
        end = 0
        for child in node.children:
            gap = node.text[end : child.start_byte - node.start_byte]
            if own and not words and b"\n" in gap.replace(b"\\\n", b""):  # the grammar joins such lines
                for name, word in own.items():
                    self.assign(name, [word])
                return self.source(node.text[end:].decode(), self.at(child) - gap.count(b"\n"))
            end = child.end_byte - node.start_byte
            if child.type == "variable_assignment":
                name, values = self.assigned(child)
                own[name] = values[0]
            elif child.type not in ("file_redirect", "heredoc_redirect", "herestring_redirect"):
                words += self.fields(child)
        if words:
            self.execute(words, own, self.at(node))

    def branch(self, verdict: bool | None, body: Sequence[Any], note: str) -> bool | None:
        """Run nodes; apart if `verdict` is False, with a note on what they set if it is None. Return it."""
        if verdict is False:
            self.fork(reached=False).run(*body)
        else:
            before, self.note = self.note, self.note or ("" if verdict else note)
            self.run(*body)
            self.note = before
        return verdict

    # Commands

    def execute(self, words: list[Word], own: dict[str, Word], line: int) -> None:
        """Follow a command whose environment has `own` besides what is exported."""
        texts = [w.text for w in words]
        name = texts[0].rpartition("/")[2]
        if name == "shift":
            del self.args[: int(texts[1]) if texts[1:] and texts[1].isdecimal() else 1]
        elif name == "set":
            self.args[:] = words[texts.index("--") + 1 :] if "--" in texts else self.args
        elif name in ("source", "."):
            self.notes.append(f"line {line}: the file that {name} reads there is not read here")
        elif name in ("read", "mapfile", "readarray", "let", "getopts") or texts[:2] == ["printf", "-v"]:
            for match in filter(None, (re.match(r"[A-Za-z_]\w*", text) for text in texts[1:])):
                self.assign(match[0], [Word(f"⟪set_by_{name}⟫")])
        elif name == "eval":
            self.source(" ".join(texts[1:]), line)
        elif name in self.functions:
            self.call(name, words[1:], own)
        elif name not in _QUIET:
            self.launch(words, own, line)

    def call(self, name: str, args: list[Word], own: dict[str, Word]) -> None:
        self.called.add(name)
        if self.depth == _DEPTH:
            return
        before = {**self.vars}
        inner = replace(self, args=[*args], local={*own}, depth=self.depth + 1)
        for variable, word in own.items():
            inner.assign(variable, [word], export=True)
        inner.run(self.functions[name])
        for variable in inner.local:
            self.vars.pop(variable, None)
        self.vars |= {n: words for n, words in before.items() if n in inner.local}

    def launch(self, words: list[Word], own: dict[str, Word], line: int) -> None:
        """Record a command that trains or has known variables; follow the strings that a shell runs."""
        at = next((i for i, w in enumerate(words) if _LAUNCHER.fullmatch(w.text)), len(words))
        found = ((w, re.fullmatch(r"(?s)(?:--env=|-e)?([A-Za-z_]\w*)=(.*)", w.text)) for w in words[:at])
        given = own | {m[1]: w._replace(text=m[2]) for w, m in found if m}
        strings = [w.text for w in words[1:] if re.search(r"\s", w.text)]
        if strings and any(w.text.rpartition("/")[2] in _SHELLS for w in words[:at]):
            inner = self.fork()
            for name, word in given.items():
                inner.assign(name, [word], export=True)
            return [inner.source(text, line) for text in strings][-1]
        first, odd = words[0].text.rpartition("/")[2], bool(words[0].why)  # odd: the program is a variable
        script = next((w for w in words[0 if odd else at :] if w.text.endswith(".py") or w.why), Word(""))
        name = (script.text or (words[at].text if at < len(words) else first)).rpartition("/")[2]
        torchrun = at < len(words) and words[at].text.endswith("torchrun")
        trains = bool(at == 0 or first in _WRAPPERS or "=" in first or odd) and bool(
            script.text and (torchrun or (script.why and not odd) or _trains(name))
        )
        if trains or given.keys() & FIELDS.keys():
            everything = self.environment() | given
            self.commands.append(Command(line, _HOLE.sub("...", name), everything, trains, self.reached))

    def environment(self) -> dict[str, Word]:
        """Return all variables, those that are not exported with a note."""
        return {
            name: word if name in self.exported else word._replace(note=word.note or "set, but not exported")
            for name, (word, *_) in self.vars.items()
        }

    # Variables

    def assign(self, name: str, words: Sequence[Word], *, export: bool = False) -> None:
        self.vars[name] = [w._replace(note=w.note or self.note) for w in words] or [Word("")]
        if export:
            self.exported.add(name)

    def assigned(self, node: Any) -> tuple[str, list[Word]]:
        """Return the name and the words of an assignment."""
        target, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        name, old = _text(target).partition("[")[0], self.vars.get(_text(target).partition("[")[0], [])
        array = value is not None and value.type == "array"
        words = self.fields(value) if array else [Word("") if value is None else self.text(value)]
        if "[" in _text(target):
            words = [*old, *words]
        elif any(c.type == "+=" for c in node.children) and old:
            words = [*old, *words] if array else [_joined([old[0], words[0]])]
        return name, words or [Word("")]

    def lookup(self, name: str) -> Word:
        if name == "#":
            return Word(str(len(self.args)))
        if name in "@*" and self.args:
            return Word(" ".join(w.text for w in self.args))
        if name.isdecimal() and 0 < int(name) <= len(self.args):
            return self.args[int(name) - 1]
        return self.vars[name][0] if name in self.vars else Word(f"⟪${name}⟫")

    # Words

    def fields(self, node: Any) -> list[Word]:
        """Return the words that a word becomes: several for arrays and unquoted variables."""
        if node.type in ("array", "command_name"):
            return [w for child in node.named_children for w in self.fields(child)]
        quoted = node.type in ("string", "raw_string")
        inner = node.named_children[0] if node.type == "string" and node.named_child_count == 1 else node
        pattern = r"\$\{?(!?)([@*]|\w+(?=\[[@*]))(?:\[[@*]\])?(?::(\d+))?\}?"
        if match := re.fullmatch(pattern, _text(inner)):
            words = self.args if match[2] in "@*" else self.vars.get(match[2], [])
            words = words[max(0, int(match[3] or 0) - (match[2] in "@*")) :]
            return [Word(str(i)) for i in range(len(words))] if match[1] else [w for w in words if w.text]
        if node.type == "brace_expression":
            return [Word(text) for text in re.findall(r"-?\w+", _text(node))]
        word = self.text(node)
        if quoted or "expansion" not in node.type:
            return [word] if quoted or word.text else []
        return [word._replace(text=part) for part in word.text.split()]

    def text(self, node: Any) -> Word:
        """Return a word, expanded without splitting."""
        source = _text(node)
        match node.type:
            case "raw_string" | "ansi_c_string":
                return Word(source.lstrip("$")[1:-1])
            case "string" | "translated_string":
                return self.join(node, node.named_children, source.index('"') + 1, len(node.text) - 1)
            case "concatenation":
                return self.join(node, node.named_children, 0, len(node.text))
            case "simple_expansion":
                return self.lookup(source[1:])
            case "expansion":
                return self.expansion(node)
            case "arithmetic_expansion":
                number = self.number(node.named_children[0]) if node.named_child_count == 1 else None
                return Word("⟪computed⟫" if number is None else str(number))
            case "command_substitution" | "process_substitution":
                self.fork().run(*node.named_children)
                return Word("⟪the_output_of_a_command⟫")
        escaped = r'\\(["$`\\])' if node.type == "string_content" else r"\\(.)"
        return Word(re.sub(escaped, r"\1", source.replace("\\\n", "")))

    def join(self, node: Any, children: Sequence[Any], start: int, end: int) -> Word:
        """Return the text of a node between two offsets, with its children expanded."""
        words = []
        for child in children:
            words += [Word(node.text[start : child.start_byte - node.start_byte].decode()), self.text(child)]
            start = child.end_byte - node.start_byte
        return _joined([*words, Word(node.text[start:end].decode())])

    def expansion(self, node: Any) -> Word:
        """Return the value of ${...}: defaults, items of arrays, and prefixes or suffixes taken off."""
        match = re.match(r"\$\{(\w+|[@*#])(?:\[(\w+|\$\w+)\])?(:?[-=+?]|%%?|##?|\}$)", _text(node))
        if match is None:
            return Word("⟪a_form_of_expansion_that_is_not_followed⟫")
        name, key, kind = match.groups()
        value, start = self.lookup(name), len(match[0].encode())
        if key:
            index = self.lookup(key[1:]).text if key[0] == "$" else key
            words = self.vars.get(name, [])
            value = words[int(index)] if index.isdecimal() and int(index) < len(words) else Word("⟪an_item⟫")
        children = [c for c in node.named_children if c.start_byte - node.start_byte >= start]
        if kind[-1] in "-=" and (not value.set_text if kind[0] == ":" else value.text == f"⟪${name}⟫"):
            value = self.join(node, children, start, len(node.text) - 1)
            if kind[-1] == "=":
                self.assign(name, [value])
        elif kind[-1] == "+":
            return self.join(node, children, start, len(node.text) - 1) if value.set_text else Word("")
        elif kind[0] in "%#" and not value.why:
            pattern = self.join(node, children, start, len(node.text) - 1).text
            return value._replace(text=_cut(value.text[:1000], kind, pattern))
        return value

    def number(self, node: Any) -> int | None:
        """Return the value of an arithmetic expression, or None if it is not constant."""
        if node.type == "parenthesized_expression":
            return self.number(node.named_children[0])
        if node.type == "binary_expression" and node.children[1].type in _SUMS:
            a, b = self.number(node.children[0]), self.number(node.children[2])
            fails = a is None or b is None or (b == 0 and node.children[1].type in "/%")
            return None if fails else _SUMS[node.children[1].type](a, b)
        is_name = node.type in ("variable_name", "word") and _text(node).isidentifier()
        text = (self.lookup(_text(node)) if is_name else self.text(node)).text
        return int(text) if re.fullmatch(r"-?\d{1,18}", text) else None

    def test(self, node: Any) -> bool | None:
        """Return whether a condition holds, variables that are not set being empty; None if it is not constant."""
        parts = [c for c in node.children if c.type not in ("[", "[[", "]", "]]", "(", ")")]
        match node.type:
            case "test_command" | "parenthesized_expression" if len(parts) == 1:
                return self.test(parts[0])
            case "negated_command" | "unary_expression" if _text(parts[0]) == "!":
                verdict = self.test(parts[1])
                return None if verdict is None else not verdict
            case "binary_expression" | "list" if len(parts) == 3:
                return self.compare(parts[0], _text(parts[1]), parts[2])
            case "unary_expression" if _text(parts[0]) in ("-z", "-n"):
                text = self.text(parts[1]).set_text
                return None if _HOLE.search(text) else bool(text) is (_text(parts[0]) == "-n")
            case "command" | "pipeline" | "redirected_statement" | "subshell" | "compound_statement":
                self.run(node)
        return {"true": True, ":": True, "false": False}.get(_text(node))

    def compare(self, left: Any, kind: str, right: Any) -> bool | None:
        if kind in ("&&", "||"):
            sides = self.test(left), self.test(right)
            return (kind == "||") if (kind == "||") in sides else None if None in sides else kind == "&&"
        a, b = self.text(left).set_text, self.text(right).set_text
        if _HOLE.search(a + b):
            return None
        if kind in ("=", "==", "!="):
            return fnmatch.fnmatchcase(a, b) is (kind != "!=")
        numbers = kind in _COMPARE and re.fullmatch(r"\d{1,18} \d{1,18}", f"{a} {b}")
        return _COMPARE[kind](int(a), int(b)) if numbers else None

    def at(self, node: Any) -> int:
        return self.line + node.start_point[0]


def _text(node: Any) -> str:
    return node.text.decode()


def _joined(words: Sequence[Word]) -> Word:
    return Word("".join(w.text for w in words), next((w.note for w in words if w.note), ""))


def _trains(name: str) -> bool:
    """Return True if a Python file is named like a training program rather than like a tool."""
    return "train" in name.lower() and not re.search("token|spm|bpe|shard|data|download|eval|test_", name.lower())


def _cut(text: str, kind: str, pattern: str) -> str:
    """Return `text` without the shortest (%, #) or longest (%%, ##) match of `pattern` at an end."""
    cuts = [len(text) - i for i in range(len(text) + 1)] if kind[0] == "%" else [*range(len(text) + 1)]
    parts = [(text[i:], text[:i]) if kind[0] == "%" else (text[:i], text[i:]) for i in cuts]
    rests = [rest for part, rest in parts if fnmatch.fnmatchcase(part, pattern)] or [text]
    return rests[0 if len(kind) == 1 else -1]
