"""Every error this package raises on purpose: one line that names the thing, the cause and the cure."""


class BgeOnnxError(Exception):
    """Base of all errors raised on purpose by ``runtime`` and ``export``."""


class ArtifactError(BgeOnnxError):
    """An artifact folder is missing, incomplete, altered, or of a format this runtime can't read."""


class ProviderError(BgeOnnxError):
    """ONNX Runtime is missing, broken, or can't run on the device that was asked for."""


class InputError(BgeOnnxError, ValueError):
    """The caller passed something that can't be embedded or scored."""


class RunError(BgeOnnxError):
    """A run of the graph failed, most often for want of memory; the model can still be used."""
