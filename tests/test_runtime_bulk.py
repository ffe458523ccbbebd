"""Bulk work on int8 runs side by side, a thread each, on a session of its own: as exact, as bounded and as robust."""

import concurrent.futures
import itertools
import random
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Embedder, InputError, Reranker, RunError
from runtime.batching import plan_batches, plan_threads
from runtime.lanes import Lanes
from runtime.model import ENOUGH_TOKENS

WORDS = ["river", "stone", "light", "apple", "horse", "tower", "green", "table", "music", "bread"]
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=i % 61)) for i in range(200)]
"""Some 6,000 words, so that they are bulk work, with long and short ones, one of them empty."""

lengths = st.lists(st.integers(0, 60), max_size=80)


def places(batches):
    return [int(i) for batch in batches for i in batch]


@given(lengths, st.integers(4, 200), st.integers(1, 9))
@settings(deadline=None)
def test_the_runs_on_all_threads_and_those_on_one_partition_the_texts(lengths, bound, threads):
    wide, narrow = plan_threads(lengths, bound, threads)
    assert sorted(places(wide) + places(narrow)) == list(range(len(lengths)))
    for batch in wide + narrow:
        assert len({lengths[i] for i in batch}) == 1


@given(lengths, st.integers(4, 200), st.integers(1, 9))
@settings(deadline=None)
def test_runs_side_by_side_share_the_bound_and_leave_no_thread_without_one(lengths, bound, threads):
    wide, narrow = plan_threads(lengths, bound, threads)
    assert not narrow or len(narrow) >= threads > 1
    assert all(sum(lengths[i] for i in batch) <= max(bound // threads, bound // 4) for batch in narrow)
    assert all(batch.size == 1 or sum(lengths[i] for i in batch) <= bound for batch in wide)
    if narrow:
        assert all(lengths[i] > max(bound // threads, bound // 4) for i in places(wide))


def test_texts_of_one_length_are_cut_up_for_all_threads():
    wide, narrow = plan_threads([10] * 12, 2048, 4)
    assert (wide, [len(batch) for batch in narrow]) == ([], [3, 3, 3, 3])


def test_runs_shrink_towards_the_end_so_that_threads_end_together():
    """Of equal runs the last would leave half the threads idle for as long as it takes."""
    _, narrow = plan_threads([170] * 33, 1024, 2)
    tokens = [170 * len(batch) for batch in narrow]
    assert (tokens[:2], tokens[-2:]) == ([510, 510], [170, 170])
    assert all(run <= max(170, sum(tokens[i:]) // 2) for i, run in enumerate(tokens))


def test_one_thread_and_too_few_texts_leave_it_as_it_was():
    for given_lengths, threads in (([30] * 9, 1), ([30, 7], 4), ([], 4), ([5000, 3000], 2)):
        wide, narrow = plan_threads(given_lengths, 2048, threads)
        assert narrow == []
        assert places(wide) == places(plan_batches(given_lengths, 2048))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("model", ["tiny_artifact", "minilm"])
def test_a_texts_vector_has_the_same_bits_in_bulk_and_alone(request, model, threads):
    embedder = Embedder(request.getfixturevalue(model), "int8", "cpu", threads)
    alone = np.array([embedder.encode(text) for text in TEXTS])
    assert embedder._opened.narrow is None
    np.testing.assert_array_equal(embedder.encode(TEXTS), alone)
    assert embedder._opened.narrow is not None
    mixed = random.Random(0).sample(range(len(TEXTS)), k=120)
    np.testing.assert_array_equal(embedder.encode([TEXTS[i] for i in mixed]), alone[mixed])


def test_a_pairs_score_has_the_same_bits_in_bulk_and_alone(tiny_reranker):
    reranker = Reranker(tiny_reranker("bert")[0], "int8", "cpu", 2)
    pairs = [("a river", text) for text in TEXTS]
    alone = [reranker.compute_score(pair) for pair in pairs]
    assert reranker.compute_score(pairs) == alone
    assert reranker._opened.narrow is not None


def test_only_int8_and_several_threads_take_a_second_session_and_only_for_bulk_work(tiny_artifact):
    for variant, threads, texts in (("fp32", 2, TEXTS), ("int8", 1, TEXTS), ("int8", 2, TEXTS[:20])):
        embedder = Embedder(tiny_artifact, variant, "cpu", threads)
        embedder.encode(texts)
        assert embedder._opened.narrow is None


def test_calls_of_several_texts_add_up_to_bulk_work(tiny_artifact):
    embedder, given = Embedder(tiny_artifact, "int8", "cpu", 2), 0
    expected = embedder.encode(TEXTS[0])
    for start in itertools.cycle(range(0, len(TEXTS), 20)):
        assert embedder._opened.narrow is None
        texts = TEXTS[start : start + 20]
        np.testing.assert_array_equal(embedder.encode([TEXTS[0], *texts])[0], expected)
        given += sum(min(count, embedder.max_length) for count in embedder.count_tokens([TEXTS[0], *texts]))
        if given > ENOUGH_TOKENS:
            break
    assert embedder._opened.narrow is not None


@pytest.mark.parametrize(("threads", "kept"), [(2, True), (3, False)])
def test_as_many_small_calls_as_threads_run_on_one_each_with_the_same_bits(tiny_artifact, threads, kept):
    """A hook is called while its call is running, so that a call from it is the second at once."""
    alone = Embedder(tiny_artifact, "int8", "cpu", 1).encode(TEXTS)
    found = []

    def call_again(metric, value):
        if metric == "run_seconds" and not found:
            found.append(None)
            found[:] = [embedder.encode(TEXTS[7])]

    embedder = Embedder(tiny_artifact, "int8", "cpu", threads, hook=call_again)
    np.testing.assert_array_equal(embedder.encode(TEXTS[5]), alone[5])
    np.testing.assert_array_equal(found[0], alone[7])
    assert (embedder._opened.narrow is not None) == kept
    assert not embedder._opened.small


def test_after_a_crowd_calls_take_one_thread_for_a_moment_but_bulk_work_takes_all(tiny_artifact, monkeypatch):
    monkeypatch.setattr("runtime.model.CROWDED", 60)
    embedder, taken = Embedder(tiny_artifact, "int8", "cpu", 2), []
    run = embedder._run_batch

    def watched(outputs, gate, session, batch):
        taken.append((session is embedder._opened.narrow, threading.get_ident() == here))
        return run(outputs, gate, session, batch)

    here, embedder._run_batch = threading.get_ident(), watched
    embedder.encode(TEXTS[5])
    embedder._opened.small.add("another call")
    embedder.encode(TEXTS[5])
    embedder._opened.small.clear()
    embedder.encode(TEXTS[5])
    assert taken == [(False, True), (True, True), (True, True)]
    embedder.encode(TEXTS)
    assert set(taken[3:]) == {(True, False)}
    embedder._opened.crowded -= 60
    embedder.encode(TEXTS[5])
    assert taken[-1] == (False, True)


def test_a_crowd_lasts_as_long_as_its_calls(tiny_artifact, monkeypatch):
    monkeypatch.setattr("runtime.model.CROWDED", 60)
    embedder = Embedder(tiny_artifact, "int8", "cpu", 2)

    def slow(metric, value):
        if metric == "run_seconds":
            embedder._opened.small.add("another call")

    embedder._hook = slow
    embedder.encode(TEXTS[5])
    assert embedder._opened.crowded > time.perf_counter()


def test_bulk_work_doesnt_crowd_a_query(tiny_artifact):
    def call_again(metric, value):
        if metric == "run_seconds":
            crowd.append(len(embedder._opened.small))

    crowd = []
    embedder = Embedder(tiny_artifact, "int8", "cpu", 2, hook=call_again)
    embedder.encode(TEXTS)
    assert set(crowd) == {0}
    embedder.encode(TEXTS[5])
    assert crowd[-1] == 1


def spoil(folder):
    graph = folder / "model.int8.onnx"
    whole = bytearray(graph.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 2000] = bytes(2000)
    graph.write_bytes(whole)


@pytest.mark.parametrize("happens", [shutil.rmtree, spoil])
@pytest.mark.parametrize("verify", [True, False])
def test_a_folder_that_changed_since_is_not_opened_for_bulk_work(tiny_artifact, copied, caplog, happens, verify):
    folder = copied(tiny_artifact)
    expected = Embedder(folder, "int8", "cpu", 2).encode(TEXTS)
    embedder = Embedder(folder, "int8", "cpu", 2, verify=verify)
    happens(folder)
    for _ in range(2):
        np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
    assert sum("can't be opened a second time" in record.message for record in caplog.records) == 1


def test_bulk_work_finds_the_folder_wherever_the_process_has_gone(tiny_artifact, monkeypatch):
    monkeypatch.chdir(tiny_artifact.parent)
    embedder = Embedder(tiny_artifact.name, "int8", "cpu", 2)
    monkeypatch.chdir("/")
    embedder.encode(TEXTS)
    assert embedder._opened.narrow


def test_threads_that_start_bulk_work_at_once_get_the_same_bits(tiny_artifact):
    embedder = Embedder(tiny_artifact, "int8", "cpu", 2)
    expected = Embedder(tiny_artifact, "int8", "cpu", 1).encode(TEXTS)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: embedder.encode(TEXTS), range(16)):
            np.testing.assert_array_equal(found, expected)


def test_a_run_that_fails_is_the_calls_error_and_ends_its_threads(tiny_artifact):
    """A hook is called between runs; whatever it does, no thread is left, and the next call is right."""

    class Wanted(Exception):
        pass

    def fail(metric, value):
        if armed:
            raise Wanted

    armed = False
    embedder = Embedder(tiny_artifact, "int8", "cpu", 2, hook=fail)
    expected = embedder.encode(TEXTS)
    before = set(threading.enumerate())
    for armed in (True, False, True):
        if armed:
            with pytest.raises(Wanted):
                embedder.encode(TEXTS)
        else:
            np.testing.assert_array_equal(embedder.encode(TEXTS), expected)
    assert not {thread for thread in threading.enumerate() if thread.is_alive()} - before


def test_items_run_side_by_side_in_order_and_few_ahead_of_what_is_taken():
    together, begun = threading.Barrier(3), []

    def work(lane, item):
        begun.append(item)
        if item < 3:
            together.wait(30)  # or they would not run at once
        assert lane not in busy
        busy.add(lane)
        time.sleep(0.001)
        busy.remove(lane)
        return item * item

    busy = set()
    results = Lanes("abc").side_by_side(work, range(20))
    for taken, result in enumerate(results, 1):
        assert result == (taken - 1) ** 2
        assert len(begun) <= taken + 6
    assert sorted(begun) == list(range(20))


def test_after_an_error_what_has_not_begun_never_does():
    begun = []

    def work(lane, item):
        begun.append(item)
        if item == 2:
            raise RunError("no memory")
        return item

    with pytest.raises(RunError):
        list(Lanes("ab").side_by_side(work, range(100)))
    assert len(begun) <= 8


def test_few_items_go_to_all_sessions():
    lanes, together, used = Lanes("abab", lasting=True), threading.Barrier(2), []

    def work(lane, item):
        together.wait(30)
        used.append(lane)
        time.sleep(0.001 * item)  # so that they end in another order

    for number in range(12):
        used.clear()
        list(lanes.side_by_side(work, [number % 3, 1]))
        assert sorted(used) == ["a", "b"]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no such signals here")
@pytest.mark.parametrize("lasting", [False, True])
def test_what_is_interrupted_ends_when_nothing_of_it_runs(lasting):
    running, done = threading.Event(), []

    def work(lane, item):
        running.set()
        time.sleep(0.3)
        done.append(item)

    def interrupt():
        running.wait(30)
        time.sleep(0.05)  # so that the main thread waits, too
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    begun = threading.Thread(target=interrupt)
    begun.start()
    with pytest.raises(KeyboardInterrupt):
        list(Lanes("ab", lasting=lasting).side_by_side(work, range(20)))
    ended = len(done)
    begun.join()
    time.sleep(0.5)
    assert len(done) == ended <= 4


def test_who_takes_no_more_stops_the_work():
    done = []
    results = Lanes("ab", lasting=True).side_by_side(lambda lane, item: done.append(item), range(100))
    next(results)
    results.close()
    ended = len(done)
    time.sleep(0.05)
    assert len(done) == ended <= 4


def test_lasting_lanes_keep_their_threads_and_are_shared_by_all_work():
    lanes, busy, workers, most = Lanes("aab", lasting=True), [], set(), []

    def work(lane, item):
        workers.add(threading.current_thread())
        busy.append(lane)
        assert busy.count("a") <= 2
        assert busy.count("b") <= 1
        most.append(len(busy))
        time.sleep(0.001)
        busy.remove(lane)
        if item == 50:
            raise RunError("no memory")
        return item

    def all_of(items):
        return list(lanes.side_by_side(work, items))

    with concurrent.futures.ThreadPoolExecutor(3) as callers:
        for found in callers.map(all_of, [range(40)] * 6):
            assert found == [*range(40)]
    with pytest.raises(RunError):
        all_of(range(45, 200))
    assert not busy  # when it has ended
    assert all_of(range(10)) == [*range(10)]
    assert max(most) == len(workers) == 3
    assert all(worker.is_alive() for worker in workers)
    lanes = None
    for worker in workers:
        worker.join(30)
        assert not worker.is_alive()


def test_a_closed_embedder_ends_its_bulk_work_well(tiny_artifact):
    embedder = Embedder(tiny_artifact, "int8", "cpu", 2)
    expected = embedder.encode(TEXTS)
    vectors = embedder.encode_iter(TEXTS, chunk_size=150)
    first = next(vectors)
    embedder.close()
    np.testing.assert_array_equal(first, expected[0])
    with pytest.raises(InputError, match="is closed"):
        embedder.encode(TEXTS)


def test_the_texts_here_are_bulk_work():
    assert sum(len(text.split()) for text in TEXTS) > ENOUGH_TOKENS
