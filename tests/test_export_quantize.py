"""int8: every linear is found, rounded better than plainly and never to saturate, and vectors stay what they were."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import int8_of
from hypothesis import given, settings
from hypothesis import strategies as st

from export.calibrate import Kept, Sample, calibration_texts, collect
from export.encoder import EncoderConfig, build_encoder
from export.errors import ExportError
from export.graph import MICROSOFT, Graph, float_value, load_graph
from export.pipeline import export_model
from export.quantize import (
    Scheme,
    choose_scheme,
    find_linears,
    fold_smoothing,
    quantize_graph,
    quantize_linears,
    round_weights,
)

LIMIT, PAIR = 127, 128
LAYERS, HIDDEN, WORDS = 2, 32, 1200


def correlated(generator: np.random.Generator, rows: int, channels: int) -> np.ndarray:
    """Inputs as a transformer's linears see them: few directions, and some channels far larger than others."""
    mixed = generator.normal(size=(rows, channels // 4 + 1)) @ generator.normal(size=(channels // 4 + 1, channels))
    scales = np.exp(generator.normal(size=channels))
    return ((mixed + 0.1 * generator.normal(size=(rows, channels))) * scales).astype(np.float32)


def saturates(levels: np.ndarray) -> int:
    """How many pairs of products might not fit an int16, or weights a byte with its mirror image."""
    even = np.pad(levels.astype(int), ((0, len(levels) % 2), (0, 0))).reshape(-1, 2, levels.shape[1])
    highest, lowest = 255 * np.maximum(even, 0).sum(axis=1), 255 * np.minimum(even, 0).sum(axis=1)
    return int((highest > 32767).sum() + (lowest < -32768).sum() + (even < -LIMIT).sum())


seeds = st.integers(0, 2**32 - 1)


# Rounding


@settings(max_examples=30, deadline=None)
@given(seed=seeds, channels=st.integers(32, 200), outputs=st.integers(8, 24))  # of a few weights none may differ
def test_rounded_weights_keep_to_the_limits_and_beat_plain_rounding(seed, channels, outputs):
    generator = np.random.default_rng(seed)
    inputs = correlated(generator, 2 * channels, channels)
    matrix = generator.normal(size=(channels, outputs)).astype(np.float32)
    levels, scale = round_weights(matrix, inputs)
    assert (levels.dtype, levels.shape, scale.dtype, scale.shape) == (np.int8, matrix.shape, np.float32, (outputs,))
    assert saturates(levels) == 0

    def error(rounded):
        return np.square(inputs @ rounded - inputs @ matrix).sum()

    assert error(levels * scale) < error(np.rint(matrix / scale) * scale)
    plainly = np.maximum(np.abs(matrix).max(axis=0), 1e-12) / 63
    assert (scale <= plainly * 1.0001).all()
    assert scale.mean() < 0.95 * plainly.mean()


@settings(max_examples=30, deadline=None)
@given(seed=seeds, channels=st.integers(1, 150), outputs=st.integers(1, 8), rows=st.integers(1, 40))
def test_weights_that_are_representable_stay_as_they_are(seed, channels, outputs, rows):
    generator = np.random.default_rng(seed)
    levels = generator.integers(-PAIR // 2, PAIR // 2, (channels, outputs), endpoint=True)
    first = generator.integers(channels) // 2 * 2  # of a pair that is at its limit, or alone at the end
    levels[first : first + 2] = PAIR // 2 if first + 1 < channels else LIMIT
    scale = np.exp2(generator.integers(-8, 3, outputs)).astype(np.float32)
    rounded, scales = round_weights((levels * scale).astype(np.float32), correlated(generator, rows, channels))
    np.testing.assert_array_equal(rounded, levels)
    np.testing.assert_allclose(scales, scale, rtol=1e-6)


def test_products_of_extreme_inputs_and_rounded_weights_are_exact_on_this_machine(graph, tmp_path):
    """It adds neighbours' products in 16 bits unless it has VNNI: other pairs than ours would show."""
    generator = np.random.default_rng(0)
    levels, _ = round_weights(np.sign(normal(384, 64)) * 100 + normal(384, 64), normal(500, 384, seed=1))
    assert np.abs(levels.astype(int)).max() > 63
    weights = [graph.weight("levels", levels), "one", graph.weight("scales", np.ones(64, np.float32))]
    graph.weight("one", np.array(1, np.float32))
    graph.inputs[0] = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["rows", 384])
    graph.add("MatMulIntegerToFloat", "x", *weights, name="y", domain=MICROSOFT)
    rows = np.where(generator.random((200, 384)) < 0.8, 255, 0).astype(np.uint8)
    rows[:64] = np.where(levels.T > 0, 255, 0)
    rows[64:128] = np.where(levels.T < 0, 255, 0)
    np.testing.assert_array_equal(run(graph, tmp_path, x=rows), rows.astype(int) @ levels.astype(int))


@pytest.mark.parametrize("inputs", [np.zeros((5, 8)), np.eye(5, 8), np.full((5, 8), 1e4), np.full((1, 8), 1e-6)])
@pytest.mark.parametrize("matrix", [np.zeros((8, 3)), np.ones((8, 3)), np.eye(8, 3) * 1e-20])
def test_degenerate_weights_and_inputs_round_to_something_finite(matrix, inputs):
    levels, scale = round_weights(matrix.astype(np.float32), inputs.astype(np.float32))
    assert saturates(levels) == 0
    assert np.isfinite(scale).all()
    if not matrix.any():
        assert not levels.any()


# Choosing how to quantise an input


@settings(max_examples=25, deadline=None)
@given(seed=seeds, channels=st.integers(2, 40), shift=st.sampled_from([-100.0, 0.0, 100.0]))
def test_a_scheme_keeps_zero_exact_and_its_zero_point_in_a_byte(seed, channels, shift):
    generator = np.random.default_rng(seed)
    rows = correlated(generator, 50, channels) + np.float32(shift)
    matrix = generator.normal(size=(channels, 5)).astype(np.float32)
    scheme = choose_scheme(Sample(np.abs(rows).max(axis=0), rows), matrix)
    assert 0 <= scheme.zero_point <= 255
    assert scheme.scale > 0
    assert not scheme.apply(np.zeros((1, channels), np.float32)).any()


def test_outlier_channels_are_smoothed_and_tame_ones_left_alone():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(400, 32)).astype(np.float32)
    matrix = generator.normal(size=(32, 16)).astype(np.float32)
    tame = choose_scheme(Sample(np.abs(rows).max(axis=0), rows), matrix)
    rows[:, 3] *= 60
    matrix[3] /= 60
    wild = choose_scheme(Sample(np.abs(rows).max(axis=0), rows), matrix)
    assert wild.smooth is not None
    assert wild.smooth.argmax() == 3
    assert tame.smooth is None or np.ptp(np.log(tame.smooth)) < np.ptp(np.log(wild.smooth)) / 4
    plain = Scheme(None, float(np.ptp(rows)) / 255, round(-rows.min() / np.ptp(rows) * 255))

    def error(scheme):
        seen = scheme.apply(rows) * (1 if scheme.smooth is None else scheme.smooth)
        return np.square((seen - rows) @ matrix).sum()

    assert error(wild) < error(plain) / 10


# Finding linears


def run(graph: Graph, folder, **feeds) -> np.ndarray:
    """The first output of a graph, in the real runtime."""
    path = folder / "run.onnx"
    graph.save(path)
    onnx.checker.check_model(str(path))
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def graph():
    """An empty graph from x to y, both (rows, 16)."""
    return Graph([float_value("x", "rows", 16)], [float_value("y", "rows", 16)])


def quantized(graph: Graph, folder, rows: np.ndarray) -> tuple[Graph, float]:
    """The int8 graph calibrated on rows, and its relative error on them."""
    values = dict.fromkeys(linear.input for linear in find_linears(graph))
    samples = {}
    for value in values:
        probe = Graph(graph.inputs, [float_value(value, "rows", 16)], graph.nodes, graph.weights, graph.opsets)
        held = rows if value == "x" else run(probe, folder, x=rows)
        samples[value] = Sample(np.abs(held).max(axis=0), held)
    int8 = quantize_graph(graph, quantize_linears(graph, samples))
    expected = run(graph, folder, x=rows)
    return int8, float(np.linalg.norm(run(int8, folder, x=rows) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("flipped", [False, True])
def test_a_matmul_takes_the_constant_vector_added_to_it_as_bias(graph, flipped, tmp_path):
    product = graph.add("MatMul", "x", graph.weight("w", normal(16, 16)))
    bias = graph.weight("b", normal(16, seed=1))
    graph.add("Add", *((bias, product) if flipped else (product, bias)), name="y")
    (linear,) = find_linears(graph)
    assert (linear.bias, linear.input, linear.output, len(linear.nodes)) == ("b", "x", "y", 2)
    int8, error = quantized(graph, tmp_path, normal(300, 16, seed=2))
    assert [node.op_type for node in int8.nodes if node.op_type in ("MatMul", "Add")] == []
    assert error < 0.02


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_read_the_way_its_weights_lie(graph, transposed, tmp_path):
    graph.add("Gemm", "x", graph.weight("w", normal(16, 16)), name="y", transB=transposed)
    (linear,) = find_linears(graph)
    np.testing.assert_array_equal(linear.matrix(graph), normal(16, 16).T if transposed else normal(16, 16))
    assert quantized(graph, tmp_path, normal(300, 16, seed=2))[1] < 0.02


def test_a_sum_that_others_or_no_constant_share_is_no_bias(graph):
    first = graph.add("MatMul", "x", graph.weight("w", normal(16, 16)))
    graph.add("Add", first, "x")
    second = graph.add("MatMul", "x", "w")
    bias = graph.weight("b", normal(16))
    graph.add("Add", second, bias)
    graph.add("Mul", second, bias, name="y")
    assert [linear.bias for linear in find_linears(graph)] == [None, None]


def test_products_of_two_activations_and_stacked_weights_are_no_linears(graph):
    graph.add("MatMul", "x", "x")
    graph.add("MatMul", "x", graph.weight("stacked", normal(2, 16, 16)), name="y")
    assert find_linears(graph) == []


def test_linears_that_share_their_weights_are_each_quantised_for_their_own_input(graph, tmp_path):
    weight = graph.weight("w", normal(16, 16))
    hidden = graph.add("Mul", graph.add("MatMul", "x", weight), graph.weight("wild", np.exp(normal(16, seed=3) * 3)))
    graph.add("MatMul", hidden, weight, name="y")
    assert len(find_linears(graph)) == 2
    assert quantized(graph, tmp_path, normal(300, 16, seed=2))[1] < 0.05


def test_weights_behind_an_identity_are_weights(graph, tmp_path):  # so are the layers that ALBERT shares traced
    weight = graph.weight("w", normal(16, 16))
    hidden = graph.add("MatMul", "x", weight)
    graph.add("MatMul", hidden, graph.add("Identity", weight), name="y")
    graph.save(tmp_path / "model.onnx")
    assert len(find_linears(load_graph(tmp_path / "model.onnx"))) == 2


def test_linears_with_one_input_may_add_their_biases_in_any_order(graph, tmp_path):
    products = [graph.add("MatMul", "x", graph.weight(f"w{i}", normal(16, 16, seed=i))) for i in range(2)]
    sums = [graph.add("Add", products[i], graph.weight(f"b{i}", normal(16, seed=5 + i))) for i in (1, 0)]
    graph.add("Sub", *sums, name="y")
    int8, error = quantized(graph, tmp_path, normal(300, 16, seed=2))
    assert sum(node.op_type == "QuantizeLinear" for node in int8.nodes) == 1
    assert error < 0.02


def test_the_average_shift_of_rounding_is_taken_back(graph, tmp_path):
    graph.add("Gemm", "x", graph.weight("w", normal(16, 16)), graph.weight("b", normal(16, seed=1)), name="y")
    rows = correlated(np.random.default_rng(3), 300, 16) + np.float32(2)
    int8, _ = quantized(graph, tmp_path, rows)
    expected = run(graph, tmp_path, x=rows)
    shift = (run(int8, tmp_path, x=rows) - expected).mean(axis=0)
    assert np.abs(shift).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_norm_gives_to_int8_linears_alone_is_smoothed_by_its_own_weights(graph, elsewhere, tmp_path):
    wild = np.exp(normal(16, seed=3) * 3)
    parts = [graph.weight("wild", wild), graph.weight("b", normal(16, seed=4) * wild)]
    normed = graph.add("LayerNormalization", "x", *parts, axis=-1)
    linears = [graph.weight(f"w{i}", normal(16, 16, seed=i) / wild[:, None]) for i in (0, 1)]
    difference = graph.add("Sub", *(graph.add("Gemm", normed, weight) for weight in linears))
    graph.add("Sum", difference, normed if elsewhere else difference, name="y")
    int8, error = quantized(graph, tmp_path, normal(300, 16, seed=2))
    smoothed = [node.op_type for node in int8.nodes if normed in node.input]
    assert smoothed == (["Mul", "Sum"] if elsewhere else ["QuantizeLinear"])
    assert error < 0.03
    np.testing.assert_array_equal(graph.weights["wild"](), wild)  # which another norm may share


# A whole encoder


def shape_of(name: str) -> tuple[int, ...]:
    """The shape of an encoder's weight by our name."""
    part = name.split(".")[-2:] if name.startswith("layer") else [name.split(".")[1], name.split(".")[-1]]
    tables = {"word": (WORDS, HIDDEN), "position": (40, HIDDEN), "token_type": (2, HIDDEN)}
    wide = {
        ("up", "weight"): (2 * HIDDEN, HIDDEN),
        ("down", "weight"): (HIDDEN, 2 * HIDDEN),
        ("up", "bias"): (2 * HIDDEN,),
    }
    square = (HIDDEN, HIDDEN) if part[1] == "weight" and "norm" not in part[0] else (HIDDEN,)
    return tables.get(part[0]) or wide.get(tuple(part)) or square


def weight(name: str):
    """Loader of a random weight; norms are around one."""
    value = normal(*shape_of(name), seed=sum(name.encode())) * np.float32(0.3)
    return lambda: value + np.float32("norm.weight" in name)


@pytest.fixture(scope="module")
def encoder() -> Graph:
    """A random fp32 encoder."""
    config = EncoderConfig(
        layers=LAYERS,
        hidden=HIDDEN,
        heads=4,
        intermediate=2 * HIDDEN,
        vocab=WORDS,
        positions=40,
        token_types=2,
        activation="gelu",
        norm_eps=1e-12,
    )
    return build_encoder(config, weight)


def texts(seed: int) -> list[list[int]]:
    """Token ids of twenty texts."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, WORDS, generator.integers(1, 41)).tolist() for _ in range(20)]


def typed(ids: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Token ids with a token type of 0 each."""
    return [(row, [0] * len(row)) for row in ids]


@pytest.fixture(scope="module")
def int8(encoder) -> Graph:
    """The same in int8."""
    return int8_of(encoder, typed(texts(0)))


def test_no_float_linear_is_left_and_no_float_weight_either(encoder, int8):
    assert len(find_linears(encoder)) == 6 * LAYERS
    assert find_linears(int8) == []
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in int8.nodes) == 6 * LAYERS
    assert not {linear.weight for linear in find_linears(encoder)} & int8.weights.keys()


def test_the_word_table_is_int8_and_the_positions_stay_float(int8):
    tables = {
        name: load() for name, load in int8.weights.items() if name.startswith("embeddings.") and load().ndim == 2
    }
    assert {name: table.dtype for name, table in tables.items()} == {
        "embeddings.word.int8": np.int8,
        "embeddings.word.scale": np.float32,
        "embeddings.position": np.float32,
    }
    restored = tables["embeddings.word.int8"] * tables["embeddings.word.scale"]
    word = weight("embeddings.word")()
    assert (np.abs(restored - word) <= np.abs(word).max(axis=1, keepdims=True) / 127 / 2 * 1.001).all()


def test_pairs_of_products_never_saturate_16_bits(int8, tiny_artifact):
    for graph in (int8, load_graph(tiny_artifact / "model.int8.onnx")):
        weights = [graph.weights[n.input[1]]() for n in graph.nodes if n.op_type == "MatMulIntegerToFloat"]
        assert len(weights) == 12
        assert all(levels.dtype == np.int8 for levels in weights)
        assert all(saturates(levels) == 0 for levels in weights)
        assert max(np.abs(levels.astype(int)).max() for levels in weights) > 63  # 7 bits, which could never


def test_what_attention_gives_is_smoothed_where_its_values_are_made(encoder, tmp_path):
    inputs = dict.fromkeys(linear.input for linear in find_linears(encoder))
    quantized = quantize_linears(encoder, collect(encoder, list(inputs), typed(texts(0))))
    attended = [node.input[0] for node in encoder.nodes if node.name.endswith(".attention")]
    smooth = np.exp(normal(HIDDEN, seed=5))
    for value in attended:  # as if it had to be
        given = quantized[value]
        quantized[value] = dataclasses.replace(given, scheme=dataclasses.replace(given.scheme, smooth=smooth))
    folded = fold_smoothing(encoder, quantized)
    assert [
        value for value in quantized if folded[value].scheme.smooth is not quantized[value].scheme.smooth
    ] == attended
    values = {linear.output: rounded for given in folded.values() for linear, rounded in given.linears.items()}
    before = {linear.output: rounded for given in quantized.values() for linear, rounded in given.linears.items()}
    assert {name for name in values if values[name] is not before[name]} == {f"layer.{i}.value" for i in range(LAYERS)}
    for i in range(LAYERS):
        for part in ("scale", "bias"):
            was, now = (getattr(found[f"layer.{i}.value"], part) for found in (before, values))
            np.testing.assert_allclose(now * smooth, was, rtol=1e-5)
    kept = fold_smoothing(encoder, {value: quantized[value] for value in attended})  # the values' linears stay fp32
    assert all(kept[value] is quantized[value] for value in attended)


def test_an_activation_that_int8_follows_is_the_cheaper_one(encoder, int8):
    gelus = [[node.op_type for node in graph.nodes].count("Gelu") for graph in (encoder, int8)]
    assert gelus == [LAYERS, 0]
    inputs = list(dict.fromkeys(linear.input for linear in find_linears(encoder)))[:-1]  # the last follows a Gelu
    partly = quantize_graph(encoder, quantize_linears(encoder, collect(encoder, inputs, typed(texts(0)))))
    assert [node.op_type for node in partly.nodes if "Gelu" in node.op_type] == ["FastGelu"] * (LAYERS - 1) + ["Gelu"]


def test_int8_lays_tokens_in_no_row_and_has_the_bits_that_it_had(encoder, int8, monkeypatch, tmp_path):
    """Of reshapes there is the one that gives the hidden states, and one in each branch for short texts."""
    monkeypatch.setattr("export.quantize.unfold_rows", lambda graph: graph)
    folded = int8_of(encoder, typed(texts(0)))
    counts = [sum(node.op_type == "Reshape" for node in graph.nodes) for graph in (int8, folded)]
    assert counts == [1, 2 + 4 * LAYERS]
    for count, tokens in ((1, 1), (3, 5), (2, 40)):
        ids = np.random.default_rng(tokens).integers(0, WORDS, (count, tokens))
        np.testing.assert_array_equal(*(run(graph, tmp_path, input_ids=ids) for graph in (int8, folded)))


def test_tokens_stay_in_one_row_where_a_linear_in_fp32_needs_it(encoder, tmp_path):
    inputs = list(dict.fromkeys(linear.input for linear in find_linears(encoder)))[1:]
    partly = quantize_graph(encoder, quantize_linears(encoder, collect(encoder, inputs, typed(texts(0)))))
    assert sum(node.op_type == "Reshape" for node in partly.nodes) == 2 + 4 * LAYERS
    ids = np.array([texts(1)[0]], np.int64)
    a, b = (run(graph, tmp_path, input_ids=ids).ravel() for graph in (encoder, partly))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


def test_scales_are_fixed_numbers_not_computed_from_the_input(int8):
    assert not {node.op_type for node in int8.nodes} & {
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
    }
    for node in int8.nodes:
        if node.op_type in ("QuantizeLinear", "MatMulIntegerToFloat"):
            assert set(node.input[1:]) <= int8.weights.keys()
    assert int8.opsets[MICROSOFT] == 1


def test_unseen_texts_keep_their_hidden_states(encoder, int8, tmp_path):
    for ids in texts(1):
        feed = np.array([ids], np.int64)
        a, b = (run(graph, tmp_path, input_ids=feed).ravel() for graph in (encoder, int8))
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.995


def test_the_int8_file_is_less_than_half_of_the_fp32_one(encoder, int8, tmp_path):
    encoder.save(tmp_path / "fp32.onnx")
    int8.save(tmp_path / "int8.onnx")
    assert (tmp_path / "int8.onnx").stat().st_size < 0.45 * (tmp_path / "fp32.onnx").stat().st_size


@pytest.mark.usefixtures("few_texts")
def test_a_second_export_gives_the_same_int8_file_to_the_bit(tiny_checkpoint, tiny_artifact, tmp_path):
    again = export_model(str(tiny_checkpoint), tmp_path / "again", ["int8"]).path
    assert (again / "model.int8.onnx").read_bytes() == (tiny_artifact / "model.int8.onnx").read_bytes()


# Calibration


def test_what_is_collected_are_the_extremes_of_all_tokens_and_a_sample_of_them(encoder, tmp_path):
    value, ids = "layer.0.up", texts(2)
    probe = Graph(encoder.inputs, [float_value(value, "n", 2 * HIDDEN)], encoder.nodes, encoder.weights, encoder.opsets)
    held = np.concatenate([run(probe, tmp_path, input_ids=np.array([row], np.int64)) for row in ids])
    sample = collect(encoder, [value], typed(ids))[value]
    np.testing.assert_allclose(sample.absmax, np.abs(held).max(axis=0), rtol=1e-4)
    assert len(sample.rows) == len(held) < 1024  # so few tokens are all kept
    again = collect(encoder, [value], typed(ids))[value]
    np.testing.assert_array_equal(again.rows, sample.rows)


@pytest.mark.parametrize("most", [1, 3, 8, 9])
def test_of_many_texts_only_the_most_extreme_have_their_extreme_token_kept(monkeypatch, most):
    monkeypatch.setattr("export.calibrate.EXTREMES", most)
    peaks, kept = [5, 9, 2, 7, 30, 7, 1, 8], Kept()
    for number, peak in enumerate(peaks):  # the first token is drawn, of odd texts alone
        drawn = np.array([True, False][number % 2 == 0 :])
        rows = np.array([[0.5], [peak]], np.float32)[-len(drawn) :]
        kept.add(number, np.array([peak], np.float32), rows, drawn)
    extreme = sorted(peaks, reverse=True)[:most]
    held = np.concatenate(list(kept.rows.values()))[:, 0].tolist()
    assert sorted(held, reverse=True) == [*extreme, 0.5, 0.5, 0.5, 0.5]
    assert kept.absmax.tolist() == [30]
    assert len(kept.rows) <= most + 4  # nothing is left of other texts


def test_calibration_texts_are_the_lines_of_a_file(tmp_path):
    (tmp_path / "texts").write_text("one\n\n  \ntwo 二\n", "utf-8")
    assert calibration_texts(tmp_path / "texts") == ["one", "two 二"]
    assert len(calibration_texts()) > 100


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe\xff"])
def test_a_calibration_file_without_texts_is_a_clean_error(tmp_path, content):
    path = tmp_path / "texts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=f"{path}: .*pass a UTF-8 file with one text a line"):
        calibration_texts(path)
