"""What people write around a bare graph: tokenise, pad each batch to its longest, run, pool, normalise."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.worker import Job, Run

Infer = Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]
"""From ``input_ids``, ``attention_mask`` and ``token_type_ids``, each ``(n, tokens)``, to the graph's first output."""


def embedder(job: Job, infer: Infer) -> Run:
    """Around a graph that gives hidden states ``(n, tokens, dim)``."""
    encode = tokenize(job)

    def run(texts: Sequence[str], batch: int) -> NDArray[np.float32]:
        vectors = []
        for start in range(0, len(texts), batch):
            feeds = encode(texts[start : start + batch])
            hidden, mask = infer(feeds), feeds["attention_mask"][:, :, None].astype(np.float32)
            vectors.append((hidden * mask).sum(1) / mask.sum(1) if job.pooling == "mean" else hidden[:, 0])
        joined = np.concatenate(vectors)
        return joined / np.linalg.norm(joined, axis=1, keepdims=True) if job.normalize else joined

    return run


def reranker(job: Job, infer: Infer) -> Run:
    """Around a graph that gives logits ``(n, 1)``."""
    encode = tokenize(job)

    def run(pairs: Sequence[Any], batch: int) -> NDArray[np.float32]:
        inputs = [tuple(pair) for pair in pairs]
        return np.concatenate([infer(encode(inputs[i : i + batch]))[:, 0] for i in range(0, len(inputs), batch)])

    return run


def tokenize(job: Job) -> Callable[[Sequence[Any]], dict[str, NDArray[np.int64]]]:
    """What turns texts or pairs into padded inputs, with the tokenizer beside the stock graph."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(job.stock) / "tokenizer.json"))
    tokenizer.enable_truncation(job.max_length)
    tokenizer.enable_padding(**(tokenizer.padding or {}) | {"length": None})

    def encode(inputs: Sequence[Any]) -> dict[str, NDArray[np.int64]]:
        encoded = tokenizer.encode_batch(inputs)
        return {
            "input_ids": np.array([e.ids for e in encoded], np.int64),
            "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
            "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
        }

    return encode
