"""The data that engines are measured on: STS pairs, BEIR folders, and texts of a given length."""

import csv
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import DataError
from export.calibrate import calibration_texts

LENGTHS = {"short": (6, 14), "medium": (40, 120), "long": (180, 400), "spread": (8, 130)}
"""Fewest and most words of a text of each kind: a query or title, a paragraph, a page."""
DOCUMENTS = "documents"
"""Another kind: whole ones of a corpus."""
BATCH = 32
"""Texts or pairs that an engine is told to run together, where nothing else is said."""
AS_IT_COMES, SORTED = "as it comes", "by length"
"""Orders of texts; the latter spares engines that don't sort them themselves their padding."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """STS: pairs of sentences, and how alike people found them."""

    name: str
    left: list[str]
    right: list[str]
    gold: list[float]


@dataclass(frozen=True, slots=True)
class Beir:
    """A retrieval task: texts by id, and judgements by query and document."""

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    """Only those with a judgement."""
    qrels: dict[str, dict[str, int]]

    def first(self, count: int) -> "Beir":
        """The same with its first so many queries alone."""
        kept = list(self.queries)[:count]
        return dataclasses.replace(
            self, queries={q: self.queries[q] for q in kept}, qrels={q: self.qrels[q] for q in kept}
        )


def read_sts(path: Path) -> Pairs:
    """Read the rows of sentence, sentence, score in a CSV file, or in the one ``*test.csv`` of a folder.

    Raises:
        DataError: There is no such file, or a row isn't two sentences and a number.
    """
    if path.is_dir():
        files = sorted(path.glob("*test.csv"))
        if len(files) != 1:
            raise DataError(f"{path}: holds {len(files)} files named *test.csv, not one; pass the CSV file itself")
        path = files[0]
    left, right, gold = [], [], []
    for number, row in enumerate(csv.reader(_lines(path)), 1):
        try:
            a, b, score = row
            gold.append(float(score))
        except ValueError:
            raise DataError(f"{path}:{number}: is no row of sentence, sentence, score; mend or remove it") from None
        left.append(a)
        right.append(b)
    if len(gold) < 2:
        raise DataError(f"{path}: holds {len(gold)} pairs, and a correlation needs two; pass another file")
    return Pairs(path.stem, left, right, gold)


def read_beir(folder: Path) -> Beir:
    """Read a folder of ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/test.tsv``.

    A document's text is its title and its text joined by a space, as BEIR embeds it.

    Raises:
        DataError: A file is missing or malformed, or a judgement names a document or a query that isn't there.
    """
    corpus = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _records(folder / "corpus.jsonl")
    }
    queries = {row["_id"]: row["text"] for row in _records(folder / "queries.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    path = folder / "qrels" / "test.tsv"
    for number, row in enumerate(csv.DictReader(_lines(path), delimiter="\t"), 2):
        try:
            query, document, score = row["query-id"], row["corpus-id"], int(row["score"])
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{number}: is no row of query-id, corpus-id, score; mend or remove it") from None
        if query not in queries or document not in corpus:
            missing = f"query {query}" if query not in queries else f"document {document}"
            raise DataError(f"{path}:{number}: names {missing}, which isn't there; add it or remove the row")
        qrels.setdefault(query, {})[document] = score
    if not qrels:
        raise DataError(f"{path}: holds no judgement; nothing can be measured with it")
    return Beir(folder.resolve().name, corpus, {query: queries[query] for query in qrels}, qrels)


def sample_texts(count: int, words: tuple[int, int], source: Sequence[str] | None = None, seed: int = 0) -> list[str]:
    """Texts of a length, the same ones for the same arguments.

    Args:
        count: How many.
        words: Fewest and most words of one.
        source: Texts whose running words they are cut from; by default words drawn from the calibration texts.
        seed: Of every choice.
    """
    draw = random.Random(seed)
    lengths = [draw.randint(*words) for _ in range(count)]
    if source is None:
        vocabulary = sorted({word for text in calibration_texts() for word in text.split() if word.isascii()})
        return [" ".join(draw.choices(vocabulary, k=length)) for length in lengths]
    texts = list(source)
    draw.shuffle(texts)
    stream = itertools.cycle(word for text in texts for word in text.split())
    return [" ".join(itertools.islice(stream, length)) for length in lengths]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["_id"], str) and isinstance(row["text"], str)):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{number}: is no JSON object with _id and text; mend or remove it") from None
        yield row


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            return stream.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}); pass the folder or file with --sts or --beir") from None
