"""ONNX Runtime sessions: the provider that was asked for, and threads that the process may really use."""

import ctypes
import importlib.metadata
import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ArtifactError, ProviderError, RunError

# From 1.29 on, onnxruntime reports its use to Microsoft unless this is set before it is imported. That would break the
# promise to make no call of our own, and its threads make a forked process hang when it exits.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime
except ImportError as missing:
    raise ProviderError(
        f"onnxruntime can't be imported ({missing}); install bge-onnx[cpu] or, for CUDA, bge-onnx[gpu]"
    ) from None

logger = logging.getLogger(__name__)

Session: TypeAlias = onnxruntime.InferenceSession
Device = Literal["auto", "cpu", "cuda"]
SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
"""All that are open in this process."""
OPENING = threading.RLock()
"""Held while a session is made, and by a fork: a child would wait for ever for locks that onnxruntime has meanwhile."""
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _abandon() -> None:
    """Keep a forked child from ever freeing its parent's sessions, at exit either: it would wait for their threads."""
    OPENING.release()
    for session in list(SESSIONS):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=OPENING.acquire, after_in_parent=OPENING.release, after_in_child=_abandon)


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, capped by its cgroups' quotas (not the machine's count)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([cpus, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Whole CPUs that the process's cgroup may use, and those that each one around it may, where there is a quota.

    A container may see the names of its host's cgroups but only its own folder, at the top.
    """
    try:
        lines = os.fsdecode(CGROUP.read_bytes()).splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2
            top, files = CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            top, files = CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        own = Path(name.strip("/"))
        for group in (own, *own.parents):
            try:
                quota, period = " ".join((top / group / file).read_text() for file in files).split()
                if int(quota) > 0:
                    yield int(quota) // int(period)
            except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
                continue


def choose_device(device: str) -> Literal["cpu", "cuda"]:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where the installed ONNX Runtime has it.

    Raises:
        ProviderError: Another word, or CUDA without an onnxruntime that has it.
    """
    available = PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    match device:
        case "auto":
            return "cuda" if available else "cpu"
        case "cpu":
            return "cpu"
        case "cuda" if available:
            return "cuda"
        case "cuda":
            raise ProviderError(f"device 'cuda': {_why_no_cuda()}")
        case _:
            raise ProviderError(f"device {device!r} is unknown; it is 'auto', 'cpu' or 'cuda'")


def _why_no_cuda() -> str:
    installed = []
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            installed.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if len(installed) == 2:
        return (
            f"{' and '.join(installed)} are both installed and overwrite each other; "
            "run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install bge-onnx[gpu]"
        )
    return (
        f"the installed {installed[0] if installed else 'onnxruntime'} has no CUDA provider; "
        "run: pip uninstall -y onnxruntime, then pip install bge-onnx[gpu]"
    )


def run_session(
    session: Session, outputs: Sequence[str], ids: NDArray[np.int64], token_types: NDArray[np.int64] | None = None
) -> list[Any]:
    """Run texts of equal length, which need no padding, and compute no more than the outputs need.

    Args:
        session: The graph, which gets those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that it takes.
        outputs: Names of its outputs.
        ids: Token ids, int64 ``(n, tokens)``.
        token_types: 0 in a query and 1 in its passage, int64 ``(n, tokens)``; all 0 by default.

    Returns:
        Each output, float32 ``(n, …)``.

    Raises:
        ArtifactError: The graph doesn't know a token id.
        RunError: ONNX Runtime failed, most often for want of memory.
    """
    feeds = {}
    for name in (entry.name for entry in session.get_inputs()):
        match name:
            case "input_ids":
                feeds[name] = ids
            case "attention_mask":
                feeds[name] = np.ones_like(ids)
            case "token_type_ids":
                feeds[name] = np.zeros_like(ids) if token_types is None else token_types
    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    try:
        held: list[Any] = session.run(list(outputs), feeds, options)
    except Exception as error:  # onnxruntime's errors share no public base
        cause = str(error).splitlines()[0][:300]
        if "out of data bounds" in cause:
            raise ArtifactError(
                f"a token id up to {ids.max()} is not in the graph's vocabulary ({cause}); tokenizer.json and the "
                "graph don't belong together, export the model again"
            ) from None
        raise RunError(
            f"onnxruntime failed on {len(ids)} texts of {ids.shape[1]} tokens ({cause}); free some memory or pass "
            "shorter texts"
        ) from None
    return held


def create_session(path: Path, device: Literal["cpu", "cuda"], threads: int) -> Session:
    """A session on exactly the device that was asked for.

    Args:
        path: The ONNX file.
        device: As ``choose_device`` gave it.
        threads: Intra-op threads.

    Raises:
        ArtifactError: The file is not a graph that this ONNX Runtime can load.
        ProviderError: ONNX Runtime fell back to another provider.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # By default threads spin on for long after a run: a trickle of queries then costs five times its work.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    # It plans memory for each shape that comes, and lengths are many: 40 MB more for MiniLM, and no speed.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    if device == "cuda":
        onnxruntime.preload_dlls()
    providers = [PROVIDERS[device]] if device == "cpu" else [PROVIDERS["cuda"], PROVIDERS["cpu"]]
    try:
        with OPENING:
            session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's errors share no public base
        cause = str(error).splitlines()[0]
        raise ArtifactError(
            f"{path}: onnxruntime {onnxruntime.__version__} can't load it ({cause}); upgrade it or export again"
        ) from None
    if session.get_providers()[0] != PROVIDERS[device]:
        raise ProviderError(
            f"device {device!r}: onnxruntime {onnxruntime.__version__} fell back to {session.get_providers()[0]}; its "
            "CUDA or cuDNN libraries don't load: run pip install 'onnxruntime-gpu[cuda,cudnn]', or pass device='cpu'"
        )
    SESSIONS.add(session)
    return session
