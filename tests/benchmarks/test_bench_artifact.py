"""The artifact benchmark: synthetic artifacts, bounds, peers, limits, and a rehearsal from end to end."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf_fast.config.presets import exp101, tiny
from pgolf_fast.quant.state import QuantizedTensor, is_slot

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def smoke_artifact(tmp_path, spread=0.25):
    from bench_artifact import config_of
    from synthetic_artifact import synthetic, write_artifact

    config = config_of(argparse.Namespace(smoke=True))
    made = synthetic(config.model, rows=spread, columns=spread)
    write_artifact(tmp_path, made.quantized, config)
    return made


def test_synthetic_artifact_has_the_statistics_of_the_original():
    from synthetic_artifact import synthetic, unbanked_shapes

    shapes = unbanked_shapes(exp101().model)
    slots = [shape for name, shape in shapes.items() if is_slot(name)]
    assert (len(slots), sum(map(math.prod, slots)), len(shapes)) == (66, 25_952_256, 124)
    config = tiny().model
    made, again = synthetic(config), synthetic(config)
    codes = torch.cat([m.codes.flatten() for m in made.quantized.matrices().values()])
    other = torch.cat([m.codes.flatten() for m in again.quantized.matrices().values()])
    assert torch.equal(codes, other)
    assert int(codes.abs().max()) <= 31
    # spec: about 4.32 bits a weight and 4.2 M codes of +-1 among 26 M
    assert made.oracle_bits / len(codes) == pytest.approx(4.32, abs=0.01)
    assert float((codes.abs() == 1).float().mean()) == pytest.approx(0.162, abs=0.002)
    assert {float(s) for m in made.quantized.matrices().values() for s in m.scale} == {
        float(np.float16(1 / 31))
    }


def test_bounds_are_entropies():
    from synthetic_artifact import synthetic

    from pgolf_fast.lab.analysis.artifact_bytes import static_bounds

    halves = np.repeat(np.array([[1], [9]], np.int8), 64, axis=1)
    found = static_bounds([halves, halves[:1]])
    assert found["order 0"].bytes == pytest.approx(128 / 8)  # one bit a code of the first matrix
    assert found["row"].bytes == found["row x column"].bytes == 0
    made = synthetic(tiny().model, rows=0.25, columns=0.25)
    matrices = [m.codes.numpy() for m in made.quantized.matrices().values()]
    found = static_bounds(matrices)
    assert min(found, key=lambda name: found[name].bytes) == "row x column"
    # rows and columns that are found are as good as those that were drawn
    assert found["row x column"].bytes == pytest.approx(made.oracle_bits / 8, rel=0.005)
    assert found["row"].bytes > 1.01 * found["row x column"].bytes


def test_reference_layout_holds_the_artifact(tmp_path):
    from synthetic_artifact import CODES, read_artifact

    made = smoke_artifact(tmp_path)
    quantized, config = read_artifact(tmp_path)
    assert config["name"] == "smoke"
    assert list(quantized.tensors) == list(made.quantized.tensors)
    for name, tensor in made.quantized.tensors.items():
        again = quantized.tensors[name]
        if isinstance(tensor, QuantizedTensor):
            assert (tensor.bits, tensor.scale.tolist()) == (again.bits, again.scale.tolist())
            tensor, again = tensor.codes, again.codes
        assert torch.equal(tensor, again)
    codes = b"".join(m.codes.numpy().tobytes() for m in quantized.matrices().values())
    assert (tmp_path / CODES).read_bytes() == codes


def test_every_installed_peer_restores_the_file(tmp_path, monkeypatch):
    import artifact_worker

    (tmp_path / "reference.pt").write_bytes(b"abracadabra" * 200)
    (tmp_path / "codes.bin").write_bytes(b"abra" * 100)
    monkeypatch.setattr(artifact_worker, "ZSTD_WINDOW_LOG", 20)
    for name in artifact_worker.PEERS:
        found = artifact_worker.measure(name, tmp_path)
        assert "not installed" in found.get("skipped", "") or found["bytes"] < 2200, name
    assert "skipped" not in artifact_worker.measure("lzma 9", tmp_path)
    broken = "loses a byte", lambda: (lambda b: b, lambda b: b[1:])
    monkeypatch.setitem(artifact_worker.PEERS, "zlib 9", broken)
    with pytest.raises(RuntimeError, match="zlib 9 gave back other bytes"):
        artifact_worker.measure("zlib 9", tmp_path)


def test_results_are_compared_with_limits():
    from bench_artifact import verdicts

    def contender(size, seconds):
        return {"bytes": size, "codes_bytes": size, "encode_s": seconds, "decode_s": seconds}

    found = {
        "bounds": {"order 0": {"bytes": 90.0}, "oracle": {"bytes": 89.0}},
        "best_bound": "order 0",
        "contenders": {
            "lzma 9": contender(100, 10.0),
            "bz2 9": contender(95, 1.0),
            "zpaq 5": {"skipped": "-"},
        },
    }
    step = {"seconds": 9.0, "peak_mib": 100.0, "bytes_below": 201}
    for ours, kept in (((90, 0.1), "yes"), ((96, 4.0), "NO")):
        found["contenders"]["container"] = contender(*ours)
        rows = verdicts({"artifacts": {"equal": found}, "pipeline": {}})
        assert [row[-1] for row in rows if row[-1] != "-"] == [kept] * 6, rows
        assert [row[1] for row in rows if row[-1] == "-"] == ["0.89"]
        assert "best peer bz2 9" in rows[0][0]
    rows = verdicts({"artifacts": {}, "pipeline": {"prune": step}})
    assert [row[-1] for row in rows] == ["yes", "yes", "NO"]


@pytest.mark.slow
def test_artifact_benchmark_can_be_rehearsed(tmp_path):
    words = [
        "--smoke",
        "--artifacts",
        "spread",
        "--contenders",
        "lzma 9",
        "zstd 3",
        "container",
        "rans, codes only, numpy",
    ]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "bench_artifact.py"), *words, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "artifact.json").read_text())
    spread = found["artifacts"]["spread"]
    assert {"order 0", "row", "row x column", "oracle"} <= spread["bounds"].keys()
    container = spread["contenders"]["container"]
    assert container["bytes"] < spread["contenders"]["lzma 9"]["bytes"] < spread["reference_bytes"]
    assert sum(size for _, size in container["sections"].values()) < container["bytes"]
    assert list(found["pipeline"]) == ["gptq", "pack", "load", "prune", "land"]
    assert found["pipeline"]["prune"]["bytes_below"] >= 0
    assert all(step["peak_mib"] > 10 for step in found["pipeline"].values())
    assert (tmp_path / "artifact.txt").read_text() == done.stdout
