"""An artifact is data: nothing in it makes the runtime read elsewhere, run foreign code, or wait for ever."""

import ast
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import reseal, save_wordpiece
from onnx import TensorProto, helper, numpy_helper

import runtime
from runtime import ArtifactError, Embedder, Reranker, verify_artifact
from runtime.manifest import MANIFEST_LIMIT, load_manifest

GRAPH = "model.fp32.onnx"


def open_(folder: Path, **options) -> Embedder:
    return Embedder(folder, "fp32", device="cpu", **options)


def refusal(folder: Path, call=open_) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(ArtifactError) as caught:
        call(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert message.isprintable()
    return message


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# Sizes and checksums


def test_a_whole_artifact_verifies_and_gives_its_manifest(tiny_artifact):
    assert verify_artifact(tiny_artifact) == verify_artifact(str(tiny_artifact)) == load_manifest(tiny_artifact)


@pytest.mark.parametrize("name", ["model.fp32.onnx", "model.int8.onnx", "tokenizer.json"])
@pytest.mark.parametrize("spoil", [lambda path: flip(path, -1), Path.unlink, lambda path: os.truncate(path, 9)])
def test_verifying_finds_whatever_file_was_altered(tiny_artifact, copied, name, spoil):
    folder = copied(tiny_artifact)
    spoil(folder / name)
    assert refusal(folder, verify_artifact).startswith(f"{folder / name}: ")


def test_verifying_what_is_no_artifact_says_so(tmp_path):
    assert "no such file" in refusal(tmp_path, verify_artifact)


def test_without_verifying_sizes_are_compared_and_checksums_are_not(tiny_artifact, copied):
    folder = copied(tiny_artifact)
    expected = open_(tiny_artifact).encode("a river")
    np.testing.assert_array_equal(open_(folder, verify=False).encode("a river"), expected)
    graph = (folder / GRAPH).read_bytes()
    positions = next(tensor for tensor in onnx.load_from_string(graph).graph.initializer if tensor.dims == [64, 32])
    flip(folder / GRAPH, graph.index(positions.raw_data) + 3)  # the first token's
    assert not np.array_equal(open_(folder, verify=False).encode("a river"), expected)
    assert "SHA-256" in refusal(folder)
    for name in (GRAPH, "tokenizer.json"):
        with (folder / name).open("ab") as stream:
            stream.write(b"\n")
        assert "bytes where the manifest says" in refusal(folder, lambda folder: open_(folder, verify=False))
        os.truncate(folder / name, (folder / name).stat().st_size - 1)


# Paths


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tiny_artifact, copied, tmp_path, name, verify):
    folder = copied(tiny_artifact)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    for call in (lambda folder: open_(folder, verify=verify), verify_artifact):
        assert "is not a file of the folder" in refusal(folder, call)


def test_a_link_within_the_folder_and_to_the_folder_is_followed(tiny_artifact, copied, tmp_path):
    folder = copied(tiny_artifact)
    for name in (GRAPH, "tokenizer.json"):
        (folder / name).rename(folder / f"real.{name}")
        (folder / name).symlink_to(f"real.{name}")
    (tmp_path / "link").symlink_to(folder)
    np.testing.assert_array_equal(open_(tmp_path / "link").encode("a"), open_(tiny_artifact).encode("a"))


@pytest.mark.parametrize("name", [GRAPH, "tokenizer.json", "manifest.json"])
def test_a_link_that_goes_in_circles_is_refused(tiny_artifact, copied, name):
    folder = copied(tiny_artifact)
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert name in refusal(folder)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", GRAPH])
def test_a_pipe_in_a_files_place_is_refused_and_not_waited_for(tiny_artifact, copied, name):
    folder = copied(tiny_artifact)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert name in refusal(folder)


# The manifest


@pytest.mark.parametrize("size", [MANIFEST_LIMIT, MANIFEST_LIMIT + 1])
def test_a_manifest_is_a_megabyte_at_most(tiny_artifact, copied, size):
    folder = copied(tiny_artifact)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes().ljust(size))
    if size == MANIFEST_LIMIT:
        assert load_manifest(folder) == load_manifest(tiny_artifact)
    else:
        assert "more than 1,000,000 bytes are no manifest" in refusal(folder)


def test_a_manifest_that_no_memory_holds_is_refused(tiny_artifact, copied):
    folder = copied(tiny_artifact)
    os.truncate(folder / "manifest.json", 1 << 40)
    assert "more than 1,000,000 bytes are no manifest" in refusal(folder)


def test_an_endless_manifest_is_refused(tiny_artifact, copied):
    folder = copied(tiny_artifact)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/dev/zero")
    assert "manifest" in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(name="a\nWARNING b"),
        lambda data: data["variants"].update({"a\x1b[31m": data["variants"].pop("fp32")}),
        lambda data: data.update(dim=16),
    ],
    ids=["name", "variant", "dim"],
)
def test_a_manifest_that_lies_is_refused_in_one_line(tiny_artifact, edited, change):
    refusal(edited(tiny_artifact, change))


def test_a_maximum_beyond_the_models_is_a_clean_error_and_short_texts_work(tiny_artifact, edited):
    embedder = open_(edited(tiny_artifact, lambda data: data.update(max_length=10**6)))
    expected = open_(tiny_artifact).encode("a")
    with pytest.raises(runtime.BgeOnnxError) as caught:
        embedder.encode("a " * 100)
    assert str(caught.value).isprintable()
    np.testing.assert_array_equal(embedder.encode("a"), expected)


# The graph


def altered(folder: Path, change) -> Path:
    """The artifact with another graph, and checksums that fit it."""
    model = onnx.load(folder / GRAPH)
    change(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    return reseal(folder)


def test_altering_the_graph_as_these_tests_do_leaves_it_whole(tiny_artifact, copied):
    folder = altered(copied(tiny_artifact), lambda model: None)
    np.testing.assert_array_equal(open_(folder).encode("a"), open_(tiny_artifact).encode("a"))


@pytest.mark.parametrize("domain", ["evil.example", "com.microsoft", ""])
def test_an_operator_that_onnxruntime_does_not_know_is_refused(tiny_artifact, copied, domain):
    def change(model):
        output = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["before" if name == output else name for name in node.output]
        model.graph.node.append(helper.make_node("Steal", ["before"], [output], domain=domain))
        if domain == "evil.example":
            model.opset_import.append(helper.make_opsetid(domain, 1))

    message = refusal(altered(copied(tiny_artifact), change))
    assert "Steal" in message
    assert "export again" in message


def outside(folder: Path, location: str, secret: Path) -> Path:
    """The artifact with its largest weight in another file, right where the graph says it is."""

    def change(model):
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        secret.write_bytes(numpy_helper.to_array(tensor).tobytes())
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
            tensor.external_data.add(key=key, value=value)

    return altered(folder, change)


def test_weights_in_another_file_of_the_folder_are_read(tiny_artifact, copied):
    """Or the next two would show nothing."""
    folder = copied(tiny_artifact)
    outside(folder, "weights", folder / "weights")
    np.testing.assert_array_equal(open_(folder).encode("a"), open_(tiny_artifact).encode("a"))


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret", "{}/secret", "link"])
def test_weights_outside_the_folder_are_refused(tiny_artifact, copied, tmp_path, location):
    folder = copied(tiny_artifact)
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    outside(folder, location.format(tmp_path), tmp_path / "secret")
    assert "can't load it" in refusal(folder)


# The tokenizer


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_tokenizer_of_another_model_is_found_at_the_first_word_the_graph_lacks(tiny_artifact, copied, variant):
    folder = copied(tiny_artifact)
    (folder / "other").mkdir()
    save_wordpiece(folder / "other", vocab_size=2000)
    (folder / "other" / "tokenizer.json").rename(folder / "tokenizer.json")
    embedder = Embedder(reseal(folder), variant, device="cpu")
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    known, unknown = next(w for w, i in ids.items() if 900 < i < 1000), next(w for w, i in ids.items() if i > 1000)
    known, unknown = known.removeprefix("##"), next(w for w, i in ids.items() if i > 1000 and w.isalpha())
    for _ in range(2):
        with pytest.raises(ArtifactError, match="tokenizer.json and the graph don't belong together") as caught:
            embedder.encode([known, unknown])
        assert f"a token id up to {ids[unknown]} is not in the graph's vocabulary" in str(caught.value)
        assert str(caught.value).isprintable()
        vector = embedder.encode(known)
        assert np.isfinite(vector).all() and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_rerankers_tokenizer_of_another_model_is_found_too(tiny_reranker, copied):
    folder = copied(tiny_reranker("bert")[0])
    (folder / "other").mkdir()
    save_wordpiece(folder / "other", vocab_size=2000)
    (folder / "other" / "tokenizer.json").rename(folder / "tokenizer.json")
    reranker = Reranker(reseal(folder), device="cpu")
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    with pytest.raises(ArtifactError, match="don't belong together"):
        reranker.compute_score(("a", next(word for word, i in ids.items() if i > 1000 and word.isalpha())))
    assert np.isfinite(reranker.compute_score(("a", "b")))


# The code


def test_the_runtime_never_unpickles_evaluates_or_loads_a_library_of_operators():
    suspects = {"pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "runpy", "subprocess"}
    calls = {"eval", "exec", "compile", "__import__", "register_custom_ops_library"}
    for path in Path(runtime.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Import():
                    assert not suspects & {alias.name.partition(".")[0] for alias in node.names}, path
                case ast.ImportFrom():
                    assert (node.module or "").partition(".")[0] not in suspects, path
                case ast.Attribute(value=ast.Name(id="np"), attr="load"):
                    pytest.fail(f"{path} may unpickle")
                case ast.Name(id=name) | ast.Attribute(attr=name):
                    assert name not in calls, path
