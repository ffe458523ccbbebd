"""``python -m benchmarks ARTIFACT --sts FILE --beir DIR``: quality of each variant, side by side."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.quality import retrieval, sts_spearman
from runtime import Embedder
from runtime.manifest import load_manifest


def main() -> None:
    """Print one row of figures per variant."""
    parser = argparse.ArgumentParser("python -m benchmarks", description="Quality of an artifact's variants.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--sts", type=Path, metavar="FILE", help="CSV of sentence, sentence, score")
    parser.add_argument("--beir", type=Path, metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels/test.tsv")
    options = parser.parse_args()
    rows = {}
    for variant in load_manifest(options.artifact).variants:
        embedder = Embedder(options.artifact, variant, device="cpu")
        figures = {"STS Spearman": sts_spearman(embedder, options.sts)} if options.sts else {}
        rows[variant] = figures | (retrieval(embedder, options.beir) if options.beir else {})
    table = Table("variant", *next(iter(rows.values())), box=None)
    for variant, figures in rows.items():
        table.add_row(variant, *(f"{value:.4f}" if value < 2 else f"{value:.2f}" for value in figures.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
