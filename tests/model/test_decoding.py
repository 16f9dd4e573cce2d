"""Cached decoding against the full forward, for every variant of the network, and sampling."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import FRONTIER, tiny_config

from pgolf_fast.config.presets import small
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model import decoding
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.decoding import Decoder, generate, sample
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import native
from pgolf_fast.ops.mlp import ACTIVATIONS
from pgolf_fast.quant.calibration import self_generate
from pgolf_fast.quant.state import dequantize_state, packed_banks, quantize_state

VARIANTS = {
    "exp101": {},
    "no_trigram": {"trigram": False},
    "plain_hash": {"pos_conditional": False},
    "no_hash": {"bigram_vocab_size": 0, "trigram": False},
    "no_value_embedding": {"ve_enabled": False},
    "value_embedding_everywhere": {"ve_layers": (0, 1, 2, 3)},
    "no_xsa": {"xsa_last_n": 0},
    "xsa_last_two": {"xsa_last_n": 2},
    "full_rope": {"rope_dims": 0},
    "bf16_rope_tables": {"rope_bf16_tables": True},
    "swiglu": {"mlp_activation": "swiglu", "mlp_mult": 2.0},
    "relu_squared": {"mlp_activation": "relu_squared"},
    "no_smear": {"smear": False},
    "no_boost": {"word_start_boost": False, "pos_conditional": False},
    "grouped_heads": {"num_heads": 4, "num_kv_heads": 2},
    "five_layers": {"num_layers": 5, "ln_scale": False},
    **FRONTIER,
}


def random_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **changes: object) -> GPT:
    """Return a tiny network with random parameters only: zeros would hide parts of it."""
    config = tiny_config(**changes)
    generator = torch.Generator().manual_seed(seed)
    spaces = torch.rand(config.vocab_size, generator=generator) < 0.4
    model = GPT(config, spaces, compute_dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 0.8 + noise * 0.2)
    return model


def random_tokens(batch: int, length: int, vocab: int = 96) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(7))


def stepwise(model: GPT, tokens: torch.Tensor, **settings: object) -> torch.Tensor:
    decoder = Decoder(model, tokens.shape[0], tokens.shape[1], **settings)  # type: ignore[arg-type]
    return torch.stack([decoder.step(column) for column in tokens.unbind(1)], dim=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_step_matches_full_forward(variant):
    model = random_model(**VARIANTS[variant])
    tokens = random_tokens(3, 40)
    with torch.no_grad():
        full = model.logits(tokens)
    assert full.std() > 0.1
    torch.testing.assert_close(stepwise(model, tokens), full, atol=2e-4, rtol=1e-4)


def test_step_beyond_the_length_at_which_rope_changes_its_base():
    model = random_model(num_layers=2, ve_layers=(1,), rope_train_seq_len=32)
    tokens = random_tokens(1, 64)
    with torch.no_grad():
        full = model.logits(tokens)
    torch.testing.assert_close(stepwise(model, tokens), full, atol=5e-4, rtol=1e-3)
    other_base = model.head(model.hidden(tokens, context=32))
    assert (other_base - full).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_step_matches_growing_step(variant):
    model, tokens = random_model(**VARIANTS[variant]), random_tokens(3, 20)
    torch.testing.assert_close(
        stepwise(model, tokens, static=True), stepwise(model, tokens, static=False), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_small_preset_matches_full_forward_to_1e_4(static):
    """In float32, as calibration decodes, and beyond the length at which RoPE changes its base."""
    config = replace(small().model, rope_train_seq_len=48)
    model, tokens = GPT(config), random_tokens(2, 100, config.vocab_size)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    full = model.logits(tokens)
    assert full.std() > 1
    assert (stepwise(model, tokens, static=static) - full).abs().max() <= 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_step_matches_full_forward(dtype):
    """Two decoders take turns: neither graph writes into the other's memory."""
    config = small().model
    model, tokens = GPT(config, compute_dtype=dtype), random_tokens(4, 60, config.vocab_size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        exact = model.logits(tokens)  # on the CPU
        model, tokens = model.cuda(), tokens.cuda()
        full = model.logits(tokens)
    decoders = [Decoder(model, 4, 60), Decoder(model, 4, 60), Decoder(model, 4, 60, static=False)]
    steps = [[decoder.step(column) for decoder in decoders] for column in tokens.unbind(1)]
    assert all(decoder._graph is not None for decoder in decoders[:2])
    replayed, again, growing = (torch.stack(logits, dim=1) for logits in zip(*steps, strict=True))
    assert torch.equal(replayed, again)
    tolerance = 1e-3 if dtype == torch.float32 else 0.3
    assert (replayed - growing).abs().max() <= tolerance
    assert (replayed - full).abs().max() <= tolerance
    assert (replayed.cpu() - exact).abs().max() <= tolerance


def packed_and_dequantized(dtype: torch.dtype = torch.float32, **changes: object) -> tuple[GPT, GPT]:
    """Return two models of the same 6-bit weights: packed, and with float banks."""
    config = QuantConfig(method="round", grid="percentile")
    source = random_model(**changes)
    quantized = quantize_state(source.state_dict(), config)
    models = [GPT(source.config, source.has_leading_space, compute_dtype=dtype) for _ in range(2)]
    for model in models:
        model.load_state_dict(dequantize_state(quantized))
    codes = packed_banks(quantized)
    assert codes is not None
    models[0].use_packed(codes)
    return models[0], models[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_step_matches_the_dequantized_model(variant):
    packed, dense = packed_and_dequantized(**VARIANTS[variant])
    tokens = random_tokens(3, 30)
    want = stepwise(dense, tokens)
    for got in (stepwise(packed, tokens), stepwise(packed, tokens, static=True)):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    parts = VARIANTS[variant].keys() & {"head_gate", "lanes_from"}
    assert Decoder(packed, 3, 30)._blocks or parts or native.extension() is None


@pytest.mark.parametrize("batch", [2, 70])
def test_packed_step_by_operations(batch):
    """As on a GPU, in bfloat16, and for more texts than the C++ blocks take."""
    packed, dense = packed_and_dequantized()
    tokens = random_tokens(batch, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "NATIVE_TEXTS", 0)
        assert not Decoder(packed, batch, 6)._blocks
        torch.testing.assert_close(stepwise(packed, tokens), stepwise(dense, tokens), atol=2e-4, rtol=1e-4)
    packed, rounded = packed_and_dequantized(torch.bfloat16)
    exact = stepwise(dense, tokens)
    error = (stepwise(packed, tokens) - exact).abs().mean()
    assert error < 1.5 * (stepwise(rounded, tokens) - exact).abs().mean() + 1e-3


@pytest.fixture(params=["portable", "avx2", "avx512"])
def table(request):
    extension = native.extension()
    if extension is None or request.param not in extension.runnable_passes():
        pytest.skip(f"no {request.param} passes here")
    extension.choose_passes(request.param)
    yield request.param
    extension.choose_passes("auto")


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("changes", [{"num_heads": 4}, {"model_dim": 72, "num_heads": 6}])
def test_packed_step_of_every_instruction_set(changes):
    """Four query heads of a KV head, and heads of 12 channels, which are no whole vectors of 8 or 16."""
    packed, dense = packed_and_dequantized(**changes)
    tokens = random_tokens(2, 30)
    torch.testing.assert_close(stepwise(packed, tokens), stepwise(dense, tokens), atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("table")
def test_packed_step_is_the_same_for_any_number_of_threads():
    packed, _ = packed_and_dequantized()
    tokens, before = random_tokens(20, 40), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(Decoder(packed, 20, 40))
        logits = [[d.step(column) for column in tokens.unbind(1)] for d in results]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def block_arguments(**changes: object) -> dict[str, Any]:
    """Return arguments of a block of 2 texts, 4 query heads and 2 KV heads of 6 channels, and 5 positions."""
    sizes = {"batch": 2, "dim": 24, "heads": 4, "kv_heads": 2, "up_rows": 20, "hidden": 10, "half": 2}
    shapes = {"gain": (4,), "cos": (5, 2), "sin": (5, 2), "keys": (2, 2, 5, 6), "values": (2, 2, 5, 6)}
    shapes |= dict.fromkeys(("x_mix", "x0_mix", "attention_scale", "mlp_scale", "down_steps"), (24,))
    shapes |= {"attention_steps": (72,), "up_steps": (20,)}
    codes = {"attention": (72, 18), "up": (20, 18), "down": (24, 12)}
    arguments: dict[str, Any] = {"sizes": sizes | {"positions": 5}, "layer_scale": 1.0, "xsa": True}
    arguments |= {"activation": ACTIVATIONS.index("swiglu")}
    arguments |= {name: np.zeros(shape, np.uint8) for name, shape in codes.items()}
    arguments["arrays"] = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for name, value in changes.items():
        where = next((arguments[k] for k in ("sizes", "arrays") if name in arguments[k]), arguments)
        where[name] = value
    return arguments


def frozen(shape: tuple[int, ...]) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array.flags.writeable = False
    return array


WRONG_BLOCKS = [
    ("batch", 0, "sizes['batch'] is 0; a number from 1 to 1048576 is needed"),
    ("dim", -24, "sizes['dim'] is -24; a number from 1 to 1048576 is needed"),
    ("positions", 2**70, f"sizes['positions'] is {2**70}; a number from 1 to 1048576 is needed"),
    ("hidden", 2.5, "sizes['hidden'] is a float; a number from 1 to 1048576 is needed"),
    ("half", None, "sizes['half'] is None; a number from 0 to 1048576 is needed"),
    ("heads", 5, "sizes['dim'] is 24; a multiple of sizes['heads'], 5, is needed"),
    ("kv_heads", 3, "sizes['heads'] is 4; a multiple of sizes['kv_heads'], 3, is needed"),
    ("half", 4, "sizes['half'] is 4; at most half a head, 3, is needed"),
    ("up_rows", 21, "sizes['up_rows'] is 21; 20 for this sizes['hidden'] and activation is needed"),
    ("activation", 3, "activation is 3; 0, 1 or 2 is needed"),
    ("gain", None, "arrays['gain'] is None; a contiguous float32 array of shape (4,) is needed"),
    ("gain", [1.0] * 4, "arrays['gain'] is a list; a contiguous float32 array of shape (4,) is needed"),
    ("sin", np.ones((5, 2)), "arrays['sin'] is float64 of shape (5, 2); a contiguous float32 array of shape"),
    ("x_mix", np.ones(48, np.float32)[::2], "arrays['x_mix'] is strided float32 of shape (24,); a"),
    ("values", frozen((2, 2, 5, 6)), "arrays['values'] is read-only float32 of shape (2, 2, 5, 6); a"),
    ("keys", np.ones((2, 2, 4, 6), np.float32), "arrays['keys'] is float32 of shape (2, 2, 4, 6); a"),
    ("up_steps", np.ones(19, np.float32), "arrays['up_steps'] is float32 of shape (19,); a contiguous"),
    ("attention", np.zeros((71, 18), np.uint8), "attention is uint8 of shape (71, 18); a contiguous uint8"),
    ("down", np.zeros((24, 12), np.int8), "down is int8 of shape (24, 12); a contiguous uint8 array of"),
]
WRONG_STEPS = [
    ("x", np.zeros((2, 23), np.float32), "x is float32 of shape (2, 23); a writable contiguous float32"),
    ("x", frozen((2, 24)), "x is read-only float32 of shape (2, 24); a writable contiguous float32 array of"),
    ("x0", np.zeros((2, 24)), "x0 is float64 of shape (2, 24); a contiguous float32 array of shape (2, 24)"),
    ("x0", "x", "x0 is a str; a contiguous float32 array of shape (2, 24) is needed"),
    ("value_embed", np.zeros(24, np.float32), "value_embed is float32 of shape (24,); a contiguous float32"),
    ("position", 5, "position is 5; a number from 0 to 4 is needed"),
    ("position", -1, "position is -1; a number from 0 to 4 is needed"),
]


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
@pytest.mark.parametrize(("name", "value", "message"), WRONG_BLOCKS)
def test_wrong_arguments_of_a_block_are_named(name, value, message):
    make = native.extension().DecodeBlock
    make(**block_arguments())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make(**block_arguments(**{name: value}))


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
@pytest.mark.parametrize(("name", "value", "message"), WRONG_STEPS)
def test_wrong_arguments_of_a_step_are_named(name, value, message):
    block = native.extension().DecodeBlock(**block_arguments())
    x = {"x": np.ones((2, 24), np.float32), "x0": np.ones((2, 24), np.float32)}
    right = {**x, "value_embed": None, "position": 4}
    block.step(**right)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        block.step(**(right | {name: value}))


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
def test_missing_size_and_array_are_named():
    for where, name in (("sizes", "dim"), ("arrays", "cos")):
        arguments = block_arguments()
        del arguments[where][name]
        with pytest.raises(ValueError, match=re.escape(f"{where}['{name}'] is None; a")):
            native.extension().DecodeBlock(**arguments)


@torch.no_grad()
def test_packed_model_scores_like_the_dequantized_one_and_can_be_unpacked():
    packed, dense = packed_and_dequantized()
    tokens = random_tokens(2, 33)
    given = tokens[:, :-1], tokens[:, 1:]
    assert torch.equal(packed.token_losses(*given), dense.token_losses(*given))
    assert not any(bank.numel() for bank in packed.bank_parameters())
    with pytest.raises(PgolfError, match="packed banks decode and score only"):
        packed.banks()
    with packed.unpacked():
        assert all(map(torch.equal, packed.bank_parameters(), dense.bank_parameters()))
    assert torch.equal(packed.token_losses(*given), dense.token_losses(*given))


def test_packed_banks_hold_the_dequantized_values_or_are_refused():
    state = random_model().state_dict()
    quantized = quantize_state(state, QuantConfig(method="round"))
    packed, want = packed_banks(quantized), dequantize_state(quantized)
    assert packed is not None
    assert all(torch.equal(b, want[n]) for n, b in zip(BANK_NAMES, packed.unpacked(), strict=True))
    rest = dequantize_state(quantized, banks=False)
    assert rest.keys() == want.keys() - set(BANK_NAMES)
    assert all(torch.equal(rest[name], want[name]) for name in rest)
    parts = (packed.attention, packed.up, packed.down)
    size = sum(t.nbytes for part in parts for t in (part.codes, part.scale))
    assert size < 0.6 * 2 * sum(want[name].numel() for name in BANK_NAMES)  # steps weigh here
    assert packed_banks(quantize_state(state, QuantConfig(method="round", bits=8))) is None


def test_calibration_text_from_packed_banks():
    packed, dense = packed_and_dequantized()
    quick = QuantConfig(calibration_sequences=6, calibration_length=24, calibration_batch=4)
    text, want = self_generate(dense, quick, 24, packed.packed), self_generate(dense, quick, 24)
    assert (text == want).float().mean() > 0.8  # rounding may flip a draw


def test_bfloat16_stays_close_to_float32():
    tokens = random_tokens(2, 24)
    exact = stepwise(random_model(), tokens)
    with torch.no_grad():
        full = random_model(dtype=torch.bfloat16).logits(tokens)
    rounded = stepwise(random_model(dtype=torch.bfloat16), tokens)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 1.5 * (full - exact).abs().mean() + 1e-3


def test_decoder_made_in_inference_mode_works_outside_it():
    model, tokens = random_model(), random_tokens(2, 6)
    want = stepwise(model, tokens)
    with torch.inference_mode():
        decoder = Decoder(model, 2, 6)
        first = [decoder.step(column) for column in tokens[:, :3].unbind(1)]
    rest = [decoder.step(column) for column in tokens[:, 3:].unbind(1)]
    assert torch.equal(torch.stack([*first, *rest], dim=1), want)


def test_too_many_steps_and_wrong_shapes_are_rejected():
    model = random_model()
    decoder = Decoder(model, 2, 1)
    with pytest.raises(PgolfError, match=r"shape \(3,\).*\(2,\)"):
        decoder.step(torch.zeros(3, dtype=torch.long))
    decoder.step(torch.zeros(2, dtype=torch.long))
    with pytest.raises(PgolfError, match="already have 1 tokens"):
        decoder.step(torch.zeros(2, dtype=torch.long))
    with pytest.raises(PgolfError, match="at least 1"):
        Decoder(model, 0, 4)


def test_generate_greedy_follows_the_full_forward():
    model, prompt = random_model(), random_tokens(2, 5)
    text = generate(model, prompt, 8, temperature=0)
    assert torch.equal(text[:, :5], prompt)
    for position in range(5, 13):
        with torch.no_grad():
            best = model.logits(text[:, :position])[:, -1].argmax(-1)
        assert torch.equal(text[:, position], best)


def test_generate_depends_on_the_generator_only():
    model = random_model()
    runs = [
        generate(
            model,
            torch.tensor([[1], [2]]),
            20,
            temperature=0.8,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    ]
    assert runs[0].shape == (2, 21)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_generate_rejects_bad_prompts():
    model = random_model()
    with pytest.raises(PgolfError, match="outside 0 to 95"):
        generate(model, torch.tensor([[96]]), 1)
    with pytest.raises(PgolfError, match="cannot continue"):
        generate(model, torch.zeros(2, 0, dtype=torch.long), 1)


def test_sample_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(200, 4)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, generator=generator).tolist()) == {0, 1, 2, 3}
    assert sample(logits, temperature=0).unique().tolist() == [3]
    for temperature in (-1.0, float("nan")):
        with pytest.raises(PgolfError, match="must be 0 or more"):
            sample(logits, temperature=temperature)
