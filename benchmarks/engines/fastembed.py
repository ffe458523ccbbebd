"""fastembed, with a custom model from a local folder."""

import json
import os
from pathlib import Path

import numpy as np

from benchmarks.engines import plain
from benchmarks.worker import Job, Run

PACKAGES = ("fastembed", "onnxruntime", "tokenizers")
VARIANTS = {"embedder": ("fp32",), "reranker": ("fp32",)}
PREPARED = {"fp32": "fp32"}


def embedder(job: Job) -> Run:
    """``TextEmbedding.embed``: padded batches in the order they come."""
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    plain.check_pooling(job)
    config = json.loads((Path(job.source) / "config.json").read_text("utf-8"))
    TextEmbedding.add_custom_model(
        "local",
        pooling=PoolingType.MEAN if job.pooling == "mean" else PoolingType.CLS,
        normalization=job.normalize,
        sources=ModelSource(hf="local/local"),
        dim=config["hidden_size"],
        model_file="model.onnx",
    )
    model = TextEmbedding("local", specific_model_path=job.source, threads=job.threads, cuda=False)
    return lambda texts, batch: np.stack(list(model.embed(list(texts), batch_size=batch)))


def reranker(job: Job) -> Run:
    """``TextCrossEncoder.rerank_pairs``: padded batches in the order they come; raw logits."""
    from fastembed.common.model_description import ModelSource
    from fastembed.rerank.cross_encoder import TextCrossEncoder

    TextCrossEncoder.add_custom_model("local", sources=ModelSource(hf="local/local"), model_file="model.onnx")
    model = TextCrossEncoder("local", specific_model_path=job.source, threads=job.threads, cuda=False)
    return lambda pairs, batch: np.array(
        list(model.rerank_pairs([(q, p) for q, p in pairs], batch_size=batch)), np.float32
    )


def prepare(job: Job) -> None:
    """The stock export is laid out as fastembed wants it, and read to the same length: it would take the shorter."""
    for path in Path(job.stock).iterdir():
        (Path(job.source) / path.name).symlink_to(os.path.relpath(path, job.source))  # they may move together
    config = Path(job.source) / "tokenizer_config.json"
    settings = json.loads(config.read_text("utf-8")) | dict.fromkeys(("max_length", "model_max_length"), job.max_length)
    config.unlink()
    config.write_text(json.dumps(settings), "utf-8")
