"""Sessions run on the device that was asked for, with the CPUs that the process really has."""

import hashlib
import importlib.metadata
import os
import subprocess
import sys

import onnxruntime
import pytest

from runtime import ArtifactError, Embedder, ProviderError, session
from runtime.session import choose_devices, create_session, usable_cpus

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


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("max 100000", 8),
        ("300000 100000", 3),
        ("270000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("", 8),
        (None, 8),
    ],
)
def test_usable_cpus_is_capped_by_the_cgroup(quota, cpus, tmp_path, monkeypatch):
    cpu_max = tmp_path / "cpu.max"
    if quota is not None:
        cpu_max.write_text(quota + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(session, "Path", lambda path: cpu_max)
    assert usable_cpus() == cpus


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


@pytest.mark.parametrize("device", ["tpu", "", "CPU", "cuda:x", "cuda:-1", [], ["cpu", "cuda"], [0], ["auto"]])
def test_an_unknown_device_is_an_error_that_lists_the_known(device):
    with pytest.raises(ProviderError, match=r"unknown; it is 'auto', 'cpu', 'cuda', 'cuda:1', … or a list of GPUs"):
        choose_devices(device)
