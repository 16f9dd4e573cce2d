"""`pgolf report`: one page about a run in any state."""

import json
import math
import shlex
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
from pgolf_fast.lab.report.plots import draw_loss_curve, paint_parts
from pgolf_fast.train.loop import train

SECTIONS = [
    "Overview",
    "What is missing",
    "Configuration",
    "Training",
    "Throughput",
    "Scores",
    "Quantization gap",
    "Test-time training",
    "Where the bits go",
    "Bytes",
    "Audit",
    "Environment",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is trained, packed, scored with both kinds of weights, and has an audit.json."""
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
    tree = {"audited": str(path), "artifact_sha256": digest, "tokens": 99, "findings": findings}
    (path / "audit.json").write_text(json.dumps(tree))
    return path


@pytest.fixture
def run(whole, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return RunFolder(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch):
    """Skip drawing."""
    monkeypatch.setattr("pgolf_fast.bench.drawing.png", lambda paint, size, dark=False: b"PNG")


def report(run, capsys, *words, status=0, printed=""):
    """Write the page of a run, check it and return it parsed."""
    assert cli.main(["report", str(run.path), *words]) == status
    path = run.path / "report.html"
    out = capsys.readouterr().out
    assert out.startswith(printed)
    assert out.endswith(f"wrote {path}\n")
    page = check_page(path.read_text(encoding="utf-8"))
    assert page.headings == SECTIONS
    return page


def metrics(run, change):
    rows = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def rewrite(path, change):
    tree = read_json(path)
    change(tree)
    path.write_text(json.dumps(tree))


def compared(name):
    """One adapter of ttt_sweep.json."""
    numbers = {"bpb": 2.0, "gain": 0.05, "low": 0.01, "high": 0.09, "microseconds_a_token": 1.5}
    return {"name": name, **numbers, "updates": 12, "trainable": 3}


def test_a_whole_run(run, capsys):
    page = report(run, capsys)
    assert "Nothing: the run is trained, packed, scored and audited." in page.sections["What is missing"].text
    for name in ("artifact", "float"):
        scores = read_json(run.path / f"scores_{name}.json")
        for kind in ("non_overlapping", "sliding", "sliding_ttt"):
            assert f"{scores[kind]['bpb']:.6f}" in page.sections["Scores"].text
    ours, theirs = (read_json(run.path / f"scores_{w}.json")["sliding"]["bpb"] for w in ("artifact", "float"))
    assert f"{ours - theirs:+.6f}" in page.sections["Quantization gap"].text
    scores = read_json(run.path / "scores_artifact.json")
    gain = scores["sliding"]["bpb"] - scores["sliding_ttt"]["bpb"]
    assert f"The gain is {gain:+.6f} bits per byte" in page.sections["Test-time training"].text
    assert f"{run.artifact_file.stat().st_size:,}" in page.sections["Bytes"].text
    assert "1 of 2 properties hold, 1 could not be checked, on 99 targets" in page.sections["Audit"].text
    assert ["C1", "no score reads its target", "pass", "1.5", "<b>"] in page.sections["Audit"].tables[0]
    assert "torch" in page.sections["Environment"].text
    assert "with a meta step" in page.sections["Throughput"].text
    for title in ("Training", "Throughput", "Test-time training", "Where the bits go", "Bytes"):
        assert page.sections[title].pictures == 1
    assert str(run.path.parent) not in page.source  # pages are shared: no paths of this machine


def test_configuration_lists_differences(run, capsys, undrawn):
    config = tiny()
    run.write_config(config)
    assert "Preset tiny, unchanged." in report(run, capsys).sections["Configuration"].text
    changed = run_config("/secret/place/data")
    rewrite(run.config_file, lambda tree: tree.update(name="tiny", train={**tree["train"], "meta": None}))
    page = report(run, capsys).sections["Configuration"]
    assert ["train.meta", "on", "none"] in page.tables[0]
    assert "train.meta.every" not in page.text
    run.write_config(changed)
    page = report(run, capsys).sections["Configuration"]
    assert "test is not the name of a preset" in page.text
    assert ["data.path", "data"] in page.tables[0]
    assert "secret" not in page.text


def test_an_interrupted_run(run, capsys, undrawn, monkeypatch):
    for file in run.path.iterdir():
        if file.name not in ("config.json", "metrics.jsonl", "env.json", "train.log", "tokenizer.model"):
            file.unlink()
    metrics(run, lambda rows: [row for row in rows if row["kind"] == "step" and row["step"] <= 5])
    with open(run.metrics_file, "a") as file:
        file.write('{"kind": "step", "st')  # truncated by a crash
    page = report(run, capsys)
    assert "interrupted or still running: step 5 of 8" in page.sections["Overview"].text
    assert "step 5 had" in page.sections["Training"].text
    missing = page.sections["What is missing"].text
    assert "Run the commands in the folder that contains run." in missing
    for command in ("train --resume run", "quantize run", "eval run", "audit run"):
        assert f"pgolf {command}" in page.code
    monkeypatch.chdir(run.path)
    report(RunFolder(Path()), capsys, "--audit", status=2, printed="not audited: ")
    again = report(RunFolder(Path()), capsys)
    assert again.sections["What is missing"].text == missing
    for title, words in (
        ("Scores", "The run is not scored"),
        ("Quantization gap", "Unknown: the artifact is not scored."),
        ("Test-time training", "There is no score with test-time training."),
        ("Where the bits go", "No figures: scores_float.json does not exist"),
        ("Bytes", "There is no artifact."),
        ("Audit", "The run is not audited"),
    ):
        assert words in page.sections[title].text


def test_only_a_configuration(run, capsys):
    for file in run.path.iterdir():
        if file.name != "config.json":
            file.unlink()
    page = report(run, capsys)
    assert "not trained yet: only the configuration exists" in page.sections["Overview"].text
    assert "No steps are recorded." in page.sections["Training"].text
    assert "No two successive steps" in page.sections["Throughput"].text
    assert "There is no env.json" in page.sections["Environment"].text
    assert not any(part.pictures for part in page.sections.values())


def test_losses_that_are_not_finite(run, capsys):
    def spoil(rows):
        for row in rows:
            if row["kind"] == "step" and row["step"] in (3, 4, 7):
                row["loss"] = [math.nan, math.inf, None][row["step"] % 3]
            if row["kind"] == "val":
                row["loss"] = row["bpb"] = math.nan
        return rows

    metrics(run, spoil)
    page = report(run, capsys)
    training = page.sections["Training"].text
    assert "not finite at 3 of 8 steps: 3, 4, 7." in training
    assert "The loss of 3 steps is not finite" in page.sections["Overview"].text
    assert "nan" not in page.cells
    metrics(run, lambda rows: [{**row, "loss": math.nan, "multiplier": None} for row in rows])
    page = report(run, capsys)
    assert "not finite at 8 of 8 steps" in page.sections["Training"].text
    assert page.sections["Training"].pictures == 1


def test_no_test_time_training(run, capsys, undrawn):
    from matplotlib.figure import Figure

    def cut(tree):
        del tree["sliding_ttt"], tree["ttt_bpb_by_chunk"]

    for name in ("artifact", "float"):
        rewrite(run.path / f"scores_{name}.json", cut)
    page = report(run, capsys)
    assert "There is no score with test-time training." in page.sections["Test-time training"].text
    assert "sliding + TTT" not in page.sections["Scores"].text
    assert "(sliding)" in page.sections["Overview"].text
    tree = read_json(run.scores_file("artifact"))
    del tree["figures"]["sliding_ttt"]
    panels = Figure().subplots(1, 3)
    paint_parts(panels, tree)
    assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["sliding"]


def test_scores_without_figures_and_of_another_artifact(run, capsys, undrawn):
    def age(tree):
        del tree["figures"]
        tree["artifact_sha256"] = "0" * 64

    rewrite(run.path / "scores_artifact.json", age)
    rewrite(run.audit_file, lambda tree: tree.update(artifact_sha256="1" * 64))
    (run.path / "scores_float.json").unlink()
    page = report(run, capsys)
    assert "scores_artifact.json has none" in page.sections["Where the bits go"].text
    missing = page.sections["What is missing"].text
    assert missing.count("those shown are of another artifact") == 2
    last = [row for row in run.history() if row["kind"] == "val"][-1]
    gap = read_json(run.path / "scores_artifact.json")["non_overlapping"]["bpb"] - last["bpb"]
    assert f"{gap:+.6f}" in page.sections["Quantization gap"].text
    assert "the validation at the end of training" in page.sections["Quantization gap"].text


def test_scores_on_other_targets_are_not_compared(run, capsys, undrawn):
    rewrite(run.path / "scores_float.json", lambda tree: tree["sliding"].update(tokens=1))
    gap = report(run, capsys).sections["Quantization gap"]
    assert "scored on different targets or with other settings: sliding." in gap.text
    assert len(gap.tables[0]) == 1 + 2


def test_scores_of_other_settings_are_not_compared(run, capsys, undrawn):
    """The number of targets does not depend on the stride or on the rate of test-time training."""

    def gap():
        return report(run, capsys).sections["Quantization gap"]

    float_scores = run.scores_file("float")
    whole = float_scores.read_text()
    assert len(gap().tables[0]) == 1 + 3  # although float weights adapt without rounding
    rewrite(float_scores, lambda tree: tree["ttt"].update(lr=1.0))
    assert "other settings: sliding + TTT." in gap().text
    float_scores.write_text(whole)
    rewrite(float_scores, lambda tree: tree["eval"].update(stride=8))
    assert "other settings: sliding; sliding + TTT." in gap().text
    assert len(gap().tables[0]) == 1 + 1
    rewrite(float_scores, lambda tree: tree["eval"].update(seq_len=8))
    assert gap().tables == []
    assert "Not comparable" in gap().text


def test_the_gap_is_to_the_weights_that_were_kept(run, capsys, undrawn):
    """After a Reptile phase they are those of the last step, although the average is validated last."""
    run.scores_file("float").unlink()
    raw, averaged = [row for row in run.history() if row["kind"] == "val"][-2:]
    assert raw["weights"] == "raw weights"
    tensors, tree = load_tensors(run.model_file)
    packed = read_json(run.scores_file("artifact"))["non_overlapping"]["bpb"]
    for kept in (averaged, raw):
        save_tensors(run.model_file, tensors, {**tree, "weights": kept["weights"]})
        gap = report(run, capsys).sections["Quantization gap"].text
        assert f"{packed - kept['bpb']:+.6f}" in gap
        assert f"the end of training ({kept['weights']})" in gap
    save_tensors(run.model_file, tensors, {**tree, "step": 5})
    assert "the float weights are not scored" in report(run, capsys).sections["Quantization gap"].text
    run.model_file.write_bytes(b"x")
    assert "model.safetensors cannot be read" in report(run, capsys).sections["What is missing"].text


def test_damaged_files_are_named(run, capsys, undrawn):
    (run.path / "scores_float.json").write_text("{")
    run.audit_file.write_bytes(b"\xff\xfe")
    whole = run.artifact_file.read_bytes()
    run.artifact_file.write_bytes(whole[: len(whole) // 2])
    missing = report(run, capsys).sections["What is missing"]
    assert "scores_float.json is not valid JSON (line 1)" in missing.text
    assert "audit.json is not valid JSON" in missing.text
    assert "artifact" in [row[0] for row in missing.tables[0]]


@pytest.mark.parametrize(
    ("name", "content", "heading"),
    [
        ("audit.json", {"findings": [1]}, "Audit"),  # a TypeError would end the page
        ("audit.json", {"findings": [{"id": "C1"}]}, "Audit"),
        ("scores_artifact.json", {"sliding": {"bpb": "two", "loss": None}}, None),
        ("ttt_sweep.json", {"adapters": {"lora": 3}}, "Test-time training"),
    ],
)
def test_parts_of_other_types_leave_out_their_section_only(name, content, heading, run, capsys, undrawn):
    (run.path / name).write_text(json.dumps(content))
    assert cli.main(["report", str(run.path)]) == 0
    page = check_page((run.path / "report.html").read_text(encoding="utf-8"))
    assert len(page.headings) == len(SECTIONS)
    capsys.readouterr()
    if heading is not None:
        assert "Not shown: a file of the run is incomplete or damaged" in page.sections[heading].text


@pytest.mark.parametrize("content", ["[" * 99_999, '{"torch": ' + "9" * 5000 + "}", "[1]", "\udcff"])
def test_json_that_python_refuses_in_other_ways_is_missing(content, run, capsys, undrawn):
    """RecursionError and ValueError are no JSONDecodeError, and a list has no `get`."""
    (run.path / "env.json").write_bytes(content.encode(errors="surrogateescape"))
    rows = report(run, capsys).sections["What is missing"].tables[0]
    assert "env.json" in next(row[1] for row in rows if row[0] == "environment")


def test_without_matplotlib_there_is_a_note(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report(run, capsys)
    assert page.source.count("No plot: plots need matplotlib") == 5
    assert not any(part.pictures for part in page.sections.values())


def test_a_resumed_run_and_a_sweep(run, capsys, undrawn):
    def resume(rows):
        changed = ["optim.matrix_lr was 0.025 and is 0.02"]
        rates = {"kind": "slot_rates", "step": 8, "qo_bank": [0.5, 1.0, 0.75], "kv_bank": [1.25]}
        return [*rows, {"kind": "resume", "step": 4, "checkpoint": "x", "changed": changed}, rates]

    metrics(run, resume)
    (run.path / "ttt_sweep.json").write_text(
        json.dumps({"tokens": 640, "adapters": {"lora": compared("lora")}})
    )
    page = report(run, capsys)
    assert "optim.matrix_lr was 0.025 and is 0.02" in page.sections["Configuration"].text
    assert "+0.01000 to +0.09000" in page.sections["Test-time training"].text
    rates = page.cells[page.cells.index("qo_bank") :][:5]
    assert rates == ["qo_bank", "3", "0.5000", "0.7500", "1.0000"]


def test_illegal_scores_are_labeled_everywhere(run, capsys, undrawn):
    """Pages are shared: no score of two passes may look like a legal one."""
    broken = TTTConfig(adapter="error_guided")
    for weights in ("artifact", "float"):
        tree = {"illegal": broken.illegal, "ttt": asdict(broken)}
        rewrite(run.path / f"scores_{weights}.json", lambda scores, tree=tree: scores.update(tree))
    adapters = {name: compared(name) for name in ("run", "lora")}
    sweep = {"tokens": 640, "adapters": adapters, "illegal": {"run": broken.illegal}}
    (run.path / "ttt_sweep.json").write_text(json.dumps(sweep))
    page = report(run, capsys)
    for title, times in (("Overview", 2), ("Scores", 2), ("Quantization gap", 1)):
        assert page.sections[title].text.count("sliding + TTT (ILLEGAL)") == times, title
    assert page.sections["Scores"].text.count(" TTT (ILLEGAL)") == 4
    assert "bpb with TTT (ILLEGAL)" in page.sections["Where the bits go"].text
    adaptation = page.sections["Test-time training"].text
    assert f"BREAKS THE RULES of the challenge: {broken.illegal};" in adaptation
    assert "each scored before" not in adaptation
    assert "share 0.02" in page.code
    assert "chunk_tokens" not in adaptation
    assert "run (ILLEGAL)" in page.cells
    assert "lora" in page.cells


def test_names_are_not_markup(run, capsys, undrawn):
    rewrite(run.config_file, lambda tree: tree.update(name="<script>"))
    odd = RunFolder(run.path.rename(run.path.parent / "a <i> & b"))
    page = report(odd, capsys)
    assert page.titles == ["Run a <i> & b"]


def test_out_and_refusals(run, capsys, tmp_path, undrawn):
    assert cli.main(["report", str(run.path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    check_page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert not (run.path / "report.html").exists()
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "nowhere")], "does not exist"),
        ([str(tmp_path / "empty")], "is not a run folder"),
        ([str(run.path), "--audits"], "unknown option --audits"),
    ):
        assert cli.main(["report", *words]) == 2
        assert message in capsys.readouterr().err


def test_audit_is_saved_and_shown(run, capsys, monkeypatch, undrawn):
    """`pgolf audit RUN` saves its findings in the run; --only does not overwrite a full audit."""
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
    tree = read_json(run.audit_file)
    assert [f["verdict"] for f in tree["findings"]] == ["pass", "FAIL"]
    assert tree["artifact_sha256"] == sizes(run.artifact_file).sha256
    capsys.readouterr()
    page = report(run, capsys)
    assert "FAILED: C2 (1 of 2 properties hold)" in page.sections["Audit"].text
    assert "seen C2" in page.sections["Audit"].text


@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_errors(run, capsys, tmp_path):
    page = report(run, capsys)
    asked, console, seen = visit(browser(), page.source, tmp_path / "profile")
    assert asked == ["/"]
    assert console == []
    assert seen.count("<h2") == len(SECTIONS)


def test_the_name_of_a_run_is_not_math(run):
    odd = RunFolder(run.path.rename(run.path.parent / "a$_$b"))
    assert draw_loss_curve(odd).read_bytes().startswith(b"\x89PNG")


def commands(page):
    """The commands that a page tells to run, split as a shell does."""
    return [shlex.split(text) for text in page.code if text.startswith("pgolf ")]


@pytest.mark.parametrize("name", ["my run's <b> & $(id) 日本", "`tick`", "-dash", "tiny"])
def test_commands_on_the_page_can_be_typed(run, capsys, undrawn, monkeypatch, name):
    """Unquoted, a name of several words is several arguments; `tiny` alone is a preset."""
    from pgolf_fast.cli.commands import COMMANDS
    from pgolf_fast.cli.options import parse

    for file in (run.model_file, run.artifact_file, run.scores_file("artifact")):
        file.unlink()
    odd = RunFolder(run.path.rename(run.path.parent / name))
    monkeypatch.chdir(odd.path.parent)
    page = report(odd, capsys)
    assert page.titles == [f"Run {name}"]
    typed = commands(page)
    assert {words[1] for words in typed} >= {"train", "pack", "eval"}
    for _, command, *words in typed:
        options = parse(command, COMMANDS[command].load(), words)
        place = options.out or Path(options.preset) if command == "train" else options.run
        assert place.resolve() == odd.path


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scores_artifact.json", '{"sliding": 3}'),
        ("scores_artifact.json", '{"non_overlapping": {"bpb": 1.0}, "sliding": [], "figures": 3}'),
        ("scores_float.json", '{"figures": {"sliding": {}}, "ttt_bpb_by_chunk": "no"}'),
        ("audit.json", '{"findings": [3]}'),
        ("env.json", "[1, 2]"),
        ("env.json", b"\xff\xfe\xff"),
        ("ttt_sweep.json", '{"adapters": {"lora": {"name": "lora"}}}'),
        ("metrics.jsonl", '{"kind": "step", "step": "abc"}\n[]\n{"kind": "val", "step": 1, "weights": 4}\n'),
    ],
)
def test_edited_files_are_listed_and_the_rest_is_shown(run, capsys, undrawn, file, content):
    """Well-formed but incomplete files: a traceback, or a section that is silently not there."""
    (run.path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    page = report(run, capsys)
    missing = page.sections["What is missing"].text
    assert "Nothing: the run is trained" not in missing
    assert f"{run.artifact_file.stat().st_size:,}" in page.sections["Bytes"].text
    if file.startswith("scores"):
        assert f"{file} does not hold three finite scores" in missing


def test_a_schedule_without_its_end_is_said_at_the_top(run, capsys, undrawn):
    never = ["the learning rate ended at x0.609 of its schedule", "int6 was never trained with"]
    end = {"kind": "end", "step": 8, "elapsed": 1.0, "unfinished": never}
    metrics(run, lambda rows: [*(row for row in rows if row["kind"] != "end"), end])
    text = report(run, capsys).sections["Overview"].text
    assert f"The schedule did not end: {never[0]}; {never[1]}." in text


def test_read_only_runs_need_a_place_before_the_work(run, capsys, undrawn, monkeypatch, tmp_path):
    """Root can write everywhere, so a file in the way stands for a read-only disk."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    monkeypatch.setattr("pgolf_fast.lab.report.sections.write_report", lambda *_: pytest.fail("worked"))
    assert cli.main(["report", str(run.path), "--out", str(blocked / "page.html")]) == 2
    assert "file is a file: give another --out FILE" in capsys.readouterr().err
    monkeypatch.setattr("pgolf_fast.lab.analysis.models.open_models", lambda *_: pytest.fail("worked"))
    assert cli.main(["analyze", str(run.path), "--out", str(blocked)]) == 2
    assert "file is a file: give another --out DIR" in capsys.readouterr().err
