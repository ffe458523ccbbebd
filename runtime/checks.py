"""What callers may pass: every public method checks here before it does any work."""

import contextlib
import itertools
import math
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call may ask for, so that nobody can keep a service busy for long; None is no limit."""

    texts: int | None = None
    """Texts, or pairs of a reranker."""
    characters: int | None = None
    """Of one text; a query and its passage count apart."""

    def __post_init__(self) -> None:
        """Raise ``InputError`` on a limit below 1."""
        for name in ("texts", "characters"):
            if getattr(self, name) is not None:
                check_count(f"limits.{name}", getattr(self, name), sys.maxsize - 1)


NO_LIMITS = Limits()


def check_texts(texts: str | Sequence[str], first: int = 0, limits: Limits = NO_LIMITS) -> Sequence[str]:
    """The texts as a list of str.

    Args:
        texts: One text or several.
        first: The first one's number in error messages.
        limits: What they must keep to.

    Raises:
        InputError: Not a str or a list of str, or beyond a limit; names the first such text.
    """
    checked = [texts] if isinstance(texts, str) else _several("texts", texts, limits)
    for i, text in enumerate(checked, first):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {type(text).__name__}, not str; convert or drop it")
        _check_length("text", i, text, limits)
    return checked


def _several(what: str, items: Iterable[Any], limits: Limits) -> list[Any]:
    most = None if limits.texts is None else limits.texts + 1
    checked = list(itertools.islice(check_iterable(items), most))
    if len(checked) == most:
        raise InputError(f"there are more than {limits.texts} {what}, this service's limit; send them in several calls")
    return checked


def _check_length(what: str, i: int, text: str, limits: Limits) -> None:
    if limits.characters is not None and len(text) > limits.characters:
        raise InputError(
            f"{what} {i} has {len(text)} characters where this service takes {limits.characters}; split it"
        )


def check_pairs(
    pairs: Sequence[tuple[str, str]] | tuple[str, str], limits: Limits = NO_LIMITS
) -> tuple[list[tuple[str, str]], bool]:
    """The pairs as a list of tuples of two str, and whether it was one pair rather than a list.

    Raises:
        InputError: Not a list of pairs of str, or beyond a limit; names the first such pair.
    """
    single = isinstance(pairs, list | tuple) and len(pairs) == 2 and all(isinstance(text, str) for text in pairs)
    checked = []
    for i, pair in enumerate([pairs] if single else _several("pairs", pairs, limits)):
        both: tuple[Any, ...] = ()
        if not isinstance(pair, str | bytes | Mapping | Set):
            with contextlib.suppress(TypeError):  # nothing to iterate over
                both = tuple(pair)
        if len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise InputError(f"pair {i} is {str(pair)[:60]!r}; pass (query, passage), both str")
        for text in both:
            _check_length("pair", i, text, limits)
        checked.append((both[0], both[1]))
    return checked, single


def check_weights(name: str, weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights of the three ways to score, float64 ``(3,)``.

    Raises:
        InputError: They aren't three finite numbers, none negative and not all 0.
    """
    several = isinstance(weights, Sequence) or (isinstance(weights, np.ndarray) and weights.ndim == 1)
    numbers = several and all(isinstance(weight, Real) for weight in weights)
    if not numbers or len(weights) != 3 or not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
        raise InputError(f"{name} is {weights!r}; pass three numbers, none negative and not all 0")
    return np.array(weights, float)


def check_iterable(texts: Iterable[Any]) -> Iterator[Any]:
    """An iterator over texts.

    Raises:
        InputError: Not an iterable, or bytes, a mapping or a set.
    """
    try:
        if isinstance(texts, bytes | Mapping | set | frozenset):  # a set has no order
            raise TypeError
        return iter(texts)
    except TypeError:
        raise InputError(f"texts is {type(texts).__name__}; pass a str or a list of str") from None


def check_count(name: str, value: int, most: int) -> int:
    """A whole number from 1 to ``most``.

    Raises:
        InputError: It isn't one.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count <= most:
        raise InputError(f"{name} is {value!r}; it must be a whole number from 1 to {most}")
    return count
