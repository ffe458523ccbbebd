"""What indexing and searching in two stages cost: our ``Retriever`` from text to reranked hits."""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.data import LENGTHS, sample_texts
from benchmarks.engines.ours import PACKAGES
from benchmarks.results import Figure, Journal, Result
from benchmarks.worker import versions
from runtime import Embedder, Reranker, Retriever

QUERIES = 30


def measure_retriever(embedder: Embedder, reranker: Reranker, count: int, journal: Journal) -> list[Result]:
    """Index short texts, save, reload, and search the nearest 100, reranked to the top 10.

    Args:
        embedder: For the first stage.
        reranker: For the second.
        count: How many texts to index.
        journal: Gets the result.

    Returns:
        Texts indexed a second, seconds to save and to load, MB on disk, and milliseconds a query: of embedding it, of
        finding the nearest (embedding included), and of the whole search; nothing if the journal has it already.
    """
    settings = {
        "texts": count,
        "queries": QUERIES,
        "reranker": f"{reranker.manifest.name} {reranker.variant}",
    }
    result = Result(
        benchmark="retriever",
        engine="ours",
        variant=embedder.variant,
        model=embedder.manifest.name,
        settings=settings,
        figures={},
    )
    if result in journal:
        return []
    figures = {name: Figure.of(samples) for name, samples in _figures(embedder, reranker, count).items()}
    return [journal.add(result.filled(figures, versions((*PACKAGES, "usearch"))))]


def _figures(embedder: Embedder, reranker: Reranker, count: int) -> dict[str, list[float]]:
    texts, queries = sample_texts(count, LENGTHS["short"]), sample_texts(QUERIES, LENGTHS["short"], seed=1)
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as folder:
        retriever = Retriever(folder, embedder, reranker)
        indexing = _seconds(lambda: retriever.add(texts))
        saving = _seconds(retriever.save)
        retriever.close()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        loading = _seconds(lambda: Retriever(folder, embedder, reranker).close())
        retriever = Retriever(folder, embedder, reranker)
        stages: dict[str, list[float]] = {"embed ms": [], "retrieve ms": [], "search ms": []}
        for query in queries:
            stages["embed ms"].append(1000 * _seconds(partial(embedder.encode_queries, query)))
            stages["retrieve ms"].append(1000 * _seconds(partial(retriever.retrieve, query)))
            stages["search ms"].append(1000 * _seconds(partial(retriever.search, query)))
        retriever.close()
    return {"texts/s": [count / indexing], "save s": [saving], "load s": [loading], "MB": [size / 1e6], **stages}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
