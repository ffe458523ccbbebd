"""``--min-cosine``: every verification text comes as close as asked for, with no more in fp32 than that takes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.calibrate import collect
from export.errors import ExportError
from export.graph import load_graph
from export.pipeline import export_model
from export.precision import spend_precision
from export.quantize import find_linears, quantize_graph, quantize_linears
from runtime import Embedder


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    graph = load_graph(tiny_artifact / "model.fp32.onnx")
    inputs = dict.fromkeys(linear.input for linear in find_linears(graph))
    draw = np.random.default_rng(0)
    texts = [(draw.integers(5, 900, 12).tolist(), [0] * 12) for _ in range(20)]
    return graph, quantize_linears(graph, collect(graph, list(inputs), texts))


def kept_in_fp32(graph):
    """Outputs of the linears of an int8 graph that are fp32."""
    return {linear.output for linear in find_linears(graph)}


def test_a_graph_quantises_what_is_given_and_leaves_the_rest(tiny):
    graph, quantized = tiny
    value = next(iter(quantized))
    expected = {linear.output for linear in quantized[value].linears}
    assert kept_in_fp32(quantize_graph(graph, quantized)) == set()
    assert kept_in_fp32(quantize_graph(graph, {k: v for k, v in quantized.items() if k != value})) == expected


def measured_as(tiny, errors):
    """A measure by which each group of int8 linears adds its errors, ``(groups, texts)``, and what it was asked."""
    graph, quantized = tiny
    outputs = [{linear.output for linear in given.linears} for given in quantized.values()]

    def measure(candidate, texts):
        fp32 = kept_in_fp32(candidate)
        rough = [i for i, names in enumerate(outputs) if not names <= fp32]
        return 1 - errors[rough].sum(axis=0)[list(texts)] if rough else np.ones(len(texts))

    return measure


@given(st.integers(0, 2**32), st.floats(0.5, 0.999))
@settings(deadline=None, max_examples=30)
def test_the_budget_is_met_and_nothing_is_kept_that_isnt_needed(tiny, seed, least):
    graph, quantized = tiny
    errors = np.random.default_rng(seed).gamma(0.2, 0.1, (len(quantized), 5))
    measure = measured_as(tiny, errors)
    chosen = spend_precision(graph, quantized, measure, 5, least)
    assert measure(quantize_graph(graph, chosen), range(5)).min() >= least
    for value in quantized.keys() - chosen.keys():  # any one more in int8 is one too many
        one_more = {k: v for k, v in quantized.items() if k in chosen or k == value}
        assert measure(quantize_graph(graph, one_more), range(5)).min() < least


def test_of_linears_that_help_as_much_the_smallest_stays_fp32(tiny):
    graph, quantized = tiny
    sizes = {value: sum(r.levels.size for r in g.linears.values()) for value, g in quantized.items()}
    errors = np.full((len(quantized), 3), 0.01)
    chosen = spend_precision(graph, quantized, measured_as(tiny, errors), 3, 1 - 0.01 * (len(quantized) - 1) - 1e-9)
    (kept,) = quantized.keys() - chosen.keys()
    assert sizes[kept] == min(sizes.values())


def test_a_budget_that_even_fp32_linears_miss_is_an_error(tiny):
    graph, quantized = tiny
    with pytest.raises(ExportError, match="not even with all linears in fp32; lower --min-cosine"):
        spend_precision(graph, quantized, lambda graph, texts: np.full(len(texts), 0.9), 3, 0.95)


def test_an_export_keeps_to_it_and_says_what_stayed_in_fp32(tiny_checkpoint, tiny_artifact, tmp_path):
    usual = Embedder(tiny_artifact, "fp32").manifest.variants["int8"]
    assert usual.fp32_linears == ()
    asked = 1 - (1 - usual.parity.cosine_min) / 2
    artifact = export_model(str(tiny_checkpoint), tmp_path / "out", min_cosine=asked)
    variant = artifact.manifest.variants["int8"]
    assert variant.parity.cosine_min >= asked
    assert set(variant.fp32_linears) == kept_in_fp32(load_graph(artifact.path / variant.file)) != set()
    assert f"{len(variant.fp32_linears)} linears in fp32" in (artifact.path / "README.md").read_text()


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("kind", ["cls", "m3"])
def test_a_budget_holds_for_dense_vectors_that_the_graph_pools_or_has_beside_others(
    tiny_checkpoint, tiny_m3, tmp_path, kind
):
    source, pooling = (tiny_checkpoint, "cls") if kind == "cls" else (tiny_m3.path.parent / "m3", None)
    usual = export_model(str(source), tmp_path / "usual", ["int8"], pooling=pooling).manifest.variants["int8"].parity
    asked = 1 - (1 - usual.cosine_min) / 2
    variant = export_model(
        str(source), tmp_path / "out", ["int8"], pooling=pooling, min_cosine=asked
    ).manifest.variants["int8"]
    assert variant.parity.cosine_min >= asked
    assert variant.fp32_linears


def test_a_budget_that_is_met_anyway_changes_nothing(tiny_checkpoint, tiny_artifact, tmp_path):
    artifact = export_model(str(tiny_checkpoint), tmp_path / "out", min_cosine=0.5)
    assert (artifact.path / "model.int8.onnx").read_bytes() == (tiny_artifact / "model.int8.onnx").read_bytes()


@pytest.mark.parametrize(
    ("least", "variants"), [(1.0, ["int8"]), (-1, ["int8"]), (float("nan"), ["int8"]), (0.9, ["fp32"])]
)
def test_a_budget_without_sense_is_an_error_before_any_work(tiny_checkpoint, tmp_path, least, variants):
    with pytest.raises(ExportError, match="makes no sense"):
        export_model(str(tiny_checkpoint), tmp_path / "out", variants, min_cosine=least)
    assert not (tmp_path / "out").exists()


def test_a_model_without_dense_vectors_has_no_such_budget(tiny_splade, tmp_path):
    source = str(tiny_splade.parent / "splade")
    with pytest.raises(ExportError, match="no dense vectors"):
        export_model(source, tmp_path / "out", min_cosine=0.9)
