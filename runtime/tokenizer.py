"""Text to token ids with Hugging Face's ``tokenizers``, special tokens and truncation included."""

import logging
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from runtime.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)


class Tokenizer:
    """A fast tokenizer that knows its special tokens as a prefix and a suffix of ids.

    Texts are tokenised whole and cut here, so that a caller can see how long they were. The ids equal those of
    ``transformers``' fast tokenizer with ``truncation=True`` on the right.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        """Load ``tokenizer.json``.

        Raises:
            ArtifactError: The file is not a tokenizer, or its special tokens alone exceed ``max_length``.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(f"{path}: not a tokenizer ({error}); export the model again") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        probe = self._tokenizer.encode("a")
        body = [i for i, sequence in enumerate(probe.sequence_ids) if sequence == 0] or [len(probe.ids)]
        self._prefix, self._suffix = probe.ids[: body[0]], probe.ids[body[-1] + 1 :]
        self.max_length = max_length
        self._room = max_length - len(self._prefix) - len(self._suffix)
        if self._room < 1:
            raise ArtifactError(f"{path}: max_length {max_length} leaves no room beside the special tokens")

    def encode(self, texts: Sequence[str], truncate: bool = True, first: int = 0) -> list[list[int]]:
        """Token ids of each text, special tokens included, at most ``max_length`` each.

        Texts that are cut are counted in one log warning per call.

        Args:
            texts: Texts.
            truncate: False raises on a text that is too long instead of cutting it.
            first: The first text's number in error messages.

        Raises:
            InputError: A text is too long and ``truncate`` is False, or isn't valid Unicode.
        """
        bodies = self._bodies(texts, first)
        too_long = [i for i, body in enumerate(bodies) if len(body) > self._room]
        if too_long and not truncate:
            tokens = len(bodies[too_long[0]]) + self.max_length - self._room
            raise InputError(
                f"text {first + too_long[0]} has {tokens} tokens where the model takes {self.max_length}; "
                "split it, or pass truncate=True to keep its beginning"
            )
        if too_long:
            logger.warning(
                "%d of %d texts had more than %d tokens and were cut", len(too_long), len(texts), self.max_length
            )
        return [self._prefix + body[: self._room] + self._suffix for body in bodies]

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any truncation, special tokens included."""
        return [len(body) + self.max_length - self._room for body in self._bodies(texts, 0)]

    def _bodies(self, texts: Sequence[str], first: int) -> list[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, ValueError):
            for i, text in enumerate(texts, first):
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise InputError(
                        f"text {i} has a lone surrogate at character {error.start}, which is not valid Unicode; "
                        "clean it with text.encode('utf-8', 'replace').decode()"
                    ) from None
            raise
        return [encoding.ids for encoding in encodings]
