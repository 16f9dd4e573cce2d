"""Time every op at the shapes of `small` against eager and compiled PyTorch (`make bench`)."""

import functools
from dataclasses import asdict

import pytest
import torch

from pgolf_fast.bench import peers, registry
from pgolf_fast.config.presets import small
from pgolf_fast.ops import judge

TOKENS = 2048
PEERS = ("ours", "eager", "compile")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sizes() -> list[tuple[str, int]]:
    return [(op, m) for op in registry.timed() for m in registry.token_counts(op, (TOKENS,))]


@functools.lru_cache(maxsize=1)
def case_and_truth(op, tokens, mode):
    case = registry.make_case(op, small(), tokens, torch.float32, DEVICE)
    return case, judge.truth_of(case, backward=mode == "fwd+bwd" and bool(case.trained))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize(("op", "tokens"), sizes())
def test_op(benchmark, op, tokens, mode, peer):
    torch._dynamo.reset()
    case, truth = case_and_truth(op, tokens, mode)
    if mode not in case.modes(("fwd", "fwd+bwd")):
        pytest.skip(f"{op} has no backward")
    contender = case.ours() if peer == "ours" else peers.build(peer, case)
    verdict = judge.judge(case, contender, truth)
    assert verdict.ok, f"not timed, because it is wrong: {verdict}"
    flops, moved = case.work.of(mode)
    benchmark.group = f"{op}, {tokens} tokens, {mode}"
    benchmark.extra_info.update(
        asdict(case.sizes),
        dtype="float32",
        device=str(DEVICE),
        threads=torch.get_num_threads(),
        flops=flops,
        ideal_bytes=moved,
        largest_error=verdict.error,
    )
    run = contender.forward if mode == "fwd" else functools.partial(contender.both, truth.douts)

    def finished():
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, rounds=10, warmup_rounds=2)
