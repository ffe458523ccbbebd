"""Results for people: Markdown tables, and the README's section, which is never typed by hand."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.data import AS_IT_COMES, BATCH, DOCUMENTS, LENGTHS, SORTED
from benchmarks.errors import DataError
from benchmarks.plots import draw
from benchmarks.results import QUALITY, RATE, Figure, Result, newest, read_results
from benchmarks.subject import BASELINE

MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
TITLES = {
    "ours": "**bge-onnx**",
    "sentence_transformers": "sentence-transformers",
    "flag_embedding": "FlagEmbedding",
    "openvino": "OpenVINO",
    "flashrank": "FlashRank",
}
KINDS = {kind: f"{low}–{high} words" for kind, (low, high) in LENGTHS.items()} | {DOCUMENTS: "documents"}

Row = Sequence[str]
Show = Callable[[Figure, Figure | None], str]
"""A figure as a cell shows it, given the baseline's."""


@dataclass(frozen=True, slots=True)
class Column:
    """Which figure of each engine a column of a table holds."""

    title: str
    benchmark: str
    figure: str
    show: Show
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that pick a result, None for one that it must not have; it may have others."""

    def of(self, results: Iterable[Result], model: str, engine: str, variant: str) -> Figure | None:
        """The figure of an engine, if that was measured."""
        for result in results:
            if (result.benchmark, result.model, result.engine, result.variant) == (
                self.benchmark,
                model,
                engine,
                variant,
            ) and all(result.settings.get(name) == value for name, value in self.settings.items()):
                return result.figures.get(self.figure)
        return None


@dataclass(frozen=True, slots=True)
class Bar:
    """What our int8 is asked to reach in a figure, by the dimensions of the model."""

    what: str
    benchmark: str
    figure: str
    settings: dict[str, Any] = field(default_factory=dict)
    bars: dict[int, float] = field(default_factory=dict)
    at_most: bool = False
    beside: Literal["minus", "over"] | None = None
    """How the figure is set beside the baseline's, if it is."""


def _speed_bars() -> Iterator[Bar]:
    stock, scheduled, torch = "optimum int8", "optimum int8-scheduled", " ".join(BASELINE)
    streams = ("openvino int8", "openvino int8-throughput")
    for kind, bars in (
        ("short", {stock: {384: 1.4}, scheduled: {384: 1.1}}),
        (DOCUMENTS, {stock: {384: 1.5, 768: 1.15}, scheduled: {384: 1.1}, torch: {384: 4.0}}),
    ):
        bars |= {"optimum fp32-o3": {768: 3.0}} | dict.fromkeys(streams, {384: 0.85, 768: 0.85})
        for other in (stock, scheduled, *streams, "optimum fp32-o3", torch):
            texts = "whole documents" if kind == DOCUMENTS else KINDS[kind]
            yield Bar(f"{texts}, times {other}", "bulk", f"to {other}", {"texts": kind}, bars.get(other, {}))
    for other in (stock, *streams, torch):
        bar = {384: 1 / 0.55} if other == stock else {}
        one = {"callers": 1, "pause ms": None}
        yield Bar(f"one query, times {other}", "latency", f"to {other}", one, bar)


INT8 = (
    *_speed_bars(),
    Bar("STS, Spearman × 100", "sts", "spearman", {}, {384: 81.95}),
    Bar("STS, cosine to torch fp32, mean", "sts", "cosine mean", {}, {384: 0.997}),
    Bar("STS, cosine to torch fp32, least", "sts", "cosine min", {}, {384: 0.96}),
    Bar("retrieval, nDCG@10 beyond torch fp32's", "retrieval", "nDCG@10", {}, {384: -0.003}, beside="minus"),
    Bar("retrieval, cosine to torch fp32, mean", "retrieval", "cosine mean", {}, {384: 0.997}),
    Bar("retrieval, cosine to torch fp32, least", "retrieval", "cosine min", {}, {384: 0.96}),
    Bar(
        "RAM to embed the corpus, of torch fp32's", "retrieval", "peak MB", {}, {384: 0.5}, at_most=True, beside="over"
    ),
    Bar("RAM with 32 texts, of torch fp32's", "cold", "peak MB", {}, at_most=True, beside="over"),
    Bar("RAM with 32 texts, MB", "cold", "peak MB", at_most=True),
    Bar("weights on disk, MB", "cold", "disk MB", {}, {384: 24.0}, at_most=True),
)
"""The bars are those that all-MiniLM-L6-v2 (384 dimensions) and a model of bge-base's size (768) were given."""


def newest_results(path: Path) -> list[Result]:
    """Of each benchmark and model in a results file the last run, which is what gets reported.

    Raises:
        DataError: It is no results file, or holds no results.
    """
    if not (results := newest(read_results(path))):
        raise DataError(f"{path}: holds no results; measure first: python -m benchmarks all")
    return results


def section(results: Sequence[Result], source: str) -> str:
    """What stands between the README's markers.

    Args:
        results: The newest ones of a results file.
        source: The file's path, from the README.
    """
    parts = [
        "## Performance",
        f"Generated from [{source}]({source}) by `python -m benchmarks report`; "
        f"[all tables and plots]({source.removesuffix('.jsonl')}/report.md). {_origin(results)}",
    ]
    for model in _models(results):
        title = f"**{model}**, speed as times that of sentence-transformers in torch fp32 (medians):"
        parts += _engines(results, model, title, _headline(results))
    return "\n\n".join(parts) + "\n"


def write_report(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write ``report.md`` with every table, and the plots as SVG beside it.

    Args:
        results: The newest ones of a results file.
        folder: Where to; made if it isn't there.

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = draw(results, folder)
    path = folder / "report.md"
    path.write_text(full_report(results, [plot.name for plot in plots]), "utf-8")
    return [path, *plots]


def full_report(results: Sequence[Result], plots: Sequence[str]) -> str:
    """Every table, and images of some files beside it."""
    results, peaks = _with_shares(results)
    parts = ["# Benchmarks", _origin(results), f"Peak, {PEAK}, in 10⁹ operations a second: {'; '.join(peaks)}."]
    for model in _models(results):
        for title, columns in (
            (f"**Speed**, {RATIO}", _speed(results)),
            ("**Texts (or pairs) a second**", _bulk(results, "texts/s")),
            ("**Tokens a second**, those of padding not counted", _bulk(results, "tokens/s")),
            ("**Share of the time in which the GPU was busy**, by nvidia-smi", _bulk(results, "gpu busy")),
            (f"**Cost and quality**, {COST}", _cost(results)),
            ("**Milliseconds for one short text**, by callers at once and pauses before", _latency(results)),
            *((f"**Tokens a second by {by}**", _growth(results, by)) for by in ("words", "batch", "texts", "threads")),
            ("**Quality**, and what is retained of torch fp32's", _quality(results, first=False)),
        ):
            parts += _engines(results, model, f"## {model}\n\n{title}:" if "Speed" in title else f"{title}:", columns)
            parts += _lengths(results, model) if "Speed" in title else []
    parts += [*_two_stages(results), *_retriever(results)]
    return "\n\n".join([*parts, *(f"![{name}]({name})" for name in plots)]) + "\n"


def int8_table(results: Sequence[Result], model: str, dim: int) -> str:
    """One table of our int8: each figure that was measured, beside the bar if it has one."""
    rows = []
    for bar in INT8:
        column = Column(bar.what, bar.benchmark, bar.figure, spread, bar.settings)
        figure, baseline = (column.of(results, model, *engine) for engine in (("ours", "int8"), BASELINE))
        if figure is None or (bar.beside and baseline is None):
            continue
        if bar.beside and baseline:
            value = figure.median - baseline.median if bar.beside == "minus" else figure.median / baseline.median
            figure = Figure.of(value)
        low, high, value = figure.low, figure.high, figure.median
        shown = f"{value:.4g} ({low:.4g}–{high:.4g})" if figure.runs > 1 else f"{value:.5g}"
        limit = bar.bars.get(dim)
        met = limit is None or (value <= limit if bar.at_most else value >= limit)
        asked = "" if limit is None else f"{'≤' if bar.at_most else '≥'} {limit:.4g}"
        rows.append([bar.what, shown, asked, "" if limit is None else "met" if met else "**missed**"])
    title = f"**int8 of {model}**: times as fast as others in the same round, in brackets the least and the greatest"
    return "\n\n".join([f"{title}:", markdown_table(["", "bge-onnx int8", "bar", ""], rows), _origin(results)])


def update_readme(readme: Path, text: str) -> bool:
    """Put the section between the markers of a README.

    Returns:
        Whether that changed it.

    Raises:
        DataError: The markers aren't there.
    """
    before, _, after = _around(readme)
    whole = f"{before}{MARKERS[0]}\n{text}{MARKERS[1]}{after}"
    changed = whole != readme.read_text("utf-8")
    if changed:
        readme.write_text(whole, "utf-8")
    return changed


def readme_section(readme: Path) -> str:
    """What stands between the markers now.

    Raises:
        DataError: The markers aren't there.
    """
    return _around(readme)[1].removeprefix("\n")


def markdown_table(header: Row, rows: Iterable[Row]) -> str:
    """A table, the first column to the left and all others to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def spread(figure: Figure, baseline: Figure | None = None) -> str:
    """The median, and the least and greatest if there were several runs."""
    shown = _digits(figure.median)
    return f"{shown} ({_digits(figure.low)}–{_digits(figure.high)})" if figure.runs > 1 else shown


def median(figure: Figure, baseline: Figure | None = None) -> str:
    """The median alone."""
    return _digits(figure.median)


def percent(figure: Figure, baseline: Figure | None = None) -> str:
    """A share of one."""
    return f"{100 * figure.median:.0f}%"


def precisely(figure: Figure, baseline: Figure | None = None) -> str:
    """Quality, as people compare it."""
    return f"{figure.median:.2f}" if figure.median > 2 else f"{figure.median:.4f}"


def retained(figure: Figure, baseline: Figure | None) -> str:
    """The figure, and its share of the baseline's."""
    shown = precisely(figure)
    return shown if baseline is None else f"{shown} ({100 * figure.median / baseline.median:.1f}%)"


RATIO = "times that of sentence-transformers in torch fp32, in brackets the least and the greatest of all runs"
PEAK = "the most that a large matrix product, or else any engine, ever reached in the same precision on as many threads"
COST = f"share: of {PEAK}; in brackets what is retained of torch fp32's"


def _with_shares(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """The results with each engine's share ``of peak``, and the peaks in words.

    Machines are noisy, and what an engine has reached the machine can: so the greatest of all is the peak.
    """
    peaks: dict[tuple[str, ...], float] = {}
    for result in sorted(results, key=lambda held: held.benchmark != "roofline"):
        for place, figure in _rates(result):
            if result.benchmark == "roofline" or place in peaks:
                peaks[place] = max(figure.high, peaks.get(place, 0))
    shared = []
    for result in results:
        shares = [("of peak", figure.over(peaks[place])) for place, figure in _rates(result) if place in peaks]
        shared.append(dataclasses.replace(result, figures=result.figures | dict(shares)))
    words = [f"{precision} {_digits(peak)} with {threads} threads" for (precision, threads, *_), peak in peaks.items()]
    return shared, words


def _rates(result: Result) -> Iterator[tuple[tuple[str, ...], Figure]]:
    """The operations a second that it holds, each with what must be equal for others to be set against it."""
    for name, figure in result.figures.items():
        if result.benchmark == "roofline" or name.endswith(RATE):
            place = [str(result.settings.get(of)) for of in ("threads", "device")]
            yield (name.removesuffix(RATE), *place, str(result.machine)), figure


def _headline(results: Sequence[Result]) -> list[Column]:
    """What the README shows: no sorted texts, and one caller and the most alone."""
    columns = _speed(results)
    between = sorted({c.settings["callers"] for c in columns if "callers" in c.settings})[1:-1]
    speed = [
        dataclasses.replace(column, show=median)
        for column in columns
        if column.settings.get("order") != SORTED and column.settings.get("callers") not in between
    ]
    cost = [
        Column(f"{_asked(rare)}: CPU ms", "latency", "CPU ms", median, rare)
        for rare in _callers(results)
        if rare["pause ms"]
    ]
    cost += [Column("MB RAM", "cold", "peak MB", median), Column("MB disk", "cold", "disk MB", median)]
    return [*speed, *cost, *(dataclasses.replace(column, show=precisely) for column in _quality(results, first=True))]


def _speed(results: Sequence[Result]) -> list[Column]:
    latencies = []
    for how in _callers(results):
        title = _asked(how)
        if how["callers"] > 1:
            title = f"{title}, {how['compared']}" if how["compared"] else f"of {title} at once"
        latencies.append(Column(title, "latency", "ratio", spread, how))
    return [*_bulk(results, "ratio"), *latencies, Column("cold start", "cold", "ratio", spread)]


def _bulk(results: Sequence[Result], figure: str) -> list[Column]:
    """As the texts come, and sorted by length beforehand or in batches of another size where that was measured."""
    batches = sorted({r.settings["batch"] for r in results if r.benchmark == "bulk"})
    return [
        Column(
            f"{words}{note}{'' if batch == BATCH else f', batches of {batch}'}",
            "bulk",
            figure,
            spread,
            {"texts": kind, "order": order, "batch": batch},
        )
        for order, note in ((AS_IT_COMES, ""), (SORTED, ", sorted"))
        for kind, words in KINDS.items()
        for batch in batches
    ]


def _lengths(results: Sequence[Result], model: str) -> list[str]:
    """How long its texts are in tokens, which isn't what their words suggest where the model can't read on."""
    held = [r for r in results if (r.benchmark, r.model) == ("bulk", model) and "tokens" in r.figures]
    means = {KINDS[r.settings["texts"]]: median(r.figures["tokens"]) for r in held}
    listed = ", ".join(f"{kind} {tokens}" for kind, tokens in means.items())
    return [f"Mean tokens of a text, cut at the most that the model takes: {listed}."] if held else []


def _cost(results: Sequence[Result]) -> list[Column]:
    medium = {"texts": "medium", "order": AS_IT_COMES}
    return [
        Column("texts/s", "bulk", "texts/s", median, medium),
        Column("share", "bulk", "of peak", percent, medium),
        Column("ms a query", "latency", "p50 ms", median, {"callers": 1, "pause ms": None}),
        Column("s to the first", "cold", "seconds", median),
        Column("MB RAM", "cold", "peak MB", median),
        Column("MB disk", "cold", "disk MB", median),
        *_quality(results, first=True),
    ]


def _latency(results: Sequence[Result]) -> list[Column]:
    return [
        Column(f"{_asked(how)}: {name.removesuffix(' ms')}", "latency", name, median, how)
        for how in _callers(results)
        for name in ("p50 ms", "p95 ms", "p99 ms", "CPU ms", "queries/s")
    ]


def _callers(results: Sequence[Result]) -> list[dict[str, Any]]:
    """How many asked at once, after which pause, and what they are compared by: medians where nothing is named."""
    names = ("callers", "pause ms", "compared")
    found = {tuple(r.settings.get(name) for name in names) for r in results if r.benchmark == "latency"}
    ordered = sorted(found, key=lambda held: [value or 0 for value in held[:2]] + [held[2] or ""])
    return [dict(zip(names, held, strict=True)) for held in ordered]


def _asked(how: dict[str, Any]) -> str:
    callers, pause = how["callers"], how["pause ms"]
    return f"{callers} callers" if callers > 1 else f"a query after {pause:.0f} ms" if pause else "one query"


def _growth(results: Sequence[Result], by: str) -> list[Column]:
    values = {r.settings["value"] for r in results if r.benchmark == "growth" and r.settings["by"] == by}
    return [Column(f"{value:,}", "growth", "tokens/s", spread, {"by": by, "value": value}) for value in sorted(values)]


def _quality(results: Sequence[Result], *, first: bool) -> list[Column]:
    return [
        Column(f"{data} {title}", benchmark, figure, retained, {"data": data})
        for benchmark, figures in QUALITY.items()
        for data in dict.fromkeys(r.settings["data"] for r in results if r.benchmark == benchmark)
        for figure, title in list(figures.items())[: 1 if first else None]
    ] + [
        Column(task, "mteb", "main score", retained, {"task": task})
        for task in dict.fromkeys(r.settings["task"] for r in results if r.benchmark == "mteb")
    ]


def _engines(
    results: Sequence[Result],
    model: str,
    title: str,
    columns: Sequence[Column],
    beside: tuple[str, str] = BASELINE,
) -> list[str]:
    """A titled table of a model's engines, without the columns and rows that would be empty."""
    engines = list(dict.fromkeys((r.engine, r.variant) for r in results if r.model == model))
    figures = {engine: [column.of(results, model, *engine) for column in columns] for engine in engines}
    baseline = figures.get(beside, [None] * len(columns))
    held = [i for i in range(len(columns)) if any(row[i] for row in figures.values())]
    rows = [
        [_engine(*engine), *(columns[i].show(figure, baseline[i]) if (figure := row[i]) else "" for i in held)]
        for engine, row in figures.items()
        if any(row)
    ]
    return [title, markdown_table(["", *(columns[i].title for i in held)], rows)] if rows else []


def _two_stages(results: Sequence[Result]) -> list[str]:
    """Retrieval before and after a reranker."""
    held = [result for result in results if result.benchmark == "two-stage"]
    if not held:
        return []
    metrics = tuple(QUALITY["retrieval"])
    rows = []
    for result in held:
        model, engine, variant = result.settings["embedder"].rsplit(" ", 2)
        figures = {name: f"{figure.median:.4f}" for name, figure in result.figures.items()}
        cells = [figures.get(f"{stage}{name}", "") for name in metrics for stage in ("first ", "")]
        second = f"{result.model}, {_engine(result.engine, result.variant)}"
        rows.append([f"{model}, {_engine(engine, variant)}", second, *cells, median(result.figures["pairs/s"])])
    data, queries = (held[0].settings.get(name, "all") for name in ("data", "queries"))
    title = f"**Two stages on {data}** ({queries} queries): the nearest {held[0].settings['candidates']} sorted again:"
    header = [f"{name}{stage}" for name in metrics for stage in (" before", " after")]
    return [title, markdown_table(["first stage", "second stage", *header, "pairs/s"], rows)]


def _retriever(results: Sequence[Result]) -> list[str]:
    """What indexing and searching cost."""
    rows = [
        [
            f"{result.settings['texts']:,} with {result.model} {result.variant}",
            median(result.figures["texts/s"]),
            *(median(result.figures[f"{stage} ms"]) for stage in ("embed", "retrieve", "search")),
            f"{result.figures['MB'].median:.0f} MB",
            f"{result.figures['load s'].median:.2f} s",
        ]
        for result in results
        if result.benchmark == "retriever"
    ]
    stages = ["ms to embed a query", "ms to find 100", "ms with the reranker"]
    header = ["texts of 6 to 14 words", "indexed a second", *stages, "on disk", "to open"]
    title = "**Retriever**, from text to the index and from a query to 10 reranked hits:"
    return [title, markdown_table(header, rows)] if rows else []


def _digits(value: float) -> str:
    """Three significant ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _engine(engine: str, variant: str) -> str:
    return f"{TITLES.get(engine, engine)} {variant}"


def _models(results: Iterable[Result]) -> list[str]:
    """Those that have results of more than the second stage alone."""
    return list(dict.fromkeys(r.model for r in results if r.model and r.benchmark not in ("two-stage", "retriever")))


def _origin(results: Iterable[Result]) -> str:
    """Machine, versions and commits that the results come from."""
    held = list(results)
    machines = {
        ", ".join(
            [*([m["gpu"]] if "gpu" in m else []), m["cpu"], f"{m['cores']} cores", *m["instructions"]]
            + [f"{m['memory_gb']} GB", m["system"]]
        )
        for m in (result.machine for result in held)
    }
    packages: dict[str, set[str]] = {}
    for result in held:
        for package, number in result.versions.items():
            packages.setdefault(package, set()).add(number)
    listed = ", ".join(f"{package} {'/'.join(sorted(numbers))}" for package, numbers in sorted(packages.items()))
    commits = ", ".join(sorted({f"`{result.commit}`" for result in held}))
    return f"Machine: {'; '.join(sorted(machines))}. Versions: {listed}. Commit {commits}."


def _around(readme: Path) -> tuple[str, str, str]:
    try:
        text = readme.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{readme}: can't be read ({error}); pass the README with --readme") from None
    before, opening, rest = text.partition(MARKERS[0])
    inside, closing, after = rest.partition(MARKERS[1])
    if not (opening and closing):
        raise DataError(f"{readme}: lacks the lines {' and '.join(MARKERS)}; put them where the section belongs")
    return before, inside, after
