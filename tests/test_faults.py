"""Full disks, signals and places that can't be written leave nothing behind, and a second try succeeds."""

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from export.errors import ExportError
from export.pipeline import export_model
from runtime import Embedder

pytestmark = pytest.mark.usefixtures("few_texts")


def wait_for(process: subprocess.Popen, folder: Path, pattern: str) -> None:
    """Wait until a file of this name appears."""
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("signum", "when"),
    [(signal.SIGINT, ".tiny-bert.*.partial"), (signal.SIGTERM, ".tiny-bert.*.partial/model.fp32.onnx")],
)
def test_a_signal_in_the_middle_leaves_the_old_artifact_and_nothing_else(
    start, tiny_checkpoint, tiny_artifact, copied, signum, when
):
    out = copied(tiny_artifact)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    folder = out.parent
    siblings = set(folder.iterdir())
    process = start("-m", "export", "--model", tiny_checkpoint, "--out", out, "--force")
    wait_for(process, folder, when)
    process.send_signal(signum)
    printed, error = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert "interrupted: nothing was written" in error
    assert "Traceback" not in error
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path for path in folder.iterdir() if path.name != "hf"} == siblings


def test_after_an_interrupt_a_second_try_succeeds(start, tiny_checkpoint, tiny_artifact, tmp_path):
    arguments = ("-m", "export", "--model", tiny_checkpoint, "--out", tmp_path / "a" / "out", "--variants", "int8")
    process = start(*arguments)
    wait_for(process, tmp_path, "a/.out.*.partial/tokenizer.json")
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate(timeout=60)[1]
    assert not (tmp_path / "a").exists()
    process = start(*arguments)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    again = tmp_path / "a" / "out" / "model.int8.onnx"
    assert again.read_bytes() == (tiny_artifact / "model.int8.onnx").read_bytes()  # in any process


def test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing(start, tiny_checkpoint, tmp_path):
    size = 100_000  # less than the graph, more than all else
    process = start(
        *("-m", "export", "--model", tiny_checkpoint, "--out", tmp_path / "a" / "out", "--variants", "fp32"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        PYTHONDONTWRITEBYTECODE="1",
    )
    printed, error = process.communicate(timeout=120)
    assert (process.returncode, printed) == (1, "")
    assert "file too large" in error
    assert "free some space" in error
    assert "Traceback" not in error
    assert not (tmp_path / "a").exists()


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts a tmpfs of a few kilobytes, or skips where that isn't allowed."""
    mounts = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(mounts)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_leaves_nothing_and_a_larger_one_does(mounted, tiny_checkpoint):
    disk = mounted("size=200k")
    out = disk / "out"
    with pytest.raises(ExportError, match=f"{disk}.*: no space left on device; nothing was written, free some space"):
        export_model(str(tiny_checkpoint), out, ["fp32"])
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
    artifact = export_model(str(tiny_checkpoint), out, ["fp32"])
    assert Embedder(artifact.path).encode("fine").shape == (32,)
    assert list(disk.iterdir()) == [out]


def test_a_full_scratch_disk_is_one_line_and_leaves_nothing(mounted, tiny_checkpoint, tmp_path, monkeypatch):
    scratch = mounted("size=20k")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(ExportError, match="no space left on device"):
        export_model(str(tiny_checkpoint), tmp_path / "out", ["int8"])
    assert list(scratch.iterdir()) == []
    assert not (tmp_path / "out").exists()


def test_a_read_only_disk_is_one_line(mounted, tiny_checkpoint):
    disk = mounted("ro")
    with pytest.raises(ExportError, match="read-only file system; nothing was written.*another --out"):
        export_model(str(tiny_checkpoint), disk / "out", ["fp32"])


@pytest.mark.skipif(not os.geteuid(), reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(tiny_checkpoint, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="permission denied; nothing was written.*another --out"):
        export_model(str(tiny_checkpoint), tmp_path / "out", ["fp32"])


def test_a_parent_that_is_a_file_is_one_line(tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=f"{tmp_path / 'file'}: .*; nothing was written.*another --out"):
        export_model(str(tiny_checkpoint), tmp_path / "file" / "out", ["fp32"])
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_cant_be_read_is_one_line(tiny_checkpoint, copied, tmp_path):
    weights = copied(tiny_checkpoint) / "model.safetensors"
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ExportError, match=r"model\.safetensors"):
        export_model(str(weights.parent), tmp_path / "out", ["fp32"])
    assert not (tmp_path / "out").exists()
