"""What the benchmarks read, keep and report: malformed data is named, nothing measured is lost, the README is true."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from scipy.sparse import csr_array

from benchmarks import client, machine, quality, speed, worker
from benchmarks import subject as subject_module
from benchmarks.__main__ import main
from benchmarks.compare import compare
from benchmarks.data import read_beir, read_sts, sample_texts
from benchmarks.engines import fastembed, flashrank, plain
from benchmarks.errors import DataError, EngineError
from benchmarks.mteb import mteb_encoder
from benchmarks.report import full_report, int8_table, newest_results, readme_section, section, update_readme
from benchmarks.results import Figure, Journal, Result, newest, read_results
from benchmarks.speed import PROFILES, Bench, Profile, measure_speed
from benchmarks.subject import open_subject, plan_jobs, size_mb
from benchmarks.worker import Job
from runtime import Embedder, sparse_matrix

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "full.jsonl"
SMALL = Profile(
    starts=1,
    rounds=2,
    bulk=(("short", 4, "as it comes"), ("documents", 64, "by length")),
    callers=(1,),
    queries=4,
    indexed=1,
    reranked=1,
)


@pytest.fixture
def beir(tmp_path):
    """A function that writes a BEIR folder of two documents and a query, with changes."""

    def write(**changes: str) -> Path:
        files = {
            "corpus.jsonl": '{"_id": "d1", "title": "A", "text": "river"}\n{"_id": "d2", "text": "stone"}\n',
            "queries.jsonl": '{"_id": "q1", "text": "water"}\n{"_id": "q2", "text": "never judged"}\n',
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        }
        (tmp_path / "qrels").mkdir()
        for name, text in files.items():
            (tmp_path / name).write_text(changes.get(Path(name).stem, text))
        return tmp_path

    return write


MACHINE = {"cpu": "a", "cores": 2, "instructions": [], "memory_gb": 1, "system": "b"}


def result(median: float, low: float | None = None, high: float | None = None, **changes) -> Result:
    figure = Figure(median, median if low is None else low, median if high is None else high, 6)
    fields = {"benchmark": "bulk", "engine": "ours", "variant": "int8", "model": "tiny", "settings": {"threads": 1}}
    return Result(**fields | {"figures": {"ratio": figure}} | changes)


@pytest.mark.parametrize(("least", "calls"), [(0, 1), (1, 1), (2, 1), (3, 2), (4.5, 3)])
def test_calls_shorter_than_a_reading_are_repeated_and_averaged(monkeypatch, least, calls):
    done = []
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: 2.0 * len(done)))
    assert worker.bulk(lambda *given: done.append(given), ["a"], 32, least) == {"seconds": 2.0}
    assert done == [(["a"], 32)] * calls


def test_a_beir_folder_is_read_as_beir_embeds_it(beir):
    data = read_beir(beir())
    assert data.corpus == {"d1": "A river", "d2": "stone"}
    assert data.queries == {"q1": "water"}
    assert data.qrels == {"q1": {"d1": 1}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test": "query-id\tcorpus-id\tscore\nq1\td9\t1\n"}, "test.tsv:2: names document d9, which isn't there"),
        ({"test": "query-id\tcorpus-id\tscore\nq9\td1\t1\n"}, "test.tsv:2: names query q9, which isn't there"),
        ({"test": "query-id\tcorpus-id\tscore\nq1\td1\tgood\n"}, "test.tsv:2: is no row"),
        ({"test": "a\tb\tc\nq1\td1\t1\n"}, "test.tsv:2: is no row"),
        ({"test": "query-id\tcorpus-id\tscore\n"}, "holds no judgement"),
        ({"corpus": '{"_id": "d1", "text": "x"}\n{"_id": 2, "text": "x"}\n'}, "corpus.jsonl:2: is no JSON object"),
        ({"corpus": "[1]\n"}, "corpus.jsonl:1: is no JSON object"),
        ({"queries": "nothing"}, "queries.jsonl:1: is no JSON object"),
    ],
)
def test_a_malformed_beir_folder_is_named_by_file_and_line(beir, changes, says):
    with pytest.raises(DataError, match=says):
        read_beir(beir(**changes))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b,1\na,b\n", r"test.csv:2: is no row"),
        (b"a,b,much\n", r"test.csv:1: is no row"),
        (b"a,b,1\n", "holds 1 pairs"),
        (b"", "holds 0 pairs"),
        (b"\xff\xfe\n", "can't be read"),
    ],
)
def test_malformed_pairs_are_named_by_file_and_line(tmp_path, content, says):
    (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_sts(tmp_path)


@pytest.mark.parametrize("read", [read_sts, read_beir])
def test_what_is_not_there_is_named(tmp_path, read):
    with pytest.raises(DataError, match=str(tmp_path)):
        read(tmp_path / "nothing")


def test_texts_are_the_same_each_time_and_as_long_as_asked():
    assert sample_texts(5, (3, 9)) == sample_texts(5, (3, 9)) != sample_texts(5, (3, 9), seed=1)
    assert {len(text.split()) for text in sample_texts(99, (3, 4), ["one two", "three"])} == {3, 4}


def test_a_result_survives_its_line_and_a_crash_costs_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    journal = Journal(path, commit="abc")
    journal.add(result(1.0))
    with path.open("a") as stream:
        stream.write('{"schema": 1, "bench')
    assert len(read_results(path)) == 1
    resumed = Journal(path, "last")
    assert resumed.run == journal.run
    assert result(7.0) in resumed  # measured already, whatever it gave
    assert result(1.0, settings={"threads": 2}) not in resumed
    resumed.add(result(2.0))
    assert [held.figures["ratio"].median for held in read_results(path)] == [1.0, 2.0]
    assert newest(read_results(path))[0].figures["ratio"] == Figure(1.5, 1.0, 2.0, 12)


@pytest.mark.parametrize(
    ("line", "says"), [('{"schema": 2}', "is of schema 2, not 1"), ("{}", "is no result"), ("[]", "is no result")]
)
def test_a_line_that_is_no_result_is_named(tmp_path, line, says):
    (tmp_path / "results.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=rf"results\.jsonl:1: {says}"):
        read_results(tmp_path / "results.jsonl")


@pytest.mark.parametrize(
    ("new", "verdict"),
    [(result(2.0, 1.9, 2.1), 0), (result(2.5, 2.05, 3.0), 0), (result(3.0, 2.5, 3.5), 1), (result(1.0, 0.5, 1.5), -1)],
)
def test_only_what_lies_beyond_both_spreads_is_a_change(new, verdict):
    (change,) = compare([result(2.0, 1.8, 2.2)], [new])
    assert change.verdict == verdict


def test_two_runs_of_the_same_agree_and_of_something_slower_do_not():
    """Ratios with 5% of noise, and those of cold starts, of which there are only two or three."""
    draw = random.Random(0)

    def measured(runs: int, speed: float) -> Result:
        ratio = Figure.of([speed * draw.lognormvariate(0, 0.05) for _ in range(runs)])
        return result(0, figures={"ratio": ratio})

    def worse(runs: int, slowdown: float) -> int:
        pairs = [compare([measured(runs, 3.0)], [measured(runs, 3.0 / slowdown)]) for _ in range(500)]
        return sum(change.verdict < 0 for (change,) in pairs)

    assert worse(6, 1) == worse(3, 1) == worse(2, 1) == 0
    assert worse(6, 1.5) == worse(3, 2) == worse(2, 2) == 500


def test_less_memory_is_better():
    old, new = (result(0, figures={"peak MB": Figure(mb, mb, mb, 1)}) for mb in (100.0, 50.0))
    assert [change.verdict for change in compare([old], [new])] == [1]


@pytest.mark.parametrize(("new", "code"), [(1.0, 1), (2.0, 0), (3.0, 0)])
def test_compare_fails_on_a_regression_alone(tmp_path, capsys, new, code):
    for name, median in (("old", 2.0), ("new", new)):
        Journal(tmp_path / name).add(result(median))
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == code
    assert f"{code} worse" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("new", "says"),
    [
        ([result(2.0)], "missing: tiny optimum int8 bulk threads=1: ratio"),  # an engine that failed meanwhile
        ([result(2.0), result(0, engine="optimum", figures={})], "missing: tiny optimum int8 bulk threads=1: ratio"),
        ([result(2.0), result(2.0, engine="optimum")], "0 worse"),
    ],
)
def test_compare_fails_where_an_engine_or_a_figure_is_missing(tmp_path, capsys, new, says):
    elsewhere = result(2.0, settings={"threads": 2})  # which the new run wasn't asked for
    for name, results in (("old", [result(2.0), result(2.0, engine="optimum"), elsewhere]), ("new", new)):
        journal = Journal(tmp_path / name)
        for held in results:
            journal.add(held)
    said = (main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]), capsys.readouterr().out)
    assert said[0] == ("missing" in says)
    assert says in said[1]
    assert "threads=2" not in said[1]


def test_the_readmes_figures_are_those_of_the_results_file():
    results = newest_results(RESULTS)
    assert readme_section(ROOT / "README.md") == section(results, RESULTS.relative_to(ROOT).as_posix())


def test_each_caller_asks_again_at_once_and_no_waiting_is_left_out(monkeypatch):
    """By a clock that ticks when it is read: once after each call, so that nothing lies between two of them."""
    together, shares, inputs = threading.Barrier(4, timeout=30), {}, list(range(12))

    def run(texts, batch):
        together.wait()
        shares.setdefault(threading.get_ident(), []).extend(texts)

    worker.latency(run, inputs, 4, 0)
    assert sorted(shares.values()) == [inputs[first::4] for first in range(4)]
    ticks = itertools.count()
    computed = iter([2, 5])
    clock = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(computed))
    monkeypatch.setattr(worker, "time", clock)
    assert worker.latency(lambda texts, batch: None, inputs, 1, 0) == {"times": [1] * 12, "seconds": 13, "cpu_s": 3}


def test_a_pause_is_no_part_of_the_query_after_it_but_what_the_process_computes_in_it_is(monkeypatch):
    now = [0.0, 0.0]

    def passes(seconds, share):
        now[0] += seconds
        now[1] += seconds * share

    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[1], sleep=lambda s: passes(s, 0.5))
    monkeypatch.setattr(worker, "time", clock)
    answer = worker.latency(lambda texts, batch: passes(1, 2), ["a"] * 3, 1, 10)
    assert answer == {"times": [1] * 3, "seconds": 33, "cpu_s": 21}


def test_of_several_callers_what_counts_is_how_many_queries_are_answered(tiny_artifact, tmp_path):
    journal = Journal(tmp_path / "results.jsonl")
    profile = dataclasses.replace(SMALL, bulk=(), callers=(1, 3), rounds=1, each=2, rare=2)
    subject = open_subject(tiny_artifact)
    measure_speed(
        Bench(subject=subject, jobs=plan_jobs(subject, "ours:fp32", threads=1), profile=profile, journal=journal)
    )
    one, three, rare = (r for r in journal.results if r.benchmark == "latency")
    assert one.figures["seconds"].median == pytest.approx(one.figures["p50 ms"].median / 1000, rel=1e-4)
    assert three.figures["seconds"].median == pytest.approx(1 / three.figures["queries/s"].median, rel=1e-4)
    assert (rare.settings["callers"], rare.settings["pause ms"]) == (1, 50)
    assert 0 < rare.figures["queries/s"].median < 20 and rare.figures["CPU ms"].median > 0


def test_what_several_callers_are_compared_by_is_never_mixed():
    old = result(24.0, benchmark="latency", settings={"callers": 16}, machine=MACHINE)
    new = result(11.0, benchmark="latency", settings={"callers": 16, "compared": "queries/s"}, machine=MACHINE)
    assert not compare([old], [new])
    other = dataclasses.replace(old, model="other")
    table = section([new, other], "full.jsonl")
    assert "|  | 16 callers, queries/s |\n| --- | --: |\n| **bge-onnx** int8 | 11.0 |" in table
    assert "|  | of 16 callers at once |\n| --- | --: |\n| **bge-onnx** int8 | 24.0 |" in table


def test_no_share_of_the_peak_is_above_one():
    """What an engine reached beyond the product that should be the peak is the peak; other threads have another."""

    def measured(rate: float, threads: int = 2, **changes) -> Result:
        settings = {"texts": "medium", "order": "as it comes", "batch": 32, "threads": threads}
        figures = {"fp32 Gop/s": Figure(rate, rate, 1.25 * rate, 3), "share": Figure(1.24, 1.24, 1.24, 1)}
        return result(0, variant="fp32", settings=settings, figures=figures, machine=MACHINE, **changes)

    roofline = {"benchmark": "roofline", "engine": "machine", "variant": "", "machine": MACHINE}
    peaks = [
        result(0, figures={"fp32": Figure(*[rate] * 3, 1)}, settings={"threads": threads}, **roofline)
        for rate, threads in ((90, 2), (100, 2), (50, 1))
    ]
    found = full_report([measured(40), *peaks, measured(60, model="other", threads=1)], [])
    assert "fp32 100 with 2 threads; fp32 75.0 with 1 threads." in found
    shares = [line.split("|")[2].strip() for line in found.splitlines() if "fp32 | " in line and "%" in line]
    assert shares == ["40%", "80%"]


def test_a_round_too_short_to_read_the_gpu_costs_no_result(tiny_artifact, tmp_path, monkeypatch):
    """And what ``--profile gpu`` measures in bulk is shown, by the size of the batches."""
    readings = iter([[], [0.5], [], [0.75]])  # a round that warms up, and three
    monkeypatch.setattr(speed, "gpu_use", lambda device: contextlib.nullcontext(next(readings)))
    profile = dataclasses.replace(SMALL, bulk=(("spread", 4, "as it comes", 256),), callers=(), rounds=3)
    subject, journal = open_subject(tiny_artifact), Journal(tmp_path / "results.jsonl", machine=MACHINE)
    jobs = plan_jobs(subject, "ours:int8", threads=1)
    measure_speed(Bench(subject=subject, jobs=jobs, profile=profile, journal=journal))
    (bulk,) = (r for r in journal.results if r.benchmark == "bulk")
    assert bulk.figures["gpu busy"] == Figure(0.625, 0.5, 0.75, 2)
    table = full_report(journal.results, [])
    assert "by nvidia-smi:\n\n|  | 8–130 words, batches of 256 |" in table
    assert "**Texts (or pairs) a second**:\n\n|  | 8–130 words, batches of 256 |" in table


def test_the_gpus_use_is_read_when_a_second_has_passed(tmp_path, monkeypatch):
    """Before, a reading is of what was before, too; so is the last of what came after."""
    command = tmp_path / "nvidia-smi"
    written = tmp_path / "written"
    command.write_text(f'#!/bin/sh\nfor file; do :; done\nseq 1 13 > "$file"; touch {written}\nexec sleep 60\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with machine.gpu_use("cuda") as found:
        for _ in range(1000):
            if written.exists():
                break
            time.sleep(0.01)
    assert found == [0.11, 0.12]
    with machine.gpu_use("cpu") as found:
        pass
    assert found == []


def test_updating_a_readme_touches_nothing_but_its_section(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    assert update_readme(readme, "new\n")
    assert readme.read_text() == "before\n<!-- benchmarks -->\nnew\n<!-- /benchmarks -->\nafter\n"
    assert not update_readme(readme, "new\n")
    readme.write_text("no markers")
    with pytest.raises(DataError, match="lacks the lines"):
        update_readme(readme, "new\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engines", "nothing"], "--engines nothing: is none of ours:fp32, ours:int8"),
        (["--engines", "ours:fp64"], "--engines ours:fp64: is none of"),
        (["--engines", "ours", "--resume", "never"], "has no run never"),
    ],
)
def test_what_cant_be_measured_is_one_line(tiny_artifact, tmp_path, capsys, arguments, says):
    path = tmp_path / "results.jsonl"
    Journal(path).add(result(1.0))
    assert main(["quality", str(tiny_artifact), "--results", str(path), *arguments]) == 1
    assert says in " ".join(capsys.readouterr().err.split())


def test_quality_is_measured_once_and_resumed(tiny_artifact, beir, tmp_path):
    (tmp_path / "test.csv").write_text("a river,a stream,5\na stone,the water,1\na cat,a dog,3\n")
    path = tmp_path / "results.jsonl"
    arguments = ["quality", str(tiny_artifact), "--engines", "ours", "--sts", str(tmp_path), "--threads", "1"]
    arguments += ["--beir", str(beir()), "--results", str(path)]
    assert main(arguments) == 0
    measured = read_results(path)
    assert {(r.benchmark, r.variant) for r in measured} == {
        (benchmark, variant) for benchmark in ("sts", "retrieval") for variant in ("fp32", "int8")
    }
    assert all(r.figures["R@100"].median == 1 for r in measured if r.benchmark == "retrieval")  # of two documents
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:3]))
    assert main([*arguments, "--resume"]) == 0
    assert [r.key for r in read_results(path)] == [r.key for r in measured]


def test_a_missing_engine_is_left_out_with_what_installs_it(
    tiny_artifact, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("benchmarks.client.HOME", tmp_path / "nothing installed")
    (tmp_path / "test.csv").write_text("a river,a stream,5\na stone,the water,1\na cat,a dog,3\n")
    arguments = ["quality", str(tiny_artifact), "--checkpoint", str(tiny_checkpoint), "--sts", str(tmp_path)]
    arguments += ["--engines", "flag_embedding:fp32,ours:fp32", "--results", str(tmp_path / "results.jsonl")]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "left out: flag_embedding fp32: not installed (No module named 'FlagEmbedding')" in said
    assert "run: python -m benchmarks install flag_embedding" in said
    assert [r.engine for r in read_results(tmp_path / "results.jsonl")] == ["ours"]


def test_weights_of_the_same_name_are_not_those_of_a_fine_tune(
    tiny_artifact, tiny_checkpoint, copied, tmp_path, monkeypatch, capsys
):
    """A folder of the artifact's name stands for the catalog here."""
    copied(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert open_subject(tiny_artifact).checkpoint == tmp_path / tiny_checkpoint.name
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny_artifact, tuned)
    manifest = json.loads((tuned / "manifest.json").read_text())
    manifest["source"]["checksums"]["model.safetensors"] = "another"
    (tuned / "manifest.json").write_text(json.dumps(manifest))
    assert open_subject(tuned).checkpoint is None
    assert open_subject(tuned, str(tiny_checkpoint)).checkpoint == tiny_checkpoint
    assert main(["quality", str(tuned), "--engines", "optimum", "--results", str(tmp_path / "results.jsonl")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out: all but ours: tiny-bert, with the weights of {tuned}, isn't here; pass --checkpoint" in said


def test_what_torch_loads_is_one_format(tmp_path):
    files = {"model.safetensors": 1, "pytorch_model.bin": 2, "onnx/model.onnx": 4, "training_args.bin": 8}
    (tmp_path / "onnx").mkdir()
    for name, megabytes in files.items():
        (tmp_path / name).write_bytes(b"0" * megabytes * 10**6)
    job = Job(engine="", variant="", kind="embedder", source=str(tmp_path), checkpoint=str(tmp_path))
    assert size_mb(job) == 1
    (tmp_path / "model.safetensors").unlink()
    assert size_mb(job) == 2
    assert size_mb(dataclasses.replace(job, source=str(tmp_path / "onnx"))) == 4


def test_operations_count_modernberts_gate_and_window_a_decoders_groups_and_a_head_of_words(tmp_path):
    config = {"hidden_size": 4, "num_hidden_layers": 4, "intermediate_size": 8}
    subject = SimpleNamespace(checkpoint=tmp_path, kind="embedder", manifest=SimpleNamespace(dim=50))

    def operations(**more: object) -> float:
        (tmp_path / "config.json").write_text(json.dumps(config | more))
        return speed._operations(subject, [10])

    encoder = operations()
    assert encoder == 4 * (2 * (4 * 16 + 2 * 32) * 10 + 4 * 4 * 100)
    modern = operations(model_type="modernbert", global_attn_every_n_layers=3, local_attention=4)
    assert modern == 4 * 2 * (4 * 16 + 3 * 32) * 10 + 4 * 4 * (2 * 100 + 2 * 40)  # layers 0 and 3 see all
    decoder = operations(num_attention_heads=2, num_key_value_heads=1, head_dim=3)
    assert decoder == 4 * 2 * ((2 * 24 + 2 * 12 + 3 * 32) * 10 + 2 * 6 * 55)  # pairs of a token and one up to it
    subject.kind = "sparse_embedder"
    assert operations() == encoder + 2 * (16 + 4 * 50) * 10  # a linear, and one to each of 50 words


def test_what_nobody_reads_of_a_last_layer_counts_for_the_others_alone(tmp_path):
    shape = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(shape))

    def left_out(architecture: str, pooling: str | None, *outputs: str) -> float:
        manifest = SimpleNamespace(architecture=architecture, pooling=pooling, outputs=outputs)
        return speed._left_out(SimpleNamespace(checkpoint=tmp_path, manifest=manifest), [10, 7])

    whole = speed._operations(SimpleNamespace(checkpoint=tmp_path, kind="reranker"), [10, 7])
    keys_and_values, rest, attention = 2 * 2 * 16 * 17, 2 * (2 * 16 + 2 * 32) * 2, 4 * 4 * 17
    assert whole - left_out("bert", None, "logits") == keys_and_values + rest + attention
    assert left_out("bert", "cls", "last_hidden_state") == left_out("bert", None, "logits")
    assert left_out("bert", "mean", "last_hidden_state") == 0
    assert left_out("bert", "cls", "last_hidden_state", "token_vectors") == 0
    assert left_out("deberta-v2", None, "logits") == 0  # traced

    decoder = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3}
    (tmp_path / "config.json").write_text(json.dumps(shape | decoder))
    behind_attention = 2 * (6 * 4 + 3 * 32)  # of each token, but each text's last
    assert left_out("qwen3", "last_token", "last_hidden_state") == behind_attention * (17 - 2)
    assert left_out("qwen3", "mean", "last_hidden_state") == 0
    (tmp_path / "config.json").write_text(json.dumps(shape | {"classifier_pooling": "mean"}))
    assert left_out("modernbert", None, "logits") == 0


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_measured_and_leaves_no_process(tiny_artifact, tmp_path, stop):
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks", "speed", str(tiny_artifact), "--engines", "ours"]
    command += ["--threads", "1", "--results", str(path)]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while (not path.exists() or path.read_bytes().count(b"\n") < 2) and time.monotonic() < deadline:
            time.sleep(0.02)
        workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        running.send_signal(stop)
        _, said = running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode == 130
    assert "what was measured is kept" in said
    assert len(kept := read_results(path)) >= 2
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert main([*command[3:], "--resume"]) == 0
    resumed = read_results(path)
    assert resumed[: len(kept)] == kept
    assert {held.run for held in resumed} == {kept[0].run}


def test_without_what_it_needs_the_command_says_what_to_install():
    code = "import sys; sys.modules['scipy'] = None; import benchmarks.__main__"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: scipy isn't installed; run: pip install 'bge-onnx[")


def test_results_in_the_repository_hold_no_path_of_a_machine():
    for line in RESULTS.read_text("utf-8").splitlines():
        assert json.loads(line)["schema"] == 1
        assert "/work/" not in line and "/home/" not in line


def test_int8_stands_in_one_table_with_each_figure_beside_its_bar():
    torch = {"engine": "sentence_transformers", "variant": "fp32"}

    def one(value: float) -> Figure:
        return Figure(value, value, value, 1)

    results = [
        result(
            0, settings={"texts": "short"}, figures={"to optimum int8": Figure(1.5, 1.25, 1.75, 6)}, machine=MACHINE
        ),
        result(0, settings={"texts": "documents"}, figures={"to optimum int8": one(1.25)}, machine=MACHINE),
        result(0, benchmark="retrieval", settings={}, figures={"nDCG@10": one(0.5), "peak MB": one(100)}),
        result(0, benchmark="retrieval", settings={}, figures={"nDCG@10": one(0.502), "peak MB": one(250)}, **torch),
    ]
    table = int8_table([dataclasses.replace(held, machine=MACHINE) for held in results], "tiny", 384)
    assert "| 6–14 words, times optimum int8 | 1.5 (1.25–1.75) | ≥ 1.4 | met |" in table
    assert "| whole documents, times optimum int8 | 1.25 | ≥ 1.5 | **missed** |" in table
    assert "| retrieval, nDCG@10 beyond torch fp32's | -0.002 | ≥ -0.003 | met |" in table
    assert "| RAM to embed the corpus, of torch fp32's | 0.4 | ≤ 0.5 | met |" in table
    assert "openvino" not in table  # which wasn't measured
    other = int8_table([dataclasses.replace(held, machine=MACHINE) for held in results], "tiny", 768)
    assert "| whole documents, times optimum int8 | 1.25 | ≥ 1.15 | met |" in other


def test_an_engines_packages_go_into_its_own_environment_though_it_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "HOME", tmp_path)
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=0))
    client.install("openvino")
    made, installed = commands
    assert made[0] == sys.executable
    assert Path(installed[0]).is_relative_to(made[-1])
    assert tmp_path in Path(made[-1]).parents


@pytest.mark.parametrize("engine", ["optimum", "../x", "nothing"])
def test_no_environment_is_made_for_what_needs_none(engine, tmp_path, monkeypatch, capsys):
    """It would take the place of the one that runs now, or lie elsewhere."""
    monkeypatch.setattr(client, "HOME", tmp_path / "home")
    assert main(["install", engine]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"install {engine}: none of the engines with an environment: fastembed, flag_embedding," in said
    assert not list(tmp_path.iterdir())


def test_a_conversion_of_links_survives_a_move(tmp_path):
    stock, source = tmp_path / "a" / "made" / "optimum", tmp_path / "a" / "fast" / "model"
    for folder in (stock, source):
        folder.mkdir(parents=True)
    (stock / "model.onnx").write_text("weights")
    (stock / "tokenizer_config.json").write_text("{}")
    fastembed.prepare(Job(engine="", variant="", kind="embedder", source=str(source), stock=str(stock)))
    (tmp_path / "a").rename(tmp_path / "b")
    assert (tmp_path / "b" / "fast" / "model" / "model.onnx").read_text() == "weights"


def test_flashranks_session_has_the_threads_of_the_others(monkeypatch):
    opened = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda path, sess_options=None: opened.append(sess_options))
    module = ModuleType("flashrank")
    module.RerankRequest, module.Ranker = None, lambda *arguments: onnxruntime.InferenceSession("model.onnx")
    monkeypatch.setitem(sys.modules, "flashrank", module)
    flashrank.reranker(Job(engine="", variant="", kind="reranker", source="", threads=3))
    assert [options.intra_op_num_threads for options in opened] == [3]
    assert client._environment(3)["RAYON_NUM_THREADS"] == "3"


def test_variants_share_a_conversion_and_what_changed_is_converted_anew(
    tiny_artifact, tiny_checkpoint, copied, tmp_path, monkeypatch
):
    def sources(checkpoint: Path) -> dict[str, str]:
        subject = open_subject(tiny_artifact, str(checkpoint))
        jobs = plan_jobs(subject, "optimum,openvino", threads=1)
        return {client.name_of(job): job.source for job in jobs}

    found, checkpoint = sources(tiny_checkpoint), copied(tiny_checkpoint)
    assert found["optimum int8"] == found["optimum int8-scheduled"] != found["optimum fp32-o3"]
    assert found["openvino fp32"] == found["openvino bf16"] != found["openvino int8"]
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    assert not set(found.values()) & set(sources(checkpoint).values())
    found = sources(tiny_checkpoint)
    (tmp_path / "openvino.txt").write_text("openvino==1")
    monkeypatch.setattr(subject_module, "REQUIREMENTS", tmp_path)
    newer = sources(tiny_checkpoint)
    assert newer["openvino int8"] != found["openvino int8"]
    assert newer["optimum int8"] == found["optimum int8"]
    monkeypatch.setattr(subject_module, "versions", lambda packages: {"optimum": "1"})
    assert newer["optimum int8"] != sources(tiny_checkpoint)["optimum int8"]


def test_on_cuda_there_are_the_engines_that_run_there(tiny_artifact, tiny_checkpoint):
    jobs = plan_jobs(open_subject(tiny_artifact, str(tiny_checkpoint)), threads=1, device="cuda")
    assert {job.engine for job in jobs} == {"ours", "sentence_transformers", "flag_embedding", "compiled"}
    assert "sentence_transformers fp16" in {client.name_of(job) for job in jobs}
    assert all(job.place == {"threads": 1, "device": "cuda"} for job in jobs)
    on_cpu = plan_jobs(open_subject(tiny_artifact, str(tiny_checkpoint)), threads=1)
    assert "sentence_transformers fp16" not in {client.name_of(job) for job in on_cpu}


def test_speed_of_documents_and_growth_are_measured_and_ours_beside_each_other(tiny_artifact, tmp_path):
    profile = dataclasses.replace(SMALL, growth=True)
    subject = open_subject(tiny_artifact)
    journal = Journal(tmp_path / "results.jsonl")
    corpus = ["river stone " * (1 + i % 25) for i in range(200)]
    jobs = plan_jobs(subject, "ours", threads=2)
    measure_speed(Bench(subject=subject, jobs=jobs, profile=profile, journal=journal, corpus=corpus))
    int8 = {(r.benchmark, *r.settings.values()): r.figures for r in journal.results if r.variant == "int8"}
    (documents,) = [figures for key, figures in int8.items() if key[:2] == ("bulk", "documents")]
    assert documents["to ours fp32"].runs == 2
    embedder = Embedder(tiny_artifact, "int8", "cpu", 1)
    lengths = np.minimum(embedder.count_tokens(corpus), embedder.max_length)
    assert documents["tokens"].median == pytest.approx(lengths.mean(), rel=0.1)  # documents of all lengths
    grown = [r.settings for r in journal.results if r.benchmark == "growth" and r.variant == "int8"]
    assert {s["by"] for s in grown} == {"words", "batch", "texts", "threads"}
    assert {s["value"]: s["threads"] for s in grown if s["by"] == "threads"} == {1: 1, 2: 2}


def test_texts_of_differing_lengths_are_more_than_a_batch():
    """Else sorting them, which some engines do, would spare no padding."""
    counts = {name: dict(load[:2] for load in profile.bulk) for name, profile in PROFILES.items()}
    assert min(count for held in counts.values() for kind, count in held.items() if kind in ("medium", "spread")) >= 96


@pytest.mark.parametrize(("model", "variant"), [("tiny_artifact", "int8"), ("tiny_splade", "fp32")])
def test_two_stages_are_measured_before_and_after_the_reranker(model, variant, tiny_reranker, beir, tmp_path, request):
    reranker, _ = tiny_reranker("bert")
    path = tmp_path / "results.jsonl"
    artifact = str(request.getfixturevalue(model))
    arguments = ["quality", artifact, "--engines", f"ours:{variant}", "--threads", "1", "--beir", str(beir())]
    arguments += ["--reranker", str(reranker), "--reranker-engines", "ours:fp32", "--results", str(path)]
    assert main(arguments) == 0
    (measured,) = [r for r in read_results(path) if r.benchmark == "two-stage"]
    assert {"first nDCG@10", "nDCG@10", "first R@100", "R@100", "pairs/s"} <= set(measured.figures)
    assert measured.settings["queries"] == 1
    assert "| nDCG@10 before | nDCG@10 after |" in full_report(newest_results(path), [])


def test_a_rerankers_speed_and_quality_are_reported(tiny_reranker, tmp_path, monkeypatch):
    artifact, _ = tiny_reranker("bert")
    monkeypatch.setitem(PROFILES, "quick", SMALL)
    (tmp_path / "test.csv").write_text("a river,a stream,5\na stone,the water,1\na cat,a dog,3\n")
    path = tmp_path / "results.jsonl"
    arguments = ["all", str(artifact), "--engines", "ours", "--threads", "1", "--sts", str(tmp_path)]
    assert main([*arguments, "--results", str(path)]) == 0
    found = full_report(newest_results(path), [])
    assert "test Spearman × 100" in found
    assert "| **bge-onnx** int8 |" in found.partition("**Texts (or pairs) a second**")[2]


def test_a_sparse_embedder_is_measured_by_dot_products_beside_a_sparse_encoder(
    tiny_splade, beir, tmp_path, monkeypatch
):
    """Of texts whose order by cosines is another."""
    texts = ["water", "A river", "stone", "stone " * 20]
    embedder = Embedder(tiny_splade, "fp32", "cpu", 1)
    weights = embedder.encode(texts, return_dense=False, return_sparse=True)["lexical_weights"]
    vectors = sparse_matrix(weights, embedder.dim).toarray()
    dots = vectors[1:] @ vectors[0]
    assert np.argsort(dots).tolist() == [1, 2, 0]
    assert np.argsort(dots / np.linalg.norm(vectors[1:], axis=1)).tolist() == [2, 0, 1]

    monkeypatch.setitem(PROFILES, "quick", SMALL)
    rows = zip(texts[1:], (5, 1, 3), strict=True)
    (tmp_path / "test.csv").write_text("".join(f"{texts[0]},{text},{gold}\n" for text, gold in rows))
    path, checkpoint = tmp_path / "results.jsonl", str(tiny_splade.parent / "splade")
    arguments = [str(tiny_splade), "--checkpoint", checkpoint, "--threads", "1", "--results", str(path)]
    both = ["--engines", "ours,sentence_transformers:fp32"]
    assert main(["all", *arguments, "--engines", "ours", "--sts", str(tmp_path)]) == 0
    assert main(["quality", *arguments, *both, "--beir", str(beir())]) == 0
    found = {(r.benchmark, r.engine): r.figures for r in read_results(path)}
    assert found["sts", "ours"]["spearman"].median == 100
    assert found["retrieval", "ours"]["cosine min"].median == pytest.approx(1, abs=1e-5)
    for engine in ("ours", "sentence_transformers"):
        assert found["retrieval", engine]["MRR@10"].median == 1  # the river
    assert {"texts/s", "fp32 Gop/s"} <= set(found["bulk", "ours"])
    assert "| **bge-onnx** fp32 |" in full_report(newest_results(path), []).partition("**Quality**")[2]


def test_a_sparse_embedder_has_the_engines_that_give_sparse_vectors(tiny_splade):
    subject = open_subject(tiny_splade, str(tiny_splade.parent / "splade"))
    torch = ["sentence_transformers fp32", "sentence_transformers bf16"]
    for device, more in (("cpu", []), ("cuda", ["sentence_transformers fp16"])):
        jobs = plan_jobs(subject, threads=1, device=device)
        assert {client.name_of(job) for job in jobs} == {"ours fp32", *torch, *more}
    with pytest.raises(EngineError, match="--engines optimum: is none of ours:fp32, .* for this sparse embedder"):
        plan_jobs(subject, "optimum", threads=1)


def test_sparse_vectors_are_made_arrays_where_nothing_is_timed(tmp_path):
    made = []

    def run(texts, batch):
        return lambda: made.append(texts) or np.array([[0, 30_521, 0.5]])

    worker.bulk(run, ["a"], 32, 0)
    worker.latency(run, ["a"], 1, 0)
    assert not made
    worker.answers(run, ["a"], 32, str(tmp_path / "answers.npy"))
    assert made == [["a"]]
    np.testing.assert_array_equal(np.load(tmp_path / "answers.npy"), [[0, 30_521, 0.5]])


def test_two_texts_without_any_weight_have_the_same_vector(monkeypatch):
    given = [[3, 4], [0, 0], [0, 0], [0, 0]], [[4, 3], [0, 0], [0, 0], [1, 0]]
    answers, reference = (quality._Answers(csr_array(rows), 0, {}) for rows in given)
    monkeypatch.setattr(quality, "_answers", lambda job, inputs: reference)
    found = quality._cosines(answers, Job(engine="", variant="", kind="sparse_embedder", source=""), ())
    assert found == {"cosine mean": pytest.approx((0.96 + 1 + 1 + 0) / 4), "cosine min": 0}


def test_a_retriever_of_a_sparse_embedder_is_refused(tiny_splade, tiny_reranker, tmp_path, capsys):
    reranker, _ = tiny_reranker("bert")
    arguments = ["retriever", str(tiny_splade), "--reranker", str(reranker), "--threads", "1"]
    assert main([*arguments, "--results", str(tmp_path / "results.jsonl")]) == 1
    assert "error: splade has no dense_vecs, only lexical_weights" in " ".join(capsys.readouterr().err.split())


def test_our_embedder_is_mtebs_encoder(tiny_artifact, monkeypatch):
    """By the names of mteb 2, which isn't installed here: batches of ``text``, and a prompt for queries alone."""
    monkeypatch.setitem(sys.modules, "mteb", ModuleType("mteb"))
    models, base = ModuleType("mteb.models"), ModuleType("mteb.models.abs_encoder")
    models.ModelMeta, base.AbsEncoder = SimpleNamespace(create_empty=dict), object
    monkeypatch.setitem(sys.modules, "mteb.models", models)
    monkeypatch.setitem(sys.modules, "mteb.models.abs_encoder", base)
    embedder = Embedder(tiny_artifact, "fp32", "cpu", 1)
    monkeypatch.setattr(embedder, "encode_queries", lambda texts: np.zeros((len(texts), embedder.dim)))
    encoder = mteb_encoder(embedder)
    inputs = [{"text": ["a river", "a stone"]}, {"text": ["water"]}]
    found = encoder.encode(inputs, task_metadata=None, hf_split="test", hf_subset="default")
    np.testing.assert_array_equal(found, embedder.encode(["a river", "a stone", "water"]))
    assert not encoder.encode(inputs, prompt_type=SimpleNamespace(value="query")).any()


@pytest.mark.parametrize("run", [plain.embedder, plain.scheduled])
def test_a_pooling_that_isnt_written_down_is_refused(tiny_artifact, run):
    job = Job(engine="", variant="", kind="embedder", source="", stock=str(tiny_artifact), pooling="last_token")

    def infer(feeds):
        return np.zeros((*feeds["input_ids"].shape, 4), np.float32)

    with pytest.raises(ValueError, match="pools by cls or mean, not last_token; leave it out with --engines"):
        run(job, *[infer] * (2 if run is plain.scheduled else 1))(["a text"], 1)


def test_two_stages_of_a_model_with_a_space_in_its_name_are_shown():
    settings = {"embedder": "my own model ours int8", "candidates": 100, "data": "some"}
    figures = {"nDCG@10": Figure(0.5, 0.5, 0.5, 1), "pairs/s": Figure(9, 9, 9, 1)}
    held = result(0, benchmark="two-stage", settings=settings, figures=figures, machine=MACHINE)
    assert "| my own model, **bge-onnx** int8 |" in full_report([held], [])


def test_a_stock_graph_under_our_scheduling_gives_the_same_vectors(tiny_artifact):
    """And so does the plain pipeline; our graph in a stock one's place has no mask, but needs none of equal lengths."""
    embedder = Embedder(tiny_artifact, "fp32", "cpu", 1)
    session = embedder._opened.sessions[0]
    job = Job(engine="", variant="", kind="embedder", source="", stock=str(tiny_artifact), max_length=64, threads=3)
    texts = ["river stone " * (i % 30) for i in range(100)]

    def infer(feeds):
        assert (feeds["attention_mask"] == 1).all()  # nothing is padded
        return session.run(["last_hidden_state"], {"input_ids": feeds["input_ids"]})[0]

    found = plain.scheduled(job, infer, infer)(texts, 32)
    np.testing.assert_allclose(found, embedder.encode(texts), atol=1e-6)
    np.testing.assert_array_equal(plain.embedder(job, infer)(texts, 1), found)
