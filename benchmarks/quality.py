"""Quality: STS, retrieval, and retrieval in two stages, of every engine by the same rule."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import ir_measures
import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from benchmarks.client import Worker, name_of, prepared
from benchmarks.data import Beir, Pairs
from benchmarks.results import Figure, Journal, Result
from benchmarks.worker import Job

BATCH = 32
CANDIDATES = 100
"""How many documents the first stage finds, and the second sorts again."""
CHUNK = 2000
"""Pairs that a reranker is handed at once, so that progress shows."""

Floats = NDArray[np.float32]
Ranking = dict[str, dict[str, float]]
"""Scores by query and document."""


def measure_sts(job: Job, name: str, pairs: Pairs, journal: Journal) -> list[Result]:
    """Spearman's correlation (×100) of cosines, or of a reranker's scores, with human ones, as MTEB reports it.

    Args:
        job: The engine.
        name: The model's.
        pairs: What is scored.
        journal: Gets the result.

    Returns:
        The result; none if the journal has it already.

    Raises:
        EngineError: The engine is missing or failed.
    """
    result = _result("sts", job, name, {"data": pairs.name, "pairs": len(pairs.gold)})
    if result in journal:
        return []
    with Worker(prepared(job)) as worker:
        if job.kind == "reranker":
            scores = worker.answers(list(zip(pairs.left, pairs.right, strict=True)), BATCH)
        else:
            a, b = (worker.answers(side, BATCH) for side in (pairs.left, pairs.right))
            scores = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return [_add(journal, result, worker, {"spearman": 100 * float(spearmanr(scores, pairs.gold).statistic)})]


def measure_retrieval(job: Job, name: str, data: Beir, prompts: dict[str, str], journal: Journal) -> list[Result]:
    """nDCG@10, Recall@100 and MRR@10 of exact search by an embedder.

    Args:
        job: The engine.
        name: The model's.
        data: What is searched.
        prompts: The model's, by ``query`` and ``passage``.
        journal: Gets the result.

    Returns:
        The result; none if the journal has it already.

    Raises:
        EngineError: The engine is missing or failed.
    """
    result = _result("retrieval", job, name, {"data": data.name})
    if result in journal:
        return []
    with Worker(prepared(job)) as worker:
        return [_add(journal, result, worker, rank_metrics(data.qrels, nearest(worker, data, prompts)))]


def measure_cosines(jobs: Sequence[Job], name: str, data: str, texts: list[str], journal: Journal) -> list[Result]:
    """The mean and least cosine of vectors to those of the first job.

    Args:
        jobs: The engine that the others are compared with, and the others.
        name: The model's.
        data: What the texts are called.
        texts: What is embedded.
        journal: Gets a result for each engine but the first.

    Returns:
        The results, none if the journal has all of them already.

    Raises:
        EngineError: An engine is missing or failed.
    """
    settings = {"data": data, "texts": len(texts), "to": name_of(jobs[0])}
    missing = [job for job in jobs[1:] if _result("cosine", job, name, settings) not in journal]
    results, expected = [], None
    for job in [jobs[0], *missing] if missing else []:
        with Worker(prepared(job)) as worker:
            vectors = _unit(worker.answers(texts, BATCH).astype(np.float64))
            if expected is None:
                expected = vectors
                continue
            found = (vectors * expected).sum(1)
            figures = {"cosine mean": float(found.mean()), "cosine min": float(found.min())}
            results.append(_add(journal, _result("cosine", job, name, settings), worker, figures))
    return results


def measure_two_stages(
    embedders: Sequence[Job],
    reranker: Job,
    names: tuple[str, str],
    data: Beir,
    prompts: dict[str, str],
    journal: Journal,
    progress: Callable[[str, float], object] = lambda step, share: None,
) -> list[Result]:
    """``measure_retrieval`` after a reranker has sorted the nearest 100 again.

    Args:
        embedders: Engines for the first stage; what several of them find is scored once.
        reranker: The engine for the second.
        names: Of the embedding and the reranking model.
        data: What is searched.
        prompts: The embedder's.
        journal: Gets a result for each of ``embedders``.
        progress: Called with a description and the share that is done.

    Returns:
        The results, none if the journal has all of them already.

    Raises:
        EngineError: An engine is missing or failed.
    """
    results = []
    for job in embedders:
        first = {"embedder": f"{names[0]} {job.engine} {job.variant}", "candidates": CANDIDATES}
        results.append(_result("two-stage", reranker, names[1], {"data": data.name, **first}))
    if all(result in journal for result in results):
        return []
    found = []
    for job in embedders:
        with Worker(prepared(job)) as worker:
            found.append(nearest(worker, data, prompts))
    pairs = sorted({(query, document) for run in found for query, docs in run.items() for document in docs})
    texts = [(data.queries[query], data.corpus[document]) for query, document in pairs]
    scores: list[float] = []
    with Worker(prepared(reranker)) as worker:
        start = time.perf_counter()
        for first_pair in range(0, len(texts), CHUNK):
            scores += worker.answers(texts[first_pair : first_pair + CHUNK], BATCH).tolist()
            progress(f"{reranker.engine} {reranker.variant} reranks", len(scores) / len(texts))
        rate = len(texts) / (time.perf_counter() - start)
        by_pair = dict(zip(pairs, scores, strict=True))
        return [
            _add(
                journal,
                result,
                worker,
                rank_metrics(data.qrels, {q: {d: by_pair[q, d] for d in docs} for q, docs in run.items()})
                | {"pairs/s": rate},
            )
            for result, run in zip(results, found, strict=True)
        ]


def nearest(worker: Worker, data: Beir, prompts: dict[str, str]) -> Ranking:
    """The 100 documents nearest to each query by cosine."""
    queries = worker.answers([prompts.get("query", "") + text for text in data.queries.values()], BATCH)
    corpus = worker.answers([prompts.get("passage", "") + text for text in data.corpus.values()], BATCH)
    scores = _unit(queries) @ _unit(corpus).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :CANDIDATES]
    ids = list(data.corpus)
    return {
        query: {ids[j]: float(row[j]) for j in top} for query, row, top in zip(data.queries, scores, best, strict=True)
    }


def rank_metrics(qrels: dict[str, dict[str, int]], run: Ranking) -> dict[str, float]:
    """nDCG@10, Recall@100 and MRR@10 of ranked results, by ``ir_measures``."""
    measures = {"nDCG@10": ir_measures.nDCG @ 10, "R@100": ir_measures.R @ 100, "MRR@10": ir_measures.RR @ 10}
    figures = ir_measures.calc_aggregate(list(measures.values()), qrels, run)
    return {name: float(figures[measure]) for name, measure in measures.items()}


def _result(benchmark: str, job: Job, name: str, settings: dict[str, object]) -> Result:
    return Result(
        benchmark=benchmark, engine=job.engine, variant=job.variant, model=name, settings=settings, figures={}
    )


def _add(journal: Journal, result: Result, worker: Worker, figures: dict[str, float]) -> Result:
    return journal.add(result.filled({name: Figure.of(value) for name, value in figures.items()}, worker.versions))


def _unit(vectors: NDArray[Any]) -> NDArray[Any]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
