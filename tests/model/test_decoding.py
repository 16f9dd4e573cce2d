"""Cached decoding against the full forward, for every variant of the network, and sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny_config

from pgolf_fast.config.presets import small
from pgolf_fast.config.schema import QuantConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model import decoding
from pgolf_fast.model.bank import BANK_NAMES
from pgolf_fast.model.decoding import Decoder, generate, sample
from pgolf_fast.model.gpt import GPT
from pgolf_fast.ops import native
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
    assert Decoder(packed, 3, 30)._blocks or native.extension() is None


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


@pytest.mark.skipif(native.extension() is None, reason="no C++ codecs")
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
    with pytest.raises(PgolfError, match="negative"):
        sample(logits, temperature=-1.0)
