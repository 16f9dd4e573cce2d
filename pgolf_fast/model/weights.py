"""Weights from files of several formats, checked strictly against the model."""

import re
import warnings
import zipfile
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from pgolf_fast.console import Table, logger
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import load_tensors

Tensors = Mapping[str, Tensor]
_FOREIGN = {  # first bytes of files that may be mistaken for weights
    rb"\Z": "empty: download or copy it again",
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: get that with `git lfs pull`",
    rb"\x89PGOLF": "an artifact, which holds no float weights: `pgolf eval` scores it as it is",
    rb"(\xef\xbb\xbf)?\s*<": "an HTML or XML page, not weights: download the file itself",
    rb"(\xef\xbb\xbf)?\s*[{[]": "JSON, not weights: give the file with the tensors",
    rb"[\t\r\n -~]*\Z": "text, not weights: give the file with the tensors",
    rb"GGUF|\x93NUMPY|\x89HDF": "of GGUF, NumPy or HDF5: give named tensors of torch.save or safetensors",
    rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh|7z\xbc": "compressed: unpack it first",
}
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_KNOWN = re.compile(r"(.*\.)?(tok_emb\.weight|qo_bank)")  # names in every model, with any prefix
_LAST = re.compile("ema|avg|average|swa|shadow|teacher|optim|muon|adam|moment|grad", re.IGNORECASE)


def not_finite(tensor: Tensor) -> str | None:
    """Say how many values are NaN or, as float32, infinite; None if there are none."""
    if bool((wide := tensor.float()).isfinite().all()):
        return None
    counts = {"NaN": int(wide.isnan().sum()), "infinite as float32": int(wide.isinf().sum())}
    return " and ".join(f"{n:,} of {wide.numel():,} values are {kind}" for kind, n in counts.items() if n)


def need_finite(tensors: Tensors, origin: str) -> None:
    """Raise PgolfError naming the first tensor of `origin` with values that are not finite."""
    for name, tensor in tensors.items():
        if problem := not_finite(tensor):
            raise PgolfError(f"{origin}: {name}: {problem}: the run diverged, use an earlier checkpoint")


def load_weights(
    model: nn.Module, tensors: Tensors, origin: str, *, assign: bool = False, table: bool = False
) -> None:
    """Copy weights into a model, or let it use them with `assign`.

    Raises PgolfError listing names and shapes of `origin` that do not fit, in one line or as a `table`.
    """
    expected, given = ({n: tuple(t.shape) for n, t in s.items()} for s in (model.state_dict(), tensors))
    names = ([n for n in a if n not in b] for a, b in ((expected, given), (given, expected)))
    rows = [*zip_longest(*names, fillvalue="nothing")]
    rows += [(f"{n} {s}", f"{n} {given[n]}") for n, s in expected.items() if given.get(n, s) != s]
    if rows:
        shown = "; ".join(f"missing {a}" if b == "nothing" else f"{a} / {b}" for a, b in rows[:8])
        if table and len(rows) > 1:
            shown = f"\n{Table(('expected', 'in the file'), rows[:16])}"
        hint = "is it of another preset or --shrink?"
        count = "1 difference" if len(rows) == 1 else f"{len(rows)} differences"
        raise PgolfError(f"{origin} holds another model, {hint} {count}: {shown}")
    model.load_state_dict(tensors, strict=True, assign=assign)


def read_weights(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read the weights in a safetensors file or in what `torch.save` wrote, whatever the file is called.

    They may be an entry of a training checkpoint, and their names may have prefixes such as `module.`. Of
    several sets, the one under `key` is used, or the first that is not an average; the choice is logged. No
    pickled code is run. Raises PgolfError that says why the file or its tensors cannot be used.
    """
    if path.is_dir():
        raise PgolfError(f"{path} is a folder, not a file of weights; `pgolf quantize` continues from a run")
    with open(path, "rb") as file:
        head = file.read(512)
    # a safetensors file begins with the length of its header, 8 bytes, and the header is JSON
    tree: object = load_tensors(path)[0] if head[4:9] == b"\0\0\0\0{" else _unpickled(path, head)
    sets = _sets(tree)
    if not sets:
        keys = list(map(ascii, tree))[:8] if isinstance(tree, Mapping) else [type(tree).__name__]
        held = ", ".join(keys) or "nothing"
        raise PgolfError(f"{path} is not a state dict of tensors: it holds only {held}")
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
    if problem := next((what for begins, what in _FOREIGN.items() if re.match(begins, head)), None):
        raise PgolfError(f"{path} is {problem}")
    try:
        # an open file, because torch.load trusts the suffix .safetensors
        with warnings.catch_warnings(), open(path, "rb") as file:
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - many types; their messages suggest unsafe loading
        text = str(error)
    why = "it is damaged, truncated or not of torch.save: download or copy it again"
    if asked := re.search(r"GLOBAL ([\w.]+)", text):
        why = f"it calls for {asked[1]}, and no code of a file is run: ask for its state dict, as safetensors"
    elif zipfile.is_zipfile(path):
        why = "it is a zip file, such as TorchScript, but no state_dict() of torch.save: give that"
    raise PgolfError(f"{path} cannot be read as tensors: {why}")


def _sets(tree: object) -> dict[str, dict[str, Tensor]]:
    """Return the sets of named tensors in nested dicts, by dotted place and prefix of their names.

    If no set has the names of a model, return the largest.
    """
    sets: dict[str, dict[str, Tensor]] = {}
    largest: dict[str, Tensor] = {}
    queue, seen = [("", tree)], set[int]()
    for place, node in queue:  # the loop appends to it
        if isinstance(node, Mapping) and id(node) not in seen:
            seen.add(id(node))
            queue += [(f"{place}{name}.", inner) for name, inner in node.items()]
            named = {str(n).encode("unicode_escape").decode(): t for n, t in node.items()}
            tensors = {_WRAPPERS.sub("", n): t for n, t in named.items() if isinstance(t, Tensor)}
            for prefix in sorted({found[1] or "" for found in map(_KNOWN.fullmatch, tensors) if found}):
                of = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                sets[(place + prefix).rstrip(".")] = of
            largest = max(largest, tensors, key=len)
    return sets or ({"": largest} if largest else {})
