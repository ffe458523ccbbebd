"""Is the exported model the original? transformers is the oracle, and the very code that production runs answers."""

import inspect
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np

from export.errors import ExportError, ParityError, first_line
from export.source import Checkpoint
from runtime import Embedder
from runtime.manifest import Parity
from runtime.pooling import Floats

THRESHOLDS = {"fp32": (0.99999, 0.99999), "int8": (0.99, 0.9)}
"""Least cosine to the original, mean and minimum, that a variant must reach to be written."""


def verification_texts() -> list[str]:
    """The fixed texts on which parity is measured; none of them calibrates anything."""
    return files("export").joinpath("texts/verification.txt").read_text("utf-8").splitlines()


def reference_vectors(checkpoint: Checkpoint, texts: list[str]) -> Floats:
    """What transformers' own model and tokenizer, pooled by torch, give for each text: float32 ``(n, dim)``."""
    import torch  # slow to import
    import transformers

    transformers.logging.set_verbosity_error()
    spec, folder = checkpoint.spec, str(checkpoint.folder)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model = transformers.AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=not checkpoint.allow_pickle or None
            ).eval()
        except Exception as error:  # transformers raises all sorts
            raise ExportError(
                f"{checkpoint.id}: transformers can't load it ({first_line(error)}), so nothing can be verified; "
                "mend the checkpoint"
            ) from error
        accepted = inspect.signature(model.forward).parameters
        vectors = []
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=spec.max_length, return_tensors="pt")
            hidden = model(**{name: inputs[name] for name in inputs if name in accepted}).last_hidden_state[0]
            match spec.pooling:
                case "cls":
                    vector = hidden[0]
                case "last_token":
                    vector = hidden[-1]
                case "max":
                    vector = hidden.amax(0)
                case _:
                    vector = hidden.mean(0)
            vectors.append(torch.nn.functional.normalize(vector, dim=0) if spec.normalize else vector)
        return torch.stack(vectors).numpy()


def verify_variant(artifact: Path, variant: str, reference: Floats, texts: list[str]) -> Parity:
    """Embed with the runtime and compare.

    Args:
        artifact: The folder, complete but for its parity figures.
        variant: Which of its variants.
        reference: What the original gives, float32 ``(n, dim)``.
        texts: The ``n`` texts.

    Raises:
        ParityError: The variant is below its threshold.
    """
    vectors = Embedder(artifact, variant, device="cpu").encode(texts)
    cosines = _cosines(vectors, reference)
    parity = Parity(texts=len(texts), cosine_mean=float(cosines.mean()), cosine_min=float(cosines.min()))
    mean, least = THRESHOLDS[variant]
    if not (parity.cosine_mean >= mean and parity.cosine_min >= least):
        worst = texts[int(cosines.argmin())]
        raise ParityError(
            f"{variant}: cosine to the original is {parity.cosine_mean:.6f} on average and {parity.cosine_min:.6f} at "
            f"worst ({worst[:40]!r}), where {mean} and {least} are asked for; {_CURES[variant]}"
        )
    return parity


_CURES = {
    "fp32": "the graph or the tokenizer differs from the original, please report the model",
    "int8": "pass --calibration with a file of your own texts, or leave int8 out with --variants fp32",
}


def _cosines(a: Floats, b: Floats) -> np.ndarray:
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    cosines: np.ndarray = (a64 * b64).sum(1) / (np.linalg.norm(a64, axis=1) * np.linalg.norm(b64, axis=1))
    return cosines
