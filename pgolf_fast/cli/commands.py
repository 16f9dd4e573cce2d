"""The table of commands: what each does, an example, and the function that runs it."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from typing import NamedTuple

GROUPS = {
    "run": "from text to a submission",
    "data": "token shards and tokenizers",
    "study": "is it legal, is it better, what is in it",
    "kernels": "what runs on this machine, and how fast",
}


class Command(NamedTuple):
    """One command: its help, and `module:function` inside `pgolf_fast.cli`."""

    group: str
    about: str
    example: str
    target: str

    def load(self) -> tuple[Callable[..., int], type]:
        """Import the function that runs the command; return it and the class of its options."""
        module, _, name = self.target.partition(":")
        function = getattr(importlib.import_module(f"pgolf_fast.cli.{module}"), name)
        return function, typing.get_type_hints(function)["options"]


COMMANDS = {
    "demo": Command(
        "run",
        "Train, quantize, pack and score a small model on text this machine already has",
        "pgolf demo --seconds 60",
        "run:demo",
    ),
    "train": Command(
        "run",
        "Train a preset into a run folder",
        "pgolf train exp101 --data.path DIR --out runs/exp101",
        "run:train",
    ),
    "import": Command(
        "run",
        "Make a run folder from published weights",
        "pgolf import final_model.pt exp101 --data.path DIR --out runs/published",
        "run:import_weights",
    ),
    "quantize": Command(
        "run",
        "Round a run's weights to integers",
        "pgolf quantize runs/small --grid rd --target-bytes 2000000",
        "export:quantize",
    ),
    "pack": Command(
        "run",
        "Write a run's artifact and check its size against the limit",
        "pgolf pack runs/small --table",
        "export:pack",
    ),
    "eval": Command(
        "run",
        "Score a run: non-overlapping, sliding, and sliding with test-time training",
        "pgolf eval runs/small --figures",
        "evaluate:evaluate",
    ),
    "submit": Command(
        "run",
        "Write a run as a submission folder: README, submission.json, log, artifact and script",
        "pgolf submit runs/small --author 'Your Name' --github-id you",
        "export:submit",
    ),
    "generate": Command(
        "run",
        "Continue a prompt with a run's model",
        "pgolf generate runs/small --prompt 'Once upon a time'",
        "run:generate",
    ),
    "config": Command(
        "run",
        "List the presets, print or compare them, or translate a run script's environment variables",
        "pgolf config exp101_as_run --diff exp101",
        "config:config",
    ),
    "data info": Command(
        "data",
        "Count tokens, documents and bytes of token shards",
        "pgolf data info data/tokenized",
        "data:info",
    ),
    "data tokenize": Command(
        "data",
        "Train a tokenizer on text files and write them as token shards",
        "pgolf data tokenize texts/ --vocab-size 1024 --out data/tokenized",
        "data:tokenize",
    ),
    "data download": Command(
        "data",
        "Download the challenge's token shards and tokenizer",
        "pgolf data download sp1024 --train-shards 80",
        "data:download",
    ),
    "audit": Command(
        "study",
        "Check a run or an artifact against the rules of the challenge",
        "pgolf audit runs/small --only C2 C5",
        "study:audit",
    ),
    "report": Command(
        "study",
        "Write a page about a run that opens offline: curves, scores, bytes, audit",
        "pgolf report runs/small --audit",
        "study:report",
    ),
    "ablate": Command(
        "study",
        "Train a preset and variants of it under one budget; compare their scores with intervals",
        "pgolf ablate small --flip model.trigram=false --flip train.meta=none --seeds 42 43 44",
        "compare:ablate",
    ),
    "seeds": Command(
        "study",
        "Print mean and deviation of scored runs, and test whether they beat other runs",
        "pgolf seeds runs/a1 runs/a2 runs/a3 --against runs/b1 runs/b2 runs/b3",
        "compare:seeds",
    ),
    "ttt-sweep": Command(
        "study",
        "Compare adapters of test-time training on a run's artifact, with intervals",
        "pgolf ttt-sweep runs/small --adapters sgd lora --stride 256",
        "compare:ttt_sweep",
    ),
    "analyze": Command(
        "study",
        "Study the weights, spectra, rounding errors and curvature of models",
        "pgolf analyze runs/a runs/b --only deltas quant",
        "study:analyze",
    ),
    "doctor": Command(
        "kernels",
        "Print what this machine has and which implementation each op uses",
        "pgolf doctor --check",
        "kernels:doctor",
    ),
    "bench": Command(
        "kernels",
        "Time ops next to other implementations; compare and plot results files",
        "pgolf bench --ops mlp --out results.jsonl",
        "kernels:bench",
    ),
    "tune": Command(
        "kernels",
        "Measure tile sizes of the Triton kernels on this GPU and keep the best",
        "pgolf tune --preset exp101 --minutes 20",
        "kernels:tune",
    ),
    "aot": Command(
        "kernels",
        "Compile every Triton kernel for GPUs that need not be here: registers, spills, tensor cores",
        "pgolf aot --arch 90",
        "kernels:aot",
    ),
    "completion": Command(
        "run",
        "Print a completion script for bash or zsh",
        "pgolf completion bash > ~/.local/share/bash-completion/completions/pgolf",
        "completion:completion",
    ),
}
