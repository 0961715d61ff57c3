"""Errors of data."""


def one_line(error: BaseException) -> str:
    """The message of an error, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class DataError(ValueError):
    """Rows that cannot be trained on. The message names the file, the rows (from 1) and the reason."""


class FatalDataError(DataError):
    """A fault after which no further row is tried."""
