"""The exception for errors that a user can fix."""

from __future__ import annotations


class PgolfError(Exception):
    """Bad input: what was given, what is needed, what to do. The command line prints it and exits with 2."""
