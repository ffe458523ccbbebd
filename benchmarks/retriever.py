"""What indexing and searching in two stages cost."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from export.calibrate import calibration_texts
from runtime import Embedder, Reranker, Retriever

QUERIES = 30


def retriever_figures(embedder: Embedder, reranker: Reranker, count: int) -> dict[str, float]:
    """Index short random texts, save, reload, and search the top 100, reranked to the top 10.

    Returns:
        Texts indexed a second, seconds to save and to load, median milliseconds of each stage of a query, MB on disk.
    """
    texts, queries = random_texts(count), random_texts(QUERIES, seed=1)
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as folder:
        retriever = Retriever(folder, embedder, reranker)
        indexing = _seconds(lambda: retriever.add(texts))
        saving = _seconds(retriever.save)
        retriever.close()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        loading = _seconds(lambda: Retriever(folder, embedder, reranker).close())
        retriever = Retriever(folder, embedder, reranker)
        stages: dict[str, list[float]] = {"embed": [], "retrieve 100": [], "search, reranked": []}
        for query in queries:
            stages["embed"].append(_seconds(partial(embedder.encode_queries, query)))
            stages["retrieve 100"].append(_seconds(partial(retriever.retrieve, query)))
            stages["search, reranked"].append(_seconds(partial(retriever.search, query)))
        retriever.close()
    figures = {"texts": count, "texts/s": count / indexing, "save s": saving, "load s": loading, "MB": size / 1e6}
    return figures | {f"{name} ms": 1000 * statistics.median(times) for name, times in stages.items()}


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 6 to 14 words drawn from the calibration texts: like the summaries of a package registry."""
    words = sorted({word for text in calibration_texts() for word in text.split() if word.isascii()})
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(6, 14))) for _ in range(count)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
