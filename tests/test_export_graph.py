"""The graphs that are built: valid, of the operators that are fast, true to transformers, and written in a stream."""

import errno
import hashlib
import itertools
import json
import shutil
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import reseal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.families import find_family
from export.graph import PAGE, Graph, _initializer, float_value, load_graph
from export.pipeline import export_model
from runtime import ArtifactError, Embedder, Reranker
from runtime.manifest import File, load_manifest


@pytest.fixture(scope="module")
def fp32(tiny_artifact):
    """The tiny BERT's fp32 file."""
    return tiny_artifact / "model.fp32.onnx"


@pytest.fixture(scope="module")
def session(fp32):
    return onnxruntime.InferenceSession(fp32, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_file_is_valid_onnx(tiny_artifact, variant):
    onnx.checker.check_model(str(tiny_artifact / f"model.{variant}.onnx"))


def test_a_layer_is_six_gemms_one_attention_and_two_norms(fp32):
    ops = Counter(node.op_type for node in load_graph(fp32).nodes)
    layers = 2
    assert ops["Gemm"] == 6 * layers
    assert ops["MultiHeadAttention"] == layers
    assert ops["LayerNormalization"] == 2 * layers + 1
    assert not ops.keys() & {"MatMul", "SkipLayerNormalization", "Transpose", "Softmax", "Where"}


def test_attention_takes_no_mask_and_no_text_is_told_apart_by_types(fp32):
    graph = load_graph(fp32)
    assert [entry.name for entry in graph.inputs] == ["input_ids"]
    assert all(len(node.input) == 3 for node in graph.nodes if node.op_type == "MultiHeadAttention")


def test_every_value_that_a_node_reads_exists_before_it(fp32):
    graph = load_graph(fp32)
    known = {entry.name for entry in graph.inputs} | graph.weights.keys()
    for node in graph.nodes:
        assert set(node.input) <= known
        assert not set(node.output) & known
        known |= set(node.output)
    assert {entry.name for entry in graph.outputs} <= known
    assert graph.weights.keys() == {value for node in graph.nodes for value in node.input} & graph.weights.keys()


@pytest.fixture(scope="module")
def original(tiny_checkpoint):
    """transformers' own model."""
    import transformers

    return transformers.AutoModel.from_pretrained(tiny_checkpoint).eval()


@settings(max_examples=25, deadline=None)
@given(ids=arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 64)), elements=st.integers(0, 999)))
def test_the_graph_gives_the_hidden_states_of_transformers(session, original, ids):
    import torch

    with torch.inference_mode():
        expected = original(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(session.run(None, {"input_ids": ids})[0], expected, atol=2e-5)


tensors = st.sampled_from([np.float32, np.int64, np.uint8, np.int8, np.float16]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@settings(deadline=None)
@given(values=st.lists(tensors, max_size=5))
def test_saved_weights_are_read_back_to_the_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    graph = Graph(outputs=[float_value("y")])
    for i, value in enumerate(values):
        graph.weight(f"w{i}", value.T)  # not contiguous
    graph.save(path)
    read = load_graph(path)
    assert (list(read.weights), read.opsets) == (list(graph.weights), graph.opsets)
    for value, load in zip(values, read.weights.values(), strict=True):
        assert load().dtype == value.dtype
        np.testing.assert_array_equal(load(), value.T)


def test_saving_holds_one_weight_at_a_time(tmp_path):
    alive, most, reads = 0, 0, Counter()
    graph = Graph(outputs=[float_value("y", 4)])

    def released():
        nonlocal alive
        alive -= 1

    def load(name):
        nonlocal alive, most
        alive, reads[name] = alive + 1, reads[name] + 1
        most = max(most, alive)
        value = np.full(1000, 7, np.float32)
        weakref.finalize(value, released)
        return value

    for i in range(5):
        graph.weight(f"w{i}", lambda name=f"w{i}": load(name))
    graph.save(tmp_path / "model.onnx")
    assert most == 1
    assert max(reads.values()) <= 2  # once for its size


def test_a_graph_survives_being_saved_again(fp32, session, tmp_path):
    load_graph(fp32).save(tmp_path / "again.onnx")
    again = onnxruntime.InferenceSession(tmp_path / "again.onnx", providers=["CPUExecutionProvider"])
    ids = {"input_ids": np.arange(20, dtype=np.int64).reshape(2, 10)}
    np.testing.assert_array_equal(again.run(None, ids)[0], session.run(None, ids)[0])


@pytest.mark.parametrize("model_type", ["", "gpt-9", "os", "bert.config", "../bert", "a b"])
def test_an_unknown_model_type_has_no_family(model_type):
    assert find_family(model_type) is None


@pytest.mark.parametrize(
    "setting", [{"position_embedding_type": "relative_key"}, {"is_decoder": True}, {"hidden_act": "silu"}]
)
def test_what_the_bert_family_cant_express_is_left_to_tracing(tiny_checkpoint, setting):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    assert find_family("bert").config(config)
    assert find_family("bert").config(config | setting) is None


@pytest.fixture(scope="module")
def apart(tiny_checkpoint, tmp_path_factory):
    """The tiny BERT's artifact as that of a model past protobuf's limit: its weights in files of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.graph.PROTOBUF_LIMIT", 1000)
        return export_model(str(tiny_checkpoint), tmp_path_factory.mktemp("apart") / "out").path


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_model_past_the_limit_gives_the_same_vectors_to_the_bit(apart, tiny_artifact, variant):
    texts = ["a river of light", "", "bread " * 99, "bread"]
    expected = Embedder(tiny_artifact, variant, device="cpu").encode(texts)
    np.testing.assert_array_equal(Embedder(apart, variant, device="cpu").encode(texts), expected)


def test_the_files_of_the_weights_are_in_the_manifest_and_nothing_else_is_left(apart):
    manifest = load_manifest(apart)
    data = {f"model.{variant}.onnx.data" for variant in ("fp32", "int8")}
    assert {variant.data for variant in manifest.variants.values()} == data
    assert {path.name for path in apart.iterdir()} == {"README.md", "manifest.json", *manifest.files}
    for name in data:
        content = (apart / name).read_bytes()
        assert manifest.files[name] == File(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        assert len(content) > PAGE
    card = (apart / "README.md").read_text("utf-8")
    assert f"| fp32 | {manifest.files['model.fp32.onnx.data'].size / 1e6:.1f} MB |" in card


def test_only_large_weights_lie_apart_each_at_the_start_of_a_page(apart):
    model = onnx.load(apart / "model.fp32.onnx", load_external_data=False)
    size, places = (apart / "model.fp32.onnx.data").stat().st_size, []
    for tensor in model.graph.initializer:
        nbytes = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        assert (tensor.data_location == onnx.TensorProto.EXTERNAL) == (nbytes >= PAGE)
        if nbytes >= PAGE:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert (place["location"], int(place["length"])) == ("model.fp32.onnx.data", nbytes)
            places.append((int(place["offset"]), int(place["offset"]) + nbytes))
    assert places and all(start % PAGE == 0 for start, _ in places)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(sorted(places)))
    assert max(end for _, end in places) == size


def test_an_artifact_without_large_weights_has_no_file_of_them(tiny_artifact):
    assert {variant.data for variant in load_manifest(tiny_artifact).variants.values()} == {None}
    assert not list(tiny_artifact.glob("*.data"))


@pytest.mark.parametrize("over", [False, True])
def test_weights_lie_apart_from_the_limit_on_and_are_read_back(tmp_path, monkeypatch, over):
    values = {f"w{i}": np.random.default_rng(i).random((40 + i, 50)).astype(np.float32) for i in range(3)}
    values |= {"small": np.arange(5), "transposed": values["w2"].T, "bytes": np.ones(PAGE + 1, np.uint8)}
    graph = Graph(outputs=[float_value("y")])
    for name, value in values.items():
        graph.weight(name, value)
    monkeypatch.setattr("export.graph.PROTOBUF_LIMIT", sum(value.nbytes for value in values.values()) - over)
    data = graph.save(tmp_path / "model.onnx")
    assert data == (tmp_path / "model.onnx.data" if over else None)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.onnx", *([data] if data else [])]
    read = load_graph(tmp_path / "model.onnx")
    assert read.weights.keys() == values.keys()
    for name, value in values.items():
        assert read.weights[name]().dtype == value.dtype
        np.testing.assert_array_equal(read.weights[name](), value)


def test_a_reranker_past_the_limit_scores_the_same(tiny_reranker, tmp_path, monkeypatch, few_texts):
    artifact, checkpoint = tiny_reranker("bert")
    monkeypatch.setattr("export.graph.PROTOBUF_LIMIT", 1000)
    apart = export_model(str(checkpoint), tmp_path / "out", ["fp32"]).path
    pairs = [("a query", "a passage"), ("bread", "a river of light")]
    assert Reranker(apart, "fp32").compute_score(pairs) == Reranker(artifact, "fp32").compute_score(pairs)


def test_an_exported_model_past_the_limit_can_be_moved(apart, copied):
    moved = copied(apart)
    np.testing.assert_array_equal(Embedder(moved, "fp32").encode("a"), Embedder(apart, "fp32").encode("a"))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (flip_a_byte, "SHA-256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes where the manifest says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes where the manifest says"),
        (lambda path: path.write_bytes(b""), "0 bytes where the manifest says"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["altered", "truncated", "grown", "emptied", "missing"],
)
def test_weights_that_are_not_as_exported_are_never_loaded(apart, copied, variant, spoil, says):
    folder = copied(apart)
    path = folder / f"model.{variant}.onnx.data"
    spoil(path)
    with pytest.raises(ArtifactError, match=says) as caught:
        Embedder(folder, variant, device="cpu")
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "a/b", "", "C:x"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_manifest_whose_weights_lie_elsewhere_is_refused(apart, edited, name, listed):
    def change(data):
        data["variants"]["fp32"]["data"] = name
        if listed:
            data["files"][name] = data["files"]["model.fp32.onnx.data"]

    with pytest.raises(ArtifactError, match="is not a plain file name"):
        Embedder(edited(apart, change), "fp32")


def test_weights_without_a_checksum_are_refused(apart, edited):
    with pytest.raises(ArtifactError, match="model.fp32.onnx.data has no checksum"):
        Embedder(edited(apart, lambda data: data["files"].pop("model.fp32.onnx.data")), "fp32")


@pytest.mark.parametrize("spot", ["beside", "absolute", "missing"])
def test_a_graph_whose_weights_lie_outside_its_folder_is_refused(apart, copied, spot):
    """Even one whose checksum is right, as of an artifact that was made to read other files."""
    folder = copied(apart)
    outside = Path(shutil.copy(folder / "model.fp32.onnx.data", folder.parent / "outside.data"))
    location = {"beside": "../outside.data", "absolute": str(outside), "missing": "nothing.data"}[spot]
    model = onnx.load(folder / "model.fp32.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.fp32.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="can't load it") as caught:
        Embedder(reseal(folder), "fp32")
    assert str(caught.value).startswith(f"{folder / 'model.fp32.onnx'}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.float16])
def test_a_full_disk_is_known_as_such_when_a_large_weight_is_written(dtype):
    with Path("/dev/full").open("wb", 0) as apart, pytest.raises(OSError, match="No space left") as caught:
        _initializer("w", np.zeros((100, 100), dtype), apart)
    assert caught.value.errno == errno.ENOSPC
