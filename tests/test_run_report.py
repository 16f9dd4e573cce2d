"""`pgolf report`: one page about a run, in whatever state it is."""

import json
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from pages import browser, check_page, visit
from runs import make_dataset, read_json, run_config

from pgolf_fast import cli
from pgolf_fast.artifact.container import sizes
from pgolf_fast.config.presets import tiny
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.ttt import TTTConfig
from pgolf_fast.io import load_tensors, save_tensors
from pgolf_fast.lab.audit.check import AuditCheck, AuditFinding
from pgolf_fast.lab.report.loss_curve import draw_loss_curve, paint_training
from pgolf_fast.lab.report.pace import pace_rows, step_seconds
from pgolf_fast.lab.report.score_plot import paint_parts
from pgolf_fast.train.loop import train

SECTIONS = [
    "At a glance",
    "What is missing",
    "Configuration",
    "Training",
    "Throughput",
    "Scores",
    "Quantisation gap",
    "Test-time training",
    "Where the bits go",
    "Bytes",
    "Audit",
    "Environment",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is trained, packed, scored both ways and audited, as far as a file says so."""
    data, path = make_dataset(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("runs") / "whole"
    train(run_config(data), path)
    for words in (["quantize"], ["pack"], ["eval"], ["eval", "--weights", "float"]):
        assert cli.main([words[0], str(path), *words[1:]]) == 0
    findings = [
        {"id": "C1", "title": "no score reads its target", "passed": True, "evidence": "<b>", "seconds": 1.5},
        {"id": "C12", "title": "within the time", "passed": None, "evidence": "no limit", "seconds": 0.0},
    ]
    verdicts = {True: "pass", False: "FAIL", None: "n.a."}
    for finding in findings:
        finding["verdict"] = verdicts[finding["passed"]]
    digest = sizes(path / "model.pgolf").sha256
    story = {"audited": str(path), "artifact_sha256": digest, "tokens": 99, "findings": findings}
    (path / "audit.json").write_text(json.dumps(story))
    return path


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may spoil."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return RunFolder(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures that take no time."""
    monkeypatch.setattr("pgolf_fast.bench.drawing.png", lambda paint, size, dark=False: b"PNG")


def text_of(run, capsys, *words, status=0, printed=""):
    """The page's text, checked."""
    assert cli.main(["report", str(run.path), *words]) == status
    path = run.path / "report.html"
    out = capsys.readouterr().out
    assert out.startswith(printed)
    assert out.endswith(f"wrote {path}\n")
    found = check_page(path.read_text(encoding="utf-8"))
    assert found.headings == SECTIONS
    return found


def section(found, title):
    """What the page says in one section."""
    parts = found.text.split("<section ")
    (part,) = [p for p in parts if f">{title}</h2>" in p]
    return part.replace(' class="s"', "")


def metrics(run, change):
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def rewrite(path, change):
    story = read_json(path)
    change(story)
    path.write_text(json.dumps(story))


def test_a_whole_run(run, capsys):
    found = text_of(run, capsys)
    assert "Nothing: the run is trained, packed, scored and audited." in found.text
    for name in ("artifact", "float"):
        scores = read_json(run.path / f"scores_{name}.json")
        for kind in ("non_overlapping", "sliding", "sliding_ttt"):
            assert f"{scores[kind]['bpb']:.6f}" in section(found, "Scores")
    ours, theirs = (read_json(run.path / f"scores_{w}.json")["sliding"]["bpb"] for w in ("artifact", "float"))
    assert f"{ours - theirs:+.6f}" in section(found, "Quantisation gap")
    scores = read_json(run.path / "scores_artifact.json")
    gain = scores["sliding"]["bpb"] - scores["sliding_ttt"]["bpb"]
    assert f"gained {gain:+.6f} bits per byte" in section(found, "Test-time training")
    assert f"{run.artifact_file.stat().st_size:,}" in section(found, "Bytes")
    assert "1 of 2 properties hold, 1 could not be asked, on 99 targets" in section(found, "Audit")
    assert "&lt;b&gt;" in section(found, "Audit")
    assert "torch" in section(found, "Environment")
    assert "with a meta step" in section(found, "Throughput")
    for title in ("Training", "Throughput", "Test-time training", "Where the bits go", "Bytes"):
        assert section(found, title).count("<picture>") == 1
    assert str(run.path.parent) not in found.text  # a page goes to others: no paths of this machine


def test_configuration_is_what_differs(run, capsys, undrawn):
    config = tiny()
    run.write_config(config)
    assert "Preset <code>tiny</code>, with nothing changed." in section(text_of(run, capsys), "Configuration")
    changed = run_config("/secret/place/data")
    rewrite(run.config_file, lambda tree: tree.update(name="tiny", train={**tree["train"], "meta": None}))
    found = section(text_of(run, capsys), "Configuration")
    assert ">train.meta</th><td>on</td><td>none</td>" in found
    assert "train.meta.every" not in found
    run.write_config(changed)
    found = section(text_of(run, capsys), "Configuration")
    assert "<code>test</code> is not the name of a preset" in found
    assert ">data.path</th><td>data</td>" in found
    assert "secret" not in found


def test_an_interrupted_run(run, capsys, undrawn, monkeypatch):
    for file in run.path.iterdir():
        if file.name not in ("config.json", "metrics.jsonl", "env.json", "train.log", "tokenizer.model"):
            file.unlink()
    metrics(run, lambda rows: [row for row in rows if row["kind"] == "step" and row["step"] <= 5])
    with open(run.metrics_file, "a") as file:
        file.write('{"kind": "step", "st')  # where the power went
    found = text_of(run, capsys)
    assert "interrupted, or still running: step 5 of 8" in section(found, "At a glance")
    assert "step 5 had" in section(found, "Training")
    missing = section(found, "What is missing")
    assert "Commands are for the folder that <code>run</code> lies in." in missing
    for command in ("train test --resume --out run", "quantize run", "eval run", "audit run"):
        assert f"<code>pgolf {command}</code>" in missing
    monkeypatch.chdir(run.path)
    text_of(RunFolder(Path()), capsys, "--audit", status=2, printed="not audited: ")
    assert section(text_of(RunFolder(Path()), capsys), "What is missing") == missing
    for title, words in (
        ("Scores", "The run is not scored"),
        ("Quantisation gap", "Not known: the artifact is not scored."),
        ("Test-time training", "There is no score with test-time training."),
        ("Where the bits go", "No figures: scores_float.json is not there"),
        ("Bytes", "There is no artifact to weigh."),
        ("Audit", "The run is not audited"),
    ):
        assert words in section(found, title)


def test_only_a_configuration(run, capsys):
    for file in run.path.iterdir():
        if file.name != "config.json":
            file.unlink()
    found = text_of(run, capsys)
    assert "not trained yet: there is only its configuration" in section(found, "At a glance")
    assert "No step is on record." in section(found, "Training")
    assert "No two steps" in section(found, "Throughput")
    assert "No env.json is there" in section(found, "Environment")
    assert "<picture>" not in found.text


def test_losses_that_are_not_finite(run, capsys):
    def spoil(rows):
        for row in rows:
            if row["kind"] == "step" and row["step"] in (3, 4, 7):
                row["loss"] = [math.nan, math.inf, None][row["step"] % 3]
            if row["kind"] == "val":
                row["loss"] = row["bpb"] = math.nan
        return rows

    metrics(run, spoil)
    found = text_of(run, capsys)
    training = section(found, "Training")
    assert "not finite at 3 of 8 steps: 3, 4, 7." in training
    assert "The loss of 3 steps is not finite" in section(found, "At a glance")
    assert ">nan<" not in training
    metrics(run, lambda rows: [{**row, "loss": math.nan, "multiplier": None} for row in rows])
    found = text_of(run, capsys)
    assert "not finite at 8 of 8 steps" in section(found, "Training")
    assert "<picture>" in section(found, "Training")


def test_no_test_time_training(run, capsys, undrawn):
    from matplotlib.figure import Figure

    def cut(story):
        del story["sliding_ttt"], story["ttt_bpb_by_chunk"]

    for name in ("artifact", "float"):
        rewrite(run.path / f"scores_{name}.json", cut)
    found = text_of(run, capsys)
    assert "There is no score with test-time training." in section(found, "Test-time training")
    assert "test-time training</th>" not in section(found, "Scores")
    assert "(sliding windows)" in section(found, "At a glance")
    story = read_json(run.scores_file("artifact"))
    del story["figures"]["sliding_ttt"]
    panels = Figure().subplots(1, 3)
    paint_parts(panels, story)
    assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["sliding"]


def test_scores_without_figures_and_of_another_artifact(run, capsys, undrawn):
    def age(story):
        del story["figures"]
        story["artifact_sha256"] = "0" * 64

    rewrite(run.path / "scores_artifact.json", age)
    rewrite(run.audit_file, lambda story: story.update(artifact_sha256="1" * 64))
    (run.path / "scores_float.json").unlink()
    found = text_of(run, capsys)
    assert "scores_artifact.json was written before it held any" in section(found, "Where the bits go")
    missing = section(found, "What is missing")
    assert missing.count("those shown are of another artifact") == 2
    last = [json.loads(line) for line in run.metrics_file.read_text().splitlines()][-1]
    gap = read_json(run.path / "scores_artifact.json")["non_overlapping"]["bpb"] - last["bpb"]
    assert f"{gap:+.6f}" in section(found, "Quantisation gap")
    assert "the validation that ended training" in section(found, "Quantisation gap")


def test_scores_on_other_targets_are_not_compared(run, capsys, undrawn):
    rewrite(run.path / "scores_float.json", lambda story: story["sliding"].update(tokens=1))
    gap = section(text_of(run, capsys), "Quantisation gap")
    assert "scored on different targets or with other settings: sliding windows." in gap
    assert gap.count("<tr>") == 1 + 2


def test_scores_of_other_settings_are_not_compared(run, capsys, undrawn):
    """Targets are as many with any stride, and with any rate of test-time training."""

    def gap():
        return section(text_of(run, capsys), "Quantisation gap")

    float_scores = run.scores_file("float")
    whole = float_scores.read_text()
    assert gap().count("<tr>") == 1 + 3  # though float weights adapt without rounding
    rewrite(float_scores, lambda story: story["ttt"].update(lr=1.0))
    assert "other settings: sliding windows, test-time training." in gap()
    float_scores.write_text(whole)
    rewrite(float_scores, lambda story: story["eval"].update(stride=8))
    assert "other settings: sliding windows; sliding windows, test-time training." in gap()
    assert gap().count("<tr>") == 1 + 1
    rewrite(float_scores, lambda story: story["eval"].update(seq_len=8))
    assert "<table>" not in gap()
    assert "Not comparable" in gap()


def test_the_gap_is_to_the_weights_that_were_kept(run, capsys, undrawn):
    """After a Reptile phase those of the last step, though the average was validated after them."""
    run.scores_file("float").unlink()
    raw, averaged = [row for row in run.history() if row["kind"] == "val"][-2:]
    assert raw["weights"] == "raw weights"
    tensors, story = load_tensors(run.model_file)
    packed = read_json(run.scores_file("artifact"))["non_overlapping"]["bpb"]
    for kept in (averaged, raw):
        save_tensors(run.model_file, tensors, {**story, "weights": kept["weights"]})
        gap = section(text_of(run, capsys), "Quantisation gap")
        assert f"{packed - kept['bpb']:+.6f}" in gap
        assert f"ended training ({kept['weights']})" in gap
    save_tensors(run.model_file, tensors, {**story, "step": 5})
    assert "there is no score of the float weights" in section(text_of(run, capsys), "Quantisation gap")
    run.model_file.write_bytes(b"x")
    assert "model.safetensors cannot be read" in section(text_of(run, capsys), "What is missing")


def test_damaged_files_are_named(run, capsys, undrawn):
    (run.path / "scores_float.json").write_text("{")
    run.audit_file.write_bytes(b"\xff\xfe")
    whole = run.artifact_file.read_bytes()
    run.artifact_file.write_bytes(whole[: len(whole) // 2])
    missing = section(text_of(run, capsys), "What is missing")
    assert "scores_float.json is damaged" in missing
    assert "audit.json is damaged" in missing
    assert '<th scope="row">artifact</th>' in missing


def test_without_matplotlib_there_are_words(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = text_of(run, capsys)
    assert found.text.count("No picture: pictures need matplotlib") == 5
    assert "<picture>" not in found.text


def test_a_resumed_run_and_a_sweep(run, capsys, undrawn):
    def resume(rows):
        changed = ["optim.matrix_lr was 0.025 and is 0.02"]
        rates = {"kind": "slot_rates", "step": 8, "qo_bank": [0.5, 1.0, 0.75], "kv_bank": [1.25]}
        return [*rows, {"kind": "resume", "step": 4, "checkpoint": "x", "changed": changed}, rates]

    metrics(run, resume)
    row = {"bpb": 2.0, "gain": 0.05, "low": 0.01, "high": 0.09, "updates": 12}
    (run.path / "ttt_sweep.json").write_text(json.dumps({"tokens": 640, "adapters": {"lora": row}}))
    found = text_of(run, capsys)
    assert "optim.matrix_lr was 0.025 and is 0.02" in section(found, "Configuration")
    assert "+0.01000 to +0.09000" in section(found, "Test-time training")
    rates = found.cells[found.cells.index("qo_bank") :][:5]
    assert rates == ["qo_bank", "3", "0.5000", "0.7500", "1.0000"]


def test_what_breaks_the_rules_is_marked_everywhere(run, capsys, undrawn):
    """A page is what goes to others: no score of two passes may look like one that is allowed."""
    broken = TTTConfig(adapter="error_guided")
    for weights in ("artifact", "float"):
        story = {"illegal": broken.illegal, "ttt": asdict(broken)}
        rewrite(run.path / f"scores_{weights}.json", lambda scores, story=story: scores.update(story))
    row = {"bpb": 2.0, "gain": 0.05, "low": 0.01, "high": 0.09, "updates": 12}
    sweep = {"tokens": 640, "adapters": {"run": row, "lora": row}, "illegal": {"run": broken.illegal}}
    (run.path / "ttt_sweep.json").write_text(json.dumps(sweep))
    found = text_of(run, capsys)
    for title, times in (("At a glance", 2), ("Scores", 4), ("Quantisation gap", 1)):
        assert section(found, title).count("test-time training (ILLEGAL)") == times, title
    adaptation = section(found, "Test-time training")
    assert f"BREAKS THE RULES of the challenge: {broken.illegal};" in adaptation
    assert "each scored before" not in adaptation
    assert "<code>share 0.02</code>" in adaptation
    assert "chunk_tokens" not in adaptation
    assert "run (ILLEGAL)" in found.cells
    assert "lora" in found.cells


def test_names_are_not_markup(run, capsys, undrawn):
    rewrite(run.config_file, lambda tree: tree.update(name="<script>"))
    odd = RunFolder(run.path.rename(run.path.parent / "a <i> & b"))
    found = text_of(odd, capsys)
    assert "<title>Run a &lt;i&gt; &amp; b</title>" in found.text


def test_out_and_refusals(run, capsys, tmp_path, undrawn):
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    check_page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert not (run.path / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "empty")], "is not a run folder"),
        ([str(run.path), "--audits"], "unknown field --audits"),
    ):
        assert cli.main(["report", *words]) == 2
        assert message in capsys.readouterr().err


def test_audit_is_kept_and_shown(run, capsys, monkeypatch, undrawn):
    """`pgolf audit RUN` keeps its findings in the run; --only does not overwrite a whole audit."""
    answers = {"C1": True, "C2": False}

    def few(subject):
        return [
            AuditCheck(i, f"property {i}", lambda i=i: AuditFinding(answers[i], f"seen {i}")) for i in answers
        ]

    monkeypatch.setattr("pgolf_fast.lab.audit.rules.checks", few)
    run.audit_file.unlink()
    assert cli.main(["audit", str(run.path), "--only", "C1"]) == 0
    assert not run.audit_file.exists()
    assert cli.main(["report", str(run.path), "--audit"]) == 1
    story = read_json(run.audit_file)
    assert [f["verdict"] for f in story["findings"]] == ["pass", "FAIL"]
    assert story["artifact_sha256"] == sizes(run.artifact_file).sha256
    capsys.readouterr()
    found = text_of(run, capsys)
    assert "FAILED: C2 (1 of 2 properties hold)" in section(found, "Audit")
    assert "seen C2" in section(found, "Audit")


def test_pace_of_kinds_of_steps():
    elapsed = [1.0, 3.0, 5.0, 9.0, math.nan, 12.0, 11.0, 13.0]
    steps = {i: {"elapsed": e, "meta_loss": 1.0 if i == 4 else None} for i, e in enumerate(elapsed, start=1)}
    assert step_seconds(steps) == {2: 2.0, 3: 2.0, 4: 4.0, 8: 2.0}
    steps[8] |= {"reptile": True, "tokens": 10}
    rows = {row[0]: row[1:] for row in pace_rows(steps, 100)}
    assert rows["plain"] == ("2", "2,000.0", "2,000.0", "2,000.0", "50")
    assert rows["with a meta step"] == ("1", "4,000.0", "4,000.0", "4,000.0", "25")
    assert rows["Reptile, outer"] == ("1", "2,000.0", "2,000.0", "2,000.0", "5")
    assert (rows["all"][0], rows["all"][-1]) == ("4", "31")  # 310 tokens in 10 s
    assert pace_rows({1: {"elapsed": 1.0}}, 100) == ()


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_errors(run, capsys, tmp_path):
    found = text_of(run, capsys)
    asked, console, seen = visit(browser(), found.text, tmp_path / "profile")
    assert asked == ["/"]
    assert console == []
    assert seen.count("<h2") == len(SECTIONS)


def test_a_spike_does_not_flatten_the_loss_curve():
    from matplotlib.figure import Figure

    steps = {s: {"loss": 7 - 0.02 * s, "multiplier": 1.0} for s in range(1, 201)}
    figure, spiked = Figure(), Figure()
    paint_training(figure, steps, [])
    paint_training(spiked, {**steps, 150: {**steps[150], "loss": 1e4}, 151: {"loss": math.inf}}, [])
    for one in (figure, spiked):
        low, high = one.axes[0].get_ylim()
        assert 2.5 < low < 3.0
        assert 7.0 < high < 7.5


def test_the_name_of_a_run_is_no_mathematics(run):
    odd = RunFolder(run.path.rename(run.path.parent / "a$_$b"))
    assert draw_loss_curve(odd).read_bytes().startswith(b"\x89PNG")
