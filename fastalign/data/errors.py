"""The errors that bad data raises."""


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class DataError(ValueError):
    """Rows cannot be trained on. The message names the file, the rows (from 1) and the reason."""


class FatalDataError(DataError):
    """A fault that ends reading at once: no later row is tried."""
