"""models.yaml is what FlagEmbedding ships, and a checkpoint's own word about itself wins over it."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from export.catalog import NO_PROMPTS, ModelSpec, describe_checkpoint, find_model, load_catalog, suggest
from export.errors import ExportError

CATALOG = load_catalog()
DIMS = {"small": 384, "base": 768, "large": 1024}
EN = {"query": "Represent this sentence for searching relevant passages: "}
ZH = {"query": "为这个句子生成表示以用于检索相关文章："}
E5 = {"query": "query: ", "passage": "passage: "}


@pytest.fixture(autouse=True)
def _parsed_once(monkeypatch):
    """Parsing the YAML for each of several hundred questions would take seconds."""
    monkeypatch.setattr("export.catalog.load_catalog", lambda: CATALOG)


def expected_rows():
    """(hub id, kind, pooling, dimensions where known, max length, prompts) of everything that has to be known."""
    for size, dim in DIMS.items():
        zh_dim = {**DIMS, "small": 512}[size]
        for version in ("", "-v1.5"):
            yield f"BAAI/bge-{size}-en{version}", "embedder", "cls", dim, 512, EN
            yield f"BAAI/bge-{size}-zh{version}", "embedder", "cls", zh_dim, 512, ZH
        for name in (f"e5-{size}", f"e5-{size}-v2", f"multilingual-e5-{size}"):
            yield f"intfloat/{name}", "embedder", "mean", dim, 512, E5
        yield f"thenlper/gte-{size}", "embedder", "mean", dim, 512, {}
        yield f"thenlper/gte-{size}-zh", "embedder", "cls", None, 512, {}
    yield "BAAI/bge-m3", "embedder", "cls", 1024, 8192, {}
    yield "maidalun1020/bce-embedding-base_v1", "embedder", "cls", None, 512, {}
    instruction = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
    yield "Qwen/Qwen3-Embedding-0.6B", "embedder", "last_token", 1024, 32768, {"query": instruction}
    yield "BAAI/bge-code-v1", "embedder", "last_token", 1536, 32768, {}
    yield "sentence-transformers/all-MiniLM-L6-v2", "embedder", "mean", 384, 256, {}
    yield "Alibaba-NLP/gte-modernbert-base", "embedder", "cls", 768, 8192, {}
    yield "Alibaba-NLP/gte-reranker-modernbert-base", "reranker", None, None, 8192, {}
    yield "ibm-granite/granite-embedding-english-r2", "embedder", "cls", 768, 8192, {}
    yield "ibm-granite/granite-embedding-small-english-r2", "embedder", "cls", 384, 8192, {}
    for name, limit in (("base", 512), ("large", 512), ("v2-m3", 8192)):
        yield f"BAAI/bge-reranker-{name}", "reranker", None, None, limit, {}
    yield "maidalun1020/bce-reranker-base_v1", "reranker", None, None, 512, {}
    for layers in (6, 12):
        yield f"cross-encoder/ms-marco-MiniLM-L{layers}-v2", "reranker", None, None, 512, {}


@pytest.mark.parametrize(("hub", "kind", "pooling", "dim", "limit", "prompts"), list(expected_rows()))
def test_the_catalog_has_each_model_as_its_authors_mean_it(hub, kind, pooling, dim, limit, prompts):
    spec = find_model(hub)
    assert spec is not None
    assert (spec.hub, spec.kind, spec.pooling, spec.max_length, spec.prompts) == (hub, kind, pooling, limit, prompts)
    assert spec.dim in (dim, None) or dim is None
    assert kind == "reranker" or spec.normalize


def test_the_catalog_lists_nothing_else():
    assert {spec.hub for spec in CATALOG.values()} == {row[0] for row in expected_rows()}


def test_no_name_stands_twice():
    text = (Path(__file__).parents[1] / "models.yaml").read_text("utf-8")
    names = [key.value for key, _ in yaml.compose(text).value]  # a plain load would keep the last of two
    assert len(names) == len({name.casefold() for name in names})


@pytest.mark.parametrize("spec", list(CATALOG.values()), ids=lambda spec: spec.name)
def test_a_model_is_found_by_short_name_hub_id_and_its_last_part(spec):
    for model in (spec.name, spec.hub, spec.hub.rpartition("/")[2]):
        assert find_model(model) == find_model(model.upper()) == find_model(model.swapcase()) == spec


def test_bge_base_is_the_english_one_of_version_1_5():
    assert find_model("bge-base").hub == "BAAI/bge-base-en-v1.5"


@pytest.mark.parametrize("model", ["", "/", "BAAI", "BAAI/", "bge-base ", "other/bge-base-en-v1.5", ".prompts"])
def test_what_is_almost_a_name_is_not_found(model):
    assert find_model(model) is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("bge-bse", "bge-base"), ("BGE_BASE", "bge-base"), ("e5-smal", "e5-small"), ("bge-m4", "bge-m3")],
)
def test_a_near_miss_gets_the_name_that_was_meant(typed, meant):
    assert meant in suggest(typed).removesuffix("? ").removeprefix("did you mean ").split(" or ")


def test_a_name_far_from_all_gets_no_suggestion():
    assert suggest("zzzzzzzz") == ""


@pytest.fixture
def describe(tmp_path):
    """A function that writes a checkpoint's JSON files and describes it."""

    def describe_(files: dict | None = None, pooling=None, config: dict | None = None, given=NO_PROMPTS, **spec):
        config = {"model_type": "bert", "hidden_size": 32, "max_position_embeddings": 512} | (config or {})
        for name, content in {"config.json": config, **(files or {})}.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return describe_checkpoint(ModelSpec(**({"name": "m", "pooling": "mean"} | spec)), tmp_path, pooling, given)

    return describe_


CLS = {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}


def test_the_checkpoints_pooling_wins_over_the_catalog_and_the_users_over_both(describe):
    assert describe().pooling == "mean"
    assert describe(CLS).pooling == "cls"
    assert describe(CLS, "max").pooling == "max"


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True}, "last_token"),
        ({"pooling_mode": "mean"}, "mean"),  # sentence-transformers 5.2 and later
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": "lasttoken"}, "last_token"),
    ],
)
def test_old_flags_and_the_new_key_both_name_the_pooling(describe, settings, pooling):
    settings = {"word_embedding_dimension": 32, **settings}
    assert describe({"1_Pooling/config.json": settings}).pooling == pooling


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        {"pooling_mode": ["cls", "mean"]},
        {"pooling_mode_mean_sqrt_len_tokens": True},
        {"pooling_mode": "weightedmean"},
    ],
)
def test_a_pooling_that_the_runtime_lacks_is_an_error(describe, settings):
    with pytest.raises(ExportError, match="1_Pooling/config.json: pooling by .* not supported"):
        describe({"1_Pooling/config.json": settings})


def test_an_embedder_without_pooling_is_an_error_not_a_guess(describe, tmp_path):
    describe()
    with pytest.raises(ExportError, match="--pooling"):
        describe_checkpoint(ModelSpec(name="m"), tmp_path, None)
    assert describe_checkpoint(ModelSpec(name="m"), tmp_path, "last_token").pooling == "last_token"


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel"])
def test_a_masked_language_model_without_modules_is_told_what_makes_a_splade_of_it(describe, tmp_path, architecture):
    describe(config={"architectures": [architecture]})
    with pytest.raises(ExportError, match="--pooling") as raised:
        describe_checkpoint(ModelSpec(name="m"), tmp_path)
    assert ("SparseEncoder" in str(raised.value)) == (architecture == "BertForMaskedLM")


def modules(*names: str) -> list[dict]:
    """modules.json as sentence-transformers writes it."""
    return [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("names", [("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")])
def test_modules_json_says_whether_vectors_are_normalised(describe, names):
    assert describe({"modules.json": modules(*names)}).normalize == ("Normalize" in names)


def test_without_modules_json_the_catalog_says_whether_vectors_are_normalised(describe):
    assert describe().normalize
    assert not describe(normalize=False).normalize


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (None, "1_SpladePooling/config.json: no such file"),
        ({"pooling_strategy": "max", "activation_function": "log1p_relu"}, "only max pooling of relu"),
        ({"pooling_strategy": "sum"}, "only max pooling of relu"),
        ({"pooling_strategy": "max", "activation_function": "relu"}, None),
    ],
)
def test_a_splade_says_how_it_pools_and_any_way_but_ours_is_an_error(describe, settings, said):
    files = {"modules.json": modules("MLMTransformer", "SpladePooling")}
    files |= {"1_SpladePooling/config.json": settings} if settings else {}
    if said:
        with pytest.raises(ExportError, match=said):
            describe(files)
    else:
        assert describe(files).outputs == ("vocabulary_weights",)


@pytest.mark.parametrize("name", ["Normalize", "Pooling"])
def test_a_splade_with_a_further_module_is_an_error(describe, name):
    files = {"modules.json": modules("MLMTransformer", "SpladePooling", name)}
    with pytest.raises(ExportError, match=f"a SPLADE with the module {name} can't be exported"):
        describe(files | {"1_SpladePooling/config.json": {"pooling_strategy": "max"}})


def test_vectors_that_are_always_cut_are_an_error_that_says_how_to_cut_them(describe):
    files = {"config_sentence_transformers.json": {"truncate_dim": None}}
    assert describe(files).dim
    files["config_sentence_transformers.json"]["truncate_dim"] = 8
    with pytest.raises(ExportError, match="its truncate_dim .* pass truncate_dim=8 to encode"):
        describe(files)


def test_a_prompt_that_isnt_unicode_is_an_error(describe):
    with pytest.raises(ExportError, match="its query prompt 'requ.udceate: ' isn't valid Unicode"):
        describe({"config_sentence_transformers.json": {"prompts": {"query": "requ\udceate: "}}})


@pytest.mark.parametrize("name", ["Dense", "LayerNorm", "StaticEmbedding"])
def test_a_module_that_would_change_the_vectors_is_an_error(describe, name):
    with pytest.raises(ExportError, match=f"module {name} can't be exported"):
        describe({"modules.json": modules("Transformer", "Pooling", name)})


@pytest.mark.parametrize("kind", ["custom_st.Transformer", "sentence_transformersx.Normalize"])
def test_a_module_of_the_checkpoints_own_is_an_error_whatever_its_name(describe, kind):
    with pytest.raises(ExportError, match=f"module {kind} can't be exported"):
        describe({"modules.json": [*modules("Transformer"), {"type": kind, "path": ""}]})


def test_the_pooling_folder_is_the_one_that_modules_json_names(describe):
    listed = modules("Transformer", "Other", "Pooling")
    del listed[1]
    assert describe({"modules.json": listed, "2_Pooling/config.json": {"pooling_mode": "max"}, **CLS}).pooling == "max"


def test_prompts_come_from_the_checkpoint_under_our_names(describe):
    prompts = {"query": "q: ", "document": "d: ", "clustering": "c: "}
    files = {"config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": None}}
    assert describe(files, prompts={"query": "old"}).prompts == {"query": "q: ", "passage": "d: ", "clustering": "c: "}


@pytest.mark.parametrize(
    ("prompts", "passage"),
    [
        ({"passage": "p: ", "document": "d: "}, "d: "),
        ({"corpus": "c: ", "passage": "p: "}, "p: "),
        ({"corpus": "c: "}, "c: "),
        ({"document": "", "passage": "p: ", "query": "q: "}, None),  # present, if empty
    ],
)
def test_a_passages_prompt_is_the_one_that_sentence_transformers_takes(describe, prompts, passage):
    found = describe({"config_sentence_transformers.json": {"prompts": prompts}}).prompts
    assert found.get("passage") == passage
    assert found.keys() <= {"query", "passage"}


def test_the_users_prompts_win_each_by_itself_and_an_empty_one_is_none(describe, tmp_path):
    describe({"config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": "d: "}}})

    def prompts(**given):
        return describe_checkpoint(ModelSpec(name="m", pooling="cls"), tmp_path, prompts=given).prompts

    assert prompts(query="find: ") == {"query": "find: ", "passage": "d: "}
    assert prompts(passage="") == {"query": "q: "}
    assert prompts() == {"query": "q: ", "passage": "d: "}


def test_pooling_and_prompts_are_not_for_a_model_that_has_none(describe):
    config = {"architectures": ["BertForSequenceClassification"], "num_labels": 1}
    with pytest.raises(ExportError, match="logits, which nothing pools; leave out --pooling"):
        describe(pooling="cls", config=config)
    with pytest.raises(ExportError, match="a reranker, which has no prompts; leave out --query-prompt"):
        describe(given={"query": "find: "}, config=config)


def test_prompts_of_which_none_is_a_querys_are_warned_of(describe, caplog):
    describe({"config_sentence_transformers.json": {"prompts": {"query": "q: ", "sts": "s: "}}})
    assert not caplog.text
    files = {
        "config_sentence_transformers.json": {"prompts": {"web_search_query": "q: ", "sts": "s: ", "document": ""}}
    }
    describe(files, given={"query": "q: "})
    assert not caplog.text
    describe(files)
    assert "none of its prompts (web_search_query, sts) is called query" in caplog.text


def test_quantised_weights_are_refused(describe):
    with pytest.raises(ExportError, match="its weights are quantised .gptq.; export the model before that"):
        describe(config={"quantization_config": {"quant_method": "gptq", "bits": 4}})


def test_a_prompt_that_sentence_transformers_always_puts_is_said_to_be_left_out(describe, caplog):
    prompts = {"query": "q: ", "document": "", "retrieval": "r: "}
    for name, said in ((None, False), ("document", False), ("missing", False), ("retrieval", True)):
        caplog.clear()
        describe({"config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": name}})
        assert ("default prompt 'r: '" in caplog.text) == said
    caplog.clear()
    describe(given={"query": "q: ", "passage": ""})
    assert not caplog.text
    with pytest.raises(ExportError, match="default_prompt_name puts 'r: ' into every pair"):
        describe(config={"architectures": ["BertForSequenceClassification"], "num_labels": 1})


def test_half_of_m3s_heads_or_none_where_the_catalog_knows_of_them_is_an_error(describe, tmp_path):
    three = find_model("bge-m3").outputs
    with pytest.raises(ExportError, match="m gives more than dense vectors, but sparse_linear.pt and colb"):
        describe(outputs=three)
    (tmp_path / "sparse_linear.pt").touch()
    with pytest.raises(ExportError, match=r"has sparse_linear.pt but not colbert_linear.pt; add that"):
        describe()
    (tmp_path / "colbert_linear.pt").touch()
    assert describe(outputs=three).outputs == three


@pytest.mark.parametrize("name", ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"])
def test_max_length_is_read_under_all_names_that_sentence_transformers_knows(describe, name):
    assert describe({f"sentence_{name}_config.json": {"max_seq_length": 77}}).max_length == 77
    files = {"sentence_bert_config.json": {"max_seq_length": 66}, f"sentence_{name}_config.json": {}}
    assert describe(files).max_length == 66


@pytest.mark.parametrize("name", ["d_model", "n_embd"])
def test_dimensions_are_read_under_other_names_and_missing_ones_are_an_error(describe, name):
    assert describe(config={"hidden_size": None, name: 48}).dim == 48
    with pytest.raises(ExportError, match="config.json: none of hidden_size, .* says how long its vectors are"):
        describe(config={"hidden_size": None, name: None})


def test_a_splade_whose_output_matrix_is_its_own_is_refused(describe):
    files = {"modules.json": modules("MLMTransformer", "SpladePooling"), "1_SpladePooling/config.json": {}}
    with pytest.raises(ExportError, match="config.json: tie_word_embeddings is false"):
        describe(files, config={"tie_word_embeddings": False})


@pytest.mark.parametrize(
    "content", [{}, {"prompts": None}, {"prompts": {}}, {"prompts": {"query": "", "document": ""}}]
)
def test_prompts_that_say_nothing_leave_the_catalogs(describe, content):
    assert describe({"config_sentence_transformers.json": content}, prompts=EN).prompts == EN


def test_max_length_is_never_guessed_from_what_is_no_length(describe, tmp_path):
    for limit in (0, -5, float("nan")):
        with pytest.raises(ExportError, match="max_seq_length in sentence_bert_config.json"):
            describe({"sentence_bert_config.json": {"max_seq_length": limit}})
    assert describe({"sentence_bert_config.json": {"max_seq_length": None}}).max_length == 512
    assert describe({"tokenizer_config.json": {"model_max_length": 1e30}}).max_length == 512


def test_max_length_is_the_checkpoints_then_the_catalogs_then_the_tokenizers_then_all_positions(describe):
    assert describe().max_length == 512
    tokenizer = {"tokenizer_config.json": {"model_max_length": 100}}
    assert describe(tokenizer).max_length == 100
    assert describe(tokenizer, max_length=200).max_length == 200
    assert describe({"sentence_bert_config.json": {"max_seq_length": 300}}, max_length=200).max_length == 300


@given(
    limit=st.integers(1, 20_000) | st.just(int(1e30)),
    positions=st.integers(8, 9000),
    architecture=st.sampled_from(["bert", "distilbert", "xlm-roberta", "roberta", "mpnet"]),
    pad=st.integers(0, 3),
)
def test_max_length_never_exceeds_the_usable_positions(tmp_path_factory, limit, positions, architecture, pad):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = {"model_type": architecture, "hidden_size": 32, "max_position_embeddings": positions, "pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    pad = 1 if architecture == "mpnet" else pad  # transformers' MPNet doesn't read it
    usable = positions - (0 if architecture.endswith("bert") else pad + 1)
    assert describe_checkpoint(ModelSpec(name="m", pooling="cls"), folder, None).max_length == min(limit, usable)


def test_xlm_robertas_514_positions_hold_512_tokens(describe):
    config = {"model_type": "xlm-roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    assert describe(config=config, max_length=8192).max_length == 512


def test_architecture_and_dimensions_come_from_the_config(describe):
    spec = describe(config={"model_type": "distilbert", "hidden_size": None, "dim": 48}, architecture="bert", dim=7)
    assert (spec.architecture, spec.dim) == ("distilbert", 48)


def test_a_sequence_classifier_is_a_reranker_unless_modules_make_it_an_embedder(describe):
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert (describe(config=config).kind, describe(config=config).pooling) == ("reranker", None)
    embedder = describe({"modules.json": modules("Transformer", "Pooling")}, config=config)
    assert (embedder.kind, embedder.pooling) == ("embedder", "mean")
    assert describe({"modules.json": modules("Transformer")}, config=config).kind == "reranker"  # CrossEncoder's


@pytest.mark.parametrize(("names", "labels"), [({"num_labels": 1}, 1), ({}, 2), ({"num_labels": 3}, 3)])
def test_labels_without_names_are_counted_as_transformers_does(describe, names, labels):
    config = {"architectures": ["BertForSequenceClassification"]} | names
    if labels == 1:
        assert describe(config=config).outputs == ("logits",)
    else:
        with pytest.raises(ExportError, match=f"a classifier of {labels} labels"):
            describe(config=config)


def test_pooling_without_the_prompt_is_an_error(describe):
    with pytest.raises(ExportError, match="1_Pooling/config.json: include_prompt is false"):
        describe({"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}})
    assert describe({"1_Pooling/config.json": {"pooling_mode": "cls", "include_prompt": True}}).pooling == "cls"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("modules.json", "not json"),
        ("1_Pooling/config.json", "[]"),
        ("sentence_bert_config.json", "[]"),
    ],
)
def test_a_spoilt_json_file_is_named_in_a_clean_error(describe, name, content):
    with pytest.raises(ExportError, match=name):
        describe({name: content})


def test_a_folder_without_config_is_a_clean_error(tmp_path):
    with pytest.raises(ExportError, match="config.json: no such file"):
        describe_checkpoint(ModelSpec(name="m", pooling="cls"), tmp_path, None)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"processing_kwargs": {"text": {"max_length": 256}}}, "its processing_kwargs"),
        ({"query_length": 32}, "its query_length"),
        ({"tokenizer_args": {"padding_side": "left"}}, "its tokenizer_args"),
        ({"modality_config": {"text": {"method_output_name": ["hidden_states", -2]}}}, "its modality_config"),
        ({"modality_config": {"text": {}, "message": {}}}, "its modality_config has message, .* chat template, which"),
    ],
    ids=str,
)
def test_what_sentence_transformers_obeys_and_we_dont_is_refused(describe, setting, says):
    with pytest.raises(ExportError, match=f"sentence_bert_config.json: {says} can't be exported yet"):
        describe({"sentence_bert_config.json": setting})


def test_what_sentence_transformers_6_writes_is_read(describe):
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    written = {"transformer_task": "feature-extraction", "modality_config": {"text": text}, "processing_kwargs": {}}
    assert describe({"sentence_bert_config.json": written | {"max_seq_length": 128}}).max_length == 128
