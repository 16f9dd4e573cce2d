"""Compare two artifacts: bytes, the three scores, and how many weights differ.

python examples/compare_artifacts.py RUN_OR_ARTIFACT RUN_OR_ARTIFACT [--data SHARDS]
"""

from __future__ import annotations

import argparse

import pgolf_fast as pg
from pgolf_fast.console import Table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paths", nargs=2, metavar="RUN_OR_ARTIFACT")
    parser.add_argument("--data", help="folder of validation shards (default: those of the run)")
    options = parser.parse_args()

    models = [pg.load(path, "artifact") for path in options.paths]
    scores = [pg.score(model, data=options.data) for model in models]
    rows = [
        ("bytes", *(f"{model.path.stat().st_size:,}" for model in models)),
        ("bpb, non-overlapping", *(f"{score.plain.bpb:.4f}" for score in scores)),
        ("bpb, sliding", *(f"{score.sliding.bpb:.4f}" for score in scores)),
        ("bpb, sliding + TTT", *(f"{score.ttt.score.bpb:.4f}" for score in scores)),
    ]
    print(Table(("", *options.paths), rows))

    first, second = (model.model.state_dict() for model in models)
    if {name: t.shape for name, t in first.items()} != {name: t.shape for name, t in second.items()}:
        print("\nthe two networks differ in shape")
        return
    changed = sum(int((tensor != second[name]).sum()) for name, tensor in first.items())
    print(f"\n{changed / sum(t.numel() for t in first.values()):.1%} of the weights differ")


if __name__ == "__main__":
    main()
