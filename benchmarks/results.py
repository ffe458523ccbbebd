"""Results as JSON lines: one schema, only ever appended to, and each line whole in itself."""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from benchmarks.errors import DataError

SCHEMA = 1
"""Of a line; one that this code can't read any more gets another number."""
QUALITY = {
    "sts": {"spearman": "Spearman × 100", "cosine mean": "mean cosine", "cosine min": "least cosine"},
    "retrieval": {name: name for name in ("nDCG@10", "R@100", "MRR@10")},
}
"""Figures by benchmark, and what tables call them, the most telling one first."""
RATE = " Gop/s"
"""Ends the name of a figure that counts operations of matrix products, after their precision."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What several runs of one measurement gave."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, samples: float | Sequence[float]) -> Self:
        """Median, least and greatest of some samples, to six digits; of a single one, all three the same."""
        values = samples if isinstance(samples, Sequence) else [samples]
        median, low, high = (float(f"{value:.6g}") for value in (statistics.median(values), min(values), max(values)))
        return cls(median, low, high, len(values))

    @classmethod
    def joined(cls, parts: "Sequence[Figure]") -> Self:
        """Of the same measurement made in several parts: the median of their medians, and the spread of all runs."""
        median = float(f"{statistics.median(part.median for part in parts):.6g}")
        low, high = min(part.low for part in parts), max(part.high for part in parts)
        return cls(median, low, high, sum(part.runs for part in parts))

    def over(self, value: float) -> "Figure":
        """As a share of a value."""
        return Figure(self.median / value, self.low / value, self.high / value, self.runs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One measurement of one engine: a line of a results file."""

    benchmark: str
    engine: str
    variant: str
    model: str
    settings: dict[str, Any]
    """What tells it from other measurements of the benchmark."""
    figures: dict[str, Figure]
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    run: str = ""
    time: str = ""
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        """What was measured, whenever and wherever: equal for two runs of the same measurement."""
        return json.dumps([self.benchmark, self.engine, self.variant, self.model, self.settings], sort_keys=True)

    def filled(self, figures: dict[str, Figure], versions: dict[str, str]) -> "Result":
        """The same measurement, made."""
        return dataclasses.replace(self, figures=figures, versions=versions)


def read_results(path: Path) -> list[Result]:
    """All lines of a results file, oldest first; a last line that was cut off while it was written is left out.

    Raises:
        DataError: The file can't be read, or a line is of another schema or none.
    """
    try:
        lines = path.read_text("utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}); measure first: python -m benchmarks all") from None
    results = []
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            fields = json.loads(line)
            if fields["schema"] != SCHEMA:
                raise DataError(f"{path}:{number}: is of schema {fields['schema']}, not {SCHEMA}; measure again")
            fields["figures"] = {name: Figure(**figure) for name, figure in fields["figures"].items()}
            results.append(Result(**fields))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}:{number}: is no result ({error}); mend or remove the line") from None
    return results


def newest(results: Iterable[Result]) -> list[Result]:
    """Of each benchmark and model the last run that measured it; parts of one measurement are joined.

    Only figures that all of its parts have are kept.
    """
    ordered = list(results)
    runs = {(result.benchmark, result.model): result.run for result in ordered}
    parts: dict[str, list[Result]] = {}
    for result in ordered:
        if result.run == runs[result.benchmark, result.model]:
            parts.setdefault(result.key, []).append(result)
    return [_joined(held) for held in parts.values()]


def _joined(parts: Sequence[Result]) -> Result:
    names = [name for name in parts[-1].figures if all(name in part.figures for part in parts)]
    return dataclasses.replace(
        parts[-1], figures={name: Figure.joined([part.figures[name] for part in parts]) for name in names}
    )


class Journal:
    """A results file that a run appends to, line by line, so that nothing measured is ever lost.

    Attributes:
        path: The file.
        run: What marks the run's lines.
        results: The run's results so far.
    """

    def __init__(
        self, path: Path, run: str | None = None, *, machine: dict[str, Any] | None = None, commit: str = ""
    ) -> None:
        """Open a file for a new run, or to go on with one.

        Args:
            path: The file, made if it isn't there.
            run: A run to go on with, ``last`` for the file's last one; by default a new one.
            machine: What ``describe_machine`` gave.
            commit: What is checked out.

        Raises:
            DataError: The file can't be read, or has no such run.
        """
        held = read_results(path) if path.exists() else []
        if run == "last":
            run = held[-1].run if held else None
        elif run is not None and run not in {result.run for result in held}:
            raise DataError(f"{path}: has no run {run}; leave out --resume to start one")
        self.path = path
        self.run = run or now()
        self.results = [result for result in held if result.run == self.run]
        self._machine = machine or {}
        self._commit = commit

    def __contains__(self, result: Result) -> bool:
        """Whether the run has measured the same already."""
        return self.count(result) > 0

    def count(self, result: Result) -> int:
        """How many parts of the same measurement the run has."""
        return sum(held.key == result.key for held in self.results)

    def add(self, result: Result) -> Result:
        """Append a result, complete with run, time, commit and machine, and return it."""
        whole = dataclasses.replace(
            result, run=self.run, time=now(), commit=self._commit, machine=result.machine or self._machine
        )
        line = json.dumps(dataclasses.asdict(whole), ensure_ascii=False, sort_keys=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(end - 1)
                if stream.read(1) != b"\n":  # a line that a crash cut off
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(f"{line}\n".encode())
        self.results.append(whole)
        return whole


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
