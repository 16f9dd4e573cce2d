"""Programs of the audit run alike wherever the command is typed."""

import pytest

from pgolf_fast.artifact.submission import Script
from pgolf_fast.io import write_text
from pgolf_fast.lab.audit import guard, submission


@pytest.fixture
def checkout(tmp_path):
    """A folder like that of an editable installation, with files that shadow modules."""
    folder = tmp_path / "checkout"
    (folder / "pgolf_fast.egg-info").mkdir(parents=True)
    write_text(folder / "pgolf_fast.egg-info/PKG-INFO", "Name: pgolf_fast\nVersion: 0.1.0\n")
    write_text(folder / "pgolf_fast.egg-info/entry_points.txt", "[console_scripts]\npgolf = x:y\n")
    for name in ("json", "sitecustomize"):
        write_text(folder / f"{name}.py", "open(__file__).read()\nraise ImportError('the wrong one')\n")
    return folder


@pytest.mark.parametrize("path", [None, "checkout", "."])
@pytest.mark.parametrize("place", ["checkout", "run", "empty"])
def test_no_verdict_depends_on_where_it_is_typed(target, checkout, monkeypatch, place, path):
    """PyTorch reads entry points on the path and looks for a temporary folder, which no script needs."""
    (checkout.parent / "empty").mkdir()
    monkeypatch.chdir({"run": target.folder.path}.get(place, checkout.parent / place))
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", str(checkout) if path == "checkout" else path)
    code = (
        "import importlib.metadata, json, tempfile, numpy\n"
        "importlib.metadata.entry_points(), tempfile.gettempdir()"
    )
    monkeypatch.setattr(submission, "build_script", lambda digest: Script("", "", code))
    finding = submission.self_contained(target.artifact, target.tokenizer.path, target.tokens)
    assert finding.passed, finding.evidence


def test_quantizing_again_reads_no_module_of_the_working_directory(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)  # json.py is there
    seen = guard.run_guarded("import json, pgolf_fast; print(json.__file__)", cwd=tmp_path)
    assert (seen.status, str(checkout) in seen.output) == (0, False)


def test_entry_points_of_any_distribution_may_be_read(target, checkout, monkeypatch):
    """Those of a checkout that a .pth file adds to the path; nothing else there."""
    for code, passed in (
        ("import importlib.metadata\nassert len(importlib.metadata.entry_points(name='pgolf'))", True),
        ("open(sys.path[-1] + '/pgolf_fast.egg-info/PKG-INFO')", False),
    ):
        whole = f"import sys\nsys.path.append({str(checkout)!r})\n{code}"
        monkeypatch.setattr(submission, "build_script", lambda digest, code=whole: Script("", "", code))
        finding = submission.self_contained(target.artifact, target.tokenizer.path, target.tokens)
        assert finding.passed is passed, finding.evidence
