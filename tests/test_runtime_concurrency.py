"""Threads, event loops, queues and cancellation change no bit, lose no call, and keep nobody waiting for ever."""

import asyncio
import json
import logging
import random
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime import Embedder, InputError, Reranker
from runtime.metrics import ignore
from runtime.microbatch import QUEUED, TOGETHER, MicroBatcher

WORDS = ["river", "stone", "light", "apple", "horse", "tower", "green", "table", "music", "bread", "cloud", "window"]
TEXTS = [
    "",
    "a",
    "bread",
    "🙈 \0",
    "[SEP] [CLS]",
    *(" ".join(random.Random(n).choices(WORDS, k=n)) for n in range(1, 90)),
]
PASSAGES = TEXTS[::6]
BUSY = ["river " * 3000] * 250
"""One run, of about a second."""
DIMS = (None, 8)
SECONDS = 30
"""Longer than anything here takes; what takes longer hangs."""


@pytest.fixture(scope="module")
def prompted(tiny_artifact, tmp_path_factory):
    """The tiny artifact with prompts, so that the three ways to encode differ."""
    folder = shutil.copytree(tiny_artifact, tmp_path_factory.mktemp("prompted") / "tiny")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    manifest["prompts"] = {"query": "find: ", "passage": "text: "}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.fixture(scope="module")
def embedder(prompted):
    return Embedder(prompted, device="cpu")


@pytest.fixture(scope="module")
def reranker(tiny_reranker):
    return Reranker(tiny_reranker("bert")[0], device="cpu")


@pytest.fixture(scope="module")
def alone(embedder):
    """The vector of each text, by prompt and dimensions, each computed all by itself."""
    return {
        (prompt, text, dim): embedder.encode(prompt + text, truncate_dim=dim)
        for prompt in ("", "find: ", "text: ")
        for text in TEXTS
        for dim in DIMS
    }


@pytest.fixture(scope="module")
def scores(reranker):
    """The score of each pair, each computed all by itself."""
    return {(query, passage): reranker.compute_score((query, passage)) for query in PASSAGES for passage in PASSAGES}


def run(main):
    """Run a coroutine in a loop of its own; a hang is a failure, even one that a cancelled task can't end."""
    found = []

    def work():
        try:
            found.append((asyncio.run(main), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert found, "it hangs"
    result, error = found[0]
    if error:
        raise error
    return result


async def until(condition):
    """Wait for what is bound to become true."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


@pytest.fixture
def shared_loop():
    """A function that runs a coroutine in the one event loop of another thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield lambda main: asyncio.run_coroutine_threadsafe(main, loop).result(SECONDS)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("calls", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_sixteen_threads_of_mixed_calls_give_the_bits_of_each_text_alone(
    embedder, reranker, alone, scores, shared_loop, calls
):
    def vectors(draw):
        way, prompt = draw.choice([("encode", ""), ("encode_queries", "find: "), ("encode_corpus", "text: ")])
        texts, dim = draw.choices(TEXTS, k=draw.choice([0, 1, 1, 2, 5, 30])), draw.choice(DIMS)
        given = texts[0] if len(texts) == 1 and draw.random() < 0.5 else texts
        match draw.choice(["now", "now", "async", "stream"]):
            case "stream" if not prompt and given is texts:
                found = np.reshape(
                    list(embedder.encode_iter(iter(texts), truncate_dim=dim, chunk_size=7)), (-1, dim or 32)
                )
            case "async":
                found = shared_loop(getattr(embedder, f"a{way}")(given, truncate_dim=dim))
            case _:
                found = getattr(embedder, way)(given, truncate_dim=dim)
        expected = [alone[prompt, text, dim] for text in texts]
        np.testing.assert_array_equal(found, expected[0] if given is not texts else np.reshape(expected, found.shape))
        assert len(found) == (len(texts) if given is texts else dim or 32)

    def ranking(draw):
        query, passages = draw.choice(PASSAGES), draw.choices(PASSAGES, k=draw.choice([1, 2, 9]))
        pairs = [(query, passage) for passage in passages]
        expected = [scores[pair] for pair in pairs]
        best = sorted(enumerate(expected), key=lambda place: -place[1])
        match draw.choice(["score", "rank", "ascore", "arank"]):
            case "score":
                assert reranker.compute_score(pairs) == expected
            case "rank":
                assert reranker.rank(query, passages) == best
            case "ascore":
                assert shared_loop(reranker.acompute_score(pairs)) == expected
            case "arank":
                assert shared_loop(reranker.arank(query, passages)) == best

    def work(seed):
        draw = random.Random(seed)
        for _ in range(calls):
            draw.choice([vectors, vectors, ranking])(draw)
        return calls

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [calls] * 16


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("texts", ["a river", "", [], ["bread"], TEXTS, tuple(TEXTS * 9)], ids=lambda t: str(t)[:20])
def test_aencode_equals_encode_to_the_bit(embedder, texts, dim):
    for way in ("encode", "encode_queries", "encode_corpus"):
        found = run(getattr(embedder, f"a{way}")(texts, truncate_dim=dim))
        expected = getattr(embedder, way)(texts, truncate_dim=dim)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("normalize", [False, True])
def test_async_scores_equal_those_without_to_the_bit(reranker, normalize):
    pairs = [(query, passage) for query in PASSAGES for passage in PASSAGES]
    for some in (pairs, pairs * 3, pairs[:1], pairs[3], []):
        found = run(reranker.acompute_score(some, normalize))
        assert found == reranker.compute_score(some, normalize)
        assert isinstance(found, list) == isinstance(some, list)
    for top_k in (None, 3):
        found = run(reranker.arank("bread", PASSAGES * 30, top_k, normalize=normalize))
        assert found == reranker.rank("bread", PASSAGES * 30, top_k, normalize=normalize)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e, r: e.aencode(["a", 7]), "^text 1 is int"),
        (lambda e, r: e.aencode("a", truncate_dim=33), "^truncate_dim is 33"),
        (lambda e, r: e.aencode("a", truncate_dim=np.zeros(2)), "^truncate_dim is array"),
        (lambda e, r: e.aencode(["a", "a " * 99], truncate=False), "^text 1 has 101 tokens"),
        (lambda e, r: e.aencode_queries(["a", "\ud800"]), "^text 1 has a lone surrogate"),
        (lambda e, r: e.aencode(["a"] * 700 + ["\ud800"]), "^text 700 has a lone surrogate"),
        (lambda e, r: e.aencode(["a"] * 700 + ["a " * 99], truncate=False), "^text 700 has 101 tokens"),
        (lambda e, r: r.acompute_score([("a", "b"), ("a", 7)]), "^pair 1 is"),
        (lambda e, r: r.acompute_score([("a", "b")] * 700 + [("a", "\ud800")]), "^pair 700 has a lone surrogate"),
        (lambda e, r: r.acompute_score([("a", "b")] * 700 + [("a", "b " * 99)], truncate=False), "^pair 700 has 103"),
        (lambda e, r: r.arank("a", []), "^passages is empty"),
        (lambda e, r: r.arank("a", ["b"] * 700 + ["\ud800"]), "^pair 700 has a lone surrogate"),
    ],
)
def test_async_errors_name_the_text_as_those_without_do(embedder, reranker, call, says):
    with pytest.raises(InputError, match=says):
        run(call(embedder, reranker))


def test_a_thousand_concurrent_calls_run_together_and_give_the_bits_of_each_text_alone(prompted, alone):
    counted = []
    embedder = Embedder(prompted, device="cpu", hook=lambda *counted_: counted.append(counted_))
    texts = random.Random(0).choices(TEXTS, k=1000)

    async def main():
        return await asyncio.gather(*map(embedder.aencode, texts))

    np.testing.assert_array_equal(run(main()), [alone["", text, None] for text in texts])
    assert sum(metric == "queue_seconds" for metric, _ in counted) == 1000
    assert sum(metric == "batches" for metric, _ in counted) < 400  # lengths are many


@pytest.mark.long
def test_a_thousand_concurrent_calls_are_nearly_as_fast_as_one_of_them_all(minilm):
    """Four fifths, the best of five side by side: other processes slow either."""
    embedder = Embedder(minilm, device="cpu")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(6, 14))) for _ in range(1000)]
    embedder.encode(texts)  # bulk work's session is open

    async def main():
        await asyncio.gather(*map(embedder.aencode, texts))

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    assert any(seconds(lambda: embedder.encode(texts)) > 0.8 * seconds(lambda: run(main())) for _ in range(5))


def test_more_calls_than_the_queue_holds_all_get_their_answer(embedder, alone):
    texts = random.Random(1).choices(TEXTS, k=QUEUED * 3)

    async def main():
        return await asyncio.gather(*map(embedder.aencode, texts))

    np.testing.assert_array_equal(run(main()), [alone["", text, None] for text in texts])


class Gate:
    """A function for a MicroBatcher that waits for leave, records what it ran, and gives each item back."""

    def __init__(self):
        self.open, self.entered = threading.Event(), threading.Event()
        self.runs = []

    def __call__(self, items, first=0, **options):
        self.runs.append((list(items), options))
        self.entered.set()
        assert self.open.wait(SECONDS)
        if any(isinstance(item, str) for item in items):
            raise InputError(f"not a number: {items} from {first}")
        return np.array(items)

    async def busy(self):
        """Until a run has begun."""
        await until(self.entered.is_set)


def test_calls_beyond_the_queue_sleep_until_there_is_room():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)
    most = 0

    async def main():
        nonlocal most
        calls = [asyncio.create_task(batcher([i])) for i in range(QUEUED * 3)]
        await gate.busy()
        for _ in range(20):
            await asyncio.sleep(0)
        (queue,) = batcher._queues.values()
        most = len(queue._calls)
        gate.open.set()
        return await asyncio.gather(*calls)

    assert np.ravel(run(main())).tolist() == list(range(QUEUED * 3))
    assert QUEUED - 2 * TOGETHER <= most <= QUEUED
    assert max(len(items) for items, _ in gate.runs) == TOGETHER


def test_a_run_is_never_more_than_twice_as_full():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)
    sizes = random.Random(0).choices([1, 100, TOGETHER - 1, TOGETHER, TOGETHER + 1, 1000], k=60)

    async def main():
        calls = [asyncio.create_task(batcher([number] * size)) for number, size in enumerate(sizes)]
        await gate.busy()
        gate.open.set()
        return await asyncio.gather(*calls)

    assert [rows.tolist() for rows in run(main())] == [[number] * size for number, size in enumerate(sizes)]
    assert max(len(items) for items, _ in gate.runs) < 2 * TOGETHER
    assert len(gate.runs) < 60 + sum(sizes) / TOGETHER


def test_calls_with_different_options_never_run_together():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        calls = [asyncio.create_task(batcher([i], parity=i // 3 % 2)) for i in range(60)]
        await gate.busy()
        gate.open.set()
        return await asyncio.gather(*calls)

    assert np.ravel(run(main())).tolist() == list(range(60))
    assert all(options == {"parity": i // 3 % 2} for items, options in gate.runs for i in items)
    assert len(gate.runs) < 25


def test_a_small_call_does_not_wait_for_the_whole_of_a_large_one():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        large = asyncio.create_task(batcher([0] * TOGETHER * 20))
        await gate.busy()
        small = asyncio.create_task(batcher([1]))
        await asyncio.sleep(0)
        gate.open.set()
        assert (await small).tolist() == [1]
        assert not large.done()
        return await large

    assert run(main()).tolist() == [0] * TOGETHER * 20
    assert [1 in items for items, _ in gate.runs].index(True) <= 2


def test_a_call_cancelled_while_it_waits_is_never_run():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        calls = [asyncio.create_task(batcher([i])) for i in range(10)]
        await gate.busy()
        late = [asyncio.create_task(batcher([i])) for i in range(10, 20)]
        await asyncio.sleep(0)
        for call in late[::2]:
            call.cancel()
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(*calls, *late, return_exceptions=True)

    found = run(main())
    ran = [item for items, _ in gate.runs for item in items]
    assert sorted(ran) == [*range(10), *range(11, 20, 2)]
    assert [row if isinstance(row, asyncio.CancelledError) else row.tolist() for row in found[:10] + found[11::2]] == [
        [i] for i in ran
    ]
    assert all(isinstance(row, asyncio.CancelledError) for row in found[10::2])


def test_a_caller_cancelled_during_its_run_leaves_the_others_their_answers():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        calls = [asyncio.create_task(batcher([i])) for i in range(5)]
        await gate.busy()
        calls[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await calls[1]
        gate.open.set()
        rows = await asyncio.gather(*calls[:1], *calls[2:])
        return [*rows, await batcher([5])]

    assert np.ravel(run(main())).tolist() == [0, 2, 3, 4, 5]


def test_a_cancelled_call_that_fails_leaves_the_others_their_answers():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        wrong = asyncio.create_task(batcher(["wrong"]))
        await gate.busy()
        late = [asyncio.create_task(batcher([i])) for i in range(3)]
        await asyncio.sleep(0)
        wrong.cancel()
        gate.open.set()
        return await asyncio.gather(wrong, *late, return_exceptions=True)

    cancelled, *rows = run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert np.ravel(rows).tolist() == [0, 1, 2]


def test_cancelled_calls_do_not_pile_up_behind_a_long_run():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)
    most = 0

    async def main():
        nonlocal most
        first = asyncio.create_task(batcher([0]))
        await gate.busy()
        (queue,) = batcher._queues.values()
        for _ in range(3):
            calls = [asyncio.create_task(batcher([i])) for i in range(QUEUED - 1)]
            await asyncio.sleep(0)
            most = max(most, len(queue._calls))
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        gate.open.set()
        return await asyncio.gather(first, batcher([1]))

    assert np.ravel(run(main())).tolist() == [0, 1]
    assert QUEUED - 1 <= most <= QUEUED


def test_the_room_of_cancelled_calls_is_free_again():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        for _ in range(3):
            calls = [asyncio.create_task(batcher([i])) for i in range(QUEUED + 50)]
            await gate.busy()
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        gate.open.set()
        return await asyncio.gather(*(batcher([i]) for i in range(QUEUED)))

    assert np.ravel(run(main())).tolist() == list(range(QUEUED))


def test_a_wait_can_be_bounded(embedder):
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await embedder.aencode(BUSY)
        return await embedder.aencode("bread")

    np.testing.assert_array_equal(run(main()), embedder.encode("bread"))


@pytest.mark.parametrize(
    ("text", "dim", "says"),
    [
        ("\ud800", None, "text 0 has a lone surrogate"),
        ("a", 99, "truncate_dim is 99"),
        ("a", np.zeros(2), "truncate_dim"),
    ],
    ids=["surrogate", "dim", "array"],
)
def test_one_callers_mistake_is_nobody_elses(embedder, alone, text, dim, says):
    async def main():
        calls = [embedder.aencode(good) for good in TEXTS]
        calls.insert(30, embedder.aencode(text, truncate_dim=dim))
        return await asyncio.gather(*calls, return_exceptions=True)

    found = run(main())
    error = found.pop(30)
    assert isinstance(error, InputError) and str(error).startswith(says)
    np.testing.assert_array_equal(found, [alone["", good, None] for good in TEXTS])


def test_a_mistake_among_many_calls_takes_few_runs_to_find():
    def work(items, first):
        tried.append(len(items))
        if 77 in items:
            raise InputError("77")
        return np.array([[float(item)] for item in items])

    async def main():
        return await asyncio.gather(*(batcher([i]) for i in range(200)), return_exceptions=True)

    tried = []
    batcher = MicroBatcher(work, lambda *_: None)
    found = run(main())
    assert isinstance(found.pop(77), InputError)
    assert np.ravel(found).tolist() == [i for i in range(200) if i != 77]
    assert len(tried) < 20


def test_loops_in_several_threads_share_a_model(prompted, alone):
    """Each thread with one loop after another, from the first call on."""
    embedder = Embedder(prompted, device="cpu")

    def work(seed):
        draw = random.Random(seed)
        for _ in range(10):
            texts = draw.choices(TEXTS, k=4)

            async def main(texts=texts):
                return await asyncio.gather(*map(embedder.aencode, texts))

            np.testing.assert_array_equal(asyncio.run(main()), [alone["", text, None] for text in texts])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_loops_that_come_and_go_in_many_threads_at_once():
    batcher = MicroBatcher(lambda items, first: np.array(items), ignore)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: asyncio.run(batcher([i])), range(1000)))
    finally:
        sys.setswitchinterval(interval)
    assert np.ravel(found).tolist() == list(range(1000))


def test_one_loop_after_another_leaves_no_thread_behind(embedder):
    expected, before = embedder.encode("bread"), set(threading.enumerate())
    for _ in range(20):
        np.testing.assert_array_equal(run(embedder.aencode("bread")), expected)
    deadline = time.monotonic() + SECONDS
    while len(set(threading.enumerate()) - before) > 1:  # that of the last loop goes with the next
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_loop_that_ends_while_calls_wait_ends(embedder):
    async def main():
        calls = [asyncio.create_task(embedder.aencode(BUSY)) for _ in range(4)]
        await asyncio.sleep(0.01)
        return calls

    assert all(call.cancelled() for call in run(main()))


def test_a_call_made_while_everything_is_cancelled_is_cancelled_too():
    gate = Gate()
    batcher = MicroBatcher(gate, ignore)

    async def main():
        calls = [asyncio.create_task(batcher([i])) for i in range(3)]
        await gate.busy()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await batcher([3])  # queued before what was cancelled knows of it
        return await asyncio.gather(*calls, batcher([4]), return_exceptions=True)

    *found, after = run(main())
    assert all(isinstance(error, asyncio.CancelledError) for error in found)
    assert after.tolist() == [4]


def test_a_hook_that_raises_keeps_nobody_waiting(prompted, caplog):
    def hook(metric, value):
        raise ValueError(metric)

    embedder = Embedder(prompted, device="cpu", hook=hook)
    with pytest.raises(ValueError, match="run_seconds"):
        embedder.encode("bread")

    async def main():
        return await asyncio.gather(*map(embedder.aencode, TEXTS), return_exceptions=True)

    with caplog.at_level(logging.CRITICAL, "asyncio"):
        assert all(isinstance(error, ValueError) for error in run(main()))


def test_a_panic_is_its_callers_and_keeps_nobody_waiting():
    class Panic(BaseException):
        """As a panic of Rust code is none of Python's Exceptions."""

    def panic(items, first):
        if "panic" in items:
            raise Panic
        return np.array(items)

    batcher = MicroBatcher(panic, ignore)

    async def main():
        return await asyncio.gather(batcher([1]), batcher(["panic"]), batcher([2]), return_exceptions=True)

    one, error, two = run(main())
    assert isinstance(error, Panic)
    assert (one.tolist(), two.tolist()) == ([1], [2])


def test_closing_ends_the_threads_of_its_queues(prompted):
    embedder = Embedder(prompted, device="cpu")

    async def main():
        before = set(threading.enumerate())
        await embedder.aencode("bread")
        assert set(threading.enumerate()) - before
        embedder.close()
        await until(lambda: not set(threading.enumerate()) - before)

    run(main())


def test_closing_fails_the_calls_that_wait_and_no_others(prompted):
    embedder = Embedder(prompted, device="cpu")
    expected = embedder.encode(BUSY)

    async def main():
        running = asyncio.create_task(embedder.aencode(BUSY))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(embedder.aencode(text)) for text in TEXTS]
        await asyncio.sleep(0)
        embedder.close()
        return await asyncio.gather(running, *waiting, return_exceptions=True)

    first, *others = run(main())
    if isinstance(first, InputError):  # closed while it was still being tokenised
        others.append(first)
    else:
        np.testing.assert_array_equal(first, expected)
    assert {str(error) for error in others} == {"the embedder tiny-bert is closed; open it again"}
    assert all(isinstance(error, InputError) for error in others)


def test_after_close_every_method_says_so(prompted, tiny_reranker):
    embedder, reranker = Embedder(prompted, device="cpu"), Reranker(tiny_reranker("bert")[0], device="cpu")
    for model in (embedder, reranker):
        model.close()
        model.close()
    for call in (
        lambda: embedder.encode("a"),
        lambda: embedder.encode_queries(["a"]),
        lambda: embedder.encode_corpus(["a"]),
        lambda: embedder.encode([]),
        lambda: list(embedder.encode_iter(["a"])),
        lambda: run(embedder.aencode("a")),
        lambda: reranker.compute_score(("a", "b")),
        lambda: reranker.rank("a", ["b"]),
        lambda: run(reranker.acompute_score(("a", "b"))),
        lambda: run(reranker.arank("a", ["b"])),
    ):
        with pytest.raises(InputError, match=r"is closed; open it again$"):
            call()
    assert embedder.count_tokens("a") == 3  # needs no session


def test_a_context_manager_closes_whatever_happens(prompted, tiny_reranker):
    with Embedder(prompted, device="cpu") as embedder:
        assert embedder.encode("bread").shape == (32,)
    with pytest.raises(InputError, match="is closed"):
        embedder.encode("bread")
    with pytest.raises(KeyError), Reranker(tiny_reranker("bert")[0], device="cpu") as reranker:
        raise KeyError
    with pytest.raises(InputError, match="is closed"):
        reranker.rank("a", ["b"])


def test_closing_while_threads_encode_gives_them_their_vectors_or_an_input_error(prompted):
    embedder = Embedder(prompted, device="cpu")
    opened, stop = embedder._opened, threading.Event()

    def work():
        closed = 0
        while not stop.is_set():
            try:
                assert embedder.encode([]).shape == (0, 32)
            except InputError:
                closed += 1
        return closed

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            threads = [pool.submit(work) for _ in range(4)]
            try:
                for _ in range(3000):
                    embedder.close()
                    time.sleep(0)  # somebody else's turn
                    embedder._opened = opened
                    time.sleep(0)
            finally:
                stop.set()
            assert sum(thread.result(SECONDS) for thread in threads) > 10
    finally:
        sys.setswitchinterval(interval)


def test_the_loop_is_free_while_a_text_is_embedded(embedder):
    text = "river " * 1_000_000

    async def main():
        gaps, last = [], time.perf_counter()
        start = last
        call = asyncio.create_task(embedder.aencode(text))
        while not call.done():
            await asyncio.sleep(0.005)
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()
        return gaps, last - start, await call

    gaps, seconds, found = run(main())
    np.testing.assert_array_equal(found, embedder.encode("river " * 62))
    assert seconds > 0.5  # or the test would show nothing
    assert max(gaps) < seconds / 2
    assert len(gaps) > 20
