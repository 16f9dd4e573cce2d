"""Compare the time of each kind of meta step with an ordinary micro-batch of the same tokens.

Usage: python benchmarks/bench_meta.py [--preset small] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from pgolf_fast.train.reptile import Reptile

from pgolf_fast import console
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import MetaConfig, ReptileConfig
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.train.meta import SlotRates, meta_step

KINDS = {
    "fomaml": MetaConfig(),
    "cross_chunk": MetaConfig(method="cross_chunk"),
    "cross_chunk, delta loss, rates": MetaConfig(method="cross_chunk", delta_weight=0.3, slot_rates=True),
    "sam, delta loss": MetaConfig(method="sam", delta_weight=0.3),
}


def contenders(name: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return the functions to time, by name, on random tokens."""
    config = preset(name)
    model = GPT(config.model, compute_dtype=resolve_dtype(config.train.compute_dtype, device)).to(device)
    model.allocate_gradient_banks()
    shape = (config.train.micro_batch_tokens // config.train.seq_len, config.train.seq_len)
    x, y = torch.randint(0, config.model.vocab_size, (2, *shape), device=device).unbind()

    def step(kind: MetaConfig) -> Callable[[], object]:
        rates = SlotRates(model).to(device) if kind.slot_rates else None
        return lambda: meta_step(model, x, y, kind, loss_scale=1.0, rates=rates)

    reptile = Reptile(model, ReptileConfig())
    segments = [(x[:1], y[:1])] * reptile.config.inner_steps
    return {
        "ordinary micro-batch": lambda: model.loss(x, y).backward(),
        **{kind: step(settings) for kind, settings in KINDS.items()},
        f"reptile, {len(segments)} inner steps of 1 sequence": lambda: reptile.move(
            reptile.adapt(segments, None).ends
        ),
    }


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = contenders(arguments.preset, device)
    for run in runs.values():
        milliseconds(run, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):  # in turn, so that a drift of the machine affects all
        for name, run in runs.items():
            times[name].append(milliseconds(run, device))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ordinary = medians["ordinary micro-batch"]
    rows = [(name, f"{ms:.1f}", f"{ms / ordinary:.2f}") for name, ms in medians.items()]
    print(console.table(rows, (f"{arguments.preset}, {device.type}", "ms", "micro-batches")))


if __name__ == "__main__":
    main()
