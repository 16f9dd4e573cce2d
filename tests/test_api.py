"""The Python API: light to import, complete, with plain results and one clear line for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import make_dataset, run_config

import pgolf_fast as pg
from pgolf_fast.errors import PgolfError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A run made by the API alone; every result prints as a table."""
    out = tmp_path_factory.mktemp("runs") / "run"
    trained = pg.train(run_config(data), str(out))
    assert "bpb, averaged weights" in str(trained)
    quantized = pg.quantize(str(out), bits=5)
    assert "int5" in str(quantized)
    packed = pg.pack(out, limit_bytes=1_000_000)
    assert "1,000,000" in str(packed)
    assert pg.load(out).config.quant.bits == 5
    return out


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_the_standard_library_only():
    code = """
import sys
import pgolf_fast
print(sorted({name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}))
"""
    assert [name for name in eval(python(code)) if not name.startswith(("_", "sitecustom"))] == ["pgolf_fast"]


def test_importtime_does_not_show_torch():
    command = [sys.executable, "-X", "importtime", "-c", "import pgolf_fast"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "pgolf_fast" in modules
    assert not {"torch", "numpy", "triton"} & modules


def test_every_public_name_resolves():
    for name in pg.__all__:
        assert callable(getattr(pg, name)) or name == "ops"
    assert set(pg.__all__) <= set(dir(pg))
    assert pg.ops.mlp is torch.ops.pgolf.mlp or callable(pg.ops.mlp)
    with pytest.raises(AttributeError, match="no attribute 'trian': it offers GPT, generate"):
        _ = pg.trian


@pytest.mark.parametrize(
    "first", ["pass", "import pgolf_fast.train.loop", "from pgolf_fast.train import track"]
)
def test_train_can_be_called_whatever_was_imported_before(first):
    code = f"""
import pgolf_fast as pg
{first}
try:
    pg.train("no configuration", "nowhere")
except AttributeError as error:
    print(type(pg.train).__name__, pg.train.__name__)
"""
    assert python(code).strip() == "_Train pgolf_fast.train"


def test_torch_ops_exist_after_importing_ops():
    assert python("import torch, pgolf_fast.ops; print(torch.ops.pgolf.mlp)").strip() == "pgolf.mlp"


def test_preset_sets_fields(tmp_path):
    config = pg.preset("tiny", train__steps=7, data__path=tmp_path, ttt__lora__lr=0.5)
    assert (config.train.steps, config.data.path, config.ttt.lora.lr) == (7, str(tmp_path), 0.5)
    assert pg.preset("tiny", **{"train.steps": 7}).train.steps == 7


def test_load_gives_model_tokenizer_and_config(run):
    from_run, from_file = pg.load(str(run)), pg.load(run / "model.pgolf")
    for loaded in (from_run, from_file):
        assert isinstance(loaded.model, pg.GPT)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("a b")) == "a b"
        assert loaded.config.model.num_layers == 3
        assert "parameters" in repr(loaded)
        assert len(loaded.grid) == 4
    first, second = from_run.model.state_dict(), from_file.model.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    floats = pg.load(run, "float")
    assert (floats.grid, floats.sha256, floats.config.ttt.quantize_forward) == (None, None, "none")


def test_scores_do_not_depend_on_how_the_model_is_given(run):
    whole = pg.score(run, eval__stride=16)
    assert "sliding + TTT" in str(whole)
    assert (run / "scores_artifact.json").is_file()
    for model in (str(run / "model.pgolf"), pg.load(run)):
        other = pg.score(model, eval__stride=16)
        assert (other.plain, other.sliding, other.ttt.score) == (whole.plain, whole.sliding, whole.ttt.score)


def test_generate(run):
    text = pg.generate(run, "The", tokens=5, temperature=0)
    assert text.startswith("The")
    assert text == pg.generate(pg.load(run), "The", tokens=5, temperature=0)


def test_artifact_without_tokenizer(run, tmp_path):
    alone = tmp_path / "alone.pgolf"
    alone.write_bytes((run / "model.pgolf").read_bytes())
    assert pg.load(alone).tokenizer is None
    with pytest.raises(PgolfError, match=r"alone\.pgolf has no tokenizer next to it: pass tokenizer="):
        pg.generate(alone)
    loaded = pg.load(alone, tokenizer=run / "tokenizer.model")
    assert pg.generate(loaded, "The", tokens=3) == pg.generate(run, "The", tokens=3)


def test_bad_input_is_one_clear_line(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for call, message in (
        (lambda: pg.preset("tinny"), "did you mean tiny"),
        (lambda: pg.preset("tiny", train__step=1), r"unknown field train\.step: did you mean train\.steps"),
        (lambda: pg.preset("tiny", train__steps="ten"), r"steps is 'ten'"),
        (lambda: pg.load(tmp_path / "none"), "none does not exist: give a run folder or an artifact"),
        (lambda: pg.load(tmp_path / "empty"), "not a run folder"),
        (lambda: pg.load(run / "model.pgolf", "float"), "float weights are loaded from a run folder"),
        (lambda: pg.load(run / "config.json"), "config.json"),
        (lambda: pg.quantize(tmp_path / "none"), "run folder .*none does not exist"),
        (lambda: pg.quantize(run, bit=5), "unknown field bit"),
        (lambda: pg.pack(run, limit_bytes="big"), "limit_bytes.*big"),
        (lambda: pg.score(run, ttt__rate=1.0), r"unknown field ttt\.rate"),
        (lambda: pg.score(run, data=tmp_path / "none"), "none"),
        (lambda: pg.generate(run, tokens=0), "tokens is 0; it must be at least 1"),
        (lambda: pg.generate(run, temperature=-1.0), "must be 0 or more"),
    ):
        with pytest.raises(PgolfError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
