"""Download of the challenge's shards and tokenizer from the Hugging Face Hub, with every file verified."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf_fast import console
from pgolf_fast.config.checks import need
from pgolf_fast.data.manifest import write_manifest
from pgolf_fast.data.shards import open_shard
from pgolf_fast.data.tokenizer import Tokenizer
from pgolf_fast.errors import PgolfError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPO_ID = "willdepueoai/parameter-golf"
CASEOPS_REPO_ID = "romeerp/parameter-golf-caseops-v1"  # PR 1729: sp8192_lossless_caps_caseops_v1_reserved
_ROOTS = ("datasets/", "")  # parents of the folders `datasets` and `tokenizers` in a repository
_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Remote:
    path: str
    size: int
    sha256: str | None
    git_sha1: str | None
    target: Path


def download(
    out: Path | str,
    *,
    dataset: str = "sp1024",
    train_shards: int = 1,
    repo_id: str | None = None,
    endpoint: str | None = None,
    revision: str = "main",
) -> Path:
    """Download validation shards, `train_shards` training shards and the tokenizer; return the shard folder.

    Without `repo_id`, a CaseOps dataset is that of PR 1729, and any other the challenge's. Shards and their
    side files go to `<out>/datasets/fineweb10B_<dataset>`, the tokenizer to `<out>/tokenizers`. Every file is
    checked against the size and hash that the Hub reports. Complete files are not downloaded again, and a
    partial one is continued. Raises `PgolfError` without network or package, if something does not exist, and
    for a corrupt file, which is removed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        why = "downloading needs the huggingface_hub package: pip install 'pgolf-fast[hub]'"
        raise PgolfError(why) from error
    need(train_shards >= 0, f"train_shards is {train_shards}; it must be 0 or more")
    if repo_id is None:
        repo_id = CASEOPS_REPO_ID if "caseops" in dataset else REPO_ID
    folder, staging = Path(out), Path(out) / ".download"  # one file system, for os.replace
    api = huggingface_hub.HfApi(endpoint=endpoint)
    with _hub_errors(f"dataset {repo_id} at {api.endpoint}"):
        commit = api.dataset_info(repo_id, revision=revision).sha
        if commit is None:
            what = f"which commit {revision} of {repo_id} is"
            raise PgolfError(f"{api.endpoint} does not say {what}; try a commit")
    remotes = _choose(api, repo_id, commit, dataset, train_shards, folder)
    for remote in console.progress(remotes, "downloading", unit="file"):
        if remote.target.is_file() and _fault(remote.target, remote) is None:
            continue
        with _hub_errors(f"{remote.path} of {repo_id} at {api.endpoint}"):
            staged = api.hf_hub_download(
                repo_id, remote.path, repo_type="dataset", revision=commit, local_dir=staging
            )
        _accept(Path(staged), remote)
    shutil.rmtree(staging, ignore_errors=True)
    shards = folder / "datasets" / f"fineweb10B_{dataset}"
    write_manifest(shards, Tokenizer.load(remotes[0].target), f"that of {repo_id} at {commit}", {})
    return shards


def _accept(staged: Path, remote: _Remote) -> None:
    """Move a downloaded file to its target. Raises PgolfError and removes it if it is corrupt."""
    fault = _fault(staged, remote)
    if fault is None:
        try:
            if remote.target.suffix == ".bin":
                open_shard(staged)
            else:
                Tokenizer.load(staged)
        except PgolfError as error:
            fault = str(error)
    if fault is not None:
        staged.unlink(missing_ok=True)
        hint = f"{fault}; run the download again, and if it fails the same way, tell the owner of the dataset"
        raise PgolfError(f"{remote.path} arrived corrupt and was removed: {hint}")
    remote.target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staged, remote.target)


def _fault(path: Path, remote: _Remote) -> str | None:
    """Return what is wrong with the bytes of `path`, or None."""
    size = path.stat().st_size
    if size != remote.size:
        return f"it has {size} bytes instead of {remote.size}"
    kind, wanted, digest = "sha256", remote.sha256, hashlib.sha256()
    if wanted is None:  # git names a file by the hash of its content after a header
        kind, wanted, digest = "git hash", remote.git_sha1, hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    if wanted in (None, digest.hexdigest()):
        return None
    return f"its {kind} is {digest.hexdigest()} instead of {wanted}"


def _choose(
    api: "HfApi", repo_id: str, commit: str, dataset: str, train_shards: int, out: Path
) -> list[_Remote]:
    """Return the files to download: tokenizer first, then validation, then training shards."""
    name = f"fineweb10B_{dataset}"
    for root in _ROOTS:
        shards = _list(api, repo_id, commit, f"{root}datasets/{name}", out / "datasets" / name)
        if shards:
            break
    else:
        raise PgolfError(f"{repo_id} has no dataset {name}: expected in datasets/{name}; try sp1024")
    val = [r for r in shards if fnmatch(r.target.name, "*_val_*.bin")]
    train = [r for r in shards if fnmatch(r.target.name, "*_train_*.bin")]
    need(val, f"{repo_id} has no validation shard in datasets/{name}; try another dataset")
    hint = f"but {train_shards} were asked for: ask for {len(train)} or fewer"
    need(len(train) >= train_shards, f"{repo_id} has {len(train)} training shards in datasets/{name}, {hint}")
    size = re.match(r"\D*(\d+)(\w*)", dataset)
    number, variant = size.groups() if size else (dataset, "")
    models = _list(api, repo_id, commit, f"{root}tokenizers", out / "tokenizers")
    models = [r for r in models if fnmatch(r.target.name, f"*_{number}_*{variant}.model")]
    if len(models) != 1:
        raise PgolfError(f"{repo_id} has {len(models)} tokenizers for {dataset} in tokenizers; one is needed")
    return [*models, *val, *train[:train_shards]]


def _list(api: "HfApi", repo_id: str, commit: str, path: str, target: Path) -> list[_Remote]:
    """Return the files of a folder of the repository, sorted by name; none if there is no such folder."""
    from huggingface_hub.errors import EntryNotFoundError

    files, what = [], f"folder {path} of {repo_id} at {api.endpoint}"
    with _hub_errors(what), contextlib.suppress(EntryNotFoundError):
        for entry in api.list_repo_tree(repo_id, path, revision=commit, repo_type="dataset"):
            if not hasattr(entry, "size"):
                continue  # a folder
            lfs, name = entry.lfs, entry.path.rsplit("/", 1)[-1]
            size, sha256 = (entry.size, None) if lfs is None else (lfs.size, lfs.sha256)
            files.append(_Remote(entry.path, size, sha256, None if lfs else entry.blob_id, target / name))
    return sorted(files, key=lambda remote: remote.path)


@contextlib.contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one line that names `what`."""
    from huggingface_hub import errors as hub

    try:
        yield
    except (OSError, hub.HTTPError, hub.EntryNotFoundError, ValueError) as error:
        if isinstance(error, hub.GatedRepoError):
            message = f"{what} needs permission: ask for it on its page, then log in with `hf auth login`"
        elif isinstance(error, hub.RepositoryNotFoundError):
            message = f"{what} does not exist or is private: check the name, or `hf auth login`"
        elif isinstance(error, hub.RevisionNotFoundError):
            message = f"{what} has no such revision: use main, a tag or a commit"
        elif isinstance(error, hub.HFValidationError):
            message = f"{what} is not a valid name ({error}): use owner/name"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left to fetch {what}: free some or choose another folder"
        else:
            message = (
                f"cannot fetch {what}: {_short(error)}; check the network connection and run it again "
                "(finished files are kept), or copy the shards from elsewhere and set data.path"
            )
        raise PgolfError(message) from error


def _short(error: BaseException) -> str:
    """Return the first line of the innermost error, which says what failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
