"""Compare scoring with naive evaluators on a CPU: sliding windows, with and without test-time training.

    python benchmarks/bench_eval.py [--run RUN] [--data DIR] [--tokens 65536] [--stride 64]

Naive ones compute every position of every layer of every window, at the fastest batch size: "naive" with our
ops, "compiled" in plain PyTorch under torch.compile. The arithmetic that exact scoring can leave out bounds
the speed-up over "naive"; the fast path should reach 90 % of that bound, and never be slower with test-time
training. All take turns; the fastest round of each counts (the first one compiles), and all are printed. On a
GPU: `python benchmarks/gpu_session --parts eval`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cpu_jobs  # noqa: F401 - before torch, so that OpenMP is set up
import naive_eval
import torch
from artifact_worker import timed
from gpu_session.plain import plain_banks, plain_loss, plain_ops
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.load import load
from pgolf_fast.bench.store import provenance
from pgolf_fast.config.presets import preset
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.ttt import adapters
from pgolf_fast.data.source import open_source
from pgolf_fast.distributed import keep_freed_memory
from pgolf_fast.evaluation.adapters.base import Frozen, borrowed, freeze
from pgolf_fast.evaluation.adapters.descent import SGD, trainable_parameters
from pgolf_fast.evaluation.estimate import forward_flops, windows_flops
from pgolf_fast.evaluation.protocol import score_and_adapt, target_chunks
from pgolf_fast.evaluation.score import Scorer, Stream, batch_size
from pgolf_fast.evaluation.windows import sliding_windows
from pgolf_fast.io import write_text
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import resolve_dtype

NAIVE_BATCHES = (4, 8, 16, 32, 64)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, help="a trained run folder; default: random weights of --preset")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--data", help="folder of shards; default: the run's, or the zero-download corpus")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), help="default: the run's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    keep_freed_memory()
    folder = RunFolder(arguments.run) if arguments.run else None
    config = folder.read_config() if folder else preset(arguments.preset)
    if arguments.dtype:
        config = replace(config, train=replace(config.train, compute_dtype=arguments.dtype))
    if arguments.data:
        config = replace(config, data=replace(config.data, path=arguments.data))
    source = open_source(config.data, config.model.vocab_size)
    if folder:
        model = load(folder, "float", config=config).model
    else:
        torch.manual_seed(0)
        dtype = resolve_dtype(config.train.compute_dtype, torch.device("cpu"))
        model = GPT(config.model, torch.from_numpy(source.table.has_leading_space), compute_dtype=dtype)
    tokens = source.validation(config.eval_seq_len)[: arguments.tokens + 1]
    bench = Bench(model, Stream(tokens, source.table, torch.device("cpu")), config, arguments.stride)
    found = bench.run(arguments.rounds)
    print(describe(found))
    if arguments.out:
        write_text(arguments.out, json.dumps({**provenance(), **found}, indent=1) + "\n")
    return 0


class Bench:
    """All evaluators on one stream."""

    def __init__(self, model: GPT, stream: Stream, config, stride: int):
        self.model, self.stream, self.stride = model, stream, stride
        self.length = config.eval_seq_len
        # SGD over chunks, the only adapter that the naive evaluator has
        ttt = config.ttt if config.ttt.adapter == "sgd" else adapters(self.length)["sgd"]
        self.ttt = replace(ttt, quantize_forward="none")
        self.windows = sliding_windows(stream.num_targets, self.length, stride)
        self.chunks = target_chunks(self.windows, stream.num_targets, self.ttt.chunk_tokens)
        self.size = batch_size(None, config.model, model.compute_dtype, stream.tokens.device)
        self.batch = 0
        compiled = partial(torch.compile, dynamic=False)
        self.compiled_loss = compiled(plain_loss(model))
        self.compiled_losses = compiled(lambda x, y: model.token_losses(x, y, plain_banks(model)))

    def allowed(self) -> float:
        """Return the ratio of naive to necessary multiplications over all windows."""
        naive = len(self.windows) * forward_flops(self.model.config, self.length, self.length)
        return naive / windows_flops(self.model.config, self.windows)

    def naive_losses(self) -> naive_eval.Losses:
        with torch.no_grad():
            banks = self.model.banks()
        return lambda x, y: self.model.token_losses(x, y, banks)

    def choose_batch(self) -> dict[int, float]:
        """Return the naive evaluator's seconds on some windows by batch size, and take the fastest."""
        part, losses = self.windows[1:129], self.naive_losses()
        seconds = {}
        for batch in (*NAIVE_BATCHES[:1], *NAIVE_BATCHES):  # the first warms up
            score = partial(naive_eval.score, losses, self.stream.tokens, part, self.length, batch)
            seconds[batch] = timed(score)[1]
        self.batch = min(seconds, key=seconds.__getitem__)
        return seconds

    def naive_sliding(self) -> Tensor:
        data = self.stream.tokens, self.windows, self.length, self.batch
        return naive_eval.score(self.naive_losses(), *data)

    def fast_sliding(self) -> Tensor:
        scorer = Scorer(self.stream, self.windows, self.length, self.size)
        scorer.score(Frozen(self.model).score, 0, len(self.windows))
        return scorer.losses

    def naive_ttt(self) -> Tensor:
        # Without gradient banks, forward casts the banks every time, so autograd reaches the masters.
        return self.adapted(self.model.token_losses, self.model.loss)

    def adapted(self, losses_of: naive_eval.Losses, mean_loss: naive_eval.Losses) -> Tensor:
        with borrowed(self.model):
            parameters = trainable_parameters(self.model, self.ttt)
            freeze(self.model)
            for parameter in parameters:
                parameter.requires_grad_()
            learner = naive_eval.SGD(mean_loss, parameters, self.ttt, self.length)
            data = self.stream.tokens, self.windows, self.chunks, self.length, self.batch
            return naive_eval.score_and_adapt(losses_of, learner, *data)

    def compiled_sliding(self) -> Tensor:
        data = self.stream.tokens, self.windows, self.length, self.batch
        with plain_ops():
            return naive_eval.score(self.compiled_losses, *data)

    def compiled_ttt(self) -> Tensor:
        with plain_ops():
            return self.adapted(self.compiled_losses, self.compiled_loss)

    def fast_ttt(self) -> Tensor:
        scorer = Scorer(self.stream, self.windows, self.length, self.size)
        with borrowed(self.model):
            score_and_adapt(SGD(self.model, self.ttt, self.length), scorer, self.chunks, "sliding + TTT")
        return scorer.losses

    def run(self, rounds: int) -> dict[str, object]:
        by_batch = self.choose_batch()
        contenders: dict[str, Callable[[], Tensor]] = {
            "naive sliding": self.naive_sliding,
            "compiled sliding": self.compiled_sliding,
            "fast sliding": self.fast_sliding,
            "naive sliding + TTT": self.naive_ttt,
            "compiled sliding + TTT": self.compiled_ttt,
            "fast sliding + TTT": self.fast_ttt,
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        losses: dict[str, Tensor] = {}
        for _ in range(rounds):
            for name, function in contenders.items():
                losses[name], taken = timed(function)
                seconds[name].append(taken)
                print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
        best = {name: min(times) for name, times in seconds.items()}
        speed_up, allowed = best["naive sliding"] / best["fast sliding"], self.allowed()
        kinds = [name.removeprefix("fast ") for name in contenders if name.startswith("fast ")]
        return {
            "tokens": self.stream.num_targets,
            "windows": len(self.windows),
            "seq_len": self.length,
            "stride": self.stride,
            "compute_dtype": str(self.model.compute_dtype),
            "threads": torch.get_num_threads(),
            "naive_batch": self.batch,
            "naive_seconds_by_batch": by_batch,
            "fast_batch": self.size(self.length),
            "seconds": seconds,
            "sliding_speed_up": speed_up,
            "sliding_speed_up_allowed": allowed,
            "sliding_reached": speed_up / allowed,
            "ttt_speed_up": best["naive sliding + TTT"] / best["fast sliding + TTT"],
            "over_compiled": {kind: best[f"compiled {kind}"] / best[f"fast {kind}"] for kind in kinds},
            "largest_difference": (losses["naive sliding"] - losses["fast sliding"]).abs().max().item(),
            "loss": {name: values.double().mean().item() for name, values in losses.items()},
        }


def describe(found) -> str:
    tokens, losses = found["tokens"], found["loss"]
    best = {name: min(times) for name, times in found["seconds"].items()}
    over = ", ".join(f"{kind} {ratio:.2f}" for kind, ratio in found["over_compiled"].items())
    rows = [(name, f"{s:.2f}", f"{tokens / s:,.0f}", f"{losses[name]:.6f}") for name, s in best.items()]
    return f"""\
{tokens:,} targets in {found["windows"]:,} windows of {found["seq_len"]}, stride {found["stride"]}, \
{found["compute_dtype"].removeprefix("torch.")}, {found["threads"]} threads; \
batches of {found["naive_batch"]} (naive) and {found["fast_batch"]} (fast)
{console.Table(("evaluator", "seconds", "targets/s", "nats/token"), rows).text()}
largest difference of a loss, sliding: {found["largest_difference"]:.1e} nats
sliding: {found["sliding_speed_up"]:.2f} times naive; exact savings allow \
{found["sliding_speed_up_allowed"]:.2f}: {found["sliding_reached"]:.0%} of it
sliding + TTT: {found["ttt_speed_up"]:.2f} times naive
times compiled: {over}"""


if __name__ == "__main__":
    sys.exit(main())
