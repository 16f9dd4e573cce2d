"""Standard output: the only place that prints results."""

from __future__ import annotations


def print_out(text: str) -> None:
    """Results go to standard output; log lines and errors do not."""
    print(text)
