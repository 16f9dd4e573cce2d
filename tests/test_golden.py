"""Agreement with vectors computed by the original programs (PR 1501, PR 1502, PR 1855).

Every .npz of PGOLF_GOLDEN_DIR (default: tests/golden) is checked by the prefix of its name.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import real_data
from helpers import gptq_alone
from torch import nn

from pgolf_fast.config.schema import EvalConfig, MetaConfig, ModelConfig, RunConfig, TTTConfig
from pgolf_fast.data import caseops
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.evaluation.protocol import score_and_adapt, target_chunks
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import Evaluator
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import reference
from pgolf_fast.optim.muon import Muon
from pgolf_fast.quant.grid import quantize_int8_rows, quantize_rows
from pgolf_fast.train.meta import SlotRates, meta_step

FOLDER = Path(os.environ.get("PGOLF_GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
RATES = {"qo": "qo_bank", "kv": "kv_bank", "up": "mlp_up_bank", "down": "mlp_down_bank"}
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)


def read(path):
    with np.load(path) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    return json.loads(bytes(values.pop("meta"))), values


def golden_model(meta, values):
    """The model of a golden file, in float32, with its parameters loaded strictly."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    settings = {name: value for name, value in meta.items() if name in fields}
    layers = settings["ve_layers"]
    settings["ve_layers"] = tuple(int(i) for i in layers.split(",")) if settings["ve_enabled"] else ()
    for name in ("trigram", "pos_conditional"):
        settings[name] = bool(settings[name])
    model = GPT(ModelConfig(**settings, frozen_skips=0), torch.tensor(values["has_leading_space"]))
    prefix = "param/"
    state = {n.removeprefix(prefix): torch.tensor(v) for n, v in values.items() if n.startswith(prefix)}
    model.load_state_dict(state, strict=True)
    return model


def assert_gradients(model, values):
    """Every gradient of the file within 1e-3 of its tensor's maximum, and none that is not in the file."""
    for name, parameter in model.named_parameters():
        if f"grad/{name}" not in values:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        want = torch.tensor(values[f"grad/{name}"])
        error = (parameter.grad - want).abs().max() / want.abs().max().clamp_min(1e-12)
        assert error <= 1e-3, f"{name}: gradient off by {error:.1e} of its maximum"


def check_forward(meta, values):
    model = golden_model(meta, values)
    tokens, targets = torch.tensor(values["input_ids"]), torch.tensor(values["target_ids"])
    split = model.has_leading_space if meta["pos_conditional"] else None
    bigram, trigram = reference.ngram_rows(tokens, meta["bigram_vocab_size"], split, bool(meta["trigram"]))
    assert np.array_equal(bigram, values["bigram_index"])
    if trigram is not None:
        assert np.array_equal(trigram, values["trigram_index"])
    assert np.abs(model.logits(tokens).detach().numpy() - values["logits"]).max() <= 2e-4
    for allocate in (False, True):  # gradients by autograd, then by the in-place gradient banks
        model.zero_grad()
        if allocate:
            model.allocate_gradient_banks()
        loss = model.loss(tokens, targets)
        assert abs(float(loss.detach()) - float(values["loss"])) <= 1e-5
        loss.backward()
        assert_gradients(model, values)


def check_fomaml(meta, values):
    model = golden_model(meta, values)
    config = MetaConfig(
        inner_lr=meta["inner_lr"], weight=meta["loss_weight"], freeze_blocks=meta["freeze_blocks"]
    )
    tokens, targets = torch.tensor(values["input_ids"]), torch.tensor(values["target_ids"])
    outer = meta_step(model, tokens, targets, config, loss_scale=meta["grad_scale"])
    assert abs(outer - float(values["outer_loss"])) <= 1e-5
    assert_gradients(model, values)


def check_metasgd(meta, values):
    given = {
        name: [torch.tensor(values.pop(f"{kind}/meta_sgd_{short}")) for kind in ("param", "grad")]
        for short, name in RATES.items()
    }
    model = golden_model(meta, values)
    rates = SlotRates(model)
    rates.load_state_dict({name: rate for name, (rate, _) in given.items()})
    config = MetaConfig(
        method="cross_chunk",
        inner_lr=meta["inner_lr"],
        weight=meta["loss_weight"],
        delta_weight=meta["delta_weight"],
        freeze_blocks=meta["freeze_blocks"],
        slot_rates=True,
    )
    tokens, targets = torch.tensor(values["input_ids"]), torch.tensor(values["target_ids"])
    outer = meta_step(model, tokens, targets, config, loss_scale=meta["grad_scale"], rates=rates)
    assert abs(outer - float(values["outer_loss"])) <= 1e-5
    assert_gradients(model, values)
    for name, rate in rates.named_parameters():
        error = (rate.grad - given[name][1]).abs().max() / given[name][1].abs().max()
        assert error <= 1e-3, f"{name}: rates' gradient off by {error:.1e} of its maximum"


def check_legal_ttt(meta, values):
    model = golden_model(meta, values)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    table = ByteTable(values["base_bytes"], values["has_leading_space"], values["is_boundary_token"])
    stream = Stream(values["val_tokens"], table, torch.device("cpu"))
    windows = sliding_windows(stream.num_targets, meta["seq_len"], meta["stride"], repeat_tail=True)
    settings = TTTConfig(
        chunk_tokens=meta["chunk_tokens"],
        epochs=meta["epochs"],
        lr=meta["lr"],
        momentum=meta["momentum"],
        batch_seqs=meta["batch_seqs"],
        grad_clip=meta["grad_clip"],
        freeze_blocks=meta["freeze_blocks"],
        parameters="all",
        quantize_forward="none",
    )
    scoring = EvalConfig(seq_len=meta["seq_len"], stride=1, batch_seqs=16)
    evaluator = Evaluator(model, stream, RunConfig(model=model.config, eval=scoring))
    chunks = target_chunks(windows, stream.num_targets, settings.chunk_tokens)
    for epochs, suffix in ((meta["epochs"], ""), (0, "_no_ttt")):
        with evaluator.adapter(dataclasses.replace(settings, epochs=epochs)) as adapter:
            score = score_and_adapt(adapter, evaluator.scorer(windows), chunks, "golden")[-1]
            for name, bank in zip(BANK_NAMES, model.bank_parameters() if epochs else (), strict=False):
                error = np.abs(bank.detach().numpy() - values[f"adapted/{name}"]).max()
                assert error <= 1e-4, name
        assert abs(score.loss - meta[f"val_loss{suffix}"]) <= 1e-4
        assert abs(score.bpb - meta[f"val_bpb{suffix}"]) <= 1e-4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} was not restored"


def check_gptq(meta, values):
    weight, hessian = torch.tensor(values["weight"]), torch.tensor(values["hessian"])
    clip = meta["clip_range"]
    made = {
        "gptq": gptq_alone(
            weight, hessian, clip_range=clip, percentiles=PERCENTILES, block_size=meta["block_size"]
        ),
        "per_row": quantize_rows(weight, clip_range=clip, percentiles=PERCENTILES),
        "int8": quantize_int8_rows(weight),
    }
    for kind, (codes, scale) in made.items():
        equal = (codes.numpy() == values[f"q_{kind}"]).mean()
        assert equal >= 0.999, f"{kind}: {equal:.2%} of the codes agree"
        np.testing.assert_allclose(scale.float().numpy(), values[f"scale_{kind}"], rtol=1e-3)


def check_muon(meta, values):
    """Bit for bit where bfloat16 products round alike; elsewhere to bfloat16 accuracy."""
    count = sum(name.startswith("init/") for name in values)
    banks = {str(i): nn.Parameter(torch.tensor(values[f"init/{i}"])) for i in range(count)}
    muon = Muon(banks, weight_decay=meta["weight_decay"], newton_schulz_steps=meta["steps"])
    for t in range(sum(name.endswith("/0") and name.startswith("after/") for name in values)):
        for i, bank in banks.items():
            bank.grad = torch.tensor(values[f"grad/{t}/{i}"])
        muon.step(lr=meta["lr"], momentum=meta["momentum"])
        for i, bank in banks.items():
            want, start = torch.tensor(values[f"after/{t}/{i}"]), torch.tensor(values[f"init/{i}"])
            error = (bank.detach() - want).norm() / (want - start).norm()
            assert error <= 0.05, f"bank {i} after step {t + 1}: {error:.1%} of the change"


def check_caseops(meta, values):
    """Text first; tokens need the record's tokenizer."""
    for row in meta["rows"]:
        assert caseops.encode(row["text"]) == row["encoded"]
        assert caseops.decode(row["encoded"]) == row["text"]
    for text in meta["must_reject"]:
        with pytest.raises(ValueError, match=r"position \d+: "):
            caseops.decode(text)
    tokenizer = Tokenizer.load(real_data() / "tokenizers" / "fineweb_8192_bpe_caseops.model")
    assert tokenizer.vocab_size == meta["vocab"]
    for row in meta["rows"]:
        ids, counts = tokenizer.encode_document_with_bytes(row["text"])
        assert ids.tolist() == [1, *row["ids"]] == tokenizer.encode_document(row["text"])
        assert counts.tolist() == [0, *row["byte_counts"]]
        assert [tokenizer.piece(i) for i in row["ids"]] == row["pieces"]
        _, spans = tokenizer.encode_with_spans(row["encoded"])
        assert [row["encoded"].encode()[a:b].decode() for a, b in spans] == row["surfaces"]


CHECKS = {
    "forward_": check_forward,
    "fomaml_": check_fomaml,
    "metasgd_": check_metasgd,
    "legal_ttt_": check_legal_ttt,
    "gptq_": check_gptq,
    "muon": check_muon,
    "frontier_caseops": check_caseops,
}


def test_there_are_golden_files():
    assert FILES, f"no .npz in {FOLDER}: set PGOLF_GOLDEN_DIR to a folder that has some"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    check = next((check for prefix, check in CHECKS.items() if path.name.startswith(prefix)), None)
    assert check is not None, f"{path.name} has no known prefix: {', '.join(CHECKS)}"
    check(*read(path))
