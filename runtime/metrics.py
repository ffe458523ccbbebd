"""What a service can watch: one hook that gets every number, and an adapter for Prometheus."""

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime.errors import BgeOnnxError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Histogram

Hook = Callable[[str, float], object]
"""Gets the name of a metric and what it grew by, from whichever thread did the work; it must be quick and not raise."""

METRICS = {
    "texts": "Texts, or pairs of a reranker, that were run",
    "tokens": "Tokens that were run",
    "truncated": "Texts or pairs that were cut",
    "batches": "Batches that were run",
    "run_seconds": "Time that a batch took",
    "queue_seconds": "Time that an async call waited before its run",
}

_registering = threading.Lock()
"""A registry takes each metric once, also from threads that open models at once."""


def ignore(metric: str, value: float) -> None:
    """The hook by default."""


def prometheus_hook(model: str, registry: "CollectorRegistry | None" = None) -> Hook:
    """A hook that counts for ``prometheus-client``: ``bge_onnx_…``, histograms of what ends in ``_seconds``.

    Args:
        model: Value of the label ``model``.
        registry: Where the metrics are registered; by default the library's own.

    Raises:
        BgeOnnxError: prometheus-client isn't installed.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise BgeOnnxError(
            f"prometheus_client can't be imported ({error}); run: pip install 'bge-onnx[prometheus]'"
        ) from None
    with _registering:
        metrics = _register(registry or REGISTRY)

    def hook(metric: str, value: float) -> None:
        metrics[metric](model, value)

    return hook


@functools.cache  # whichever models count in it
def _register(registry: "CollectorRegistry") -> dict[str, Callable[[str, float], None]]:
    from prometheus_client import Counter, Histogram

    def count(counter: "Counter", model: str, value: float) -> None:
        counter.labels(model).inc(value)

    def observe(histogram: "Histogram", model: str, value: float) -> None:
        histogram.labels(model).observe(value)

    found: dict[str, Callable[[str, float], None]] = {}
    for name, text in METRICS.items():
        described = f"bge_onnx_{name}", text, ("model",)
        if name.endswith("_seconds"):
            found[name] = functools.partial(observe, Histogram(*described, registry=registry))
        else:
            found[name] = functools.partial(count, Counter(*described, registry=registry))
    return found
