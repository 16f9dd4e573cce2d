"""Every Python snippet of README.md runs exactly as printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from runs import make_dataset

README = Path(__file__).parent.parent / "README.md"


def python_blocks(text: str) -> list[str]:
    """Return the ```python blocks of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


BLOCKS = python_blocks(README.read_text(encoding="utf-8"))


def test_finds_python_blocks_only():
    text = "a\n```python\nx = 1\n\ny = 2\n```\nb\n```sh\nls\n```\n```python\nz\n```\n"
    assert python_blocks(text) == ["x = 1\n\ny = 2\n", "z\n"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Replace the zero-download corpus, which takes half a minute to build, with Python's help topics."""
    folders: dict[int, Path] = {}

    def build(*, vocab_size: int) -> Path:
        if vocab_size not in folders:
            folders[vocab_size] = make_dataset(tmp_path_factory.mktemp("corpus"), vocab_size)
        return folders[vocab_size]

    return build


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(1, len(BLOCKS) + 1)])
def test_block_runs(block, corpus, tmp_path, monkeypatch):
    """Each block has a namespace and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pgolf_fast.data.source.build_corpus", corpus)
    script = tmp_path / "snippet.py"  # torch.compile reads the file that a function comes from
    script.write_text(block, encoding="utf-8")
    runpy.run_path(str(script), run_name="__main__")
