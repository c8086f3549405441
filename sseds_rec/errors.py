"""The one exception that a user, and not a developer, is meant to read."""


class UserError(Exception):
    """Bad input: one line that names the file, row, field or config key, and what to do.

    The command line prints it and exits with code 2; library callers catch it like any other exception.
    """
