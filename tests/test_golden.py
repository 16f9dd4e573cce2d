"""Agreement with vectors computed by the original programs (PR 1501, PR 1502, PR 1855).

Every .npz of PGOLF_GOLDEN_DIR (default: tests/golden) is checked by the prefix of its name.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import real_data
from helpers import gptq_alone
from torch import nn

from pgolf_fast.config.schema import (
    AverageConfig,
    EvalConfig,
    MetaConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TTTConfig,
)
from pgolf_fast.data import caseops
from pgolf_fast.data.loader import segment_starts
from pgolf_fast.data.tokenizer import ByteTable, Tokenizer
from pgolf_fast.evaluation.protocol import score_and_adapt, target_chunks
from pgolf_fast.evaluation.score import Stream
from pgolf_fast.evaluation.scores import Evaluator
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.segments import Segments
from pgolf_fast.ops import reference
from pgolf_fast.optim.average import WeightAverage
from pgolf_fast.optim.muon import Muon
from pgolf_fast.optim.optimizer import Optimizer
from pgolf_fast.quant import sdclip
from pgolf_fast.quant.grid import dequantize, quantize_int8_rows, quantize_rows
from pgolf_fast.quant.state import QuantizedTensor
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


FRONTIER_PARTS = {  # settings of the vectors as ours
    "vocab_size": "vocab_size",
    "num_layers": "num_layers",
    "model_dim": "model_dim",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "mlp_mult": "mlp_mult",
    "rope_dims": "rope_dims",
    "rope_base": "rope_base",
    "qk_gain_init": "qk_gain_init",
    "num_loops": "num_loops",
    "loop_start": "loop_start",
    "loop_end": "loop_end",
    "xsa_last_n": "xsa_last_n",
    "sparse_attn_gate_scale": "gate_scale",
    "gate_window": "gate_window",
    "skip_gates_enabled": "skip_gates",
    "smear_gate_enabled": "smear",
    "logit_softcap": "logit_softcap",
    "ln_scale": "ln_scale",
    "bos_id": "bos_id",
}
FRONTIER_NAMES = {"attn_gate_proj.weight": "attn_gate_w"}  # tensors of the vectors as ours


def frontier_config(meta):
    gates = {
        "sparse_attn_gate_enabled": "sparse",
        "gated_attn_enabled": "dense",
        "attn_out_gate_enabled": "output_q" if meta["attn_out_gate_src"] == "q" else "output",
    }
    return ModelConfig(
        **{ours: meta[theirs] for theirs, ours in FRONTIER_PARTS.items()},
        head_gate=next((ours for theirs, ours in gates.items() if meta[theirs]), None),
        lanes_from=meta["parallel_start_layer"] or None,
        lanes_end={"attn": "attention"}.get(meta["parallel_final_lane"], meta["parallel_final_lane"]),
        smear_form="gated",
        bigram_vocab_size=0,
        trigram=False,
        ve_enabled=False,
        frozen_skips=0,
    )


def check_frontier_forward(meta, values):
    model = GPT(frontier_config(meta))
    model.looping = meta["looping"]
    layers = [visit.layer for visit in model.plan]
    assert (layers[: len(layers) // 2], layers[len(layers) // 2 :]) == (meta["encoder"], meta["decoder"])
    for theirs, ours in FRONTIER_NAMES.items():
        values = {name.replace(theirs, ours): value for name, value in values.items()}
    names = model.state_dict()
    given = {n.removeprefix("param/"): torch.tensor(v) for n, v in values.items() if n.startswith("param/")}
    unused = {n for n in given if n not in names}  # lambdas of lanes that the network does not have
    assert all(n.startswith("parallel_") and model.config.lanes_from is None for n in unused)
    model.load_state_dict({n: v for n, v in given.items() if n not in unused}, strict=True)
    tokens, targets = torch.tensor(values["input_ids"]), torch.tensor(values["target_ids"])
    segments = None
    if "cu_seqlens" in values:
        cu_seqlens, longest = values["cu_seqlens"], int(values["max_document"])
        starts = segment_starts(values["input_ids"][0], meta["bos_id"], longest)
        assert [*np.unique(starts)] == [*np.unique(cu_seqlens)]
        segments = Segments(torch.tensor(cu_seqlens), longest)
    with torch.no_grad():
        hidden = model.hidden(tokens, segments=segments)
        assert np.abs(hidden.numpy() - values["hidden"]).max() <= 2e-4
        assert np.abs(model.head(hidden).numpy() - values["logits"]).max() <= 2e-4
        losses = model.token_losses(tokens, targets, segments=segments)
        assert np.abs(losses.numpy() - values["token_loss"]).max() <= 1e-4
    for allocate in (False, True):
        model.zero_grad()
        if allocate:
            model.allocate_gradient_banks()
        loss = model.loss(tokens, targets, segments=segments)
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


def check_frontier_gptq(meta, values):
    """Codes, scales and corrections exactly; `row_order`, the record's order in its file, is not ours."""
    norms = {}
    for name, rule in meta["matrices"].items():
        arrays = {n.removeprefix(f"{name}/"): torch.tensor(v) for n, v in values.items()}
        weight, hessian, clip = arrays["weight"], arrays["hessian"], rule["clip_range"]
        settings = {"block_size": meta["block_size"], "damping": meta["damping"]}
        codes, scale = gptq_alone(weight, hessian, clip_range=clip, sigmas=rule["clip_sigmas"], **settings)
        assert torch.equal(codes, arrays["codes"]), name
        assert torch.equal(scale.float(), arrays["scale"]), name
        error = weight - dequantize(codes, scale)
        norms[name] = error.norm().item()
        assert math.isclose(norms[name], rule["error_norm"], rel_tol=1e-6)
        pair = sdclip.low_rank(error, meta["lqer_rank"])
        given = arrays["factor_a"], arrays["factor_b"]
        torch.testing.assert_close(pair[0] @ pair[1], given[0] @ given[1], rtol=1e-4, atol=1e-5)
        factors = sdclip.quantized_factors(*given, meta["lqer_group"])
        for factor, part in zip(factors, ("lqer_a", "lqer_b"), strict=True):
            assert torch.equal(factor.codes.flatten(), arrays[part].flatten()), (name, part)
            assert torch.equal(factor.scale.float(), arrays[f"{part}_scale"].flatten()), (name, part)
        whole = QuantizedTensor(codes, scale, 8, low_rank=factors).dequantized()
        torch.testing.assert_close(whole, arrays["dequantised"], rtol=0, atol=1e-6)
    assert sorted(norms, key=lambda name: -norms[name]) == meta["lqer_order"]
    gate = sdclip.int8_rows(torch.tensor(values["gate/weight"]))
    assert np.array_equal(gate.codes, values["gate/codes"])
    assert np.array_equal(gate.scale.float(), values["gate/scale"])


def check_frontier_awq(meta, values):
    weight, hessian = torch.tensor(values["weight"]), torch.tensor(values["hessian"])
    group, clip = meta["group_size"], meta["clip_range"]
    inputs = torch.diag(torch.tensor(values["activation_rms"]).double().square())
    scores = sdclip.group_scores(weight, inputs, group)
    np.testing.assert_allclose(scores, values["scores"], rtol=1e-6)
    first = group * int(scores.argmax())
    assert [[first, first + group]] == meta["groups"]
    settings = {"sigmas": meta["clip_sigmas"], "bits": 1 + clip.bit_length(), "damping": meta["damping"]}
    got = sdclip.protect(weight, hessian, first, group=group, **settings)
    assert np.array_equal(got.codes, values["codes"])
    assert np.array_equal(got.scale.float(), values["scale"])
    assert np.array_equal(got.protected[1].float(), values["protected_scale"])
    whole = dequantize(got.codes, got.scale)
    columns = slice(first, first + group)
    whole[:, columns] = dequantize(got.codes[:, columns], got.protected[1])
    assert np.array_equal(whole, values["dequantised"])


def check_muon(meta, values, limit=0.05, **kind):
    """Bit for bit where bfloat16 products round alike; elsewhere to bfloat16 accuracy."""
    count = sum(name.startswith("init/") for name in values)
    banks = {str(i): nn.Parameter(torch.tensor(values[f"init/{i}"])) for i in range(count)}
    muon = Muon(banks, weight_decay=meta["weight_decay"], newton_schulz_steps=meta["steps"], **kind)
    for t in range(sum(name.endswith("/0") and name.startswith("after/") for name in values)):
        for i, bank in banks.items():
            bank.grad = torch.tensor(values[f"grad/{t}/{i}"])
        muon.step(lr=meta["lr"], momentum=meta["momentum"])
        for i, bank in banks.items():
            want, start = torch.tensor(values[f"after/{t}/{i}"]), torch.tensor(values[f"init/{i}"])
            error = (bank.detach() - want).norm() / (want - start).norm()
            assert error <= limit, f"bank {i} after step {t + 1}: {error:.1%} of the change"


def check_frontier_muon(meta, values):
    """Row norm and Polar Express in float64, then whole steps in bfloat16."""
    coefficients = [number for step in meta["coeffs"] for number in step]
    count = sum(name.startswith("polar_in/") for name in values)
    for i in range(count):
        given = torch.tensor(values[f"polar_in/{i}"]).double()
        stack = given if given.ndim == 3 else given[None]
        muon = Muon(
            {},
            weight_decay=0,
            newton_schulz_steps=len(meta["coeffs"]),
            coefficients=coefficients,
            row_norm=True,
        )
        got = muon.orthogonalize(stack).reshape(given.shape)
        np.testing.assert_allclose(got, values[f"polar_out/{i}"], atol=1e-6)
    # the vectors, which iterate in bfloat16, are up to 0.052 from an iteration in float32
    check_muon(meta, values, limit=0.08, coefficients=coefficients, row_norm=True)


def check_frontier_train_steps(meta, values):
    """Steps of all three groups and the EMA; what Muon computes in bfloat16 to its accuracy."""
    model = GPT(frontier_config({"bos_id": 1, **meta}))
    model.load_state_dict({n[6:]: torch.tensor(v) for n, v in values.items() if n.startswith("param/")})
    decays = {"weight_decay": meta["muon_wd"], "embed_weight_decay": meta["embed_wd"]}
    config = OptimConfig(
        **{name: meta[name] for name in ("matrix_lr", "scalar_lr", "adam_eps", "muon_momentum")},
        **decays,
        scalar_weight_decay=meta["adam_wd"],
        embed_lr=meta["tied_embed_lr"],
        adam_beta1=meta["beta1"],
        adam_beta2=meta["beta2"],
        grad_clip=meta["grad_clip_norm"],
        muon_momentum_start=meta["momentum"][0],
        muon_polar_express=True,
        muon_row_norm=True,
    )
    optimizer = Optimizer(model, config)
    average = WeightAverage(model, AverageConfig(ema_decay=meta["ema_decay"], ema_every=1, swa_every=None))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for t, momentum in enumerate(meta["momentum"]):
        model.looping = meta["looping"][t]
        loss = model.loss(*(torch.tensor(values[name][t]) for name in ("input_ids", "target_ids")))
        # after the first step weights differ as Muon's bfloat16 rounds
        assert abs(float(loss.detach()) - meta["loss"][t]) <= (1e-5 if t == 0 else 1e-2)
        loss.backward()
        assert abs(float(optimizer.clip()) / meta["grad_norm"][t] - 1) <= (1e-4 if t == 0 else 2e-2)
        optimizer.muon_momentum = lambda step, momentum=momentum: momentum
        optimizer.step(t, meta["lr_mul"][t])
        optimizer.zero_grad()
        average.update(t + 1, meta["lr_mul"][t])
        for name, tensor in model.state_dict().items():
            assert_moved_alike(name, tensor, before[name], torch.tensor(values[f"after/{t}/{name}"]))
    for name, tensor in average.final().items():
        assert_moved_alike(name, tensor, before[name], torch.tensor(values[f"ema/{name}"]))


def assert_moved_alike(name, got, start, want):
    error, change = (got - want).norm(), (want - start).norm()
    assert error <= 0.08 * change + 1e-6, f"{name}: {error:.1e} of a change of {change:.1e}"


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
    "frontier_forward_": check_frontier_forward,
    "forward_": check_forward,
    "fomaml_": check_fomaml,
    "metasgd_": check_metasgd,
    "legal_ttt_": check_legal_ttt,
    "gptq_": check_gptq,
    "muon": check_muon,
    "frontier_train_steps": check_frontier_train_steps,
    "frontier_muon": check_frontier_muon,
    "frontier_gptq": check_frontier_gptq,
    "frontier_awq": check_frontier_awq,
    "frontier_caseops": check_caseops,
}


def test_there_are_golden_files():
    assert FILES, f"no .npz in {FOLDER}: set PGOLF_GOLDEN_DIR to a folder that has some"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path):
    check = next((check for prefix, check in CHECKS.items() if path.name.startswith(prefix)), None)
    assert check is not None, f"{path.name} has no known prefix: {', '.join(CHECKS)}"
    check(*read(path))
