"""Help, completion, and every spelling of a command line that has ever been documented."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_fast import cli
from pgolf_fast.cli.commands import COMMANDS, GROUPS
from pgolf_fast.cli.options import parse, preset_with
from pgolf_fast.config.fields import flatten
from pgolf_fast.config.presets import PRESETS, exp101, preset
from pgolf_fast.config.run_folder import RunFolder
from pgolf_fast.config.schema import ReptileConfig
from pgolf_fast.errors import PgolfError

LONG = ("train", "ablate", "config", "import")  # these show every field of the configuration


def shown(capsys, *words):
    """The help that words print."""
    assert cli.main([str(word) for word in words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def run_python(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Help


def test_top_level_help_lists_every_command_in_its_group(capsys):
    for words in ((), ("--help",), ("-h",), ("help",)):
        text = shown(capsys, *words)
        place = [text.index(f"\n{group}: ") for group in GROUPS]
        assert place == sorted(place)
        for name, command in COMMANDS.items():
            assert f"  {name} " in text
            assert command.about in text


def test_importing_the_command_line_loads_nothing_heavy():
    code = "import sys, pgolf_fast.cli; pgolf_fast.cli.main(['--help'])\n"
    code += "print([m for m in ('torch', 'numpy', 'triton', 'tyro') if m in sys.modules])"
    assert run_python(code).splitlines()[-1] == "[]"


def test_help_and_completion_of_every_command_do_not_import_torch():
    code = "import sys; from pgolf_fast import cli; from pgolf_fast.cli.commands import COMMANDS\n"
    code += "for name in COMMANDS: cli.main([*name.split(), '--help'])\n"
    code += "cli.main(['completion', 'bash'])\n"
    code += "print([m for m in ('torch', 'triton', 'matplotlib') if m in sys.modules])"
    assert run_python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_begins_with_purpose_and_example_and_fits_a_screen(name, capsys, monkeypatch):
    for width in (80, 100) if name not in LONG else (80,):
        monkeypatch.setenv("COLUMNS", str(width))
        about, example, _, usage, *_ = lines = shown(capsys, *name.split(), "--help").splitlines()
        assert about == f"{COMMANDS[name].about}."
        assert example == f"Example: {COMMANDS[name].example}"
        assert usage.startswith(f"usage: pgolf {name} ")
        assert len(lines) <= 60 or name in LONG
    assert lines == shown(capsys, "help", *name.split()).splitlines()


def test_help_of_data_lists_its_commands(capsys):
    for words in (("data", "--help"), ("help", "data"), ("data", "-h"), ("data", "help")):
        text = shown(capsys, *words)
        assert all(f"data {name}" in text for name in ("info", "tokenize", "download"))
        assert "train" not in text.replace("Train a tokenizer", "")


@pytest.mark.parametrize("name", LONG)
def test_long_helps_show_every_field_with_its_default(name, capsys):
    text = shown(capsys, name, "--help")
    reptile = [f"train.reptile.{field.name}" for field in dataclasses.fields(ReptileConfig)]
    for field in [*(field for field, _ in flatten(exp101())), *reptile]:
        last = field.replace("_", "-")
        assert f"--{last}" in text, field
    assert "(default: 7500)" in text
    assert "default when on" in text
    assert "those of exp101" in text
    assert all(name in text for name in PRESETS)


def test_help_shows_the_defaults_of_the_preset_or_run_it_names(capsys, tmp_path):
    assert "(default: 100000)" in shown(capsys, "train", "small", "--help")
    text = shown(capsys, "help", "train", "pr301", "--shrink", "tiny")
    assert "those of pr301_tiny" in text
    assert "(default: 300)" in text
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_config(preset_with("tiny", None, ("quant.bits=5", "eval.stride=7")))
    assert "(default: 6)" in shown(capsys, "quantize", "--help")
    text = shown(capsys, "quantize", folder.path, "--help")
    assert "(default: 5)" in text
    assert f"those of {folder.path}" in text
    assert "(default: 7)" in shown(capsys, "eval", "--weights", "float", folder.path, "--help")


def test_short_help_names_what_help_all_shows(capsys):
    short, full = shown(capsys, "eval", "--help"), shown(capsys, "eval", "--help-all")
    assert "--ttt.lora.rank" not in short
    assert "--ttt.lora.*" in short
    assert "--ttt.lora.rank" in full


# Completion


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell, capsys, tmp_path):
    script = shown(capsys, "completion", shell)
    for name in COMMANDS:
        assert f"'{name.split()[-1]}'" in script
    for option in ("--train.reptile.share", "--target-bytes", "--allow-illegal"):
        assert f"'{option}'" in script
    path = tmp_path / "pgolf"
    path.write_text(script)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True)


# Spellings

DOCUMENTED = """
demo
demo --seconds 60
train exp101 --data.path data/datasets/fineweb10B_sp1024 --out runs/exp101
train exp101 --data.path DIR --out runs/exp101 --resume
train --out runs/exp101 exp101
train small --data.path DATA/datasets/webmix_sp1024 --out runs/small
train small --train.max-seconds 1800 --train.seed 43
train PRESET --track wandb
train PRESET --track tensorboard
train pr301 --shrink tiny --data.path DIR --out RUN
train exp101 --train.meta.method fomaml
train exp101 --train.meta.method cross_chunk --train.meta.delta-weight 0.3 --train.meta.slot-rates
train exp101 --train.meta.method sam --train.meta.delta-weight 0.3
train exp101 --train.meta none --train.reptile.share 0.2
train exp101 --train.meta none --train.reptile none
train exp101 --kernels.implementation torch --kernels.attention cudnn
quantize runs/exp101
quantize RUN --grid rd --target-bytes 4000000
quantize RUN --quant.grid percentile --quant.percentiles 0.99 1.0
pack runs/exp101
pack RUN --table --treemap FILE.png
pack RUN --table --measure raw --json FILE --pack.codecs rans lzma --pack.no-prune
eval runs/exp101
eval RUN --figures
eval RUN --estimate
eval exp101 --estimate --data DIR
eval --weights float RUN
eval RUN --allow-illegal --ttt.adapter error_guided --ttt.lora.rank 4
audit RUN
audit RUN --json FILE --only C1 C2 --limit-bytes 1000 --tokens 512 --ttt.adapter lora
ttt-sweep runs/small --stride 256
ttt-sweep --adapters sgd lora RUN
ttt-sweep RUN --adapters sgd lora --stride 256 --tokens 1000 --after 3 --data DIR --allow-illegal
analyze A
analyze A B --only deltas quant --out DIR --data.path DIR --tokens 100
analyze A --data.path DIR --data.tokenizer FILE --weights float --preset exp101 --hash-rows 3072 4096
report RUN
report RUN --audit --out FILE.html
seeds A1 A2 A3 --against B1 B2 B3
seeds A1 A2 --margin 0.01 --weights float
ablate small --flip model.trigram=false --flip train.meta=none --seeds 42 43 44 --steps 500 --data.path DIR
ablate pr296_reptile --flip train.reptile=none --budget time --seconds 60 --workers 2
ablate small --flip a=1 b=2 --budget both --interval seeds --scores plain --out DIR
submit RUN
submit RUN --out DIR --readable --author A --github-id a --name N --blurb B --track T
generate RUN --prompt text --tokens 3 --temperature 0.5 --seed 1
import FILE.pt exp101 --data.path DIR --out RUN
data info DIR --tokenizer FILE --overlap
data tokenize A --val-docs 50000
data tokenize A B --vocab-size 512 --out DIR --tokenizer FILE --val-fraction 0.1 --workers 2
data download sp1024 --train-shards 80 --out data --endpoint URL
config
config exp101_as_run --diff exp101
config pr301 --shrink=tiny --diff pr301_tiny
config --from-env run.sh --base exp101
config --from_env run.sh
doctor
doctor --check
doctor --table
aot
aot exp101 --arch 80 90 100 --out FILE
bench
bench --ops mlp gqa_attention --out before.jsonl
bench --compare before.jsonl after.jsonl --threshold 1.2
bench --records before.jsonl --plots .
bench --preset small --tokens 64 --modes fwd --peers eager --dtype float32 --quick --minutes 1
tune
tune --preset exp101 --ops mlp --kernels mlp_up --tokens 64 --candidates 3 --minutes 5 --out FILE
"""


@pytest.mark.parametrize("line", DOCUMENTED.strip().splitlines())
def test_documented_spellings_are_accepted(line):
    words = line.replace("PRESET", "small").split()
    length = 2 if words[0] == "data" else 1
    name = " ".join(words[:length])
    kind = COMMANDS[name].load()
    options = parse(name, kind, words[length:])
    assert isinstance(options, kind)
    if hasattr(options, "fields") and getattr(options, "preset", ""):
        assert preset_with(options.preset, options.shrink, options.fields)


def commands_of_the_docs():
    """Command lines in README and docs, without comments and placeholders for more options."""
    root = Path(__file__).parents[2]
    for path in (
        root / "README.md",
        root / "benchmarks" / "README.md",
        *sorted((root / "docs").glob("*.md")),
    ):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().removeprefix("$ ").startswith("pgolf ") and "[" not in line:
                for part in re.split("#|  \\(", line)[0].split("&&"):
                    yield " ".join(word for word in part.split() if word not in ("$", "\\", "...", "pgolf"))


@pytest.mark.parametrize("line", sorted(set(commands_of_the_docs())))
def test_commands_of_the_docs_are_accepted(line):
    test_documented_spellings_are_accepted(line)


def test_options_may_come_before_and_after_the_run():
    kind = COMMANDS["eval"].load()
    words = ["--weights", "float", "--eval.stride", "8"]
    options = parse("eval", kind, [*words, "RUN"])
    assert options == parse("eval", kind, ["RUN", *words])
    assert (options.run, options.weights, options.fields) == (Path("RUN"), "float", ("eval.stride=8",))


def test_fields_are_set_together_on_the_preset(capsys):
    words = [
        "--train.warmdown-steps",
        "none",
        "--train.warmdown-fraction",
        "0.5",
        "--model.ve-layers",
        "2",
        "3",
    ]
    kind = COMMANDS["train"].load()
    options = parse("train", kind, ["small", *words, "--model.no-trigram", "--train.qat.from-share=0.5"])
    with pytest.raises(PgolfError, match=r"train\.qat\.below"):
        preset_with("small", None, options.fields)
    options = parse("train", kind, ["small", *words, "--model.no-trigram"])
    config = preset_with(options.preset, options.shrink, options.fields)
    assert (config.train.warmdown_steps, config.train.warmdown_fraction) == (None, 0.5)
    assert (config.model.ve_layers, config.model.trigram) == ((2, 3), False)
    assert preset_with("small", None, ()) == preset("small")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "unknown command 'trian': did you mean train?"),
        ("data inform", "unknown command 'data inform': did you mean data info?"),
        ("data", "pgolf data needs one of info, tokenize, download"),
        ("xyz", "commands are demo, train"),
        ("hepl", "did you mean help?"),
        ("--verison", "did you mean --version?"),
        ("train exp11", "unknown preset 'exp11': did you mean exp101?"),
        ("train exp101 --train.stepz 3", "did you mean --train.steps?"),
        ("train --train.stepz 3 exp101", "did you mean --train.steps?"),
        ("train exp101 --train.steps three", "train.steps is 'three'; it must be int"),
        ("train exp101 --train.steps", "Missing value for argument '--train.steps'"),
        ("train --train.steps 3", "train needs PRESET: for example `pgolf train exp101"),
        ("train exp101 small", "train does not take 'small'"),
        ("train exp101 --track fun", "--track is 'fun'; it must be one of tensorboard, wandb"),
        ("config exp101 --train.meta soon", "train.meta is 'soon'; it is a group: set its fields"),
        ("config exp101 --train.meta none --train.meta.every 3", "contradict"),
        ("config exp101 --model.num-heads 7", "num_heads 7"),
        (
            "config exp101 --quant.grid fine",
            "quant.grid is 'fine'; it must be one of reference, percentile, sdclip, rd",
        ),
        ("config --diff exp101", "config needs a preset"),
        ("config exp101 --from-env run.sh --base tiny", "--from-env takes one preset"),
        ("config exp101 --base exp101", "--base is for --from-env"),
        ("quantize", "quantize needs RUN: for example `pgolf quantize"),
        ("quantize /nowhere", "run folder /nowhere does not exist: give the --out of a training run"),
        ("eval /nowhere", "run folder /nowhere does not exist"),
        ("eval --weight float RUN", "did you mean --weights?"),
        ("audit", "audit needs RUN_OR_ARTIFACT"),
        ("audit /nowhere", "run or artifact /nowhere does not exist"),
        ("generate RUN --tokens many", "--tokens is 'many'; it must be INT"),
        ("bench --tokens 1 b", "--tokens is '1 b'; it must be INT ..."),
        ("bench --compare a", "--compare is 'a'; it must be PATH PATH"),
        ("seeds a b --margin x", "--margin is 'x'; it must be FLOAT"),
        ("generate RUN --tokens 0", "--tokens is 0; it must be at least 1"),
        ("demo --seconds 0", "--seconds is 0.0; it must be positive"),
        ("ablate small --flip", "--flip has no FIELD=VALUE"),
        ("ablate small --flip a", "'a' is not FIELD=VALUE"),
        ("import /nowhere.pt exp101", "weights file /nowhere.pt does not exist"),
        ("import exp101", "import needs PRESET"),
        ("seeds one", "pgolf seeds needs at least 2 runs"),
        ("completion fish", "shell is 'fish'; it must be one of bash, zsh"),
        ("data info /nowhere", "data folder /nowhere does not exist"),
        ("pack RUN --measure raw", "--measure has no effect without --table or --json"),
        ("eval RUN --estimate --figures", "--figures has no effect with --estimate"),
        ("eval exp101 --allow-illegal --estimate", "--allow-illegal has no effect with --estimate"),
        ("generate RUN --temperature 0 --seed 1", "--seed has no effect without --temperature"),
        ("audit RUN --only C1 C2 --limit-bytes 5", "--limit-bytes has no effect without --only C10"),
        ("ablate tiny --budget time --steps 3", "--steps has no effect without --budget steps or"),
        ("ablate tiny --seconds 3", "--seconds has no effect without --budget time or --budget both"),
        ("ablate tiny --train.seed 3", "train.seed=3 has no effect: give seeds with --seeds"),
        ("ablate tiny --flip train.seed=3", "train.seed=3 has no effect"),
        ("seeds a b --margin 0.1", "--margin has no effect without --against"),
        ("analyze A --only spectra hash --probes 3", "--probes has no effect without --only surface"),
        ("doctor --check --table", "--check has no effect with --table"),
        ("bench --threshold 2", "--threshold has no effect without --compare"),
        ("bench --compare a b --ops mlp", "--ops has no effect with --compare or --records"),
        ("train tiny --out=", "--out is empty: give a value, or leave it out"),
    ],
)
def test_mistakes_are_answered_in_one_line(line, message, capsys):
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("pgolf: ")
    assert message in captured.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("train", "tiny", "--out", ""), "--out"),  # Path("") is the working directory
        (("eval", ""), "an argument"),
        (("data", "tokenize", "a", "", "--vocab-size", "300"), "an argument"),
        (("train", "tiny", "--data.path", ""), "--data.path"),
        (("ablate", "tiny", "--flip", "model.trigram=false", "", "--out", "x"), "--flip"),
    ],
)
def test_empty_words_are_refused(words, option, capsys):
    assert cli.main(list(words)) == 2
    assert capsys.readouterr().err == f"pgolf: {option} is empty: give a value, or leave it out\n"


def test_empty_text_and_lists_may_be_meant():
    parse("generate", COMMANDS["generate"].load(), ["RUN", "--prompt", ""])
    options = parse("train", COMMANDS["train"].load(), ["tiny", "--model.ve-layers", ""])
    assert preset_with("tiny", None, options.fields).model.ve_layers == ()


@pytest.mark.parametrize(
    "words", ["eval {}", "config --from-env {}", "data tokenize {}", "audit RUN --json {}"]
)
def test_named_pipes_are_not_waited_for(words, capsys, tmp_path):
    """Opening one waits until somebody writes to it."""
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(words.format(tmp_path / "pipe").split()) == 2
    assert "is a named pipe: give a regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "eval RUN --weights={}",
            "--weights is 'xxxx",
        ),  # a message is wrapped, and its quotes are on other lines
        ("bench --modes {}", "xxxx"),
        ("generate RUN --tokens {}", "--tokens must be INT"),
        ("train {}", "unknown preset 'xxxx"),
        ("config --{} 3", "unknown option --xxxx"),
    ],
)
def test_long_words(words, message, capsys):
    assert cli.main(words.format("x" * 30_000).split()) == 2
    text = capsys.readouterr().err
    assert message in text
    assert len(text) < 5000
    assert len(text.splitlines()) == 1


def test_narrow_terminals(capsys, monkeypatch):
    """At a width of one column tyro takes minutes."""
    monkeypatch.setenv("COLUMNS", "1")
    assert max(map(len, shown(capsys, "generate", "--help").splitlines())) > 40
    assert cli.main(["generate", "RUN", "--tokenz", "3"]) == 2
    assert "did you mean --tokens?" in capsys.readouterr().err
