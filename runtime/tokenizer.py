"""Text to token ids with Hugging Face's ``tokenizers``, special tokens and truncation included."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from runtime.errors import ArtifactError, InputError
from runtime.metrics import Hook, ignore

logger = logging.getLogger(__name__)

CHARACTERS = 250_000
"""Tokenised at once, or one longer text: each takes some hundred bytes until its text is cut."""

_forked = False


def _note_fork() -> None:
    """A forked child has none of the threads that tokenizers started in its parent, and would wait for them."""
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class Tokenizer:
    """A fast tokenizer that knows its special tokens as ids around a text, or around and between a pair.

    Texts are tokenised whole and cut here, so that a caller can see how long they were. The ids equal those of
    ``transformers``' fast tokenizer with ``truncation=True`` on the right.
    """

    def __init__(self, path: Path, max_length: int, hook: Hook = ignore, parallel: bool = True) -> None:
        """Load ``tokenizer.json``; the hook gets how many texts are ``truncated``.

        With ``parallel``, several texts are tokenised at once, on all CPUs.

        Raises:
            ArtifactError: The file is not a tokenizer, or its special tokens alone exceed ``max_length``.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer ({error}); export the model again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._hook, self._parallel = hook, parallel
        self._single, self._pair = self._template("a"), self._template("a", "a")
        self.max_length = max_length
        self._room = max_length - len(self._single.wrap([]))
        self._pair_room = max_length - len(self._pair.wrap([], []))
        if self._room < 1:
            raise ArtifactError(f"{path}: max_length {max_length} leaves no room beside the special tokens")

    def _template(self, *texts: str) -> "_Template":
        probe = self._tokenizer.encode(*texts)
        special: list[list[int]] = [[] for _ in range(len(texts) + 1)]
        special_types: list[list[int]] = [[] for _ in range(len(texts) + 1)]
        types = [0] * len(texts)
        seen = 0
        for token, kind, sequence in zip(probe.ids, probe.type_ids, probe.sequence_ids, strict=True):
            if sequence is None:
                special[seen].append(token)
                special_types[seen].append(kind)
            else:
                seen = sequence + 1
                types[sequence] = kind
        return _Template(special, special_types, types)

    def encode(
        self, texts: Sequence[str], truncate: bool = True, first: int = 0, cut: list[int] | None = None
    ) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most ``max_length`` each.

        Texts that are cut are counted in one log warning.

        Args:
            texts: Texts.
            truncate: False raises on a text that is too long instead of cutting it.
            first: The first text's number in error messages.
            cut: Gets how many are cut, instead of the log, from who will call ``warn`` for several calls.

        Raises:
            InputError: A text is too long and ``truncate`` is False, or isn't valid Unicode.
        """
        encoded, long = [], {}
        before, after = map(len, self._single.special)
        for i, ids in enumerate(self._ids(texts, lambda i: f"text {first + i}", special=True), first):
            if len(ids) > self.max_length:
                long[i] = len(ids)
                ids = self._single.wrap(ids[before : len(ids) - after][: self._room])
            encoded.append(ids)
        self._report("text", long, len(texts), truncate, cut)
        return encoded

    def encode_chunks(self, texts: Sequence[str], first: int = 0) -> list[list[list[int]]]:
        """Token ids of each text in pieces of at most ``max_length``, each with the special tokens around it."""
        return [
            [self._single.wrap(body[start : start + self._room]) for start in range(0, max(1, len(body)), self._room)]
            for body in self._ids(texts, lambda i: f"text {first + i}")
        ]

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], truncate: bool = True, first: int = 0, cut: list[int] | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids and token types of each pair, special tokens included, at most ``max_length`` each.

        As FlagEmbedding's rerankers: a query keeps at most three quarters of ``max_length``, its passage what is left.

        Args:
            pairs: Queries and passages; each different text is tokenised once.
            truncate: False raises on a pair that is too long instead of cutting it.
            first: The first pair's number in error messages.
            cut: As in ``encode``.

        Raises:
            ArtifactError: The special tokens alone exceed ``max_length``.
            InputError: A pair is too long and ``truncate`` is False, or isn't valid Unicode.
        """
        if self._pair_room < 1:
            raise ArtifactError(f"max_length {self.max_length} leaves no room beside a pair's special tokens")
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))

        def first_pair(i: int) -> str:
            return f"pair {next(n for n, pair in enumerate(pairs, first) if texts[i] in pair)}"

        bodies, lengths = {}, {}
        for text, body in zip(texts, self._ids(texts, first_pair), strict=True):
            bodies[text], lengths[text] = body[: self._pair_room], len(body)
        encoded, long, special = [], {}, self.max_length - self._pair_room
        for i, (query, passage) in enumerate(pairs, first):
            a = bodies[query][: min(self.max_length * 3 // 4, self._pair_room)]
            b = bodies[passage][: self._pair_room - len(a)]
            if len(a) < lengths[query] or len(b) < lengths[passage]:
                long[i] = lengths[query] + lengths[passage] + special
            encoded.append((self._pair.wrap(a, b), self._pair.wrap_types(len(a), len(b))))
        self._report("pair", long, len(pairs), truncate, cut)
        return encoded

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any truncation, special tokens included."""
        return [len(body) + self.max_length - self._room for body in self._ids(texts)]

    def beginning(self, ids: Sequence[int]) -> str:
        """About what a text begins with, for an error that names it."""
        return str(self._tokenizer.decode(list(ids[:40])))[:60]

    def warn(self, what: str, cut: int, total: int) -> None:
        """Log that so many of all texts or pairs were cut, if any were."""
        if cut:
            logger.warning("%d of %d %ss had more than %d tokens and were cut", cut, total, what, self.max_length)

    def _report(self, what: str, long: dict[int, int], total: int, truncate: bool, cut: list[int] | None) -> None:
        """Warn of what is cut, or refuse it; ``long`` holds the tokens of each text or pair that is too long."""
        if long and not truncate:
            i, tokens = next(iter(long.items()))
            share = f" (a query {self.max_length * 3 // 4} of them)" if what == "pair" else ""
            raise InputError(
                f"{what} {i} has {tokens} tokens where the model takes {self.max_length}{share}; "
                "split it, or pass truncate=True to keep its beginning"
            )
        if long:
            self._hook("truncated", len(long))
        if cut is None:
            self.warn(what, len(long), total)
        else:
            cut.append(len(long))

    def _ids(
        self, texts: Sequence[str], name: Callable[[int], str] = "text {}".format, *, special: bool = False
    ) -> Iterator[list[int]]:
        """Token ids of each text, whole; ``name`` is what an error calls a text by its place."""
        done = 0
        for some in _pieces(texts):
            try:
                if self._parallel and not _forked:
                    encodings = self._tokenizer.encode_batch_fast(some, add_special_tokens=special)
                else:
                    encodings = [self._tokenizer.encode(text, add_special_tokens=special) for text in some]
            except (TypeError, ValueError):
                for i, text in enumerate(some, done):
                    try:
                        text.encode("utf-8")
                    except UnicodeEncodeError as error:
                        raise InputError(
                            f"{name(i)} has a lone surrogate ({text[error.start]!a}), which is not valid Unicode; "
                            "clean it with text.encode('utf-8', 'replace').decode()"
                        ) from None
                raise
            yield from (encoding.ids for encoding in encodings)
            del encodings  # or they would be held beside the next
            done += len(some)


def _pieces(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, in order, as many at once as may be tokenised together."""
    piece: list[str] = []
    held = 0
    for text in texts:
        if piece and held + len(text) > CHARACTERS:
            yield piece
            piece, held = [], 0
        piece.append(text)
        held += len(text)
    if piece:
        yield piece


@dataclass(frozen=True, slots=True)
class _Template:
    """Special tokens before, between and after texts, and the token types that go with them."""

    special: list[list[int]]
    special_types: list[list[int]]
    types: list[int]

    def wrap(self, *bodies: list[int]) -> list[int]:
        ids = list(self.special[0])
        for body, special in zip(bodies, self.special[1:], strict=True):
            ids += body + special
        return ids

    def wrap_types(self, *lengths: int) -> list[int]:
        types = list(self.special_types[0])
        for length, kind, special in zip(lengths, self.types, self.special_types[1:], strict=True):
            types += [kind] * length + special
        return types
