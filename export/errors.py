"""What an export can fail with; the base is the runtime's, so one ``except`` covers both."""

from runtime.errors import BgeOnnxError


class ExportError(BgeOnnxError):
    """The source can't be exported, or the artifact can't be written."""


class ParityError(ExportError):
    """A variant is not close enough to the original to be published."""
