from __future__ import annotations

import errno
import hashlib
import http.server
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from pgolf_fast.data.download import download
from pgolf_fast.data.manifest import check_manifest
from pgolf_fast.data.shards import find_shards, write_shard
from pgolf_fast.data.tokenizer import Tokenizer, find_tokenizer, train_tokenizer
from pgolf_fast.errors import PgolfError

pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")

REPO = "someone/golf"
COMMIT = "c0ffee" * 6 + "c0ff"
DATASET = "fineweb10B_sp300"


class Hub(http.server.ThreadingHTTPServer):
    """The few endpoints of a hub that a download needs, over files in memory."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.announced: dict[str, bytes] = {}
        """What the hub says a file is, where it then sends something else."""
        self.in_git: set[str] = set()
        self.drop_once: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self, name: str) -> list[str | None]:
        """The Range headers of the requests for the content of a file."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith("/" + name)]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"
    tree: ClassVar[str] = f"/api/datasets/{REPO}/tree/{COMMIT}/"
    resolve: ClassVar[str] = f"/datasets/{REPO}/resolve/{COMMIT}/"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if path == f"/api/datasets/{REPO}/revision/main":
            self.reply(json.dumps({"id": REPO, "sha": COMMIT, "tags": []}).encode())
        elif path.startswith(f"/api/datasets/{REPO}/revision/"):
            self.reply(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(self.tree):
            self.list_folder(path.removeprefix(self.tree))
        elif path.startswith(self.resolve) and path.removeprefix(self.resolve) in self.server.files:
            self.send_file(path.removeprefix(self.resolve))
        else:
            self.reply(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def list_folder(self, folder: str) -> None:
        rows: list[dict] = [{"type": "directory", "path": folder + "/more", "oid": "0" * 40}]
        for path in self.server.files:
            if path.rpartition("/")[0] == folder:
                content = self.server.announced.get(path, self.server.files[path])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                row = {"type": "file", "path": path, "size": len(content), "oid": oid}
                if path not in self.server.in_git:
                    sha256 = hashlib.sha256(content).hexdigest()
                    row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
                rows.append(row)
        if len(rows) == 1:
            self.reply(b"", 404, {"X-Error-Code": "EntryNotFound"})
        else:
            self.reply(json.dumps(rows).encode())

    def send_file(self, path: str) -> None:
        content = self.server.files[path]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.reply(b"", 200, {**headers, "Content-Length": str(len(content))})
        elif (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.reply(content[start:], 206, headers)
        elif path.rpartition("/")[2] in self.server.drop_once:
            self.server.drop_once.remove(path.rpartition("/")[2])
            self.reply(content[: len(content) // 2], 200, {**headers, "Content-Length": str(len(content))})
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.reply(content, 200, headers)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    words = random.Random(0).choices(
        ["a", "few", "words", "to", "make", "pieces", "of,", "again", "and", "again"], k=500
    )
    return train_tokenizer([" ".join(words)], 300, tmp_path_factory.mktemp("sp") / "a").read_bytes()


@pytest.fixture
def hub(model: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Hub() as server:
        names = [f"fineweb_train_{i:06d}.bin" for i in range(3)] + [
            f"fineweb_val_{i:06d}.bin" for i in range(2)
        ]
        for seed, name in enumerate(names):
            tokens = np.random.default_rng(seed).integers(4, 300, 20_000 + seed)
            write_shard(tmp_path / "made" / name, tokens)
            server.files[f"datasets/datasets/{DATASET}/{name}"] = (tmp_path / "made" / name).read_bytes()
        server.files["datasets/tokenizers/fineweb_300_bpe.model"] = model
        server.files["datasets/tokenizers/fineweb_300_bpe.vocab"] = b"not wanted"
        server.files["datasets/tokenizers/fineweb_3001_bpe.model"] = b"not wanted"
        server.in_git.add("datasets/tokenizers/fineweb_300_bpe.model")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(hub: Hub, out: Path, **settings: object) -> Path:
    return download(out, **{"dataset": "sp300", "repo_id": REPO, "endpoint": hub.url, **settings})  # type: ignore[arg-type]


def everything(out: Path) -> list[str]:
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def test_shards_and_tokenizer_arrive(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = fetch(hub, out, train_shards=2)
    assert folder == out / "datasets" / DATASET
    assert everything(out) == [
        f"datasets/{DATASET}/fineweb_train_000000.bin",
        f"datasets/{DATASET}/fineweb_train_000001.bin",
        f"datasets/{DATASET}/fineweb_val_000000.bin",
        f"datasets/{DATASET}/fineweb_val_000001.bin",
        f"datasets/{DATASET}/manifest.json",
        "tokenizers/fineweb_300_bpe.model",
    ]
    for path in (out / "datasets" / DATASET).glob("*.bin"):
        assert path.read_bytes() == hub.files[f"datasets/datasets/{DATASET}/{path.name}"]
    assert (tokenizer := Tokenizer.load(find_tokenizer(folder))).vocab_size == 300
    assert check_manifest(folder, tokenizer)["split"] == f"that of {REPO} at {COMMIT}"
    fetch(hub, out, train_shards=3)  # another shard in the folder is another manifest
    assert len(check_manifest(folder, tokenizer)["shards"]) == 5
    (folder / "fineweb_train_000002.bin").unlink()
    fetch(hub, out, train_shards=2)
    assert [s.num_tokens for s in find_shards(folder, "train")] == [20_000, 20_001]


def test_the_set_of_caseops(hub: Hub, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its side files come along, and its tokenizer is told from the plain one of that size."""
    variant = "sp300_lossless_caps_caseops_v1_reserved"
    for path in [path for path in hub.files if path.endswith(".bin")]:
        content = hub.files.pop(path)
        hub.files[path.replace(DATASET, f"fineweb10B_{variant}")] = content
        if "_val_" in path:
            hub.files[path.replace(DATASET, f"fineweb10B_{variant}").replace("_val_", "_val_bytes_")] = (
                content
            )
    own = f"fineweb_300_bpe{variant.removeprefix('sp300')}.model"
    hub.files[f"datasets/tokenizers/{own}"] = model
    monkeypatch.setattr("pgolf_fast.data.download.CASEOPS_REPO_ID", REPO)
    folder = fetch(hub, tmp_path / "out", dataset=variant, train_shards=2, repo_id=None)
    names = [path.name for path in sorted(folder.glob("*.bin"))]
    sides = [name for name in names if "_val_bytes_" in name]
    assert (len(names), len(sides)) == (6, 2)
    (tmp_path / "out" / "tokenizers" / "fineweb_300_bpe.model").write_bytes(model)
    tokenizer = Tokenizer.load(find_tokenizer(folder))
    assert tokenizer.path.name == own
    assert sorted(check_manifest(folder, tokenizer)["side_files"]) == sides


def test_a_repository_without_the_outer_folder(hub: Hub, tmp_path: Path) -> None:
    hub.files = {path.removeprefix("datasets/"): content for path, content in hub.files.items()}
    hub.in_git.clear()
    assert len(everything(fetch(hub, tmp_path / "out", train_shards=0))) == 3


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out")
    assert hub.gets("fineweb_train_000000.bin") == [None]
    damaged = tmp_path / "out" / "datasets" / DATASET / "fineweb_val_000001.bin"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    hub.requests.clear()
    fetch(hub, tmp_path / "out", train_shards=2)
    assert hub.gets("fineweb_train_000000.bin") == hub.gets("fineweb_val_000000.bin") == []
    assert hub.gets("fineweb_train_000001.bin") == hub.gets("fineweb_val_000001.bin") == [None]
    assert damaged.read_bytes() == hub.files[f"datasets/datasets/{DATASET}/fineweb_val_000001.bin"]


def test_a_dropped_connection_is_taken_up_where_it_broke(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the client keeps whole chunks, of 10 MB; these files are smaller
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    name = "fineweb_val_000000.bin"
    hub.drop_once.add(name)
    folder = fetch(hub, tmp_path / "out")
    content = hub.files[f"datasets/datasets/{DATASET}/{name}"]
    first, second = hub.gets(name)
    assert first is None
    assert second is not None
    assert 0 < int(second.removeprefix("bytes=").rstrip("-")) <= len(content) // 2
    assert (folder / name).read_bytes() == content


def corrupt(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_a_corrupt_file_is_removed_and_named(hub: Hub, tmp_path: Path) -> None:
    path = f"datasets/datasets/{DATASET}/fineweb_val_000001.bin"
    hub.announced[path] = hub.files[path]
    hub.files[path] = corrupt(hub.files[path])
    with pytest.raises(
        PgolfError, match=r"fineweb_val_000001.bin arrived corrupt and was removed: its sha256 is"
    ) as caught:
        fetch(hub, tmp_path / "out")
    assert "\n" not in str(caught.value)
    kept = [f for f in everything(tmp_path / "out") if ".download" not in f]
    assert kept == [f"datasets/{DATASET}/fineweb_val_000000.bin", "tokenizers/fineweb_300_bpe.model"]
    assert not list((tmp_path / "out").rglob("fineweb_val_000001.bin"))
    hub.files[path] = hub.announced[path]  # repaired: the next try succeeds and cleans up
    fetch(hub, tmp_path / "out")
    assert len(everything(tmp_path / "out")) == 5


def test_a_corrupt_file_kept_in_git_is_found_too(hub: Hub, tmp_path: Path) -> None:
    path = "datasets/tokenizers/fineweb_300_bpe.model"
    hub.announced[path] = hub.files[path]
    hub.files[path] = corrupt(hub.files[path])
    with pytest.raises(
        PgolfError, match=r"fineweb_300_bpe.model arrived corrupt and was removed: its git hash is"
    ):
        fetch(hub, tmp_path / "out")


def test_a_file_of_another_size(hub: Hub, tmp_path: Path) -> None:
    path = f"datasets/datasets/{DATASET}/fineweb_val_000000.bin"
    hub.announced[path] = hub.files[path] + b"12"
    with pytest.raises(
        PgolfError, match=r"arrived corrupt and was removed: it has 41030 bytes instead of 41032"
    ):
        fetch(hub, tmp_path / "out")


def test_a_shard_that_is_corrupt_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files[f"datasets/datasets/{DATASET}/fineweb_train_000000.bin"] = b"hello" * 1000
    with pytest.raises(PgolfError, match=r"fineweb_train_000000.bin arrived corrupt .* is not a token shard"):
        fetch(hub, tmp_path / "out")
    hub.files["datasets/tokenizers/fineweb_300_bpe.model"] = b"hello"
    with pytest.raises(PgolfError, match=r"arrived corrupt .* is not a SentencePiece model"):
        fetch(hub, tmp_path / "out2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_shards": 4}, "has 3 training shards in datasets/fineweb10B_sp300, but 4 were asked for"),
        ({"train_shards": -1}, "train_shards is -1; it must be 0 or more"),
        ({"dataset": "sp77"}, "someone/golf has no dataset fineweb10B_sp77"),
        ({"repo_id": "someone/else"}, "dataset someone/else at .* does not exist or is private"),
        ({"repo_id": "a/b/c"}, "dataset a/b/c at .* is not a valid name"),
        ({"revision": "v9"}, "dataset someone/golf at .* has no such revision"),
    ],
)
def test_what_does_not_exist(hub: Hub, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(PgolfError, match=message) as caught:
        fetch(hub, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_repositories_that_lack_something(hub: Hub, tmp_path: Path) -> None:
    model = hub.files.pop("datasets/tokenizers/fineweb_300_bpe.model")
    with pytest.raises(PgolfError, match=r"has 0 tokenizers for sp300"):
        fetch(hub, tmp_path / "out")
    hub.files["datasets/tokenizers/fineweb_300_bpe.model"] = model
    hub.files = {path: content for path, content in hub.files.items() if "_val_" not in path}
    with pytest.raises(PgolfError, match=r"has no validation shard"):
        fetch(hub, tmp_path / "out")


def test_no_network(tmp_path: Path, hub: Hub) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    with pytest.raises(
        PgolfError, match=r"cannot fetch dataset someone/golf at .*; check the network connection"
    ) as caught:
        fetch(hub, tmp_path / "out", endpoint=f"http://127.0.0.1:{closed}")
    assert "\n" not in str(caught.value)


def test_something_that_is_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.reply(b"<html>Log in to the hotel</html>"))
    with pytest.raises(PgolfError, match=r"cannot fetch dataset someone/golf at"):
        fetch(hub, tmp_path / "out")


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.hf_hub_download", fail)
    with pytest.raises(PgolfError, match=r"no space left to fetch .*fineweb_300_bpe.model"):
        fetch(hub, tmp_path / "out")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        PgolfError, match=r"needs the huggingface_hub package: pip install 'pgolf-fast\[hub\]'"
    ):
        download(tmp_path)


def test_importing_it_touches_no_network() -> None:
    code = (
        "import socket; socket.socket = None; import pgolf_fast.data.download, sys; "
        "print('huggingface_hub' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert out.stdout == "False\n"
