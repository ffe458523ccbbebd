"""What people write around a bare graph: tokenise, pad each batch to its longest, run, pool, normalise."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
        batches = (encode(texts[start : start + batch]) for start in range(0, len(texts), batch))
        return np.concatenate([_pooled(job, feeds, infer(feeds)) for feeds in batches])

    return run


def scheduled(job: Job, wide: Infer, narrow: Infer) -> Run:
    """Around such a graph in a session with all threads and one with a single thread, as our runtime schedules them."""
    from runtime.batching import plan_threads
    from runtime.model import MAX_TOKENS_PER_RUN, TOKENS_PER_THREAD

    encode = tokenize(job)

    def run(texts: Sequence[str], batch: int) -> NDArray[np.float32]:
        padded, vectors = encode(texts), [np.empty(0, np.float32)] * len(texts)
        lengths = padded["attention_mask"].sum(1)
        runs = plan_threads(lengths, min(MAX_TOKENS_PER_RUN, TOKENS_PER_THREAD * job.threads), job.threads)

        def work(infer: Infer, places: NDArray[np.intp]) -> None:
            feeds = {name: rows[places, : lengths[places[0]]] for name, rows in padded.items()}
            for i, vector in zip(places, _pooled(job, feeds, infer(feeds)), strict=True):
                vectors[i] = vector

        for places in runs[0]:
            work(wide, places)
        with ThreadPoolExecutor(job.threads) as pool:
            list(pool.map(partial(work, narrow), runs[1]))
        return np.array(vectors)

    return run


def streamed(job: Job, infer: Infer, streams: int) -> Run:
    """Around such a graph that serves several callers at once: batches sorted by length, side by side."""
    encode, pool = tokenize(job), ThreadPoolExecutor(streams)

    def run(texts: Sequence[str], batch: int) -> NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        size, vectors = min(batch, -(-len(texts) // streams)), [np.empty(0, np.float32)] * len(texts)

        def work(start: int) -> None:
            places = order[start : start + size]
            feeds = encode([texts[i] for i in places])
            for i, vector in zip(places, _pooled(job, feeds, infer(feeds)), strict=True):
                vectors[i] = vector

        list(pool.map(work, range(0, len(texts), size)))
        return np.array(vectors)

    return run


def check_pooling(job: Job) -> None:
    """Refuse what isn't written down here and in other engines, rather than measure other vectors.

    Raises:
        ValueError: A model pools neither by cls nor by mean.
    """
    if job.pooling not in ("cls", "mean"):
        raise ValueError(f"pools by cls or mean, not {job.pooling}; leave it out with --engines")


def _pooled(job: Job, feeds: dict[str, NDArray[np.int64]], hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    check_pooling(job)
    mask = feeds["attention_mask"][:, :, None].astype(np.float32)
    vectors: NDArray[np.float32] = (hidden * mask).sum(1) / mask.sum(1) if job.pooling == "mean" else hidden[:, 0]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if job.normalize else vectors


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
