"""FlashRank: a local model under the name of one that it knows, since it loads no others."""

import functools
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import Job, Run

PACKAGES = ("FlashRank", "onnxruntime", "tokenizers")
VARIANTS = {"reranker": ("int8",)}
PREPARED = {"int8": "int8"}
NAME, FILE = "ms-marco-MiniLM-L-12-v2", "flashrank-MiniLM-L-12-v2_Q.onnx"


def reranker(job: Job) -> Run:
    """``Ranker.rerank``, which pads all passages of a query into one batch; scores after a sigmoid."""
    import onnxruntime
    from flashrank import Ranker, RerankRequest

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    # It opens its session itself, without options.
    onnxruntime.InferenceSession = functools.partial(onnxruntime.InferenceSession, sess_options=options)
    model = Ranker(NAME, job.source, job.max_length)

    def run(pairs: Any, batch: int) -> Any:  # noqa: ANN401
        scores = np.empty(len(pairs), np.float32)
        for query, group in groupby(enumerate(pairs), key=lambda item: item[1][0]):
            passages = [{"id": i, "text": pair[1]} for i, pair in group]
            for found in model.rerank(RerankRequest(query, passages)):
                scores[found["id"]] = found["score"]
        return scores

    return run


def prepare(job: Job) -> None:
    """Its own models are quantised by ``quantize_dynamic``, and so is this one."""
    from onnxruntime.quantization import quantize_dynamic

    folder = Path(job.source) / NAME
    shutil.copytree(job.stock, folder)
    (folder / "model.onnx").unlink()
    quantize_dynamic(Path(job.stock) / "model.onnx", folder / FILE)
