"""The manifest survives its JSON, and whatever is wrong with an artifact is one line that names the file."""

import copy
import dataclasses
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime import ArtifactError, Embedder
from runtime.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    File,
    Manifest,
    Parity,
    Source,
    Variant,
    check_file,
    describe_file,
    load_manifest,
)

VALID = Manifest(
    format_version=FORMAT_VERSION,
    name="a-model",
    kind="embedder",
    architecture="bert",
    source=Source(id="someone/a-model", origin="hub", revision="0" * 40, checksums={"config.json": "1" * 64}),
    dim=8,
    max_length=16,
    outputs=("last_hidden_state",),
    pooling="cls",
    normalize=True,
    prompts={"query": "为这个句子生成表示: "},
    variants={
        "fp32": Variant(
            file="model.fp32.onnx",
            opset=17,
            providers=("CPUExecutionProvider",),
            cpu_safety="any",
            quantization=None,
            parity=Parity(texts=3, cosine_mean=0.5, cosine_min=0.25),
        )
    },
    files={name: File(sha256="2" * 64, size=5) for name in ("tokenizer.json", "model.fp32.onnx")},
    tools={"numpy": "2.0"},
)
AS_JSON = json.loads(VALID.to_json())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose manifest a test may write anew."""
    return tmp_path_factory.mktemp("manifests")


def error_of(folder) -> str:
    """The one-line message with which the manifest is refused."""
    with pytest.raises(ArtifactError) as caught:
        load_manifest(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{folder / MANIFEST}: ")
    return message


def changed(*path, **entry):
    """The valid manifest as JSON, with entries put in (or, if None, taken out) of the object at a path."""
    data = copy.deepcopy(AS_JSON)
    target = data
    for key in path:
        target = target[key]
    target.update(entry)
    return data


def without(*path):
    data = copy.deepcopy(AS_JSON)
    target = data
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    return data


def renamed(name):
    """The valid manifest with another name for its graph's file, checksum included."""
    data = changed("variants", "fp32", file=name)
    data["files"][name] = data["files"].pop("model.fp32.onnx")
    return data


names = st.text(min_size=1).filter(
    lambda name: name.isprintable() and name not in (".", "..") and not set(name) & set("/\\:")
)


@st.composite
def manifests(draw):
    cosines = st.floats(-1, 1)
    parities = st.none() | st.builds(Parity, cosine_mean=cosines, cosine_min=cosines)
    variants = draw(st.dictionaries(names, st.builds(Variant, data=st.none(), parity=parities), min_size=1, max_size=3))
    variants = {name: dataclasses.replace(variant, file=draw(names)) for name, variant in variants.items()}
    files = {name: draw(st.from_type(File)) for name in ["tokenizer.json", *(v.file for v in variants.values())]}
    positive = st.integers(1, 10**6)
    fixed = dict(format_version=st.just(FORMAT_VERSION), name=names, dim=positive, max_length=positive)
    pooling = st.sampled_from(["cls", "mean", "last_token", "max"])
    fixed |= draw(
        st.sampled_from(
            [
                dict(kind=st.just("reranker"), outputs=st.just(("logits",))),
                dict(
                    kind=st.just("embedder"), outputs=st.just(("last_hidden_state", "token_weights", "token_vectors"))
                ),
            ]
        )
    )
    return draw(st.builds(Manifest, **fixed, pooling=pooling, variants=st.just(variants), files=st.just(files)))


@given(manifests())
@settings(deadline=None, max_examples=50)
def test_a_manifest_survives_its_json(folder, manifest):
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    assert load_manifest(folder) == manifest


def test_an_exported_manifest_survives_its_json(tiny_artifact, folder):
    manifest = load_manifest(tiny_artifact)
    (folder / MANIFEST).write_text(manifest.to_json(), "utf-8")
    assert load_manifest(folder) == manifest
    assert (tiny_artifact / MANIFEST).read_text("utf-8") == manifest.to_json()


def test_tools_may_be_left_out_and_pooling_is_optional_for_a_reranker(folder):
    data = changed(kind="reranker", outputs=["logits"], pooling=None)
    del data["tools"]
    (folder / MANIFEST).write_text(json.dumps(data))
    assert load_manifest(folder) == dataclasses.replace(
        VALID, kind="reranker", outputs=("logits",), pooling=None, tools={}
    )


@pytest.mark.parametrize("spot", ["no/such/folder", ".", "file"])
def test_a_missing_manifest_says_how_to_export(tmp_path, spot):
    (tmp_path / "file").touch()
    assert "no such file; export the model first (python -m export" in error_of(tmp_path / spot)


def test_a_manifest_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    assert "can't be read" in error_of(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'"text"',
        b'{"format_version": "1"}',
        b'{"a":\n1,}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_not_a_manifest_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    error_of(folder)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (changed(dim="8"), "dim should be int, not '8'"),
        (changed(dim=True), "dim should be int"),
        (changed(dim=8.0), "dim should be int"),
        (changed(dim=0), "dim"),
        (changed(max_length=0), "max_length"),
        (changed(normalize=1), "normalize should be bool, not '1'"),
        (changed(pooling="average"), "pooling should be 'cls' or 'mean' or 'last_token' or 'max', not 'average'"),
        (changed(pooling=None), "an embedder without pooling"),
        (changed(kind="reranker"), "kind reranker with the outputs last_hidden_state"),
        (changed(outputs=["logits"]), "kind embedder with the outputs logits"),
        (changed(outputs=[]), "kind embedder with the outputs none"),
        (changed(kind="classifier"), "kind should be 'embedder' or 'reranker'"),
        (changed(variants={}), "variants"),
        (changed(variants=[]), "variants should be an object"),
        (changed(format_version=True), "format_version should be int"),
        (changed(prompts={"query": 1}), "prompts.query should be str"),
        (changed("source", origin="ftp"), "source.origin should be"),
        (changed("source", checksums={"a": None}), "source.checksums.a should be str"),
        (changed("variants", "fp32", providers="CPUExecutionProvider"), "variants.fp32.providers should be a list"),
        (changed("variants", "fp32", providers=["CPU", 1]), "variants.fp32.providers.1 should be str"),
        (changed("variants", "fp32", "parity", cosine_min="1"), "variants.fp32.parity.cosine_min should be a number"),
        (changed("variants", "fp32", "parity", cosine_min=10**400), "variants.fp32.parity.cosine_min"),
        (changed("files", "tokenizer.json", size="5"), "files.tokenizer.json.size should be int"),
        (changed(extra=1), "unknown entry extra"),
        (changed("source", extra=1), "unknown entry source.extra"),
        (changed("variants", "fp32", "parity", extra=1), "unknown entry variants.fp32.parity.extra"),
        (changed(**{"two\nlines": 1}), "unknown entry"),
        (without("dim"), "dim is missing"),
        (without("source", "id"), "source.id is missing"),
        (without("variants", "fp32", "parity", "texts"), "variants.fp32.parity.texts is missing"),
        (without("files", "tokenizer.json"), "tokenizer.json has no checksum"),
        (without("files", "model.fp32.onnx"), "model.fp32.onnx has no checksum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_entry_is_named(folder, data, says):
    (folder / MANIFEST).write_text(json.dumps(data))
    assert says in error_of(folder)


@pytest.mark.parametrize(
    "name", ["..", "", ".", "../x", "/etc/passwd", "a/b", "..\\x", "C:x", "a\0b", "\ud800"], ids=repr
)
def test_a_file_name_that_could_leave_the_folder_or_be_no_name_is_refused(folder, name):
    (folder / MANIFEST).write_text(json.dumps(renamed(name)))
    assert "is not a plain file name" in error_of(folder)


def test_a_path_among_the_files_is_refused_even_if_no_variant_uses_it(folder):
    data = changed("files", **{"../secret": {"sha256": "", "size": 0}})
    (folder / MANIFEST).write_text(json.dumps(data))
    assert "'../secret' is not a plain file name" in error_of(folder)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_newer_format_says_upgrade_whatever_else_it_holds(folder, version):
    (folder / MANIFEST).write_text(json.dumps({"format_version": version, "novelty": []}))
    message = error_of(folder)
    assert f"format {version} is newer" in message
    assert "upgrade bge-onnx" in message


@pytest.mark.parametrize("version", [0, -1])
def test_a_format_that_never_was_is_refused(folder, version):
    (folder / MANIFEST).write_text(json.dumps(changed(format_version=version)))
    error_of(folder)


def paths(value, path=()):
    """The path of every value inside a JSON value."""
    yield path
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(entry, (*path, key))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([path for path in paths(AS_JSON) if path]), anything)
@settings(deadline=None, max_examples=200)
@example(("variants", "fp32", "parity", "cosine_mean"), 10**400)
def test_any_value_anywhere_either_loads_or_is_an_artifact_error(folder, path, value):
    data = copy.deepcopy(AS_JSON)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (folder / MANIFEST).write_text(json.dumps(data))
    try:
        manifest = load_manifest(folder)
    except ArtifactError:
        error_of(folder)
    else:
        assert isinstance(manifest, Manifest)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append_a_byte(path):
    path.write_bytes(path.read_bytes() + b"\0")


def put_a_folder_there(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["model.fp32.onnx", "tokenizer.json"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (flip_a_byte, "SHA-256"),
        (append_a_byte, "bytes where the manifest says"),
        (lambda path: path.write_bytes(b""), "0 bytes where the manifest says"),
        (lambda path: path.unlink(), "No such file"),
        (put_a_folder_there, "is not a file of the folder"),
    ],
    ids=["altered", "grown", "emptied", "missing", "a folder"],
)
def test_a_file_that_is_not_as_exported_is_never_loaded(tiny_artifact, copied, name, spoil, says):
    folder = copied(tiny_artifact)
    spoil(folder / name)
    with pytest.raises(ArtifactError) as caught:
        Embedder(folder, "fp32")
    message = str(caught.value)
    assert message.startswith(f"{folder / name}: ")
    assert says in message
    assert len(message.splitlines()) == 1


def test_a_described_file_verifies(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"hello")
    described = describe_file(tmp_path / "tokenizer.json")
    assert described == File(sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", size=5)
    manifest = dataclasses.replace(VALID, files={"tokenizer.json": described})
    assert check_file(tmp_path, manifest, "tokenizer.json") == tmp_path / "tokenizer.json"
