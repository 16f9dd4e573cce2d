"""Write v1*.pgolf and v1.json: tensors of every kind and dtype, in files that together use every codec."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from pgolf_fast.artifact.container import KINDS, TensorRecord, write_container

CONFIG = {"run": {"name": "golden ✓", "model": {"dim": 48, "rates": [0.1, 1e-30]}}, "bits": {"codes": 6}}
CODECS = {"v1": ("rans", "lzma"), "v1_zstd": ("zstd",), "v1_brotli": ("brotli",)}


def records() -> list[TensorRecord]:
    rng = np.random.default_rng(0)

    def codes(*shape: int, spread: object = 4.0) -> np.ndarray:
        return np.clip(np.rint(rng.normal(0, spread, shape)), -31, 31).astype(np.int8)

    made = [
        TensorRecord("equal.q", "codes", codes(24, 40)),
        TensorRecord("rows.q", "codes", codes(24, 40, spread=np.geomspace(0.3, 12, 24)[:, None])),
        TensorRecord("columns.q", "codes", codes(24, 40, spread=np.geomspace(0.3, 12, 40))),
        TensorRecord("constant.q", "codes", np.full((5, 7), -31, np.int8)),
        TensorRecord("empty.q", "codes", np.zeros((0, 40), np.int8)),
        TensorRecord("equal.scale", "scales", rng.uniform(0.01, 0.02, 24).astype(np.float16)),
        TensorRecord("table", "codes", np.resize(codes(37), (40, 8)), "embeddings"),  # repetitions: LZMA wins
        TensorRecord("ünïcode", "float16", np.array([0, -0.0, np.inf, np.nan, 6e-8], np.float16)),
        TensorRecord("gain", "float32", rng.normal(1, 0.01, (3, 4, 5)).astype(np.float32)),
    ]
    for dtype in KINDS["integer"]:
        limits = np.iinfo(dtype)
        made.append(TensorRecord(dtype, "integer", np.array([limits.min, 1, limits.max], dtype)))
    return [*made, TensorRecord("number", "integer", np.array(7, np.int64))]


def describe(record: TensorRecord) -> list[object]:
    """Return the expected kind, dtype, shape, section and SHA-256 of the little-endian bytes."""
    content = record.array.astype(record.array.dtype.newbyteorder("<")).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    return [record.kind, record.array.dtype.name, list(record.array.shape), record.section, digest]


def main(folder: Path) -> None:
    made = records()
    files = {}
    for name, codecs in CODECS.items():
        sizes = write_container(folder / f"{name}.pgolf", CONFIG, made, codecs=codecs)
        used = {section.name: section.codec for section in sizes.sections}
        files[name] = {"sha256": sizes.sha256, "bytes": sizes.total_bytes, "codecs": used}
    content = {"files": files, "config": CONFIG, "tensors": {r.name: describe(r) for r in made}}
    (folder / "v1.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
