"""`pgolf tune` finds fast and right tiles, and the cache file is used where it applies."""

import time
from dataclasses import replace

import pytest
import torch

from pgolf_fast.bench import timer, tune
from pgolf_fast.bench.tune import tune_table
from pgolf_fast.cli import main
from pgolf_fast.config.presets import tiny
from pgolf_fast.errors import PgolfError
from pgolf_fast.ops import cases, tiles, tuned
from pgolf_fast.ops.tiles import Tile


@pytest.fixture
def fake_kernel(monkeypatch):
    """A kernel in the table, and an op whose time (by its own clock) and result depend on its tile."""
    monkeypatch.setattr(tiles, "_table", {"fake": {a: Tile(64, 64) for a in ("sm80", "sm90", "sm100")}})
    entry, clock = cases.CASES["smear_gate"], [0.0]

    def make(builder):
        case = entry.make(builder)

        def op(**inputs):
            with tiles.kernels_on_cpu("sm90"):
                tile = tiles.lookup("fake", inputs["x"].bfloat16())
            if tile.num_warps == 8:
                raise RuntimeError("out of resources: shared memory")
            clock[0] += 3 + abs(tile.block_m - 256) / 64 + (tile.num_stages != 4)
            if tile.block_n == 32:  # fast and wrong
                clock[0] -= 2
                return tuple(out + 1 for out in case.op(**inputs))
            return case.op(**inputs)

        return replace(case, op=op)

    def time_in_turn(calls, device, **settings):
        times = {}
        for name, call in calls.items():
            start = clock[0]
            call()
            times[name] = timer.Timing([clock[0] - start])
        return times

    monkeypatch.setitem(cases.CASES, "smear_gate", replace(entry, make=make))
    monkeypatch.setattr(tune, "time_in_turn", time_in_turn)


def tune_plan(**changes):
    values = {
        "config": tiny(),
        "ops": ["smear_gate"],
        "tokens": 32,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
        "runs": 5,
        "candidates": 40,
    }
    return tune.TunePlan(**{**values, **changes})


def test_tuning_finds_the_fast_and_right_tile(fake_kernel):
    done = []
    found = tune.tune(tune_plan(), done.append)
    assert found == done
    (one,) = found
    assert (one.best.block_m, one.best.num_stages, one.best.block_n) == (256, 4, 64)
    assert one.mode == "fwd"
    assert one.wrong > 0
    assert one.failed > 0
    assert any("out of resources" in error for error in one.errors)
    assert (one.table_ms, one.best_ms) == (7, 3)
    assert tiles._table["fake"]["sm90"] == one.best
    assert tiles._table["fake"]["sm80"] == Tile(64, 64)
    assert "fake" in tune_table(found)


def test_tuning_stops_in_time_and_names_unknown_kernels(fake_kernel):
    assert tune.tune(tune_plan(deadline=time.monotonic() - 1), print) == []
    with pytest.raises(PgolfError, match="no kernel 'other': kernels are fake"):
        tune.tune(tune_plan(kernels=("other",)), print)
    one = tune.tune(tune_plan(candidates=2), lambda found: None)[0]
    assert one.tried == 2


def test_neighbors_differ_in_one_field_and_stay_in_range():
    row = Tile(16, 4096, 64, 4, 1)
    found = tune.neighbors(row)
    assert len(found) == len(set(found))
    for other in found:
        changed = [
            name for name, (low, _) in tune.LIMITS.items() if getattr(other, name) != getattr(row, name)
        ]
        assert len(changed) == 1
        assert getattr(other, changed[0]) >= tune.LIMITS[changed[0]][0]
    assert {other.block_n for other in found} == {4096, 2048}


def tuned_row(**changes):
    values = {
        "kernel": "mlp_up",
        "dtype": "bfloat16",
        "gpu": "NVIDIA H200",
        "triton": tuned.triton_version(),
        "source": tuned.source_hash("mlp_up"),
        "tile": Tile(64, 64, 32, 8, 2),
        "ms": 1.0,
        "table_ms": 2.0,
        "measured": "now",
    }
    return tuned.Tuned(**{**values, **changes})


def test_tuned_rows_are_kept_by_key(tmp_path):
    path = tmp_path / "cache" / tuned.FILE_NAME
    assert tuned.read_rows(path) == []
    other = tuned_row(gpu="NVIDIA H100")
    tuned.save_rows(path, [tuned_row(), other])
    tuned.save_rows(path, [tuned_row(ms=0.5)])
    rows = tuned.read_rows(path)
    assert sorted(row.ms for row in rows) == [0.5, 1.0]
    assert tuned.matching(rows, "NVIDIA H200") == [tuned_row(ms=0.5)]
    for stale in ({"triton": "1.0"}, {"source": "0" * 16}, {"dtype": "float32"}, {"kernel": "gone"}):
        assert tuned.matching([tuned_row(**stale)], "NVIDIA H200") == []


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"tiles": [{}]}', '{"tiles": [{"tile": {"block_m": 1}}]}', '{"tiles": 3}']
)
def test_a_spoiled_cache_is_ignored_with_a_warning(tmp_path, caplog, content, monkeypatch):
    monkeypatch.setattr(tuned.console.logger, "propagate", True)
    path = tmp_path / tuned.FILE_NAME
    path.write_text(content)
    assert tuned.read_rows(path) == []
    assert "are ignored" in caplog.text


def test_rows_with_impossible_sizes_are_refused(tmp_path):
    path = tmp_path / tuned.FILE_NAME
    tuned.save_rows(path, [tuned_row()])
    path.write_text(path.read_text().replace('"block_m": 64', '"block_m": -64'))
    assert tuned.read_rows(path) == []


def test_the_environment_names_the_cache_and_switches_it_off(tmp_path, monkeypatch):
    monkeypatch.setenv("PGOLF_FAST_CACHE", str(tmp_path))
    assert tuned.cache_file() == tmp_path / tuned.FILE_NAME
    monkeypatch.delenv("PGOLF_FAST_CACHE")
    assert tuned.cache_file().name == tuned.FILE_NAME
    tuned.save_rows(tmp_path / tuned.FILE_NAME, [tuned_row()])
    monkeypatch.setattr(tiles, "_table", {"mlp_up": {"sm90": Tile()}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("PGOLF_FAST_TUNE", "off")
    path, gpu = tmp_path / tuned.FILE_NAME, torch.device("cuda", 0)
    assert tuned.load_tuned(gpu, path) == 0
    assert tiles._table["mlp_up"]["sm90"] == Tile()
    monkeypatch.delenv("PGOLF_FAST_TUNE")
    assert tuned.load_tuned(gpu, path) == 1
    assert tiles._table["mlp_up"]["sm90"] == Tile(64, 64, 32, 8, 2)


def test_source_hash_follows_the_file_and_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "mlp.py").write_text("from pgolf_fast.kernels.tile import x\n")
    (tmp_path / "tile.py").write_text("x = 1\n")
    (tmp_path / "norm.py").write_text("y = 1\n")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(tuned.util, "find_spec", lambda name: Spec)
    before = {kernel: tuned.source_hash(kernel) for kernel in ("mlp_up", "norm_fwd", "strange")}
    assert len(set(before.values())) == 3
    (tmp_path / "tile.py").write_text("x = 2\n")
    after = {kernel: tuned.source_hash(kernel) for kernel in before}
    assert {kernel for kernel in before if before[kernel] != after[kernel]} == {"mlp_up", "strange"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tune_needs_a_gpu(capsys):
    assert main(["tune"]) == 2
    assert "sees none on this machine" in capsys.readouterr().err
