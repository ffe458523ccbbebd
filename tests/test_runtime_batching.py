"""Every text runs once, only with texts of its own length, and never too many tokens at a time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batching import plan_batches

lengths = st.lists(st.integers(0, 60), max_size=80)
bounds = st.integers(1, 200)


@given(lengths, bounds)
@settings(deadline=None)
def test_batches_partition_the_texts(lengths, bound):
    batches = plan_batches(lengths, bound)
    assert all(batch.size for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


@given(lengths, bounds)
@settings(deadline=None)
def test_a_batch_has_one_length_and_keeps_to_the_bound_unless_it_is_a_single_text(lengths, bound):
    for batch in plan_batches(lengths, bound):
        assert len({lengths[i] for i in batch}) == 1
        assert batch.size == 1 or sum(lengths[i] for i in batch) <= bound


@given(lengths, bounds)
@settings(deadline=None)
def test_batches_go_from_long_to_short_and_keep_the_order_of_equals(lengths, bound):
    order = [int(i) for batch in plan_batches(lengths, bound) for i in batch]
    assert order == sorted(range(len(lengths)), key=lambda i: -lengths[i])


@given(lengths, bounds)
@settings(deadline=None)
def test_no_two_batches_of_a_length_would_fit_into_one(lengths, bound):
    sizes: dict[int, list[int]] = {}
    for batch in plan_batches(lengths, bound):
        sizes.setdefault(lengths[batch[0]], []).append(batch.size)
    for length, runs in sizes.items():
        full = max(1, bound // max(1, length))
        assert runs == [full] * (sum(runs) // full) + [sum(runs) % full] * (sum(runs) % full > 0)


def test_no_texts_make_no_batches():
    assert plan_batches([], 8192) == []


def test_a_text_over_the_bound_runs_alone():
    batches = plan_batches([9, 2, 9, 2], 8)
    assert [batch.tolist() for batch in batches] == [[0], [2], [1, 3]]


def test_a_batch_can_index_an_array():
    array = np.arange(3.0)
    (batch,) = plan_batches([5, 5, 5], 15)
    array[batch] = [7, 8, 9]
    assert array.tolist() == [7, 8, 9]
