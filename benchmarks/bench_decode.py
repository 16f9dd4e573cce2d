"""Decoding with packed 6-bit weights against the same weights as dense bfloat16 and float32, in one run.

    python benchmarks/bench_decode.py --threads 1 2 --json benchmarks/results/decode.json

The network is exp101 with random weights. The three decode in turn, one step each; the table and speed-ups
are of the fastest steps. `products` times only a step's matrix products, without attention or other calls.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_fast import console
from pgolf_fast.artifact.load import build_model
from pgolf_fast.config.presets import exp101
from pgolf_fast.model.bank import BANK_NAMES, PackedBanks
from pgolf_fast.model.decoding import Decoder
from pgolf_fast.model.gpt import GPT
from pgolf_fast.model.runtime import environment
from pgolf_fast.quant.state import dequantize_state, packed_banks, quantize_state

WAYS = ("packed", "bfloat16", "float32")


def models() -> dict[str, GPT]:
    """Return a model for each of WAYS, all of the same quantized weights."""
    torch.manual_seed(0)
    config = exp101()
    source = GPT(config.model)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.03 * torch.randn_like(parameter))
    quantized = quantize_state(source.state_dict(), replace(config.quant, method="round", grid="percentile"))
    state, codes = dequantize_state(quantized), packed_banks(quantized)
    assert codes is not None
    bank_free = {name: t for name, t in state.items() if name not in BANK_NAMES}
    made = {"packed": build_model(config, bank_free, packed=codes)}
    for dtype in (torch.bfloat16, torch.float32):
        made[str(dtype).removeprefix("torch.")] = build_model(config, dict(state), compute_dtype=dtype)
    return made


def weight_bytes(model: GPT) -> int:
    """Return the bytes of the weights: banks as a step reads them, and everything else in float32."""
    banks = model.reading_banks()
    if isinstance(banks, PackedBanks):
        parts = (banks.attention, banks.up, banks.down)
        own = sum(t.nbytes for part in parts for t in (part.codes, part.scale))
    else:
        own = sum(w.nbytes for w in banks.weights())
    names = [name for name in model.state_dict() if not name.endswith("_bank")]
    return own + sum(model.state_dict()[name].nbytes for name in names)


def products(model: GPT, batch: int) -> Callable[[], object]:
    """Return a function that multiplies by every bank matrix once."""
    banks, config, dtype = model.reading_banks(), model.config, model.compute_dtype
    x, hidden = (torch.randn(batch, n).to(dtype) for n in (config.model_dim, config.mlp_hidden))
    if isinstance(banks, PackedBanks):
        product = importlib.import_module("pgolf_fast._C").int6_matmul  # as the blocks in C++ call it
        pairs = [(x, w) for w in (*banks._inward, *banks._outward, *banks._up)]
        pairs += [(hidden, w) for w in banks._down]
        calls = [(a.numpy(), c.numpy(), s.numpy(), torch.empty(batch, len(c)).numpy()) for a, (c, s) in pairs]
        return lambda: [product(*arrays, torch.get_num_threads()) for arrays in calls]
    inputs = (x, x, x, hidden)
    dense = [(given, w) for given, bank in zip(inputs, banks.weights(), strict=True) for w in bank.unbind(0)]
    return lambda: [F.linear(given, weight) for given, weight in dense]


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of each function, called in turn, after two warm-up rounds."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[2:] for name, values in taken.items()}


@torch.no_grad()
def measure(made: dict[str, GPT], batch: int, rounds: int) -> dict[str, object]:
    """Time steps and products of one batch size and compare the logits."""
    tokens = torch.randint(made["packed"].config.vocab_size, (rounds + 2, batch))
    decoders = {name: Decoder(model, batch, rounds + 2) for name, model in made.items()}
    logits: dict[str, Tensor] = {}

    def step(name: str) -> None:
        logits[name] = decoders[name].step(tokens[decoders[name].length])

    steps = timed({name: lambda name=name: step(name) for name in made}, rounds)
    alone = timed({name: products(model, batch) for name, model in made.items()}, rounds)
    row: dict[str, object] = {"threads": torch.get_num_threads(), "batch": batch}
    for name in made:
        row[f"{name} ms"], row[f"{name} median ms"] = min(steps[name]), statistics.median(steps[name])
        row[f"{name} tokens/s"], row[f"{name} products ms"] = 1e3 * batch / min(steps[name]), min(alone[name])
    for name in WAYS[1:]:
        row[f"speed against {name}"] = min(steps[name]) / min(steps["packed"])
        row[f"logits against {name}"] = float((logits["packed"] - logits[name]).abs().max())
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    made = models()
    sizes = {name: weight_bytes(model) for name, model in made.items()}
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batches:
            rows.append(measure(made, batch, options.rounds if batch < 16 else max(8, options.rounds // 3)))
            print({k: round(v, 6) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    header = ("threads", "batch", *(f"{name} ms" for name in WAYS), *(f"speed against {n}" for n in WAYS[1:]))
    cells = [[f"{row[h]:.2f}" if isinstance(row[h], float) else str(row[h]) for h in header] for row in rows]
    print(console.Table(header, cells))
    share = sizes["packed"] / sizes["bfloat16"]
    print(f"bytes of weights: {sizes}; packed is {share:.3f} of bfloat16")
    if options.json:
        result = {"environment": environment(), "weight_bytes": sizes, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
