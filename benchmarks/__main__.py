"""The command line: parses and prints; everything it does can be called from Python."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import client, machine, quality, report
    from benchmarks.compare import compare, lacking
    from benchmarks.data import read_beir, read_sts
    from benchmarks.errors import DataError, EngineError
    from benchmarks.mteb import measure_mteb
    from benchmarks.results import Journal, Result
    from benchmarks.retriever import measure_retriever
    from benchmarks.speed import PROFILES, Bench, measure_speed
    from benchmarks.subject import BASELINE, Subject, open_subject, plan_jobs
    from runtime import Embedder, Reranker
    from runtime.errors import BgeOnnxError
    from runtime.manifest import load_manifest
    from runtime.session import usable_cpus
except ImportError as missing:
    package = (missing.name or "").partition(".")[0]
    sys.exit(f"error: {package} isn't installed; run: pip install 'bge-onnx[cpu,retrieve,export,bench]'")

INT8_ENGINES = (
    "ours:int8,sentence_transformers:fp32,optimum:fp32-o3,optimum:int8,optimum:int8-scheduled,openvino:int8,"
    "openvino:int8-throughput"
)
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 on an error, 2 on bad usage, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    errors = _errors()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return options.action(options) or 0
    except BgeOnnxError as error:
        errors.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}")
        return 1
    except KeyboardInterrupt:
        errors.print("[red]interrupted:[/red] what was measured is kept; go on with the same command and --resume")
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Speed, cost and quality beside the peers'.")
    modes = parser.add_subparsers(required=True, metavar="MODE")
    measured = {
        "all": (_all, "everything below that is measured"),
        "speed": (_speed, "throughput, latency, cold start and memory"),
        "quality": (_quality, "STS, retrieval, and retrieval in two stages"),
        "int8": (_int8, "our int8 beside the others', in one table"),
        "retriever": (_retriever, "indexing and searching with our Retriever"),
    }
    for name, (action, text) in measured.items():
        mode = modes.add_parser(name, help=text)
        mode.set_defaults(action=action, reranker=None)
        mode.add_argument("artifact", type=Path, help="of an embedder (or, for speed and quality, a reranker)")
        if name in ("all", "quality", "retriever"):
            mode.add_argument("--reranker", type=Path, metavar="ARTIFACT", help="sorts what the embedder finds again")
        if name != "retriever":
            mode.add_argument("--checkpoint", help="what it was exported from, for the peers (default: by its name)")
            mode.add_argument("--engines", metavar="NAMES", help="such as ours,optimum:int8 (default: all)")
            mode.add_argument("--beir", type=Path, metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels/test.tsv")
        if name in ("all", "quality"):
            mode.add_argument("--reranker-checkpoint", metavar="CHECKPOINT", help="what the reranker was exported from")
            mode.add_argument("--reranker-engines", metavar="NAMES", default="ours:int8", help="default: ours:int8")
        if name in ("all", "quality", "int8"):
            mode.add_argument(
                "--sts", type=Path, metavar="PATH", help="CSV of two sentences and a score, or its folder"
            )
            mode.add_argument("--mteb", metavar="TASK", help="of our engine; needs mteb and the hub")
        if name == "int8":
            mode.add_argument("--no-quality", action="store_true", help="speed alone, as for random weights")
        if name in ("all", "speed", "int8"):
            mode.add_argument("--starts", type=int, metavar="N", help="how often engines are started (default: 2 or 3)")
        mode.add_argument("--threads", type=int, default=usable_cpus(), help="of every engine (default: all)")
        mode.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        mode.add_argument("--profile", choices=PROFILES, default="quick", help="how much is measured (default: quick)")
        mode.add_argument("--results", type=Path, metavar="FILE", help=f"default: {RESULTS.name}/PROFILE.jsonl")
        mode.add_argument(
            "--resume", metavar="RUN", nargs="?", const="last", help="go on with a run (default: the last)"
        )
    reported = modes.add_parser("report", help="tables and plots in a folder, and the README's section")
    reported.set_defaults(action=_report)
    reported.add_argument("results", type=Path, nargs="?", default=RESULTS / "full.jsonl", help="default: full.jsonl")
    reported.add_argument("--out", type=Path, metavar="DIR", help="default: beside the results, without .jsonl")
    reported.add_argument("--readme", type=Path, metavar="FILE", help="update the section between its markers")
    compared = modes.add_parser(
        "compare", help="what got worse beyond the spread, or is missing; ends with 1 if anything is"
    )
    compared.set_defaults(action=_compare)
    compared.add_argument("old", type=Path)
    compared.add_argument("new", type=Path)
    installed = modes.add_parser("install", help="make environments for the engines that need one of their own")
    installed.set_defaults(action=_install)
    installed.add_argument("engines", nargs="*", help=f"default: {' '.join(client.separate_engines())}")
    return parser


def _all(options: argparse.Namespace) -> None:
    journal = _journal(options)
    _measure_speed(options, journal)
    _measure_quality(options, journal)
    if options.reranker:
        _measure_retriever(options, journal)


def _speed(options: argparse.Namespace) -> None:
    _measure_speed(options, _journal(options))


def _quality(options: argparse.Namespace) -> None:
    _measure_quality(options, _journal(options))


def _retriever(options: argparse.Namespace) -> None:
    if not options.reranker:
        raise DataError("retriever: has no second stage to measure; pass --reranker ARTIFACT")
    _measure_retriever(options, _journal(options))


def _int8(options: argparse.Namespace) -> None:
    options.profile, options.engines = "int8", options.engines or INT8_ENGINES
    journal = _journal(options)
    _measure_speed(options, journal)
    if not options.no_quality:
        _measure_quality(options, journal, ("int8", BASELINE[1]))
    manifest = load_manifest(options.artifact)
    print(report.int8_table(report.newest_results(journal.path), manifest.name, manifest.dim))


def _opened(artifact: Path, checkpoint: str | None, option: str = "--checkpoint") -> Subject:
    subject = open_subject(artifact, checkpoint)
    if not subject.checkpoint:
        source = subject.manifest.source.id
        _warn(EngineError(f"all but ours: {source}, with the weights of {artifact}, isn't here; pass {option} FOLDER"))
    return subject


def _measure_speed(options: argparse.Namespace, journal: Journal) -> None:
    subject = _opened(options.artifact, options.checkpoint)
    profile = PROFILES[options.profile]
    with _progress() as show:
        measure_speed(
            Bench(
                subject=subject,
                jobs=plan_jobs(subject, options.engines, threads=options.threads, device=options.device),
                profile=dataclasses.replace(profile, starts=options.starts or profile.starts),
                journal=journal,
                corpus=list(read_beir(options.beir).corpus.values()) if options.beir else None,
                found=_say,
                left_out=_warn,
                progress=show,
            )
        )


def _measure_quality(options: argparse.Namespace, journal: Journal, variants: tuple[str, ...] = ()) -> None:
    subject = _opened(options.artifact, options.checkpoint)
    jobs = plan_jobs(subject, options.engines, threads=options.threads, device=options.device)
    jobs = [job for job in jobs if job.variant in variants or not variants]
    name, prompts = subject.manifest.name, subject.manifest.prompts
    pairs, data = options.sts and read_sts(options.sts), options.beir and read_beir(options.beir)
    if options.mteb:
        _measure_mteb(options, journal)
    quality.measure_quality(jobs, name, journal, pairs=pairs, data=data, prompts=prompts, found=_say, left_out=_warn)
    first = [job for job in jobs if job.engine == "ours"][-1:]  # int8, if there is one
    if not (options.reranker and data and first and subject.manifest.kind == "embedder"):
        return
    data = data.first(PROFILES[options.profile].reranked)
    second = _opened(options.reranker, options.reranker_checkpoint, "--reranker-checkpoint")
    for job in plan_jobs(second, options.reranker_engines, threads=options.threads, device=options.device):
        names = name, second.manifest.name
        with _progress() as show:
            _attempt(quality.measure_two_stages, first[0], job, names, data, prompts, journal, show)


def _measure_mteb(options: argparse.Namespace, journal: Journal) -> None:
    for variant in load_manifest(options.artifact).variants:
        embedder = Embedder(options.artifact, variant, device=options.device, threads=options.threads)
        _attempt(measure_mteb, embedder, options.mteb, journal)


def _measure_retriever(options: argparse.Namespace, journal: Journal) -> None:
    reranker = Reranker(options.reranker, device=options.device, threads=options.threads)
    embedder = Embedder(options.artifact, device=options.device, threads=options.threads)
    _attempt(measure_retriever, embedder, reranker, PROFILES[options.profile].indexed, journal)


def _attempt(measure: Callable[..., list[Result]], *arguments: object) -> None:
    try:
        for result in measure(*arguments):
            _say(result)
    except EngineError as error:
        _warn(error)


def _say(result: Result) -> None:
    settings = " ".join(str(value) for value in result.settings.values())
    shown = {name: figure for name, figure in result.figures.items() if not name.startswith("to ")}  # for the table
    figures = ", ".join(f"{name} {figure.median:.5g}" for name, figure in shown.items())
    _errors().print(escape(f"{result.benchmark} {result.engine} {result.variant}, {settings}: {figures}"))


def _warn(error: EngineError) -> None:
    _errors().print(f"[yellow]left out:[/yellow] {escape(' '.join(str(error).split()))}")


def _errors() -> Console:
    return Console(stderr=True, soft_wrap=True, highlight=False)


def _report(options: argparse.Namespace) -> None:
    results = report.newest_results(options.results)
    for path in report.write_report(results, options.out or options.results.with_suffix("")):
        print(path)
    if options.readme:
        source = os.path.relpath(options.results, options.readme.parent)
        report.update_readme(options.readme, report.section(results, source))


def _compare(options: argparse.Namespace) -> int:
    old, new = (report.newest_results(path) for path in (options.old, options.new))
    changes, lost = compare(old, new), lacking(old, new)
    if not (changes or lost):
        raise DataError(f"{options.new}: has no measurement in common with {options.old}; compare runs of one profile")
    for verdict, word in ((-1, "worse"), (1, "better")):
        for change in changes:
            if change.verdict == verdict:
                print(
                    f"{word}: {change.what}: {change.figure} {report.spread(change.old)} -> {report.spread(change.new)}"
                )
    for what in lost:
        print(f"missing: {what}")
    worse, better = (sum(change.verdict == verdict for change in changes) for verdict in (-1, 1))
    same = len(changes) - worse - better
    print(f"{len(changes)} figures: {worse} worse and {better} better beyond the spread of both, {same} the same")
    return int(worse > 0 or bool(lost))


def _install(options: argparse.Namespace) -> None:
    for engine in options.engines or client.separate_engines():
        client.install(engine)


def _journal(options: argparse.Namespace) -> Journal:
    path = options.results or RESULTS / f"{options.profile}.jsonl"
    return Journal(path, options.resume, machine=machine.describe_machine(), commit=machine.commit(client.ROOT))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], object]]:
    """A bar, where there is a terminal to draw it on."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda step, share: bar.update(task, description=step, completed=share)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
