"""Read named tensors from an artifact (docs/artifact.md)."""

import hashlib
import json
import lzma
import math
import re
import struct
import sys
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from pgolf_fast.artifact.rans_decoder import decode

SHA256 = ""  # digest of the artifact this script was written for; empty accepts any
DTYPES = ("i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<f2", "<f4")
BANKS = (("attn.c_q", "attn.proj"), ("attn.c_k", "attn.c_v"), ("mlp.fc",), ("mlp.proj",))


def read_artifact(content: bytes) -> tuple[SimpleNamespace, dict[str, np.ndarray]]:
    """Return the configuration and the arrays by name. Exits with a message if the digest does not match."""
    digest = hashlib.sha256(content[:-32])
    if content[:8] != b"\x89PGOLF\r\n" or digest.digest() != content[-32:]:
        sys.exit("the artifact is damaged: its SHA-256 does not match its bytes")
    if SHA256 not in ("", digest.hexdigest()):
        sys.exit(f"this is another artifact: its SHA-256 is {digest.hexdigest()}, not {SHA256}")
    codec, stored, raw = struct.unpack_from("<III", content, 12)
    at = 36 + stored
    header = decompress(codec, content[36:at], raw, [])
    place = 0

    def unpack(form: str) -> tuple:
        nonlocal place
        place += struct.calcsize(form)
        return struct.unpack_from(form, header, place - struct.calcsize(form))

    config = unpack(f"{unpack('<I')[0]}s")[0]
    sections = [unpack("<BBQQI") for _ in range(unpack("<H")[0])]
    tensors = []
    for _ in range(unpack("<I")[0]):
        section, _, dtype, dimensions = unpack("4B")
        shape = unpack(f"<{dimensions}I")
        name = unpack(f"{unpack('<H')[0]}s")[0].decode()
        tensors.append((section, name, shape, np.dtype(DTYPES[dtype])))
    arrays = {}
    for number, codec, raw, stored, _ in sections:
        inside = [tensor for section, *tensor in tensors if section == number]
        shapes = [(math.prod(s[:-1]), s[-1] if s else 1, dtype.itemsize) for _, s, dtype in inside]
        data, begin = decompress(codec, content[at : at + stored], raw, shapes), 0
        at += stored
        for name, shape, dtype in inside:
            arrays[name] = np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape)
            begin += arrays[name].nbytes
    config = json.loads(config, object_hook=lambda tree: SimpleNamespace(**tree))
    return config, {name: arrays[name] for _, name, *_ in tensors}


def decompress(codec: int, stored: bytes, raw: int, shapes: list) -> bytes:
    """Decode `stored` to `raw` bytes."""
    if codec > 2:
        why = "zstd or brotli, which Python does not include: pack it with rans and lzma"
        sys.exit(f"the artifact needs {why}")
    if codec == 2:
        return decode(stored, shapes)
    return lzma.decompress(stored) if codec else stored


def dequantized(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], ...]:
    """Return tensors by name; for matrices, also the steps (R, 1) or (R, C), and the additive correction.

    A matrix X is the codes X.q (R, C) times the step X.scale (R,) of each row and X.columns (C,) of each
    column, which K and V share with Q, plus X.left (R, k) times X.right (k, C), which may be codes in turn,
    in another shape. The 64 columns from X.first on may have row steps of their own, X.wide. Either all
    matrices have corrections or none. Everything is float32.
    """
    wide = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    factors = [name[:-2] for name in wide if re.search(r"\.(left|right)\.q$", name)]
    wide |= {name: wide.pop(name + ".q") * wide.pop(name + ".scale")[:, None] for name in factors}
    tensors, steps, shifts = dict(wide), {}, {}
    corrected = any(name.endswith(".left") for name in wide)
    protected = any(name.endswith(".wide") for name in wide)
    for name in [name[:-2] for name in wide if name.endswith(".q")]:
        columns = re.sub("attn.c_[kv]", "attn.c_q", name) + ".columns"
        codes = wide[name + ".q"]
        step = wide[name + ".scale"][:, None] * wide.get(columns, 1)
        if protected:
            step = step.repeat(1, codes.shape[1])
            first = int(wide.get(name + ".first", 0))
            if name + ".wide" in wide:
                step[:, first : first + 64] = wide[name + ".wide"][:, None]
        steps[name], tensors[name] = step, codes * step
        if corrected:
            left, shifts[name] = name + ".left", torch.zeros_like(codes)
            if left in wide:
                pair = wide[left].view(len(codes), -1), wide[name + ".right"].view(-1, codes.shape[1])
                shifts[name] = pair[0] @ pair[1]
            tensors[name] += shifts[name]
        for part in ".q", ".scale", ".columns", ".left", ".right", ".first", ".wide":
            tensors.pop(name + part, None)
    return tensors, steps, shifts


def banked(tensors: dict[str, Tensor], layers: int) -> list[Tensor]:
    """Stack the four banks from matrices, which are removed from `tensors`."""
    names = [[f"blocks.{i}.{slot}.weight" for slot in slots for i in range(layers)] for slots in BANKS]
    return [torch.stack([tensors.pop(name) for name in bank]) for bank in names]
