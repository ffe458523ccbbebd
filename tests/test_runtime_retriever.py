"""The retriever: what was added is found, what was saved comes back, and what goes wrong leaves the last save."""

import gc
import linecache
import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime.retriever
from runtime import ArtifactError, BgeOnnxError, Embedder, InputError, Limits, Reranker, Retriever
from runtime.retriever import CHUNK, TEXTS

WORDS = [
    "a",
    "plane",
    "wing",
    "lift",
    "bread",
    "dough",
    "oven",
    "cat",
    "dog",
    "sleep",
    "stock",
    "bank",
    "rate",
    "rain",
    "snow",
    "wind",
    "road",
    "car",
    "train",
    "sea",
]


def texts_of(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [f"{i} {' '.join(draw.choice(WORDS, 8))}" for i in range(count)]


@pytest.fixture(scope="module")
def embedder(tiny_artifact):
    return Embedder(tiny_artifact, "fp32")


@pytest.fixture(scope="module")
def real_embedder(minilm):
    """One whose vectors lie apart, as a random model's don't."""
    return Embedder(minilm, "int8")


@pytest.fixture(scope="module")
def reranker(tiny_reranker):
    return Reranker(tiny_reranker("bert")[0], "fp32")


@pytest.fixture
def filled(embedder, tmp_path):
    """A saved retriever of 300 texts, and the texts."""
    retriever, texts = Retriever(tmp_path / "index", embedder), texts_of(300)
    assert retriever.add(texts) == 300
    retriever.save()
    return retriever, texts


def test_the_nearest_are_those_of_an_exact_search(filled, embedder):
    retriever, texts = filled
    corpus = embedder.encode_corpus(texts)
    found = 0
    for query in texts_of(20, seed=1):
        scores = corpus @ embedder.encode_queries(query)
        hits = retriever.retrieve(query, 10)
        assert [hit.text for hit in hits] == [texts[int(hit.id)] for hit in hits]
        np.testing.assert_allclose([hit.score for hit in hits], [scores[int(hit.id)] for hit in hits], atol=2e-3)
        found += len({hit.id for hit in hits} & {str(i) for i in np.argsort(-scores)[:10]})
    assert found > 0.95 * 200


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_equal_texts_leave_the_others_to_be_found(real_embedder, tmp_path, order):
    """Equal vectors in the index would take each other for neighbours, and nobody else."""
    texts, copies = texts_of(1000), [f"copy {i}" for i in range(500)]
    rows = [*((name, "left blank") for name in copies), *zip(map(str, range(1000)), texts, strict=True)]
    if order == "mixed":
        np.random.default_rng(0).shuffle(rows)
    retriever = Retriever(tmp_path / "index", real_embedder)
    assert retriever.add([text for _, text in rows], [name for name, _ in rows]) == 1500 == len(retriever)
    found = [str(i) in {hit.id for hit in retriever.retrieve(text, 100)} for i, text in enumerate(texts[:200])]
    assert sum(found) >= 199
    assert {hit.id for hit in retriever.retrieve("left blank", 500)} == set(copies)
    assert len(retriever.retrieve("left blank", 600)) == 600
    assert retriever.remove(copies[1:]) == 499
    assert [hit.id for hit in retriever.retrieve("left blank", 1)] == copies[:1]
    assert retriever.add(["left blank"], ["another"]) == 1
    assert retriever.remove(copies[:1]) == 1
    assert [hit.id for hit in retriever.retrieve("left blank", 1)] == ["another"]
    assert retriever.remove(["another"]) == 1
    assert not {hit.text for hit in retriever.retrieve("left blank", 50)} & {"left blank"}
    assert retriever.add(["left blank"], ["at last"]) == 1
    assert [hit.id for hit in retriever.retrieve("left blank", 1)] == ["at last"]


NAMES, SAYS = st.sampled_from([f"id {i}" for i in range(8)]), st.sampled_from(WORDS[:5])


@given(
    st.lists(
        st.one_of(
            st.lists(st.tuples(NAMES, SAYS), max_size=6).map(lambda rows: ("add", rows)),
            st.lists(NAMES, max_size=4).map(lambda names: ("remove", names)),
            st.sampled_from(["save", "lose", "fail"]).map(lambda what: (what, None)),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_added_replaced_and_taken_out_what_is_there_is_found(embedder, steps):
    def fails(vectors):
        raise RuntimeError("full")

    with tempfile.TemporaryDirectory() as folder:
        held, saved, retriever = {}, {}, Retriever(folder, embedder)
        for step, given in steps:
            match step:
                case "add":
                    held = held | dict(given)
                    retriever.add([text for _, text in given], [name for name, _ in given])
                case "remove":
                    assert retriever.remove(given) == len(held.keys() & set(given))
                    held = {name: text for name, text in held.items() if name not in given}
                case "save":
                    retriever.save()
                    saved = held
                case "lose":
                    retriever.close()
                    held, retriever = saved, Retriever(folder, embedder)
                case "fail":  # when all else is done
                    retriever._without_text = fails
                    with pytest.raises(BgeOnnxError, match="usearch failed"):
                        retriever.add(["plane", "sea"], ["id 0", "id 1"])
                    del retriever._without_text
            assert {hit.id: hit.text for hit in retriever.retrieve("a", 100)} == held
            assert len(retriever) == len(held)
        retriever.close()


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_vectors_of_any_length_are_found(real_embedder, tmp_path, monkeypatch, recwarn, size):
    embed = real_embedder._embed
    monkeypatch.setattr(real_embedder, "_embed", lambda *given, **options: size * embed(*given, **options))
    texts, retriever = texts_of(200), Retriever(tmp_path / "index", real_embedder)
    retriever.add(texts)
    assert sum(text in {hit.text for hit in retriever.retrieve(text, 10)} for text in texts) >= 199
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


OPENS = """
import sys
from runtime import Embedder, Retriever
embedder = Embedder(sys.argv[2], "fp32")
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    Retriever(f"{sys.argv[1]}/{i}", embedder).close()
"""


def test_several_processes_may_start_a_folder_at_once(tiny_artifact, tmp_path):
    command = [sys.executable, "-c", OPENS, str(tmp_path), str(tiny_artifact)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[1] for process in processes] == [""] * 4


def test_a_folder_of_an_older_version_says_so(filled, embedder, tmp_path):
    filled[0].close()
    with sqlite3.connect(tmp_path / "index" / TEXTS) as old:
        old.executescript("DROP INDEX texts_of_a_vector; ALTER TABLE texts DROP COLUMN vector")
    with pytest.raises(ArtifactError, match="made by an older version; index its texts again"):
        Retriever(tmp_path / "index", embedder)


def test_the_second_stage_is_the_rerankers_order(filled, embedder, reranker, tmp_path):
    hits = filled[0].retrieve("a plane", 50)
    retriever = Retriever(tmp_path / "index", embedder, reranker)
    ranked = reranker.rank("a plane", [hit.text for hit in hits], 5)
    found = retriever.search("a plane", 5, candidates=50)
    assert [(hit.id, hit.rerank_score) for hit in found] == [(hits[i].id, score) for i, score in ranked]
    assert all(hit.score == hits[i].score for hit, (i, _) in zip(found, ranked, strict=True))


def test_without_a_reranker_the_order_is_the_vectors(filled):
    assert filled[0].search("a plane", 3) == filled[0].retrieve("a plane", 100)[:3]


def test_what_was_saved_comes_back_and_what_wasnt_is_gone(filled, embedder, tmp_path):
    retriever, _ = filled
    before = retriever.retrieve("bread", 20)
    retriever.add(["never saved"])
    assert len(retriever) == 301
    retriever.close()
    again = Retriever(tmp_path / "index", embedder)
    assert len(again) == 300
    assert again.retrieve("bread", 20) == before


def test_texts_are_added_step_by_step_and_a_known_name_is_replaced(embedder, tmp_path):
    retriever = Retriever(tmp_path / "index", embedder)
    retriever.add(["a cat", "a dog"], ["x", "y"])
    retriever.save()
    retriever.add(["a train", "a cat again", "a boat"], ["z", "x", "z"])
    assert len(retriever) == 3
    assert {hit.id: hit.text for hit in retriever.retrieve("a", 10)} == {
        "x": "a cat again",
        "y": "a dog",
        "z": "a boat",
    }
    assert retriever.remove(["y", "nobody"]) == 1
    retriever.save()
    assert {hit.id for hit in Retriever(tmp_path / "index", embedder).retrieve("a", 10)} == {"x", "z"}
    assert len(list((tmp_path / "index").glob("*.usearch"))) == 1


def test_a_stream_longer_than_a_chunk_is_added_whole(embedder, tmp_path):
    retriever = Retriever(tmp_path / "index", embedder)
    assert retriever.add(text for text in texts_of(CHUNK + 5)) == CHUNK + 5 == len(retriever)
    assert {hit.id for hit in retriever.retrieve(texts_of(CHUNK + 5)[-1], 3)} & {str(CHUNK + 4)}


def test_an_empty_retriever_finds_nothing(embedder, reranker, tmp_path):
    retriever = Retriever(tmp_path / "index", embedder, reranker)
    assert (retriever.search("a"), retriever.retrieve("a"), len(retriever), retriever.add([])) == ([], [], 0, 0)
    retriever.save()
    assert Retriever(tmp_path / "index", embedder).search("a") == []


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda r: r.search(7), "query is int"),
        (lambda r: r.search("a", 0), "top_k is 0"),
        (lambda r: r.search("a", candidates=-1), "candidates is -1"),
        (lambda r: r.retrieve("a", 10**6), "top_k is 1000000"),
        (lambda r: r.retrieve("\ud800"), "surrogate"),
        (lambda r: r.add(["a", 5]), "text 1 is int"),
        (lambda r: r.add(7), "texts is int"),
        (lambda r: r.add("a text"), "texts is one str"),
        (lambda r: r.add(["a", "b"], "xy"), "ids is one str"),
        (lambda r: r.add(["a", "b"], ["x"]), "1 ids for more texts; pass one for each"),
        (lambda r: r.add(["a", "b"], ["0", 3]), "id 1 is '3'; pass a str"),
        (lambda r: r.add(["a", "b"], ["0", "\ud800"]), "id 1 is .*valid Unicode"),
        (lambda r: r.remove("0"), "ids is one str"),
        (lambda r: r.remove(None), "NoneType"),
        (lambda r: r.remove(["0", 3]), "id 1 is '3'"),
    ],
)
def test_bad_input_is_a_clean_error_and_adds_nothing(filled, call, says):
    with pytest.raises(InputError, match=says):
        call(filled[0])
    assert len(filled[0]) == 300


def test_more_names_than_texts_are_an_error(embedder, tmp_path):
    with pytest.raises(InputError, match="more ids than the 2 texts"):
        Retriever(tmp_path / "index", embedder).add(["a", "b"], ["x", "y", "z"])


def test_a_number_never_takes_the_place_of_somebodys_name(embedder, tmp_path):
    retriever = Retriever(tmp_path / "index", embedder)
    retriever.add(["a cat"], ["1"])
    with pytest.raises(InputError, match="'1' is somebody's id already; pass ids"):
        retriever.add(["a dog"])
    assert [hit.text for hit in retriever.retrieve("a")] == ["a cat"]


def test_what_isnt_a_model_or_a_folder_is_a_clean_error(embedder, reranker, tmp_path):
    for models in ((reranker,), (embedder, embedder), (None,)):
        with pytest.raises(InputError, match="takes an Embedder and a Reranker"):
            Retriever(tmp_path / "index", *models)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="pass another folder"):
        Retriever(tmp_path / "file", embedder)


def test_a_closed_retriever_says_so(filled):
    with filled[0] as retriever:
        pass
    for call in (lambda: retriever.search("a"), lambda: retriever.add(["a"]), retriever.save, lambda: len(retriever)):
        with pytest.raises(InputError, match="the retriever is closed .*; open it again"):
            call()


def test_two_that_have_a_folder_open_never_spoil_it(filled, embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.retriever, "PATIENCE", 0)
    first, second = filled[0], Retriever(tmp_path / "index", embedder)
    first.remove(["0", "1"])
    with pytest.raises(ArtifactError, match="another process is adding to it; wait until it has saved"):
        second.add(["a text"])
    assert (len(first), len(second), len(Retriever(tmp_path / "index", embedder))) == (298, 300, 300)
    first.save()
    found = {hit.id for hit in second.retrieve("a plane", 300)}
    assert found <= {str(i) for i in range(2, 300)}
    assert len(found) > 280  # HNSW finds nearly all
    for i, (one, other) in enumerate([(second, first), (first, second)]):  # each goes on from what the other saved
        assert one.add([f"a train to {i}"], [f"new {i}"]) == 1
        one.save()
        assert other.retrieve(f"a train to {i}", 1)[0].id == f"new {i}"
    assert len(Retriever(tmp_path / "index", embedder)) == 300


def test_a_saved_folder_can_be_copied_while_it_is_open(filled, embedder, tmp_path):
    shutil.copytree(tmp_path / "index", tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    assert len(Retriever(tmp_path / "copy", embedder)) == 300


def test_what_a_crash_left_is_cleared_by_the_next_save(filled, tmp_path):
    (tmp_path / "index" / "vectors.0badf00d.usearch").write_bytes(b"half")
    (tmp_path / "index" / "mine.txt").write_text("mine")
    filled[0].remove(["0"])
    filled[0].save()
    assert len(list((tmp_path / "index").glob("*.usearch"))) == 1
    assert (tmp_path / "index" / "mine.txt").exists()


@pytest.mark.parametrize("name", ["../victim.txt", "victim.txt", "vectors./../../x.usearch", "/etc/vectors.x.usearch"])
def test_an_index_by_another_name_is_refused(filled, embedder, tmp_path, name):
    retriever = filled[0]
    retriever._texts.execute("UPDATE meta SET value = ? WHERE name = 'index'", (name,))
    retriever._texts.commit()
    retriever.close()
    with pytest.raises(ArtifactError, match="as its index; index it again"):
        Retriever(tmp_path / "index", embedder)


def test_a_folder_that_cant_be_written_to_can_be_searched(filled, embedder, tmp_path):
    before = filled[0].retrieve("bread", 20)
    filled[0].close()
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "--bind", "-o", "ro", tmp_path / "index", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        retriever = Retriever(disk, embedder)
        assert retriever.retrieve("bread", 20) == before
        with pytest.raises(ArtifactError, match="readonly"):
            retriever.add(["a text"])
        retriever.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_another_model_is_refused(filled, minilm, tmp_path):
    filled[0].close()
    with pytest.raises(ArtifactError, match="made with another model than all-minilm-l6-v2; index it again"):
        Retriever(tmp_path / "index", Embedder(minilm))


@pytest.mark.parametrize("spoil", ["texts", "vectors", "no vectors"])
def test_damaged_files_are_clean_errors(filled, embedder, tmp_path, spoil):
    filled[0].close()
    vectors = next((tmp_path / "index").glob("*.usearch"))
    match spoil:
        case "texts":
            (tmp_path / "index" / TEXTS).write_bytes(b"not a database" * 100)
        case "vectors":
            vectors.write_bytes(vectors.read_bytes()[:100])
        case "no vectors":
            vectors.unlink()
    with pytest.raises(ArtifactError, match="index (it|them) again"):
        Retriever(tmp_path / "index", embedder)


def test_a_save_that_fails_keeps_the_last_one(filled, embedder, tmp_path, monkeypatch):
    retriever, _ = filled
    retriever.add(["one more"])
    monkeypatch.setattr(retriever, "folder", tmp_path / "gone")
    with pytest.raises(ArtifactError, match="can't be saved"):
        retriever.save()
    shutil.copytree(tmp_path / "index", tmp_path / "copy")  # as a crash would leave it
    assert len(Retriever(tmp_path / "copy", embedder)) == 300
    monkeypatch.undo()
    retriever.save()
    retriever.close()
    assert len(Retriever(tmp_path / "index", embedder)) == 301


def test_many_threads_may_search_while_one_adds(filled):
    retriever, _ = filled
    failures = []

    def search():
        try:
            for query in texts_of(15, seed=2):
                assert len(retriever.search(query, 5)) == 5
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    retriever.add(texts_of(200, seed=3))
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(retriever) == 500


def test_without_usearch_the_error_says_what_to_install(embedder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(BgeOnnxError, match=r"pip install 'bge-onnx\[retrieve\]'"):
        Retriever(tmp_path / "index", embedder)


SCRIPT = """
import resource, sys
from runtime import ArtifactError, Embedder, Retriever
retriever = Retriever(sys.argv[1], Embedder(sys.argv[2], "fp32"))
def files_up_to(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def fails(call, *given):
    try:
        call(*given)
    except ArtifactError as error:
        print(error)
    else:
        sys.exit(f"{call.__name__} didn't fail")
"""


def run_apart(code, folder, artifact):
    """What a script printed that runs with a retriever of the folder in a process of its own."""
    command = [sys.executable, "-c", SCRIPT + code, str(folder), str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ids_of(retriever, query="a", top_k=1000):
    return {hit.id for hit in retriever.retrieve(query, top_k)}


def test_a_save_whose_last_step_lacks_space_is_whole(embedder, tiny_artifact, tmp_path):
    retriever = Retriever(tmp_path / "index", embedder)
    retriever.add(["a cat " + "x" * 20_000] * 50)
    retriever.save()
    retriever.close()
    # the log has room for the new text, the database, which is beyond the limit already, none to take it over
    run_apart('files_up_to(500_000); retriever.add(["a new dog"]); retriever.save()', tmp_path / "index", tiny_artifact)
    again = Retriever(tmp_path / "index", embedder)
    assert len(again) == 51
    assert "50" in ids_of(again, "a new dog")


@pytest.mark.parametrize("fails", ["add", "save"])
def test_what_a_full_disk_lost_is_never_passed_over(filled, embedder, tiny_artifact, tmp_path, fails):
    filled[0].close()
    first = """
before = retriever.retrieve("a", 300)
retriever.remove(["0"])
retriever.add(["a dog"], ["1"])
"""
    faults = {
        "add": 'files_up_to(1_000_000); fails(retriever.add, ["x" * 30_000] * 500)',  # beyond SQLite's cache
        "save": 'retriever.add(["x" * 30_000] * 5); files_up_to(100_000); fails(retriever.save)',
    }
    then = """
files_up_to(resource.RLIM_INFINITY)
for call, *given in (retriever.save,), (retriever.add, ["a"]), (retriever.remove, ["2"]), (retriever.save,):
    fails(call, *given)
assert retriever.retrieve("a", 300) == before
"""
    said = run_apart(first + faults[fails] + then, tmp_path / "index", tiny_artifact).splitlines()
    assert len(said) == 5
    assert all("since the last save is lost; open the folder again and add it again" in line for line in said)
    assert len(Retriever(tmp_path / "index", embedder)) == 300


def test_a_kill_at_any_moment_leaves_a_whole_save(embedder, tiny_artifact, tmp_path):
    code = 'while True: retriever.add(["a text"] * 7); retriever.save(); print("saved", flush=True)'
    for wait in (0, 0.05, 0.2):
        command = [sys.executable, "-c", SCRIPT + code, str(tmp_path / "index"), str(tiny_artifact)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"saved\n"
            time.sleep(wait)
            process.kill()
        retriever = Retriever(tmp_path / "index", embedder)
        assert len(retriever) % 7 == 0 < len(ids_of(retriever))
        retriever.close()


def test_others_find_what_was_saved_and_no_number_is_given_twice(filled, embedder, tmp_path):
    writer, reader = filled[0], Retriever(tmp_path / "index", embedder)
    texts = texts_of(300, seed=9)
    writer.add(texts, [str(i) for i in range(300)])
    writer.save()
    hits = reader.retrieve("a", 1000)
    assert len(hits) > 280
    assert all(hit.text == texts[int(hit.id)] for hit in hits)
    writer.remove(["299"])
    writer.save()
    writer.close()
    writer = Retriever(tmp_path / "index", embedder)
    assert writer._next == 600  # not the key of the text that was removed
    writer.close()


def test_a_save_leaves_what_the_next_process_is_writing(filled, tmp_path):
    theirs = tmp_path / "index" / "vectors.0badf00d.usearch"
    filled[0].remove(["0"])
    filled[0]._texts.set_trace_callback(lambda statement: statement == "COMMIT" and theirs.write_bytes(b"theirs"))
    filled[0].save()
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize("already", ["open", "opening"])
def test_an_index_that_is_replaced_while_it_is_opened_is_no_error(filled, embedder, tmp_path, monkeypatch, already):
    reader = Retriever(tmp_path / "index", embedder) if already == "open" else None
    meta, saves = Retriever._meta, []

    def then_another_saves(retriever):
        read = meta(retriever)
        if retriever is not filled[0] and len(saves) < 2:
            saves.append(filled[0].add(["a text"]))
            filled[0].save()
        return read

    monkeypatch.setattr(Retriever, "_meta", then_another_saves)
    reader = reader or Retriever(tmp_path / "index", embedder)
    assert {"300", "301"} <= ids_of(reader, "a text", 20)
    reader.close()


def test_limits_bound_what_others_ask_for_and_not_the_texts(tiny_artifact, tiny_reranker, tmp_path):
    limits = Limits(texts=5, characters=100)
    embedder = Embedder(tiny_artifact, "fp32", limits=limits)
    reranker = Reranker(tiny_reranker("bert")[0], "fp32", limits=Limits(texts=5, characters=20))
    retriever = Retriever(tmp_path / "index", embedder, reranker)
    assert retriever.add(texts_of(50)) == 50
    assert len(retriever.search("a", 30)) == 30
    with pytest.raises(InputError, match="text 0 has 21 characters"):
        retriever.search("a" * 21)
    for bad, says in ((7, "is int"), ("\ud800", "surrogate"), ("x" * 101, "has 101 characters")):
        with pytest.raises(InputError, match=f"text {CHUNK + 3} .*{says}"):
            retriever.add([*["a"] * (CHUNK + 3), bad])


def interrupted_at(line, call):
    """Whether a call was interrupted: at the nth line of the retriever's code that it comes to."""
    left = [line]

    def trace(frame, event, _):
        if frame.f_code.co_filename != runtime.retriever.__file__:
            return None
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        left[0] -= event == "line" and not text.startswith(("with ", "try:"))  # where no signal is handled
        if left[0] == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("dirty", [False, True])
@pytest.mark.parametrize("what", ["add", "save"])
def test_an_interrupt_at_any_line_spoils_nothing(embedder, tmp_path, dirty, what):
    line, interrupted = 0, True
    while interrupted:
        line, folder = line + 1, tmp_path / f"index {line}"
        retriever = Retriever(folder, embedder)
        retriever.add(["a cat", "a dog"], ["x", "y"])
        retriever.save()
        if dirty:
            retriever.add(["a train"], ["t"])

        def add(to=retriever):
            to.add(["a boat", "a plane"], ["x", "z"])

        if what == "save":
            add()
        interrupted = interrupted_at(line, add if what == "add" else retriever.save)
        assert retriever._dirty or not retriever._texts.in_transaction  # for which other processes would wait
        held = {hit.id: hit.text for hit in retriever.retrieve("a")}
        assert len(held) == len(retriever)
        assert held == {"x": "a boat" if "z" in held else "a cat", "y": "a dog"} | (
            {"z": "a plane"} if "z" in held else {}
        ) | ({"t": "a train"} if dirty else {})
        add()
        retriever.save()
        retriever.close()
        again = Retriever(folder, embedder)
        assert ids_of(again) == {"x", "y", "z", "t"} - (set() if dirty else {"t"})
        again.close()
    assert line > 10


def test_a_change_that_fails_or_changes_nothing_keeps_nobody_waiting(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime.retriever, "PATIENCE", 0)
    first, second = (Retriever(tmp_path / "index", embedder) for _ in range(2))
    first.add(["a cat"], ["1"])
    first.save()
    with pytest.raises(InputError, match="'1' is somebody's id already"):
        first.add(["a"])
    assert first.remove(["nobody"]) == 0
    assert second.add(["a dog"], ["2"]) == 1
    second.save()
    first._load()
    first._index = first._new_index(ndim=3)
    with pytest.raises(BgeOnnxError, match="usearch failed .*dim"):
        first.add(["a train"], ["3"])
    assert second.add(["a train"], ["3"]) == 1
    assert (len(first), len(second)) == (2, 3)


def _after_fork(retriever, results):
    said = []
    for call in (
        lambda: retriever.retrieve("a"),
        lambda: retriever.add(["a"]),
        retriever.save,
        lambda: len(retriever),
        lambda: Retriever(retriever.folder, retriever._embedder),  # SQLite's locks would keep nobody out
    ):
        try:
            call()
        except InputError as error:
            said.append(str(error))
    retriever.close()
    retriever._texts = None
    gc.collect()  # would close the connection, were it not kept
    results.put(said)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_open_its_own(filled):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with filled[0]._lock:  # as another thread may hold it just then
        child = context.Process(target=_after_fork, args=(filled[0], results), daemon=True)
        child.start()
        said = results.get(timeout=60)
        child.join()
    assert len(said) == 5
    assert all("opened before a fork; open the retriever in each process, after the fork" in line for line in said)
    assert filled[0].add(["a text"]) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_undoes_nothing_that_its_parent_has_added(embedder, tmp_path):
    retriever = Retriever(tmp_path / "new", embedder)
    texts = [f"{i} {'a plane ' * 1000}" for i in range(500)]  # more than SQLite holds in memory
    retriever.add(texts)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_after_fork, args=(retriever, context.Queue()), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    retriever.add(["one more"])
    retriever.save()
    again = Retriever(tmp_path / "new", embedder)
    assert [text for (text,) in again._texts.execute("SELECT text FROM texts ORDER BY key")] == [*texts, "one more"]


def test_who_closes_before_a_fork_may_open_after_it(filled, embedder):
    filled[0].close()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=lambda: results.put(len(Retriever(filled[0].folder, embedder))), daemon=True)
    child.start()
    assert results.get(timeout=60) == 300
    child.join()


def test_the_folder_stays_what_it_was_wherever_the_process_goes(filled, embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retriever = Retriever("index", embedder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    retriever.add(["one more"])
    retriever.save()
    assert (len(Retriever(tmp_path / "index", embedder)), os.listdir()) == (301, [])


def test_searches_go_on_while_a_change_waits_for_another_process(filled, embedder, monkeypatch):
    monkeypatch.setattr(runtime.retriever, "PATIENCE", 1)
    waiting = Retriever(filled[0].folder, embedder)
    filled[0].add(["not saved yet"])
    with ThreadPoolExecutor(1) as pool:
        change, found = pool.submit(waiting.add, ["a text"]), 0
        while not change.done():
            found += len(waiting.retrieve("a plane", 1))
        with pytest.raises(ArtifactError, match="another process is adding to it"):
            change.result()
        assert found > 3
        change = pool.submit(waiting.add, ["a text"])
        filled[0].save()
        assert change.result() == 1


def test_saving_waits_for_who_reads_elsewhere_so_that_the_folder_is_whole(filled):
    other = sqlite3.connect(filled[0].folder / TEXTS, check_same_thread=False)
    rows = other.execute("SELECT * FROM texts")
    rows.fetchone()  # and so reads on
    filled[0].add(["one more"])
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(filled[0].save)
        time.sleep(0.3)
        assert filled[0].retrieve("one more", 1)[0].text == "one more"
        rows.close()
        saved.result()
    assert (filled[0].folder / f"{TEXTS}-wal").stat().st_size == 0
    assert len(list(filled[0].folder.glob("*.usearch"))) == 1
    other.close()


def test_an_interrupt_within_usearch_stays_one(filled):
    retriever = filled[0]
    vectors = np.random.default_rng(0).normal(size=(20_000, retriever._embedder.dim)).astype(np.float32)

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt), retriever._explained():
            while True:
                retriever._new_index().add(np.arange(len(vectors)), vectors, threads=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_searches_go_on_while_an_index_is_written(filled, monkeypatch):
    filled[0].add(["one more"])
    to_disk, found = runtime.retriever._to_disk, []

    def searched_meanwhile(path):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(filled[0].retrieve, "one more", 1).result(timeout=20))
        to_disk(path)

    monkeypatch.setattr(runtime.retriever, "_to_disk", searched_meanwhile)
    filled[0].save()
    assert [hits[0].id for hits in found] == ["300"]


def test_closing_what_wasnt_saved_is_warned_of_once(filled, caplog):
    filled[0].close()
    assert caplog.text == ""
    retriever = Retriever(filled[0].folder, filled[0]._embedder)
    with retriever:
        retriever.add(["never saved"])
    retriever.close()
    assert caplog.text.count("weren't saved") == 1
