"""Full disks, signals and places that can't be written leave nothing behind, and a second try succeeds.

Files that are damaged, swapped or deleted, and a want of memory, never give a wrong vector.
"""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint, tiny_bert_config
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ExportError
from export.pipeline import export_model, staging_folder
from runtime import ArtifactError, Embedder, verify_artifact

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
    assert "interrupted: nothing is left half written" in error
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


def test_a_name_too_long_is_one_line(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="file name too long; nothing was written.*another --out"):
        export_model(str(tiny_checkpoint), tmp_path / ("x" * 300), ["fp32"])
    with pytest.raises(ExportError, match="no such folder"):
        export_model(f"/{'x' * 300}", tmp_path / "out", ["fp32"])
    with pytest.raises(ExportError, match="~nobody/m: no such folder"):
        export_model("~nobody/m", tmp_path / "out", ["fp32"])


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


LOADED = ["manifest.json", "tokenizer.json", "model.fp32.onnx"]


def loads_as_before_or_not_at_all(folder: Path, expected: np.ndarray) -> None:
    """A manifest may say something else about the model and still be one; files of the model may not be others."""
    try:
        embedder = Embedder(folder, "fp32", device="cpu")
    except ArtifactError as error:
        assert str(folder) in str(error)
        assert str(error).isprintable()
    else:
        np.testing.assert_array_equal(embedder.encode("a river"), expected)


@pytest.fixture(scope="module")
def spoilable(tiny_artifact, tmp_path_factory):
    """A copy that is mended after each spoiling, and the vector it gives when whole."""
    folder = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("spoilt") / "tiny")
    return folder, Embedder(folder, "fp32", device="cpu").encode("a river")


@given(name=st.sampled_from(LOADED[1:]), place=st.integers(0, 10**9), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=50)
def test_a_flipped_bit_anywhere_in_the_model_is_refused(spoilable, name, place, bit):
    folder, _ = spoilable
    whole = (folder / name).read_bytes()
    spoilt = bytearray(whole)
    spoilt[place % len(whole)] ^= 1 << bit
    try:
        (folder / name).write_bytes(spoilt)
        for call in (lambda: Embedder(folder, "fp32", device="cpu"), lambda: verify_artifact(folder)):
            with pytest.raises(ArtifactError, match=f"^{folder / name}: its SHA-256 is not the manifest's"):
                call()
    finally:
        (folder / name).write_bytes(whole)


@given(name=st.sampled_from(LOADED), place=st.integers(0, 10**9))
@settings(deadline=None, max_examples=50)
def test_a_file_cut_anywhere_is_refused(spoilable, name, place):
    folder, _ = spoilable
    whole = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(whole[: place % (len(whole) - 1)])  # without its last line's end it is whole
        with pytest.raises(ArtifactError, match=f"^{folder / name}: "):
            Embedder(folder, "fp32", device="cpu")
    finally:
        (folder / name).write_bytes(whole)


def test_variants_that_took_each_others_place_are_refused(tiny_artifact, copied):
    folder = copied(tiny_artifact)
    (folder / "model.int8.onnx").rename(folder / "aside")
    (folder / "model.fp32.onnx").rename(folder / "model.int8.onnx")
    (folder / "aside").rename(folder / "model.fp32.onnx")
    for variant in ("fp32", "int8"):
        with pytest.raises(ArtifactError, match=rf"model\.{variant}\.onnx: \d+ bytes where the manifest says \d+"):
            Embedder(folder, variant, device="cpu")


def test_a_tokenizer_of_another_artifact_is_refused(tiny_artifact, tiny_reranker, copied):
    folder, other = copied(tiny_artifact), tiny_reranker("xlm-roberta")[0]
    shutil.copy(other / "tokenizer.json", folder)
    assert (folder / "tokenizer.json").read_bytes() != (tiny_artifact / "tokenizer.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: "):
        Embedder(folder, device="cpu")


def test_a_manifest_of_another_artifact_is_refused(tiny_artifact, tiny_reranker, copied):
    folder = copied(tiny_artifact)
    shutil.copy(tiny_reranker("bert")[0] / "manifest.json", folder)
    with pytest.raises(ArtifactError, match="open it with Reranker"):
        Embedder(folder, device="cpu")
    with pytest.raises(ArtifactError, match="where the manifest says|SHA-256"):
        verify_artifact(folder)


@pytest.mark.parametrize(
    "happens", [shutil.rmtree, lambda folder: [(folder / name).write_bytes(b"") for name in LOADED]]
)
def test_a_folder_deleted_or_emptied_while_in_use_changes_nothing(tiny_artifact, copied, happens):
    folder = copied(tiny_artifact)
    embedder, texts = Embedder(folder, device="cpu"), ["a river", "a " * 50, ""]
    expected = Embedder(tiny_artifact, device="cpu").encode(texts)
    happens(folder)
    for _ in range(2):
        np.testing.assert_array_equal(embedder.encode(texts), expected)
    with pytest.raises(ArtifactError):
        Embedder(folder, device="cpu")


def test_an_export_that_was_killed_leaves_no_artifact_and_a_second_try_succeeds(start, tiny_checkpoint, tmp_path):
    out = tmp_path / "a" / "out"
    arguments = ("-m", "export", "--model", tiny_checkpoint, "--out", out, "--variants", "fp32")
    process = start(*arguments)
    wait_for(process, tmp_path, "a/.out.*.partial/model.fp32.onnx")
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists()
    process = start(*arguments)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    assert verify_artifact(out).variants["fp32"].parity
    assert Embedder(out, device="cpu").encode("fine").shape == (32,)


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_of_two_exports_to_one_folder_each_leaves_a_whole_artifact_or_an_error(start, tiny_checkpoint, tmp_path, force):
    """Three start at once; without --force the first to end wins, with it the last."""
    out = tmp_path / "a" / "out"
    arguments = ("-m", "export", "--model", tiny_checkpoint, "--out", out, "--variants", "fp32")
    processes = [start(*arguments, *(["--force"] if force else [])) for _ in range(3)]
    while any(process.poll() is None for process in processes):
        if out.exists():
            verify_artifact(out)  # never half of one
        time.sleep(0.005)
    ended = [(process.returncode, process.communicate()[1]) for process in processes]
    assert [code for code, _ in ended].count(0) == (3 if force else 1), ended
    assert all(f"{out}: exists already; pass --force" in error for code, error in ended if code)
    assert list((tmp_path / "a").iterdir()) == [out]
    assert Embedder(out, device="cpu").encode("fine").shape == (32,)


def test_an_export_does_not_publish_while_another_does(tmp_path):
    """The other one holds the parent folder's lock; an open file's lock is its own, in this process too."""
    held, inside = os.open(tmp_path, os.O_RDONLY), threading.Event()

    def publish():
        with staging_folder(tmp_path / "out", force=False):
            inside.set()

    fcntl.flock(held, fcntl.LOCK_EX)
    publishing = threading.Thread(target=publish)
    publishing.start()
    assert inside.wait(10)
    publishing.join(0.3)
    assert publishing.is_alive()
    assert not (tmp_path / "out").exists()
    os.close(held)
    publishing.join(10)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_what_is_published_is_the_staging_folder_itself_in_one_step(tmp_path, monkeypatch, force):
    """A copy would be half there for a while, and an old artifact that is moved aside first is absent for a while."""
    out = tmp_path / "out"
    if force:
        out.mkdir()
        monkeypatch.setattr(Path, "rename", lambda *paths: pytest.fail("a second step"))
    with staging_folder(out, force) as stage:
        (stage / "file").touch()
        staged = stage.stat().st_ino
    assert out.stat().st_ino == staged
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_without_memory_is_a_run_error_and_the_model_goes_on(start, tmp_path):
    """Of a model whose runs take much more than its texts."""
    config = tiny_bert_config(intermediate_size=8192, max_position_embeddings=2048)
    checkpoint = make_checkpoint(tmp_path / "wide", config, spread=0.01)
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": 2048}')
    artifact = export_model(str(checkpoint), tmp_path / "out", ["fp32"]).path
    code = """
import resource, sys
import numpy as np
from runtime import Embedder, RunError
embedder = Embedder(sys.argv[1], device="cpu", threads=1)
expected = embedder.encode(["short", "a text"])
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 30_000_000, resource.RLIM_INFINITY))
for _ in range(3):
    try:
        embedder.encode("a " * 2000)
    except RunError as error:
        print(error)
    assert np.array_equal(embedder.encode(["short", "a text"]), expected)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert embedder.encode("a " * 2000).shape == (32,)
"""
    process = start("-c", code, artifact, TOKENIZERS_PARALLELISM="false")
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    lines = printed.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("onnxruntime failed on 1 texts of 2002 tokens (") for line in lines)
    assert all("free some memory" in line for line in lines)
