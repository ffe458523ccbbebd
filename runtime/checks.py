"""What callers may pass: every public method checks here before it does any work."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError


def check_texts(texts: str | Sequence[str], first: int = 0) -> Sequence[str]:
    """The texts as a list of str.

    Args:
        texts: One text or several.
        first: The first one's number in error messages.

    Raises:
        InputError: Not a str or a list of str; names the first that isn't.
    """
    if isinstance(texts, str):
        return [texts]
    checked = list(check_iterable(texts))
    for i, text in enumerate(checked, first):
        if not isinstance(text, str):
            raise InputError(f"text {i} is {type(text).__name__}, not str; convert or drop it")
    return checked


def check_pairs(pairs: Sequence[tuple[str, str]] | tuple[str, str]) -> tuple[list[tuple[str, str]], bool]:
    """The pairs as a list of tuples of two str, and whether it was one pair rather than a list.

    Raises:
        InputError: Not a list of pairs of str; names the first that isn't.
    """
    single = isinstance(pairs, list | tuple) and len(pairs) == 2 and all(isinstance(text, str) for text in pairs)
    checked = []
    for i, pair in enumerate(check_iterable([pairs] if single else pairs)):
        ordered = isinstance(pair, Iterable) and not isinstance(pair, str | bytes | Mapping | Set)
        both = tuple(pair) if ordered else ()
        if len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise InputError(f"pair {i} is {str(pair)[:60]!r}; pass (query, passage), both str")
        checked.append((both[0], both[1]))
    return checked, single


def check_weights(name: str, weights: Sequence[float]) -> NDArray[np.float64]:
    """Weights of the three ways to score, float64 ``(3,)``.

    Raises:
        InputError: They aren't three numbers of positive sum.
    """
    numbers = isinstance(weights, Sequence | np.ndarray) and all(isinstance(weight, Real) for weight in weights)
    if not numbers or len(weights) != 3 or not sum(weights) > 0:
        raise InputError(f"{name} is {weights!r}; pass three numbers of positive sum")
    return np.array(weights, float)


def check_iterable(texts: Iterable[Any]) -> Iterator[Any]:
    """An iterator over texts.

    Raises:
        InputError: Not an iterable, or bytes.
    """
    try:
        if isinstance(texts, bytes):
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
