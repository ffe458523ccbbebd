"""What a measurement can fail with; the base is the runtime's, so one ``except`` covers all."""

from runtime.errors import BgeOnnxError


class DataError(BgeOnnxError, ValueError):
    """A data set, a results file or a README that isn't laid out as it has to be."""


class EngineError(BgeOnnxError):
    """An engine that is missing, can't load the model, or failed while it ran."""
