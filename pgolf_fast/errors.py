"""The exception for errors that a user can fix."""


class PgolfError(Exception):
    """Bad input: what was given, what is needed, what to do. The command line prints it and exits with 2."""
