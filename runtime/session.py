"""ONNX Runtime sessions: the provider that was asked for, and threads that the process may really use."""

import contextlib
import ctypes
import functools
import io
import logging
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ArtifactError, ProviderError, RunError

# From 1.29 on, onnxruntime reports its use to Microsoft unless this is set before it is imported. That would break the
# promise to make no call of our own, and its threads make a forked process hang when it exits.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime
    from onnxruntime import InferenceSession  # which isn't in what is left of one that was half removed
except ImportError as missing:
    raise ProviderError(
        f"onnxruntime can't be imported ({missing}); install bge-onnx[cpu] or, for CUDA, bge-onnx[gpu] (if it is there "
        "already, run before: pip uninstall -y onnxruntime onnxruntime-gpu)"
    ) from None

logger = logging.getLogger(__name__)

Session: TypeAlias = InferenceSession
SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
"""All that are open in this process."""
OPENING = threading.RLock()
"""Held while a session is made, and by a fork: a child would wait for ever for locks that onnxruntime has meanwhile."""
SAID: dict[str, object] = {}
"""Warnings that aren't repeated."""
CGROUP = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CUDA_OPTIONS = {
    "enable_skip_layer_norm_strict_mode": "1",  # sums in float32, as onnxruntime 1.28 and later always do
    "use_tf32": "0",  # fp32 means fp32
}
"""Options of ONNX Runtime's CUDA provider."""
NO_MEMORY = r"(?i)^(?!.*CUDA failure (?!2\b)\d).*(alloc|memory(?! access))"
"""What ONNX Runtime says for want of memory. An illegal access is something else, also where it comes to light in
``cudaMalloc``; CUDA's number for want of memory is 2."""


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


def _affinities(threads: int) -> str:
    """CPUs of a session's threads, but of the first, which is the caller's: as ONNX Runtime takes them, from 1 up.

    Each has its own if together they may use all. Otherwise there is nothing to take, since nobody knows which are
    free. Linux often wakes a thread on the CPU of the thread that wakes it, and that one spins until it is done.
    """
    allowed = getattr(os, "sched_getaffinity", None)
    cpus = sorted(allowed(0)) if allowed else []
    return ";".join(str(cpu + 1) for cpu in cpus[1:]) if len(cpus) == threads else ""


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


def choose_devices(device: str | Sequence[str]) -> tuple[str, ...]:
    """The devices to run on, such as ``("cpu",)`` or ``("cuda:0", "cuda:1")``.

    Args:
        device: ``cpu``, ``cuda`` (the first GPU), ``cuda:1``, …, a list of GPUs, or ``auto``: the first GPU where the
            installed ONNX Runtime has CUDA, else the CPU.

    Raises:
        ProviderError: Something else, or CUDA without an onnxruntime that has it.
    """
    available = PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    if device == "auto":
        if not available and len(_installed()) == 2:
            say_once(f"running on the CPU: {_why_no_cuda()}")
        return ("cuda:0",) if available else ("cpu",)
    named = [device] if isinstance(device, str) or not isinstance(device, Sequence) else list(device)
    if named == ["cpu"]:
        return ("cpu",)
    if not named or not all(isinstance(name, str) and re.fullmatch(r"cuda(:\d{1,3})?", name) for name in named):
        raise ProviderError(f"device {device!r} is unknown; it is 'auto', 'cpu', 'cuda', 'cuda:1', … or a list of GPUs")
    if not available:
        raise ProviderError(f"device {device!r}: {_why_no_cuda()}")
    return tuple(dict.fromkeys("cuda:0" if name == "cuda" else name for name in named))


def say_once(message: str) -> None:
    """Log a warning, but never again in this process."""
    first = object()
    if SAID.setdefault(message, first) is first:  # in one step, of which another thread can't come between
        logger.warning(message)


def provider_of(device: str) -> str:
    """The execution provider of one of ``choose_devices``."""
    return PROVIDERS[device.partition(":")[0]]


def _why_no_cuda() -> str:
    """Why CUDA isn't available, and the cure."""
    installed = _installed()
    if len(installed) == 2:
        return (
            f"{' and '.join(installed)} are both installed and overwrite each other; "
            "run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'bge-onnx[gpu]'"
        )
    return (
        f"the installed {installed[0] if installed else 'onnxruntime'} has no CUDA provider; "
        "run: pip uninstall -y onnxruntime, then pip install 'bge-onnx[gpu]'"
    )


def _installed() -> list[str]:
    """The onnxruntime packages that are installed, with their versions."""
    from importlib.metadata import PackageNotFoundError, version  # 30 ms that few need

    found = []
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def _cuda_fails(device: str, cause: str) -> ProviderError:
    """The error of a CUDA provider that is there and can't run."""
    from onnxruntime.capi import build_and_package_info as build

    both = "; onnxruntime and onnxruntime-gpu are both installed, remove both first" if len(_installed()) == 2 else ""
    return ProviderError(
        f"device {device!r}: onnxruntime {onnxruntime.__version__} can't use it ({cause}); it needs an NVIDIA driver, "
        f"CUDA {getattr(build, 'cuda_version', '')} and cuDNN 9: run pip install 'onnxruntime-gpu[cuda,cudnn]' "
        f"(an older one for an older driver){both}; or pass device='cpu'"
    )


@functools.cache
def _preload_cuda() -> str:
    """Load the CUDA libraries that pip installed, once; what is missing, or nothing."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            return f"no NVIDIA driver: {error}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:  # it says what it misses in no other way
        onnxruntime.preload_dlls()
    return next(iter(printed.getvalue().splitlines()), "")


class OutOfMemoryError(RunError):
    """A run that lacked memory: fewer texts at once may succeed."""


class Gate:
    """Lets runs through side by side, or one alone."""

    def __init__(self) -> None:
        """Nobody is inside."""
        # Entered itself, since a Condition is entered in Python, which an interrupt can cut in two.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._inside: set[object] = set()
        self._alone: object = None

    @contextlib.contextmanager
    def entered(self, *, alone: bool = False) -> Iterator[None]:
        """Inside, once nobody is there alone; with ``alone``, once everybody has left, and while others wait.

        Who is interrupted while waiting keeps nobody out.
        """
        me = object()
        try:
            with self._lock:
                self._changed.wait_for(lambda: self._alone is None)
                if alone:
                    self._alone = me
                    self._changed.wait_for(lambda: not self._inside)
                else:
                    self._inside.add(me)
            yield
        finally:
            with self._lock:
                self._inside.discard(me)
                if self._alone is me:
                    self._alone = None
                self._changed.notify_all()


def run_session(
    session: Session,
    outputs: Sequence[str],
    ids: NDArray[np.int64],
    token_types: NDArray[np.int64] | None = None,
    *,
    shrink: bool = False,
) -> list[Any]:
    """Run texts of equal length, which need no padding.

    Args:
        session: The graph, which gets those of ``input_ids``, ``attention_mask`` and ``token_type_ids`` that it takes.
        outputs: Names of its outputs.
        ids: Token ids, int64 ``(n, tokens)``.
        token_types: 0 in a query and 1 in its passage, int64 ``(n, tokens)``; all 0 by default.
        shrink: As in ``run_feeds``.

    Returns:
        Each output, float32 ``(n, …)``.

    Raises:
        ArtifactError: The graph doesn't know a token id.
        RunError: ONNX Runtime failed; ``OutOfMemoryError``, for want of memory.
    """
    taken, feeds = {entry.name for entry in session.get_inputs()}, {"input_ids": ids}
    if "attention_mask" in taken:
        feeds["attention_mask"] = np.ones_like(ids)
    if "token_type_ids" in taken:
        feeds["token_type_ids"] = np.zeros_like(ids) if token_types is None else token_types
    return run_feeds(session, outputs, feeds, f"{len(ids)} texts of {ids.shape[1]} tokens", shrink=shrink)


def run_feeds(
    session: Session, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], what: str, *, shrink: bool = False
) -> list[Any]:
    """Run a graph.

    Args:
        session: The graph.
        outputs: Names of its outputs.
        feeds: Its inputs, and perhaps others that it hasn't.
        what: Describes them in error messages.
        shrink: Give memory back afterwards that the session holds in store, whether the run succeeds or fails. On a GPU
            a run that fails leaves some in store for its own stream alone.

    Returns:
        Each output.

    Raises:
        ArtifactError: The graph doesn't know a token id.
        RunError: ONNX Runtime failed; ``OutOfMemoryError``, for want of memory.
    """
    taken = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
    options = None
    if shrink:
        options = onnxruntime.RunOptions()
        cuda = session.get_provider_options().get(PROVIDERS["cuda"])
        arena = f"gpu:{cuda['device_id']}" if cuda else "cpu:0"
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", arena)
    try:
        held: list[Any] = session.run(list(outputs), taken, options)
    except Exception as error:  # onnxruntime's errors share no public base
        cause = _cause(error)
        if "out of data bounds" in cause:
            raise ArtifactError(
                f"a token id up to {feeds['input_ids'].max()} is not in the graph's vocabulary ({cause}); "
                "tokenizer.json and the graph don't belong together, export the model again"
            ) from None
        failed = f"onnxruntime failed on {what} ({cause})"
        if re.search(NO_MEMORY, cause):
            raise OutOfMemoryError(f"{failed}; free some memory or pass shorter texts") from None
        cure = "start the process anew" if "CUDA" in cause else "export the model again, or report it"
        raise RunError(f"{failed}; {cure}") from None
    return held


def _cause(error: Exception, path: str = "") -> str:
    """An error's first line, without the path of the file that it is about."""
    said = str(error).replace(path, "").strip()
    return (said or type(error).__name__).splitlines()[0][:300]


def create_session(path: Path, device: str, threads: int) -> Session:
    """A session on exactly the device that was asked for.

    Args:
        path: The ONNX file.
        device: One of ``choose_devices``.
        threads: Intra-op threads.

    Raises:
        ArtifactError: The file is not a graph that this ONNX Runtime can load.
        OutOfMemoryError: There isn't enough memory.
        ProviderError: The device can't be had.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # By default threads spin on for long after a run: a trickle of queries then costs five times its work.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    # It plans memory for each shape that comes, and lengths are many: 40 MB more for MiniLM, and no speed.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    kind, _, number = device.partition(":")
    if kind == "cpu" and (affinities := _affinities(threads)):
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    slower = ["SkipLayerNormFusion"] if kind == "cpu" else []  # by several times, on a CPU
    providers: list[Any] = [PROVIDERS["cpu"]]
    missing = ""
    if kind == "cuda":
        with OPENING:  # standard output is the whole process's
            missing = _preload_cuda()
        if missing.startswith("no NVIDIA driver"):
            raise _cuda_fails(device, missing)
        # Naming the first GPU, which is the default, makes onnxruntime 1.26 and later print a warning.
        providers.insert(0, (PROVIDERS["cuda"], CUDA_OPTIONS | ({} if number == "0" else {"device_id": number})))
    try:
        with OPENING:
            session = InferenceSession(
                str(path), options, providers=providers, disabled_optimizers=slower, enable_fallback=0
            )
    except Exception as error:  # onnxruntime's errors share no public base
        cause = _cause(error, str(path))
        if re.search(NO_MEMORY, cause):
            raise OutOfMemoryError(f"{path}: can't be loaded ({cause}); free some memory") from None
        if kind == "cuda" and re.search("cuda|cudnn|cublas|find kernel|find an implementation", cause, re.I):
            raise _cuda_fails(device, missing or cause) from None
        raise ArtifactError(
            f"{path}: onnxruntime {onnxruntime.__version__} can't load it ({cause}); upgrade it or export again"
        ) from None
    if session.get_providers()[0] != provider_of(device):
        raise _cuda_fails(device, missing or f"it fell back to {session.get_providers()[0]}")
    SESSIONS.add(session)
    return session
