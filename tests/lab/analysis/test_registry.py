"""`pgolf analyze`: files it opens, analyses it runs, files it writes, and errors."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import check_page
from runs import make_dataset, read_json, run_config

from pgolf_fast.artifact.pack import pack
from pgolf_fast.cli import main
from pgolf_fast.config.fields import run_config_to_dict
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import PackConfig, QuantConfig
from pgolf_fast.console import Table
from pgolf_fast.errors import PgolfError
from pgolf_fast.io import save_tensors
from pgolf_fast.lab.analysis import quant, surface
from pgolf_fast.lab.analysis.models import open_model, open_models, open_validation
from pgolf_fast.lab.analysis.registry import ANALYSES
from pgolf_fast.lab.analysis.summary import Options, Summary
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import quantize_state, unbank

OWN = ("deltas", "quant", "spectra", "overlap", "connectivity", "surface")
QUICK = [
    "--tokens",
    "256",
    "--curvature-tokens",
    "32",
    "--probes",
    "2",
    "--lanczos-steps",
    "2",
    "--points",
    "3",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Three run folders of untrained weights from three seeds; the first is packed too."""
    result = [RunFolder(tmp_path_factory.mktemp("runs") / name) for name in ("one", "two", "three")]
    for seed, folder in enumerate(result):
        config = run_config(data)
        torch.manual_seed(seed)
        model = GPT(config.model)
        for parameter in model.parameters():  # no zeros
            parameter.data += 0.05 * torch.randn(parameter.shape)
        folder.write_config(config)
        shutil.copyfile(data / "tokenizer.model", folder.tokenizer_file)
        save_tensors(folder.model_file, model.state_dict(), {"config": run_config_to_dict(config)})
        if seed == 0:
            state = quantize_state(model.state_dict(), QuantConfig(method="round", grid="percentile"))
            pack(state, config, folder.artifact_file, PackConfig(code_bytes=0))
    return result


def run(*arguments, capsys):
    """Exit status, standard output, standard error."""
    status = main(["analyze", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_every_kind_of_file_can_be_opened(runs, tmp_path):
    folder = runs[0]
    whole = open_model(folder.path)
    assert (whole.name, whole.config, whole.folder) == ("one", folder.read_config(), folder)
    assert all(t.dtype == torch.float32 for t in whole.state.values())

    checkpoint = tmp_path / "step.safetensors"
    state = {f"model.{name}": tensor for name, tensor in whole.state.items()}
    config = replace(folder.read_config(), name="elsewhere")
    save_tensors(checkpoint, {**state, "optimizer.x": torch.ones(2)}, {"config": run_config_to_dict(config)})
    result = open_model(checkpoint)
    assert (result.name, result.config.name, result.folder) == ("step", "elsewhere", None)
    assert all(torch.equal(result.state[n], t) for n, t in whole.state.items())

    inside = open_model(folder.model_file)
    assert (inside.name, inside.folder) == ("one/model", folder)

    community = tmp_path / "final_model.pt"
    torch.save(unbank({n: t.bfloat16() for n, t in whole.state.items()}), community)
    unbanked = open_model(community, config=folder.read_config())
    assert set(unbanked.state) == set(whole.state)
    for name, tensor in whole.state.items():
        torch.testing.assert_close(unbanked.state[name], tensor.bfloat16().float(), rtol=0, atol=0)
    assert open_model(community).config is None

    rounded = open_model(folder.path, "artifact")
    packed = open_model(folder.artifact_file)
    assert torch.equal(rounded.state["qo_bank"], packed.state["qo_bank"])
    error = (rounded.state["qo_bank"] - whole.state["qo_bank"]).norm() / whole.state["qo_bank"].norm()
    assert 0 < error < 0.1
    names = [s.name for s in open_models([folder.path, folder.path, folder.artifact_file])]
    assert names == ["one", "one (2)", "one/model"]


def test_a_run_with_only_an_artifact(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path / "packed")
    (tmp_path / "packed/model.safetensors").unlink()
    assert open_model(tmp_path / "packed").state["qo_bank"].isfinite().all()
    with pytest.raises(PgolfError, match=r"model.safetensors does not exist yet"):
        open_model(tmp_path / "packed", "float")


def test_a_model_that_diverged_is_refused(runs, tmp_path):
    state = open_model(runs[0].path).state
    state["kv_bank"][1, 2, 3] = torch.nan
    save_tensors(tmp_path / "x.safetensors", state, {})
    with pytest.raises(PgolfError, match=r"x.safetensors: kv_bank: 1 of [\d,]+ values are NaN"):
        open_model(tmp_path / "x.safetensors")
    save_tensors(tmp_path / "y.safetensors", {"weight": torch.ones(2)}, {})
    with pytest.raises(PgolfError, match=r"has no qo_bank, .*not a model with weight banks"):
        open_model(tmp_path / "y.safetensors")


def test_analyses_of_two_runs(runs, tmp_path, capsys):
    out = tmp_path / "out"
    paths = [folder.path for folder in runs[:2]]
    status, printed, _ = run(*paths, "--only", *OWN, "--out", out, *QUICK, capsys=capsys)
    assert status == 0
    tree = read_json(out / "analysis.json")
    assert list(tree["analyses"]) == list(OWN)
    assert [model["name"] for model in tree["models"]] == ["one", "two"]
    assert tree["skipped"] == {}
    page = (out / "report.html").read_text(encoding="utf-8")
    for name, analysis in tree["analyses"].items():
        assert f"{name} " in printed
        forms = [summary["form"] for summary in analysis["summaries"]]
        assert {"published", "corrected"} == set(forms)
        for summary in analysis["summaries"]:
            assert f"{summary['name']} [{summary['form']}]" in printed
            assert summary["shows"] in printed
            assert "not_measured" not in summary["values"]
            assert summary["name"].replace("&", "&amp;") in page
            for file in summary["plots"].values():
                assert (out / file).read_bytes().startswith(b"\x89PNG")
    check_page(page)


def test_output_is_portable(runs, tmp_path, monkeypatch, capsys):
    """Page and JSON contain no folder of this machine, and plots of an earlier analysis are removed."""
    few = {name: ANALYSES[name] for name in ("surface", "losses")}
    monkeypatch.setattr("pgolf_fast.lab.analysis.registry.ANALYSES", few)
    config, bare, out = runs[1].read_config(), tmp_path / "bare.safetensors", tmp_path / "out"
    save_tensors(bare, open_model(runs[0].path).state, {})
    shutil.copytree(runs[1].path, tmp_path / "moved")
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "gone")))
    RunFolder(tmp_path / "moved").write_config(moved)
    out.mkdir()
    old, own = out / "surface_2_trace_dark.png", out / "surface.png"
    for file in (old, own):
        file.write_bytes(b"")
    given = ["--data.path", config.data.path]
    for models, more, reason in (
        ([tmp_path / "moved"], [], "data folder gone does not exist"),
        ([tmp_path / "moved", bare], given, "bare.safetensors does not say which network it is"),
    ):
        status, printed, _ = run(*models, *more, "--out", out, *QUICK, capsys=capsys)
        assert status == 0
        assert f"{tmp_path}/{reason.split()[-4]}" in printed or str(bare) in printed
        page = (out / "report.html").read_text(encoding="utf-8")
        assert check_page(page).headings[-1] == "Skipped"
        for text in (page, (out / "analysis.json").read_text(encoding="utf-8")):
            assert text.count(reason) >= 2
            assert str(tmp_path) not in text
            assert config.data.path not in text
    assert (old.exists(), own.exists()) == (False, True)


def test_names_are_escaped_in_plots(runs, tmp_path, monkeypatch, capsys):
    """Dollar signs are not math, and a leading underscore hides nothing from a legend."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    seen = []

    def texts(paint, size, dark=False):
        figure = Figure(size)
        paint(figure)
        seen.append([text.get_text() for text in figure.findobj(Text)])
        return b""

    monkeypatch.setattr("pgolf_fast.lab.analysis.summary.png", texts)
    for name, folder in zip(("a$_$b", "_c"), runs, strict=False):
        shutil.copytree(folder.path, tmp_path / name)
    only = ("quant", "spectra", "connectivity", "surface", "losses")
    paths = (tmp_path / "a$_$b", tmp_path / "_c")
    assert run(*paths, "--only", *only, "--out", tmp_path / "out", *QUICK, capsys=capsys)[0] == 0
    assert len(seen) == 2 * 6
    for picture in seen:
        for shown in (r"a\$_\$b", " _c"):
            assert any(text.startswith(shown) for text in picture), picture


def test_triangle_of_three_runs(runs, tmp_path, capsys):
    paths = [folder.path for folder in runs]
    status, printed, _ = run(*paths, "--only", "triangle", "--out", tmp_path, capsys=capsys)
    assert status == 0
    assert "triangle of one, two, three [published]" in printed
    assert "angles of one, two, three [corrected]" in printed


def test_without_names_every_possible_analysis_runs(runs, tmp_path, monkeypatch, capsys):
    for name in ("hash", "losses"):
        monkeypatch.delitem(ANALYSES, name)
    out = tmp_path / "out"
    status, printed, _ = run(runs[0].path, "--out", out, *QUICK, capsys=capsys)
    assert status == 0
    tree = read_json(out / "analysis.json")
    assert list(tree["analyses"]) == ["quant", "spectra", "surface"]
    assert list(tree["skipped"]) == ["deltas", "overlap", "connectivity", "triangle"]
    assert "triangle needs at least 3 models, not 1" in printed
    assert "Skipped" in (out / "report.html").read_text(encoding="utf-8")


def test_nan_is_null_in_json(runs, tmp_path, monkeypatch, capsys):
    def analyze(models, options):
        return [Summary("x", "Shows.", Table((), ()), {"a": [float("nan"), (1.0, float("inf"))]})]

    monkeypatch.setattr(quant, "analyze", analyze)
    run(runs[0].path, "--only", "quant", "--out", tmp_path, capsys=capsys)
    values = read_json(tmp_path / "analysis.json")["analyses"]["quant"]["summaries"][0]["values"]
    assert values == {"a": [None, [1.0, None]]}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--only", "deltas"], "deltas needs at least 2 models, not 1: give another"),
        (["--only", "spectra", "triangle"], "triangle needs at least 3 models, not 1: give another"),
        (["--only", "delta"], "unknown analysis 'delta': did you mean deltas?"),
        (["--only", "xyzzy"], "unknown analysis 'xyzzy': they are deltas, quant"),
        (["--points", "2"], "--points is 2; it must be at least 3"),
        (["--data.path", "nowhere"], "data folder nowhere does not exist"),
        (["--preset", "exp999"], "unknown preset 'exp999'"),
        (["--tokns", "3"], "unknown option --tokns: did you mean --tokens?"),
    ],
)
def test_bad_input_is_one_line(runs, tmp_path, capsys, arguments, line):
    status, printed, error = run(runs[0].path, *arguments, "--out", tmp_path / "out", capsys=capsys)
    assert (status, printed) == (2, "")
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_model_or_a_missing_one(capsys):
    assert "give at least one model" in run(capsys=capsys)[2]
    assert "model nowhere does not exist" in run("nowhere", capsys=capsys)[2]


def test_missing_measurements_say_what_to_give(runs, tmp_path, capsys):
    """A file of weights alone has spectra and rounding errors, but no loss."""
    bare = tmp_path / "bare.safetensors"
    save_tensors(bare, open_model(runs[0].path).state, {})
    status, printed, _ = run(bare, "--only", "quant", "surface", "--out", tmp_path / "out", capsys=capsys)
    assert status == 0
    assert printed.count("Not measured") == 2
    assert "no calibration" in printed
    assert printed.count("name its preset with --preset") == 2
    stated = tmp_path / "stated.safetensors"
    config = run_config_to_dict(
        replace(runs[0].read_config(), data=replace(runs[0].read_config().data, path=None))
    )
    save_tensors(stated, open_model(runs[0].path).state, {"config": config})
    printed = run(stated, "--only", "surface", "--out", tmp_path / "out", capsys=capsys)[1]
    assert "give a folder of shards with --data.path" in printed


def test_data_of_another_tokenizer_is_refused(runs, tmp_path, capsys):
    shutil.copytree(runs[0].path, tmp_path / "other")
    with open(tmp_path / "other/tokenizer.model", "ab") as handle:
        handle.write(b"\xfa\x07\x00")  # an empty field unknown to SentencePiece makes another file
    arguments = [runs[1].path, tmp_path / "other", "--only", "surface", "--out", tmp_path / "out"]
    shards = runs[0].read_config().data.path
    status, _, error = run(*arguments, "--data.path", shards, capsys=capsys)
    assert status == 2
    assert "belong to tokenizer" in error
    assert "other to another" in error


def test_validation_has_whole_windows(runs):
    models = open_models([folder.path for folder in runs])
    length = models[0].need_config().eval_seq_len
    result = open_validation(models, Options(tokens=length + 1))
    assert len(result.tokens) == 2 * length + 1
    assert len(result.first(1)) == length + 1
    everything = open_validation(models, Options(tokens=10**9))
    assert (len(everything.tokens) - 1) % length == 0
    np.testing.assert_array_equal(everything.tokens[: 2 * length + 1], result.tokens)


def test_calibration_on_text_written_by_the_model(runs, tmp_path):
    """A run whose data is gone still has its tokenizer and can generate text."""
    shutil.copytree(runs[0].path, tmp_path / "moved")
    config = runs[0].read_config()
    RunFolder(tmp_path / "moved").write_config(replace(config, data=replace(config.data, path="/gone")))
    one = open_model(tmp_path / "moved")
    hessians, how = quant.calibrate(one, Options())
    assert how == f"{4 * 32:,} tokens written by the model"
    assert len(hessians) == 4 * config.model.num_layers
    hessians, how = quant.calibrate(one, Options(data=Path(config.data.path), calibration_tokens=70))
    assert how == "96 validation tokens"
    with pytest.raises(PgolfError, match="nowhere"):
        quant.calibrate(one, Options(data=Path("nowhere")))


def test_published_forms_need_no_network(runs, tmp_path, capsys):
    """If a model has no configuration or is another network, only what needs it is skipped."""
    one, two = open_models([folder.path for folder in runs[:2]])
    bare = replace(two, config=None)
    given = Path(one.need_config().data.path)
    options = Options(data=given, tokens=64, curvature_tokens=32, probes=2, lanczos_steps=2)
    for pair in ([one, bare], [bare, one]):
        line = surface.analyze_connectivity(pair, options)
        curved = surface.analyze_surface(pair, options)
        assert [summary.form for summary in line] == ["published", "corrected", "corrected"]
        assert [len(summary.table.rows) > 0 for summary in (*line, *curved)] == [
            True,
            True,
            False,
            True,
            False,
        ]
        for summary in (line[-1], curved[-1]):
            assert "name its preset with --preset" in summary.shows
    config = two.need_config()
    other = replace(two, config=replace(config, model=replace(config.model, pos_conditional=False)))
    line = surface.analyze_connectivity([one, other], options)
    assert "one and two are different networks" in line[-1].shows


def test_models_of_different_windows_are_not_compared(runs):
    """Losses would depend on the order of the models."""
    one, two = open_models([folder.path for folder in runs[:2]])
    config = two.need_config()
    longer = replace(two, config=replace(config, train=replace(config.train, seq_len=64)))
    for pair in ([one, longer], [longer, one]):
        with pytest.raises(PgolfError, match=r"windows of \d+ tokens, \w+ of \d+: their losses"):
            open_validation(pair, Options())
        result = surface.analyze_surface(pair, Options(data=Path(config.data.path)))
        assert "losses cannot be compared" in result[-1].shows
    # rounding errors are computed for each model alone, on texts that are named
    how = quant.analyze([one, longer], Options(calibration_tokens=64))[-1].values["calibration"]
    assert how == "one: 64 validation tokens; two: 128 tokens written by the model"


def test_a_model_that_diverged_to_finite_weights_is_named(runs, tmp_path, capsys):
    shutil.copytree(runs[0].path, tmp_path / "wild")
    state = open_model(runs[0].path).state
    for name in ("mlp_up_bank", "mlp_down_bank"):
        state[name] *= 1e20
    save_tensors(tmp_path / "wild/model.safetensors", state, {})
    for name in ("losses", "hash"):
        status, _, error = run(
            tmp_path / "wild", "--only", name, "--out", tmp_path, *QUICK[:2], capsys=capsys
        )
        assert status == 2
        assert "wild: its losses are not finite, it has diverged: use an earlier checkpoint" in error
    only = ("--only", "quant", "connectivity", "surface")
    paths = tmp_path / "wild", runs[1].path
    status, printed, _ = run(*paths, *only, "--out", tmp_path, *QUICK, capsys=capsys)
    assert status == 0
    assert "no calibration: wild: activations overflow in block 0 (blocks.0.mlp_hidden)" in printed
    assert "wild to two: its losses are not finite" in printed
    assert "nan" not in printed
    config = runs[0].read_config()
    RunFolder(tmp_path / "wild").write_config(replace(config, data=replace(config.data, path="/gone")))
    why = quant.calibrate(open_model(tmp_path / "wild"), Options())[1]
    assert "wild: activations overflow in block 0" in why


def test_a_preset_takes_precedence_over_the_folder_of_a_file(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path / "other")
    state, config = open_model(runs[1].path).state, runs[1].read_config()
    file = tmp_path / "other/stray.pt"
    torch.save(state, file)
    named = replace(config, name="named")
    assert open_model(file).config == config
    assert open_model(file, config=named).config == named
    for says in (tmp_path / "other", tmp_path / "other/model.safetensors"):
        assert open_model(says, config=named).config == config


def test_models_are_calibrated_on_one_text_or_each_text_is_named(runs, tmp_path):
    """Models are not calibrated on the data of their own runs, which may differ, without saying so."""
    shutil.copytree(runs[0].path, tmp_path / "moved")
    config = runs[0].read_config()
    RunFolder(tmp_path / "moved").write_config(replace(config, data=replace(config.data, path="/gone")))
    here, moved = open_models([runs[1].path, tmp_path / "moved"])
    one = quant.analyze([here, moved], Options(calibration_tokens=64))[-1].values
    assert one["calibration"] == "64 validation tokens"
    alone = quant.analyze([here], Options(calibration_tokens=64))[-1].values
    assert one["two"] == alone["two"]
    # the first model has no data, so each has its own text
    assert quant.calibrate(moved, Options(), moved)[1] == quant.calibrate(here, Options(), moved)[1]
    bare = replace(here, config=None)
    assert "name its preset with --preset" in quant.analyze([moved, bare], Options())[-1].shows


def test_loss_on_the_line_matches_the_models(runs):
    a, b = open_models([folder.path for folder in runs[:2]])
    options = Options(tokens=96, points=3)
    validation = open_validation([a, b], options)
    losses = surface.path_losses(a, b, validation, options)
    tokens = torch.from_numpy(validation.tokens)
    inputs, targets = (part.view(-1, validation.seq_len) for part in (tokens[:-1], tokens[1:]))
    middle = replace(a, state={n: (t + b.state[n]) / 2 for n, t in a.state.items()})
    for loaded, result in zip((a, middle, b), losses, strict=True):
        with torch.no_grad():
            want = loaded.network(validation.source.table).token_losses(inputs, targets).mean(1)
        np.testing.assert_allclose(result, want.numpy(), rtol=1e-5)
    summary = surface.loss_on_line(a, b, "x", validation, options).values
    excess = losses[1] - (losses[0] + losses[2]) / 2
    assert summary["excess"] == pytest.approx([0, excess.mean(), 0], abs=1e-9)
    assert summary["excess_error"][1] == pytest.approx(excess.std(ddof=1) / len(excess) ** 0.5)
    assert summary["barrier"]["height"] == pytest.approx(max(0, excess.mean()), abs=1e-9)


def test_no_line_between_different_networks(runs):
    a, b = open_models([folder.path for folder in runs[:2]])
    config = b.need_config()
    other = replace(b, config=replace(config, model=replace(config.model, pos_conditional=False)))
    options = Options(tokens=64)
    with pytest.raises(PgolfError, match="one and two are different networks"):
        surface.path_losses(a, other, open_validation([a], options), options)


def test_curvature_of_a_run_by_parts(runs):
    one = open_model(runs[0].path)
    options = Options(tokens=64, curvature_tokens=33, probes=2, lanczos_steps=2)
    validation = open_validation([one], options)
    curvature, parts = surface.curvature([one], validation, options)
    result = curvature.values["models"]["one"]
    assert curvature.values["targets"] == 64
    tokens = torch.from_numpy(validation.tokens)
    inputs, targets = (part.view(-1, validation.seq_len) for part in (tokens[:-1], tokens[1:]))
    model = one.network(validation.source.table, dtype=torch.float64)
    assert result["loss"] == pytest.approx(model.loss(inputs, targets).item())
    assert list(parts.values["one"]) == [*BANK_NAMES, "others"]
    total = sum(part["value"] for part in parts.values["one"].values())
    assert total == pytest.approx(result["trace"]["value"])
