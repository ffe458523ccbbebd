"""Speed and cost: engines take turns on the same texts, and what is reported are ratios within each round."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Worker, name_of, prepared
from benchmarks.data import AS_IT_COMES, BATCH, DOCUMENTS, LENGTHS, SORTED, sample_texts
from benchmarks.errors import EngineError
from benchmarks.machine import gpu_use, peaks
from benchmarks.results import RATE, Figure, Journal, Result
from benchmarks.subject import BASELINE, Subject, size_mb
from benchmarks.worker import Job, versions
from export.families import find_family
from export.layers import reads_first
from runtime.manifest import TOKENIZER
from runtime.tokenizer import Tokenizer

WORDS = (8, 16, 32, 64, 128)
"""Of the texts that show how cost grows with length."""
READ = 1.5
"""Seconds that a GPU must be busy for a reading of its use (``gpu_use``)."""
RARE = 0.05
"""Seconds from an answer to the next query, of a service that is mostly idle."""
PAUSE = 0.1
"""Seconds between turns: ONNX Runtime's threads look for more work some 40 ms after the last, at others' expense."""

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
    bulk: tuple[tuple[Any, ...], ...]
    """Kinds of texts, one of ``LENGTHS`` or ``documents``, how many, in which order, and perhaps a batch's size.

    More than a batch where lengths differ, since some engines sort.
    """
    callers: tuple[int, ...]
    """How many ask at once, in the order of measuring."""
    queries: int
    """How many queries of a single caller make a round."""
    indexed: int
    """Texts that the retriever indexes."""
    reranked: int
    """Queries whose nearest documents a reranker sorts."""
    growth: bool = False
    """Whether to measure how cost grows with length, batch, corpus and threads."""
    each: int = 20
    """How many queries of each of several callers make a round."""
    rare: int = 0
    """How many queries that come ``RARE`` seconds after the answer before make a round."""
    operations: float = inf
    """Most of a call in bulk; larger models get fewer texts, but a batch at least."""


PROFILES = {
    "quick": Profile(
        starts=3,
        rounds=2,
        bulk=(("short", 128, AS_IT_COMES), ("medium", 128, AS_IT_COMES), ("long", 12, AS_IT_COMES)),
        callers=(1, 16),
        queries=48,
        each=6,
        rare=24,
        indexed=5_000,
        reranked=5,
    ),
    "full": Profile(
        starts=2,
        rounds=3,
        bulk=(("short", 128, AS_IT_COMES), ("medium", 96, AS_IT_COMES), ("long", 16, AS_IT_COMES)),
        callers=(1, 16),
        queries=48,
        rare=24,
        indexed=10_000,
        reranked=25,
        growth=True,
    ),
    "int8": Profile(
        starts=2,
        rounds=3,
        bulk=(("short", 256, SORTED), (DOCUMENTS, 128, SORTED)),
        callers=(1,),
        queries=48,
        indexed=5_000,
        reranked=5,
        operations=0.7e12,
    ),
    "gpu": Profile(
        starts=1,
        rounds=3,
        bulk=(("spread", 10_000, AS_IT_COMES), ("spread", 10_000, AS_IT_COMES, 256)),
        callers=(1,),
        queries=100,
        indexed=20_000,
        reranked=25,
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
    """Whether it can be measured only once a start."""
    warm: bool = False
    """Whether no round has to go before that only warms up."""


def measure_speed(bench: Bench) -> None:
    """Measure cold start and memory, throughput, latency and growth of all engines, and the machine's peak in between.

    Whatever an engine has done in a start's rounds is recorded at once, and isn't measured again if the journal has it.
    """
    profile = bench.profile
    for start in range(profile.starts):
        _roofline(bench, 2 * start)
        loads = [
            _bulk(bench, "bulk", {"texts": kind, "order": order}, _inputs(bench, kind, count), *batch)
            for kind, count, order, *batch in profile.bulk
            if bench.corpus or kind != DOCUMENTS
        ]
        loads += [_latency(bench, callers) for callers in profile.callers]
        loads += [_latency(bench, 1, RARE)] if profile.rare else []
        _take_turns(bench, [_cold_start(bench), *loads], start)
        _roofline(bench, 2 * start + 1)
    if profile.growth:
        _growth(dataclasses.replace(bench, profile=dataclasses.replace(profile, rounds=1)))


def _growth(bench: Bench) -> None:
    """Throughput by length, batch, number of texts and threads, a single round of each."""
    medium = _inputs(bench, "medium", BATCH)

    def grow(by: str, value: int, inputs: list[Any], batch: int = BATCH, bench: Bench = bench) -> Load:
        return _bulk(bench, "growth", {"by": by, "value": value}, inputs, batch)

    threads = bench.jobs[0].threads
    # The longest first: the round that warms up then has tokens enough for what ours opens once, as the others' do.
    loads = [grow("words", words, _inputs(bench, (words, words), max(BATCH, 1024 // words))) for words in WORDS[::-1]]
    loads += [grow("batch", batch, medium, batch) for batch in (1, 8, 32)]
    loads += [grow("texts", count, _inputs(bench, "short", count)) for count in (32, 128, 256)]
    _take_turns(bench, [*loads, grow("threads", threads, medium)])
    while threads := threads // 2:
        fewer = dataclasses.replace(bench, jobs=[dataclasses.replace(job, threads=threads) for job in bench.jobs])
        _roofline(fewer, 0)
        _take_turns(fewer, [grow("threads", threads, medium, bench=fewer)])


def _bulk(
    bench: Bench,
    benchmark: str,
    settings: dict[str, Any],
    inputs: list[Any],
    batch: int = BATCH,
) -> Load:
    """All inputs in one call; those of growth sorted by length, so that it shows no padding."""
    tokens = _tokens(bench.subject, inputs)
    if settings.get("order") != AS_IT_COMES:
        order = np.argsort(tokens, kind="stable")
        inputs, tokens = [inputs[i] for i in order], [tokens[i] for i in order]
    count, whole = len(inputs), _operations(bench.subject, tokens)
    ours = whole - _left_out(bench.subject, tokens) if whole else 0

    def measure(worker: Worker) -> Sample:
        with gpu_use(worker.job.device) as busy:
            least = 0 if worker.job.device == "cpu" else READ
            seconds = worker.ask("bulk", inputs=inputs, batch=batch, least=least)["seconds"]
        sample = {"seconds": seconds, "texts/s": count / seconds, "tokens/s": sum(tokens) / seconds}
        work = ours if worker.job.engine == "ours" else whole
        rate = {f"{_precision(worker.job)}{RATE}": work / seconds / 1e9} if work else {}
        return sample | {"tokens": sum(tokens) / count} | rate | ({"gpu busy": float(np.mean(busy))} if busy else {})

    return Load(benchmark, settings | {"batch": batch, "count": count} | bench.jobs[0].place, measure)


def _latency(bench: Bench, callers: int, pause: float = 0.0) -> Load:
    """Short texts one by one; what counts is a single caller's median, or how many queries several get answered."""
    several = callers > 1
    inputs = _inputs(bench, "short", bench.profile.queries)
    if several or pause:  # the same ones, which a single caller has warmed up
        inputs = list(islice(cycle(inputs), bench.profile.rare if pause else bench.profile.each * callers))

    def measure(worker: Worker) -> Sample:
        answer = worker.ask("latency", inputs=inputs, callers=callers, pause=pause)
        p50, p95, p99 = np.percentile(answer["times"], (50, 95, 99))
        return {
            "seconds": answer["seconds"] / len(inputs) if several else float(p50),
            "p50 ms": 1000 * float(p50),
            "p95 ms": 1000 * float(p95),
            "p99 ms": 1000 * float(p99),
            "queries/s": len(inputs) / answer["seconds"],
            "CPU ms": 1000 * answer["cpu_s"] / len(inputs),
        }

    how = {"compared": "queries/s"} if several else {"pause ms": 1000 * pause} if pause else {}
    return Load("latency", {"callers": callers} | how | bench.jobs[0].place, measure, warm=bool(how))


def _cold_start(bench: Bench) -> Load:
    """From nothing to the first vector, and the most memory that medium texts take; in a new process once."""
    inputs = _inputs(bench, "medium", BATCH)

    def measure(worker: Worker) -> Sample:
        worker.ask("bulk", inputs=inputs, batch=BATCH, least=0)
        cost = {"peak MB": worker.ask("memory")["peak_mb"], "disk MB": size_mb(worker.job)}
        return {"seconds": worker.cold_s, "load s": worker.load_s, **cost}

    return Load("cold", bench.jobs[0].place, measure, once=True, warm=True)


def _take_turns(bench: Bench, loads: Sequence[Load], start: int = 0) -> None:
    """Start every engine, and let them take turns at each load that the journal lacks of the start of this number."""
    if not _waiting(bench, bench.jobs, loads, start):
        return
    with contextlib.ExitStack() as stack:
        workers = {}
        for job in bench.jobs:
            bench.progress(f"starting {name_of(job)}", 0)
            time.sleep(PAUSE)
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
    first = 0 if load.warm else 1  # what goes before only warms up
    rounds = first + (1 if load.once else bench.profile.rounds)
    for number in range(rounds):
        for job in list(samples)[:: 1 if number % 2 else -1]:
            bench.progress(f"{words}: {name_of(job)}", number / rounds)
            time.sleep(PAUSE)
            try:
                samples[job].append(load.measure(workers[job]))
            except EngineError as error:
                bench.left_out(error)
                del samples[job], workers[job]
    timed = {job: held[first:] for job, held in samples.items()}
    baseline = next((held for job, held in timed.items() if (job.engine, job.variant) == BASELINE), None)
    for job, held in timed.items():
        names = dict.fromkeys(name for sample in held for name in sample)  # a short round has no reading of the GPU's
        figures = {name: Figure.of([sample[name] for sample in held if name in sample]) for name in names}
        if baseline:
            figures["ratio"] = _ratio(baseline, held)
        if job.engine == "ours":
            figures |= {f"to {name_of(other)}": _ratio(theirs, held) for other, theirs in timed.items() if other != job}
        bench.found(bench.journal.add(_result(bench, job, load).filled(figures, workers[job].versions)))


def _ratio(theirs: Sequence[Sample], ours: Sequence[Sample]) -> Figure:
    """How many times as fast, round by round."""
    return Figure.of([a["seconds"] / b["seconds"] for a, b in zip(theirs, ours, strict=True)])


def _roofline(bench: Bench, number: int) -> None:
    """The machine's peaks in 10⁹ operations a second, by precision: several times a run, as it is noisy."""
    place, model = bench.jobs[0].place, bench.subject.manifest.name
    result = Result(benchmark="roofline", engine="machine", variant="", model=model, settings=place, figures={})
    if bench.journal.count(result) <= number:
        figures = {name: Figure.of(rate) for name, rate in peaks(bench.jobs[0].threads, bench.jobs[0].device).items()}
        bench.found(bench.journal.add(result.filled(figures, versions(("onnxruntime", "numpy")))))


def _result(bench: Bench, job: Job, load: Load) -> Result:
    return Result(
        benchmark=load.benchmark,
        engine=job.engine,
        variant=job.variant,
        model=bench.subject.manifest.name,
        settings=load.settings,
        figures={},
    )


def _inputs(bench: Bench, kind: str | tuple[int, int], count: int) -> list[Any]:
    """Texts of a kind or of so many words; for a reranker pairs of a short query and such a text, a batch a query."""
    if kind == DOCUMENTS:
        texts = _documents(bench, count)
    else:
        texts = sample_texts(count, LENGTHS[kind] if isinstance(kind, str) else kind, bench.corpus)
    inputs: list[Any] = texts
    if bench.subject.manifest.kind == "reranker":
        queries = sample_texts(-(-len(texts) // BATCH), LENGTHS["short"], bench.corpus, seed=1)
        inputs = [(queries[i // BATCH], text) for i, text in enumerate(texts)]
    if count > BATCH and _operations(bench.subject, _tokens(bench.subject, inputs)) > bench.profile.operations:
        return _inputs(bench, kind, max(BATCH, count // 2))
    return inputs


def _documents(bench: Bench, count: int) -> list[str]:
    """Batches that sorting the whole corpus by length would make, spread evenly over all lengths."""
    lengths = Tokenizer(bench.subject.artifact / TOKENIZER, bench.subject.manifest.max_length).count(bench.corpus or ())
    order = np.argsort(lengths, kind="stable")
    batches = np.array_split(order, max(1, count // BATCH))
    middles = [batch[max(0, len(batch) // 2 - BATCH // 2) :][:BATCH] for batch in batches]
    return [(bench.corpus or ())[i] for i in np.concatenate(middles)]


def _tokens(subject: Subject, inputs: Sequence[Any]) -> list[int]:
    """How many tokens of each input are computed, special ones included."""
    tokenizer = Tokenizer(subject.artifact / TOKENIZER, subject.manifest.max_length)
    if subject.manifest.kind == "embedder":
        return [min(count, subject.manifest.max_length) for count in tokenizer.count(inputs)]
    return [len(ids) for ids, _ in tokenizer.encode_pairs(inputs, True)]


def _precision(job: Job) -> str:
    """What the matrix products of a variant are in."""
    return "int8" if job.variant.startswith("int8") else "fp16" if job.variant.endswith("16") else "fp32"


def _shape(subject: Subject) -> tuple[dict[str, Any], int, int, int]:
    """A model's ``config.json``, its width, layers and the widths within its FFN together; 0 what isn't known."""
    path = (subject.checkpoint or Path()) / "config.json"
    config = json.loads(path.read_text("utf-8")) if subject.checkpoint and path.exists() else {}
    hidden = config.get("hidden_size", config.get("dim", 0))
    layers = config.get("num_hidden_layers", config.get("n_layers", 0))
    inner = config.get("intermediate_size", config.get("hidden_dim", 0))
    gated = config.get("model_type") == "modernbert" or "num_key_value_heads" in config
    return config, hidden, layers, (3 if gated else 2) * inner


def _operations(subject: Subject, tokens: Sequence[int]) -> float:
    """Multiplications and additions in the matrix products of a model; 0 if its shape isn't known."""
    config, hidden, layers, inner = _shape(subject)
    if not (hidden and layers and inner):
        return 0
    if query := _query_width(config):  # a decoder's, whose tokens see those before them
        key = query // config["num_attention_heads"] * config["num_key_value_heads"]
        seen = sum(count * (count + 1) for count in tokens) / 2
        return float(layers * 2 * (hidden * (2 * query + 2 * key + inner) * sum(tokens) + 2 * query * seen))
    modern = config.get("model_type") == "modernbert"  # most of its layers see a window of tokens alone
    wide = -(-layers // config.get("global_attn_every_n_layers", 3)) if modern else layers
    window = config.get("local_attention", 128)
    seen = sum(wide * count * count + (layers - wide) * count * min(count, window) for count in tokens)
    head = hidden + subject.manifest.dim if subject.kind == "sparse_embedder" else 0  # of words, on each token
    return float(2 * hidden * (layers * (4 * hidden + inner) + head) * sum(tokens) + 4 * hidden * seen)


def _query_width(config: dict[str, Any]) -> int:
    """What a decoder's queries have in all heads, which isn't its width; 0 of an encoder."""
    if "num_key_value_heads" not in config:
        return 0
    heads: int = config["num_attention_heads"]
    return heads * (config.get("head_dim") or config["hidden_size"] // heads)


def _left_out(subject: Subject, tokens: Sequence[int]) -> float:
    """Those of them that our graph spares in the last layer, where one state of each text is read."""
    manifest, (config, hidden, _, inner) = subject.manifest, _shape(subject)
    if query := _query_width(config):
        others = sum(tokens) - len(tokens) if manifest.pooling == "last_token" else 0
        return float(2 * hidden * (query + inner) * others)
    head = config.get("classifier_pooling", "cls")
    if not (find_family(manifest.architecture) and reads_first(manifest.outputs, manifest.pooling, head)):
        return 0
    pairs = sum(count * count - count for count in tokens)
    return float(2 * hidden * (2 * hidden + inner) * (sum(tokens) - len(tokens)) + 4 * hidden * pairs)
