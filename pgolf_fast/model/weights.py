"""Weights from files of many kinds, checked strictly against the model."""

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from pgolf_fast.console import Table, logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors

Tensors = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
_FOREIGN = {  # first bytes of files that are taken for weights
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: get that with `git lfs pull`",
    b"\x89PGOLF": "an artifact, which holds no float weights: `pgolf eval` scores it as it is",
    b"<": "an HTML or XML page, not weights: download the file itself",
    b"{": "JSON, not weights: give the file with the tensors",
    b"[": "JSON, not weights: give the file with the tensors",
    b"GGUF": "a GGUF file: give the weights it was made from",
    b"\x93NUMPY": "a NumPy file: give named tensors, as torch.save or safetensors write them",
    b"\x89HDF": "an HDF5 file: give named tensors, as torch.save or safetensors write them",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
}
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ANCHOR = re.compile(
    r"(?:.*\.)?(?=(?:tok_emb\.weight|qo_bank)$)"
)  # what precedes a name that every model has
_LAST = re.compile("ema|avg|average|swa|shadow|teacher|optim|muon|adam|moment|grad", re.IGNORECASE)


def not_finite(tensor: Tensor) -> str | None:
    """Say how many values are NaN or, in float32, infinite; None if there are none."""
    if not tensor.is_floating_point() or bool(torch.isfinite(wide := tensor.float()).all()):
        return None
    counts = {"NaN": wide.isnan(), "infinite": tensor.double().isinf()}
    counts["beyond float32"] = wide.isinf() & ~counts["infinite"]
    found = {kind: int(where.sum()) for kind, where in counts.items()}
    return " and ".join(f"{n:,} of {wide.numel():,} values are {kind}" for kind, n in found.items() if n)


def load_weights(
    model: nn.Module,
    tensors: Tensors,
    origin: str,
    *,
    assign: bool = False,
    columns: bool = False,
    finite: bool = True,
) -> None:
    """Copy weights into a model, or let it use them with `assign`.

    Raises PgolfError listing names and shapes of `origin` that do not fit, with `columns` as a table, or
    naming the first tensor with values that are not finite, if `finite`.
    """
    expected, given = ({n: tuple(t.shape) for n, t in s.items()} for s in (model.state_dict(), tensors))
    if expected != given:
        shown = _differences(expected, given) if columns else _problems(expected, given)
        raise PgolfError(f"{origin} holds another model: {shown}")
    for name, tensor in tensors.items() if finite else ():
        if problem := not_finite(tensor):
            raise PgolfError(f"{origin}: {name}: {problem}: the run diverged, use an earlier checkpoint")
    model.load_state_dict(tensors, strict=True, assign=assign)


def _problems(expected: Shapes, given: Shapes) -> str:
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} is {given[name]}, the model needs {shape}"
        for name, shape in expected.items()
        if given.get(name, shape) != shape
    ]
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def _differences(expected: Shapes, given: Shapes) -> str:
    """Tabulate the first differences, each missing name beside the unexpected one that is most like it."""
    wrong = [name for name, shape in expected.items() if shape != given.get(name)]
    extra, rows = [name for name in given if name not in expected], []
    missing = sum(name not in given for name in wrong)
    counts = f"{missing} names are missing, {len(extra)} unexpected, {len(wrong) - missing} of another shape"
    for name in wrong[:12]:
        other = [name] if name in given else get_close_matches(name, extra, 1)
        extra = [name for name in extra if name not in other]
        rows.append(
            (f"{name} {expected[name]}", *(f"{n} {given[n]}" for n in other or ())) if other else (name, "-")
        )
    rows += [("-", f"{name} {given[name]}") for name in extra[: 16 - len(rows)]]
    return f"{counts}; is it of another preset or --shrink?\n{Table(('expected', 'in the file'), rows)}"


def read_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights in a safetensors file or in what `torch.save` wrote, whatever the file is called.

    They may be an entry of a training checkpoint, and their names may have prefixes such as `module.`. Of
    several sets, the one under `key` is taken, or the first that is no average; a log line names it. No
    pickled code is run. Raises PgolfError saying what else the file is, or why its tensors are no weights.
    """
    if path.is_dir():
        hint = f"a run folder needs no import: go on with `pgolf quantize {path}`"
        raise PgolfError(f"{path} is a folder, not a file of weights; {hint}")
    with open(path, "rb") as file:
        head = file.read(512)
    # a safetensors file begins with the 8 bytes of its header's length, which is JSON
    tree: object = load_tensors(path)[0] if head[4:9] == b"\0\0\0\0{" else _unpickled(path, head)
    sets = _sets(tree)
    if not sets:
        keys = f", only {', '.join(map(str, list(tree)[:8]))}" if isinstance(tree, Mapping) and tree else ""
        raise PgolfError(f"{path} holds no named tensors{keys}: it is not a state dict of tensors")
    if key is not None and key not in sets:
        raise PgolfError(f"{path} has no weights under {key!r}, only under {', '.join(map(repr, sets))}")
    taken = key if key is not None else min(sets, key=lambda name: bool(_LAST.search(name)))
    if others := [repr(name) for name in sets if name != taken]:
        logger.info("%s: took the weights under %r; it also holds %s", path, taken, ", ".join(others[:8]))
    for name, tensor in sets[taken].items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or not tensor.is_floating_point():
            kind = "no values" if tensor.is_meta else str(tensor.dtype if dense else tensor.layout)[6:]
            kind += " codes without their scales" if kind in ("int8", "uint8") else ""
            raise PgolfError(f"{path}: {name} holds {kind}: give dense floating-point weights")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise PgolfError(f"{path}: {name} is larger than its values in the file: save a copy of it")
    return sets[taken]


def _unpickled(path: Path, head: bytes) -> object:
    """Return what `torch.save` wrote, without running code. Raises PgolfError for any other file."""
    text = head.lstrip(b"\xef\xbb\xbf\t\r\n ")
    problem = next((what for start, what in _FOREIGN.items() if text.startswith(start)), "")
    if not head:
        problem = "empty: download or copy it again"
    elif not problem and re.fullmatch(rb"[\t\r\n -~]*", text):
        problem = "text, not weights: give the file with the tensors"
    elif text.startswith(b"PK\3\4"):
        problem = _zip_problem(path)
    if problem:
        raise PgolfError(f"{path} is {problem}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - of many types; their texts advise to load unsafely
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
    why = "it is damaged, truncated or not of torch.save: download or copy it again"
    if asked is not None:
        why = f"it calls for {asked[1]}, and no code of a file is run: ask for its state dict, as safetensors"
    raise PgolfError(f"{path} cannot be read as tensors: {why}")


def _zip_problem(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry.compress_type for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError):
        return "truncated or damaged: download or copy it again"
    if any(name.endswith("constants.pkl") for name in entries):
        return "a TorchScript program, not weights: save its state_dict() instead"
    if not any(name.endswith("data.pkl") for name in entries):
        return (
            f"a zip file of {', '.join(list(entries)[:3]) or 'nothing'}, not of torch.save: unpack it first"
        )
    return "compressed after torch.save: unpack it first" if any(entries.values()) else ""


def _sets(tree: object) -> dict[str, dict[str, Tensor]]:
    """Return every set of named tensors in nested dicts, by its dotted place with the prefix of its names."""
    sets: dict[str, dict[str, Tensor]] = {}
    other: dict[str, dict[str, Tensor]] = {}  # without a name that every model has
    queue, seen = [("", tree)], set[int]()
    for place, node in queue:  # which grows meanwhile
        if not isinstance(node, Mapping) or id(node) in seen:
            continue
        seen.add(id(node))
        queue += [(f"{place}{name}.", inner) for name, inner in node.items()]
        tensors = {_WRAPPERS.sub("", str(n)): t for n, t in node.items() if isinstance(t, Tensor)}
        usual = re.match(r"((module|model)\.)*", os.path.commonprefix(list(tensors)))  # noqa: RUF071
        prefixes = sorted({found[0] for found in map(_ANCHOR.match, tensors) if found})
        for prefix in prefixes or [usual[0] if usual else ""]:
            of = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            if of:
                (sets if prefixes else other)[(place + prefix).rstrip(".")] = of
    return sets or dict(sorted(other.items(), key=lambda item: -len(item[1]))[:1])
