"""A quantized model to an artifact within its budget and back, bit for bit."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomize_, tiny_config

from pgolf_fast.artifact import fit
from pgolf_fast.artifact.container import TensorRecord, read_container, write_container
from pgolf_fast.artifact.load import build_model, load, load_artifact, stored_config, unpack
from pgolf_fast.artifact.pack import build_records, pack
from pgolf_fast.artifact.submission import code_bytes
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import DataConfig, PackConfig, QuantConfig, RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import save_tensors
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import native
from pgolf_fast.ops.lzma import compress_bytes
from pgolf_fast.quant.calibration import quantize_model
from pgolf_fast.quant.rd import rate_distortion
from pgolf_fast.quant.state import QuantizedState, QuantizedTensor, dequantize_state, quantize_state

RUN = RunConfig(name="test", model=tiny_config())
ROUND = QuantConfig(method="round", small_tensor=600)
FREE_CODE = PackConfig(code_bytes=0)


@pytest.fixture(scope="module")
def model() -> GPT:
    config = RUN.model
    model = GPT(config, torch.arange(config.vocab_size) % 3 == 0)
    randomize_(model, 0)
    return model


@pytest.fixture(scope="module")
def quantized(model) -> QuantizedState:
    return quantize_state(model.state_dict(), ROUND)


def write(quantized: QuantizedState, path: Path, config: PackConfig = FREE_CODE):
    return pack(quantized, RUN, path, config)


def test_pack_and_load_bit_for_bit(model, quantized, tmp_path):
    path = tmp_path / "model.pgolf"
    report = write(quantized, path)
    assert report.path == path
    assert report.weights_bytes == path.stat().st_size == report.total_bytes
    sections = report.sizes.sections
    assert report.weights_bytes == report.sizes.header_bytes + sum(s.stored_bytes for s in sections)
    assert [s.name for s in sections] == ["codes", "scales", "embeddings", "small"]
    assert report.pruned == 0
    stored, again = unpack(path)
    assert stored == RUN
    assert again.tensors.keys() == quantized.tensors.keys()
    for name, tensor in quantized.tensors.items():
        other = again.tensors[name]
        if isinstance(tensor, QuantizedTensor):
            assert torch.equal(tensor.codes, other.codes)
            assert torch.equal(tensor.scale, other.scale)
            assert tensor.bits == other.bits
        else:
            assert torch.equal(tensor, other)
    _, state = load_artifact(path)
    want = dequantize_state(quantized)
    assert list(state) == list(want)
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())


def test_an_artifact_names_no_folder(quantized, tmp_path):
    """Artifacts are shared, and their header was the run's whole configuration."""
    path = tmp_path / "model.pgolf"
    data = DataConfig(path="/home/somebody/shards", tokenizer="/home/somebody/t.model", val_tokens=64)
    pack(quantized, replace(RUN, data=data), path, FREE_CODE)
    assert b"somebody" not in path.read_bytes()
    assert unpack(path)[0].data == DataConfig(val_tokens=64)
    with pytest.raises(PgolfError, match="does not say where its data is"):
        stored_config(path)
    assert stored_config(path, Path("shards")).data.path is None
    # in its run folder it has the run's data, which a plain implementation takes for the built-in corpus
    RunFolder(tmp_path).write_config(replace(RUN, data=data))
    assert stored_config(path).data == load_artifact(path)[0].data == load(path).config.data == data
    # but not next to the configuration of something else
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert load_artifact(path)[0].data.path is None
    RunFolder(tmp_path).write_config(replace(RUN, model=replace(RUN.model, num_layers=5), data=data))
    assert load_artifact(path)[0].data.path is None
    # artifacts of older versions name their data, and still load
    tree, records = read_container(path)
    tree["run"]["data"]["path"] = "/old/shards"
    write_container(path, tree, records)
    assert stored_config(path).data.path == unpack(path)[0].data.path == "/old/shards"


def test_loaded_model_computes_the_same(model, quantized, tmp_path):
    write(quantized, tmp_path / "model.pgolf")
    run, state = load_artifact(tmp_path / "model.pgolf")
    assert run == RUN
    loaded = build_model(run, state, model.has_leading_space)
    want = GPT(RUN.model, model.has_leading_space)
    want.load_state_dict(dequantize_state(quantized))
    tokens = torch.randint(96, (2, 20))
    assert torch.equal(loaded.loss(tokens, tokens), want.loss(tokens, tokens))
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    config = replace(RUN, train=replace(RUN.train, compute_dtype="bfloat16"))
    half = load(tmp_path / "model.pgolf", config=config, device="cpu").model
    assert half.compute_dtype == torch.bfloat16
    assert half.has_leading_space.sum() == 0


def test_loading_does_not_wait_for_pytorchs_compiler(quantized, tmp_path):
    """Importing it takes longer than reading a full-size artifact."""
    write(quantized, tmp_path / "m")
    code = f"""
import sys
from pgolf_fast.artifact.load import load
load({str(tmp_path / "m")!r})
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packs_and_prunes_without_the_extension(quantized, tmp_path, monkeypatch):
    """LZMA replaces rans."""
    monkeypatch.setattr(native, "extension", lambda: None)
    size = write(quantized, tmp_path / "m").weights_bytes
    limit = int(0.99 * size)
    report = write(quantized, tmp_path / "m", replace(FREE_CODE, limit_bytes=limit))
    assert limit - 200 < report.total_bytes <= limit
    assert {s.codec for s in report.sizes.sections} <= {"lzma", "raw"}


def test_which_codecs_compete_for_which_sections(quantized, tmp_path):
    def used(**settings):
        return {
            s.codec for s in write(quantized, tmp_path / "m", replace(FREE_CODE, **settings)).sizes.sections
        }

    assert used(codecs=("lzma",), lzma_limit_bytes=0) <= {"lzma", "raw"}
    assert used(codecs=("raw",)) == {"raw"}
    if native.extension() is not None:
        assert used(lzma_limit_bytes=0) <= {"rans", "raw"}
    sizes = [
        write(quantized, tmp_path / "m", replace(FREE_CODE, codecs=codecs)).weights_bytes
        for codecs in (("lzma",), ("rans",), ("rans", "lzma"))
    ]
    assert sizes[2] <= min(sizes) + 16  # the header names the codecs


def test_the_same_model_gives_the_same_bytes(quantized, tmp_path):
    for name in ("a", "b"):
        write(quantized, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# The budget


def test_code_counts_against_the_limit(quantized, tmp_path):
    size = write(quantized, tmp_path / "m").weights_bytes
    assert write(quantized, tmp_path / "m", PackConfig(code_bytes=100, limit_bytes=size + 100)).pruned == 0
    with pytest.raises(PgolfError, match=rf"weights {size:,} \+ code 100 = {size + 100:,} bytes > .*prune"):
        write(quantized, tmp_path / "m", PackConfig(code_bytes=100, limit_bytes=size + 99, prune=False))
    counted = write(quantized, tmp_path / "m", PackConfig())
    assert counted.code_bytes == code_bytes()
    assert counted.total_bytes == counted.weights_bytes + counted.code_bytes


def pruned_codes(quantized: QuantizedState, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """All matrix codes before and after, flat, in file order."""
    after = unpack(path)[1].matrices()
    before = quantized.matrices()
    flat = [np.concatenate([m[n].codes.numpy().ravel() for n in before]) for m in (before, after)]
    return flat[0], flat[1]


@pytest.mark.parametrize("share", [0.002, 0.01, 0.03])
def test_pruning_fits_and_takes_no_more_than_needed(quantized, tmp_path, share):
    size = write(quantized, tmp_path / "whole").weights_bytes
    limit = int(size * (1 - share)) + 5000
    report = write(quantized, tmp_path / "m", PackConfig(code_bytes=5000, limit_bytes=limit))
    assert limit - 200 < report.total_bytes <= limit
    before, after = pruned_codes(quantized, tmp_path / "m")
    changed = before != after
    assert np.abs(before[changed]).max() == 1
    assert np.abs(after[changed]).max() == 0
    assert changed.sum() == report.pruned <= report.candidates == (np.abs(before) == 1).sum()


def test_rows_with_the_smallest_scale_go_first(tmp_path):
    rng = np.random.default_rng(0)
    codes = [rng.integers(-2, 3, (30, 40), dtype=np.int8) for _ in range(2)]
    scale = [rng.uniform(0.01, 0.1, 30).astype(np.float16) for _ in range(2)]
    order = fit._Order(list(zip(codes, scale, strict=True)))
    flat, cost = np.concatenate(codes).ravel(), np.repeat(np.concatenate(scale), 40)
    for number in (0, 1, 500, order.candidates):
        gone = (order.pruned(number) != flat).nonzero()[0]
        stays = np.setdiff1d((np.abs(flat) == 1).nonzero()[0], gone)
        assert len(gone) == number
        if len(gone) and len(stays):
            assert cost[gone].max() <= cost[stays].min()
    assert order.entropy_bytes(0) > order.entropy_bytes(order.candidates) > 0


def test_entropy_is_that_of_the_pruned_codes():
    rng = np.random.default_rng(1)
    codes = np.clip(np.rint(3 * rng.standard_normal((50, 60))), -31, 31).astype(np.int8)
    order = fit._Order([(codes, np.ones(50, np.float16))])
    for number in (0, 7, order.candidates):
        shares = np.bincount(order.pruned(number) + 31) / codes.size
        bits = -sum(p * np.log2(p) for p in shares if p) * codes.size
        assert order.entropy_bytes(number) == pytest.approx(bits / 8)


def test_few_compressions_at_a_realistic_size():
    rng = np.random.default_rng(2)
    matrices = [
        (
            np.clip(np.rint(5 * rng.standard_normal((256, 512))), -31, 31).astype(np.int8),
            np.ones(256, np.float16),
        )
        for _ in range(4)
    ]

    sizes = []

    def coded_size(codes):
        sizes.append(len(compress_bytes(codes.tobytes(), 6)))
        return sizes[-1]

    size = coded_size(np.concatenate([codes for codes, _ in matrices]))
    for share in (0.005, 0.02):
        sizes.clear()
        target = int(size * (1 - share))
        done = fit.prune_to_fit(matrices, target, size, coded_size, tolerance=64)
        assert len(sizes) <= fit.PROBES
        assert target - 64 <= coded_size(np.concatenate(done.codes)) <= target
        assert (
            sum((new != old).sum() for new, (old, _) in zip(done.codes, matrices, strict=True)) == done.count
        )


def test_limits_that_pruning_cannot_reach(quantized, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(b"an earlier artifact")
    size = write(quantized, tmp_path / "whole").weights_bytes
    with pytest.raises(PgolfError, match=r"zeroing all [\d,]+ codes .* is not enough"):
        write(quantized, path, replace(FREE_CODE, limit_bytes=int(size * 0.8)))
    with pytest.raises(PgolfError, match="even no bank weights at all"):
        write(quantized, path, replace(FREE_CODE, limit_bytes=500))
    assert path.read_bytes() == b"an earlier artifact"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "whole"]


# Bad files


def test_damage_is_reported_with_section_and_byte(quantized, tmp_path):
    path = tmp_path / "m"
    report = write(quantized, path)
    content = bytearray(path.read_bytes())
    start = report.sizes.header_bytes - 32  # the digest comes last
    content[start + 100] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(PgolfError, match=rf"{re.escape(str(path))} .*'codes' at byte {start}"):
        load(path)
    path.write_bytes(content[:-5])
    with pytest.raises(PgolfError, match="damaged"):
        load(path)


def test_the_wrong_model(quantized, tmp_path):
    other = replace(RUN, model=tiny_config(num_layers=5, ve_enabled=False, ve_layers=()))
    pack(quantized, other, tmp_path / "m", FREE_CODE)
    with pytest.raises(PgolfError, match="holds another model") as error:
        load(tmp_path / "m")
    assert "blocks.4.attn.q_gain / " in str(error.value)
    tables = QuantizedState({**quantized.tensors, "smear.gate": torch.zeros(31).half()})
    write(tables, tmp_path / "m")
    with pytest.raises(PgolfError, match=r"smear\.gate \(32,\) / smear\.gate \(31,\)"):
        load(tmp_path / "m")


def test_missing_and_extra_tensors(quantized, tmp_path):
    for name in ("smear.gate", "blocks.2.mlp.fc.weight"):
        fewer = QuantizedState({n: t for n, t in quantized.tensors.items() if n != name})
        write(fewer, tmp_path / "m")
        with pytest.raises(PgolfError, match=rf"{re.escape(name)} (/ nothing|is missing)"):
            load(tmp_path / "m")
    write(QuantizedState({**quantized.tensors, "extra": torch.zeros(2).half()}), tmp_path / "m")
    with pytest.raises(PgolfError, match="nothing / extra"):
        load(tmp_path / "m")


def test_containers_without_a_packed_model(quantized, tmp_path):
    path = tmp_path / "m"
    records = build_records(quantized)
    write_container(path, {}, records)
    with pytest.raises(PgolfError, match="is not a packed model"):
        load(path)
    write(quantized, path)
    tree = read_container(path)[0]
    write_container(path, tree, [r for r in records if r.name != "tok_emb.weight.scale"])
    with pytest.raises(PgolfError, match=r"tok_emb\.weight has no scale"):
        load(path)
    write_container(path, tree, [*records, TensorRecord("x", "integer", np.zeros(1, np.int32))])
    with pytest.raises(PgolfError, match="x of kind integer"):
        load(path)
    for bits in ("6", 99, None):
        write_container(path, {**tree, "bits": {"codes": bits}}, records)
        with pytest.raises(PgolfError, match="codes have 2 to 8 bits"):
            load(path)
    left = TensorRecord("tok_emb.weight.left", "scales", np.float16(1).reshape(()))
    write_container(path, tree, [*records, left])
    with pytest.raises(PgolfError, match=r"correction of tok_emb\.weight do not fit"):
        load(path)
    tree["run"]["model"]["num_layer"] = 4
    write_container(path, tree, records)
    with pytest.raises(PgolfError, match="did you mean"):
        load(path)


# The run folder's file


@pytest.mark.parametrize("rd", [False, True])
def test_saved_state_is_the_same(model, tmp_path, rd):
    settings = QuantConfig(calibration_sequences=6, calibration_length=24, small_tensor=600)
    config = replace(settings, grid="rd", rank=2) if rd else settings
    if rd:
        state = rate_distortion(model, config, seq_len=24).quantize(1e-7)
    else:
        state = quantize_model(model, config, seq_len=24)
    state.save(tmp_path / "q.safetensors", config)
    again, stored = QuantizedState.load(tmp_path / "q.safetensors")
    assert stored == config
    assert list(again.tensors) == list(state.tensors)
    for name, tensor in state.tensors.items():
        other = again.tensors[name]
        if isinstance(tensor, QuantizedTensor):
            assert tensor.bits == other.bits
            assert torch.equal(tensor.dequantized(), other.dequantized())
        else:
            assert torch.equal(tensor, other)


def test_a_file_that_is_no_quantized_state(tmp_path):
    path = tmp_path / "q.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {})
    with pytest.raises(PgolfError, match=r"q\.safetensors holds no quantized model .*quantize the run again"):
        QuantizedState.load(path)
    named = {"blocks.0.mlp.fc.weight.q": torch.zeros(2, 2, dtype=torch.int8)}
    with pytest.raises(PgolfError, match=r"blocks\.0\.mlp\.fc\.weight has no scale"):
        QuantizedState.from_named(named, {"codes": 6})


@pytest.mark.parametrize("name", ["smear.gate", "blocks.1.attn.proj.weight", "tok_emb.weight"])
def test_an_artifact_with_nan_is_refused_by_the_name_of_its_tensor(quantized, tmp_path, name):
    """It was loaded, and every score was NaN with status 0."""
    tensor = quantized.tensors[name]
    coded = isinstance(tensor, QuantizedTensor)
    values = (tensor.scale if coded else tensor).clone()
    values.view(-1)[1] = torch.nan
    wrong, path = replace(tensor, scale=values) if coded else values, tmp_path / "m"
    write(QuantizedState({**quantized.tensors, name: wrong}), path)
    message = rf"artifact {path}: {name}.*: 1 of [\d,]+ values are NaN; pack it again"
    for read in (load, load_artifact, unpack):
        with pytest.raises(PgolfError, match=message):
            read(path)
    assert load(path, finite=False).quantized is not None  # for an audit
