"""Token ids are those of transformers, and truncation is cut, counted, logged or refused."""

import json
import logging

import pytest
from conftest import flag_embedding_pair
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime import ArtifactError, InputError
from runtime.tokenizer import Tokenizer

SPECIAL = ["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", "<s>", "</s>", "<pad>", "<unk>", "<mask>"]
texts = st.text(max_size=60) | st.lists(
    st.sampled_from([*SPECIAL, " ", "river", "Running", "naïve", "山", "##ing", "▁", "é́"])
).map("".join)


@pytest.fixture(scope="module", params=["minilm", "tiny", "xlm-roberta"])
def both(request):
    """The runtime's tokenizer as a function of the maximum length, and transformers' of the same checkpoint."""
    import transformers

    if request.param == "minilm":
        from export.source import resolve_source

        artifact, checkpoint = request.getfixturevalue("minilm"), resolve_source("all-minilm-l6-v2").folder
    elif request.param == "xlm-roberta":
        artifact, checkpoint = request.getfixturevalue("tiny_reranker")("xlm-roberta")
    else:
        artifact, checkpoint = (request.getfixturevalue(f"tiny_{kind}") for kind in ("artifact", "checkpoint"))
    return lambda length: Tokenizer(artifact / "tokenizer.json", length), (
        transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    )


@pytest.fixture
def tokenizer(tiny_artifact):
    return Tokenizer(tiny_artifact / "tokenizer.json", 8)


@given(batch=st.lists(texts, max_size=4), max_length=st.integers(3, 24))
@settings(deadline=None, max_examples=150)
@example(batch=["[SEP]", "[CLS] [MASK]", "", "\0", "a" * 1000, "\u2028 \ufeff"], max_length=16)
def test_ids_equal_those_of_transformers(both, batch, max_length):
    make, reference = both
    expected = [reference(text, truncation=True, max_length=max_length)["input_ids"] for text in batch]
    assert make(max_length).encode(batch) == expected


@given(batch=st.lists(texts, max_size=4))
@settings(deadline=None, max_examples=50)
def test_counts_are_those_before_truncation(both, batch):
    make, reference = both
    assert make(4).count(batch) == [len(reference(text)["input_ids"]) for text in batch]


def test_real_texts_tokenize_as_in_transformers(both):
    from export.verify import verification_texts

    make, reference = both
    texts = verification_texts()
    assert make(64).encode(texts) == reference(texts, truncation=True, max_length=64)["input_ids"]


@given(pairs=st.lists(st.tuples(texts, texts), max_size=4), max_length=st.integers(17, 40))
@settings(deadline=None, max_examples=150)
@example(pairs=[("", ""), ("", "a " * 99), ("a " * 99, ""), ("a " * 99, "a " * 99), ("[SEP]</s>", "\0")], max_length=20)
def test_pairs_are_tokenized_as_flag_embedding_does(both, pairs, max_length):
    make, reference = both
    expected = [flag_embedding_pair(reference, *pair, max_length) for pair in pairs]
    encoded = make(max_length).encode_pairs(pairs)
    assert [ids for ids, _ in encoded] == [inputs["input_ids"] for inputs in expected]
    types = [inputs.get("token_type_ids", [0] * len(inputs["input_ids"])) for inputs in expected]
    assert [row for _, row in encoded] == types


@given(pair=st.tuples(texts, texts), max_length=st.integers(3, 24))
@settings(deadline=None, max_examples=100)
@example(pair=("a " * 99, "a " * 99), max_length=5)
@example(pair=("a " * 99, ""), max_length=11)
@example(pair=("a " * 99, "a"), max_length=15)
def test_no_pair_is_longer_than_the_maximum(both, pair, max_length):
    try:
        tokenizer = both[0](max_length)
        ((ids, types),) = tokenizer.encode_pairs([pair])
    except (ArtifactError, InputError):  # no room beside the special tokens
        return
    assert len(ids) == len(types) <= max_length


def test_real_pairs_tokenize_as_in_flag_embedding(both):
    from export.verify import verification_pairs, verification_texts

    make, reference = both
    pairs = verification_pairs(verification_texts())
    expected = [flag_embedding_pair(reference, *pair, 64)["input_ids"] for pair in pairs]
    assert [ids for ids, _ in make(64).encode_pairs(pairs)] == expected


@given(batch=st.lists(texts, max_size=4), max_length=st.integers(3, 24))
@settings(deadline=None, max_examples=100)
@example(batch=["", "a " * 99, "a"], max_length=3)
@example(batch=["a " * 20, "a " * 21], max_length=12)
def test_the_pieces_of_a_text_hold_all_of_it_once_in_order(both, batch, max_length):
    make, reference = both
    tokenizer = make(max_length)
    pieces = tokenizer.encode_chunks(batch)
    for text, rows in zip(batch, pieces, strict=True):
        first, *_, last = reference("")["input_ids"]
        assert all((row[0], row[-1]) == (first, last) for row in rows)
        body = [token for row in rows for token in row[1:-1]]
        assert body == reference(text, add_special_tokens=False)["input_ids"]
        assert all(len(row) == max_length for row in rows[:-1])
        assert 2 + bool(body) <= len(rows[-1]) <= max_length
        assert (len(rows) == 1) == (len(body) <= max_length - 2)
    assert [rows[0] for rows in pieces] == tokenizer.encode(batch)


def test_pieces_are_neither_logged_nor_refused(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "runtime"):
        assert [len(rows) for rows in tokenizer.encode_chunks(["a b c d e f g", "", "a"])] == [2, 1, 1]
        assert tokenizer.encode_chunks([]) == []
    assert not caplog.records
    with pytest.raises(InputError, match="^text 6 has a lone surrogate"):
        tokenizer.encode_chunks(["a", "\ud800"], first=5)


def test_a_text_that_fits_exactly_is_neither_cut_nor_refused(tokenizer, caplog):
    (ids,) = tokenizer.encode(["a b c d e f"], truncate=False)
    assert len(ids) == tokenizer.max_length == 8
    assert not caplog.records


def test_a_text_too_long_is_refused_by_index_tokens_and_limit(tokenizer):
    with pytest.raises(InputError, match=r"^text 1 has 9 tokens where the model takes 8; .*truncate=True"):
        tokenizer.encode(["a", "a b c d e f g", "a b c d e f g h"], truncate=False)


def test_truncation_is_logged_once_a_call_and_not_without_need(tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "runtime"):
        tokenizer.encode(["a b c d e f g", "a", "a b c d e f g h"])
        assert [record.getMessage() for record in caplog.records] == [
            "2 of 3 texts had more than 8 tokens and were cut"
        ]
        tokenizer.encode(["a"])
        tokenizer.count(["a b c d e f g"])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bad", ["\ud800", "fine until \udfff", "\ud83d\ude00"], ids=ascii)
@pytest.mark.parametrize("method", [Tokenizer.encode, Tokenizer.count])
def test_a_lone_surrogate_is_refused_by_index(tokenizer, method, bad):
    with pytest.raises(InputError, match="^text 2 has a lone surrogate"):
        method(tokenizer, ["a", "b", bad])


def test_settings_saved_in_the_file_neither_pad_nor_cut(tiny_artifact, tokenizer, tmp_path):
    """Older checkpoints carry them (the hub's own all-MiniLM-L6-v2 cuts at 128)."""
    data = json.loads((tiny_artifact / "tokenizer.json").read_text("utf-8"))
    data["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    data["padding"] = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
    data["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    texts = ["a", "a b c d e f g"]
    saved = Tokenizer(tmp_path / "tokenizer.json", 8)
    assert saved.encode(texts) == tokenizer.encode(texts)
    assert saved.count(texts) == [3, 9]


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "9"}'])
def test_a_file_that_is_no_tokenizer_is_an_artifact_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ArtifactError) as caught:
        Tokenizer(path, 8)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("max_length", [0, 1, 2])
def test_a_length_that_holds_only_special_tokens_is_an_artifact_error(tiny_artifact, max_length):
    with pytest.raises(ArtifactError, match=f"max_length {max_length} leaves no room"):
        Tokenizer(tiny_artifact / "tokenizer.json", max_length)


@pytest.mark.parametrize("parallel", [True, False])
def test_a_few_texts_at_once_or_one_give_the_ids_and_errors_of_all_at_once(tiny_artifact, monkeypatch, parallel):
    texts = ["", "a river", "a " * 99, "", "naïve 山", "##ing [SEP]", "\0", "bread " * 5]
    pairs = [(query, passage) for query in texts for passage in texts]
    ways = [
        lambda tokenizer: tokenizer.encode(texts),
        lambda tokenizer: tokenizer.encode_chunks(texts),
        lambda tokenizer: tokenizer.encode_pairs(pairs),
        lambda tokenizer: tokenizer.count(texts),
    ]
    path = tiny_artifact / "tokenizer.json"
    expected = [way(Tokenizer(path, 8)) for way in ways]
    monkeypatch.setattr("runtime.tokenizer.CHARACTERS", 20)
    tokenizer = Tokenizer(path, 8, parallel=parallel)
    assert [way(tokenizer) for way in ways] == expected
    with pytest.raises(InputError, match="^text 10 has a lone surrogate"):
        tokenizer.encode([*texts, "ab\ud800", "\ud800"], first=2)
    with pytest.raises(InputError, match="^pair 8 has a lone surrogate"):
        tokenizer.encode_pairs([("a", text) for text in (*texts, "ab\ud800", "\ud800")])
