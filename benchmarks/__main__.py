"""``python -m benchmarks quality …`` and ``python -m benchmarks retriever …``: figures of exported artifacts."""

import argparse
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality import retrieval, sts_spearman, two_stages
from benchmarks.retriever import retriever_figures
from runtime import Embedder, Reranker
from runtime.manifest import load_manifest


def main() -> None:
    """Parse, measure, and print one table."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="Figures of exported artifacts.")
    modes = parser.add_subparsers(dest="mode", required=True)
    quality = modes.add_parser("quality", help="of each variant of an embedder or reranker")
    quality.add_argument("artifact", type=Path)
    quality.add_argument("--sts", type=Path, metavar="FILE", help="CSV of sentence, sentence, score")
    quality.add_argument("--beir", type=Path, metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels/test.tsv")
    quality.add_argument("--variant", metavar="NAME", help="only this one")
    quality.add_argument("--reranker", type=Path, metavar="ARTIFACT", help="sorts the top 100 of --beir again")
    retriever = modes.add_parser("retriever", help="speed and size of indexing, searching and reranking")
    retriever.add_argument("embedder", type=Path)
    retriever.add_argument("reranker", type=Path)
    retriever.add_argument("--texts", type=int, default=100_000, help="short texts to index (default: 100,000)")
    options = parser.parse_args()
    rows = _quality(options) if options.mode == "quality" else {"": _retriever(options)}
    table = Table("", *next(iter(rows.values())), box=None)
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:.4f}" if value < 2 else f"{value:,.2f}" for value in figures.values()))
    console = Console()
    console.print(table, width=None if console.is_terminal else 200)


def _quality(options: argparse.Namespace) -> dict[str, Mapping[str, float]]:
    manifest = load_manifest(options.artifact)
    rows: dict[str, Mapping[str, float]] = {}
    for variant in [options.variant] if options.variant else manifest.variants:
        model = (Embedder if manifest.kind == "embedder" else Reranker)(options.artifact, variant, device="cpu")
        figures = {"STS Spearman": sts_spearman(model, options.sts)} if options.sts else {}
        if options.beir and isinstance(model, Embedder):
            if options.reranker:
                figures |= two_stages(model, Reranker(options.reranker, device="cpu"), options.beir)
            else:
                figures |= retrieval(model, options.beir)
        rows[variant] = figures
    return rows


def _retriever(options: argparse.Namespace) -> Mapping[str, float]:
    embedder, reranker = Embedder(options.embedder, device="cpu"), Reranker(options.reranker, device="cpu")
    return retriever_figures(embedder, reranker, options.texts)


if __name__ == "__main__":
    main()
