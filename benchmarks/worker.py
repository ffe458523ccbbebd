"""An engine in a process of its own: requests come in as JSON lines, and answers go out the same way.

It may run in an environment that holds nothing but the engine, and its cold start is measured, so it imports no more
than numpy and the engine.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Kind: TypeAlias = Literal["embedder", "sparse_embedder", "reranker"]
Entries: TypeAlias = Callable[[], NDArray[np.float64]]
"""What makes an array ``(entries, 3)`` of sparse vectors, which are in the engine's own form until it is called: the
place of the text, the token id and the weight of each entry."""
Run: TypeAlias = Callable[[Sequence[Any], int], NDArray[np.float32] | Entries]
"""What an engine is: (texts, batch size) to vectors ``(n, dim)`` or, if they are sparse, what makes entries of them; or
(pairs, batch size) to raw scores ``(n,)``."""

WARM = {
    "embedder": "a first text",
    "sparse_embedder": "a first text",
    "reranker": ["a first query", "and its passage"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Which model an engine loads, and how."""

    engine: str
    """Name of its module in ``engines``."""
    variant: str
    kind: Kind
    source: str
    """The folder that it loads, which is also where ``prepare`` writes it."""
    checkpoint: str = ""
    """The model as it was trained: what ``prepare`` starts from."""
    stock: str = ""
    """Folder with the plain ``model.onnx`` that optimum makes of the checkpoint, and its tokenizer."""
    pooling: str = "mean"
    normalize: bool = True
    dim: int = 0
    """Of a vector, dense or sparse."""
    max_length: int = 512
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def place(self) -> dict[str, Any]:
        """The settings of a result that tell where it was measured, beside the machine."""
        return {"threads": self.threads} | ({} if self.device == "cpu" else {"device": self.device})


def serve(job: Job) -> None:
    """Load an engine, and answer requests until the input ends.

    The first line out is ``{"load_s", "first_s", "versions"}`` or ``{"missing"}`` or ``{"error"}``; each request gets
    one line, with ``error`` in it if it failed.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever the engine prints is no answer

        def answer(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=out, flush=True)

        run: Run | None = None
        try:
            start = time.perf_counter()
            engine = import_module(f"benchmarks.engines.{job.engine}")
            run = getattr(engine, job.kind)(job)
            loaded = time.perf_counter()
            run([WARM[job.kind]], 1)
            times = {"load_s": loaded - start, "first_s": time.perf_counter() - loaded}
            answer({**times, "versions": versions(engine.PACKAGES)})
        except ImportError as error:
            answer({"missing": str(error)})
        except Exception as error:  # anything that an engine may raise
            answer(_failure(error))
        for line in sys.stdin if run else ():
            request = json.loads(line)
            try:
                answer(REQUESTS[request.pop("do")](run, **request))
            except Exception as error:
                answer(_failure(error))


def prepare(job: Job) -> None:
    """Let an engine write ``job.source``: the model converted to what it loads."""
    import_module(f"benchmarks.engines.{job.engine}").prepare(job)


def bulk(run: Run, inputs: list[Any], batch: int, least: float) -> dict[str, float]:
    """Seconds for all inputs in one call, as a mean of as many calls as take ``least`` seconds together."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < least:
        run(inputs, batch)
        calls += 1
    return {"seconds": (time.perf_counter() - start) / calls}


def latency(run: Run, inputs: list[Any], callers: int, pause: float) -> dict[str, Any]:
    """Seconds for each input alone, of several callers who ask again at once or after a pause, and for all together.

    Each works off a share of its own, and a call lasts from the end of its caller's last one, or of the pause, so that
    waiting for a turn isn't left out. What the process computes meanwhile is all counted: a thread that spins, too.
    """

    def work(share: list[Any]) -> list[float]:
        times, begin = [], start
        for item in share:
            if pause:
                time.sleep(pause)
                begin = time.perf_counter()
            run([item], 1)
            end = time.perf_counter()
            times.append(end - begin)
            begin = end
        return times

    with ThreadPoolExecutor(callers) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        shares = list(pool.map(work, [inputs[first::callers] for first in range(callers)]))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"times": list(chain(*shares)), "seconds": seconds, "cpu_s": cpu}


def answers(run: Run, inputs: list[Any], batch: int, path: str) -> dict[str, Any]:
    """Write the vectors, the entries of sparse ones, or the scores of all inputs to a ``.npy`` file."""
    given = run(inputs, batch)
    found = given() if callable(given) else np.asarray(given, np.float32)
    np.save(path, found)
    return {"shape": found.shape}


def memory(run: Run) -> dict[str, float]:
    """The most memory that the process has held at once, in MB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return {"peak_mb": int(line.split()[1]) * 1024 / 1e6}
    import resource  # where there is no /proc

    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)}


REQUESTS: dict[str, Callable[..., dict[str, Any]]] = {
    "bulk": bulk,
    "latency": latency,
    "answers": answers,
    "memory": memory,
}


def _failure(error: Exception) -> dict[str, str]:
    return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of some packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    action, arguments = sys.argv[1:]
    {"serve": serve, "prepare": prepare}[action](Job(**json.loads(arguments)))
