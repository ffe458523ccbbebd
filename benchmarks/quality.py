"""Quality: STS, retrieval, and retrieval in two stages, of every engine by the same rule."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from scipy.stats import spearmanr

from benchmarks.client import Worker, prepared
from benchmarks.data import BATCH, Beir, Pairs
from benchmarks.engines import SAME_ANSWERS
from benchmarks.errors import EngineError
from benchmarks.results import Figure, Journal, Result
from benchmarks.subject import BASELINE
from benchmarks.worker import Job

CANDIDATES = 100
"""How many documents the first stage finds, and the second sorts again."""
CHUNK = 2000
"""Pairs that a reranker is handed at once, so that progress shows."""

Vectors: TypeAlias = NDArray[Any] | csr_array
Ranking = dict[str, dict[str, float]]
"""Scores by query and document."""


def measure_quality(
    jobs: Sequence[Job],
    name: str,
    journal: Journal,
    *,
    pairs: Pairs | None = None,
    data: Beir | None = None,
    prompts: dict[str, str] | None = None,
    found: Callable[[Result], object] = lambda result: None,
    left_out: Callable[[EngineError], object] = lambda error: None,
) -> None:
    """STS and, of embedders, retrieval of each engine; and how close vectors are to the baseline's, if that is there.

    Args:
        jobs: The engines, the baseline first.
        name: The model's.
        journal: Gets the results, and is asked what it has already.
        pairs: STS.
        data: A retrieval task.
        prompts: The model's, by ``query`` and ``passage``.
        found: Is told of every result.
        left_out: Is told of every engine that is missing or failed; the rest goes on.
    """
    reference = None
    for job in jobs:
        if job.variant in SAME_ANSWERS:
            continue
        try:
            if pairs:
                for result in _sts(job, name, pairs, journal, reference):
                    found(result)
            if data and job.kind != "reranker":
                for result in _retrieval(job, name, data, prompts or {}, journal, reference):
                    found(result)
        except EngineError as error:
            left_out(error)
            continue
        if (job.engine, job.variant) == BASELINE and job.kind != "reranker":
            reference = job


def measure_two_stages(
    embedder: Job,
    reranker: Job,
    names: tuple[str, str],
    data: Beir,
    prompts: dict[str, str],
    journal: Journal,
    progress: Callable[[str, float], object] = lambda step, share: None,
) -> list[Result]:
    """Retrieval before and after a reranker has sorted the nearest 100 again.

    Args:
        embedder: The engine for the first stage.
        reranker: The engine for the second.
        names: Of the embedding and the reranking model.
        data: What is searched.
        prompts: The embedder's.
        journal: Gets the result.
        progress: Called with a description and the share that is done.

    Returns:
        The result; none if the journal has it already.

    Raises:
        EngineError: An engine is missing or failed.
    """
    first = {"embedder": f"{names[0]} {embedder.engine} {embedder.variant}", "candidates": CANDIDATES}
    settings = {"data": data.name, "queries": len(data.queries)} | first
    result = _result("two-stage", reranker, names[1], settings)
    if result in journal:
        return []
    found = _nearest(_answers(embedder, _searched(data, prompts)).found, data)
    pairs = [(query, document) for query, documents in found.items() for document in documents]
    texts = [(data.queries[query], data.corpus[document]) for query, document in pairs]
    scores: list[float] = []
    with Worker(prepared(reranker)) as worker:
        start = time.perf_counter()
        for first_pair in range(0, len(texts), CHUNK):
            scores += worker.answers(texts[first_pair : first_pair + CHUNK], BATCH).tolist()
            progress(f"{reranker.engine} {reranker.variant} reranks", len(scores) / len(texts))
        rate = len(texts) / (time.perf_counter() - start)
    ranked: Ranking = {query: {} for query in found}
    for (query, document), score in zip(pairs, scores, strict=True):
        ranked[query][document] = score
    before = {f"first {metric}": value for metric, value in rank_metrics(data.qrels, found).items()}
    figures = before | rank_metrics(data.qrels, ranked) | {"pairs/s": rate}
    return [_add(journal, result, worker.versions, figures)]


@dataclass(frozen=True, slots=True)
class _Answers:
    """What an engine made of some inputs, in a process of its own."""

    found: Vectors
    """Or scores."""
    peak_mb: float
    versions: dict[str, str]


@functools.lru_cache(maxsize=4)  # an engine's, and the baseline's, which every engine's are compared with
def _answers(job: Job, inputs: tuple[Any, ...]) -> _Answers:
    with Worker(prepared(job)) as worker:
        found: Vectors = worker.answers(list(inputs), BATCH)
        if job.kind == "sparse_embedder":
            found = csr_array((found[:, 2], found[:, :2].T.astype(np.int64)), (len(inputs), job.dim))
        return _Answers(found, worker.ask("memory")["peak_mb"], worker.versions)


def _sts(job: Job, name: str, pairs: Pairs, journal: Journal, reference: Job | None) -> list[Result]:
    """Spearman's correlation (×100) of similarities, or of a reranker's scores, with human ones, as MTEB reports it."""
    result = _result("sts", job, name, {"data": pairs.name, "pairs": len(pairs.gold)})
    if result in journal:
        return []
    if job.kind == "reranker":
        inputs: tuple[Any, ...] = tuple(zip(pairs.left, pairs.right, strict=True))
        scores = (answers := _answers(job, inputs)).found
    else:
        inputs = (*pairs.left, *pairs.right)
        vectors = _comparable((answers := _answers(job, inputs)).found)
        scores = _dots(vectors[: len(pairs.left)], vectors[len(pairs.left) :])
    figures = {"spearman": 100 * float(spearmanr(scores, pairs.gold).statistic)}
    return [_add(journal, result, answers.versions, figures | _cosines(answers, reference, inputs))]


def _retrieval(
    job: Job, name: str, data: Beir, prompts: dict[str, str], journal: Journal, reference: Job | None
) -> list[Result]:
    """nDCG@10, Recall@100 and MRR@10 of exact search, and the memory that it took to embed the whole corpus."""
    result = _result("retrieval", job, name, {"data": data.name})
    if result in journal:
        return []
    answers = _answers(job, inputs := _searched(data, prompts))
    figures = rank_metrics(data.qrels, _nearest(answers.found, data)) | {"peak MB": answers.peak_mb}
    return [_add(journal, result, answers.versions, figures | _cosines(answers, reference, inputs))]


def _cosines(answers: _Answers, reference: Job | None, inputs: tuple[Any, ...]) -> dict[str, float]:
    """The mean and the least cosine to the reference's vectors, if there is one."""
    if reference is None:
        return {}
    # In float64, so that equal vectors have a cosine of 1; so have two sparse ones without any entry.
    a, b = (held.found.astype(np.float64) for held in (answers, _answers(reference, inputs)))
    aa, bb = _dots(a, a), _dots(b, b)
    lengths = np.sqrt(aa * bb)
    found = np.divide(_dots(a, b), lengths, out=(aa == bb).astype(float), where=lengths > 0)
    return {"cosine mean": float(found.mean()), "cosine min": float(found.min())}


def _searched(data: Beir, prompts: dict[str, str]) -> tuple[str, ...]:
    """Queries and documents, as they are embedded."""
    queries = (prompts.get("query", "") + text for text in data.queries.values())
    return (*queries, *(prompts.get("passage", "") + text for text in data.corpus.values()))


def _nearest(vectors: Vectors, data: Beir) -> Ranking:
    """The 100 documents most similar to each query."""
    vectors, count = _comparable(vectors), len(data.queries)
    scores: Any = vectors[:count] @ vectors[count:].T
    scores = scores.toarray() if issparse(scores) else scores
    best = np.argsort(-scores, axis=1, kind="stable")[:, :CANDIDATES]
    ids = list(data.corpus)
    return {
        query: {ids[j]: float(row[j]) for j in top} for query, row, top in zip(data.queries, scores, best, strict=True)
    }


def rank_metrics(qrels: dict[str, dict[str, int]], run: Ranking) -> dict[str, float]:
    """nDCG@10, Recall@100 and MRR@10 of ranked results, by ``ir_measures``."""
    import ir_measures  # so that speed can be measured without it

    measures = {"nDCG@10": ir_measures.nDCG @ 10, "R@100": ir_measures.R @ 100, "MRR@10": ir_measures.RR @ 10}
    figures = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    return {name: float(figures[measure]) for name, measure in measures.items()}


def _result(benchmark: str, job: Job, name: str, settings: dict[str, object]) -> Result:
    if job.device != "cpu":
        settings = settings | {"device": job.device}
    return Result(
        benchmark=benchmark, engine=job.engine, variant=job.variant, model=name, settings=settings, figures={}
    )


def _add(journal: Journal, result: Result, versions: dict[str, str], figures: dict[str, float]) -> Result:
    return journal.add(result.filled({name: Figure.of(value) for name, value in figures.items()}, versions))


def _comparable(vectors: Vectors) -> Vectors:
    """What has similarities as dot products: unit vectors, or sparse ones as they are, since so they are trained."""
    if issparse(vectors):
        return vectors
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)


def _dots(a: Vectors, b: Vectors) -> NDArray[np.float64]:
    """Of each row with the other's."""
    return (a * b).sum(1)
