"""Shell scripts as commands with their environments, and what `pgolf config --from-env` prints of them."""

import re
import shlex
from random import Random

import pytest

from pgolf_fast import cli
from pgolf_fast.cli.options import parse
from pgolf_fast.cli.run import Train
from pgolf_fast.cli.run_script import read_script
from pgolf_fast.config.env import translate
from pgolf_fast.config.fields import flip
from pgolf_fast.config.presets import preset
from pgolf_fast.errors import PgolfError

# Script -> known variables of each of its commands. A last word of None: known only when the script runs.
FORMS = {
    "prefix": ("SEED=3 MATRIX_LR=0.1 torchrun --nproc_per_node=8 train_gpt.py", ["SEED=3 MATRIX_LR=0.1"]),
    "continued": ("SEED=3 \\\n  MATRIX_LR=0.1 \\\n  python train_gpt.py", ["SEED=3 MATRIX_LR=0.1"]),
    "exported": ("export SEED=3\nexport MATRIX_LR=0.1; python3 -u train_gpt.py", ["SEED=3 MATRIX_LR=0.1"]),
    "exported later": ("SEED=${1:-7}\nexport SEED\npython train.py", ["SEED=7"]),
    "nohup env": (
        "nohup env SEED=3 MATRIX_LR=0.1 torchrun train_gpt.py > log 2>&1 &",
        ["SEED=3 MATRIX_LR=0.1"],
    ),
    "sudo": ("sudo -E SEED=3 timeout 60 uv run train_gpt.py | tee log", ["SEED=3"]),
    "cd &&": ("cd work && SEED=3 torchrun train_gpt.py || exit 1", ["SEED=3"]),
    "colon": (
        ': "${SEED:=3}" "${MATRIX_LR:=${LR:-0.1}}"\nexport SEED MATRIX_LR\npython train.py',
        ["SEED=3 MATRIX_LR=0.1"],
    ),
    "declare": (
        "declare -x SEED=3\ntypeset -x MATRIX_LR=0.1\nreadonly TRIGRAM=0\nexport TRIGRAM\npython train.py",
        ["SEED=3 MATRIX_LR=0.1 TRIGRAM=0"],
    ),
    "docker": (
        'docker run -e SEED=3 --env MATRIX_LR=0.1 --env=TRIGRAM=0 i bash -c "XSA_LAST_N=4 torchrun train.py"',
        ["SEED=3 MATRIX_LR=0.1 TRIGRAM=0 XSA_LAST_N=4"],
    ),
    "ssh": ('ssh -p 22 me@host "cd /w && SEED=3 torchrun train.py"', ["SEED=3"]),
    "ssh here-document": ("ssh host bash -s <<'EOF'\nexport SEED=3\npython train.py\nEOF", ["SEED=3"]),
    "here-document": (
        "cat > other.sh <<EOF\nSEED=9 python train.py\nEOF\nSEED=3 python train.py",
        ["SEED=3"],
    ),
    "if": ("if true; then SEED=3 torchrun train.py; fi", ["SEED=3"]),
    "test": (
        'M=${M:-full}\nif [ "$M" = smoke ]; then export SEED=1\n'
        'elif [[ $M == f* && -n "$M" ]]; then export SEED=2\n'
        "else export SEED=3; fi\npython train.py",
        ["SEED=2"],
    ),
    "number test": (
        'N=8\n[ "$N" -ge 9 ] || export SEED=4\n[ "$#" -gt 0 ] && export SEED=5\npython train.py',
        ["SEED=4"],
    ),
    "case": (
        'case "${1:-b}" in a) export SEED=1;; b|c) export SEED=2;; *) export SEED=3;; esac\npython train.py',
        ["SEED=2"],
    ),
    "loop": (
        "for SEED in 42 314; do SEED=$SEED MATRIX_LR=0.1 python train.py; done",
        ["SEED=42 MATRIX_LR=0.1"],
    ),
    # a loop that runs nothing assigns all it has
    "loop of exports": (
        'A=(SEED=3 MATRIX_LR=0.1)\nfor kv in "${A[@]}"; do export "$kv"; done\npython train.py',
        ["SEED=3 MATRIX_LR=0.1"],
    ),
    "function": (
        'run() { local name="$1"; local lr=$2; shift 2; env "$@" MATRIX_LR=$lr python train.py; }\n'
        "run a 0.1 SEED=1\nrun b 0.2",
        ["SEED=1 MATRIX_LR=0.1", "MATRIX_LR=0.2"],
    ),
    "unknown function": ('run_one "wide" SEED=3 MATRIX_LR=0.1', ["SEED=3 MATRIX_LR=0.1"]),
    "string": ('COMMON="SEED=3 MATRIX_LR=0.1"\nenv $COMMON python train.py', ["SEED=3 MATRIX_LR=0.1"]),
    "eval": ('COMMON="SEED=3"\nN=2\neval "$COMMON MATRIX_LR=0.$N python train.py"', ["SEED=3 MATRIX_LR=0.2"]),
    "array": (
        'A=(SEED=3)\nA+=(MATRIX_LR=0.1)\nenv "${A[@]}" TRIGRAM=${#A} python train.py',
        ["SEED=3 MATRIX_LR=0.1 TRIGRAM"],
    ),
    "item": ("S=(7 8)\ni=1\nSEED=${S[$i]} TTT_EPOCHS=${S[0]} python train.py", ["SEED=8 TTT_EPOCHS=7"]),
    "set item": ("S=(7 8)\nS[1]=9\nSEED=${S[1]} TTT_EPOCHS=${S[0]} python train.py", ["SEED=9 TTT_EPOCHS=7"]),
    "named items": ("declare -A S=([a]=7)\nSEED=${S[a]} TRIGRAM=0 python train.py", ["SEED TRIGRAM=0"]),
    "arithmetic": (
        "N=8\nexport TRAIN_BATCH_TOKENS=$((65536 * N)) SEED=$(( (1 + 2) * 3 - 7 / 2 ))\npython train.py",
        ["TRAIN_BATCH_TOKENS=524288 SEED=6"],
    ),
    "defaults": (
        'export SEED=${SEED:-${S:-3}} MATRIX_LR=${LR-0.1} DATA_PATH="${D:-a b/$X}"\npython train.py',
        ["SEED=3 MATRIX_LR=0.1 DATA_PATH"],
    ),
    "quotes": ('export DATA_PATH=\'a b\'/"c d" SEED="3"\npython train.py', ["DATA_PATH='a b/c d' SEED=3"]),
    "command output": (
        "export SEED=$(date +%s) MATRIX_LR=0.1\nDATA_PATH=`pwd`/x python train.py",
        ["SEED MATRIX_LR=0.1 DATA_PATH"],
    ),
    "read": (
        "while read -r s; do SEED=$s MATRIX_LR=0.1 python train.py; done < seeds",
        ["SEED MATRIX_LR=0.1"],
    ),
    "argument": ("export SEED=$1 MATRIX_LR=0.1\npython train.py", ["SEED MATRIX_LR=0.1"]),
    "subshell": (
        "(export SEED=3; python train.py)\nexport TRIGRAM=0\npython train.py",
        ["SEED=3", "TRIGRAM=0"],
    ),
    "unset": (
        "export SEED=3 TRIGRAM=0\nunset SEED\npython train.py\nenv -u TRIGRAM SEED=4 python train.py",
        ["TRIGRAM=0", "SEED=4"],
    ),
    "own prefixes": (
        "MATRIX_LR=0.1 python train.py # first\nSEED=2 python train.py",
        ["MATRIX_LR=0.1", "SEED=2"],
    ),
    "later export": ("export SEED=1\npython train.py\nexport SEED=2\npython train.py", ["SEED=1", "SEED=2"]),
    "other programs": (  # tools, and a line that the grammar joins with the next
        "VOCAB_SIZE=8 python data/make_shards.py\npython3 -m py_compile train.py\nls | xargs echo 'n'\n"
        "SEED=3 python train.py",
        ["SEED=3"],
    ),
    "program in a variable": (
        'T=$(command -v torchrun)\nexport SEED=3\n"$T" --standalone "$DIR/train_gpt.py"',
        ["SEED=3"],
    ),
    "no command": ("SEED=3\nexport MATRIX_LR='0.1' # text\r\n", ["SEED=3 MATRIX_LR=0.1"]),
}


def script(tmp_path, text, name="run.sh"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_assignment(name, tmp_path):
    """Every form is what bash would pass on: nothing lost, nothing of another command, nothing invented."""
    text, wanted = FORMS[name]
    commands = read_script(script(tmp_path, text)).commands
    found = [{n: None if w.why else w.text for n, w in c.known.items()} for c in commands]
    want = [dict([*word.split("=", 1), None][:2] for word in shlex.split(words)) for words in wanted]
    assert found == want


def test_notes_say_which_of_several_values(tmp_path):
    text = "for SEED in 1 2 3; do python train.py; done\nexport QK_GAIN_INIT=${1:-4}\n"
    text += "if grep -q x y; then export TRIGRAM=0; else export TRIGRAM=1; fi\nXSA_LAST_N=3\npython train.py"
    _, last = read_script(script(tmp_path, text)).commands
    notes = {name: word.note for name, word in last.known.items()}
    assert notes["SEED"] == "first of 3 values of the loop on line 1"
    assert notes["QK_GAIN_INIT"] == "default of argument 1"
    assert notes["TRIGRAM"] == "if the test on line 3 holds"
    assert notes["XSA_LAST_N"] == "set, but not exported"
    assert last.known["TRIGRAM"].text == "0"


def test_markdown_snippets_are_scripts_of_their_own(tmp_path):
    text = "# A\n```bash\n$ export SEED=3\n$ python train.py\n```\nMATRIX_LR=9\n```python\nSEED = 5\n```\n"
    text += "~~~sh\nTRIGRAM=0 python train.py\n~~~\n"
    found = read_script(script(tmp_path, text, "README.md"))
    assert [{n: w.text for n, w in c.known.items()} for c in found.commands] == [
        {"SEED": "3"},
        {"TRIGRAM": "0"},
    ]
    assert [c.line for c in found.commands] == [4, 11]
    assert found.unread == {"MATRIX_LR": 6}
    assert read_script(script(tmp_path, "SEED=3, no snippet\n```", "README.md")).unread == {"SEED": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        (b"\xff\xfeS\x00", "is not UTF-8 text"),
        (b"\x7fELF\x00\x00", "is not text"),
        ("X=" + "$(" * 2000 + ")" * 2000, "nested too deeply"),
        ("f() { f; f; }\nf\nSEED=1 python train.py", "more than 20,000 steps"),  # 2 ** 40 calls
        ('A=\'eval "$A"\'\neval "$A"', "nested too deeply"),
    ],
)
def test_files_that_are_no_script(text, message, tmp_path):
    with pytest.raises(PgolfError, match=message):
        read_script(script(tmp_path, text))


def test_damaged_scripts_are_read_as_far_as_they_go(tmp_path):
    """The parser leaves parts of a tree out or marks them; text is cut, and marks of the syntax put in."""
    random = Random(0)
    texts = [text for text, _ in FORMS.values()]
    marks = [
        *"\"'`(){}[]<>|&;\n!=",
        "$((",
        "${",
        "<<E\n",
        "then ",
        "fi",
        "esac",
        "done",
        "[[ ",
        "&&",
        "local ",
    ]
    for _ in range(400):
        text = "\n".join(random.sample(texts, 2))
        for at in (random.randrange(len(text)) for _ in range(4)):
            text = text[:at] + random.choice([*marks, ""]) + text[at + random.randrange(4) :]
        found = read_script(script(tmp_path, text + "\n:"))
        assert all(isinstance(line, str) for line in found.lines(found.choose(None)))


def test_values_that_double_are_cut_off(tmp_path):
    text = (
        "X=aaaaaaaaaa\n"
        + "X=$X$X\n" * 50
        + 'A=("$X" b)\n'
        + 'A+=("${A[@]}")\n' * 30
        + "SEED=$X python train.py"
    )
    (command,) = read_script(script(tmp_path, text)).commands
    assert "too long" in command.known["SEED"].why


# The command


def config(capsys, path, *options):
    """Status, standard output, and standard error of `pgolf config --from-env`."""
    status = cli.main(["config", "--from-env", str(path), *options])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_nothing_is_executed(capsys, tmp_path):
    planted = tmp_path / "planted"
    touch = f"touch {planted}"
    forms = (f"$({touch})", f"`{touch}`", f"<({touch})", f"${{X:=$({touch})}}", f"$(( $({touch}) ))")
    text = "".join(f"export SEED={form}\n" for form in forms) + f"{touch}\neval '{touch}'"
    assert config(capsys, script(tmp_path, text))[0] == 2
    assert not planted.exists()


EVERYTHING = """#!/bin/bash
# the run: NUM_KV_HEADS=2
export WANDB_API_KEY=0123456789abcdef HF_TOKEN=${HF_TOKEN:-hf_planted} MY_PASSWORD='p w'
export DATA_PATH=https://me:hunter2@host/x TOKENIZER_PATH=/mnt/0123456789abcdef/t.model RUN_ID=exp
TIE_EMBEDDINGS=0 NUM_LAYERS=10 MAX_WALLCLOCK_SECONDS=0 EVAL_STRIDE=0 TRIGRAM=0 SEED=$1 MATRIX_LR=0.03 \\
  torchrun train_gpt.py
SEED=2 EMA_DECAY=0.99 torchrun train_gpt.py
"""


@pytest.mark.parametrize("base", ["exp101", "exp101_as_run", "baseline", "tiny"])
def test_the_last_line_is_a_command_that_trains_the_same(base, capsys, tmp_path):
    path = script(tmp_path, EVERYTHING, "my run.sh")
    status, out, err = config(capsys, path, "--base", base)
    assert (status, err) == (0, "")
    words = shlex.split(out.splitlines()[-1])
    assert words[:3] == ["pgolf", "train", base]
    options = parse("train", Train, words[2:])
    known = read_script(path).commands[0].known
    texts = {
        name: word.text for name, word in known.items() if name not in ("SEED", "DATA_PATH", "TOKENIZER_PATH")
    }
    assert flip(preset(options.preset), options.fields) == translate(texts, preset(base)).config
    assert f"changes to {base}:" in out
    header = next(line for line in out.splitlines() if line.startswith("field"))
    assert header.split(None, 2)[1:] == [base, "my run.sh"]


def test_all_is_said_but_no_secret(capsys, tmp_path):
    _, out, _ = config(capsys, script(tmp_path, EVERYTHING))
    for secret in ("0123456789abcdef", "planted", "p w", "hunter2"):
        assert secret not in out
    assert "unknown, not translated: HF_TOKEN, MY_PASSWORD, RUN_ID, WANDB_API_KEY" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert "its value looks like a credential" in rows["DATA_PATH"]
    assert "its value looks like a credential" in rows["TOKENIZER_PATH"]
    assert "$1 is not set in the script" in rows["SEED"]
    assert "not supported" in rows["TIE_EMBEDDINGS=0"]
    assert "command 1 of 2 is translated; --command N chooses another:" in out
    assert "2: line 7, train_gpt.py: SEED=2 EMA_DECAY=0.99 without TIE_EMBEDDINGS NUM_LAYERS" in out
    assert "mentioned, but not set for any command: NUM_KV_HEADS (line 2)" in out
    assert "model.ve_layers is (7, 8, 9) instead of (7, 8, 9, 10)" in out


def test_a_command_is_chosen_by_number(capsys, tmp_path):
    path = script(tmp_path, EVERYTHING)
    _, out, _ = config(capsys, path, "--command", "2")
    last = out.splitlines()[-1]
    assert "--train.seed 2" in last
    assert "--average.ema-decay 0.99" in last
    assert "matrix-lr" not in last  # of the first command
    status, out, err = config(capsys, path, "--command", "3")
    assert (status, out) == (2, "")
    assert "--command is 3; it must be 1 to 2" in err


def test_branches_not_taken_are_listed_and_not_mixed_in(capsys, tmp_path):
    text = 'if [ "${SMOKE:-0}" = 1 ]; then\n  export ITERATIONS=10 TRIGRAM=0\n  python train.py\nfi\n'
    text += "SEED=3 python train.py"
    _, out, _ = config(capsys, script(tmp_path, text))
    assert "command 2 of 2 is translated" in out
    assert "1: line 3 in a branch that is not taken, train.py: ITERATIONS=10 TRIGRAM=0 without SEED" in out
    assert out.splitlines()[-1] == "pgolf train exp101_as_run --train.seed 3"


@pytest.mark.parametrize(
    "text",
    [
        "echo SEED=3 python train.py",
        "set SEED=3",  # of another shell
        'import os\nos.environ["SEED"] = "3"\n',
        "jobs:\n  env:\n    SEED: 3\n",
        '{"SEED": 3}',
        "# SEED=3",
    ],
)
def test_names_that_are_only_seen_are_named(text, capsys, tmp_path):
    """A reader that looks at assignments only says "no known variables", with status 0."""
    status, out, err = config(capsys, script(tmp_path, text))
    assert status == 2
    assert "mentioned, but not set for any command: SEED (line" in out
    assert err.count("\n") == 1
    assert "no variable of" in err


def test_a_base_preset_is_given_once(capsys, tmp_path):
    path = script(tmp_path, "SEED=7 python train.py")
    assert config(capsys, path)[1].endswith("pgolf train exp101_as_run --train.seed 7\n")
    assert cli.main(["config", "exp106", "--from-env", str(path)]) == 0
    assert capsys.readouterr().out.endswith("pgolf train exp106 --train.seed 7\n")
    for more in (["exp106", "--base", "exp101"], ["--diff", "tiny"], ["--train.seed", "3"]):
        assert cli.main(["config", *more, "--from-env", str(path)]) == 2
        assert "--from-env takes one preset" in capsys.readouterr().err
    assert cli.main(["config", "exp101", "--command", "2"]) == 2
    assert "--command is for --from-env" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["i=3; while [ $i -lt 9 ]", "for ((i=3; i<9; i++))"])
def test_the_first_pass_of_a_loop_is_said(capsys, tmp_path, head):
    _, out, _ = config(capsys, script(tmp_path, f"{head}; do SEED=$i python train.py; ((i++)); done"))
    assert re.search(r"SEED +train.seed +3 +first pass of the loop on line 1\n", out)
