"""The embedder: texts in, vectors out."""

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from runtime.batching import plan_batches
from runtime.errors import ArtifactError, InputError
from runtime.manifest import TOKENIZER, load_manifest, verify_file
from runtime.pooling import Floats, normalize, pool
from runtime.session import PROVIDERS, choose_device, create_session, usable_cpus
from runtime.tokenizer import Tokenizer

MAX_TOKENS_PER_RUN = 8192
"""Bounds memory: one run never holds more tokens, unless a single text does."""

PREFERENCE = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What ``variant="auto"`` takes, first to last. Every variant has proven its parity at export."""


class Embedder:
    """An exported embedder. Safe to use from many threads at once.

    The names and results are those of FlagEmbedding's ``FlagModel``.

    Attributes:
        manifest: What the export recorded about the model.
        variant: The variant that was loaded, such as ``int8``.
        dim: Length of a vector.
        max_length: Tokens that are read of a text, special tokens included.
    """

    def __init__(
        self, path: str | Path, variant: str = "auto", device: str = "auto", threads: int | None = None
    ) -> None:
        """Load an artifact folder.

        Args:
            path: The folder that ``python -m export`` wrote.
            variant: ``fp32``, ``int8``, … or ``auto``: the fastest that the artifact has for the device.
            device: ``cpu``, ``cuda`` or ``auto``.
            threads: CPU threads for a run; by default all that the process may use.

        Raises:
            ArtifactError: The folder is not a whole, unaltered artifact of an embedder, or lacks the variant.
            ProviderError: The device can't be had.
        """
        folder = Path(path)
        self.manifest = load_manifest(folder)
        if self.manifest.kind != "embedder" or self.manifest.pooling is None:
            raise ArtifactError(f"{folder}: holds a {self.manifest.kind}, not an embedder; open it with Reranker")
        if threads is not None:
            threads = check_count("threads", threads, 1024)
        chosen = choose_device(device)
        self.variant = self._choose_variant(folder, variant, chosen)
        self.dim = self.manifest.dim
        self.max_length = self.manifest.max_length
        self._pooling = self.manifest.pooling
        self._tokenizer = Tokenizer(verify_file(folder, self.manifest, TOKENIZER), self.max_length)
        graph = verify_file(folder, self.manifest, self.manifest.variants[self.variant].file)
        self._session = create_session(graph, chosen, threads or usable_cpus())
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        if (width := self._session.get_outputs()[0].shape[-1]) != self.dim and isinstance(width, int):
            raise ArtifactError(f"{graph}: gives vectors of {width} dimensions, not {self.dim}; export the model again")

    def _choose_variant(self, folder: Path, variant: str, device: str) -> str:
        fitting = [name for name, v in self.manifest.variants.items() if PROVIDERS[device] in v.providers]
        if variant == "auto":
            for name in (*PREFERENCE[device], *fitting):
                if name in fitting:
                    return name
        elif variant in fitting:
            return variant
        wanted = PREFERENCE[device][-1] if variant == "auto" else variant
        raise ArtifactError(
            f"{folder}: no variant {variant!r} for {device}, only {', '.join(self.manifest.variants)}; "
            f"export it with --variants {wanted}"
        )

    def encode(self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True) -> Floats:
        """Embed texts as they are, without a prompt.

        A text's vector is the same to the bit whatever it is batched with.

        Args:
            texts: One text or several.
            truncate_dim: Keep this many leading dimensions (Matryoshka models), normalised again if the model is.
            truncate: Cut texts beyond ``max_length`` (logged as one warning, visible with ``count_tokens``); False
                raises instead.

        Returns:
            float32 ``(dim,)`` for a str, ``(n, dim)`` for a list, ``(0, dim)`` for an empty one; of unit length if the
            model normalises.

        Raises:
            InputError: Something that isn't a valid text, too long with ``truncate=False``, or a bad ``truncate_dim``.
        """
        return self._encode(texts, "", truncate_dim, truncate)

    def encode_queries(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``encode`` with the model's query instruction before each text."""
        return self._encode(texts, self.manifest.prompts.get("query", ""), truncate_dim, truncate)

    def encode_corpus(
        self, texts: str | Sequence[str], *, truncate_dim: int | None = None, truncate: bool = True
    ) -> Floats:
        """``encode`` with the model's passage prompt (mostly none) before each text."""
        return self._encode(texts, self.manifest.prompts.get("passage", ""), truncate_dim, truncate)

    encode_query = encode_queries
    """sentence-transformers' name."""
    encode_document = encode_corpus
    """sentence-transformers' name."""

    def encode_iter(
        self,
        texts: Iterable[str],
        *,
        chunk_size: int = 1024,
        truncate_dim: int | None = None,
        truncate: bool = True,
    ) -> Iterator[Floats]:
        """Embed a stream of any length in constant memory.

        Args:
            texts: Texts, read ``chunk_size`` at a time.
            chunk_size: Texts that are held and grouped by length at once.
            truncate_dim: As in ``encode``.
            truncate: As in ``encode``.

        Yields:
            float32 ``(dim,)`` for each text, in the order of the input.

        Raises:
            InputError: As ``encode``; or ``texts`` is a single str, or ``chunk_size`` is below 1.
        """
        if isinstance(texts, str):
            raise InputError("encode_iter takes an iterable of texts, not one str; pass [text] or use encode")
        chunk_size = check_count("chunk_size", chunk_size, sys.maxsize)
        stream = check_iterable(texts)
        done = 0
        while chunk := list(itertools.islice(stream, chunk_size)):
            yield from self._encode(chunk, "", truncate_dim, truncate, first=done)
            done += len(chunk)

    def count_tokens(self, texts: str | Sequence[str]) -> int | list[int]:
        """Tokens of a text (int) or of each of several (list), special tokens included, before any truncation.

        Raises:
            InputError: Something that isn't a valid text.
        """
        counts = self._tokenizer.count(check_texts(texts))
        return counts[0] if isinstance(texts, str) else counts

    def _encode(
        self, texts: str | Sequence[str], prompt: str, truncate_dim: int | None, truncate: bool, first: int = 0
    ) -> Floats:
        if truncate_dim is not None:
            truncate_dim = check_count("truncate_dim", truncate_dim, self.dim)
        checked = check_texts(texts, first)
        ids = self._tokenizer.encode([prompt + text for text in checked] if prompt else checked, truncate, first)
        vectors = np.zeros((len(ids), truncate_dim or self.dim), np.float32)
        for batch in plan_batches([len(row) for row in ids], MAX_TOKENS_PER_RUN):
            if not ids[batch[0]]:  # an empty text, of a tokenizer without special tokens
                continue
            pooled = pool(self._run(np.array([ids[i] for i in batch], np.int64)), self._pooling)[:, :truncate_dim]
            vectors[batch] = normalize(pooled) if self.manifest.normalize else pooled
        return vectors[0] if isinstance(texts, str) else vectors

    def _run(self, ids: np.ndarray) -> Floats:
        """Last hidden state, float32 ``(n, tokens, dim)``; traced graphs also want a mask, of ones."""
        feeds = {name: ids if name == "input_ids" else _FILL[name](ids) for name in self._inputs}
        hidden: Floats = self._session.run(None, feeds)[0]
        return hidden


_FILL = {"attention_mask": np.ones_like, "token_type_ids": np.zeros_like}


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


def check_iterable(texts: Iterable[str]) -> Iterator[str]:
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
