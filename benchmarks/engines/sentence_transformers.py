"""sentence-transformers: torch in fp32, in bf16 where the CPU has it, in fp16 on CUDA; and its ONNX backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.worker import Entries, Job, Run

PACKAGES = ("sentence-transformers", "transformers", "torch", "onnxruntime", "optimum-onnx")
VARIANTS = {
    "embedder": ("fp32", "bf16", "onnx"),
    "sparse_embedder": ("fp32", "bf16"),
    "reranker": ("fp32", "bf16", "onnx"),
}
CUDA = ("fp32", "bf16", "fp16")
PREPARED = {"onnx": "onnx"}


def embedder(job: Job) -> Run:
    """``SentenceTransformer.encode``, which sorts by length and pads."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(job.source, **_options(job))
    model.max_seq_length = job.max_length
    return lambda texts, batch: np.asarray(model.encode(list(texts), batch_size=batch, show_progress_bar=False))


def sparse_embedder(job: Job) -> Run:
    """``SparseEncoder.encode``, which sorts by length and pads; a sparse tensor."""
    import torch
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(job.source, **_options(job))
    model.max_seq_length = job.max_length

    def run(texts: Sequence[str], batch: int) -> Entries:
        found = model.encode(list(texts), batch_size=batch, show_progress_bar=False, save_to_cpu=True)

        def entries() -> Any:  # noqa: ANN401
            held = found.coalesce()
            return torch.vstack([held.indices(), held.values().double()]).T.numpy()

        return entries

    return run


def reranker(job: Job) -> Run:
    """``CrossEncoder.predict``, which sorts by length and pads; raw logits."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(job.source, max_length=job.max_length, **_options(job))
    raw = torch.nn.Identity()
    return lambda pairs, batch: np.asarray(
        model.predict([(q, p) for q, p in pairs], batch_size=batch, activation_fn=raw, show_progress_bar=False)
    )


def prepare(job: Job) -> None:
    """The ONNX backend exports a checkpoint whenever it loads it; done here once."""
    from sentence_transformers import CrossEncoder, SentenceTransformer

    kind = SentenceTransformer if job.kind == "embedder" else CrossEncoder
    kind(job.checkpoint, device="cpu", backend="onnx", model_kwargs={"export": True}).save_pretrained(job.source)


def _options(job: Job) -> dict[str, Any]:
    import torch

    torch.set_num_threads(job.threads)
    match job.variant:
        case "onnx":
            import onnxruntime

            session = onnxruntime.SessionOptions()
            session.intra_op_num_threads = job.threads
            return {"device": "cpu", "backend": "onnx", "model_kwargs": {"session_options": session}}
        case dtype:
            cpu = Path("/proc/cpuinfo")  # without bf16, torch emulates it several times slower than fp32
            if (job.device, dtype) == ("cpu", "bf16") and cpu.exists() and "bf16" not in cpu.read_text():
                raise RuntimeError("this CPU has no bf16")
            dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
            return {"device": job.device, "model_kwargs": {"dtype": dtypes[dtype]}}
