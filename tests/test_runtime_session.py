"""Sessions run on the device that was asked for, with the CPUs that the process really has."""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime
import pytest

from runtime import ArtifactError, Embedder, ProviderError, session
from runtime.session import OutOfMemoryError, choose_devices, create_session, usable_cpus

needs_cpu_only = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_usable_cpus_counts_the_affinity_not_the_machine():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from runtime.session import usable_cpus; print(usable_cpus())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_a_model_takes_the_usable_cpus_unless_told_otherwise(tiny_artifact):
    code = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from runtime import Embedder

for threads in (None, 3):
    session = Embedder(sys.argv[1], device="cpu", threads=threads)._opened.sessions[0]
    print(session.get_session_options().intra_op_num_threads)
"""
    command = [sys.executable, "-c", code, tiny_artifact]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["1", "3"]


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A function that tells a process with 8 CPUs its cgroups and their files, and gives how many it may use."""

    def cpus(own: str | None, files: dict[str, str]) -> int:
        if own is not None:
            (tmp_path / "own").write_text(own)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content + "\n")
        return usable_cpus()

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(session, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(session, "CGROUPS", tmp_path)
    return cpus


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("270000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("100000 0", 8),
        ("", 8),
    ],
)
@pytest.mark.parametrize("own", ["0::/\n", None], ids=["", "unknown"])
def test_usable_cpus_is_capped_by_the_cgroup(cgroups, own, quota, cpus):
    assert cgroups(own, {"cpu.max": quota}) == cpus


def test_without_cgroups_the_affinity_counts(cgroups):
    assert cgroups("", {}) == cgroups(None, {}) == cgroups("0::/a\n", {}) == 8


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"a/b.service/cpu.max": "300000 100000"}, 3),
        ({"a/b.service/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ({"a/b.service/cpu.max": "600000 100000", "a/cpu.max": "500000 100000", "cpu.max": "400000 100000"}, 4),
        ({"a/other/cpu.max": "100000 100000"}, 8),
    ],
    ids=["own", "around", "least", "another's"],
)
def test_the_quotas_of_a_nested_cgroup_and_of_those_around_it_count(cgroups, files, cpus):
    assert cgroups("0::/a/b.service\n", files) == cpus


@pytest.mark.parametrize(
    ("folder", "quota", "period", "cpus"),
    [
        ("cpu/docker/f00", "350000", "100000", 3),
        ("cpu/docker", "-1", "100000", 8),
        ("cpu", "100000", "50000", 2),  # as a container sees its own
        ("cpuset", "100000", "100000", 8),
    ],
)
def test_a_quota_of_cgroup_version_1_counts(cgroups, folder, quota, period, cpus):
    own = "5:cpuset:/docker/f00\n4:cpu,cpuacct:/docker/f00\n1:name=systemd:/a:b\n0::/\n"
    assert cgroups(own, {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}) == cpus


@pytest.fixture
def cgroup():
    """A real cgroup whose quota is one CPU, or skips where none may be made."""
    v1 = Path("/sys/fs/cgroup/cpu")
    folder = (v1 if v1.is_dir() else v1.parent) / f"bge-onnx-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("needs a cgroup of its own")
    try:
        if v1.is_dir():
            (folder / "cpu.cfs_quota_us").write_text("100000")
        else:
            (folder / "cpu.max").write_text("100000 100000")
        yield folder
    except OSError:
        pytest.skip("needs a quota of its own")
    finally:
        folder.rmdir()


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) == 1, reason="needs two CPUs")
def test_usable_cpus_in_a_real_cgroup(cgroup):
    code = "from runtime.session import usable_cpus; print(usable_cpus())"

    def enter():
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, preexec_fn=enter)
    assert done.stdout.split() == ["1"]


def test_a_session_has_the_threads_and_the_provider_that_were_asked_for(tiny_artifact):
    made = create_session(tiny_artifact / "model.fp32.onnx", "cpu", 3)
    assert made.get_session_options().intra_op_num_threads == 3
    assert made.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("spoil", [lambda graph: graph[: len(graph) // 2], lambda graph: b"not a graph" * 99])
def test_a_graph_that_does_not_load_is_an_artifact_error(spoil, tiny_artifact, edited):
    """Its checksum is right: the export itself wrote it so."""
    broken = spoil((tiny_artifact / "model.fp32.onnx").read_bytes())
    described = {"sha256": hashlib.sha256(broken).hexdigest(), "size": len(broken)}
    folder = edited(tiny_artifact, lambda manifest: manifest["files"].update({"model.fp32.onnx": described}))
    path = folder / "model.fp32.onnx"
    path.write_bytes(broken)
    with pytest.raises(ArtifactError) as caught:
        Embedder(folder, "fp32")
    message = str(caught.value)
    assert str(path) in message and onnxruntime.__version__ in message
    assert "\n" not in message


@needs_cpu_only
def test_auto_and_cpu_are_the_cpu_here():
    assert choose_devices("auto") == choose_devices("cpu") == choose_devices(["cpu"]) == ("cpu",)


@needs_cpu_only
def test_cuda_without_a_cuda_build_names_the_cure():
    with pytest.raises(ProviderError, match=r"no CUDA provider.*pip install 'bge-onnx\[gpu\]'"):
        choose_devices("cuda")


@needs_cpu_only
def test_cuda_with_both_packages_installed_says_that_they_clash(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
    with pytest.raises(ProviderError, match="onnxruntime 1.2.3 and onnxruntime-gpu 1.2.3 are both installed"):
        choose_devices("cuda")


@needs_cpu_only
def test_auto_with_both_packages_installed_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "4.5.6")
    assert [choose_devices("auto") for _ in range(3)] == [("cpu",)] * 3
    assert [record.message.count("are both installed") for record in caplog.records] == [1]


@pytest.fixture
def cuda_build(monkeypatch):
    """As if onnxruntime had CUDA, which it says of itself without having looked for a GPU."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.parametrize(
    ("device", "devices"),
    [
        ("auto", ("cuda:0",)),
        ("cuda", ("cuda:0",)),
        ("cuda:7", ("cuda:7",)),
        (["cuda:1", "cuda:0"], ("cuda:1", "cuda:0")),
        (("cuda", "cuda:0", "cuda:2"), ("cuda:0", "cuda:2")),
    ],
)
def test_gpus_are_named_one_or_several(device, devices):
    assert choose_devices(device) == devices


@pytest.mark.usefixtures("cuda_build")
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="here is a GPU")
def test_without_a_gpu_cuda_is_an_error_and_auto_takes_the_cpu_and_says_so_once(tiny_artifact, caplog):
    with pytest.raises(ProviderError, match=r"'cuda:3'.*needs an NVIDIA driver.*onnxruntime-gpu\[cuda,cudnn\].*'cpu'"):
        Embedder(tiny_artifact, device="cuda:3")
    assert [Embedder(tiny_artifact, "fp32").encode("a text").shape for _ in range(2)] == [(32,), (32,)]
    assert [record.message for record in caplog.records if "running on the CPU" in record.message] == [
        record.message for record in caplog.records
    ][:1]


@pytest.mark.usefixtures("cuda_build")
def test_where_a_gpu_has_no_memory_left_auto_takes_the_cpu(tiny_artifact, caplog, monkeypatch):
    def create(path, device, threads):
        if device != "cpu":
            raise OutOfMemoryError("CUDA failure 2: out of memory")
        return create_session(path, device, threads)

    monkeypatch.setattr("runtime.model.create_session", create)
    monkeypatch.setattr("runtime.session.SAID", {})
    assert Embedder(tiny_artifact, "fp32").encode("a text").shape == (32,)
    assert "running on the CPU: CUDA failure 2: out of memory" in caplog.text
    with pytest.raises(OutOfMemoryError):
        Embedder(tiny_artifact, "fp32", "cuda")


def test_cudas_libraries_are_loaded_in_one_thread_at_a_time(tmp_path, monkeypatch):
    """What they say goes to standard output, which is the process's: two that divert it would lose it for good."""
    inside, most = [], []

    def load():
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return "no NVIDIA driver: none"

    monkeypatch.setattr("runtime.session._preload_cuda", load)
    with ThreadPoolExecutor(4) as pool:
        opened = [pool.submit(create_session, tmp_path / "model.onnx", "cuda:0", 1) for _ in range(4)]
        assert all(isinstance(future.exception(), ProviderError) for future in opened)
    assert most == [1] * 4


@pytest.mark.parametrize(
    ("cause", "lacks"),
    [
        ("CUDA failure 2: out of memory ; GPU=0 ; file=cuda_allocator.cc ; expr=cudaMalloc((void**)&p, size);", True),
        ("BFCArena: Failed to allocate memory for requested buffer of size 1024", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&handle);", True),
        ("std::bad_alloc", True),
        ("CUDA failure 700: an illegal memory access was encountered ; expr=cudaMalloc((void**)&p, size);", False),
        ("CUDA failure 719: unspecified launch failure ; expr=cudaMalloc((void**)&p, size);", False),
        ("CUDA error cudaErrorIllegalAddress: an illegal memory access was encountered", False),
    ],
)
def test_want_of_memory_is_told_from_what_an_allocation_reports_of_another_failure(cause, lacks):
    status = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned: "
    assert bool(re.search(session.NO_MEMORY, status + cause)) == lacks


@pytest.mark.parametrize("device", ["tpu", "", "CPU", None, "cuda:x", "cuda:-1", [], ["cpu", "cuda"], [0], ["auto"]])
def test_an_unknown_device_is_an_error_that_lists_the_known(device):
    with pytest.raises(ProviderError, match=r"unknown; it is 'auto', 'cpu', 'cuda', 'cuda:1', … or a list of GPUs"):
        choose_devices(device)


def test_a_trickle_of_queries_costs_little_more_than_its_work(tiny_artifact):
    """Threads that spin on after a run, as by default, take some 20 ms for each query; the best of three counts."""
    code = """
import sys, time
from runtime import Embedder

embedder = Embedder(sys.argv[1], device="cpu", threads=2)
embedder.encode("a river")
least = 1.0
for _ in range(3):
    start = time.process_time()
    for _ in range(10):
        time.sleep(0.05)
        embedder.encode("a river")
    least = min(least, (time.process_time() - start) / 10)
print(least)
"""
    command = [sys.executable, "-c", code, tiny_artifact]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert float(done.stdout) < 0.008


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or usable_cpus() < 2, reason="takes Linux and two CPUs")
@pytest.mark.parametrize("more", [0, 1, -1])
def test_a_sessions_threads_have_a_cpu_each_if_they_may_use_all(tiny_artifact, more):
    code = """
import os, sys, time
from runtime import Embedder

before = set(os.listdir("/proc/self/task"))
cpus = os.sched_getaffinity(0)
embedder = Embedder(sys.argv[1], device="cpu", threads=len(cpus) + int(sys.argv[2]))
assert os.sched_getaffinity(0) == cpus
started, expected = set(os.listdir("/proc/self/task")) - before, [int(cpu) for cpu in sys.argv[3:]]
for _ in range(25):
    time.sleep(0.2)  # they see to it themselves
    allowed = [os.sched_getaffinity(int(task)) for task in started]
    own = sorted(cpu for some in allowed if len(some) == 1 for cpu in some)
    if own == expected:
        break
assert own == expected, own
"""
    expected = [] if more else sorted(os.sched_getaffinity(0))[1:]
    command = [sys.executable, "-c", code, tiny_artifact, str(more), *map(str, expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "affinit" in done.stderr) == (0, False), done.stderr
