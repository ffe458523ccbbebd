"""What an embedder and a reranker share: an artifact opened on a device, and the one way to run its graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.checks import check_count
from runtime.errors import ArtifactError
from runtime.manifest import TOKENIZER, Kind, Manifest, load_manifest, verify_file
from runtime.session import PROVIDERS, Session, choose_device, create_session, run_session, usable_cpus
from runtime.tokenizer import Tokenizer

MAX_TOKENS_PER_RUN = 8192
"""Bounds memory: one run never holds more tokens, unless a single text does."""

PREFERENCE = {"cpu": ("int8", "fp32"), "cuda": ("fp16", "fp32")}
"""What ``variant="auto"`` takes, first to last. Every variant has proven its parity at export."""

MAX_THREADS = 1024


@dataclass(frozen=True, slots=True)
class Model:
    """An artifact with one of its variants loaded."""

    manifest: Manifest
    variant: str
    tokenizer: Tokenizer
    session: Session

    def run(
        self, outputs: Sequence[str], ids: NDArray[np.int64], token_types: NDArray[np.int64] | None = None
    ) -> list[Any]:
        """``run_session`` on its graph."""
        return run_session(self.session, outputs, ids, token_types)


def open_model(path: str | Path, kind: Kind, variant: str, device: str, threads: int | None) -> Model:
    """Open an artifact folder.

    Args:
        path: The folder that ``python -m export`` wrote.
        kind: What it has to hold.
        variant: ``fp32``, ``int8``, … or ``auto``: the fastest that the artifact has for the device.
        device: ``cpu``, ``cuda`` or ``auto``.
        threads: CPU threads for a run; by default all that the process may use.

    Raises:
        ArtifactError: The folder is not a whole, unaltered artifact of the kind, or lacks the variant.
        InputError: ``threads`` is no sensible number.
        ProviderError: The device can't be had.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    if manifest.kind != kind:
        raise ArtifactError(f"{folder}: holds a {manifest.kind}, no {kind}; open it with {manifest.kind.title()}")
    if threads is not None:
        threads = check_count("threads", threads, MAX_THREADS)
    chosen = choose_device(device)
    variant = _choose_variant(folder, manifest, variant, chosen)
    tokenizer = Tokenizer(verify_file(folder, manifest, TOKENIZER), manifest.max_length)
    loaded = manifest.variants[variant]
    if loaded.data:
        verify_file(folder, manifest, loaded.data)
    graph = verify_file(folder, manifest, loaded.file)
    return Model(manifest, variant, tokenizer, create_session(graph, chosen, threads or usable_cpus()))


def _choose_variant(folder: Path, manifest: Manifest, variant: str, device: str) -> str:
    fitting = [name for name, v in manifest.variants.items() if PROVIDERS[device] in v.providers]
    if variant == "auto":
        for name in (*PREFERENCE[device], *fitting):
            if name in fitting:
                return name
    elif variant in fitting:
        return variant
    wanted = PREFERENCE[device][-1] if variant == "auto" else variant
    raise ArtifactError(
        f"{folder}: no variant {variant!r} for {device}, only {', '.join(manifest.variants)}; "
        f"export it with --variants {wanted}"
    )
