"""The one exception a person is meant to read: what was given, what is needed, what to do."""

from __future__ import annotations


class PgolfError(Exception):
    """Bad input. The command line prints its message as one line and exits with status 2."""
