"""Visits of blocks: their order, skips and lanes, and what iterates over them."""

from dataclasses import replace

import pytest
import torch
from helpers import FRONTIER, randomize_, tiny_config

from pgolf_fast.config.presets import SIZES, shrink
from pgolf_fast.config.schema import ModelConfig, RunConfig
from pgolf_fast.errors import PgolfError
from pgolf_fast.evaluation.adapters.lora import changed_losses, fresh_factors, matrices
from pgolf_fast.evaluation.estimate import forward_flops
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.plan import visit_plan
from pgolf_fast.model.rope import rope_tables
from pgolf_fast.quant.calibration import DAMPING, collect_hessians

RECORD = ModelConfig(
    vocab_size=8192,
    mlp_mult=4.0,
    num_loops=2,
    lanes_from=8,
    qk_gain_init=5.0,
    first_attn_scale=1.0,
    head_gate="sparse",
    skip_gates=True,
    smear_form="gated",
    rope_bf16_frequencies=True,
    bigram_vocab_size=0,
    trigram=False,
    ve_enabled=False,
    ve_layers=(),
    frozen_skips=0,
)


def model(seed=0, **changes):
    return randomize_(GPT(tiny_config(**changes)), seed)


def layers(plan):
    return [visit.layer for visit in plan]


def test_visits_of_the_record():
    """PR 1855: 17 visits with the loop, 11 without; a row of skip_weights belongs to a decoder position."""
    looped, plain = visit_plan(RECORD), visit_plan(RECORD, looping=False)
    assert layers(looped) == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layers(plain) == [*range(11)]
    for plan, skips in ((looped, 8), (plain, 5)):
        assert [visit.push for visit in plan] == [i < skips for i in range(len(plan))]
        assert [v.skip for v in plan] == [*[None] * skips, *range(skips), None]
        assert [v.number for v in plan if v.lanes] == [*range(len(plan) - 3, len(plan))]
        assert [v.last for v in plan] == [False] * (len(plan) - 1) + [True]
    assert (looped[8].layer, plain[5].layer) == (5, 5)  # row 0
    assert (looped[9].layer, plain[6].layer) == (3, 6)  # row 1
    assert RECORD.num_skips == 8


def test_parameters_of_the_record():
    with torch.device("meta"):
        state = GPT(RECORD).state_dict()
    assert RECORD.num_parameters() == sum(t.numel() for t in state.values()) == 35_945_671
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert shapes["blocks.0.attn.attn_gate_w"] == (8, 12)
    assert shapes["skip_weights"] == shapes["skip_gates"] == (8, 512)
    assert shapes["parallel_post_lambdas"] == (11, 2, 2)
    assert shapes["parallel_resid_lambdas"] == (11, 2)
    assert shapes["smear_gate.weight"] == (1, 12)
    assert shapes["smear_lambda"] == (1,)


def test_initial_values_of_the_record():
    made = GPT(tiny_config(**FRONTIER["record"], qk_gain_init=5.0))
    assert made.block(0).attn_scale.unique().item() == 1
    assert made.block(0).attn.q_gain.unique().item() == 5
    assert made.parallel_resid_lambdas.unique().item() == pytest.approx(1.1, abs=0.01)
    assert made.parallel_post_lambdas.unique().item() == 1
    zeros = (made.skip_gates, made.smear_gate.weight, made.smear_lambda, made.block(1).attn.attn_gate_w)
    assert not any(t.any() for t in zeros)
    dense = GPT(tiny_config(head_gate="dense", model_dim=128)).block(3).attn.attn_gate_w
    assert dense.std().item() == pytest.approx(0.01, rel=0.2)


def test_rounded_frequencies_of_the_record():
    frequencies = (1, 0.31640625, 0.10009765625, 0.03173828125, 0.010009765625, 0.0031585693359375)
    angles = 299 * torch.tensor([*frequencies, 0.00099945068359375, 0.000316619873046875])
    cos, sin = rope_tables(RECORD, 300, torch.device("cpu"))
    torch.testing.assert_close((cos[299], sin[299]), (angles.cos(), angles.sin()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_loops": 1, "loop_start": 2, "loop_end": 4}, r"no range of blocks 0 to 3"),
        ({"num_loops": 1, "loop_start": 3, "loop_end": 2}, r"no range of blocks"),
        ({"num_loops": -1}, r"num_loops is -1; it must not be negative"),
        ({"lanes_from": 1}, r"second half, at block 2 to 3"),
        ({"lanes_from": 4}, r"second half, at block 2 to 3"),
        ({"num_loops": 1, "loop_start": 1, "loop_end": 2, "lanes_from": 2}, r"after the loop, .* block 2"),
        (
            {"head_gate": "sparse", "gate_window": 33},
            r"gate_window is 33; it must be 1 to model.model_dim 32",
        ),
        ({"smear_form": "gated", "gate_window": 0}, r"gate_window is 0"),
        ({"bos_id": 96}, r"bos_id 96 is not a token: model.vocab_size is 96"),
    ],
)
def test_impossible_plans_are_refused(changes, message):
    with pytest.raises(PgolfError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("changes", [{}, {"loop_end": 7}, {"loop_start": 0, "loop_end": 1, "lanes_from": 5}])
def test_shrunken_plans_exist(size, changes):
    small = shrink(RunConfig(model=replace(RECORD, **changes)), size).model
    assert small.num_loops == 2
    assert small.lanes_from is not None
    assert layers(visit_plan(small))[-1] == small.num_layers - 1


def test_a_loop_repeats_its_blocks():
    """With the looped blocks copied into blocks of their own, a plain network computes the same."""
    looped = model(num_loops=1, loop_start=1, loop_end=2, ve_enabled=False, ln_scale=False)
    copies = model(num_layers=6, ve_enabled=False, ln_scale=False, xsa_last_n=6)
    order, state = layers(looped.plan), looped.state_dict()
    for name in looped.state_dict():
        if name.startswith("blocks."):
            del state[name]
    for i, layer in enumerate(order):
        part = looped.block(layer).state_dict()
        state |= {f"blocks.{i}.{name}": value for name, value in part.items()}
    for name in ("qo_bank", "kv_bank"):
        state[name] = torch.cat([half[order] for half in state[name].chunk(2)])
    for name in ("mlp_up_bank", "mlp_down_bank"):
        state[name] = state[name][order]
    copies.load_state_dict(state, strict=True)
    tokens = torch.randint(96, (2, 9))
    torch.testing.assert_close(looped.logits(tokens), copies.logits(tokens), rtol=0, atol=0)
    looped.allocate_gradient_banks()
    copies.allocate_gradient_banks()
    for each in (looped, copies):
        each.loss(tokens, tokens).backward()
    summed = torch.zeros_like(looped.mlp_up_bank).index_add_(0, torch.tensor(order), copies.mlp_up_bank.grad)
    torch.testing.assert_close(looped.mlp_up_bank.grad, summed)


@torch.no_grad()
def test_loops_can_be_off():
    looped = model(**FRONTIER["loops"])
    plain = model(num_loops=0, num_layers=4)
    state = looped.state_dict()
    plain.load_state_dict({**state, "skip_weights": state["skip_weights"][:2]}, strict=True)
    tokens = torch.randint(96, (2, 9))
    assert not torch.equal(looped.logits(tokens), plain.logits(tokens))
    looped.looping = False
    assert torch.equal(looped.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("end", ["mean", "attention", "mlp"])
def test_lanes_by_formula(end):
    """The last block of a network on two lanes, against the plain formula in float64."""
    config = tiny_config(num_layers=2, ve_layers=(1,), lanes_from=1, lanes_end=end)
    lanes = randomize_(GPT(config, compute_dtype=torch.float64), 3).double()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    attended, hidden = torch.randn_like(x), torch.randn_like(x)
    inputs = []

    def attention(visit, normed, value_embed):
        inputs.append(normed)
        return attended

    def mlp(visit, normed):
        inputs.append(normed)
        return hidden

    def norm(t):
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps)

    got = lanes.trunk(x, {}, lanes.banks(), attention, mlp=mlp)
    first, last = lanes.blocks
    b = x * first.resid_mix[0] + x * first.resid_mix[1] + first.attn_scale * attended
    b = b + first.mlp_scale * hidden
    a, skip = b + lanes.skip_weights[0] * b, 2**-0.5
    read = last.resid_mix[0] * a + last.resid_mix[1] * x
    torch.testing.assert_close(inputs[2:], [skip * norm(read), skip * norm(b)])
    post, kept = lanes.parallel_post_lambdas[1], lanes.parallel_resid_lambdas[1]
    outputs = last.attn_scale * attended, last.mlp_scale * hidden
    a, b = (
        kept[i] * lane + post[0, i] * outputs[0] + post[1, i] * outputs[1] for i, lane in enumerate((a, b))
    )
    torch.testing.assert_close(got, norm({"mean": (a + b) / 2, "attention": a, "mlp": b}[end]))


@pytest.mark.parametrize("name", FRONTIER)
@torch.no_grad()
def test_the_last_positions_alone_have_the_same_losses(name):
    made = model(**FRONTIER[name])
    tokens, targets = torch.randint(96, (2, 2, 9))
    want = made.token_losses(tokens, targets)[:, -4:]
    torch.testing.assert_close(made.token_losses(tokens, targets[:, -4:]), want)


@pytest.mark.parametrize("name", FRONTIER)
@torch.no_grad()
def test_low_rank_changes_of_every_visit(name):
    """Changes of zero change nothing; each visit has a slot of its own, which acts on it alone."""
    made = model(**FRONTIER[name])
    sizes, visits = matrices(made.config), made.config.num_visits
    assert {count for kind, (count, _, _) in sizes.items() if kind != "head"} == {visits}
    factors = fresh_factors(sizes, 2, 2, torch.device("cpu"))
    tokens, targets = torch.randint(96, (2, 2, 9))
    plain = changed_losses(made, made.banks(), factors, tokens, targets)
    torch.testing.assert_close(plain, made.token_losses(tokens, targets))
    found = set()
    for i in range(visits):
        factors["up"][1][:, i] = 0.1
        losses = changed_losses(made, made.banks(), factors, tokens, targets)
        factors["up"][1][:, i] = 0
        assert (losses - plain).abs().max() > 1e-6
        found.add(losses.sum().item())
    assert len(found) == visits


def test_hessians_sum_over_visits():
    looped, tokens = model(**FRONTIER["loops"], head_gate="sparse"), torch.randint(96, (2, 8))
    seen = {}

    class Recorder:
        def attention_input(self, layer, x, value_embed):
            seen.setdefault(layer, []).append(x.flatten(0, 1))

        def mlp_input(self, layer, x):
            pass

    looped.hidden(tokens[:, :-1], observer=Recorder())
    hessians = collect_hessians(looped, tokens)
    assert [len(seen[layer]) for layer in range(4)] == [1, 3, 3, 1]
    for layer, rows in seen.items():
        gram = sum(x.T @ x for x in rows).detach() / 2
        gram += DAMPING * gram.diagonal().mean() * torch.eye(32)
        torch.testing.assert_close(hessians[f"blocks.{layer}.attn_in"], gram)


def test_operations_count_visits():
    plain, looped = (tiny_config(**changes) for changes in ({}, FRONTIER["loops"]))
    deep = tiny_config(num_layers=8)
    assert forward_flops(looped, 64, 64) == forward_flops(deep, 64, 64) > forward_flops(plain, 64, 64)


@torch.no_grad()
def test_a_vocabulary_of_every_id_of_a_shard():
    made = model(vocab_size=65_536, model_dim=32, bos_id=65_535, smear_form="gated", ve_enabled=False)
    tokens = torch.tensor([[65_535, 0, 65_534, 3]])
    assert torch.isfinite(made.loss(tokens, tokens.flip(1)))


@pytest.mark.parametrize("name", ["record", "output_gate_of_queries"])
def test_both_modes_compile_without_graph_break(name):
    tokens, targets = torch.randint(96, (2, 2, 9))
    eager, compiled = (model(**FRONTIER[name]) for _ in range(2))
    for each in (eager, compiled):
        each.allocate_gradient_banks()
    loss = torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")
    for looping in (False, True):
        eager.looping = compiled.looping = looping
        want, got = eager.loss(tokens, targets), loss(tokens, targets, compiled.banks())
        torch.testing.assert_close(got, want)
        want.backward()
        got.backward()
    for (parameter, p), q in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=parameter)
