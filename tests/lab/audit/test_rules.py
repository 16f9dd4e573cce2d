"""The audit: a legal run passes, and every planted violation fails under its number.

By default a violation runs the checks that it concerns; the slow tests run all 18 against each.
"""

import inspect
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from runs import read_json

from pgolf_fast import cli, ops
from pgolf_fast.artifact.load import unpack
from pgolf_fast.artifact.pack import pack as write_artifact
from pgolf_fast.artifact.pack import pack_run, quantize_run
from pgolf_fast.artifact.submission import Script, code_bytes
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import TTTConfig
from pgolf_fast.evaluation.protocol import Ledger
from pgolf_fast.io import write_text
from pgolf_fast.lab.audit import guard, submission
from pgolf_fast.lab.audit.check import AuditCheck, broken, run_checks
from pgolf_fast.lab.audit.rules import checks
from pgolf_fast.lab.audit.target import open_target
from pgolf_fast.lab.audit.watch import watch
from pgolf_fast.model import gpt
from pgolf_fast.ops import reference
from pgolf_fast.quant import calibration
from pgolf_fast.quant.state import QuantizedState
from pgolf_fast.train import loop

ALL = [f"C{number}" for number in range(1, 19)]
# The checks that a violation of each kind can break
MODEL = ALL[:7]
PROTOCOL = ["C2", "C3", "C4", "C5", "C16"]
ADAPTER = ["C2", "C3", "C4", "C5", "C7", "C15", "C16", "C17"]
LEGAL = [a for a in get_args(get_type_hints(TTTConfig)["adapter"]) if TTTConfig(adapter=a).illegal is None]
ADAPTERS = [
    *({"adapter": adapter} for adapter in LEGAL),
    {"parameters": "blocks", "freeze_blocks": 1, "grad_clip": None},
    {"parameters": "mlps", "freeze_blocks": 2, "momentum": 0.0},
    {"quantize_forward": "none", "epochs": 1},
    {"parameters": "all", "quantize_forward": "projections"},
    {"epochs": 0},
]


def pack(folder):
    config = folder.read_config()
    quantize_run(folder, config.quant)
    pack_run(folder, config.pack)


@pytest.fixture(params=["concerned", pytest.param("all", marks=pytest.mark.slow)])
def failing(request):
    """A function that runs the named checks (in slow tests: all) and returns the ids of those that fail."""

    def ids(target, concerned):
        chosen = ALL if request.param == "all" else concerned
        return broken(run_checks(check for check in checks(target) if check.id in chosen))

    return ids


# Legal evaluations


def test_all_rules_hold_for_a_run(run, tmp_path, capsys):
    out = tmp_path / "audit.json"
    words = ["--train-limit", "600", "--json", str(out)]
    assert cli.main(["audit", str(run.path), *words]) == 0
    found = {finding["id"]: finding for finding in read_json(out)["findings"]}
    assert list(found) == ALL
    table = capsys.readouterr().out
    assert all(finding["verdict"] == "pass" for finding in found.values()), table
    assert all(finding["evidence"] in table and finding["title"] in table for finding in found.values())


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda s: "-".join(map(str, s.values())))
def test_every_legal_adapter_passes(run, failing, settings):
    target = open_target(run.path, ttt=replace(run.read_config().ttt, **settings))
    assert failing(target, PROTOCOL) == []
    steps = 0 if settings.get("epochs") == 0 else 3
    assert watch(target.method, target.stream(target.tokens), target.model).steps >= steps


def test_artifact_alone_and_unpacked_run_leave_some_rules_undecided(run, tmp_path):
    found = checks(open_target(run.artifact_file))
    results = run_checks(check for check in found if check.id not in ("C8", "C11"))
    assert [r.id for r in results if r.passed is None] == ["C9", "C12"]
    assert broken(results) == []
    bare = RunFolder(tmp_path / "run")
    bare.write_config(run.read_config())
    for path in (run.model_file, run.tokenizer_file):
        (bare.path / path.name).write_bytes(path.read_bytes())
    results = run_checks(check for check in checks(open_target(bare.path)) if check.id != "C8")
    assert [r.id for r in results if r.passed is None] == ["C9", "C10", "C11", "C12"]
    assert broken(results) == []


# Ten planted violations


def test_target_in_the_hash_key(target, failing, monkeypatch):
    honest = gpt.NgramHash.forward

    def forward(self, tokens, has_leading_space, boost, projection):
        upcoming = torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1) % len(self.embed.weight)
        peek = self.embed(upcoming).to(projection.dtype) @ projection.T
        return honest(self, tokens, has_leading_space, boost, projection) + peek

    monkeypatch.setattr(gpt.NgramHash, "forward", forward)
    assert failing(target, MODEL) == ["C1", "C6"]


def test_training_before_scoring(target, failing):
    def eager(adapter, scorer, chunks, what):
        total = []
        for number, chunk in enumerate(chunks):
            if number < len(chunks) - 1:
                ledger = Ledger(scorer.stream)
                ledger._scored[:] = True
                adapter.adapt(ledger.hand_over(chunks[number]))
            score = scorer.score(adapter.score, chunk.low, chunk.high)
            total.append(total[-1] + score if total else score)
        return total

    assert failing(replace(target, method=replace(target.method, protocol=eager)), PROTOCOL) == ["C2", "C3"]


def test_training_on_the_last_chunk(target, failing):
    honest = target.method.protocol

    def insatiable(adapter, scorer, chunks, what):
        scores = honest(adapter, scorer, chunks, what)
        ledger = Ledger(scorer.stream)
        ledger.note(scorer.windows)
        adapter.adapt(ledger.hand_over(chunks[-1]))
        return scores

    assert failing(replace(target, method=replace(target.method, protocol=insatiable)), PROTOCOL) == ["C4"]


def test_attention_mask_off_by_one(target, failing, monkeypatch):
    code = inspect.getsource(reference)
    assert code.count(".triu(1 + ") == 1
    exec(code.replace(".triu(1 + ", ".triu(2 + "), names := {"__name__": "reference"})

    def attention(x, qo, kv, gain, value, cos, sin, slot, *, num_kv_heads, xsa, window=None, **_):
        full = names["gqa_attention"](x, qo, kv, gain, value, cos, sin, slot, num_kv_heads, xsa)
        return full[:, -(window or x.shape[1]) :]

    monkeypatch.setattr(ops, "gqa_attention", attention)
    ids = failing(target, MODEL)
    assert "C1" in ids
    assert set(ids) <= {"C1", "C2"}  # one token further per layer may be too little for the losses of C2
    assert "attention (XSA) of layer 0" in evidence(target, "C1")


def test_smear_from_the_future(target, failing, monkeypatch):
    def forward(self, x):
        s = torch.sigmoid(self.gate)
        return (1 - s) * x + s * torch.cat((x[:, 1:], x[:, -1:]), dim=1)

    monkeypatch.setattr(gpt.SmearGate, "forward", forward)
    assert failing(target, MODEL) == ["C1"]
    assert evidence(target, "C1").startswith("smear: position 0 of 2 changes with token 1")


def test_double_counted_tail(run, failing):
    evaluation = replace(run.read_config().eval, repeat_tail=True)
    target = open_target(run.path, evaluation=evaluation)
    assert failing(target, PROTOCOL) == ["C5"]
    assert "of 256 targets 0 have no score, 8 have several" in evidence(target, "C5")


def test_selection_by_validation_loss(target, failing, monkeypatch):
    honest = loop._Run._finish

    def finish(self):
        before = self._validate("raw weights")
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        result = honest(self)
        if before.loss < result.averaged.loss:
            loop.save_tensors(self.folder.model_file, raw, {})
        return result

    monkeypatch.setattr(loop._Run, "_finish", finish)
    assert failing(target, ["C8"]) == ["C8"]


def test_validation_tokens_in_calibration(run, failing, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.write_config(run.read_config())
    for path in (run.model_file, run.tokenizer_file, run.path / "env.json"):
        (folder.path / path.name).write_bytes(path.read_bytes())
    validation = open_target(run.path).validation[: 4 * 32].astype(np.int64)
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "self_generate", lambda *_, **__: torch.from_numpy(validation).view(4, 32))
        pack(folder)
    assert failing(open_target(folder.path), ["C9"]) == ["C9"]


def test_unnormalized_head(target, failing, monkeypatch):
    honest = ops.softcap_cross_entropy
    monkeypatch.setattr(ops, "softcap_cross_entropy", lambda *arguments: 0.9 * honest(*arguments))
    assert failing(target, MODEL) == ["C7"]


def test_artifact_one_byte_too_large(target, failing):
    total = target.artifact.stat().st_size + code_bytes()
    assert failing(replace(target, limit_bytes=total), ["C10"]) == []
    assert failing(replace(target, limit_bytes=total - 1), ["C10"]) == ["C10"]
    assert f"1 over {total - 1:,}" in evidence(replace(target, limit_bytes=total - 1), "C10")


# More violations, and the other rules


def test_targets_that_reach_the_network(target, failing, monkeypatch):
    """Through the targets argument of the loss function, not through its tokens."""
    honest = type(target.model).token_losses

    def token_losses(self, tokens, targets, banks=None, **more):
        seen = torch.cat((tokens[:, 1:], targets[:, -1:]), dim=1)
        return honest(self, tokens, targets, banks, **more) + 0.01 * self.embed(seen).mean()

    monkeypatch.setattr(type(target.model), "token_losses", token_losses)
    ids = failing(target, MODEL)
    assert "C6" in ids
    assert {"C3", "C4", "C5", "C13", "C14"}.isdisjoint(ids)
    assert "targets enter aten.embedding, before the loss" in evidence(target, "C6")


def test_word_starts_of_targets(target, failing, monkeypatch):
    honest = gpt.NgramHash.forward

    def forward(self, tokens, has_leading_space, boost, projection):
        upcoming = has_leading_space[torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1)]
        return honest(self, tokens, has_leading_space, boost, projection) * (1 + upcoming[..., None].float())

    monkeypatch.setattr(gpt.NgramHash, "forward", forward)
    assert failing(target, [*MODEL, "C14"]) == ["C1", "C6", "C14"]


class Wrapped:
    """Wraps an adapter whose scoring a subclass changes."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Slot(Wrapped):
    """Updates on a batch before scoring it."""

    def score(self, tokens, targets, context):
        self.inner._update(tokens[:, -targets.shape[1] :], targets)
        return self.inner.score(tokens, targets, context)


class Secret(Wrapped):
    """The same, and restores its state after scoring."""

    def score(self, tokens, targets, context):
        kept = {name: tensor.clone() for name, tensor in self.inner.state().items()}
        self.inner._update(tokens[:, -targets.shape[1] :], targets)
        losses = self.inner.score(tokens, targets, context)
        self.inner.load_state(kept)
        return losses


class Counting(Wrapped):
    """Losses grow with the number of batches that this process has scored."""

    def score(self, tokens, targets, context):
        self.calls += 1
        return self.inner.score(tokens, targets, context) + 1e-3 * self.calls


class Noisy(Wrapped):
    def score(self, tokens, targets, context):
        losses = self.inner.score(tokens, targets, context)
        return losses + 1e-3 * torch.rand_like(losses)


@pytest.mark.parametrize(
    ("kind", "broken_", "kept"),
    [
        (Slot, {"C2", "C3", "C7", "C16"}, {"C4", "C5", "C13", "C14"}),
        (Secret, {"C2", "C7", "C16"}, {"C4", "C5", "C13", "C14"}),
        (Counting, {"C17"}, {"C2", "C3", "C4", "C5", "C6", "C15", "C16"}),
        (Noisy, {"C15"}, {"C3", "C4", "C5", "C6", "C16"}),
    ],
)
def test_adapters_that_cheat_while_scoring(target, failing, kind, broken_, kept):
    @contextmanager
    def adapter():
        with target.method.adapter() as inner:
            inner._lr.fill_(0.05)
            yield kind(inner)

    ids = set(failing(replace(target, method=replace(target.method, adapter=adapter)), ADAPTER))
    assert broken_ <= ids
    assert kept.isdisjoint(ids)


def test_reported_figure_that_is_not_the_sum_of_the_scores(target, failing):
    honest = target.method.protocol

    def generous(adapter, scorer, chunks, what):
        scores = honest(adapter, scorer, chunks, what)
        return [replace(score, nats=score.nats * 0.999) for score in scores]

    assert failing(replace(target, method=replace(target.method, protocol=generous)), PROTOCOL) == ["C5"]


def test_training_that_ignores_the_validation_files(target, tmp_path):
    """Equal losses on two validation sets prove nothing, so the check fails."""

    def blind(config, out):
        val = next(Path(config.data.path).glob("*_val_*.bin"))
        val.write_bytes((val.parent / "audit_train_000000.bin").read_bytes())
        loop.train(config, out)

    finding = submission.training_ignores_validation(
        blind, target.config, target.tokens, target.tokenizer.path
    )
    assert (finding.passed, finding.evidence[:26]) == (False, "two validation sets have t")


def test_quantization_that_reads_shards(run):
    """It is denied the shard, and the finding names the file."""
    path = next(Path(run.read_config().data.path).glob("*_val_*.bin"))

    def reads(folder):
        return guard.run_guarded(f"open({str(path)!r})", files=submission.SHARDS)

    finding = submission.calibration_ignores_data(run, reads)
    assert (finding.passed, finding.evidence) == (False, f"quantizing opens {path.name}")


def test_quantization_on_training_shards(run, tmp_path):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    quantize_run(copy, calibration="shards", calibration_sequences=4)
    pack_run(copy)
    finding = submission.calibration_ignores_data(copy)
    assert (finding.passed, "no validation shard readable: the same" in finding.evidence) == (True, True)


def test_quantization_on_another_machine(run, monkeypatch):
    def other(folder):
        with monkeypatch.context() as patch:
            patch.setattr(calibration, "self_generate", lambda *_, **__: torch.ones(4, 32, dtype=torch.int64))
            pack(folder)
        return guard.GuardedRun(0, "", [], [])

    assert submission.calibration_ignores_data(run, other).passed is False
    monkeypatch.setattr(submission, "environment", lambda: {"torch": "0.1"})
    finding = submission.calibration_ignores_data(run, other)
    assert finding.passed is None
    assert f"torch {torch.__version__}" in finding.evidence


@pytest.mark.parametrize(
    ("code", "evidence"),
    [
        ("import pgolf_fast", "the script needs import pgolf_fast"),
        ("import socket; socket.create_connection(('localhost', 9))", "the script needs socket."),
        ("import os; os.system('true')", "the script needs os.system"),
        ("open('/opt/elsewhere')", "the script fails: FileNotFoundError"),
        ("open({outside!r}).read()", "the script opens {outside}"),
        ("raise SystemExit('no')", "the script fails: no"),
    ],
)
def test_scripts_that_need_more(target, tmp_path, monkeypatch, code, evidence):
    outside = tmp_path / "outside.txt"
    outside.write_text("more weights")
    code, evidence = (text.format(outside=str(outside)) for text in (code, evidence))
    monkeypatch.setattr(submission, "build_script", lambda digest: Script("", "", code))
    finding = submission.self_contained(target.artifact, target.tokenizer.path, target.tokens)
    assert finding.passed is False
    assert finding.evidence.startswith(evidence)


def test_a_script_that_imports_more(target, monkeypatch):
    monkeypatch.setattr(submission, "build_script", lambda digest: Script("import math, requests", "", ""))
    finding = submission.self_contained(target.artifact, target.tokenizer.path, target.tokens)
    assert (finding.passed, finding.evidence) == (False, "the script imports requests")


def test_times_come_from_the_logs(tmp_path):
    folder = RunFolder(tmp_path)
    assert submission.within_time(folder, 600, None).passed is False  # not logged
    write_text(folder.metrics_file, '{"kind": "step", "step": 1, "elapsed": 590.5}\n')
    log = "non-overlapping: done in 50.5s\nsliding: done in 2m25s\n"  # of an earlier version
    log += "2026-01-02 03:04:05 sliding + TTT: done in 1h01m\n"
    write_text(folder.log_file, "sliding: done in 3.0s\n" + log)
    seconds = 590.5, 50.5 + 145 + 3660
    assert submission.within_time(folder, *seconds).passed is True
    assert submission.within_time(folder, 590.4, None).passed is False
    assert submission.within_time(folder, None, seconds[1] - 0.1).passed is False
    finding = submission.within_time(folder, None, None)
    assert finding.passed is None
    assert "training 9m50s, evaluation 1h04m" in finding.evidence


def test_error_inside_a_check_is_a_failure():
    def stops():
        raise AssertionError("would use unscored targets")

    (result,) = run_checks([AuditCheck("C3", "title", stops)])
    assert result.verdict == "FAIL"
    assert result.evidence == "stopped by AssertionError: would use unscored targets"


@pytest.mark.parametrize("place", ["smear.gate", "blocks.0.attn.proj.weight.scale"])
def test_nan_in_an_artifact_fails_by_name(run, tmp_path, capsys, place):
    """A loader that refuses NaN would leave the audit without a verdict."""
    config, state = unpack(run.artifact_file)
    data = str(run.read_config().data.path)  # the artifact names none
    named = state.to_named()
    named[place].view(-1)[2] = torch.nan
    write_artifact(QuantizedState.from_named(named, state.bits()), config, tmp_path / "m.pgolf")
    shutil.copy(run.tokenizer_file, tmp_path)
    words = ("--only", "C1", "C3", "C7", "C10", "C15", "C17", "--data", data)
    assert cli.main(["audit", str(tmp_path / "m.pgolf"), *words]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "3 of 6 do not hold: C1, C7, C15"
    tensor = "smear.gate" if place == "smear.gate" else "qo_bank"
    lines = re.findall(rf"(?m)^(C\d+) .* (FAIL|n\.a\.) .* {tensor}: [\d,]+ of [\d,]+ values are NaN$", out)
    assert dict(lines) == {"C1": "FAIL", "C3": "n.a.", "C7": "FAIL", "C15": "FAIL", "C17": "n.a."}


def test_command_line(run, tmp_path, capsys):
    assert cli.main(["audit", str(run.artifact_file), "--only", "C5", "C10", "--limit-bytes", "1000"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^C5 +each target scored once +pass ", out, re.MULTILINE)
    assert "1 of 2 do not hold: C10" in out
    for words, message in (
        ([], "audit needs RUN_OR_ARTIFACT"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(run.path), "--only", "C19"], "there is no check C19: choose C1 to C18"),
        ([str(run.path), "--tokens", "5"], "--tokens is 5; it must be at least one window of 32"),
    ):
        assert cli.main(["audit", *words]) == 2
        assert message in capsys.readouterr().err


def evidence(target, number):
    (result,) = run_checks(check for check in checks(target) if check.id == number)
    return result.evidence
