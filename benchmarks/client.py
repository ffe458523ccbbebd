"""The runner's side of the workers: which environment an engine runs in, and how it is asked."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.errors import EngineError
from benchmarks.worker import Job

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".bench"
"""Where environments and converted models are kept; never committed."""
REQUIREMENTS = Path(__file__).parent / "environments"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Worker:
    """An engine in a process of its own.

    Attributes:
        job: What it loaded.
        cold_s: Seconds from the start of the process to the first vector.
        load_s: Seconds of these to import the engine and load the model.
        versions: Of the engine's packages.
    """

    def __init__(self, job: Job) -> None:
        """Start the process and wait for its first vector.

        Raises:
            EngineError: The engine isn't installed, or can't load the model.
        """
        self.job = job
        self._log = tempfile.TemporaryFile(prefix="bge-onnx-")  # noqa: SIM115  closed with the worker
        start = time.perf_counter()
        self._process = subprocess.Popen(
            _command(job, "serve"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=_environment(job.threads),
            cwd=ROOT,
            start_new_session=True,  # a Ctrl-C is the runner's, which ends its workers
        )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.cold_s = time.perf_counter() - start
        self.load_s: float = ready["load_s"]
        self.versions: dict[str, str] = ready["versions"]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        """Have the worker do one of its ``REQUESTS``.

        Raises:
            EngineError: The engine failed or died.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, as its missing answer will tell
        return self._answer()

    def answers(self, inputs: list[Any], batch: int) -> NDArray[Any]:
        """Vectors ``(n, dim)`` of texts, or scores ``(n,)`` of pairs, float32; entries of sparse vectors, float64."""
        with tempfile.TemporaryDirectory(prefix="bge-onnx-") as folder:
            path = Path(folder) / "answers.npy"
            self.ask("answers", inputs=inputs, batch=batch, path=str(path))
            found: NDArray[Any] = np.load(path)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise EngineError(f"{name_of(self.job)}: its process died; {_last_line(self.job, self._log.read())}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise EngineError(
                f"{name_of(self.job)}: not installed ({answer['missing']}); run: {install_command(self.job.engine)}"
            )
        if "error" in answer:
            raise EngineError(f"{name_of(self.job)}: {answer['error']}")
        return answer


def name_of(job: Job) -> str:
    """Engine and variant, as messages and tables name them."""
    return f"{job.engine} {job.variant}"


def install_command(engine: str) -> str:
    """What installs an engine."""
    if (REQUIREMENTS / f"{engine}.txt").exists():
        return f"python -m benchmarks install {engine}"
    return "pip install 'bge-onnx[cpu,export,bench]'"


def install(engine: str) -> None:
    """Make an environment for an engine, or bring it up to date.

    Raises:
        EngineError: It needs none, or pip failed.
    """
    if engine not in separate_engines():
        raise EngineError(f"install {engine}: none of the engines with an environment: {', '.join(separate_engines())}")
    own = _own_python(engine)  # not yet there, perhaps, and nothing may go into the environment that runs now instead
    commands = [
        [sys.executable, "-m", "venv", str(own.parents[1])],
        [str(own), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS / f"{engine}.txt")],
    ]
    for command in commands:
        if (done := subprocess.run(command)).returncode:
            raise EngineError(f"{engine}: {' '.join(command)} ended with {done.returncode}; see pip's message above")


def separate_engines() -> list[str]:
    """Engines that have an environment of their own, since their requirements don't fit with the others'."""
    return sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))


def prepared(job: Job) -> Job:
    """The job with its model converted to what the engine loads, which is kept for the next time.

    Raises:
        EngineError: The conversion failed, or the engine isn't installed.
    """
    conversion = import_module(f"benchmarks.engines.{job.engine}").PREPARED.get(job.variant)
    if conversion is None:
        return job
    folder = Path(job.source)
    if not folder.exists():
        if job.source != job.stock:
            prepared(dataclasses.replace(job, engine="optimum", variant="fp32", source=job.stock))
        stage = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        stage.mkdir(parents=True)
        try:
            done = subprocess.run(
                _command(dataclasses.replace(job, variant=conversion, source=str(stage)), "prepare"),
                capture_output=True,
                env=_environment(job.threads),
                cwd=ROOT,
            )
            if done.returncode:
                raise EngineError(f"{name_of(job)}: can't convert {job.checkpoint}: {_last_line(job, done.stderr)}")
            stage.rename(folder)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return job


def _command(job: Job, action: str) -> list[str]:
    return [str(_python(job.engine)), "-m", "benchmarks.worker", action, json.dumps(dataclasses.asdict(job))]


def _python(engine: str) -> Path:
    """Its own environment's, if it needs one, else the one that runs now."""
    own = _own_python(engine)
    return own if own.exists() else Path(sys.executable)


def _own_python(engine: str) -> Path:
    return HOME / "environments" / engine / "bin" / "python"


def _environment(threads: int) -> dict[str, str]:
    """As many threads for every library, the repository to import from, and no hub."""
    held = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return held | dict.fromkeys(THREAD_VARIABLES, str(threads)) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def _last_line(job: Job, log: bytes) -> str:
    lines = log.decode("utf-8", "replace").strip().splitlines() or ["it left no message"]
    hint = f"; run: {install_command(job.engine)}" if "ModuleNotFoundError" in lines[-1] else ""
    return lines[-1][:300] + hint
