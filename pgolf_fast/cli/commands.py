"""The table of commands: what each does, and an example.

A command is a dataclass of options in the module of its group, named like the command (`ttt-sweep` is
`study.TttSweep`), whose method `main` does the work and returns an exit status, None for 0.
"""

from importlib import import_module
from typing import Any, NamedTuple

_TABLE = """
run: from text to a submission
  demo: Train, quantize, pack and score a small model on text this machine already has
    pgolf demo --seconds 60
  train: Train a preset into a run folder
    pgolf train exp101 --data.path DIR --out runs/exp101
  import: Make a run folder from published weights
    pgolf import final_model.pt exp101 --data.path DIR --out runs/published
  quantize: Round a run's weights to integers
    pgolf quantize runs/small --grid rd --target-bytes 2000000
  pack: Write a run's artifact and check its size against the limit
    pgolf pack runs/small --table
  eval: Score a run: non-overlapping, sliding, and sliding with test-time training
    pgolf eval runs/small --figures
  submit: Write a run as a submission folder: README, submission.json, log, artifact and script
    pgolf submit runs/small --author 'Your Name' --github-id you
  generate: Continue a prompt with a run's model
    pgolf generate runs/small --prompt 'Once upon a time'
  config: List the presets, print or compare them, or translate a run script's environment variables
    pgolf config exp101_as_run --diff exp101
  completion: Print a completion script for bash or zsh
    pgolf completion bash > ~/.local/share/bash-completion/completions/pgolf

data: token shards and tokenizers
  data info: Count tokens, documents and bytes of token shards
    pgolf data info data/tokenized
  data tokenize: Train a tokenizer on text files and write them as token shards
    pgolf data tokenize texts/ --vocab-size 1024 --out data/tokenized
  data download: Download the challenge's token shards and tokenizer
    pgolf data download sp1024 --train-shards 80

study: is it legal, is it better, what is in it
  audit: Check a run or an artifact against the rules of the challenge
    pgolf audit runs/small --only C2 C5
  report: Write a page about a run that opens offline: curves, scores, bytes, audit
    pgolf report runs/small --audit
  ablate: Train a preset and variants of it under one budget; compare their scores with intervals
    pgolf ablate small --flip model.trigram=false --flip train.meta=none --seeds 42 43 44
  seeds: Print the mean and deviation of scored runs, and test whether they beat other runs
    pgolf seeds runs/a1 runs/a2 runs/a3 --against runs/b1 runs/b2 runs/b3
  ttt-sweep: Compare test-time training adapters on a run's artifact, with intervals
    pgolf ttt-sweep runs/small --adapters sgd lora --stride 256
  analyze: Study the weights, spectra, rounding errors and curvature of models
    pgolf analyze runs/a runs/b --only deltas quant

kernels: what runs on this machine, and how fast
  doctor: Print what this machine has and which implementation each op uses
    pgolf doctor --check
  bench: Time ops next to other implementations; compare and plot results files
    pgolf bench --ops mlp --out results.jsonl
  tune: Measure tile sizes of the Triton kernels on this GPU and keep the best
    pgolf tune --preset exp101 --minutes 20
  aot: Compile every Triton kernel, even for absent GPUs; list registers, spills and tensor cores
    pgolf aot --arch 90
"""


class Command(NamedTuple):
    """One command and its help."""

    name: str
    group: str
    about: str
    example: str

    def load(self) -> Any:
        """Import and return the class of the command."""
        title = self.name.split()[-1].title().replace("-", "")
        return getattr(import_module(f"pgolf_fast.cli.{self.group}"), title)


GROUPS: dict[str, str] = {}
COMMANDS: dict[str, Command] = {}
for _block in _TABLE.strip().split("\n\n"):
    _head, *_lines = _block.splitlines()
    _group, _, _text = _head.partition(": ")
    GROUPS[_group] = _text
    for _about, _example in zip(_lines[::2], _lines[1::2], strict=True):
        _name, _, _text = _about.strip().partition(": ")
        COMMANDS[_name] = Command(_name, _group, _text, _example.strip())
