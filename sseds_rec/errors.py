"""How a command ends before its time without a fault of the code."""

#: Exit code of a pre-empted command: what shells show for SIGTERM. torchelastic restarts after it, as after any but 0.
PREEMPTED_EXIT = 143


class UserError(Exception):
    """Bad input: one line that names the file, row, field or config key, and what to do.

    The command line prints it and exits with code 2; library callers catch it like any other exception.
    """


class Preempted(Exception):
    """Training stopped because a rank got SIGTERM; its checkpoint is written, and the same command goes on from there.

    The command line exits with `PREEMPTED_EXIT`.
    """


class Lost(Exception):
    """Another process of the job ended, or did not come; the job, started again, goes on from its last checkpoint."""


def user_message(error: BaseException) -> str | None:
    """What a user has to put right, in one line; None if it is a fault of the code."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error) if isinstance(error, UserError) else None
