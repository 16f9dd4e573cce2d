"""The network: parameters, gradients, and what a prediction depends on."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import FRONTIER, randomize_, tiny_config

from pgolf_fast.config.schema import ModelConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.model.bank import BANK_NAMES, make_banks
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.rope import rope_base, rope_tables

EXP101_SHAPES = {  # of the published checkpoint
    "qo_bank": (22, 512, 512),
    "kv_bank": (22, 256, 512),
    "mlp_up_bank": (11, 1536, 512),
    "mlp_down_bank": (11, 512, 1536),
    "tok_emb.weight": (1024, 512),
    "bigram.embed.weight": (4096, 64),
    "bigram.proj.weight": (512, 64),
    "bigram.scale": (),
    "word_start_boost": (),
    "smear.gate": (512,),
    "skip_weights": (5, 512),
    "ve_shared.embed.weight": (1024, 128),
    "ve_shared.proj.weight": (256, 128),
    "ve_shared.scale": (),
    **{f"ve_layer_scales.{i}": (1,) for i in range(4)},
    **{f"blocks.{i}.attn.q_gain": (8,) for i in range(11)},
    **{f"blocks.{i}.attn_scale": (512,) for i in range(11)},
    **{f"blocks.{i}.mlp_scale": (512,) for i in range(11)},
    **{f"blocks.{i}.resid_mix": (2, 512) for i in range(11)},
}
CONFIGS = {
    "all features": {},
    "swiglu": {"mlp_activation": "swiglu", "mlp_mult": 2.5},
    "relu": {"mlp_activation": "relu_squared"},
    "no ve": {"ve_enabled": False},
    "no bigram": {"bigram_vocab_size": 0, "trigram": False},
    "odd layers": {"num_layers": 5, "frozen_skips": 1},
    "one layer": {"num_layers": 1, "ve_layers": (0,)},
    "plain": {"xsa_last_n": 0, "ln_scale": False, "pos_conditional": False, "trigram": False, "rope_dims": 0},
    "no smear": {"smear": False},
    "no boost": {"word_start_boost": False},
    "no boost, no split": {"word_start_boost": False, "pos_conditional": False},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "xsa_last_n": 2},
    **FRONTIER,
}


def make(seed=0, compute_dtype=torch.float32, **changes):
    config = tiny_config(**changes)
    starts = torch.rand(config.vocab_size, generator=torch.Generator().manual_seed(9)) < 0.4
    return randomize_(GPT(config, starts, compute_dtype=compute_dtype), seed)


def batch(rows=2, length=9, vocab=96):
    text = torch.randint(vocab, (rows, length + 1))
    return text[:, :-1], text[:, 1:]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def test_parameters_of_exp101():
    with torch.device("meta"):  # the names and shapes, without 22 orthogonal matrices of 512 x 512
        state = GPT(ModelConfig()).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == EXP101_SHAPES
    assert len(state) == 62
    assert sum(t.numel() for t in state.values()) == ModelConfig().num_parameters() == 26_960_991
    banks = {name: p for name, p in state.items() if name.endswith("_bank")}
    assert sum(p.numel() for p in banks.values()) == 25_952_256
    assert tuple(banks) == BANK_NAMES


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_num_parameters(changes):
    config = tiny_config(**changes)
    assert config.num_parameters() == sum(p.numel() for p in GPT(config).parameters())


def test_initial_values():
    """As in PR 1501, every value rounded to bfloat16."""
    config = tiny_config(model_dim=64, ve_dim=32, vocab_size=512, bigram_dim=32, num_layers=6, frozen_skips=2)
    model, n, eye = GPT(config), 6, torch.eye(64)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameter.bfloat16().float()), name
    rounded = {"rtol": 0, "atol": 0.02}  # orthogonal up to the rounding
    for i in range(n):
        torch.testing.assert_close(model.qo_bank[i] @ model.qo_bank[i].T, eye, **rounded)
        up = model.mlp_up_bank[i]
        torch.testing.assert_close(up.T @ up, eye, **rounded)
    for kv in model.kv_bank:
        torch.testing.assert_close(kv @ kv.T, torch.eye(32), **rounded)
    assert not model.qo_bank[n:].any()
    assert not model.mlp_down_bank.any()
    assert len({tuple(q.flatten()[:4].tolist()) for q in model.qo_bank[:n]}) == n
    assert not model.bigram.embed.weight.any()
    torch.testing.assert_close(
        model.bigram.proj.weight.T @ model.bigram.proj.weight, torch.eye(32), **rounded
    )
    ve = model.ve_shared.proj.weight
    torch.testing.assert_close(ve @ ve.T, torch.eye(32), **rounded)
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.03)
    assert model.ve_shared.embed.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.bigram.scale.item() == 0.050048828125
    assert model.ve_shared.scale.item() == 0.10009765625
    assert model.word_start_boost.item() == 1
    assert [scale.tolist() for scale in model.ve_layer_scales] == [[1.0], [1.0]]
    assert not model.smear.gate.any()
    assert model.skip_weights.tolist() == [[1.0] * 64] + [[0.0] * 64] * 2
    for i, block in enumerate(model.blocks):
        assert block.attn_scale.unique().item() == (0.10009765625 if i == 0 else 1)
        assert block.mlp_scale.unique().item() == 1
        assert block.attn.q_gain.tolist() == [1.5] * 2
        assert block.resid_mix.tolist() == [[1.0] * 64, [0.0] * 64]
        assert block.layer_scale == pytest.approx(1 / math.sqrt(i + 1))


def test_seed_decides_initial_values():
    def state(seed):
        torch.manual_seed(seed)
        return GPT(tiny_config()).state_dict()

    one, same, other = state(1), state(1), state(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["qo_bank"], other["qo_bank"])


def test_rope_tables():
    """The base grows beyond 1024 tokens; channels turn at these frequencies."""
    config, cpu = ModelConfig(), torch.device("cpu")
    assert rope_base(config, 1024) == 10_000
    assert rope_base(config, 2048) == pytest.approx(22_081.790273, rel=1e-9)
    frequencies = [1, 0.286414971, 0.0820335356, 0.0234956327, 0.00672950096]
    frequencies += [0.00192742982, 5.52044757e-4, 1.58113883e-4]
    cos, sin = rope_tables(config, 2048, cpu)
    angles = torch.outer(torch.arange(2048.0), torch.tensor(frequencies))
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()), rtol=0, atol=1e-3)
    torch.testing.assert_close(rope_tables(config, 7, cpu, context=2048), (cos[:7], sin[:7]), rtol=0, atol=0)
    assert not torch.equal(rope_tables(config, 7, cpu)[0], cos[:7])
    rounded = rope_tables(replace(config, rope_bf16_tables=True), 300, cpu)
    assert all(torch.equal(t, t.bfloat16().float()) for t in rounded)
    assert torch.equal(rounded[0][257], rounded[0][256])  # positions above 256 are rounded too


def test_initial_loss_is_that_of_a_uniform_guess():
    model = GPT(
        ModelConfig(vocab_size=96, model_dim=64, bigram_vocab_size=64, bigram_dim=16, ve_dim=16, rope_dims=8)
    )
    first = model.loss(*batch(rows=4, length=64)).item()
    assert first == pytest.approx(math.log(96), abs=0.05)


def test_community_checkpoint_loads(tmp_path):
    """A published `final_model.pt`: a state dict with bfloat16 tables and everything else in float32."""
    source = make(seed=3)
    tables = {"tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"}
    state = {
        name: value.bfloat16() if name in tables else value.clone()
        for name, value in source.state_dict().items()
    }
    assert tables <= set(state)
    torch.save(state, tmp_path / "final_model.pt")
    loaded = torch.load(tmp_path / "final_model.pt", weights_only=True)
    model = make(seed=4)
    model.load_state_dict(loaded, strict=True)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parameter.copy_(parameter.bfloat16() if name in tables else parameter)
        tokens, _ = batch()
        torch.testing.assert_close(model.logits(tokens), source.logits(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bigram.scale", "blocks.3.resid_mix", "ve_layer_scales.1"])
def test_incomplete_checkpoint_does_not_load(name):
    state = make().state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=name):
        make().load_state_dict(state, strict=True)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_gradient_banks_equal_autograd(changes):
    tokens, targets = batch()
    dense, banked = make(**changes), make(**changes)
    banked.allocate_gradient_banks()
    dense.loss(tokens, targets).backward()
    banked.loss(tokens, targets).backward()
    want = gradients(dense)
    torch.testing.assert_close(gradients(banked), want)
    # every parameter has an effect (row 0 of resid_mix of block 0 included); a slot per layer
    unused = {
        name for name, p in dense.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())
    }
    assert not unused
    skips = ["skip_weights"] if dense.config.num_skips else []
    for name in (*BANK_NAMES, *skips):
        assert all(slot.any() for slot in want[name]), name


def test_gradient_banks_accumulate_and_clear():
    model = make()
    model.allocate_gradient_banks()
    bank = model.qo_bank.grad
    one, two = batch(), batch()
    model.loss(*one).backward()
    first = bank.clone()
    model.loss(*two).backward()
    both = bank.clone()
    model.zero_grad(set_to_none=False)
    assert not bank.any()
    model.loss(*two).backward()
    assert model.qo_bank.grad is bank
    torch.testing.assert_close(bank, both - first, rtol=1e-4, atol=1e-6)


def test_gradient_banks_untouched_without_grad():
    model = make()
    model.allocate_gradient_banks()
    with torch.no_grad():
        quiet = model.loss(*batch())
    assert not quiet.requires_grad
    assert not any(p.grad.any() for p in model.bank_parameters())


def coarse(weight):
    return weight + ((weight * 8).round() / 8 - weight).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("allocated", [False, True], ids=["dense", "banked"])
def test_transform_is_straight_through(allocated, dtype):
    """The gradient equals that of a network with transformed weights."""
    tokens, targets = batch()
    model, plain = make(compute_dtype=dtype), make(compute_dtype=dtype)
    with torch.no_grad():
        for bank in plain.bank_parameters():
            bank.copy_(coarse(bank))
    if allocated:
        model.allocate_gradient_banks()
    loss, want = model.loss(tokens, targets, model.banks(coarse)), plain.loss(tokens, targets)
    torch.testing.assert_close(loss, want, rtol=0, atol=0)
    loss.backward()
    want.backward()
    with torch.no_grad():
        assert loss != model.loss(tokens, targets)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 2e-4}
    torch.testing.assert_close(gradients(model), gradients(plain), **tolerance)


def test_shadow_is_refreshed_only_after_a_change():
    model, calls = make(compute_dtype=torch.bfloat16), []
    model.allocate_gradient_banks()

    def transform(weight):
        calls.append(weight)
        return 2 * weight

    def shadows():
        return list(model.banks(transform).weights())

    first = shadows()
    addresses = [t.data_ptr() for t in first]
    assert [t.dtype for t in first] == [torch.bfloat16] * 4
    shadows()
    assert len(calls) == 4
    for step, change in enumerate((lambda p: p.mul_(1.5), lambda p: p.copy_(p + 1)), start=2):
        with torch.no_grad():
            change(model.kv_bank)
        again = shadows()
        assert len(calls) == 4 * step
        for shadow, master in zip(again, model.bank_parameters(), strict=True):
            assert torch.equal(shadow, (2 * master).bfloat16())
        assert [t.data_ptr() for t in again] == addresses  # captured graphs keep reading them
    model.load_state_dict(make(seed=8).state_dict())
    assert torch.equal(shadows()[0], (2 * model.qo_bank).bfloat16())
    assert torch.equal(next(model.banks().weights()), model.qo_bank.bfloat16())


def test_changed_shadow_before_backward_is_an_error():
    """Two transforms share one shadow: a backward that would read the wrong weights must fail."""
    model = make(compute_dtype=torch.bfloat16)
    model.allocate_gradient_banks()
    loss = model.loss(*batch(), model.banks(coarse))
    model.banks()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optimizer_step_reaches_the_shadow():
    model = make(compute_dtype=torch.bfloat16)
    model.allocate_gradient_banks()
    tokens, targets = batch()
    optimizer = torch.optim.SGD(model.bank_parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model.loss(tokens, targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)
    assert losses[0] > losses[1] > losses[2]


def test_bfloat16_is_close_to_float32():
    tokens, targets = batch(rows=4, length=32)
    wide, narrow = make(), make(compute_dtype=torch.bfloat16)
    for model in (wide, narrow):
        model.allocate_gradient_banks()
        model.loss(tokens, targets).backward()
    got, want = narrow.token_losses(tokens, targets), wide.token_losses(tokens, targets)
    assert got.dtype == torch.float32
    assert narrow.logits(tokens).dtype == torch.float32
    assert got.mean().item() == pytest.approx(want.mean().item(), abs=0.02)
    for name, grad in gradients(narrow).items():
        assert grad.dtype == torch.float32
        reference = wide.get_parameter(name).grad
        if grad.numel() >= 8:
            assert torch.cosine_similarity(grad.flatten(), reference.flatten(), dim=0) > 0.97, name


def test_external_banks():
    """Banks given by the caller are read instead of the model's own, and get the gradients."""
    model, other = make(seed=1), make(seed=2)
    tokens, targets = batch()
    leaves = [p.detach().clone().requires_grad_() for p in other.bank_parameters()]
    loss = model.loss(tokens, targets, make_banks(leaves))
    assert loss != model.loss(tokens, targets)
    grads = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        for mine, theirs in zip(model.bank_parameters(), leaves, strict=True):
            mine.copy_(theirs)
    want = model.loss(tokens, targets)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(list(grads), list(torch.autograd.grad(want, model.bank_parameters())))


def test_external_gradient_banks():
    model = make()
    tokens, targets = batch()
    grads = [torch.zeros_like(p) for p in model.bank_parameters()]
    model.loss(tokens, targets, make_banks([p.detach() for p in model.bank_parameters()], grads)).backward()
    want = torch.autograd.grad(model.loss(tokens, targets), model.bank_parameters())
    torch.testing.assert_close(grads, list(want))
    assert all(p.grad is None for p in model.bank_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_break(dtype):
    tokens, targets = batch()
    eager, compiled = make(compute_dtype=dtype), make(compute_dtype=dtype)
    for model in (eager, compiled):
        model.allocate_gradient_banks()
    loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call adds to the same gradient banks
        want, got = eager.loss(tokens, targets), loss(tokens, targets, compiled.banks())
        torch.testing.assert_close(got, want)
        want.backward()
        got.backward()
    assert all(bank.grad.any() for bank in compiled.bank_parameters())
    torch.testing.assert_close(gradients(compiled), gradients(eager))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_causal(changes):
    """C1: the logits at t depend on tokens 0..t and nothing later, and they do depend on all of these."""
    model, length = make(**changes), 10
    tokens, _ = batch(rows=1, length=length)
    want = model.logits(tokens)
    for position in range(length):
        changed = tokens.clone()
        changed[0, position:] = (tokens[0, position:] + torch.randint(1, 96, (length - position,))) % 96
        got = model.logits(changed)
        torch.testing.assert_close(got[:, :position], want[:, :position], rtol=0, atol=1e-5)
        one = tokens.clone()
        one[0, position] = changed[0, position]
        moved = (model.logits(one) - want).abs().amax(-1)[0]
        assert (moved[:position] < 1e-5).all()
        assert (moved[position:] > 1e-4).all()


@torch.no_grad()
def test_batch_rows_are_independent():
    model = make()
    tokens, targets = batch(rows=3)
    want = model.token_losses(tokens, targets)
    for row in range(3):
        torch.testing.assert_close(
            model.token_losses(tokens[row : row + 1], targets[row : row + 1])[0], want[row]
        )


@torch.no_grad()
def test_losses_match_the_logits():
    model = make()
    tokens, targets = batch()
    logits = model.logits(tokens)
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(model.token_losses(tokens, targets).flatten(), want)
    torch.testing.assert_close(model.loss(tokens, targets), want.mean())
    assert logits.abs().max() <= model.config.logit_softcap


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_softcap": 5.0},
        {"rope_base": 50.0},
        {"rope_dims": 16},
        {"rope_train_seq_len": 4},
        {"trigram": False},
        {"pos_conditional": False},
        {"xsa_last_n": 1},
        {"ln_scale": False},
        {"mlp_activation": "relu_squared"},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_setting_has_an_effect(changes):
    tokens, _ = batch()
    assert (make(**changes).logits(tokens) - make().logits(tokens)).abs().max() > 1e-3


@torch.no_grad()
def test_observer_sees_every_block():
    seen = []

    class Recorder:
        def attention_input(self, layer, x, value_embed):
            seen.append(("attention", layer, tuple(x.shape), value_embed is not None))

        def mlp_input(self, layer, x):
            seen.append(("mlp", layer, tuple(x.shape)))

    model = make()
    tokens, _ = batch(rows=2, length=5)
    model.hidden(tokens, observer=Recorder())
    assert seen == [
        entry
        for i in range(4)
        for entry in (("attention", i, (2, 5, 32), i in (2, 3)), ("mlp", i, (2, 5, 32)))
    ]


@torch.no_grad()
def test_skips_join_the_halves_in_reverse_order():
    """With 5 blocks, block 2 adds what block 1 gave (row 0), block 3 what block 0 gave (row 1), 4 nothing."""
    model = make(num_layers=5)
    for block in model.blocks:  # each block adds what its attention gives and nothing else
        block.resid_mix.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 32))
        block.attn_scale.fill_(1)
        block.mlp_scale.fill_(0)
    given = torch.randn(5, 32)
    zeros = torch.zeros(1, 1, 32)
    out = model.trunk(zeros, {}, model.banks(), lambda visit, x, _: given[visit.layer].expand_as(x))
    row0, row1 = model.skip_weights
    first = given[0]
    second = first + given[1]
    want = second + row0 * second + given[2] + row1 * first + given[3] + given[4]
    torch.testing.assert_close(out.flatten(), torch.nn.functional.rms_norm(want, (32,)))


@pytest.mark.parametrize("entries", [95, 97, 0])
def test_word_start_table_of_wrong_size_is_rejected(entries):
    with pytest.raises(
        PgolfError, match=rf"has_leading_space has {entries} entries but model\.vocab_size is 96"
    ):
        GPT(tiny_config(), torch.zeros(entries, dtype=torch.bool))


def test_word_starts_are_not_saved():
    assert "has_leading_space" not in make().state_dict()
    assert make().has_leading_space.dtype == torch.bool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_dim": 33}, r"model\.model_dim 33 is not a multiple of model\.num_heads 2"),
        ({"num_kv_heads": 3}, r"model\.num_heads 2 is not a multiple of model\.num_kv_heads 3"),
        ({"rope_dims": 7}, r"model\.rope_dims 7 must be even"),
        ({"ve_layers": (3, 4)}, r"model\.ve_layers \[4\] do not exist"),
        ({"frozen_skips": 3}, r"model\.frozen_skips is 3; a model of 4 layers has 2 skips"),
        ({"bigram_vocab_size": 0}, r"model\.trigram needs a hash table"),
        ({"bigram_vocab_size": 3}, r"use 0 \(off\) or at least 4"),
        ({"tie_embeddings": False}, r"tie_embeddings=False is not supported"),
        ({"num_layers": 0}, r"model\.num_layers is 0; it must be positive"),
    ],
    ids=str,
)
def test_impossible_configurations_are_rejected(changes, message):
    with pytest.raises(PgolfError, match=message):
        replace(tiny_config(), **changes)
