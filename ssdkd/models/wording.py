"""Other libraries' errors inside our sentences."""

from ssdkd.errors import first_line


def in_one_line(error: BaseException) -> str:
    """The kind of error and the first line of its message."""
    kind = type(error).__name__
    return f"{kind}: {first_line(error)}" if str(error).strip() else kind
