"""Every number that a service can watch is counted once, exactly, and Prometheus shows it."""

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from runtime import Embedder, InputError, Reranker, prometheus_hook
from runtime.metrics import METRICS, ignore
from runtime.microbatch import MicroBatcher

LONG = "a " * 99
"""101 tokens, of which the model reads 64."""


class Counts:
    """A hook that adds up."""

    def __init__(self):
        self.sums, self.calls = Counter(), Counter()

    def __call__(self, metric, value):
        assert value > 0
        self.sums[metric] += value
        self.calls[metric] += 1

    def take(self) -> dict[str, int]:
        """What was counted since, without durations; how often those were told must fit."""
        assert self.calls["run_seconds"] == self.sums["batches"]
        sums = {metric: self.sums[metric] for metric in ("texts", "tokens", "batches", "truncated")}
        self.sums.clear()
        self.calls.clear()
        return sums


@pytest.fixture
def counts():
    return Counts()


@pytest.fixture
def embedder(tiny_artifact, counts):
    return Embedder(tiny_artifact, device="cpu", threads=1, hook=counts)


def numbers(texts, tokens, batches, truncated=0):
    return dict(texts=texts, tokens=tokens, batches=batches, truncated=truncated)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], numbers(0, 0, 0)),
        ("a", numbers(1, 3, 1)),
        (["a", "a", "", "a b c", "a b c"], numbers(5, 3 + 3 + 2 + 5 + 5, 3)),
        (["a", LONG, LONG], numbers(3, 3 + 64 + 64, 2, 2)),
        (["a " * 62] * 33, numbers(33, 33 * 64, 5)),  # 512 tokens are a thread's run
    ],
    ids=["none", "one", "lengths", "cut", "runs"],
)
def test_texts_tokens_runs_and_cuts_are_counted_once(embedder, counts, texts, expected):
    for call in (
        embedder.encode,
        embedder.encode_queries,
        embedder.encode_corpus,
        lambda texts: list(embedder.encode_iter([texts] if isinstance(texts, str) else texts)),
        lambda texts: asyncio.run(embedder.aencode(texts)),
    ):
        call(texts)
        assert counts.take() == expected


def test_pieces_count_as_what_was_run(embedder, counts):
    embedder.encode(["a", LONG], chunk=True)
    assert counts.take() == numbers(3, 3 + 64 + 39, 3)


def test_pairs_are_counted_as_texts(tiny_reranker, counts):
    reranker = Reranker(tiny_reranker("bert")[0], device="cpu", hook=counts)
    pairs = [("a", "b"), ("a", "b c"), ("a", "c b"), ("a", LONG)]
    for call in (
        reranker.compute_score,
        lambda pairs: asyncio.run(reranker.acompute_score(pairs)),
        lambda pairs: reranker.rank("a", [passage for _, passage in pairs]),
    ):
        call(pairs)
        assert counts.take() == numbers(4, 5 + 6 + 6 + 64, 3, 1)


def test_what_is_refused_is_not_counted(embedder, counts):
    for texts in (["a", 7], ["a", "\ud800"], ["a", LONG]):
        with pytest.raises(InputError):
            embedder.encode(texts, truncate=False)
    assert embedder.count_tokens(["a", LONG]) == [3, 101]
    assert counts.take() == numbers(0, 0, 0)


def test_the_time_in_the_graph_is_told_per_run(embedder, counts):
    embedder.encode(["a", "a b"])
    assert counts.calls["run_seconds"] == 2
    assert 0 < counts.sums["run_seconds"] < 30
    assert not counts.calls["queue_seconds"]  # nothing waited


def test_each_async_call_tells_how_long_it_waited():
    opened, entered = threading.Event(), threading.Event()
    counts = Counts()

    def run(items, first):
        entered.set()
        assert opened.wait(30)
        return np.array(items)

    batcher = MicroBatcher(run, counts)

    async def main():
        first = asyncio.create_task(batcher([1]))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        assert not counts.calls  # it is told when the answer is there
        second = asyncio.create_task(batcher([2]))
        await asyncio.sleep(0.3)
        opened.set()
        await first
        waited = counts.sums["queue_seconds"]
        await second
        return waited, counts.sums["queue_seconds"] - waited

    first, second = asyncio.run(main())
    assert first < 0.2 < 0.3 <= second < 10
    assert counts.calls == {"queue_seconds": 2}


def test_the_hook_by_default_does_nothing():
    assert ignore("texts", 1) is None


def test_every_metric_of_two_models_is_in_one_registry(tiny_artifact, tiny_reranker):
    registry = CollectorRegistry()
    embedder = Embedder(tiny_artifact, device="cpu", hook=prometheus_hook("small", registry))
    reranker = Reranker(tiny_reranker("bert")[0], device="cpu", hook=prometheus_hook("re", registry))
    asyncio.run(embedder.aencode(["a", "a b", LONG]))
    embedder.encode(["a"])
    reranker.compute_score([("a", "b")] * 2)
    lines = generate_latest(registry).decode().splitlines()
    for expected in (
        "# HELP bge_onnx_texts_total Texts, or pairs of a reranker, that were run",
        "# TYPE bge_onnx_texts_total counter",
        'bge_onnx_texts_total{model="small"} 4.0',
        'bge_onnx_texts_total{model="re"} 2.0',
        'bge_onnx_tokens_total{model="small"} 74.0',
        'bge_onnx_tokens_total{model="re"} 10.0',
        'bge_onnx_truncated_total{model="small"} 1.0',
        'bge_onnx_batches_total{model="small"} 4.0',
        'bge_onnx_batches_total{model="re"} 1.0',
        "# TYPE bge_onnx_run_seconds histogram",
        'bge_onnx_run_seconds_count{model="small"} 4.0',
        'bge_onnx_run_seconds_count{model="re"} 1.0',
        'bge_onnx_queue_seconds_count{model="small"} 1.0',
        'bge_onnx_queue_seconds_bucket{le="+Inf",model="small"} 1.0',
    ):
        assert expected in lines
    assert {line.split()[2] for line in lines if line.startswith("# TYPE")} >= {
        f"bge_onnx_{name}" + ("" if name.endswith("_seconds") else "_total") for name in METRICS
    }


def test_registries_do_not_mix():
    one, other = CollectorRegistry(), CollectorRegistry()
    prometheus_hook("m", one)("texts", 2)
    prometheus_hook("m", other)("texts", 3)
    assert one.get_sample_value("bge_onnx_texts_total", {"model": "m"}) == 2
    assert other.get_sample_value("bge_onnx_texts_total", {"model": "m"}) == 3


def test_models_that_open_at_once_share_a_registry():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            registry, together = CollectorRegistry(), threading.Barrier(8)

            def count(_, registry=registry, together=together):
                together.wait()
                prometheus_hook("m", registry)("texts", 1)

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(count, range(8)))
            assert registry.get_sample_value("bge_onnx_texts_total", {"model": "m"}) == 8
    finally:
        sys.setswitchinterval(interval)


def test_the_registry_by_default_is_the_librarys_own():
    code = (
        "import prometheus_client, runtime; runtime.prometheus_hook('m')('texts', 2)\n"
        "runtime.prometheus_hook('n'), runtime.prometheus_hook('o', prometheus_client.REGISTRY)\n"
        "assert prometheus_client.REGISTRY.get_sample_value('bge_onnx_texts_total', {'model': 'm'}) == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_prometheus_client_the_error_says_what_to_install():
    code = "import sys; sys.modules['prometheus_client'] = None; import runtime; runtime.prometheus_hook('m')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("runtime.errors.BgeOnnxError: prometheus_client can't be imported")
    assert message.endswith("run: pip install 'bge-onnx[prometheus]'")
