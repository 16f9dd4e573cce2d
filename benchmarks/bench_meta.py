"""Compare the time of each kind of meta step with an ordinary micro-batch of the same tokens.

Usage: python benchmarks/bench_meta.py [--preset small] [--repeats 5]
"""

import argparse
from collections.abc import Callable

import torch

from pgolf_fast import console
from pgolf_fast.bench.timer import time_in_turn
from pgolf_fast.config.presets import preset
from pgolf_fast.config.schema import MetaConfig, ReptileConfig
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import resolve_dtype
from pgolf_fast.train.meta import SlotRates, meta_step
from pgolf_fast.train.reptile import Reptile

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    repeats = arguments.repeats
    runs = contenders(arguments.preset, device)
    times = time_in_turn(runs, device, seconds=3600, rounds=repeats, runs=repeats)
    ordinary = times["ordinary micro-batch"].median
    rows = [(name, f"{t.median:.1f}", f"{t.median / ordinary:.2f}") for name, t in times.items()]
    print(console.Table((f"{arguments.preset}, {device.type}", "ms", "micro-batches"), rows).text())


if __name__ == "__main__":
    main()
