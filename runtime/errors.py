"""The one exception that means: the input is at fault, and this sentence says what to do."""

__all__ = ["Hif4Error"]


class Hif4Error(Exception):
    """Bad input or environment. The message is one clear sentence: what, where, what to do.

    The command line prints it without a traceback and exits with status 1; any other exception is a bug of hif4c.
    """
