"""Memory is bounded by the tokens of one run, whatever is embedded and for how long.

The bound, which docs/decisions.md states: beside the loaded model (int8 is loaded twice for bulk work), running takes
less than 96 bytes for each token at work and each dimension: 2,048 tokens, 512 a thread, or one longer text. Before
that, tokenising takes less than 250 bytes for each character at work: 250,000, or one longer text.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")

BYTES = 96
"""For each token at work and each dimension."""
AT_WORK = 2048
"""Tokens, and a quarter of them a thread if that is more."""
CHARACTER_BYTES = 250
"""For each character that is tokenised at once."""

SCRIPT = """
import random, re, resource, sys
from pathlib import Path
from runtime import Embedder

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def texts(count):
    return (" ".join(draw.choices(WORDS, k=draw.choice((1, 3, 10, 30, 100, 190, 300)))) for _ in range(count))

WORDS, draw = "river stone light apple horse tower green table music bread".split(), random.Random(0)
embedder = Embedder(sys.argv[1], sys.argv[2], device="cpu", threads=int(sys.argv[3]))
embedder.encode("to the first vector")
embedder._narrow_session(embedder._opened, True)
"""
BOUND = (
    SCRIPT
    + f"""
loaded = held()
embedder.encode(list(texts(300)))
for _ in embedder.encode_iter(texts(300), chunk_size=64):
    pass
at_work = max({AT_WORK}, {AT_WORK} // 4 * embedder._threads, embedder.max_length)
print((peak() - loaded) / (at_work * embedder.dim))
"""
)
LONG = (
    SCRIPT
    + """
loaded = held()
embedder.encode(["river stone " * 25_000] * 8)
print((peak() - loaded) / 300_000)
"""
)
GROWTH = (
    SCRIPT
    + """
for _ in embedder.encode_iter(texts(int(sys.argv[4]) // 4), chunk_size=256):
    pass
warm = peak()
for _ in embedder.encode_iter(texts(int(sys.argv[4])), chunk_size=256):
    pass
print((peak() - warm) / 1e6)
"""
)


def run(code: str, *arguments) -> float:
    """The number that a process of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(("variant", "threads"), [("fp32", 2), ("int8", 1), ("int8", 2), ("int8", 8)])
def test_any_mix_of_lengths_stays_within_the_stated_bound(minilm, variant, threads):
    assert run(BOUND, minilm, variant, threads) < BYTES


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_long_texts_stays_within_the_stated_bound(tiny_artifact, threads):
    assert run(LONG, tiny_artifact, "int8", threads) < CHARACTER_BYTES


@pytest.mark.parametrize(
    ("model", "count"), [("tiny_artifact", 2_000), pytest.param("minilm", 20_000, marks=pytest.mark.long)]
)
def test_memory_does_not_grow(request, model, count):
    """By less than 8 MB, with texts of random lengths; a leak of a kilobyte a text would be 20 in the long one."""
    assert run(GROWTH, request.getfixturevalue(model), "int8", 2, count) < 8
