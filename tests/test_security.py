"""SECURITY.md names a test for every promise, and each of them exists."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promises = [line for line in text.splitlines() if line.startswith("| ") and line != "| promise | test |"]
    assert promises
    assert all("tests/test_" in promise for promise in promises)
    for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", text):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text("utf-8"), re.M), f"{path}::{name}"


def test_embedding_and_reranking_open_no_connection(tiny_artifact, tiny_reranker):
    code = """
import sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(refuse)
from runtime import Embedder, Reranker

Embedder(sys.argv[1], device="cpu").encode(["a river", "a stone"])
Reranker(sys.argv[2], device="cpu").rank("a river", ["a stone", "water"])
"""
    arguments = [sys.executable, "-c", code, tiny_artifact, tiny_reranker("bert")[0]]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
