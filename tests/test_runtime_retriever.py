"""The retriever: what was added is found, what was saved comes back, and what goes wrong leaves the last save."""

import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from runtime import ArtifactError, BgeOnnxError, Embedder, InputError, Reranker, Retriever
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


def test_two_that_have_a_folder_open_never_spoil_it(filled, embedder, tmp_path):
    first, second = filled[0], Retriever(tmp_path / "index", embedder)
    second._texts.execute("PRAGMA busy_timeout = 1")
    first.remove(["0", "1"])
    with pytest.raises(ArtifactError, match="another process is adding to it; wait until it has saved"):
        second.add(["a text"])
    assert (len(first), len(second), len(Retriever(tmp_path / "index", embedder))) == (298, 300, 300)
    first.save()
    found = {hit.id for hit in second.retrieve("a plane", 300)}  # with the vectors that it loaded
    assert found <= {str(i) for i in range(2, 300)}
    assert len(found) > 280  # HNSW finds nearly all
    for change in (lambda: second.add(["a text"]), lambda: second.remove(["7"]), second.save):
        with pytest.raises(ArtifactError, match="another process changed it since it was opened; open it again"):
            change()
    assert len(Retriever(tmp_path / "index", embedder)) == 298
    assert first.add(["one more"]) == 1


def test_a_saved_folder_can_be_copied_while_it_is_open(filled, embedder, tmp_path):
    shutil.copytree(tmp_path / "index", tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    assert len(Retriever(tmp_path / "copy", embedder)) == 300


def test_what_a_crash_left_is_cleared_by_the_next_save(filled, tmp_path):
    (tmp_path / "index" / "vectors.0badf00d.usearch").write_bytes(b"half")
    (tmp_path / "index" / "mine.txt").write_text("mine")
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
