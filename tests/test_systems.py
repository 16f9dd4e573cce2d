"""Presets of other public systems: their settings, and that each trains, packs, scores and is audited."""

import functools
import itertools
import json
import lzma
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from artifact.test_submission import ABOUT, call, same_scores
from data_helpers import real_data
from evaluations import adapted, stream_of, text
from helpers import randomize_, tiny_config
from runs import VOCAB, make_dataset, make_trainer, read_json

from pgolf_fast import cli
from pgolf_fast.artifact.load import load
from pgolf_fast.artifact.pack import pack_run, quantize_run, read_quantized
from pgolf_fast.artifact.submission import write_submission
from pgolf_fast.config.presets import PRESETS, preset, shrink
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import RunConfig, TTTConfig
from pgolf_fast.config.ttt import GuidedConfig
from pgolf_fast.data.shards import write_shard
from pgolf_fast.data.tokenizer import Tokenizer
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.base import Frozen, Scored, borrowed
from pgolf_fast.evaluation.adapters.descent import SGD, AdamW
from pgolf_fast.evaluation.adapters.error_guided import learn_and_score
from pgolf_fast.evaluation.adapters.registry import adapting_chunks, make_adapter
from pgolf_fast.evaluation.run import score_run
from pgolf_fast.evaluation.score import Scorer
from pgolf_fast.evaluation.windows import plain_windows
from pgolf_fast.io import load_tensors
from pgolf_fast.lab.audit.check import run_checks
from pgolf_fast.lab.audit.rules import checks
from pgolf_fast.lab.audit.target import open_target
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.quant.state import QuantizedTensor
from pgolf_fast.train.loop import train

SYSTEMS = ("exp106", "baseline", "pr296_reptile", "pr296_error_guided", "pr301", "pr1250", "pr1855")
EARLIER = ("exp101", "exp101_as_run", "exp105a", "exp101_swiglu")
ILLEGAL = "pr296_error_guided"
BROKEN = {ILLEGAL: ["C2", "C3"], "exp101_as_run": ["C5"]}  # the original scored its last targets 32 times
SLOW = ("C8", "C9", "C11")  # train, and start programs
# The default set has one preset for each kind of training, tables and adapter; `make test-slow` has all.
AUDITED = ("exp106", "pr296_reptile", "pr1250", *BROKEN)
SUBMITTED = ("pr301", "pr1250")


def others_slow(names, chosen):
    """Parameters `names`, with those not `chosen` marked slow."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"))


def miniature(name: str, data) -> RunConfig:
    """Return the tiny form of a preset at a size that trains in a second, with all its switches."""
    base = shrink(preset(name), "tiny")
    m, length = base.model, 32
    groups = m.num_heads // m.num_kv_heads
    model = replace(
        m,
        vocab_size=VOCAB,
        model_dim=32,
        num_heads=2,
        num_kv_heads=2 // groups,
        rope_dims=min(m.rope_dims, 8),
        bigram_vocab_size=min(m.bigram_vocab_size, 64),
        bigram_dim=8,
        ve_dim=8,
    )
    meta = base.train.meta and replace(base.train.meta, every=2)
    training = replace(
        base.train,
        steps=20,
        batch_tokens=2 * 4 * length,
        micro_batch_tokens=4 * length,
        seq_len=length,
        max_document=base.train.max_document and length,
        compute_dtype="float32",
        log_every=10,
        checkpoint_minutes=None,
        meta=meta,
    )
    ttt = replace(
        base.ttt,
        chunk_tokens=base.ttt.chunk_tokens * length // base.train.seq_len,
        lora=replace(base.ttt.lora, segment_tokens=length),
        guided=replace(base.ttt.guided, window_tokens=length),
    )
    return replace(
        base,
        model=model,
        train=training,
        data=replace(base.data, path=str(data), val_tokens=2048),
        quant=replace(base.quant, calibration_sequences=4, calibration_length=length, small_tensor=1000),
        eval=replace(base.eval, stride=16),
        ttt=ttt,
    )


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """Trained, packed and scored runs by preset, made on first use."""

    @functools.cache
    def make(name: str) -> RunFolder:
        folder = train(miniature(name, data), tmp_path_factory.mktemp("runs") / name).folder
        config = folder.read_config()
        quantize_run(folder, config.quant)
        pack_run(folder, config.pack)
        score_run(folder, config, "artifact", allow_illegal=name == ILLEGAL)
        return folder

    return make


# Settings of the presets


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("baseline", 17_059_912),
        ("exp106", 26_960_991),
        ("pr296_reptile", 26_829_913),
        ("pr296_error_guided", 26_829_913),
        ("pr301", 21_188_680),
        ("pr1250", 32_867_420),
        ("pr1855", 35_945_671),
    ],
)
def test_published_numbers_of_parameters(name, count):
    with torch.device("meta"):
        model = GPT(preset(name).model)
    assert preset(name).model.num_parameters() == sum(p.numel() for p in model.parameters()) == count


def test_exp106_trains_66_numbers_more():
    """A factor for each of 22 + 22 + 11 + 11 slots: 26,961,057 in training."""
    with torch.device("meta"):
        slots = sum(len(bank) for bank in GPT(preset("exp106").model).bank_parameters())
    assert preset("exp106").model.num_parameters() + slots == 26_961_057
    assert preset("exp106").train.meta.slot_rates


def test_switches_leave_no_parameter_behind():
    with torch.device("meta"):
        names = {name: GPT(preset(name).model).state_dict().keys() for name in SYSTEMS}
    assert {n.split(".")[0] for n in names["baseline"]} == {*BANK_NAMES, "tok_emb", "blocks", "skip_weights"}
    assert names["pr301"] == names["baseline"]
    assert "word_start_boost" not in names["pr1250"]
    assert {"smear.gate", "bigram.scale"} <= names["pr1250"]
    assert "word_start_boost" in names["exp106"]


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_shrunken_presets_keep_their_switches(name, size):
    base, small = preset(name), preset(f"{name}_{size}")
    assert small.name == f"{name}_{size}"
    groups = [c.model.num_heads // c.model.num_kv_heads for c in (base, small)]
    assert groups[0] == groups[1]
    for switch in ("smear", "word_start_boost", "ln_scale", "ve_enabled", "mlp_activation", "mlp_mult"):
        assert getattr(small.model, switch) == getattr(base.model, switch), switch
    for switch in ("z_loss", "warmdown_shape"):
        assert getattr(small.train, switch) == getattr(base.train, switch), switch
    for switch in ("tables", "bits", "method"):
        assert getattr(small.quant, switch) == getattr(base.quant, switch), switch
    for group in ("meta", "reptile", "qat"):
        assert (getattr(small.train, group) is None) == (getattr(base.train, group) is None), group
    assert (small.average.ema_decay == 0) == (base.average.ema_decay == 0)
    assert (small.average.swa_every is None) == (base.average.swa_every is None)
    if name != "exp106":  # small forms of exp101's family have an adapter of their own
        assert small.ttt.adapter == base.ttt.adapter
        assert small.ttt.parameters == base.ttt.parameters
        assert bool(small.ttt.epochs) == bool(base.ttt.epochs)
        assert (small.ttt.frozen_slots > 0) == (base.ttt.frozen_slots > 0)


def test_only_error_guided_is_illegal():
    illegal = {name for name, make in PRESETS.items() if make().ttt.illegal}
    assert illegal == {ILLEGAL}
    assert "C3" in preset(ILLEGAL).ttt.illegal


def test_shrink_on_the_command_line(capsys):
    assert cli.main(["config", "pr301", "--shrink", "tiny", "--train.steps", "7"]) == 0
    out = capsys.readouterr().out
    assert "pr301_tiny" in out
    assert "train.z_loss" in out
    assert cli.main(["config", "pr301", "--shrink=tiny", "--diff", "pr301_tiny"]) == 0
    assert "do not differ" in capsys.readouterr().out
    assert cli.main(["train", "pr301", "--shrink", "huge"]) == 2
    assert "--shrink is 'huge'; it must be one of small, tiny" in capsys.readouterr().err


# From training to the audit


@pytest.mark.parametrize("name", [*SYSTEMS, *EARLIER])
def test_trains_packs_and_scores(made, name):
    folder = made(name)
    config, scores = folder.read_config(), read_json(folder.path / "scores_artifact.json")
    for score in ("non_overlapping", "sliding", "sliding_ttt"):
        assert 0 < scores[score]["loss"] < math.log(VOCAB)  # it has learned something
    assert (scores["ttt_updates"] > 0) == (config.ttt.epochs > 0)
    assert (scores["sliding_ttt"]["loss"] != scores["sliding"]["loss"]) == (config.ttt.epochs > 0)
    assert scores["illegal"] == config.ttt.illegal
    tensors = read_quantized(folder)[0].tensors
    table = tensors["tok_emb.weight"]
    assert isinstance(table, QuantizedTensor) == (config.quant.tables == "int8")
    slots = {n: t for n, t in tensors.items() if n.startswith("blocks.") and isinstance(t, QuantizedTensor)}
    for slot, tensor in slots.items():
        assert tensor.bits == (8 if slot.endswith("attn_gate_w") else config.quant.bits)
    rows = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    reptile = config.train.reptile
    assert [row["step"] for row in steps] == list(range(1, 21))
    assert [row["step"] for row in steps if row["reptile"]] == ([] if reptile is None else [17, 18, 19, 20])
    assert any(row["meta_loss"] is not None for row in steps) == (config.train.meta is not None)
    assert any(row["qat"] for row in steps) == (config.train.qat is not None)


@pytest.mark.parametrize("name", others_slow([*SYSTEMS, *EARLIER], AUDITED))
def test_audit_passes_legal_presets_only(made, name):
    subject = open_target(made(name).path)
    results = {r.id: r for r in run_checks(c for c in checks(subject) if c.id not in SLOW)}
    failed = [r.id for r in results.values() if r.passed is False]
    assert failed == BROKEN.get(name, []), results
    if name == ILLEGAL:
        assert results["C3"].title == "chunks are scored before updates"
        assert "not all of which are scored" in results["C3"].evidence


@pytest.mark.parametrize("name", others_slow(["baseline", "pr296_reptile", "pr301", "pr1250"], SUBMITTED))
def test_the_submitted_script_computes_the_same_scores(made, data, tmp_path, name):
    write_submission(made(name), tmp_path, ABOUT)
    same_scores(made(name), call(tmp_path / "train_gpt.py", data))
    readme = (tmp_path / "README.md").read_text()
    assert f"{preset(name).quant.tables} tables" in readme


# The networks of --shrink tiny, by the commands


@pytest.fixture(scope="module")
def challenge_data(tmp_path_factory):
    """With the vocabulary size of the presets."""
    return make_dataset(tmp_path_factory.mktemp("data"), 1024)


@pytest.mark.parametrize("name", others_slow(SYSTEMS, ["pr296_reptile"]))
def test_commands_make_the_tiny_form_of_a_preset(challenge_data, tmp_path, name):
    """Ten steps, with every phase in effect."""
    out = str(tmp_path / "run")
    settings = {"data.path": challenge_data, "data.val-tokens": 1024, "train.steps": 10}
    settings |= {"train.lr-hold-steps": 2, "train.batch-tokens": 1024, "train.micro-batch-tokens": 1024}
    settings |= {"quant.calibration-length": 32, "quant.calibration-sequences": 4}
    words = [str(word) for flag, value in settings.items() for word in (f"--{flag}", value)]
    assert cli.main(["train", name, "--shrink", "tiny", *words, "--out", out]) == 0
    assert cli.main(["quantize", out]) == 0
    assert cli.main(["pack", out]) == 0
    assert cli.main(["eval", out, *(["--allow-illegal"] if name == ILLEGAL else [])]) == 0
    folder = RunFolder(tmp_path / "run")
    config, scores = folder.read_config(), read_json(folder.path / "scores_artifact.json")
    assert config.model == preset(f"{name}_tiny").model
    for score in ("non_overlapping", "sliding", "sliding_ttt"):
        assert 0 < scores[score]["loss"] < math.log(1024)
    rows = {kind: [row for row in folder.history() if row["kind"] == kind] for kind in ("step", "val")}
    steps, reptile, meta = rows["step"], config.train.reptile, config.train.meta
    assert len(steps) == 10
    assert sum(row["reptile"] for row in steps) == (0 if reptile is None else 2)
    assert any(row["meta_loss"] is not None for row in steps) == (meta is not None)
    assert any(row["qat"] for row in steps) == (config.train.qat is not None)
    if reptile is not None:  # it started from the average and changed it
        after, average = rows["val"]
        assert after["weights"] == "after Reptile"
        assert after["loss"] != average["loss"]
    if name == "pr301":
        assert [row["step"] for row in steps if row["qat"]] == [9, 10]


@pytest.mark.slow
def test_the_whole_network_of_pr_1855_takes_two_steps_of_caseops_text(tmp_path):
    """At full size, on one packed row of 2,048 tokens; the loop is on at the second step."""
    model = shutil.copy(
        real_data() / "tokenizers" / "fineweb_8192_bpe_caseops.model", tmp_path / "tokenizer.model"
    )
    tokenizer = Tokenizer.load(model)
    with lzma.open(real_data() / "docs" / "train_docs.jsonl.xz", "rt", encoding="utf-8") as lines:
        documents = [json.loads(line)["text"] for line in itertools.islice(lines, 20)]
    ids = np.concatenate([tokenizer.encode_document(text) for text in documents]).astype(np.uint16)
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", ids)
    settings = {"steps": 2, "schedule": "steps", "max_seconds": None, "loop_from": 0.5, "warmup_steps": 0}
    settings |= {"batch_tokens": 2048, "micro_batch_tokens": 2048}
    fields = {f"train__{name}": value for name, value in settings.items()}
    trainer = make_trainer(preset("pr1855", data__path=str(tmp_path), **fields))
    losses = [float(trainer.advance().loss) for _ in range(2)]
    trainer.loader.close()
    assert trainer.model.looping
    assert 8.9 < losses[0] < 9.1  # 9.00 to 9.01 in the record's logs
    assert math.isfinite(losses[1])


# Breaking the rules


def test_illegal_scores_need_an_option_and_are_labeled(made, tmp_path, capsys, monkeypatch):
    folder = made(ILLEGAL)
    path = folder.path / "scores_artifact.json"
    kept = path.read_text()
    path.unlink()
    assert cli.main(["eval", str(folder.path)]) == 2
    refused = capsys.readouterr().err
    assert "ttt.adapter error_guided breaks the rules" in refused
    assert "--allow-illegal" in refused
    assert not path.exists()
    assert cli.main(["eval", str(folder.path), "--allow-illegal", "--figures"]) == 0
    out = capsys.readouterr().out
    assert "sliding + TTT (ILLEGAL)" in out
    assert "BREAKS THE RULES" in out
    assert "bpb with TTT (ILLEGAL)" in out
    assert read_json(path)["illegal"] == TTTConfig(adapter="error_guided").illegal
    assert json.loads(kept)["sliding_ttt"] == read_json(path)["sliding_ttt"]
    with pytest.raises(PgolfError, match=r"breaks the rules.*It cannot be submitted"):
        write_submission(folder, tmp_path, ABOUT)
    assert cli.main(["ttt-sweep", str(folder.path), "--adapters", "run"]) == 2
    assert "breaks the rules" in capsys.readouterr().err
    assert cli.main(["ttt-sweep", str(folder.path), "--adapters", "run", "--allow-illegal"]) == 0
    out = capsys.readouterr().out
    assert "run (ILLEGAL)" in out
    assert "run BREAKS THE RULES" in out
    assert list(read_json(folder.path / "ttt_sweep.json")["illegal"]) == ["run"]
    assert cli.main(["audit", str(folder.path), "--only", "C3"]) == 1
    assert "1 of 1 do not hold: C3" in capsys.readouterr().out


def test_illegal_settings_on_any_run_are_refused(made, capsys):
    """The settings that score decide, not those of the run."""
    path = str(made("baseline").path)
    assert cli.main(["eval", path, "--ttt.adapter", "error_guided"]) == 2
    assert "--allow-illegal" in capsys.readouterr().err
    assert cli.main(["audit", path, "--only", "C3", "C5", "--ttt.adapter", "error_guided"]) == 1
    assert "1 of 2 do not hold: C3" in capsys.readouterr().out


def test_illegal_adapter_needs_permission():
    model, stream = guided_model()
    windows = plain_windows(stream.num_targets, 16)
    config = TTTConfig(adapter="error_guided", quantize_forward="none", guided=GUIDED)
    with pytest.raises(PgolfError, match="breaks the rules"):
        adapted(model, stream, windows, config)
    result = adapted(model, stream, windows, config, allow_illegal=True)
    assert result.updates == GUIDED.epochs * GUIDED.hard_windows(len(windows))
    assert len(result.by_chunk) == 1


GUIDED = GuidedConfig(share=0.25, window_tokens=16, rank=2, block_share=0.34, lr=0.02, epochs=4)


def guided_model():
    return randomize_(GPT(tiny_config(), torch.arange(96) % 3 == 0), 3), stream_of(text())


def test_error_guided_trains_on_the_hardest_windows():
    """Zero updates are the model itself; trained ones lower the loss where it was highest."""
    model, stream = guided_model()
    config = TTTConfig(adapter="error_guided", quantize_forward="none", guided=GUIDED)
    windows = plain_windows(stream.num_targets, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def by_window(losses_of):
        scorer = Scorer(stream, windows, 16, lambda length: 4)
        scorer.score(losses_of, 0, len(windows))
        return np.add.reduceat(scorer.losses.double().numpy(), scorer.places[:-1]) / np.diff(scorer.places)

    plain = by_window(Frozen(model).score)
    trained = []
    with borrowed(model):
        adapter = make_adapter(model, config, 16)
        np.testing.assert_allclose(by_window(adapter.score), plain, rtol=0, atol=1e-6)
        honest = adapter.adapt
        adapter.adapt = lambda scored: (trained.append(scored.tokens[0]), honest(scored))[1]
        scorer = Scorer(stream, windows, 16, lambda length: 4)
        chunks = adapting_chunks(windows, stream, config)[1]
        learn_and_score(GUIDED, adapter, scorer, chunks, "test")
        after = by_window(adapter.score)
        assert adapter.trainable == 2 * (96 + 32 + 32 + 96)  # one of three blocks: rank x (in + out), twice
    hardest = np.argsort(-plain)[: GUIDED.hard_windows(len(windows))]
    wanted = [stream.tokens[windows.start[i] : windows.end[i] + 1] for i in hardest] * GUIDED.epochs
    assert len(trained) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(trained, wanted, strict=True))
    assert after[hardest].mean() < plain[hardest].mean() - 0.05
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# Frozen blocks


@pytest.mark.parametrize("rule", [SGD, AdamW])
@pytest.mark.parametrize("parameters", ["blocks", "mlps"])
def test_frozen_blocks_stay_as_they_are(parameters, rule):
    """The first blocks do not change, not even by weight decay; in the others, the named parameters do."""
    model, stream = guided_model()
    config = TTTConfig(parameters=parameters, freeze_blocks=1, quantize_forward="none", lr=0.05, epochs=1)
    config = replace(config, weight_decay=0.1, batch_seqs=2, grad_clip=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    n = model.config.num_layers
    with borrowed(model):
        adapter = rule(model, config, 16)
        adapter.adapt(Scored(stream.tokens[None, :65].clone(), 0, 4))
        moved = {name: p.detach() != before[name] for name, p in model.named_parameters()}
        again = rule(model, config, 16)
        again.load_state({name: t.clone() for name, t in adapter.state().items()})
        for here, there in zip(adapter.banks().weights(), again.banks().weights(), strict=True):
            assert torch.equal(here, there)
    banks = ["mlp_up_bank", "mlp_down_bank"] if parameters == "mlps" else list(BANK_NAMES)
    trainable = 0
    for name, changed in moved.items():
        if name in BANK_NAMES:
            by_slot = changed.flatten(1).any(1)
            assert by_slot.tolist() == [name in banks and slot % n >= 1 for slot in range(len(by_slot))], name
            trainable += changed[by_slot].numel()
        else:
            late = name.startswith("blocks.") and not name.startswith("blocks.0.")
            wanted = parameters == "blocks" and (late or name == "skip_weights")
            assert bool(changed.any()) == wanted, name
            trainable += wanted * changed.numel()
    assert adapter.trainable == trainable


def test_nothing_left_to_adapt_is_refused():
    with pytest.raises(PgolfError, match=r"ttt\.freeze_blocks 11 leaves nothing to adapt: .* has 11 layers"):
        RunConfig(ttt=TTTConfig(parameters="blocks", freeze_blocks=11))


# z-loss in training


def test_training_minimizes_z_loss_and_scores_leave_it_out(data, tmp_path):
    """The training loss is CE + z mean(log Z squared), in value and gradients; validation is CE."""
    config = miniature("pr301", data)
    config = replace(config, train=replace(config.train, z_loss=0.5, steps=1))
    result = train(config, tmp_path / "run")
    step = next(json.loads(r) for r in result.folder.metrics_file.read_text().splitlines() if '"step"' in r)
    z = math.log(VOCAB)
    assert step["loss"] == pytest.approx(z + 0.5 * z * z, rel=0.02)  # hardly any logits yet
    assert result.raw.loss == pytest.approx(z, rel=0.02)
    model = load(result.folder, "float", config=config).model
    x = torch.randint(VOCAB, (2, 9))
    loss = model.loss(x[:, :-1], x[:, 1:], z_loss=0.5)
    logits = model.logits(x[:, :-1])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    wanted = wanted + 0.5 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, wanted)
    names = [n for n, p in model.named_parameters() if "bank" not in n]
    parameters = [p for n, p in model.named_parameters() if "bank" not in n]
    for name, got, want in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)


def test_without_averages_the_last_weights_stay(made):
    """ema_decay 0 means no average."""
    folder = made("baseline")
    checkpoint = max((folder.path / "checkpoints").glob("*.safetensors"))
    tensors, _ = load_tensors(checkpoint)
    final, _ = load_tensors(folder.model_file)
    for name, tensor in final.items():
        assert torch.equal(tensor, tensors[f"model.{name}"]), name
