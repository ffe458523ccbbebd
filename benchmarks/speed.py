"""Speed and cost: engines take turns on the same texts, and what is reported are ratios within each round."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Worker, name_of, prepared
from benchmarks.data import LENGTHS, sample_texts
from benchmarks.errors import EngineError
from benchmarks.machine import peaks, versions
from benchmarks.results import Figure, Journal, Result
from benchmarks.subject import BASELINE, Subject, size_mb
from benchmarks.worker import Job
from runtime.manifest import TOKENIZER
from runtime.tokenizer import Tokenizer

BATCH = 32
WORDS = (8, 16, 32, 64, 128)
"""Of the texts that show how cost grows with length."""

Sample = dict[str, float]
"""Figures of one engine in one round; ``seconds`` is what ratios are made of."""
Measure = Callable[[Worker], Sample]


@dataclass(frozen=True, slots=True)
class Profile:
    """How much is measured."""

    starts: int
    """How often every engine is started anew."""
    rounds: int
    """How often the engines take turns after each start."""
    texts: dict[str, int]
    """How many texts of each of ``LENGTHS``."""
    orders: tuple[str, ...]
    """In which order they come; ``by length`` spares the engines that don't sort their padding."""
    callers: tuple[int, ...]
    """How many ask at once, in the order of measuring."""
    queries: int
    """How many queries' latencies make a round."""
    indexed: int
    """Texts that the retriever indexes."""
    growth: bool
    """Whether to measure how cost grows with length, batch, corpus and threads."""


PROFILES = {
    "quick": Profile(
        starts=2,
        rounds=3,
        texts={"short": 128, "medium": 32, "long": 12},
        orders=("as it comes",),
        callers=(1, 16),
        queries=48,
        indexed=5_000,
        growth=False,
    ),
    "full": Profile(
        starts=3,
        rounds=3,
        texts={"short": 256, "medium": 64, "long": 24},
        orders=("as it comes", "by length"),
        callers=(1, 4, 16),
        queries=96,
        indexed=100_000,
        growth=True,
    ),
    "int8": Profile(
        starts=2,
        rounds=4,
        texts={"short": 256, "medium": 64, "long": 24},
        orders=("by length",),
        callers=(1,),
        queries=96,
        indexed=5_000,
        growth=False,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A model's engines, what they are measured on, and where results go."""

    subject: Subject
    jobs: Sequence[Job]
    profile: Profile
    journal: Journal
    corpus: Sequence[str] | None = None
    """Texts to cut others from; by default words drawn from the calibration texts."""
    found: Callable[[Result], object] = lambda result: None
    """Is told of every result."""
    left_out: Callable[[EngineError], object] = lambda error: None
    """Is told of every engine that is missing or failed; the rest goes on."""
    progress: Callable[[str, float], object] = lambda step, share: None


@dataclass(frozen=True, slots=True)
class Load:
    """Something that every engine does in turn."""

    benchmark: str
    settings: dict[str, Any]
    measure: Measure
    once: bool = False
    """Whether it can be measured only once a start, with nothing to warm up."""


def measure_speed(bench: Bench) -> None:
    """Measure the machine's peak, then cold start and memory, throughput, latency and growth of all engines.

    Whatever an engine has done in a start's rounds is recorded at once, and isn't measured again if the journal has it.
    """
    profile, medium = bench.profile, LENGTHS["medium"]
    for start in range(profile.starts):
        peak = _roofline(bench, start)
        loads = [
            _bulk(bench, peak, "bulk", {"texts": kind, "order": order}, words, profile.texts[kind])
            for kind, words in LENGTHS.items()
            for order in profile.orders
        ]
        loads += [_latency(bench, callers) for callers in profile.callers]
        _take_turns(bench, [_cold_start(bench), *loads], start)
    if not profile.growth:
        return
    peak = _roofline(bench, profile.starts)
    grow = partial(_bulk, bench, peak, "growth")
    loads = [grow({"by": "words", "value": words}, (words, words), max(BATCH, 2048 // words)) for words in WORDS]
    loads += [grow({"by": "batch", "value": batch}, medium, 64, batch) for batch in (1, 8, 32, 64)]
    loads += [grow({"by": "texts", "value": count}, LENGTHS["short"], count) for count in (32, 256, 1024)]
    _take_turns(bench, loads)
    for threads in range(1, bench.jobs[0].threads + 1):
        fewer = dataclasses.replace(bench, jobs=[dataclasses.replace(job, threads=threads) for job in bench.jobs])
        settings = {"by": "threads", "value": threads}
        _take_turns(fewer, [_bulk(fewer, peak, "growth", settings, medium, profile.texts["medium"])])


def _bulk(
    bench: Bench,
    peak: dict[str, float],
    benchmark: str,
    settings: dict[str, Any],
    words: tuple[int, int],
    count: int,
    batch: int = BATCH,
) -> Load:
    """All inputs in one call; those of growth sorted by length, so that it shows no padding."""
    inputs = _inputs(bench, words, count)
    tokens = _tokens(bench.subject, inputs)
    if settings.get("order") != "as it comes":
        order = np.argsort(tokens, kind="stable")
        inputs, tokens = [inputs[i] for i in order], [tokens[i] for i in order]
    work = _operations(bench.subject, tokens)

    def measure(worker: Worker) -> Sample:
        seconds = worker.ask("bulk", inputs=inputs, batch=batch)["seconds"]
        sample = {"seconds": seconds, "texts/s": count / seconds, "tokens/s": sum(tokens) / seconds}
        roof = peak["int8" if worker.job.variant == "int8" else "fp32"]
        return sample | {"tokens": sum(tokens) / count} | ({"share": work / seconds / roof / 1e9} if work else {})

    return Load(benchmark, settings | {"batch": batch, "count": count, "threads": bench.jobs[0].threads}, measure)


def _latency(bench: Bench, callers: int) -> Load:
    """Short texts one by one, from several callers at once."""
    inputs = _inputs(bench, LENGTHS["short"], bench.profile.queries)

    def measure(worker: Worker) -> Sample:
        answer = worker.ask("latency", inputs=inputs, callers=callers)
        p50, p95, p99 = np.percentile(answer["times"], (50, 95, 99))
        return {
            "seconds": float(p50),
            "p50 ms": 1000 * float(p50),
            "p95 ms": 1000 * float(p95),
            "p99 ms": 1000 * float(p99),
            "queries/s": len(inputs) / answer["seconds"],
        }

    return Load("latency", {"callers": callers, "threads": bench.jobs[0].threads}, measure)


def _cold_start(bench: Bench) -> Load:
    """From nothing to the first vector, and the most memory that medium texts take; in a new process once."""
    inputs = _inputs(bench, LENGTHS["medium"], bench.profile.texts["medium"])

    def measure(worker: Worker) -> Sample:
        worker.ask("bulk", inputs=inputs, batch=BATCH)
        cost = {"peak MB": worker.ask("memory")["peak_mb"], "disk MB": size_mb(worker.job)}
        return {"seconds": worker.cold_s, "load s": worker.load_s, **cost}

    return Load("cold", {"threads": bench.jobs[0].threads}, measure, once=True)


def _take_turns(bench: Bench, loads: Sequence[Load], start: int = 0) -> None:
    """Start every engine, and let them take turns at each load that the journal lacks of the start of this number."""
    if not _waiting(bench, bench.jobs, loads, start):
        return
    with contextlib.ExitStack() as stack:
        workers = {}
        for job in bench.jobs:
            bench.progress(f"starting {name_of(job)}", 0)
            try:
                workers[job] = stack.enter_context(Worker(prepared(job)))
            except EngineError as error:
                bench.left_out(error)
        for load in _waiting(bench, list(workers), loads, start):
            _rounds(bench, load, workers)


def _waiting(bench: Bench, jobs: Sequence[Job], loads: Sequence[Load], start: int) -> list[Load]:
    return [load for load in loads if any(bench.journal.count(_result(bench, job, load)) <= start for job in jobs)]


def _rounds(bench: Bench, load: Load, workers: dict[Job, Worker]) -> None:
    """A B B A A B …: one load, several rounds of all engines, and a result for each; one that fails is dropped."""
    samples: dict[Job, list[Sample]] = {job: [] for job in workers}
    words = " ".join(str(value) for value in (load.benchmark, *load.settings.values()))
    rounds = 1 if load.once else bench.profile.rounds + 1  # the first one only warms up
    for number in range(rounds):
        for job in list(samples)[:: 1 if number % 2 else -1]:
            bench.progress(f"{words}: {name_of(job)}", number / rounds)
            try:
                samples[job].append(load.measure(workers[job]))
            except EngineError as error:
                bench.left_out(error)
                del samples[job], workers[job]
    timed = {job: held if load.once else held[1:] for job, held in samples.items()}
    baseline = next((held for job, held in timed.items() if (job.engine, job.variant) == BASELINE), None)
    for job, held in timed.items():
        figures = {name: Figure.of([sample[name] for sample in held]) for name in held[0]}
        if baseline:
            ratios = [base["seconds"] / sample["seconds"] for base, sample in zip(baseline, held, strict=True)]
            figures["ratio"] = Figure.of(ratios)
        bench.found(bench.journal.add(_result(bench, job, load).filled(figures, workers[job].versions)))


def _roofline(bench: Bench, start: int) -> dict[str, float]:
    """The machine's peaks in 10⁹ operations a second, by ``fp32`` and ``int8``; anew at each start, as it is noisy."""
    threads = bench.jobs[0].threads
    settings = {"threads": threads}
    result = Result(benchmark="roofline", engine="machine", variant="", model="", settings=settings, figures={})
    held = [measured for measured in bench.journal.results if measured.key == result.key]
    if len(held) <= start:
        figures = {name: Figure.of(rate) for name, rate in peaks(threads).items()}
        held.append(bench.journal.add(result.filled(figures, versions(("onnxruntime", "numpy")))))
        bench.found(held[-1])
    return {name: figure.median for name, figure in held[min(start, len(held) - 1)].figures.items()}


def _result(bench: Bench, job: Job, load: Load) -> Result:
    return Result(
        benchmark=load.benchmark,
        engine=job.engine,
        variant=job.variant,
        model=bench.subject.manifest.name,
        settings=load.settings,
        figures={},
    )


def _inputs(bench: Bench, words: tuple[int, int], count: int) -> list[Any]:
    """Texts, or for a reranker pairs of a short query and such a text."""
    texts = sample_texts(count, words, bench.corpus)
    if bench.subject.manifest.kind == "embedder":
        return texts
    return list(zip(sample_texts(count, LENGTHS["short"], bench.corpus, seed=1), texts, strict=True))


def _tokens(subject: Subject, inputs: Sequence[Any]) -> list[int]:
    """How many tokens of each input are computed, special ones included."""
    tokenizer = Tokenizer(subject.artifact / TOKENIZER, subject.manifest.max_length)
    if subject.manifest.kind == "embedder":
        return [min(count, subject.manifest.max_length) for count in tokenizer.count(inputs)]
    return [len(ids) for ids, _ in tokenizer.encode_pairs(inputs, True)]


def _operations(subject: Subject, tokens: Sequence[int]) -> float:
    """Multiplications and additions in the matrix products of an encoder; 0 if its shape isn't known."""
    path = (subject.checkpoint or Path()) / "config.json"
    config = json.loads(path.read_text("utf-8")) if subject.checkpoint and path.exists() else {}
    hidden = config.get("hidden_size", config.get("dim"))
    layers = config.get("num_hidden_layers", config.get("n_layers"))
    inner = config.get("intermediate_size", config.get("hidden_dim"))
    if not (hidden and layers and inner):
        return 0
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner) * sum(tokens)
    attention = 4 * hidden * sum(count * count for count in tokens)
    return float(layers * (linear + attention))
