"""What is measured: one model, as our artifact and as the checkpoint that it was made of."""

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from benchmarks import engines as modules
from benchmarks.client import HOME, REQUIREMENTS
from benchmarks.engines import ENGINES, plain
from benchmarks.engines.openvino import CALIBRATION
from benchmarks.errors import EngineError
from benchmarks.worker import Job, Kind, versions
from export.errors import ExportError
from export.source import resolve_source
from runtime.manifest import Manifest, describe_file, load_manifest
from runtime.session import provider_of

BASELINE = ("sentence_transformers", "fp32")
"""What every ratio is to: what most people use."""


@dataclass(frozen=True, slots=True)
class Subject:
    """One model in both its forms."""

    artifact: Path
    manifest: Manifest
    checkpoint: Path | None
    """None where the peers can't be measured."""

    @property
    def kind(self) -> Kind:
        """Of its jobs: an embedder that has no dense vectors (SPLADE) is another kind."""
        return "sparse_embedder" if self.manifest.outputs == ("vocabulary_weights",) else self.manifest.kind


def open_subject(artifact: Path, checkpoint: str | None = None) -> Subject:
    """An artifact, and the checkpoint it was made of.

    Args:
        artifact: What ``python -m export`` wrote.
        checkpoint: A folder, or anything else that ``python -m export --model`` takes; by default the artifact's name,
            if that is in the catalog, can be had, and has the weights it was made of.

    Raises:
        ArtifactError: It is no artifact.
        ExportError: The named checkpoint can't be had.
    """
    manifest = load_manifest(artifact)
    try:
        found = resolve_source(checkpoint or manifest.name)
    except ExportError:
        if checkpoint:
            raise
        return Subject(artifact.resolve(), manifest, None)
    made_of = manifest.source.checksums
    same = checkpoint or all(made_of.get(path.name) == describe_file(path).sha256 for path in found.weight_files())
    return Subject(artifact.resolve(), manifest, found.folder if same else None)


def plan_jobs(
    subject: Subject, engines: str | None = None, *, threads: int, device: Literal["cpu", "cuda"] = "cpu"
) -> list[Job]:
    """A job for each engine and variant that suits a model, the baseline first.

    Args:
        subject: The model.
        engines: Comma-separated names, each one of an engine or ``engine:variant``; by default all.
        threads: CPU threads of each.
        device: Where they run; engines that can't run there are left out.

    Raises:
        EngineError: There is no such engine or variant.
    """
    jobs = [_job(subject, engine, variant, threads, device) for engine, variant in _chosen(subject, engines, device)]
    return sorted(jobs, key=lambda job: (job.engine, job.variant) != BASELINE)


def _variants(engine: str, kind: str, device: str) -> tuple[str, ...]:
    module = import_module(f"benchmarks.engines.{engine}")
    if not hasattr(module, kind):
        return ()
    variants: tuple[str, ...] = module.VARIANTS.get(kind, ()) if device == "cpu" else getattr(module, "CUDA", ())
    return variants


def _chosen(subject: Subject, engines: str | None, device: str) -> list[tuple[str, str]]:
    kind = subject.kind
    offered = {engine: _variants(engine, kind, device) for engine in (ENGINES if subject.checkpoint else ENGINES[:1])}
    ours = subject.manifest.variants.items()
    offered["ours"] = tuple(name for name, variant in ours if provider_of(device) in variant.providers)
    if engines is None:
        return [(engine, variant) for engine, variants in offered.items() for variant in variants]
    chosen = []
    for name in engines.split(","):
        engine, _, variant = name.strip().partition(":")
        fitting = [held for held in offered.get(engine, ()) if held == (variant or held)]
        if not fitting:
            known = ", ".join(f"{e}:{v}" for e, variants in offered.items() for v in variants)
            raise EngineError(f"--engines {name}: is none of {known}, the engines for this {kind.replace('_', ' ')}")
        chosen += [(engine, held) for held in fitting]
    return chosen


def _job(subject: Subject, engine: str, variant: str, threads: int, device: Literal["cpu", "cuda"]) -> Job:
    manifest = subject.manifest
    source, stock = subject.artifact, ""
    if engine != "ours" and subject.checkpoint:
        models = HOME / "models"
        conversion = import_module(f"benchmarks.engines.{engine}").PREPARED.get(variant)
        made_of = f"{manifest.name}-{_fingerprint(subject.checkpoint, engine)}"
        source = models / made_of / f"{engine}-{conversion}" if conversion else subject.checkpoint
        stock = str(models / f"{manifest.name}-{_fingerprint(subject.checkpoint, 'optimum')}" / "optimum-fp32")
    return Job(
        engine=engine,
        variant=variant,
        kind=subject.kind,
        source=str(source),
        checkpoint=str(subject.checkpoint or ""),
        stock=stock,
        pooling=manifest.pooling or "",
        normalize=manifest.normalize,
        dim=manifest.dim,
        max_length=manifest.max_length,
        threads=threads,
        device=device,
    )


def _fingerprint(checkpoint: Path, engine: str) -> str:
    """Another one whenever the checkpoint changes or what converts it, tools included: no stale one is measured."""
    stats = [(path.name, path.stat()) for path in sorted(checkpoint.iterdir()) if path.is_file()]
    made_of = hashlib.sha256(repr([(name, s.st_size, s.st_mtime_ns) for name, s in stats]).encode())
    for name in ("optimum", engine):  # every conversion starts from optimum's export
        own = REQUIREMENTS / f"{name}.txt"
        tools = (
            own.read_text("utf-8") if own.exists() else versions(import_module(f"benchmarks.engines.{name}").PACKAGES)
        )
        made_of.update(repr(tools).encode() + (Path(modules.__file__).parent / f"{name}.py").read_bytes())
    made_of.update(Path(plain.__file__).read_bytes() + CALIBRATION.read_bytes())
    return made_of.hexdigest()[:12]


def size_mb(job: Job) -> float:
    """Megabytes (10⁶ bytes) on disk of the weights that a job loads: what would have to be shipped."""
    if job.engine == "ours":
        manifest = load_manifest(Path(job.source))
        variant = manifest.variants[job.variant]
        names = [variant.file, *([variant.data] if variant.data else [])]
        return sum(manifest.files[name].size for name in names) / 1e6
    folder = Path(job.source)
    if job.source == job.checkpoint:  # what torch loads of it: a single format, and none of the graphs beside it
        found = [*folder.rglob("*.safetensors")] or [*folder.rglob("pytorch_model*.bin")]
    else:
        found = [path for pattern in ("*.onnx", "*.onnx_data", "*.bin") for path in folder.rglob(pattern)]
    return sum(path.stat().st_size for path in found) / 1e6
