"""Vectors equal the original's, don't depend on anything but their own text, and bad input is refused by name."""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import ArtifactError, Embedder, InputError, ProviderError
from runtime.tokenizer import Tokenizer

WORDS = ["river", "stone", "light", "apple", "horse", "tower", "green", "table", "music", "bread", "cloud", "window"]
TEXTS = ["a river of light", "", "bread", "zwölf Boxkämpfer jagen Viktor quer über den großen Deich", "bread", "🙈 \0"]


@pytest.fixture(scope="module", params=["fp32", "int8"])
def embedder(request, minilm):
    """The real model in each variant."""
    return Embedder(minilm, request.param, device="cpu")


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    """A model so small that what isn't about numbers is fast to ask."""
    return Embedder(tiny_artifact, "fp32", device="cpu")


@pytest.fixture(scope="module")
def alone(embedder):
    """A function that embeds a text all by itself, and remembers the vector."""
    known = {}
    return lambda text: known[text] if text in known else known.setdefault(text, embedder.encode(text))


@pytest.fixture(scope="module")
def original():
    """The verification texts, and what transformers makes of each: float64 ``(n, dim)``, of unit length."""
    from export.source import resolve_source
    from export.verify import reference_answers, verification_texts

    texts = verification_texts()
    return texts, np.array(reference_answers(resolve_source("all-minilm-l6-v2"), texts).dense, np.float64)


def test_vectors_are_those_of_transformers(embedder, original):
    texts, reference = original
    assert len(texts) > 90
    cosines = (embedder.encode(texts).astype(np.float64) * reference).sum(axis=1)
    if embedder.variant == "fp32":
        assert cosines.min() >= 0.99999
    else:
        assert cosines.mean() >= 0.99
        assert cosines.min() >= 0.9


def sentence(start: int, words: int) -> str:
    """As many words as asked for, each one token; another start gives another text of the same length."""
    return " ".join(random.Random(start).choices(WORDS, k=words))


# Few lengths, so that batches hold several texts of one length, on both sides of the kernels' tile sizes.
corpus = st.lists(
    st.builds(sentence, st.integers(0, 5), st.sampled_from([0, 1, 2, 3, 6, 14, 15, 29, 62, 126, 300]))
    | st.sampled_from(TEXTS),
    min_size=1,
    max_size=16,
)


@given(batch=corpus)
@settings(deadline=None, max_examples=20)
def test_a_vector_is_the_same_to_the_bit_alone_and_in_any_batch(embedder, alone, batch):
    vectors = embedder.encode(batch)
    for text, vector in zip(batch, vectors, strict=True):
        np.testing.assert_array_equal(vector, alone(text))


def test_a_vector_is_the_same_to_the_bit_in_runs_of_every_size(embedder):
    """Up to the most rows that one run may hold, and beyond."""
    texts = [sentence(i, 30) for i in range(280)]
    whole = embedder.encode(texts)
    for size in (1, 2, 3, 7, 64):
        np.testing.assert_array_equal(embedder.encode(texts[:size]), whole[:size])


def test_a_vector_is_the_same_to_the_bit_from_eight_threads(embedder):
    texts = [*TEXTS, *(sentence(i, words) for i in range(4) for words in (1, 5, 5, 20, 60))]
    expected = dict(zip(texts, embedder.encode(texts), strict=True))
    shuffled = [random.Random(seed).sample(texts, k=1 + seed % len(texts)) for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for batch, vectors in zip(shuffled, pool.map(embedder.encode, shuffled), strict=True):
            np.testing.assert_array_equal(vectors, [expected[text] for text in batch])


def test_the_number_of_threads_does_not_change_a_bit(embedder, minilm):
    texts = [sentence(i, words) for i in range(2) for words in (0, 3, 50)]
    single = Embedder(minilm, embedder.variant, device="cpu", threads=1)
    np.testing.assert_array_equal(single.encode(texts), embedder.encode(texts))


def test_a_megabyte_of_text_embeds_as_its_beginning(embedder):
    words = sentence(0, 180_000)
    assert len(words) > 1_000_000
    beginning = " ".join(words.split()[: embedder.max_length - 2])
    assert embedder.count_tokens([words, beginning]) == [180_002, embedder.max_length]
    np.testing.assert_array_equal(embedder.encode(words), embedder.encode(beginning))


@given(batch=corpus)
@settings(deadline=None, max_examples=10)
def test_a_text_that_fits_has_the_same_vector_to_the_bit_in_pieces(embedder, alone, batch):
    """Beside others that are longer, too."""
    vectors = embedder.encode(batch, chunk=True)
    for text, count, vector in zip(batch, embedder.count_tokens(batch), vectors, strict=True):
        if count <= embedder.max_length:
            np.testing.assert_array_equal(vector, alone(text))


@pytest.mark.parametrize("over", [1, 100, 254, 255, 600])
def test_a_text_too_long_is_the_mean_of_its_pieces_weighted_by_tokens(embedder, over):
    room = embedder.max_length - 2
    words = sentence(over, room + over).split()
    pieces = [" ".join(words[start : start + room]) for start in range(0, len(words), room)]
    tokens = embedder.count_tokens(pieces)
    assert sum(tokens) == len(words) + 2 * len(pieces)
    expected = np.average(embedder.encode(pieces).astype(np.float64), axis=0, weights=tokens)
    vector = embedder.encode(" ".join(words), chunk=True)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert abs(vector - embedder.encode(" ".join(words))).max() > 1e-4  # it is read whole


def test_pieces_are_the_same_to_the_bit_in_any_batch(embedder):
    texts = [sentence(i, words) for i, words in enumerate([300, 0, 5, 520, 300, 254])]
    together = embedder.encode(texts, chunk=True)
    np.testing.assert_array_equal(together[::-1], embedder.encode(texts[::-1], chunk=True))
    np.testing.assert_array_equal(together, [embedder.encode(text, chunk=True) for text in texts])


def test_pieces_have_shape_and_dimensions_as_any_text(tiny, caplog):
    texts = ["a", "a " * 999, ""]
    vectors = tiny.encode(texts, chunk=True)
    assert (vectors.shape, vectors.dtype) == ((3, 32), np.float32)
    assert tiny.encode([], chunk=True).shape == (0, 32)
    cut = tiny.encode(texts, chunk=True, truncate_dim=8)
    assert cut.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(tiny.encode(texts, chunk=True, truncate=False), vectors)  # nothing is cut
    assert not caplog.records


def test_pieces_of_a_model_that_does_not_normalize_are_averaged_as_they_are(tiny_artifact, edited):
    raw = Embedder(edited(tiny_artifact, lambda data: data.update(normalize=False)), "fp32")
    pieces = raw.encode(["a " * 62, "a " * 10]).astype(np.float64)
    expected = np.average(pieces, axis=0, weights=[64, 12])
    np.testing.assert_allclose(raw.encode("a " * 72, chunk=True), expected, rtol=1e-5, atol=1e-6)


def test_bad_texts_are_named_when_read_in_pieces(tiny):
    for bad, says in ((7, "^text 1 is int"), ("\ud800", "^text 1 has a lone surrogate")):
        with pytest.raises(InputError, match=says):
            tiny.encode(["a", bad], chunk=True)


@pytest.mark.parametrize(
    ("texts", "shape"),
    [
        ("a text", (32,)),
        ("", (32,)),
        (["a text"], (1, 32)),
        (["a text", "", "another"], (3, 32)),
        (("a", "b"), (2, 32)),
        ([], (0, 32)),
        ((), (0, 32)),
        (np.array(["a", "b"]), (2, 32)),
        ((text for text in "abc"), (3, 32)),
    ],
    ids=["str", "empty str", "list of one", "list", "tuple", "empty list", "empty tuple", "array", "generator"],
)
def test_shape_follows_the_input_and_rows_are_float32_of_unit_length(tiny, texts, shape):
    vectors = tiny.encode(texts)
    assert vectors.shape == shape
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)


def test_attributes_say_what_was_loaded(tiny, tiny_artifact):
    assert (tiny.variant, tiny.dim, tiny.max_length, tiny.manifest.kind) == ("fp32", 32, 64, "embedder")
    assert Embedder(str(tiny_artifact)).dim == 32


def test_rows_keep_the_order_of_the_texts(tiny):
    texts = [sentence(i, 40 - i) for i in range(40)]
    mixed = random.Random(0).sample(texts, k=40)
    rows = dict(zip(texts, tiny.encode(texts), strict=True))
    np.testing.assert_array_equal(tiny.encode(mixed), [rows[text] for text in mixed])
    assert len(np.unique(tiny.encode(texts), axis=0)) == 40


def test_an_artifact_of_the_first_format_whose_graph_gives_hidden_states_is_read(tiny_artifact, edited):
    old = edited(tiny_artifact, lambda data: data.update(format_version=1, pooling="cls", normalize=False))
    embedder = Embedder(old, "fp32", "cpu")
    (session,) = embedder._opened.sessions
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state"]
    ids = np.array(embedder._tokenizer.encode(["a river"]), np.int64)
    np.testing.assert_array_equal(embedder.encode(["a river"]), session.run(None, {"input_ids": ids})[0][:, 0])


def test_prompts_come_from_the_manifest_and_go_before_each_text(tiny_artifact, edited):
    folder = edited(tiny_artifact, lambda data: data.update(prompts={"query": "find: ", "passage": "text: "}))
    embedder = Embedder(folder, "fp32")
    texts = ["a river", "", "of light"]
    plain = embedder.encode(texts)
    queries, passages = embedder.encode_queries(texts), embedder.encode_corpus(texts)
    np.testing.assert_array_equal(queries, embedder.encode(["find: " + text for text in texts]))
    np.testing.assert_array_equal(passages, embedder.encode(["text: " + text for text in texts]))
    np.testing.assert_array_equal(embedder.encode_queries("a river"), queries[0])
    assert not np.allclose(queries, plain) and not np.allclose(passages, plain) and not np.allclose(queries, passages)
    np.testing.assert_array_equal(embedder.encode_query(texts), queries)
    np.testing.assert_array_equal(embedder.encode_document(texts), passages)


def test_without_prompts_queries_and_passages_are_plain_texts(tiny):
    np.testing.assert_array_equal(tiny.encode_queries(TEXTS), tiny.encode(TEXTS))
    np.testing.assert_array_equal(tiny.encode_corpus(TEXTS), tiny.encode(TEXTS))


def test_a_model_that_does_not_normalize_gives_raw_vectors(tiny, tiny_artifact, edited):
    raw = Embedder(edited(tiny_artifact, lambda data: data.update(normalize=False)), "fp32").encode(TEXTS)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert (abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(raw / lengths, tiny.encode(TEXTS), atol=1e-6)


@given(texts=st.lists(st.sampled_from(TEXTS), max_size=9), chunk_size=st.integers(1, 10))
@settings(deadline=None, max_examples=50)
def test_encode_iter_gives_the_rows_of_encode_to_the_bit(tiny, texts, chunk_size):
    rows = list(tiny.encode_iter((text for text in texts), chunk_size=chunk_size))
    assert all(row.shape == (32,) and row.dtype == np.float32 for row in rows)
    np.testing.assert_array_equal(np.reshape(rows, (-1, 32)), tiny.encode(texts))


def test_encode_iter_reads_no_more_than_a_chunk_ahead(tiny):
    read = 0

    def endless():
        nonlocal read
        for read in itertools.count(1):
            yield f"text {read}"

    stream = tiny.encode_iter(endless(), chunk_size=3)
    assert read == 0
    for expected in (3, 3, 3, 6, 6, 6, 9):
        next(stream)
        assert read == expected


def test_encode_iter_passes_its_options_on(tiny):
    texts = ["a", "a " * 99]
    np.testing.assert_array_equal(list(tiny.encode_iter(texts, truncate_dim=4)), tiny.encode(texts, truncate_dim=4))
    with pytest.raises(InputError, match="text 1 has 101 tokens"):
        list(tiny.encode_iter(texts, truncate=False))


@pytest.mark.parametrize("bad", [7, "\ud800", "a " * 99], ids=["int", "surrogate", "too long"])
def test_encode_iter_names_a_bad_text_by_its_place_in_the_stream(tiny, bad):
    with pytest.raises(InputError, match="^text 5 "):
        list(tiny.encode_iter([*"abcde", bad], chunk_size=2, truncate=False))


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"chunk_size": -1}, {"truncate_dim": 0}])
def test_encode_iter_refuses_bad_options(tiny, options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        list(tiny.encode_iter(["a"], **options))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("a text", {}, "not one str"),
        ([], {"chunk_size": 0}, "chunk_size is 0"),
        ([], {"prompt_name": "corpus"}, "prompt_name is 'corpus'; pass 'query', 'passage' or None"),
    ],
)
def test_encode_iter_refuses_what_makes_no_sense_at_once(tiny, texts, options, message):
    with pytest.raises(InputError, match=message):
        tiny.encode_iter(texts, **options)


def test_encode_iter_puts_the_prompt_that_is_named_before_each_text(tiny_artifact, edited):
    prompts = {"query": "find: ", "passage": "text: "}
    embedder = Embedder(edited(tiny_artifact, lambda data: data.update(prompts=prompts)), "fp32")
    for name, same in (
        ("query", embedder.encode_queries),
        ("passage", embedder.encode_corpus),
        (None, embedder.encode),
    ):
        np.testing.assert_array_equal(list(embedder.encode_iter(TEXTS, chunk_size=3, prompt_name=name)), same(TEXTS))


@pytest.mark.parametrize("texts", [{"a": "text"}, {"a text"}, frozenset(["a text"])])
def test_what_has_no_order_is_no_list_of_texts(tiny, texts):
    with pytest.raises(InputError, match="pass a str or a list of str"):
        tiny.encode(texts)
    assert tiny.encode({"a": 1, "b": 2}.keys()).shape == (2, 32)


def test_a_shorter_max_length_can_be_chosen_but_no_longer_one(tiny_artifact):
    short, whole = Embedder(tiny_artifact, "fp32", max_length=8), Embedder(tiny_artifact, "fp32")
    assert (short.max_length, whole.max_length) == (8, 64)
    np.testing.assert_array_equal(short.encode("a " * 50), whole.encode("a " * 6))
    with pytest.raises(InputError, match="text 0 has 52 tokens where the model takes 8"):
        short.encode("a " * 50, truncate=False)
    for wrong in (0, 65, 7.5):
        with pytest.raises(InputError, match=f"max_length is {wrong}; it must be a whole number from 1 to 64"):
            Embedder(tiny_artifact, "fp32", max_length=wrong)
    with pytest.raises(AttributeError):
        whole.max_length = 8


def test_many_texts_are_tokenised_piece_by_piece(tiny, monkeypatch):
    """So that their ids, which take more memory than their vectors, are never all there."""
    expected = tiny.encode(TEXTS)
    monkeypatch.setattr("runtime.model.PIECE", 2)
    held, encode = [], tiny._tokenizer.encode
    monkeypatch.setattr(tiny._tokenizer, "encode", lambda texts, *rest: held.append(len(texts)) or encode(texts, *rest))
    np.testing.assert_array_equal(tiny.encode(TEXTS), expected)
    assert max(held) == 2
    assert sum(held) == len(TEXTS)
    with pytest.raises(InputError, match="^text 5 has a lone surrogate"):
        tiny.encode([*"abcde", "\ud800"])


@pytest.mark.parametrize("dim", [1, 8, 32])
def test_truncate_dim_keeps_the_leading_dimensions_and_normalizes_again(tiny, dim):
    whole, cut = tiny.encode(TEXTS), tiny.encode(TEXTS, truncate_dim=dim)
    leading = whole[:, :dim]
    np.testing.assert_allclose(cut, leading / np.linalg.norm(leading, axis=1, keepdims=True), atol=1e-6)
    assert cut.shape == (len(TEXTS), dim)
    assert tiny.encode([], truncate_dim=dim).shape == (0, dim)
    np.testing.assert_array_equal(tiny.encode_queries(TEXTS[0], truncate_dim=dim), cut[0])


@pytest.mark.parametrize("dim", [0, -1, 33, 1.5, "8"])
def test_a_bad_truncate_dim_is_refused(tiny, dim):
    with pytest.raises(InputError, match=f"truncate_dim is {dim!r}; it must be a whole number from 1 to 32"):
        tiny.encode("a", truncate_dim=dim)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (7, "^texts is int"),
        (None, "^texts is NoneType"),
        (b"bytes", "^texts is bytes"),
        (["a", 7], "^text 1 is int"),
        (["a", "b", None], "^text 2 is NoneType"),
        ([b"bytes"], "^text 0 is bytes"),
        ([["a"]], "^text 0 is list"),
        ([("query", "passage")], "^text 0 is tuple"),
        (np.array(["a", None]), "^text 1 is NoneType"),
        (["a", "\ud800"], "^text 1 has a lone surrogate"),
        ("b\udfff", r"^text 0 has a lone surrogate \('\\udfff'\)"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "encode_queries", "encode_corpus", "count_tokens"])
def test_what_is_not_a_text_is_refused_by_name(tiny, method, texts, says):
    with pytest.raises(InputError, match=says) as caught:
        getattr(tiny, method)(texts)
    assert len(str(caught.value).splitlines()) == 1


def test_bad_input_is_a_value_error_too(tiny):
    with pytest.raises(ValueError):
        tiny.encode(None)


def test_a_text_too_long_is_refused_on_request(tiny):
    for method in (tiny.encode, tiny.encode_queries, tiny.encode_corpus):
        with pytest.raises(InputError, match="^text 1 has 101 tokens where the model takes 64"):
            method(["a", "a " * 99], truncate=False)
    assert tiny.encode("a " * 62, truncate=False).shape == (32,)


def test_count_tokens_counts_whole_texts(tiny, tiny_artifact):
    texts = ["", "a", "a " * 99]
    assert tiny.count_tokens(texts) == Tokenizer(tiny_artifact / "tokenizer.json", 64).count(texts) == [2, 3, 101]
    assert tiny.count_tokens("a") == 3
    assert tiny.count_tokens([]) == []


def test_auto_takes_int8_on_the_cpu_and_fp32_where_there_is_no_int8(tiny_artifact, edited):
    assert Embedder(tiny_artifact, device="cpu").variant == "int8"
    assert Embedder(edited(tiny_artifact, lambda data: data["variants"].pop("int8")), device="cpu").variant == "fp32"


def test_auto_takes_whatever_runs_on_the_device(tiny_artifact, edited):
    def rename(data):
        data["variants"] = {"other": data["variants"]["fp32"]}

    assert Embedder(edited(tiny_artifact, rename), device="cpu").variant == "other"


def test_an_unknown_variant_is_an_error_that_lists_the_known(tiny_artifact):
    with pytest.raises(ArtifactError, match="no variant 'int4' for cpu, only fp32, int8; .*--variants int4"):
        Embedder(tiny_artifact, "int4", device="cpu")


def test_a_variant_that_does_not_run_on_the_device_is_an_error(tiny_artifact, edited):
    def only_cuda(data):
        data["variants"]["fp32"]["providers"] = ["CUDAExecutionProvider"]

    with pytest.raises(ArtifactError, match="its fp32 doesn't run on cpu, only int8 does"):
        Embedder(edited(tiny_artifact, only_cuda), "fp32", device="cpu")


def test_no_variant_for_the_device_does_not_advise_to_export_a_variant_called_auto(tiny_artifact, edited):
    def only_cuda(data):
        for variant in data["variants"].values():
            variant["providers"] = ["CUDAExecutionProvider"]

    with pytest.raises(ArtifactError, match="its fp32 doesn't run on cpu; pass another") as caught:
        Embedder(edited(tiny_artifact, only_cuda), device="cpu")
    assert "--variants auto" not in str(caught.value)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has CUDA")
def test_cuda_that_cannot_be_had_is_an_error_with_the_cure(tiny_artifact):
    with pytest.raises(ProviderError, match=r"pip install 'bge-onnx\[gpu\]'"):
        Embedder(tiny_artifact, device="cuda")


def test_an_unknown_device_is_an_error(tiny_artifact):
    with pytest.raises(ProviderError, match="'tpu' is unknown"):
        Embedder(tiny_artifact, device="tpu")


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_below_one_are_refused(tiny_artifact, threads):
    with pytest.raises(InputError, match=f"threads is {threads}"):
        Embedder(tiny_artifact, threads=threads)


def test_a_reranker_is_refused(tiny_artifact, edited):
    folder = edited(tiny_artifact, lambda data: data.update(kind="reranker", outputs=["logits"], pooling=None))
    with pytest.raises(ArtifactError, match="is of kind reranker, not embedder; open it with Reranker"):
        Embedder(folder)


def test_what_cant_be_a_folder_is_an_artifact_error(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for path in ("a\0b", tmp_path / "loop", "relative"):
        with pytest.raises(ArtifactError):
            Embedder(path)


def test_no_folder_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="no such file; export the model first"):
        Embedder(tmp_path / "nothing")
