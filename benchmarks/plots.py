"""Plots of results: quality against speed, throughput against length, and the distribution of latencies."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure as Canvas

from benchmarks.data import AS_IT_COMES
from benchmarks.results import QUALITY, Result

RC = {"svg.fonttype": "none", "svg.hashsalt": "bge-onnx", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
"""Text stays text, and the same results give the same file."""

Engine = tuple[str, str]


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what the results of each model allow.

    Args:
        results: Of one or more models.
        folder: Gets the SVG files.

    Returns:
        The files.
    """
    drawn = []
    plots: dict[str, Callable[[list[Result]], Canvas | None]] = {
        "quality": quality,
        "length": length,
        "latency": latency,
    }
    with rc_context(RC):
        for model in dict.fromkeys(result.model for result in results if result.model):
            held = [result for result in results if result.model == model]
            for name, plot in plots.items():
                if canvas := plot(held):
                    canvas.suptitle(f"{model}: {name}")
                    path = folder / f"{model}-{name}.svg"
                    canvas.savefig(path, metadata={"Date": None})
                    drawn.append(path)
    return drawn


def quality(results: Iterable[Result]) -> Canvas | None:
    """Each engine's quality on each data set, against its speed on medium texts as they come."""
    held = list(results)
    speeds = {
        _engine(r): r.figures["ratio"].median
        for r in held
        if r.benchmark == "bulk" and {"texts": "medium", "order": AS_IT_COMES}.items() <= r.settings.items()
        if "ratio" in r.figures
    }
    panels: dict[str, dict[Engine, float]] = {}
    for r in held:
        if r.benchmark in QUALITY and _engine(r) in speeds:
            metric = next(iter(QUALITY[r.benchmark]))
            panels.setdefault(f"{r.settings['data']} {metric}", {})[_engine(r)] = r.figures[metric].median
    if not panels:
        return None
    canvas, axes = _axes(len(panels), 4)
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        axis.set(title=title, xlabel="times sentence-transformers in torch fp32")
        for engine, value in points.items():
            axis.plot(speeds[engine], value, "o", **_look(engine, speeds))
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


def length(results: Iterable[Result]) -> Canvas | None:
    """Tokens a second against the mean tokens of a text."""
    held = list(results)
    grown = [r for r in held if r.benchmark == "growth" and r.settings["by"] == "words"]
    bulk = [r for r in held if r.benchmark == "bulk" and r.settings["order"] == AS_IT_COMES]
    curves: dict[Engine, list[tuple[float, float]]] = {}
    for r in grown or bulk:
        curves.setdefault(_engine(r), []).append((r.figures["tokens"].median, r.figures["tokens/s"].median))
    if not curves:
        return None
    canvas, (axis,) = _axes(1, 5)
    axis.set(xlabel="tokens of a text", ylabel="tokens a second", xscale="log", yscale="log")
    for engine, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", **_look(engine, curves))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return canvas


def latency(results: Iterable[Result]) -> Canvas | None:
    """For each engine a line from the median to the 99th percentile, by the number of callers and the pause before."""
    panels: dict[tuple[int, float], list[Result]] = {}
    for r in results:
        if r.benchmark == "latency":
            panels.setdefault((r.settings["callers"], r.settings.get("pause ms", 0)), []).append(r)
    if not panels:
        return None
    canvas, axes = _axes(len(panels), 3)
    engines = list(dict.fromkeys(_engine(r) for held in panels.values() for r in held))
    for axis, ((callers, pause), held) in zip(axes, sorted(panels.items()), strict=True):
        after = f", after {pause:.0f} ms" if pause else ""
        axis.set(title=f"{callers} callers at once" if callers > 1 else f"one caller{after}", xscale="log")
        axis.set(xlabel="ms: p50, p95, p99", yticks=range(len(engines)), yticklabels=[])
        for r in held:
            times = [r.figures[name].median for name in ("p50 ms", "p95 ms", "p99 ms")]
            axis.plot(times, [engines.index(_engine(r))] * 3, "|-", **_look(_engine(r), engines))
    axes[0].set_yticklabels([" ".join(engine) for engine in engines])
    return canvas


def _axes(count: int, width: float) -> tuple[Canvas, Any]:
    canvas = Canvas(figsize=(count * width + 2, 3.4), layout="constrained")
    return canvas, canvas.subplots(1, count, squeeze=False)[0]


def _look(engine: Engine, among: Iterable[Engine]) -> dict[str, Any]:
    return {"label": " ".join(engine), "color": colormaps["tab20"](list(among).index(engine))}


def _engine(result: Result) -> Engine:
    return result.engine, result.variant
