"""The one exception a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line: what is wrong, where, and what to do. The command line prints it on
    stderr and exits with code 2; Python callers can catch it as a `ValueError`.
    """
