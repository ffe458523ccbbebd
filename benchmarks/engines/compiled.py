"""torch.compile: the checkpoint in fp16 on CUDA, given padded batches that were tokenised and sorted beforehand."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.engines import plain
from benchmarks.worker import Job, Run

PACKAGES = ("torch", "transformers", "triton")
VARIANTS: dict[str, tuple[str, ...]] = {}
CUDA = ("fp16",)
PREPARED: dict[str, str] = {}

Batch = tuple[list[int], Any]
"""Places of texts, and their padded inputs on the device."""


def embedder(job: Job) -> Run:
    """Pooled in torch; only vectors come back."""
    plain.check_pooling(job)
    return _run(job, "AutoModel", lambda states, inputs: _pooled(job, states[0], inputs["attention_mask"]))


def reranker(job: Job) -> Run:
    """Raw logits."""
    return _run(job, "AutoModelForSequenceClassification", lambda states, inputs: states[0][:, 0])


def _run(job: Job, kind: str, finish: Callable[[Any, Any], Any]) -> Run:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(job.source)
    model = getattr(transformers, kind).from_pretrained(job.source, dtype=torch.float16, attn_implementation="sdpa")
    compiled = torch.compile(model.eval().to(job.device), dynamic=True)
    batches: dict[tuple[Any, ...], list[Batch]] = {}

    def prepare(inputs: Sequence[Any], batch: int) -> list[Batch]:
        """Tokenise, and sort by length; so the first round, which only warms up, does what isn't measured."""
        pairs = zip(*inputs, strict=True) if job.kind == "reranker" else [inputs]
        encoded = tokenizer(*map(list, pairs), truncation=True, max_length=job.max_length)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable").tolist()
        parts = [order[i : i + batch] for i in range(0, len(order), batch)]
        padded = [
            tokenizer.pad(
                {name: [values[i] for i in part] for name, values in encoded.items()},
                pad_to_multiple_of=8,
                return_tensors="pt",
            )
            for part in parts
        ]
        return [(part, inputs.to(job.device)) for part, inputs in zip(parts, padded, strict=True)]

    def run(inputs: Sequence[Any], batch: int) -> Any:  # noqa: ANN401
        key = (batch, *map(str, inputs))
        if key not in batches:
            batches[key] = prepare(inputs, batch)
        answers: list[Any] = [None] * len(inputs)
        with torch.inference_mode():
            held = [(part, finish(compiled(**fed), fed)) for part, fed in batches[key]]
        for part, values in held:
            for i, value in zip(part, values.float().cpu().numpy(), strict=True):
                answers[i] = value
        return np.array(answers, np.float32)

    return run


def _pooled(job: Job, states: Any, mask: Any) -> Any:  # noqa: ANN401
    import torch

    shown = mask[:, :, None]
    pooled = states[:, 0] if job.pooling == "cls" else (states * shown).sum(1) / shown.sum(1)
    return torch.nn.functional.normalize(pooled.float(), dim=1) if job.normalize else pooled
