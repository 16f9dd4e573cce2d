"""The commands that a shell script would run, each with its environment. Nothing is executed."""

import fnmatch
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from pgolf_fast.config.env import FIELDS
from pgolf_fast.errors import PgolfError

_LAUNCHER = re.compile(r"(.*/)?(python[\d.]*|torchrun|accelerate|deepspeed|uv|poetry)")
_SHELL = re.compile("(.*/)?(bash|sh|zsh|ssh|su|tmux|screen|docker|podman|kubectl|srun|sbatch)")  # run strings
_TRAINS = re.compile("(?i)(?!.*(token|spm|bpe|shard|data|download|eval|test_)).*train")  # but not tools
_QUIET = re.compile("echo|printf|cat|grep|sed|awk|tee|log|info|test|git|cp|mv|rm|ls|:")
HOLE = re.compile("⟪+(.*?)⟫")  # text that is known only at run time; ⟪$NAME⟫ for an unset variable
_COMPARE = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_SUMS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv, "%": operator.mod}
_STEPS, _DEPTH, _LENGTH = 20_000, 40, 10_000  # limits of the walk
NOT_EXPORTED = "set, but not exported"  # so it may not reach the program


class Word(NamedTuple):
    """Text after expansion, and a note if it is one of several values."""

    text: str
    note: str = ""

    @property
    def why(self) -> str:
        """Why the text is not constant; empty if it is."""
        what = hole[1] if (hole := HOLE.search(self.text)) else ""
        return f"{what} is not set in the script" if what[:1] == "$" else what.replace("_", " ")

    @property
    def set_text(self) -> str:
        """The text with variables that are not set as empty."""
        return re.sub(r"⟪+\$.*?⟫", "", self.text)


_ITEM = Word("⟪it_is_an_item_of_an_array⟫")


@dataclass(frozen=True)
class Command:
    """A command and its environment. It need not train, and may be in a branch that is not taken."""

    line: int
    program: str
    variables: dict[str, Word]
    trains: bool = False
    taken: bool = True

    @property
    def known(self) -> dict[str, Word]:
        """The variables that set fields."""
        return {name: word for name, word in self.variables.items() if name in FIELDS}


@dataclass
class Shell:
    """A walk over a syntax tree that tracks variables. Each is an array; a scalar has one word."""

    commands: list[Command] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    vars: dict[str, list[Word]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    functions: dict[str, Any] = field(default_factory=dict)
    args: list[Word] = field(default_factory=list)
    local: set[str] = field(default_factory=set)
    steps: Iterator[int] = field(default_factory=itertools.count)
    taken: bool = True
    note: str = ""  # about values set here
    line: int = 1
    depth: int = 0

    def fork(self, **changes: Any) -> "Shell":
        """Return a copy whose assignments do not affect this one, as in a subshell."""
        return replace(self, vars={**self.vars}, exported={*self.exported}, **changes)

    def source(self, text: str, line: int) -> None:
        """Interpret `text` as a script that begins at `line`."""
        import tree_sitter_bash
        from tree_sitter import Language, Parser

        tree = Parser(Language(tree_sitter_bash.language())).parse(text.encode())
        replace(self, line=line).run(*tree.root_node.children)

    def run(self, *nodes: Any) -> None:
        """Interpret nodes with the methods below, which are named after the node types of the grammar."""
        for node in nodes:
            if next(self.steps) > _STEPS:
                raise PgolfError(f"the script has more than {_STEPS:,} steps: give the part that trains")
            broken = node.type != "command" and any(c.is_error or c.is_missing for c in node.children)
            getattr(self, "_others" if broken else f"_{node.type}", self._others)(node)

    def _others(self, node: Any) -> None:
        if node.is_named and node.type != "comment":
            self.run(*node.children)

    def _variable_assignment(self, node: Any) -> None:
        self.assign(*self.assigned(node))

    def _declaration_command(self, node: Any) -> None:
        exports = local = False
        for child in node.children:
            pairs = [self.assigned(child)] if child.type == "variable_assignment" else []
            for word in [] if pairs else self.fields(child):
                name, equals, text = word.text.partition("=")
                pairs.append((name, [word._replace(text=text)] if equals else self.vars.get(name, [])))
            for name, words in pairs:
                exports |= bool(re.fullmatch(r"export|-\w*x\w*", name))
                local |= name in ("local", "declare", "typeset")
                self.local |= {name} if local else set()
                if words:
                    self.assign(name, words, export=exports)

    def _unset_command(self, node: Any) -> None:
        for name in _text(node).split()[1:]:
            self.vars.pop(name, None)

    def _function_definition(self, node: Any) -> None:
        self.functions[_text(node.child_by_field_name("name"))] = node.child_by_field_name("body")

    def _subshell(self, node: Any) -> None:
        self.fork().run(*node.named_children)

    _pipeline = _command_substitution = _process_substitution = _subshell

    def _list(self, node: Any) -> None:
        left, *right = (c for c in node.named_children if c.type != "comment")
        both, verdict = any(c.type == "&&" for c in node.children), self.test(left)
        self.branch(verdict is not False if both else verdict is False, right)

    def _heredoc_body(self, node: Any) -> None:
        words = _text(node.parent.parent or node.parent).partition("<<")[0].split()
        if any(map(_SHELL.fullmatch, words)) and not any(map(_QUIET.fullmatch, words)):
            self.fork().source(_text(node), self.at(node))

    def _if_statement(self, node: Any) -> None:
        clauses = [node, *(c for c in node.children if c.type in ("elif_clause", "else_clause"))]
        taken = False
        for clause in clauses:
            then = next((i for i, c in enumerate(clause.children) if c.type == "then"), 0)
            tests = [] if taken else [self.test(c) for c in clause.children[1:then] if c.is_named]
            verdict = False if taken else tests[-1] if tests else True
            taken |= verdict is not False
            body = [c for c in clause.children[then + 1 :] if c not in clauses]
            self.branch(verdict, body, f"if the test on line {self.at(clause)} holds")

    def _case_statement(self, node: Any) -> None:
        subject = self.text(node.child_by_field_name("value"))
        items = [(i, i.children_by_field_name("value")) for i in node.named_children if i.type == "case_item"]
        texts = [[_text(v).strip("\"'") for v in values] for _, values in items]
        fits = partial(fnmatch.fnmatchcase, subject.set_text)
        hits = [i for i, some in enumerate(texts) if any(map(fits, some))]
        sure = bool(hits) and not (subject.why and texts[hits[0]] == ["*"])
        for i, (item, values) in enumerate(items):
            verdict = (sure or None) if i == (hits[0] if sure else 0) else False
            body = [c for c in item.named_children if c not in values]
            self.branch(verdict, body, f"in the case on line {self.at(item)}")

    def _for_statement(self, node: Any) -> None:
        words = [w for child in node.children_by_field_name("value") for w in self.fields(child)]
        note = f"first of {len(words)} values of the loop on line {self.at(node)}" if words[1:] else ""
        before = len(self.commands)
        for word in words or [Word("⟪a_loop_sets_it⟫")]:
            self.assign(_text(node.child_by_field_name("variable")), [word._replace(note=word.note or note)])
            self.run(node.child_by_field_name("body"))
            if len(self.commands) > before:
                break  # other values would give other runs
            note = ""

    def _while_statement(self, node: Any) -> None:
        ends = self.test(node.child_by_field_name("condition")) is (node.children[0].type == "until")
        body, note = [node.child_by_field_name("body")], f"first pass of the loop on line {self.at(node)}"
        self.branch(False if ends else None, body, note)

    def _c_style_for_statement(self, node: Any) -> None:
        self.branch(None, node.children, f"first pass of the loop on line {self.at(node)}")

    def _command(self, node: Any) -> None:
        own: dict[str, Word] = {}
        words: list[Word] = []
        scope = replace(self, vars={**self.vars})  # assignments see earlier ones, arguments do not
        end = 0
        for child in node.children:
            gap = node.text[end : child.start_byte - node.start_byte]
            if end and b"\n" in gap.replace(b"\\\n", b""):  # the grammar may join a line and the next
                self.execute(words, own, self.at(node))
                return self.source(node.text[end:].decode(), self.at(child) - gap.count(b"\n"))
            end = child.end_byte - node.start_byte
            if child.type == "variable_assignment":
                name, scope.vars[name] = pair = scope.assigned(child)
                own[name] = pair[1][0]._replace(note=pair[1][0].note or self.note)
            elif not child.type.endswith("_redirect"):
                words += self.fields(child)
        self.execute(words, own, self.at(node))

    def branch(self, verdict: bool | None, body: Sequence[Any], note: str = "") -> None:
        """Interpret nodes: in a fork if `verdict` is False; if it is None, note what they set."""
        if verdict is False:
            return self.fork(taken=False).run(*body)
        replace(self, note=self.note or ("" if verdict else note)).run(*body)

    def execute(self, words: list[Word], own: dict[str, Word], line: int) -> None:
        """Interpret a command whose environment has `own` in addition to exported variables."""
        texts = [w.text for w in words] or [""]
        name = texts[0].rpartition("/")[2]
        if not words:
            self.assign_all(own)
        elif name == "shift":
            del self.args[: int(texts[1]) if texts[1:] and texts[1].isdecimal() else 1]
        elif name == "set":
            self.args[:] = words[texts.index("--") + 1 :] if "--" in texts else self.args
            self.exported |= {"*"} if {"-a", "allexport"} & {*texts} else set()
        elif name in ("source", "."):
            self.notes.append(f"line {line}: the file that `{name}` reads there is not read here")
        elif name in ("read", "mapfile", "readarray", "let", "getopts") or texts[:2] == ["printf", "-v"]:
            for match in filter(None, (re.match(r"[A-Za-z_]\w*", text) for text in texts[1:])):
                self.assign(match[0], [Word(f"⟪{name}_sets_it⟫")])
        elif name == "eval":
            self.source(" ".join(texts[1:]), line)
        elif name in self.functions and self.depth < _DEPTH:
            self.call(name, words[1:], own)
        elif not _QUIET.fullmatch(name):
            self.launch(words, own, line)

    def call(self, name: str, args: list[Word], own: dict[str, Word]) -> None:
        before = {**self.vars}
        inner = replace(self, args=[*args], local={*own}, depth=self.depth + 1)
        inner.assign_all(own, export=True)
        inner.run(self.functions[name])
        for variable in inner.local:
            self.vars.pop(variable, None)
        self.vars |= {n: words for n, words in before.items() if n in inner.local}

    def launch(self, words: list[Word], own: dict[str, Word], line: int) -> None:
        """Record a command that trains or has known variables; interpret strings that a shell runs."""
        texts = [w.text for w in words]
        at = next((i for i, text in enumerate(texts) if _LAUNCHER.fullmatch(text)), len(words))
        found = ((w, re.fullmatch(r"(?s)(?:--env=|-e)?([A-Za-z_]\w*)=(.*)", w.text)) for w in words[:at])
        given = own | {m[1]: w._replace(text=m[2]) for w, m in found if m}
        strings = [text for text in texts[1:] if re.search(r"\s", text)]
        if strings and any(map(_SHELL.fullmatch, texts[:at])):
            inner = self.fork()
            inner.assign_all(given, export=True)
            for text in strings:
                inner.source(text, line)
            return
        odd = bool(words[0].why)  # the program is a variable
        launcher = texts[at] if at < len(words) else texts[0]
        tool = re.match(r"-c |- |-m (?!torch|accelerate|deepspeed)", " ".join((*texts[at + 1 : at + 3], "")))
        after = [] if tool else texts[0 if odd else at :]
        script = next((text for text in after if re.fullmatch(r"(?s)[^-].*(\.py|⟫)", text)), "")
        name = (script or launcher).rpartition("/")[2]
        named = "torchrun" in launcher or (name.endswith("⟫") and not odd) or _TRAINS.match(name)
        trains = bool(named and script)
        if trains or given.keys() & FIELDS.keys():
            gone = [name for option, name in itertools.pairwise(texts[:at]) if option == "-u"]
            kept = {} if "-i" in texts[:at] else self.vars  # env -i, env -u NAME
            variables = {n: w[0] for n, w in kept.items() if n not in gone}
            for n in () if "*" in self.exported else variables.keys() - self.exported:
                variables[n] = variables[n]._replace(note=variables[n].note or NOT_EXPORTED)
            program = HOLE.sub("...", name)
            self.commands.append(Command(line, program, variables | given, trains, self.taken))

    def assign(self, name: str, words: Sequence[Word], *, export: bool = False) -> None:
        self.vars[name] = [w._replace(note=w.note or self.note) for w in words[:_LENGTH]] or [Word("")]
        self.exported |= {name} if export else set()

    def assign_all(self, words: dict[str, Word], *, export: bool = False) -> None:
        for name, word in words.items():
            self.assign(name, [word], export=export)

    def assigned(self, node: Any) -> tuple[str, list[Word]]:
        """Return the name and the words of an assignment."""
        target, value = node.child_by_field_name("name"), node.child_by_field_name("value")
        name, _, item = _text(target).partition("[")
        array = value is not None and value.type == "array"
        words = self.fields(value) if array else [Word("") if value is None else self.text(value)]
        words = [_ITEM if array and re.match(r"\[.*\]=", w.text) else w for w in words]
        old, index = self.vars.get(name, []), item.rstrip("]")
        if item:
            known = index.isdecimal() and int(index) < len(old)
            words = [*old[: int(index)], *words, *old[int(index) + 1 :]] if known else [_ITEM]
        elif old and any(c.type == "+=" for c in node.children):
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

    def fields(self, node: Any) -> list[Word]:
        """Return the words that a node expands to: several for arrays and unquoted variables."""
        if node.type in ("array", "command_name"):
            return [w for child in node.named_children for w in self.fields(child)]
        quoted = node.type in ("string", "raw_string")
        inner = node.named_children[0] if node.type == "string" and node.named_child_count == 1 else node
        pattern = r"\s*\$\{?(!?)([@*]|\w+(?=\[[@*]))(?:\[[@*]\])?(?::(\d+))?\}?"
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
                return self.lookup(source.strip()[1:])
            case "expansion":
                return self.expansion(node)
            case "arithmetic_expansion":
                number = self.number(node.named_children[0]) if node.named_child_count == 1 else None
                return Word("⟪it_is_computed⟫" if number is None else str(number))
            case "command_substitution" | "process_substitution":
                self.run(node)
                return Word("⟪it_is_the_output_of_a_command⟫")
        escaped = r'\\(["$`\\])' if node.type == "string_content" else r"\\(.)"
        return Word(re.sub(escaped, r"\1", source.replace("\\\n", "")))

    def join(self, node: Any, children: Sequence[Any], start: int, end: int) -> Word:
        """Return the text of a node between two offsets, with its children expanded."""
        words = []
        for child in children:
            plain = child.type == "string_content"  # other nodes may begin with the spaces before them
            spaces = 0 if plain else len(child.text) - len(child.text.lstrip())
            before = node.text[start : child.start_byte - node.start_byte + spaces]
            words += [Word(before.decode()), self.text(child)]
            start = child.end_byte - node.start_byte
        return _joined([*words, Word(node.text[start:end].decode())])

    def expansion(self, node: Any) -> Word:
        """Return the value of ${...}: a default, or an item of an array."""
        match = re.match(r"\s*\$\{(\w+|[@*#])(?:\[(\w+|\$\w+)\])?(:?[-=+?]|\}$)", _text(node))
        if match is None:
            return Word("⟪its_form_of_expansion_is_not_followed⟫")
        name, key, kind = match.groups()
        value = self.lookup(name)
        if key:
            index = self.lookup(key[1:]).text if key[0] == "$" else key
            known = index.isdecimal() and int(index) < len(self.vars.get(name, []))
            value = self.vars[name][int(index)] if known else _ITEM
        start = len(match[0].encode())
        children = [c for c in node.named_children if c.start_byte - node.start_byte >= start]
        default = self.join(node, children, start, len(node.text) - 1) if kind != "}" else value
        if kind[-1] == "+":
            return default if value.set_text else Word("")
        if kind[-1] in "-=" and (not value.set_text if kind[0] == ":" else value.text == f"⟪${name}⟫"):
            value = default
            if name.isdecimal():
                value = value._replace(note=value.note or f"default of argument {name}")
            if kind[-1] == "=":
                self.assign(name, [value])
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
        """Return whether a condition holds, with unset variables empty, or None if it is not constant."""
        parts = [c for c in node.children if c.type not in ("[", "[[", "]", "]]", "(", ")")]
        if node.type in ("test_command", "parenthesized_expression") and len(parts) == 1:
            return self.test(parts[0])
        if parts and parts[0].type == "!":
            verdict = self.test(parts[-1])
            return None if verdict is None else not verdict
        if node.type in ("binary_expression", "list") and len(parts) == 3:
            return self.compare(parts[0], _text(parts[1]), parts[2])
        if node.type == "unary_expression" and _text(parts[0]) in ("-z", "-n"):
            text = self.text(parts[1]).set_text
            return None if HOLE.search(text) else bool(text) is (_text(parts[0]) == "-n")
        self.run(node)
        return {"true": True, ":": True, "false": False}.get(_text(node))

    def compare(self, left: Any, kind: str, right: Any) -> bool | None:
        if kind in ("&&", "||"):
            sides = self.test(left), self.test(right)
            return (kind == "||") if (kind == "||") in sides else None if None in sides else kind == "&&"
        a, b = self.text(left).set_text, self.text(right).set_text
        if kind in ("=", "==", "!=") and not HOLE.search(a + b):
            return fnmatch.fnmatchcase(a, b) is (kind != "!=")
        numbers = kind in _COMPARE and re.fullmatch(r"\d{1,18} \d{1,18}", f"{a} {b}")
        return _COMPARE[kind](int(a), int(b)) if numbers else None

    def at(self, node: Any) -> int:
        return self.line + node.start_point[0]


def _text(node: Any) -> str:
    return node.text.decode()


def _joined(words: Sequence[Word]) -> Word:
    text = "".join(w.text for w in words)
    note = next((w.note for w in words if w.note), "")
    return Word(text if len(text) < _LENGTH else "⟪it_is_too_long⟫", note)
