"""The artifact's contract: ``manifest.json`` as frozen dataclasses, and the checks made before files are trusted."""

import dataclasses
import hashlib
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ArtifactError

FORMAT_VERSION = 2
"""From 2 on a graph that isn't packed may give pooled vectors instead of hidden states (``runtime.pooling``), too."""
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 1_000_000
"""Bytes of a manifest; those of an export have a few thousand."""
TOKENIZER = "tokenizer.json"

Kind = Literal["embedder", "reranker"]
Output = Literal["last_hidden_state", "token_weights", "vocabulary_weights", "token_vectors", "logits"]
Pooling = Literal["cls", "mean", "last_token", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the artifact, as it was written."""

    sha256: str
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """How close a variant comes to the original on the verification texts; None for what the model doesn't give."""

    texts: int
    """How many texts, or pairs of a reranker."""
    cosine_mean: float | None = None
    """Of dense vectors."""
    cosine_min: float | None = None
    colbert_cosine_mean: float | None = None
    """Of the vectors of all tokens."""
    colbert_cosine_min: float | None = None
    sparse_cosine_mean: float | None = None
    """Of texts' lexical weights."""
    sparse_max_diff: float | None = None
    """Greatest difference of a lexical weight; a token that only one side has counts with its weight."""
    score_max_diff: float | None = None
    """Greatest difference of a raw logit."""
    score_spearman: float | None = None
    """Rank correlation of the scores."""
    score_top_agreement: float | None = None
    """Share of a query's five best passages that are among its five best here too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """A graph takes many texts in one row of tokens, and gives pooled vectors (``runtime.packing``)."""

    padding_id: int | None = None
    """The token that takes no place in its text, where the model has one (RoBERTa and its kin)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One precision of the model: its graph, where it may run, and how true it is to the original."""

    file: str
    data: str | None = None
    """The file of the weights, where the graph's can't hold them (protobuf's limit is 2 GB)."""
    opset: int
    providers: tuple[str, ...]
    cpu_safety: str
    """Which CPUs give the promised numbers (u8×s8 products saturate on x86 without VNNI, limited weights do not)."""
    quantization: str | None = None
    fp32_linears: tuple[str, ...] = ()
    """Outputs of the linears that int8 leaves in fp32."""
    packing: Packing | None = None
    """How texts are packed; None where those of equal length run together."""
    verified_on: str = "CPUExecutionProvider"
    """The execution provider that gave the parity figures."""
    parity: Parity | None
    """None only while an export is still verifying."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the checkpoint came from, with the SHA-256 of every file that was read."""

    id: str
    origin: Literal["hub", "folder", "package"]
    revision: str | None
    checksums: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know about a model; it has no per-model code."""

    format_version: int
    name: str
    kind: Kind
    architecture: str
    source: Source
    dim: int
    """Length of a vector; 1 of a reranker, whose score is one number."""
    max_length: int
    """Tokens, special tokens included; longer texts are cut on the right."""
    outputs: tuple[Output, ...]
    """What the graph gives."""
    pooling: Pooling | None
    normalize: bool
    prompts: dict[str, str]
    """Text put before a query (``query``) or a passage (``passage``)."""
    variants: dict[str, Variant]
    files: dict[str, File]
    vocab: int | None = None
    """Token ids that the graph knows. A CPU finds others itself, CUDA takes them for a word without a meaning."""
    skipped_ids: tuple[int, ...] = ()
    """Special tokens that have no lexical weight."""
    tools: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


def real_folder(path: str | Path) -> Path:
    """A folder's path, by which it is found wherever the process or a link to it goes.

    Raises:
        ArtifactError: It can't be a folder's.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:  # the working directory is gone, or there is a NUL in it
        raise ArtifactError(f"{str(path)!a}: no folder ({error}); pass another") from None


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        ArtifactError: The folder or file is missing, isn't a manifest, or needs a newer runtime.
    """
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("not a file")
        with path.open("rb") as stream:
            text = stream.read(MANIFEST_LIMIT + 1)
        if len(text) > MANIFEST_LIMIT:
            raise ArtifactError(f"{path}: more than {MANIFEST_LIMIT:,} bytes are no manifest; export the model again")
        data = json.loads(text.decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"{path}: no such file; export the model first (python -m export --model NAME --out {folder})"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: can't be read ({error}); export the model again") from None
    if not isinstance(data, dict) or not isinstance(version := data.get("format_version"), int):
        raise ArtifactError(f"{path}: not a bge-onnx manifest; export the model again")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: format {version} is newer than the {FORMAT_VERSION} this runtime reads; upgrade bge-onnx"
        )
    if version < 1:
        raise ArtifactError(f"{path}: format {version} never was; export the model again")
    try:
        manifest: Manifest = _parse(Manifest, data, "")
        _check(manifest)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {' '.join(str(error).split())}; export the model again") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuse what the types allow but no export writes, above all a path that leaves the folder."""
    graphs = [
        name for variant in manifest.variants.values() for name in (variant.file, variant.data) if name is not None
    ]
    for name in (*manifest.files, *graphs):
        if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\:"):
            raise ArtifactError(f"{name!r} is not a plain file name")
        if name not in manifest.files:
            raise ArtifactError(f"{name} has no checksum")
    if TOKENIZER not in manifest.files:
        raise ArtifactError(f"{TOKENIZER} has no checksum")
    for name in (manifest.name, *manifest.variants):  # error messages and logs show them
        if not name.isprintable():
            raise ArtifactError(f"the name {name!r} can't be printed")
    if ("logits" in manifest.outputs) != (manifest.kind == "reranker") or not manifest.outputs:
        raise ArtifactError(f"kind {manifest.kind} with the outputs {', '.join(manifest.outputs) or 'none'}")
    if "last_hidden_state" in manifest.outputs and manifest.pooling is None:
        raise ArtifactError("an embedder without pooling")
    if manifest.dim < 1 or manifest.max_length < 1 or not manifest.variants:
        raise ArtifactError("dim, max_length and variants must not be empty")


def verify_artifact(folder: str | Path) -> Manifest:
    """Check every file of an artifact against its manifest, and return that.

    Raises:
        ArtifactError: A file is missing or was altered since the export.
    """
    manifest = load_manifest(Path(folder))
    for name in manifest.files:
        check_file(Path(folder), manifest, name)
    return manifest


def check_file(folder: Path, manifest: Manifest, name: str, digest: bool = True) -> Path:
    """The path of a file that lies in the folder and is what the manifest says.

    Args:
        folder: The artifact.
        manifest: Its manifest.
        name: The file's.
        digest: Compare not only the size but the SHA-256.

    Raises:
        ArtifactError: It is missing, a link out of the folder, or was altered since the export.
    """
    path, expected = folder / name, manifest.files[name]
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()) or not path.is_file():
            raise ArtifactError(
                f"{path}: is not a file of the folder; copy the artifact whole (snapshot_download needs local_dir)"
            )
        size = path.stat().st_size
        found = describe_file(path) if digest and size == expected.size else None
    except (OSError, RuntimeError) as error:  # until Python 3.13, links in a circle are a RuntimeError
        raise ArtifactError(f"{path}: {getattr(error, 'strerror', error)}; export the model again") from None
    if size != expected.size:
        raise ArtifactError(f"{path}: {size} bytes where the manifest says {expected.size}; export the model again")
    if found and found.sha256 != expected.sha256:
        raise ArtifactError(f"{path}: its SHA-256 is not the manifest's, so it was altered; export the model again")
    return path


def describe_file(path: Path) -> File:
    """Size and SHA-256 of a file, for the manifest."""
    with path.open("rb") as stream:
        return File(sha256=hashlib.file_digest(stream, "sha256").hexdigest(), size=path.stat().st_size)


def _parse(kind: Any, value: Any, where: str) -> Any:  # noqa: ANN401
    """``value``, as JSON gave it, in the type that a dataclass field declares."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(value, dict), where, "an object", value)
        hints = typing.get_type_hints(kind)
        fields = {f.name: f for f in dataclasses.fields(kind)}
        if unknown := sorted(value.keys() - fields):
            raise ArtifactError(f"unknown entry {where}{unknown[0]}")
        for name, f in fields.items():
            if name not in value and f.default is f.default_factory is dataclasses.MISSING:
                raise ArtifactError(f"{where}{name} is missing")
        return kind(**{name: _parse(hints[name], entry, f"{where}{name}.") for name, entry in value.items()})  # type: ignore[operator]
    if origin is Literal:
        _expect(value in arguments, where, " or ".join(map(repr, arguments)), value)
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _parse(arguments[0], value, where)
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        return tuple(_parse(arguments[0], entry, f"{where}{i}.") for i, entry in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), where, "an object", value)
        return {key: _parse(arguments[1], entry, f"{where}{key}.") for key, entry in value.items()}
    if kind is float:
        _expect(type(value) in (int, float), where, "a number", value)
        try:
            return float(value)
        except OverflowError:
            raise ArtifactError(
                f"{where.rstrip('.')} should be a number, not one of {len(str(value))} digits"
            ) from None
    _expect(type(value) is kind, where, kind.__name__, value)
    return value


def _expect(fits: bool, where: str, wanted: str, value: object) -> None:
    if not fits:
        raise ArtifactError(f"{where.rstrip('.') or 'the manifest'} should be {wanted}, not {str(value)[:60]!r}")
