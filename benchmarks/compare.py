"""Two results files side by side: what got worse, or better, by more than the spread of both."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import Figure, Result

SENSES = {
    "ratio": 1,
    "spearman": 1,
    "nDCG@10": 1,
    "R@100": 1,
    "MRR@10": 1,
    "main score": 1,
    "peak MB": -1,
    "disk MB": -1,
}
"""What is compared, and whether more of it is better. Times aren't: machines differ, and the ratios say it better."""
TOLERANCES = {"ratio": 0.03, "peak MB": 0.1}
"""Of the old median, beyond the spread of both: of figures that come out differently each time."""
TOLERANCE = 0.001
"""Of figures that repeat."""
FEW, FEW_TOLERANCE = 6, 0.25
"""A ratio of fewer runs: of three and three, one in ten pairs won't overlap though nothing has changed."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of one engine in two results files."""

    what: str
    figure: str
    old: Figure
    new: Figure

    @property
    def verdict(self) -> int:
        """1 if it is better beyond the spread of both and a tolerance, -1 if worse, else 0."""
        few = self.figure == "ratio" and min(self.old.runs, self.new.runs) < FEW
        slack = (FEW_TOLERANCE if few else TOLERANCES.get(self.figure, TOLERANCE)) * abs(self.old.median)
        risen = self.new.low > self.old.high + slack
        fallen = self.new.high < self.old.low - slack
        return SENSES[self.figure] * (risen - fallen)


def compare(old: Sequence[Result], new: Sequence[Result]) -> list[Change]:
    """The figures that both have, but for growth's, which is the course of a curve from a single round.

    Args:
        old: The newest results of one file.
        new: Those of another.
    """
    before = {result.key: result for result in old}
    return [
        Change(_name(result), name, before[result.key].figures[name], figure)
        for result in new
        if result.key in before and result.benchmark != "growth"
        for name, figure in result.figures.items()
        if name in SENSES and name in before[result.key].figures
    ]


def lacking(old: Sequence[Result], new: Sequence[Result]) -> list[str]:
    """Figures that would be compared but that the new file lacks, though it has the same measurement of some engine."""
    after = {result.key: result.figures for result in new}
    made = {dataclasses.replace(result, engine="", variant="").key for result in new if result.benchmark != "growth"}
    return [
        f"{_name(result)}: {name}"
        for result in old
        if dataclasses.replace(result, engine="", variant="").key in made
        for name in result.figures
        if name in SENSES and name not in after.get(result.key, {})
    ]


def _name(result: Result) -> str:
    settings = " ".join(f"{name}={value}" for name, value in result.settings.items())
    return f"{result.model} {result.engine} {result.variant} {result.benchmark} {settings}"
