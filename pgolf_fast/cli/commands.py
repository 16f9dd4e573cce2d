"""The table of commands: what each does, an example, and the function that runs it."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Groups, and three lines for each command: name = module:function in this package, what it does, an example.
_TABLE = """
run: from text to a submission
  demo = run:demo
    Train, quantize, pack and score a small model on text this machine already has
    pgolf demo --seconds 60
  train = run:train
    Train a preset into a run folder
    pgolf train exp101 --data.path DIR --out runs/exp101
  import = run:import_weights
    Make a run folder from published weights
    pgolf import final_model.pt exp101 --data.path DIR --out runs/published
  quantize = export:quantize
    Round a run's weights to integers
    pgolf quantize runs/small --grid rd --target-bytes 2000000
  pack = export:pack
    Write a run's artifact and check its size against the limit
    pgolf pack runs/small --table
  eval = evaluate:evaluate
    Score a run: non-overlapping, sliding, and sliding with test-time training
    pgolf eval runs/small --figures
  submit = export:submit
    Write a run as a submission folder: README, submission.json, log, artifact and script
    pgolf submit runs/small --author 'Your Name' --github-id you
  generate = run:generate
    Continue a prompt with a run's model
    pgolf generate runs/small --prompt 'Once upon a time'
  config = config:config
    List the presets, print or compare them, or translate a run script's environment variables
    pgolf config exp101_as_run --diff exp101
  completion = completion:completion
    Print a completion script for bash or zsh
    pgolf completion bash > ~/.local/share/bash-completion/completions/pgolf

data: token shards and tokenizers
  data info = data:info
    Count tokens, documents and bytes of token shards
    pgolf data info data/tokenized
  data tokenize = data:tokenize
    Train a tokenizer on text files and write them as token shards
    pgolf data tokenize texts/ --vocab-size 1024 --out data/tokenized
  data download = data:download
    Download the challenge's token shards and tokenizer
    pgolf data download sp1024 --train-shards 80

study: is it legal, is it better, what is in it
  audit = study:audit
    Check a run or an artifact against the rules of the challenge
    pgolf audit runs/small --only C2 C5
  report = study:report
    Write a page about a run that opens offline: curves, scores, bytes, audit
    pgolf report runs/small --audit
  ablate = compare:ablate
    Train a preset and variants of it under one budget; compare their scores with intervals
    pgolf ablate small --flip model.trigram=false --flip train.meta=none --seeds 42 43 44
  seeds = compare:seeds
    Print mean and deviation of scored runs, and test whether they beat other runs
    pgolf seeds runs/a1 runs/a2 runs/a3 --against runs/b1 runs/b2 runs/b3
  ttt-sweep = compare:ttt_sweep
    Compare adapters of test-time training on a run's artifact, with intervals
    pgolf ttt-sweep runs/small --adapters sgd lora --stride 256
  analyze = study:analyze
    Study the weights, spectra, rounding errors and curvature of models
    pgolf analyze runs/a runs/b --only deltas quant

kernels: what runs on this machine, and how fast
  doctor = kernels:doctor
    Print what this machine has and which implementation each op uses
    pgolf doctor --check
  bench = kernels:bench
    Time ops next to other implementations; compare and plot results files
    pgolf bench --ops mlp --out results.jsonl
  tune = kernels:tune
    Measure tile sizes of the Triton kernels on this GPU and keep the best
    pgolf tune --preset exp101 --minutes 20
  aot = kernels:aot
    Compile every Triton kernel for GPUs that need not be here: registers, spills, tensor cores
    pgolf aot --arch 90
"""


class Command(NamedTuple):
    """One command: its help, and `module:function` inside `pgolf_fast.cli`."""

    group: str
    about: str
    example: str
    target: str

    def load(self) -> tuple[Callable[..., int], type]:
        """Import the function that runs the command. Return it and the class of its options."""
        module, _, name = self.target.partition(":")
        function = getattr(importlib.import_module(f"pgolf_fast.cli.{module}"), name)
        return function, typing.get_type_hints(function)["options"]


def _commands() -> Iterator[tuple[str, Command]]:
    for block in _TABLE.strip().split("\n\n"):
        group, *lines = (line.strip() for line in block.splitlines())
        for head, about, example in zip(lines[::3], lines[1::3], lines[2::3], strict=True):
            name, _, target = head.partition(" = ")
            yield name, Command(group.partition(":")[0], about, example, target)


COMMANDS = dict(_commands())
GROUPS = dict(block.splitlines()[0].split(": ") for block in _TABLE.strip().split("\n\n"))
