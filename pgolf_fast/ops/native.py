"""Access to the C++ codecs, with one warning where they are missing."""

from __future__ import annotations

import contextlib
import functools
import logging
from types import ModuleType

_log = logging.getLogger("pgolf_fast")


@functools.cache
def extension() -> ModuleType | None:
    """`pgolf_fast._C`, or None when it was not built; that is logged once, with the reason."""
    try:
        from pgolf_fast import _C
    except ImportError as error:
        _log.warning(
            "the C++ codecs are not in use (%s): bits, LZMA and reading artifacts run in Python, with the "
            "same results, but artifacts written here are larger, for nothing else writes rANS; to build "
            "them, run `pip install -e .` in the checkout with a C++ compiler installed",
            error,
        )
        return None
    return _C


@functools.cache
def lzma_extension() -> ModuleType | None:
    """`pgolf_fast._C` when it also has a working liblzma, else None, logged once with the reason."""
    native = extension()
    if native is None:
        return None
    with contextlib.suppress(ImportError):
        # Where Python brings its own liblzma, this loads it, and the extension then finds it by name.
        import lzma  # noqa: F401
    try:
        native.lzma_version()
    except RuntimeError as error:
        _log.warning("LZMA runs in Python's lzma module: %s", error)
        return None
    return native
