"""What an export can fail with; the base is the runtime's, so one ``except`` covers both."""

from runtime.errors import BgeOnnxError


class ExportError(BgeOnnxError):
    """The source can't be exported, or the artifact can't be written."""


class ParityError(ExportError):
    """A variant is not close enough to the original to be published."""


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, to be quoted in one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
