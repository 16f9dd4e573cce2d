"""A judge that accepts a wrong result would be useless: each kind of error is planted and found."""

from dataclasses import replace

import pytest
import torch
from helpers import compare

from pgolf_fast.ops import cases, judge
from pgolf_fast.ops.case import Contender

TOKEN_CASES = [name for name, entry in cases.CASES.items() if entry.rows is None]


def truth_and_case(name, dtype=torch.float32):
    case = cases.make(name, dtype=dtype)
    return judge.truth_of(case), case


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_every_gradient_is_judged(name):
    truth, case = truth_and_case(name)
    weights = set(case.weights)
    banks = {bank for bank, _ in case.weights.values()}
    assert {key for key in truth.exact if key.startswith("d ")} == {
        f"d {n}" for n in weights | (set(case.trained) - banks)
    }
    _, grads = case.ours().results(truth.douts)
    assert set(grads) == set(case.trained)


@pytest.mark.parametrize("name", TOKEN_CASES)
def test_blocks_of_the_batch_do_not_change_the_truth(name):
    truth, case = truth_and_case(name)
    split = judge._evaluate(replace(case, chunk=1), truth.douts, torch.float64)
    for key, exact in truth.exact.items():
        torch.testing.assert_close(split[key], exact, rtol=1e-9, atol=1e-9)


def spoiled(case, which):
    """`case.ours()` with one result off by 1 %; `which` counts outputs, then gradients."""

    class Spoiled(Contender):
        def results(self, douts):
            outs, grads = super().results(douts)
            named = list(grads)
            if which < len(outs):
                outs = tuple(o * (1.01 if i == which else 1) for i, o in enumerate(outs))
            else:
                grads[named[which - len(outs)]] = grads[named[which - len(outs)]] * 1.01
            return outs, grads

    return Spoiled(**vars(case.ours()))


@pytest.mark.parametrize("name", ["mlp-swiglu", "gqa_attention", "residual_norm", "softcap_cross_entropy"])
def test_one_percent_error_in_any_result_is_found(name):
    truth, case = truth_and_case(name)
    outs, grads = case.ours().results(truth.douts)
    for which in range(len(outs) + len(grads)):
        assert not judge.judge(case, spoiled(case, which), truth).ok, f"result {which}"


def test_one_percent_error_of_an_op_in_place_is_found():
    truth, case = truth_and_case("muon_momentum")
    ours = case.ours()
    for which in range(2):

        def wrong(grad, buffer, which=which):
            outs = case.op(grad, buffer)
            return tuple(o * (1.01 if i == which else 1) for i, o in enumerate(outs))

        assert not judge.judge(case, replace(ours, function=wrong), truth).ok
    ours.forward()  # what timing does to the buffer is not judged
    assert judge.judge(case, ours, truth).ok


def test_nan_and_wrong_shapes_are_found():
    truth, _ = truth_and_case("smear_gate")
    (verdict,) = judge.verdicts({"out0": torch.full_like(truth.low["out0"], float("nan"))}, truth)
    assert not verdict.ok
    (verdict,) = judge.verdicts({"out0": truth.low["out0"][:1]}, truth)
    assert not verdict.ok
    assert "shape" in str(verdict)


def test_a_gradient_in_another_slot_is_found():
    truth, case = truth_and_case("mlp-swiglu")

    class Spilling(Contender):
        def results(self, douts):
            outs, grads = super().results(douts)
            grads["up_bank"][0, 0, 0] = 1.0
            return outs, grads

    verdict = judge.judge(case, Spilling(**vars(case.ours())), truth)
    assert not verdict.ok
    assert "d up_bank changed outside its slots" in str(verdict)


@pytest.mark.parametrize("name", ["mlp-swiglu", "gqa_attention", "ngram_hash_embed", "residual_norm"])
def test_tail_of_a_batch_is_judged(name):
    _, case = truth_and_case(name)
    ours = case.ours()
    assert judge.judge_tail(case, ours, entries=1).ok

    def first_only(**inputs):  # right except at the end of the batch
        outs = ours.function(**inputs)
        keep = torch.ones(len(outs[0]), *(1,) * (outs[0].dim() - 1))
        keep[-1] = 0
        return tuple(out * keep.to(out.dtype) for out in outs)

    assert not judge.judge_tail(case, replace(ours, function=first_only), entries=1).ok


def test_results_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match=r"a result has dtype torch\.float64"):
        compare(lambda t: 2 * t.double(), lambda t: 2 * t, [torch.randn(3)])
