"""What an artifact's bytes are spent on: entropy bounds, the table, the treemap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import randomize_, tiny_config

from pgolf_fast.artifact.pack import pack
from pgolf_fast.config.schema import PackConfig, QuantConfig, RunConfig
from pgolf_fast.lab.analysis.artifact_bytes import REFERENCE, artifact_table, plane_bound, static_bounds
from pgolf_fast.lab.report.plots import paint_treemap, plot_treemap
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import native
from pgolf_fast.quant.state import quantize_state


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    config = tiny_config()
    model = GPT(config)
    randomize_(model, 0)
    quantized = quantize_state(model.state_dict(), QuantConfig(method="round", small_tensor=600))
    path = tmp_path_factory.mktemp("artifact") / "model.pgolf"
    run = RunConfig(name="test", model=config)
    return pack(quantized, run, path, PackConfig(code_bytes=0, codecs=("rans",)))


def gaussian(shape, rows=0.0, columns=0.0, seed=0):
    """Rounded Gaussian codes whose rows and columns differ in scale by that many octaves, at random."""
    rng = np.random.default_rng(seed)
    sigma = 4 * 2 ** (rows * rng.standard_normal((shape[0], 1)) + columns * rng.standard_normal(shape[1]))
    return np.rint(sigma * rng.standard_normal(shape)).clip(-31, 31).astype(np.int8)


def entropy_bytes(symbols):
    _, counts = np.unique(symbols, return_counts=True)
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


def test_order_0_is_each_matrix_for_itself():
    matrices = [gaussian((40, 30)), gaussian((7, 900), seed=1) // 4, np.zeros((3, 3), np.int8)]
    want = sum(entropy_bytes(codes) for codes in matrices)
    assert static_bounds(matrices)["order 0"].bytes == pytest.approx(want)


@pytest.mark.parametrize(
    ("spread", "winner"), [((0, 0), "none"), ((0.5, 0), "row"), ((0.4, 0.4), "row x column")], ids=str
)
def test_classes_help_where_scales_differ(spread, winner):
    result = static_bounds([gaussian((512, 512), *spread, seed=seed) for seed in range(3)])
    order0, row, both = (result[name].bytes for name in ("order 0", "row", "row x column"))
    values = 3 * 512 * 512
    gaussian_bits = np.log2(4 * np.sqrt(2 * np.pi * np.e))  # of one scale
    if winner == "none":
        assert min(order0, row, both) > 0.998 * max(order0, row, both)
        assert 8 * order0 / values == pytest.approx(gaussian_bits, rel=0.01)
    elif winner == "row":
        assert row < 0.975 * order0
        assert both == pytest.approx(row, rel=0.003)
    else:
        assert row < 0.99 * order0
        assert both < 0.98 * row
    assert 0 < result["order 0"].side_bytes < result["row x column"].side_bytes < 0.02 * both


def test_row_bound_by_hand():
    """Rows of two scales are two classes, wherever they are."""
    small, large = gaussian((50, 64)) // 4, gaussian((50, 64), seed=1)
    small[:, 0] = large[:, 0] = 0
    small[:, :8], large[:, :8] = 1, 20  # all rows of one kind have nearly the same root mean square
    small[:, 8:], large[:, 8:] = 0, 3
    large[:, 9::2] = -3
    mixed = np.concatenate([small[:25], large, small[25:]])
    want = entropy_bytes(small) + entropy_bytes(large)
    assert static_bounds([mixed])["row"].bytes == pytest.approx(want)


def test_planes_by_hand():
    items = np.random.default_rng(0).integers(0, 700, 5000).astype("<u2")
    bound = plane_bound([(items.tobytes(), 2), (b"abab", 1)])
    assert bound.bytes == pytest.approx(entropy_bytes(items % 256) + entropy_bytes(items // 256) + 0.5)


def test_table_adds_up(artifact):
    table = artifact_table(artifact.path)
    assert table.total_bytes == artifact.weights_bytes
    assert table.header_bytes + sum(s.stored_bytes for s in table.sections) == table.total_bytes
    for section in table.sections:
        mine = [t for t in table.tensors if t.section == section.name]
        assert sum(t.raw_bytes for t in mine) == section.raw_bytes
        assert sum(t.stored_bytes for t in mine) == pytest.approx(section.stored_bytes)
    text = table.text()
    assert f"{table.total_bytes:,}" in text
    assert all(t.name in text for t in table.tensors)
    assert json.loads(json.dumps(table.to_dict()))["total_bytes"] == table.total_bytes


def test_every_codec_is_measured_on_every_section(artifact):
    table = artifact_table(artifact.path)
    by_codec = {codec: [m for m in table.codecs if m.codec == codec] for codec in ("raw", "lzma", REFERENCE)}
    names = [s.name for s in table.sections]
    assert [m.section for m in by_codec["raw"]] == [m.section for m in by_codec["lzma"]] == names
    assert [m.bytes for m in by_codec["raw"]] == [s.raw_bytes for s in table.sections]
    (whole,) = by_codec[REFERENCE]
    assert sum(s.raw_bytes for s in table.sections) > whole.bytes > sum(m.bytes for m in by_codec["lzma"])
    if native.extension() is not None:
        rans = [m.bytes for m in table.codecs if m.codec == "rans"]
        assert [min(s.raw_bytes, size) for s, size in zip(table.sections, rans, strict=True)] == [
            s.stored_bytes for s in table.sections
        ]
    assert artifact_table(artifact.path, ()).codecs == ()


def test_treemap_names_every_layer(artifact, tmp_path):
    pytest.importorskip("squarify")
    figure = pytest.importorskip("matplotlib.figure").Figure()
    table = artifact_table(artifact.path, ())
    paint_treemap(figure, table)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") + axes.get_title() == f"model.pgolf: {artifact.weights_bytes:,} bytes"
    labels = {text.get_text().split("\n")[0] for text in axes.texts}
    assert {f"layer {layer}" for layer in range(tiny_config().num_layers)} <= labels
    (legend,) = figure.legends
    assert any(text.get_text().startswith("MLP up") for text in legend.get_texts())
    assert len(axes.patches) == len(table.tensors) + 1
    areas = sorted(patch.get_width() * patch.get_height() for patch in axes.patches)
    share = max(t.stored_bytes for t in table.tensors) / table.total_bytes
    assert areas[-1] / sum(areas) == pytest.approx(share, rel=1e-3)
    plot_treemap(table, tmp_path / "bytes.png")
    assert (tmp_path / "bytes.png").read_bytes().startswith(b"\x89PNG")
