"""A run as a submission folder for the challenge, and its evaluation script as one small file."""

import ast
import base64
import functools
import hashlib
import json
import lzma
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import pgolf_fast
from pgolf_fast.artifact.container import sizes
from pgolf_fast.artifact.load import unpack
from pgolf_fast.config.checks import need
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import RunFolder, read_scores
from pgolf_fast.config.schema import ModelConfig, RunConfig, TTTConfig
from pgolf_fast.console import command, logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import need_writable, read_json, write_bytes, write_json

LIMIT_BYTES = 16_000_000
OFFICIAL_BYTES = 151_080_363  # of the challenge's validation targets, 1,024 pieces
SCRIPT, ARTIFACT = "train_gpt.py", "model.pgolf"
_WRITTEN = ".pgolf_submit.json"  # digests of the files that `write_submission` wrote
_PLACEHOLDERS = {"", "your name", "your-github-id", "your github id", "you", "none"}
_SCORES = {
    "non_overlapping": "non-overlapping windows",
    "sliding": "sliding windows",
    "sliding_ttt": "sliding windows, legal test-time training",
}
_ADAPTERS = ("sgd", "adamw", "lora")  # what the evaluation script supports
_CODECS = ("raw", "lzma", "rans")
# Settings of the network that it has only with their defaults
_LACKING = ("num_loops", "lanes_from", "head_gate", "smear_form", "skip_gates", "rope_bf16_frequencies")
# Fields that say where a run was made and how it was exported, not what it is.
_NOT_SHOWN = ("name", "data.path", "data.tokenizer", "pack.", "kernels.")
_MAIN = "pgolf_fast.artifact.standalone.scores"
_DIGEST = "SHA256"  # the global that holds the artifact's digest
_NO_DIGEST = f'{_DIGEST} = ""'
_WRAP = "import base64,lzma\nexec(lzma.decompress(base64.b85decode({!r})))\n"


@dataclass(frozen=True)
class About:
    """Facts that are not in the run folder: author, title, track."""

    author: str
    github_id: str
    name: str | None
    blurb: str | None
    track: str


def write_submission(folder: RunFolder, out: Path, about: About, *, readable: bool = False) -> dict[str, int]:
    """Write README.md, submission.json, train.log, the artifact and the evaluation script into `out`.

    readable: write the script as readable source instead of compressed, and count that. Returns bytes by
    part. If README.md or submission.json was edited after an earlier call, it is kept, with a warning.
    Placeholders for names, and scores on text other than the challenge's, also give warnings.
    Raises PgolfError when the run is not packed or not scored, its scores belong to another artifact or
    other settings, it breaks the rules, the script lacks its adapter or codec, code and artifact exceed
    LIMIT_BYTES, or `out` holds files of these names that this function did not write.
    """
    artifact = folder.need(folder.artifact_file, "pack")
    log = folder.need(folder.log_file, "train PRESET --out")
    need_writable(out)
    config, container = unpack(artifact)[0], sizes(artifact)
    digest = container.sha256
    why = f"ttt.adapter {config.ttt.adapter} breaks the rules: {config.ttt.illegal}"
    hint = "It cannot be submitted: set another ttt.adapter in config.json, pack and score again"
    need(config.ttt.illegal is None, f"{why}. {hint}")
    _check_network(config.model)
    _check_script(config.ttt, {section.codec for section in container.sections})
    scores = _scores(folder, config, digest)
    forms = build_script(digest)
    script = forms.readable if readable else forms.wrapped
    code, weights = len(script.encode()), artifact.stat().st_size
    hint = f"pack the run again with pack.limit_bytes {LIMIT_BYTES} and pack.code_bytes {code}"
    why = f"code {code:,} + artifact {weights:,} = {code + weights:,} bytes > {LIMIT_BYTES:,} bytes: {hint}"
    need(code + weights <= LIMIT_BYTES, why)
    facts = _facts(folder, config, about)
    facts |= {"scores": scores, "digest": digest, "code": code, "weights": weights, "readable": readable}
    facts |= {"labels": _SCORES, "script": SCRIPT, "artifact": ARTIFACT, "limit": LIMIT_BYTES}
    facts["warnings"] = _warnings(config, about, scores)
    template = resources.files("pgolf_fast.artifact").joinpath("submission.md.j2").read_text(encoding="utf-8")
    readme = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(template)
    files = {
        SCRIPT: script.encode(),
        "README.md": readme.render(facts).encode(),
        "submission.json": json.dumps(_summary(facts, about), indent=2, allow_nan=False).encode() + b"\n",
        ARTIFACT: artifact.read_bytes(),
        "train.log": _without_folders(log.read_text(encoding="utf-8", errors="replace"), folder).encode(),
    }
    _write_own(out, files)
    for warning in facts["warnings"]:
        logger.warning("WARNING: %s", warning)
    return {
        "script, readable": len(forms.readable.encode()),
        "script, minified": len(forms.minified.encode()),
        "script, compressed": len(forms.wrapped.encode()),
        "code": code,
        "+ artifact": weights,
        "= total": code + weights,
        "limit": LIMIT_BYTES,
    }


def _warnings(config: RunConfig, about: About, scores: dict[str, Any]) -> list[str]:
    """Return the reasons why the submission cannot be compared with others."""
    warnings = [
        f"{value!r} is a placeholder: give --{option}"
        for option, value in (("author", about.author), ("github-id", about.github_id))
        if value.strip().strip("<>").lower() in _PLACEHOLDERS
    ]
    count = scores["non_overlapping"]["bytes"]
    if not math.isclose(count, OFFICIAL_BYTES, rel_tol=1e-3):
        scored = f"{count:,} bytes of text, the challenge's validation set has about {OFFICIAL_BYTES:,}"
        warnings.append(f"the scores are of {scored}: they are not comparable with scores of the challenge")
    if config.data.path or config.data.tokenizer:
        warnings.append(f"{ARTIFACT} names a folder of this machine: pack and score the run again")
    return warnings


def _without_folders(text: str, folder: RunFolder) -> str:
    """Shorten the paths in a log to their last component, so that a submission reveals no local folders."""
    data = folder.read_config().data
    for place in filter(None, (data.tokenizer, data.path, str(folder.path.absolute()))):
        if os.path.isabs(place):
            text = text.replace(place, Path(place).name)  # paths may contain spaces
    text = re.sub(r"(['\"])~?/[^'\"\n]*/([^'\"\n/]+)\1", r"\1\2\1", text)
    return re.sub(r"(^|[^\w/.:~])~?/(?:[^\s/]+/)*(?=[^\s/])", r"\1", text, flags=re.M)


def _write_own(out: Path, files: dict[str, bytes]) -> None:
    """Write files, replacing only those that an earlier call wrote. Raises PgolfError if others exist."""
    record, kept = out / _WRITTEN, []
    written = read_json(record) if record.is_file() else {}  # name -> digests of all versions
    for name, content in files.items():
        file, known = out / name, [*written.get(name, ()), hashlib.sha256(content).hexdigest()]
        own = file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() in known
        if own or not os.path.lexists(file):
            written[name] = known
        elif name in written and name in ("README.md", "submission.json"):  # users edit these
            kept.append(name)
            logger.warning("WARNING: kept %s, changed since it was written; remove it for a new one", file)
        else:
            raise PgolfError(f"pgolf submit did not write {file}: move it, or choose another --out")
    write_json(record, written)
    for name in files.keys() - kept:
        write_bytes(out / name, files[name])


def _check_network(model: ModelConfig) -> None:
    """Raise PgolfError for a part of the network that the evaluation script lacks."""
    for name in _LACKING:
        same = getattr(model, name) == getattr(ModelConfig(), name)
        hint = "`pgolf eval` scores the artifact, and a submission needs a model without it"
        need(same, f"the evaluation script has no model.{name} {getattr(model, name)}: {hint}")


def _check_script(ttt: TTTConfig, codecs: set[str]) -> None:
    hint = f"only {', '.join(_ADAPTERS)}: set one of these in config.json, pack and score again"
    need(ttt.adapter in _ADAPTERS, f"the evaluation script has no ttt.adapter {ttt.adapter}, {hint}")
    unknown = " and ".join(sorted(codecs.difference(_CODECS)))
    hint = f"only {', '.join(_CODECS)}: pack again with --pack.codecs rans lzma, and score again"
    need(not unknown, f"the evaluation script cannot read {unknown}, {hint}")


def _scores(folder: RunFolder, config: RunConfig, digest: str) -> dict[str, Any]:
    """Read the scores. Raises PgolfError if they belong to another artifact or other settings."""
    path = folder.need(folder.path / "scores_artifact.json", "eval")
    scores = read_scores(path)
    again = f"run `{command('eval', folder.path)}` again"
    need(scores.get("artifact_sha256") == digest, f"{path} holds the scores of another artifact: {again}")
    for group in ("eval", "ttt"):
        other = f"other {group} settings than those in the artifact, which the script uses"
        hint = f"{again} without --{group} options, or change config.json and pack again"
        same = scores.get(group) == asdict(getattr(config, group))
        need(same, f"{path} was computed with {other}: {hint}")
    return scores


def _facts(folder: RunFolder, config: RunConfig, about: About) -> dict[str, Any]:
    """Return what the README and submission.json say about the run, except scores and sizes."""
    path, model, quant = folder.path / "env.json", config.model, config.quant
    widths = "int2 to int8 (a rate-distortion grid)" if quant.grid == "rd" else f"int{quant.bits}"
    environment = read_json(path) if path.is_file() else {}
    steps = [line for line in folder.history() if line["kind"] == "step"]
    cpu = f"{environment.get('processor') or 'CPU'}, {environment.get('cpu_threads')} threads"
    size = f"{model.num_layers} layers x {model.model_dim}, {model.num_parameters():,} parameters"
    tables = f"int{quant.table_bits}" if quant.grid == "sdclip" and quant.tables == "int8" else quant.tables
    stored = f"{widths} weights ({quant.method}) and {tables} tables, entropy-coded"
    blurb = f"{size}, {model.mlp_activation} MLP; {stored}; scored with legal test-time training."
    return {
        "config": config,
        "name": about.name or config.name,
        "blurb": about.blurb or blurb,
        "hardware": str(environment.get("gpu") or cpu),
        "environment": {"torch": None, "pgolf_fast": None, **environment},
        # none for imported weights
        "training": {"steps": steps[-1]["step"], "seconds": steps[-1]["elapsed"]} if steps else None,
        "tokenizer": hashlib.sha256(folder.tokenizer_file.read_bytes()).hexdigest(),
        "changes": _changes(config),
        "widths": widths,
    }


def _summary(facts: dict[str, Any], about: About) -> dict[str, Any]:
    """Return the contents of submission.json: the community's fields first, then ours."""
    training, best = facts["training"], facts["scores"]["sliding_ttt"]
    return {
        **asdict(about),
        "name": facts["name"],
        "blurb": facts["blurb"],
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "val_loss": best["loss"],
        "val_bpb": best["bpb"],
        "bytes_total": facts["code"] + facts["weights"],
        "bytes_code": facts["code"],
        "bytes_model": facts["weights"],
        "hardware": facts["hardware"],
        "seed": facts["config"].train.seed,
        "step_stop": training and training["steps"],
        "wallclock_seconds": training and round(training["seconds"], 1),
        "scores": {name: facts["scores"][name] for name in _SCORES},
        "artifact_sha256": facts["digest"],
    }


def _changes(config: RunConfig) -> list[str]:
    try:
        before = dict(flatten(preset(config.name)))
    except PgolfError:
        return ["not comparable: no preset has this name"]
    return [
        f"`{name} {value}`"
        for name, value in flatten(config)
        if before.get(name, ...) != value and not name.startswith(_NOT_SHOWN)
    ]


@dataclass(frozen=True)
class Script:
    """The evaluation script in three equivalent forms, each a complete Python file."""

    readable: str  # the concatenated sources
    minified: str  # without comments, docstrings and long names
    wrapped: str  # the minified one, compressed, which unpacks itself when run


def build_script(sha256: str = "") -> Script:
    """Build the script for the artifact with that digest (64 hexadecimal digits), or for any artifact.

    Deterministic for one version of Python, liblzma and python-minifier.
    """
    readable, minified, packed = _parts()
    digest = f'{_DIGEST} = "{sha256}"'
    line = digest.replace(" ", "") + "\n"
    return Script(readable.replace(_NO_DIGEST, digest, 1), line + minified, line + _WRAP.format(packed))


def code_bytes() -> int:
    """Return the size of the wrapped script, which counts against the limit. The artifact does not matter."""
    return len(build_script("0" * 64).wrapped.encode())


@functools.cache
def _parts() -> tuple[str, str, str]:
    """Return the readable script, the minified one without its digest, and the latter in base 85."""
    readable = _bundle()
    if readable.count(_NO_DIGEST) != 1:
        raise AssertionError(f"the script must have the line {_NO_DIGEST} exactly once")
    minified = _minify(readable.replace(_NO_DIGEST, "", 1))
    # the smallest .lzma stream over all settings of the literal and position bits
    shared = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 16}
    settings = [{**shared, "lc": lc, "pb": pb} for lc in range(5) for pb in range(3)]
    data = minified.encode()
    packed = min((lzma.compress(data, lzma.FORMAT_ALONE, filters=[f]) for f in settings), key=len)
    return readable, minified, base64.b85encode(packed).decode()


def _bundle() -> str:
    """Concatenate the script's modules into one readable file, each after those it imports."""
    head: list[str] = []
    imports: set[str] = set()
    bodies: dict[str, str] = {}
    origins: dict[str, str] = {}

    def define(name: str, origin: str) -> None:
        if origins.setdefault(name, origin) != origin:
            why = f"{name} comes from {origins[name]} and from {origin}"
            raise AssertionError(f"{why}: one file can have only one")

    def add(module: str) -> None:
        path = Path(pgolf_fast.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pgolf_fast."):
                if str(node.module) not in bodies:
                    add(str(node.module))
                for alias in node.names:
                    define(alias.asname or alias.name, str(node.module))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    one = type(node)(**{**vars(node), "names": [alias]})
                    define(alias.asname or alias.name.split(".")[0], ast.unparse(one))
                    imports.add(ast.unparse(one))
            elif module == _MAIN and isinstance(node, ast.Expr) and not head:  # its docstring
                head.append(ast.unparse(node))
            else:
                for name in _names(node):
                    define(name, module)
                continue
            end = node.end_lineno or node.lineno
            lines[node.lineno - 1 : end] = [""] * (end - node.lineno + 1)
        bodies[module] = "".join(lines).strip()

    add(_MAIN)
    imports.discard("from __future__ import annotations")
    return "\n\n".join([*head, "\n".join(sorted(imports)), *bodies.values()]) + "\n"


def _names(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    for target in (*getattr(node, "targets", ()), *filter(None, (getattr(node, "target", None),))):
        yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _minify(source: str) -> str:
    """Shorten the source with python-minifier if it is installed, else drop comments and docstrings."""
    if find_spec("python_minifier") is not None:
        import python_minifier

        rule: dict[str, Any] = {"rename_globals": True, "preserve_globals": [_DIGEST]}
        rule |= {"remove_literal_statements": True, "hoist_literals": False}  # repeats compress to nothing
        return python_minifier.minify(source, **rule)
    logger.warning("python-minifier is not installed (extra 'submit'): the script keeps its long names")
    tree, documented = ast.parse(source), (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"
