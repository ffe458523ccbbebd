"""The lean side of bge-onnx: embeds with artifacts that ``python -m export`` wrote.

Imports onnxruntime, tokenizers, numpy and the standard library, and nothing heavier.
"""

from runtime.embedder import Embedder
from runtime.errors import ArtifactError, BgeOnnxError, InputError, ProviderError

__all__ = ["ArtifactError", "BgeOnnxError", "Embedder", "InputError", "ProviderError"]
