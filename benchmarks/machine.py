"""The machine as every result records it, and the most it can compute: its roofline."""

import contextlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from runtime.session import usable_cpus

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""What decides how fast a CPU multiplies matrices, as Linux names it."""

SIZE = 1024
"""Rows and columns of the matrices whose product gives the peak."""


def describe_machine() -> dict[str, Any]:
    """CPU model, usable cores, instruction sets that matter, memory in GB, the system, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    lines = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", fields.get("Features", "")).split()
    gpu = {}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        named = subprocess.run(query, capture_output=True, text=True)
        gpu = {"gpu": named.stdout.splitlines()[0].strip()} if not named.returncode and named.stdout.strip() else {}
    return gpu | {
        "cpu": fields.get("model name", platform.processor() or platform.machine()),
        "cores": usable_cpus(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def commit(root: Path) -> str:
    """The commit that is checked out, with ``+`` where files were changed since; ``unknown`` outside git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def gpu_use(device: str) -> Iterator[list[float]]:
    """A list that afterwards holds the GPU's use meanwhile, in shares of 1 every tenth of a second; empty on a CPU.

    It is nvidia-smi's: the share of time in which a kernel ran, of up to a second before each reading. What was read in
    the first second is left out, since it is of what was before, too: of something shorter there is nothing.
    """
    found: list[float] = []
    if device == "cpu" or not shutil.which("nvidia-smi"):
        yield found
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    with tempfile.NamedTemporaryFile(prefix="bge-onnx-") as file:  # what is piped may be held back
        watch = subprocess.Popen([*query, "-i", gpu, "-f", file.name])
        try:
            yield found
        finally:
            watch.terminate()
            watch.wait()
            lines = Path(file.name).read_text().split()[10:-1]
            found += [float(line) / 100 for line in lines if line.isdigit()]


def peaks(threads: int, device: str = "cpu", seconds: float = 0.5) -> dict[str, float]:
    """The most that matrix products reach here, in 10⁹ operations a second.

    Args:
        threads: Threads of ONNX Runtime.
        device: ``cpu`` or ``cuda``.
        seconds: Time for each measurement.

    Returns:
        On a CPU ``fp32`` and ``int8`` (u8 × s8) by ONNX Runtime; on CUDA ``fp32`` and ``fp16`` by torch, or nothing
        where torch has no CUDA.
    """
    if device == "cuda":
        return _cuda_peaks(seconds)
    draw = np.random.default_rng(0)
    floats = [draw.standard_normal((SIZE, SIZE), np.float32) for _ in range(2)]
    bytes_ = [
        draw.integers(0, 128, (SIZE, SIZE), np.uint8),
        draw.integers(-64, 64, (SIZE, SIZE), np.int8),
    ]
    return {
        "fp32": _rate(_product("MatMul", floats, TensorProto.FLOAT, threads), seconds),
        "int8": _rate(_product("MatMulInteger", bytes_, TensorProto.INT32, threads), seconds),
    }


def _product(operator: str, operands: list[np.ndarray], result: int, threads: int) -> Callable[[], object]:
    """A product by ONNX Runtime; the right operand is a weight, which it packs beforehand."""
    types = [helper.np_dtype_to_tensor_dtype(operand.dtype) for operand in operands]
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        operator,
        [helper.make_tensor_value_info("a", types[0], (SIZE, SIZE))],
        [helper.make_tensor_value_info("c", result, (SIZE, SIZE))],
        [helper.make_tensor("b", types[1], (SIZE, SIZE), operands[1].tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": operands[0]})


def _cuda_peaks(seconds: float) -> dict[str, float]:
    import torch

    if not torch.cuda.is_available():
        return {}
    size, rates = 8 * SIZE, {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))

        def product(a: Any = a, b: Any = b) -> None:  # noqa: ANN401
            torch.matmul(a, b)
            torch.cuda.synchronize()

        rates[name] = _rate(product, seconds, size)
    return rates


def _rate(product: Callable[[], object], seconds: float, size: int = SIZE) -> float:
    """The best of many, since a peak is what nothing disturbed."""
    product()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
