"""Access to the C++ codecs, with one warning where they are missing."""

import functools
import logging
from types import ModuleType

_log = logging.getLogger("pgolf_fast")


@functools.cache
def extension() -> ModuleType | None:
    """Return `pgolf_fast._C`, or None if it was not built, which is logged once."""
    try:
        from pgolf_fast import _C
    except ImportError as error:
        _log.warning(
            "the C++ codecs are not in use (%s): bits, LZMA and artifact sections use Python, with the same "
            "results, but artifacts written here are larger, since only C++ writes rANS; to build them, run "
            "`pip install -e .` in the checkout with a C++ compiler installed",
            error,
        )
        return None
    if not hasattr(_C, "lzma_compress"):
        _log.warning(
            "LZMA runs in Python's lzma module: liblzma was missing when the C++ codecs were built; install "
            "its headers (on Debian: liblzma-dev) and run `pip install -e .` again"
        )
    return _C
