"""FlagEmbedding as shipped, which runs each call's first batch twice to probe memory, and with that probe left out."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.worker import Job, Run

PACKAGES = ("FlagEmbedding", "transformers", "torch")
VARIANTS = {"embedder": ("fp32", "no-probe"), "reranker": ("fp32", "no-probe")}
CUDA = ("fp32", "no-probe")
PREPARED: dict[str, str] = {}


def embedder(job: Job) -> Run:
    """``FlagModel.encode``, or for a decoder ``FlagLLMModel.encode``, which sort by length and pad."""
    from FlagEmbedding import FlagLLMModel, FlagModel

    options = {"pooling_method": job.pooling, "normalize_embeddings": job.normalize, "use_fp16": False}
    kind = FlagLLMModel if job.pooling == "last_token" else FlagModel
    model = kind(job.source, devices=job.device, **options)
    arm = _prepare(job, model)

    def run(texts: Any, batch: int) -> Any:  # noqa: ANN401
        arm()
        return np.asarray(model.encode(list(texts), batch_size=batch, max_length=job.max_length))

    return run


def reranker(job: Job) -> Run:
    """``FlagReranker.compute_score``, which sorts by length and pads; raw logits."""
    from FlagEmbedding import FlagReranker

    model = FlagReranker(job.source, devices=job.device, use_fp16=False)
    arm = _prepare(job, model)

    def run(pairs: Any, batch: int) -> Any:  # noqa: ANN401
        arm()
        scored = model.compute_score([tuple(pair) for pair in pairs], batch_size=batch, max_length=job.max_length)
        return np.asarray(scored, np.float32)

    return run


def _prepare(job: Job, model: Any) -> Callable[[], None]:  # noqa: ANN401
    """Set the threads; return what makes the next forward pass, the probe, cost nothing (or, as shipped, nothing)."""
    import torch

    torch.set_num_threads(job.threads)
    if job.variant != "no-probe":
        return lambda: None
    forward, state, width = model.model.forward, threading.local(), model.model.config.hidden_size

    def skipping(**inputs: Any) -> Any:  # noqa: ANN401
        if not getattr(state, "armed", False):
            return forward(**inputs)
        state.armed = False
        rows, tokens = inputs["input_ids"].shape
        return SimpleNamespace(last_hidden_state=torch.zeros(rows, tokens, width), logits=torch.zeros(rows, 1))

    def arm() -> None:
        state.armed = True

    model.model.forward = skipping
    return arm
