"""Quality of an artifact on data in the usual layouts: STS pairs, and retrieval in BEIR's."""

import csv
import json
from pathlib import Path

import ir_measures
import numpy as np
from scipy.stats import spearmanr

from runtime import Embedder, InputError, Reranker
from runtime.pooling import Floats


def sts_spearman(model: Embedder | Reranker, file: Path) -> float:
    """Spearman correlation (×100) of cosines or a reranker's scores with human ones, as MTEB's STS tasks report it.

    Args:
        model: What embeds or scores.
        file: CSV rows of sentence, sentence, score.
    """
    with file.open(encoding="utf-8", newline="") as stream:
        left, right, gold = zip(*csv.reader(stream), strict=True)
    if isinstance(model, Reranker):
        scores = np.array(model.compute_score(list(zip(left, right, strict=True))))
    else:
        scores = _cosines(model.encode(left), model.encode(right))
    return 100 * float(spearmanr(scores, np.array(gold, float)).statistic)


def retrieval(embedder: Embedder, folder: Path) -> dict[str, float]:
    """nDCG@10, Recall@100 and MRR@10 by exact search over a BEIR folder, title and text joined by a space.

    Args:
        embedder: What embeds.
        folder: Holds ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.
    """
    corpus, queries, qrels = read_beir(folder)
    return rank_metrics(qrels, _nearest(embedder, corpus, queries))


def two_stages(embedder: Embedder, reranker: Reranker, folder: Path) -> dict[str, float]:
    """``retrieval`` after a reranker has sorted the nearest 100 again."""
    corpus, queries, qrels = read_beir(folder)
    run = {}
    for query, found in _nearest(embedder, corpus, queries).items():
        ranked = reranker.rank(queries[query], [corpus[document] for document in found])
        documents = list(found)
        run[query] = {documents[i]: score for i, score in ranked}
    return rank_metrics(qrels, run)


def _nearest(embedder: Embedder, corpus: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, float]]:
    """The 100 documents nearest to each query, and their scores."""
    scores = embedder.encode_queries(list(queries.values())) @ embedder.encode_corpus(list(corpus.values())).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :100]
    ids = list(corpus)
    return {query: {ids[j]: float(row[j]) for j in top} for query, row, top in zip(queries, scores, best, strict=True)}


def rank_metrics(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> dict[str, float]:
    """nDCG@10, Recall@100 and MRR@10 of ranked results, by ``ir_measures``."""
    measures = [ir_measures.nDCG @ 10, ir_measures.R @ 100, ir_measures.RR @ 10]
    figures = ir_measures.calc_aggregate(measures, qrels, run)
    return {str(measure): float(figures[measure]) for measure in measures}


def read_beir(folder: Path) -> tuple[dict[str, str], dict[str, str], dict[str, dict[str, int]]]:
    """Corpus and judged queries as texts by id, and judgements by query and document.

    Raises:
        InputError: A judgement names a document or a query that isn't there.
    """
    corpus = {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in _jsonl(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _jsonl(folder / "queries.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    with (folder / "qrels" / "test.tsv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            query, document = row["query-id"], row["corpus-id"]
            if query not in queries or document not in corpus:
                raise InputError(
                    f"{folder}: the judgement {query} {document} names what isn't there; mend qrels/test.tsv"
                )
            qrels.setdefault(query, {})[document] = int(row["score"])
    return corpus, {query: queries[query] for query in qrels}, qrels


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _cosines(a: Floats, b: Floats) -> np.ndarray:
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
