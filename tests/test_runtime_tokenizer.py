"""Token ids are those of transformers, and truncation is cut, counted, logged or refused."""

import json
import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime import ArtifactError, InputError
from runtime.tokenizer import Tokenizer

texts = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["[SEP]", "[CLS]", "[MASK]", "[PAD]", "[UNK]", " ", "river", "Running", "naïve", "山", "##ing", "é́"]
    )
).map("".join)


@pytest.fixture(scope="module", params=["minilm", "tiny"])
def both(request):
    """The runtime's tokenizer as a function of the maximum length, and transformers' of the same checkpoint."""
    import transformers

    if request.param == "minilm":
        from export.source import resolve_source

        artifact, checkpoint = request.getfixturevalue("minilm"), resolve_source("all-minilm-l6-v2").folder
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
    with pytest.raises(InputError, match="^text 2 has a lone surrogate at character"):
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
