"""Pooling and normalising do as torch does, and a row depends on nothing but itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtime.pooling import normalize, pool

MODES = ["cls", "mean", "last_token", "max"]
numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
hidden_states = st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=numbers)
)
vectors = st.tuples(st.integers(1, 6), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=numbers)
)


@pytest.mark.parametrize("how", MODES)
def test_pooling_equals_torch_text_by_text(how):
    import torch

    hidden = np.random.default_rng(0).normal(size=(5, 17, 33)).astype(np.float32)
    expected = []
    for text in torch.from_numpy(hidden):
        match how:
            case "cls":
                expected.append(text[0])
            case "last_token":
                expected.append(text[-1])
            case "max":
                expected.append(text.amax(0))
            case "mean":
                expected.append(text.mean(0))
    pooled = pool(hidden, how)
    assert pooled.dtype == np.float32
    assert pooled.shape == (5, 33)
    np.testing.assert_allclose(pooled, torch.stack(expected).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", MODES)
@given(hidden=hidden_states)
@settings(deadline=None, max_examples=40)
def test_a_pooled_row_is_the_same_to_the_bit_alone_and_among_others(how, hidden):
    together = normalize(pool(hidden, how))
    for i in range(len(hidden)):
        np.testing.assert_array_equal(normalize(pool(hidden[i : i + 1], how))[0], together[i])


@given(vectors)
@settings(deadline=None)
def test_normalize_equals_torch(rows):
    import torch

    expected = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1).numpy()
    scaled = normalize(rows)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-6)


@given(vectors, st.integers(0, 5))
@settings(deadline=None)
def test_normalized_rows_have_unit_length_and_a_zero_row_stays_zero(rows, zeroed):
    rows = np.sign(rows) * np.maximum(np.abs(rows), np.float32(1e-3))  # squares of less get lost in float32
    rows[zeroed % len(rows)] = 0
    lengths = np.linalg.norm(normalize(rows).astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, rows.any(axis=1).astype(float), atol=1e-5)


def test_normalize_leaves_its_argument_alone():
    rows = np.full((1, 4), 3, np.float32)
    assert normalize(rows).tolist() == [[0.5] * 4]
    assert (rows == 3).all()
