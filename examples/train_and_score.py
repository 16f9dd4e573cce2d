"""Train a tiny model, quantize and pack it, compute the three scores, and plot test-time training.

    python examples/train_and_score.py [--out RUN] [--data SHARDS] [--set FIELD=VALUE ...]

Without --data it trains on documentation found on this machine. FIELD=VALUE changes the preset, for example
train__steps=50; `__` separates groups.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pgolf_fast as pg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/example"), help="run folder")
    parser.add_argument("--data", type=Path, help="folder of token shards")
    parser.add_argument("--set", nargs="*", default=["train__steps=200"], metavar="FIELD=VALUE")
    options = parser.parse_args()
    fields = {name: json.loads(value) for name, value in (item.split("=", 1) for item in options.set)}
    if options.data is not None:
        fields["data__path"] = options.data

    config = pg.preset("tiny", **fields)
    print(pg.train(config, options.out), end="\n\n")
    print(pg.quantize(options.out), end="\n\n")
    print(pg.pack(options.out), end="\n\n")
    scores = pg.score(options.out)
    print(scores, end="\n\n")
    print(pg.generate(options.out, "The ", tokens=40))

    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    axes.plot([score.bpb for score in scores.ttt.by_chunk], label="sliding + TTT, so far")
    axes.axhline(scores.sliding.bpb, color="gray", linestyle=":", label="sliding")
    axes.set(xlabel="chunk", ylabel="bits per byte", title=config.name)
    axes.legend()
    figure.savefig(options.out / "test_time_training.png")
    print(f"wrote {options.out / 'test_time_training.png'}")


if __name__ == "__main__":
    main()
