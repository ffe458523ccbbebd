"""The export, readable on one screen: resolve → build or trace → quantize → verify → publish."""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import importlib.metadata
import logging
import os
import re
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.calibrate import calibration_pairs, calibration_texts, collect
from export.card import model_card
from export.catalog import NO_PROMPTS, read_json, sentence_config
from export.errors import ExportError, first_line
from export.families import Family, find_family, weight_finder
from export.graph import Graph, load_graph
from export.packed import on_any_provider
from export.precision import Cosines, cosines_of, spend_precision
from export.quantize import Quantized, find_linears, quantize_graph, quantize_linears
from export.source import Checkpoint, check_end, load_tokenizer, resolve_source
from export.trace import trace
from export.verify import Answers, long_text, reference_answers, special_ids, verification_texts, verify_variant
from runtime.errors import ProviderError
from runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    Manifest,
    Packing,
    Pooling,
    Variant,
    describe_file,
)
from runtime.pooling import Floats
from runtime.session import provider_of
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

VARIANTS = ("fp32", "int8", "fp16")
BY_DEFAULT = ("fp32", "int8")
CPU, CUDA = provider_of("cpu"), provider_of("cuda")
PROVIDERS = {"fp32": (CPU, CUDA), "int8": (CPU,), "fp16": (CUDA,)}
"""Where each variant runs, unless the family's fp32 isn't for CUDA."""
TOOLS = ("bge-onnx", "torch", "transformers", "optimum-onnx", "onnx", "onnxruntime", "tokenizers", "numpy")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of what a process may write, that more space mends."""
CALIBRATION_TOKENS = 512
"""Most tokens read of a calibration text."""

Encoder = tuple[Family, Any]
"""A family, and the configuration that its emitters take."""
Progress = Callable[[str, float], None]
"""Told what is being done, and the share of the whole export that is behind it."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A published artifact."""

    path: Path
    manifest: Manifest


def export_model(
    model: str,
    out: Path | None = None,
    variants: Sequence[str] = BY_DEFAULT,
    *,
    revision: str | None = None,
    pooling: Pooling | None = None,
    prompts: Mapping[str, str] = NO_PROMPTS,
    calibration: Path | None = None,
    min_cosine: float | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress = lambda step, share: None,
) -> Artifact:
    """Export a model to an artifact folder, verified against the original before it appears.

    Args:
        model: A short name of ``models.yaml``, a local checkpoint folder, or a hub id.
        out: The folder to make; ``artifacts/<name>`` by default.
        variants: Any of ``fp32``, ``int8`` (for CPUs) and ``fp16`` (for CUDA).
        revision: A branch, tag or commit of the hub.
        pooling: How an embedder pools, where its checkpoint doesn't say or is wrong.
        prompts: What goes before a ``query`` or a ``passage``, likewise; an empty one is none.
        calibration: A file with one text a line, for int8; the project's own set by default.
        min_cosine: The cosine to the original that the int8 vector of each verification text must reach; as few linears
            as that takes stay in fp32.
        allow_pickle: Accept a checkpoint that has only ``pytorch_model.bin``.
        force: Replace an existing folder, atomically.
        progress: Called as the work goes on.

    Raises:
        ExportError: The model, its weights or the output folder won't do; nothing is left behind.
        ParityError: A variant isn't close enough to the original; nothing is left behind.
    """
    variants = list(dict.fromkeys(variants))
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ExportError(f"variant {unknown[0]!r} is unknown; it is any of {', '.join(VARIANTS)}")
    if not variants:
        raise ExportError(f"no variant to export; name any of {', '.join(VARIANTS)}")
    if calibration and "int8" not in variants:
        raise ExportError(
            f"{calibration}: calibrates int8, which isn't asked for; leave out --calibration, or add int8 to --variants"
        )
    if unknown := sorted(prompts.keys() - {"query", "passage"}):
        raise ExportError(f"prompt {unknown[0]!r} is unknown; it is 'query' or 'passage'")
    if min_cosine is not None and not ("int8" in variants and 0 < min_cosine < 1):
        raise ExportError(f"a least cosine of {min_cosine} makes no sense; it is for int8, above 0 and below 1")
    progress("finding the checkpoint", 0.0)
    checkpoint = resolve_source(model, revision=revision, pooling=pooling, prompts=prompts, allow_pickle=allow_pickle)
    if min_cosine is not None and "last_hidden_state" not in checkpoint.spec.outputs:
        raise ExportError(f"{checkpoint.id}: gives no dense vectors that a least cosine could hold for")
    out = (out or Path("artifacts") / checkpoint.spec.name).absolute()
    texts = calibration_texts(calibration) if "int8" in variants else []
    with staging_folder(out, force) as stage, named(checkpoint):
        progress("reading the tokenizer", 0.02)
        tokenizer = write_tokenizer(checkpoint, stage / TOKENIZER)
        progress("building the graph", 0.06)
        encoder = find_encoder(checkpoint)
        packed, packing = build_fp16(checkpoint, encoder) if "fp16" in variants else (None, None)
        graph = build_graph(checkpoint, encoder)
        progress("asking transformers", 0.15)
        questions = verification_texts()
        questions = [*questions, long_text(questions, checkpoint.spec.max_length or 0, tokenizer)]
        reference = reference_answers(checkpoint, questions)
        described = {}
        if "fp32" in variants:
            described["fp32"] = write_variant("fp32", graph, stage)
            if encoder and not encoder[0].cuda:
                described["fp32"] = dataclasses.replace(described["fp32"], providers=(CPU,))
        if "int8" in variants:
            progress("calibrating int8", 0.4)
            rounding = lambda share: progress("rounding int8", 0.5 + share * 0.2)  # noqa: E731
            quantized = quantize(graph, checkpoint, stage, texts, rounding)
            if min_cosine is not None:
                choosing = lambda share: progress("choosing what stays in fp32", 0.7 + share * 0.1)  # noqa: E731
                measure = cosines_to(reference.dense, checkpoint, stage, questions)
                quantized = spend_precision(graph, quantized, measure, len(questions), min_cosine, choosing)
            described["int8"] = write_variant(
                "int8",
                quantize_graph(graph, quantized),
                stage,
                quantization=f"static W8A8, smoothed, GPTQ, per channel, calibrated on {len(texts)} texts",
                fp32_linears=tuple(x.output for x in find_linears(graph) if x.input not in quantized),
            )
        if packed:
            described["fp16"] = write_variant("fp16", packed, stage, packing=packing)
        manifest = write_manifest(checkpoint, stage, described, special_ids(tokenizer))
        proven = {}
        for i, variant in enumerate(variants):
            progress(f"verifying {variant}", 0.85 + 0.1 * i / len(variants))
            proven[variant] = verify(stage, manifest, variant, reference, questions)
        progress("writing the artifact", 0.97)
        manifest = dataclasses.replace(manifest, variants=proven)
        (stage / MANIFEST).write_text(manifest.to_json(), "utf-8")
        (stage / "README.md").write_text(model_card(manifest), "utf-8")
    return Artifact(out, manifest)


@contextlib.contextmanager
def named(checkpoint: Checkpoint) -> Iterator[None]:
    """Puts the checkpoint's name before the errors of steps that know only its graph or its weights."""
    try:
        yield
    except ExportError as error:
        if str(error).startswith((checkpoint.id, str(checkpoint.folder))):
            raise
        raise type(error)(f"{checkpoint.id}: {error}") from error


def find_encoder(checkpoint: Checkpoint) -> Encoder | None:
    """The family that builds a checkpoint's graph, with its configuration; None of one that has to be traced."""
    config = checkpoint.config
    family = find_family(config.take("model_type", str, ""))
    try:
        encoder = family.config(config) if family else None
    except KeyError as missing:
        raise ExportError(f"{checkpoint.id}: config.json has no {missing}; save it whole with transformers") from None
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # as a value of the wrong type raises
        raise ExportError(f"{checkpoint.id}: config.json doesn't fit: {error}; mend it in a local copy") from None
    return (family, encoder) if family and encoder else None


def build_graph(checkpoint: Checkpoint, encoder: Encoder | None) -> Graph:
    """The fp32 graph, by the family's builder where there is one, else traced."""
    outputs = checkpoint.spec.outputs
    if encoder is None:
        return trace(checkpoint.folder, checkpoint.config.take("model_type", str, ""), outputs)
    family, config = encoder
    return family.build(config, weight_finder(family, checkpoint.weights()), outputs, checkpoint.spec.pooling)


def build_fp16(checkpoint: Checkpoint, encoder: Encoder | None) -> tuple[Graph, Packing]:
    """The packed graph for CUDA, and what the runtime has to know of it."""
    pack = encoder[0].pack if encoder else None
    if encoder is None or pack is None:
        raise ExportError(
            f"{checkpoint.id}: fp16 isn't built for {checkpoint.spec.architecture!r} yet; leave it out with --variants "
            f"fp32,int8{'' if encoder and not encoder[0].cuda else ' (fp32 runs on CUDA too)'}"
        )
    spec, (family, config) = checkpoint.spec, encoder
    graph = pack(config, weight_finder(family, checkpoint.weights()), spec.outputs, spec.pooling)
    return graph, Packing(padding_id=config.pad)


def quantize(
    graph: Graph, checkpoint: Checkpoint, stage: Path, texts: Sequence[str], progress: Callable[[float], None]
) -> dict[str, Quantized]:
    """The linears as int8, calibrated on texts."""
    max_length = min(CALIBRATION_TOKENS, checkpoint.spec.max_length or CALIBRATION_TOKENS)
    tokenizer = Tokenizer(stage / TOKENIZER, max_length)
    if checkpoint.spec.kind == "reranker":
        encoded = tokenizer.encode_pairs(calibration_pairs(texts))
    else:
        encoded = [(ids, [0] * len(ids)) for ids in tokenizer.encode(texts)]
    inputs = dict.fromkeys(linear.input for linear in find_linears(graph))
    return quantize_linears(graph, collect(graph, list(inputs), encoded), progress)


def cosines_to(reference: Sequence[Floats], checkpoint: Checkpoint, stage: Path, texts: Sequence[str]) -> Cosines:
    """What measures how close the vectors of texts that a graph gives are to the original's."""
    assert checkpoint.spec.max_length
    assert checkpoint.spec.pooling
    ids = Tokenizer(stage / TOKENIZER, checkpoint.spec.max_length).encode(texts)
    return cosines_of(ids, checkpoint.spec.pooling, reference)


def write_tokenizer(checkpoint: Checkpoint, path: Path) -> "transformers.PreTrainedTokenizerFast":
    """Save the checkpoint's fast tokenizer, converted if it has only a vocabulary, and return it.

    Raises:
        ExportError: transformers can't make a fast tokenizer of it, or it isn't the one that the model goes with.
    """
    import transformers  # noqa: F401  which may not be there, whatever the tokenizer's files are

    try:
        tokenizer = load_tokenizer(checkpoint)
    except Exception as error:  # transformers raises all sorts
        raise ExportError(
            f"{checkpoint.id}: no fast tokenizer can be made of its files ({first_line(error)}); add its tokenizer.json"
        ) from None
    backend = tokenizer.backend_tokenizer
    rows, ids = checkpoint.config.take("vocab_size", int), backend.get_vocab(with_added_tokens=True).values()
    if rows and max(ids, default=0) >= rows:
        raise ExportError(
            f"{checkpoint.id}: its tokenizer has ids up to {max(ids)} where the model has {rows} words; they don't "
            "belong together, download the checkpoint again"
        )
    if checkpoint.spec.pooling == "last_token":
        check_end(checkpoint, backend)
    settings = sentence_config(checkpoint.folder)
    upper = " ".join(string.ascii_uppercase)
    if settings.take("do_lower_case", bool) and backend.encode(upper).ids != backend.encode(upper.lower()).ids:
        raise ExportError(
            f"{settings.path}: do_lower_case is true, which its tokenizer doesn't do and can't be exported yet; "
            "without it the vectors would be wrong"
        )
    if tokenizer.truncation_side == "left":
        raise ExportError(
            f"{checkpoint.id}: its tokenizer cuts texts on the left (truncation_side), the runtime only on the right, "
            "so long texts would have other vectors; if right was meant, mend tokenizer_config.json in a local copy"
        )
    saved = backend.to_str()
    if checkpoint.spec.kind == "reranker" and "token_type_ids" not in tokenizer.model_input_names:
        saved = re.sub(r'"type_id":\s*\d+', '"type_id":0', saved)  # as the model takes those that it isn't given
    path.write_text(saved, "utf-8")
    return tokenizer


def write_variant(name: str, graph: Graph, stage: Path, **described: Any) -> Variant:  # noqa: ANN401
    """Save a graph and describe it; its parity is still unknown."""
    data = graph.save(stage / f"model.{name}.onnx")
    return Variant(
        file=f"model.{name}.onnx",
        data=data.name if data else None,
        opset=graph.opsets[""],
        providers=PROVIDERS[name],
        cpu_safety="any: weights can't saturate on x86 without VNNI" if name == "int8" else "any",
        parity=None,
        **described,
    )


def verify(stage: Path, manifest: Manifest, name: str, reference: Answers, texts: list[str]) -> Variant:
    """A variant with its parity, measured on a GPU where it is for one, or else by its stand-in."""
    variant = manifest.variants[name]
    if CPU in variant.providers:
        return dataclasses.replace(variant, parity=verify_variant(stage, name, reference, texts), verified_on=CPU)
    try:
        parity = verify_variant(stage, name, reference, texts, device="cuda")
        return dataclasses.replace(variant, parity=parity, verified_on=CUDA)
    except ProviderError as error:
        logger.warning("%s is verified on the CPU, by its stand-in: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="bge-onnx-") as scratch:
        parity = verify_variant(write_stand_in(stage, manifest, name, Path(scratch)), name, reference, texts)
    return dataclasses.replace(variant, parity=parity, verified_on=CPU)


def write_stand_in(artifact: Path, manifest: Manifest, name: str, folder: Path) -> Path:
    """Make a folder an artifact with one packed variant, in the form that runs on a CPU too."""
    variant = manifest.variants[name]
    shutil.copy(artifact / TOKENIZER, folder)
    data = on_any_provider(load_graph(artifact / variant.file)).save(folder / variant.file)
    here = dataclasses.replace(variant, data=data.name if data else None, providers=PROVIDERS["fp32"])
    files = {path.name: describe_file(path) for path in folder.iterdir()}
    stand_in = dataclasses.replace(manifest, variants={name: here}, files=files)
    (folder / MANIFEST).write_text(stand_in.to_json(), "utf-8")
    return folder


def write_manifest(
    checkpoint: Checkpoint, stage: Path, variants: dict[str, Variant], special: Sequence[int]
) -> Manifest:
    """Describe what lies in the staging folder; the parity figures are still missing."""
    spec = checkpoint.spec
    assert spec.max_length
    for licence in filter(Path.is_file, checkpoint.folder.glob("LICENSE*")):
        shutil.copy(licence, stage / licence.name)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name=spec.name,
        kind=spec.kind,
        architecture=spec.architecture or "",
        source=checkpoint.provenance(),
        dim=spec.dim or 0,
        max_length=spec.max_length,
        outputs=spec.outputs,
        vocab=checkpoint.config.take("vocab_size", int),
        skipped_ids=tuple(special) if "token_weights" in spec.outputs else (),
        pooling=spec.pooling,
        normalize=spec.normalize,
        prompts=spec.prompts,
        variants=variants,
        files={path.name: describe_file(path) for path in sorted(stage.iterdir())},
        tools=_tool_versions(),
    )
    (stage / MANIFEST).write_text(manifest.to_json(), "utf-8")
    return manifest


def _tool_versions() -> dict[str, str]:
    versions = {}
    for tool in TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    return versions


@contextlib.contextmanager
def staging_folder(out: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its name when the block ends well, and vanishes when it doesn't.

    A link is followed: what it leads to is replaced.

    Raises:
        ExportError: ``out`` exists and ``force`` is off, or the disk is full or can't be written.
    """
    stage, made = None, []
    try:
        if out.is_symlink() and not out.exists():
            raise ExportError(f"{out}: a link that leads nowhere; remove it, or choose another --out")
        out = out.resolve()
        _check_free(out, force)
        made = [folder for folder in out.parents if not folder.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        stage.chmod(0o755)
        yield stage
        with _alone(out.parent):  # another export may have made it meanwhile
            _check_free(out, force)
            if out.exists():
                _exchange(stage, out)  # the old artifact is now in the staging folder, which goes
            else:
                stage.rename(out)
    except OSError as error:
        if error.errno is None:  # transformers raises bare OSErrors that have nothing to do with a disk
            raise
        raise ExportError(
            f"{error.filename or out}: {(error.strerror or str(error)).lower()}; nothing was written, "
            f"{'free some space' if error.errno in FULL else 'mend that'} or choose another --out or TMPDIR"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        with contextlib.suppress(OSError):  # the deepest first, up to one that isn't empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds off other exports to a folder, where the file system can lock it."""
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _check_free(out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise ExportError(f"{out}: exists already; pass --force to replace it, or --out for another folder")
    if out.exists() and not _replaceable(out):
        raise ExportError(f"{out}: not an artifact, so --force won't replace it; choose another --out")


def _replaceable(out: Path) -> bool:
    """Whether a folder is empty or an artifact, of whatever format."""
    if not out.is_dir() or not any(out.iterdir()):
        return out.is_dir()
    try:
        return "format_version" in read_json(out / MANIFEST)
    except ExportError:
        return False


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders, in one step where the system can (Linux ``renameat2``), so that ``b`` is never absent."""
    libc = ctypes.CDLL(None, use_errno=True)
    at_cwd, exchange = -100, 2
    if hasattr(libc, "renameat2") and not libc.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange):
        return
    aside = Path(f"{a}.old")
    b.rename(aside)
    try:
        a.rename(b)
    except BaseException:
        if not b.exists():
            aside.rename(b)
        raise
    aside.rename(a)
