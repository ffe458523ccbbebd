"""The command line: parses and prints; ``export.pipeline.export_model`` does the work."""

import argparse
import logging
import signal
import sys
from pathlib import Path
from typing import NoReturn


def _cure(missing: ImportError) -> str:
    """What to install; a module of our own that can't be imported is no want of a package, and is raised."""
    if (missing.name or "").partition(".")[0] in ("export", "runtime"):
        raise missing
    cause = " ".join(str(missing).split())
    return f"an export needs a package that can't be imported ({cause}); run: pip install 'bge-onnx[cpu,export]'"


try:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from export.card import figures, one_line, summary, usage
    from export.catalog import POOLINGS, load_catalog
    from runtime.errors import BgeOnnxError
except ImportError as missing:
    sys.exit(f"error: {_cure(missing)}")
except Exception as error:
    if type(error).__name__ != "ProviderError":  # a class that can't be imported where importing runtime raises it
        raise
    sys.exit(f"error: {error}")

STOPPED_BY = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Signals that end the command as Ctrl-C does; the second is a terminal's that closes, and Windows hasn't it."""
PIPED = 1000
"""Columns when the output is no terminal, so that a table is never cut."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 on an error, 2 on bad usage, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    logging.getLogger("runtime").setLevel(logging.ERROR)  # some verification texts are too long on purpose
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    previous = {number: signal.getsignal(number) for number in STOPPED_BY}
    for number, handler in previous.items():
        signal.signal(number, handler if handler is signal.SIG_IGN else _interrupt)  # which nohup asks for
    try:
        _list() if options.list else _export(options)
    except BgeOnnxError as error:
        errors.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}")
        return 1
    except ImportError as missing:
        errors.print(f"[red]error:[/red] {escape(_cure(missing))}")
        return 1
    except KeyboardInterrupt:
        errors.print("[red]interrupted:[/red] nothing is left half written")
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m export", description="Export an embedder or reranker to a verified ONNX artifact."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a short name (see --list), a local checkpoint folder, or a hub id")
    what.add_argument("--list", action="store_true", help="print the models known by a short name")
    parser.add_argument("--out", type=Path, help="folder to write (default: artifacts/<name>)")
    parser.add_argument(
        "--variants", default="fp32,int8", help="comma-separated: fp32, int8, fp16 for CUDA (default: fp32,int8)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub")
    parser.add_argument("--pooling", choices=POOLINGS, help="for a checkpoint that doesn't say how it pools")
    for name, whose in (("query", "encode_queries"), ("passage", "encode_corpus")):
        parser.add_argument(
            f"--{name}-prompt", metavar="TEXT", help=f"what {whose} puts before a text, whatever the checkpoint says"
        )
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="texts for int8, one a line")
    parser.add_argument(
        "--min-cosine", type=float, metavar="X", help="of any int8 vector to the original; spends fp32 linears on it"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="accept pytorch_model.bin (read with weights_only)")
    parser.add_argument("--force", action="store_true", help="replace an existing artifact, atomically")
    return parser


def _list() -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "hub id", "kind", "architecture", "pooling", "dim", "max length", "query prompt"):
        table.add_column(column, no_wrap=column != "query prompt")
    for spec in load_catalog().values():
        cells = (spec.name, spec.hub, spec.kind, spec.architecture, spec.pooling, spec.dim, spec.max_length)
        table.add_row(*(str(cell or "") for cell in cells), escape(one_line(spec.prompts.get("query", ""))))
    _console().print(table)


def _export(options: argparse.Namespace) -> None:
    from export.pipeline import export_model  # slow to import, and --list has no need of it

    console = _console()
    prompts = {"query": options.query_prompt, "passage": options.passage_prompt}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        artifact = export_model(
            options.model,
            options.out,
            [name.strip() for name in options.variants.split(",") if name.strip()],
            revision=options.revision,
            pooling=options.pooling,
            prompts={name: text for name, text in prompts.items() if text is not None},
            calibration=options.calibration,
            min_cosine=options.min_cosine,
            allow_pickle=options.allow_pickle,
            force=options.force,
            progress=lambda step, share: bar.update(task, description=step, completed=share),
        )
    manifest = artifact.manifest
    table = Table(box=None, pad_edge=False)
    parities = {name: figures(variant.parity) for name, variant in manifest.variants.items() if variant.parity}
    for column in ("variant", "size", *next(iter(parities.values())), "path"):
        table.add_column(column, overflow="fold")
    path = _short(artifact.path)
    for name, variant in manifest.variants.items():
        size = f"{manifest.files[variant.data or variant.file].size / 1e6:.1f} MB"
        table.add_row(name, size, *parities[name].values(), escape(f"{path}/{variant.file}"))
    console.print(f"{manifest.name}: {summary(manifest)}", markup=False)
    if manifest.kind == "embedder":
        for name in ("query", "passage"):
            console.print(f"{name} prompt: {one_line(manifest.prompts.get(name, 'none'))}", markup=False)
    console.print(table)
    console.print(f"\n{usage(manifest, str(path))}", markup=False)


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED)


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _interrupt(signum: int, frame: object) -> NoReturn:
    for number in STOPPED_BY:  # a terminal that closes sends two, and the first is still clearing up
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
