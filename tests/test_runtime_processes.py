"""Forked and spawned processes embed with the same bits and end: nothing waits for threads that the parent kept."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

BEGIN = """
import asyncio, multiprocessing, os, sys, threading, time
import numpy as np
from runtime import Embedder, Reranker

TEXTS = ["river " * words for words in (60, 60, 60, 3, 0)] * 40
PAIRS = [("river", text) for text in TEXTS]

def fork():
    time.sleep(0.1)  # until idle threads sleep, which is when they are waited for
    return os.fork()

def wait(child):
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == 0, f"the child ended with {code}"
"""


@pytest.fixture
def script(tmp_path):
    """A function that runs a script in a process of its own, and gives what it printed when it ended well.

    Its group is killed with it, and it prints to a file: a child that hangs would keep a pipe open for ever.
    """

    def run(code: str, *arguments, seconds: int = 60, **environment: str) -> str:
        path, printed = tmp_path / "script.py", tmp_path / "printed"
        path.write_text(BEGIN + code)
        inherited = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
        with printed.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, path, *map(str, arguments)],
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            assert process.wait(seconds) == 0, printed.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs after {printed.read_text()!r}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return printed.read_text()

    return run


CHILDREN = {
    "encode": "np.array_equal(embedder.encode(TEXTS), expected)",
    "again": "all(np.array_equal(embedder.encode(TEXTS), expected) for _ in range(3))",
    "async": "np.array_equal(asyncio.run(embedder.aencode(TEXTS)), expected)",
    "stream": "np.array_equal(list(embedder.encode_iter(TEXTS)), expected)",
    "rerank": "reranker.compute_score(PAIRS) == scores",
    "open": "np.array_equal(Embedder(sys.argv[1], device='cpu', threads=2).encode(TEXTS), expected)",
    "close": "embedder.close() is reranker.close() is None",
    "nothing": "True",
}


@pytest.mark.parametrize("does", CHILDREN)
def test_a_forked_child_does_it_with_the_same_bits_and_exits_and_the_parent_goes_on(
    script, tiny_artifact, tiny_reranker, does
):
    code = f"""
embedder = Embedder(sys.argv[1], device="cpu", threads=2)
reranker = Reranker(sys.argv[2], device="cpu", threads=2)
expected, scores = embedder.encode(TEXTS), reranker.compute_score(PAIRS)
assert np.array_equal(asyncio.run(embedder.aencode(TEXTS)), expected)
child = fork()
if not child:
    sys.exit(0 if {CHILDREN[does]} else 3)
wait(child)
assert np.array_equal(embedder.encode(TEXTS), expected)
assert np.array_equal(asyncio.run(embedder.aencode(TEXTS)), expected)
assert reranker.compute_score(PAIRS) == scores
"""
    script(code, tiny_artifact, tiny_reranker("bert")[0])


def test_a_forked_child_never_waits_for_the_threads_of_tokenizers(script, tiny_artifact):
    """Which switch themselves off after a fork, unless the environment says otherwise."""
    code = """
embedder = Embedder(sys.argv[1], device="cpu", threads=2)
expected = embedder.encode(TEXTS)
child = fork()
if not child:
    again = Embedder(sys.argv[1], device="cpu", threads=2)
    sys.exit(0 if all(np.array_equal(e.encode(TEXTS), expected) for e in (embedder, again)) else 3)
wait(child)
"""
    script(code, tiny_artifact, TOKENIZERS_PARALLELISM="true")


def test_a_forked_child_has_as_many_threads_as_its_parent(script, tiny_artifact):
    code = """
embedder = Embedder(sys.argv[1], device="cpu", threads=3)
embedder.encode(TEXTS)
child = fork()
if not child:
    assert len(os.listdir("/proc/self/task")) == 1
    embedder.encode(TEXTS)
    for _ in range(1000):
        if len(os.listdir("/proc/self/task")) == 3:  # of which one is Python's; those of bulk work are about to end
            sys.exit()
        time.sleep(0.01)
    sys.exit(3)
wait(child)
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("needs /proc")
    script(code, tiny_artifact)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_with_one_thread_texts_are_tokenised_on_it_too(script, tiny_artifact, tiny_reranker):
    code = """
def threads():
    return len(os.listdir("/proc/self/task"))
before = threads()
embedder = Embedder(sys.argv[1], device="cpu", threads=1)
reranker = Reranker(sys.argv[2], device="cpu", threads=1)
embedder.encode(TEXTS), embedder.encode(TEXTS, chunk=True), reranker.compute_score(PAIRS)
assert threads() == before
Embedder(sys.argv[1], device="cpu", threads=2).encode(TEXTS)
assert threads() > before
"""
    script(code, tiny_artifact, tiny_reranker("bert")[0])


def test_a_process_that_only_imported_runtime_can_fork(script):
    script("child = fork()\nif not child: sys.exit()\nwait(child)")


def test_a_child_forked_while_other_threads_encode_does_too(script, tiny_artifact):
    code = """
embedder = Embedder(sys.argv[1], device="cpu", threads=2)
expected = embedder.encode(TEXTS)
done = threading.Event()
def work():
    while not done.is_set():
        assert np.array_equal(embedder.encode(TEXTS), expected)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(10):
    child = fork()
    if not child:
        same = np.array_equal(embedder.encode(TEXTS), expected)
        os._exit(0 if same else 3)
    wait(child)
done.set()
for thread in threads: thread.join()
"""
    script(code, tiny_artifact)


def test_a_forked_child_may_go_on_with_its_parents_loop(script, tiny_artifact):
    code = """
embedder, loop = Embedder(sys.argv[1], device="cpu", threads=2), asyncio.new_event_loop()
expected = embedder.encode(TEXTS)
def works():
    return np.array_equal(loop.run_until_complete(embedder.aencode(TEXTS)), expected)
assert works()
child = fork()
if not child:
    os._exit(0 if works() else 3)  # a loop that is closed here takes the parent's file descriptors with it
wait(child)
assert works()
loop.close()
"""
    script(code, tiny_artifact)


SHOW = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
"""


def test_the_threads_of_a_forked_child_open_one_session(script, tiny_artifact):
    code = f"""{SHOW}
embedder = Embedder(sys.argv[1], device="cpu", threads=1)
expected = embedder.encode("bread")
child = fork()
if not child:
    together, same = threading.Barrier(8), []
    def work():
        together.wait()
        same.append(np.array_equal(embedder.encode("bread"), expected))
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    sys.exit(0 if same == [True] * 8 else 3)
wait(child)
"""
    assert script(code, tiny_artifact).count("opened again in a forked process") == 1


def test_a_fork_waits_until_no_session_is_being_opened(script, tmp_path):
    """Else onnxruntime's locks may be held in the child, by nobody; here a pipe keeps a session from being open."""
    code = """
from pathlib import Path
from runtime import ArtifactError
from runtime.session import create_session
def work():
    try:
        create_session(Path(sys.argv[1]), "cpu", 1)
    except ArtifactError:
        ended.append(time.monotonic())
os.mkfifo(sys.argv[1])
ended, thread = [], threading.Thread(target=work)
thread.start()
threading.Timer(1, lambda: Path(sys.argv[1]).write_bytes(b"no graph")).start()
child = fork()
if not child:
    os._exit(0 if ended else 3)
wait(child)
thread.join()
"""
    script(code, tmp_path / "pipe")


@pytest.mark.long
def test_children_forked_while_threads_open_sessions_open_their_own(script, tiny_artifact):
    code = """
from pathlib import Path
from runtime.session import create_session
done = threading.Event()
def opens():
    return create_session(Path(sys.argv[1], "model.int8.onnx"), "cpu", 2)
def work():
    while not done.is_set(): opens()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(500):
    time.sleep(0.003)
    child = os.fork()
    if not child:
        opens()
        os._exit(0)
    wait(child)
done.set()
for thread in threads: thread.join()
"""
    script(code, tiny_artifact, seconds=600)


def test_what_is_closed_while_a_forked_child_opens_it_stays_closed(script, tiny_artifact):
    code = f"""{SHOW}
from runtime import InputError
embedder = Embedder(sys.argv[1], device="cpu", threads=1)
class Close(logging.Handler):
    def emit(self, record):
        embedder.close()
child = fork()
if not child:
    logging.getLogger("runtime").addHandler(Close())
    for _ in range(2):
        try:
            embedder.encode("bread")
        except InputError as error:
            print(error)
    sys.exit()
wait(child)
embedder.encode("bread")
"""
    assert script(code, tiny_artifact).count("is closed; open it again") == 2


def test_a_grandchild_encodes_too(script, tiny_artifact):
    code = """
embedder = Embedder(sys.argv[1], device="cpu", threads=2)
expected = embedder.encode(TEXTS)
child = fork()
if not child:
    assert np.array_equal(embedder.encode(TEXTS), expected)
    grandchild = fork()
    if not grandchild:
        sys.exit(0 if np.array_equal(embedder.encode(TEXTS), expected) else 3)
    wait(grandchild)
    sys.exit()
wait(child)
"""
    script(code, tiny_artifact)


@pytest.mark.parametrize("opened", ["before", "after"])
def test_a_pool_of_forked_workers(script, tiny_artifact, opened):
    code = f"""
embedder = Embedder(sys.argv[1], device="cpu", threads=2)
expected = embedder.encode(TEXTS)
def start():
    global embedder
    embedder = embedder if {opened == "before"} else Embedder(sys.argv[1], device="cpu", threads=1)
def work(text):
    return os.getpid(), embedder.encode(text)
with multiprocessing.get_context("fork").Pool(2, start) as pool:
    pids, rows = zip(*pool.map(work, TEXTS, chunksize=5))
    pool.close()
    pool.join()
assert np.array_equal(rows, expected) and os.getpid() not in pids
assert np.array_equal(embedder.encode(TEXTS), expected)
"""
    script(code, tiny_artifact)


def test_a_pool_of_spawned_workers(script, tiny_artifact):
    code = """
def start(path):
    global embedder
    embedder = Embedder(path, device="cpu", threads=1)
def work(text):
    return embedder.encode(text)
if __name__ == "__main__":
    start(sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(2, start, sys.argv[1:]) as pool:
        rows = pool.map(work, TEXTS, chunksize=5)
        pool.close()
        pool.join()
    assert np.array_equal(rows, embedder.encode(TEXTS))
"""
    script(code, tiny_artifact)


def test_a_forked_child_whose_artifact_is_gone_says_so(script, tiny_artifact, copied):
    code = """
import shutil
from runtime import ArtifactError
embedder = Embedder(sys.argv[1], device="cpu")
shutil.rmtree(sys.argv[1])
child = fork()
if not child:
    try:
        embedder.encode("a")
    except ArtifactError as error:
        print(error)
        sys.exit(0)
    sys.exit(3)
wait(child)
embedder.encode("a")
"""
    folder = copied(tiny_artifact)
    assert script(code, folder).startswith(f"{folder}/model.int8.onnx: No such file")


def test_a_forked_child_whose_artifact_was_altered_says_so(script, tiny_artifact, copied):
    code = """
from pathlib import Path
from runtime import ArtifactError
embedder = Embedder(sys.argv[1], device="cpu")
graph = Path(sys.argv[1], "model.int8.onnx")
whole = graph.read_bytes()
graph.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
child = fork()
if not child:
    try:
        embedder.encode("a")
    except ArtifactError as error:
        print(error)
    sys.exit()
wait(child)
embedder.encode("a")
"""
    folder = copied(tiny_artifact)
    assert script(code, folder).startswith(f"{folder}/model.int8.onnx: its SHA-256 is not the manifest's")


def test_telemetry_is_off_unless_the_user_says_otherwise(script):
    code = "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert script(code) == "1\n"
    assert script(code, ORT_DISABLE_TELEMETRY="0") == "0\n"
