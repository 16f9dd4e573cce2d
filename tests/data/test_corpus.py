from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import pytest

from pgolf_fast.data import corpus
from pgolf_fast.data.corpus import Source, build_corpus, default_sources, documents
from pgolf_fast.data.shards import BOS_ID, find_shards
from pgolf_fast.data.tokenizer import Tokenizer, byte_table, find_tokenizer, scored_bytes
from pgolf_fast.errors import PgolfError

PROSE = "This paragraph explains at some length, in words of one kind or another, what module {} is good for."
FILES = ["corpus_train_000000.bin", "corpus_val_000000.bin", "info.json", "manifest.json", "tokenizer.model"]


def write_module(path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n\n".join(PROSE.format(f"{name} {part}") for part in ("first", "second", "third"))
    path.write_text(f'"""{body}"""\n', encoding="utf-8")


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """Sixty small modules in place of the installed packages."""
    root = tmp_path / "package"
    for number in range(60):
        write_module(root / f"sub{number % 3}" / f"module{number:02d}.py", f"alpha{number} beta{number * 7}")
    sources = [Source("package", "1.2", root)]
    monkeypatch.setattr(corpus, "default_sources", lambda: sources)
    return sources


def test_the_corpus_is_complete_and_usable(few: list[Source], tmp_path: Path) -> None:
    folder = build_corpus(tmp_path / "cache", vocab_size=300)
    assert folder.parent == tmp_path / "cache"
    assert "package1.2" in folder.name
    assert folder.name.endswith("_sp300")
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert folder.stat().st_mode & 0o777 == (tmp_path / "cache").stat().st_mode & 0o777
    tokenizer = Tokenizer.load(find_tokenizer(folder))
    info = json.loads((folder / "info.json").read_text())
    assert info["sources"] == {"package": "1.2"}
    assert info["train"]["documents"] + info["val"]["documents"] == 60
    for split in ("train", "val"):
        (shard,) = find_shards(folder, split)  # type: ignore[arg-type]
        assert shard.tokens[0] == BOS_ID
        assert int((shard.tokens == BOS_ID).sum()) == info[split]["documents"] > 0
        assert shard.num_tokens == info[split]["tokens"]
        assert scored_bytes(byte_table(tokenizer), shard.tokens) == info[split]["bytes"]
    assert 0 < info["bigram_bpb"] < info["unigram_bpb"] < 8
    text = tokenizer.decode(find_shards(folder, "val")[0].tokens.tolist())
    assert "explains at some length, in words of one kind" in text


def test_it_is_built_once_and_the_same_each_time(
    few: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_corpus(tmp_path / "one", vocab_size=300)
    again = build_corpus(tmp_path / "two", vocab_size=300)
    assert first.name == again.name
    for name in FILES:
        assert (first / name).read_bytes() == (again / name).read_bytes()
    monkeypatch.setattr(corpus, "_build", None)
    assert build_corpus(tmp_path / "one", vocab_size=300) == first
    with pytest.raises(TypeError):  # another vocabulary is another corpus
        build_corpus(tmp_path / "one", vocab_size=301)


def test_split_is_by_the_name_of_the_document(few: list[Source], tmp_path: Path) -> None:
    import hashlib

    names = [name for name, _ in documents(few)]
    assert names[0] == "package/sub0/module00.py"
    val = [n for n in names if int(hashlib.sha1(n.encode()).hexdigest(), 16) % 20 == 0]
    info = json.loads((build_corpus(tmp_path / "cache", vocab_size=300) / "info.json").read_text())
    assert info["val"]["documents"] == len(val)


def test_a_failed_build_leaves_nothing(
    few: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "ngram_floors", fail)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "cache", vocab_size=300)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".corpus.lock"]


def test_leftovers_of_killed_builds_are_removed(few: list[Source], tmp_path: Path) -> None:
    left = tmp_path / "cache" / ".corpus-left.tmp"
    left.mkdir(parents=True)
    build_corpus(tmp_path / "cache", vocab_size=300)
    assert not left.exists()


def test_a_damaged_cache_is_built_again(few: list[Source], tmp_path: Path) -> None:
    folder = build_corpus(tmp_path / "cache", vocab_size=300)
    (folder / "info.json").unlink()
    assert build_corpus(tmp_path / "cache", vocab_size=300) == folder
    assert sorted(p.name for p in folder.iterdir()) == FILES


def test_builders_at_the_same_time(
    few: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus is built by one of them. Without the lock, each would build it."""
    built, build = [], corpus._build
    monkeypatch.setattr(corpus, "_build", lambda folder, *rest: (built.append(folder), build(folder, *rest)))
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: build_corpus(tmp_path / "cache", vocab_size=300), range(4)))
    assert (len(set(folders)), len(built)) == (1, 1)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [".corpus.lock", folders[0].name]


def test_the_users_cache_folder_is_the_default(
    few: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "home" / name))
    assert build_corpus(vocab_size=300).parent == tmp_path / "home" / "pgolf_fast"


def test_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(corpus, "default_sources", lambda: [Source("package", "1", tmp_path / "package")])
    with pytest.raises(PgolfError, match=r"empty corpus: found 0 training and 0 validation documents"):
        build_corpus(tmp_path / "cache", vocab_size=300)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".corpus.lock"]


def test_a_folder_that_cannot_be_made(few: list[Source], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PgolfError, match=r"cannot write the built-in corpus to .*file"):
        build_corpus(tmp_path / "file" / "cache", vocab_size=300)


def test_a_vocabulary_the_text_does_not_support(few: list[Source], tmp_path: Path) -> None:
    with pytest.raises(PgolfError, match=r"vocab_size 60000 is too large for this text"):
        build_corpus(tmp_path / "cache", vocab_size=60_000)


def test_docstrings_of_a_module_without_importing_it(tmp_path: Path) -> None:
    long = "needs to be a sentence of more than sixty letters to be counted as prose here"
    (tmp_path / "a.py").write_text(
        f'''"""The module {long}.

        The same `text` twice {long}.
        """
raise SystemExit("imported")
class A:
    """The class {long}."""
    def method(self):
        """The method {long}; see :class:`~package.Other` too."""
        def inner():
            """The inner function {long}."""
async def f():
    """The same `text` twice {long}.

    >>> print("an example {long}")

    .. note:: a directive {long}

    x_1 = {{1: 2, 3: 4, 5: 6, 7: 8, 9: 10, 11: 12, 13: 14, 15: 16, 17: 18, 19: 20, 21: 22}}
    """
describe(f, ("The call {long}.", 3))
describe(f, """The formatted call {long}.""".format(x=1))
'''
    )
    (tmp_path / "broken.py").write_text('"""Not Python."""\nclass (:\n')
    (tmp_path / "binary.py").write_bytes(b'"""\xff\x00"""')
    write_module(tmp_path / "tests" / "b.py", "test")
    ((name, text),) = documents([Source("p", "1", tmp_path)])
    assert name == "p/a.py"
    assert text.split("\n") == [
        f"The module {long}.",
        f"The same text twice {long}.",
        f"The class {long}.",
        f"The method {long}; see package.Other too.",
        f"The call {long}.",
        f"The formatted call {long}.",
    ]


def test_help_topics_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(PROSE.format(n) for n in ("one", "two", "three"))
    monkeypatch.setattr(corpus, "_help_topics", lambda: {"assert": text, "break": "short"})
    assert [name for name, _ in documents([Source("python", "3", tmp_path, topics=True)])] == [
        "python/topics/assert"
    ]


def test_default_sources_import_nothing_large() -> None:
    code = (
        "import sys; from pgolf_fast.data.corpus import default_sources; s = default_sources(); "
        "print([x.name for x in s][:1], {'torch', 'numpy.linalg.tests'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout == "['python'] set()\n"
    assert all(source.root.is_dir() for source in default_sources())


@pytest.mark.slow
def test_the_real_corpus(tmp_path: Path) -> None:
    start = time.monotonic()
    folder = build_corpus(tmp_path)
    assert time.monotonic() - start < 60
    info = json.loads((folder / "info.json").read_text())
    assert info["train"]["tokens"] > 200_000
    assert info["val"]["tokens"] > 8_192
    assert 1.5 < info["bigram_bpb"] < info["unigram_bpb"] < 4.5
