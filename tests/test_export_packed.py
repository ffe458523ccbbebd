"""fp16 for CUDA: what can be seen of it without a GPU, through the stand-in that runs on any provider."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import (
    make_checkpoint,
    make_splade,
    save_unigram,
    sizes,
    tiny_bert_config,
    tiny_xlmr_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ExportError
from export.graph import load_graph
from export.packed import find_carrier, on_any_provider
from export.pipeline import build_fp16, export_model, find_encoder, write_stand_in
from export.source import resolve_source
from runtime import ArtifactError, Embedder, ProviderError, Reranker, RunError
from runtime.lanes import Lanes
from runtime.manifest import Packing
from runtime.model import IN_FLIGHT, Batch
from runtime.packing import pack
from runtime.session import Gate, OutOfMemoryError

CONFIGS = {
    "bert": tiny_bert_config,
    "roberta": lambda **changes: transformers.RobertaConfig(**sizes(max_position_embeddings=66) | changes),
    "xlm-roberta": tiny_xlmr_config,
    "distilbert": lambda **changes: transformers.DistilBertConfig(
        vocab_size=1000, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64, **changes
    ),
    "mpnet": lambda **changes: transformers.MPNetConfig(**sizes(max_position_embeddings=66) | changes),
}
WIDE = {"hidden_size": 128}
"""Enough dimensions for weights to carry a bias."""
TEXTS = ["a river of light", "", "bread", "the light of the river and the bread of the day", "a river", "bread"]


def checkpoint_of(folder, family, pooling="mean", head="Model", **changes):
    tokenizer = {"tokenizer": save_unigram} if family == "xlm-roberta" else {}
    return make_checkpoint(folder / family, CONFIGS[family](**changes), pooling, head, **tokenizer)


def exported(checkpoint, folder):
    """The artifact of fp32 and fp16, and the stand-in of fp16."""
    artifact = export_model(str(checkpoint), folder / "out", ["fp32", "fp16"])
    stand_in = folder / "stand-in"
    stand_in.mkdir()
    return artifact, write_stand_in(artifact.path, artifact.manifest, "fp16", stand_in)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return exported(checkpoint_of(folder, "bert"), folder)


@pytest.fixture(scope="module")
def stand_in(bert):
    return Embedder(bert[1], "fp16", device="cpu")


@pytest.fixture
def on_a_gpu(bert):
    """The stand-in, run as on two GPUs: packed, tokenised ahead, several runs at once."""
    embedder = Embedder(bert[1], "fp16", device="cpu")
    embedder._devices = ("cuda:0", "cuda:1")
    embedder._opened.sessions *= 2
    embedder._opened.lanes = Lanes(embedder._opened.sessions * IN_FLIGHT, lasting=True)
    return embedder


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last_token"])
def test_an_embedder_has_the_vectors_of_transformers(family, pooling, tmp_path):
    if pooling == "last_token" and family != "bert":
        pytest.skip("pooling is the same for all")
    artifact, _ = exported(checkpoint_of(tmp_path, family, pooling), tmp_path)
    fp16 = artifact.manifest.variants["fp16"]
    assert fp16.parity.cosine_min > 0.99999
    assert fp16.providers == ("CUDAExecutionProvider",)
    assert fp16.verified_on == "CPUExecutionProvider"
    assert fp16.packing == Packing(padding_id=1 if family in ("roberta", "xlm-roberta", "mpnet") else None)
    sizes_ = {name: artifact.manifest.files[v.file].size for name, v in artifact.manifest.variants.items()}
    assert sizes_["fp16"] < 0.7 * sizes_["fp32"]


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("family", CONFIGS)
def test_a_reranker_has_the_logits_of_transformers(family, tmp_path):
    folder = checkpoint_of(tmp_path, family, None, "ForSequenceClassification", num_labels=1)
    artifact, stand_in = exported(folder, tmp_path)
    assert artifact.manifest.variants["fp16"].parity.score_max_diff < 2e-2
    pairs = [("a river", text) for text in TEXTS]
    scores = Reranker(artifact.path, "fp32").compute_score(pairs)
    np.testing.assert_allclose(Reranker(stand_in).compute_score(pairs), scores, atol=2e-2)


def test_bge_m3_has_its_three_ways(tmp_path):
    folder = checkpoint_of(tmp_path, "xlm-roberta")
    for name, width in (("sparse_linear", 1), ("colbert_linear", 32)):
        torch.save(torch.nn.Linear(32, width).state_dict(), folder / f"{name}.pt")
    artifact, stand_in = exported(folder, tmp_path)
    parity = artifact.manifest.variants["fp16"].parity
    assert min(parity.cosine_min, parity.colbert_cosine_min, parity.sparse_cosine_mean) > 0.99999
    ways = dict(return_dense=True, return_sparse=True, return_colbert_vecs=True)
    expected = Embedder(artifact.path, "fp32").encode(TEXTS, **ways)
    found = Embedder(stand_in).encode(TEXTS, **ways)
    np.testing.assert_allclose(found["dense_vecs"], expected["dense_vecs"], atol=1e-3)
    for i in range(len(TEXTS)):
        np.testing.assert_allclose(found["colbert_vecs"][i], expected["colbert_vecs"][i], atol=2e-3)
        assert found["lexical_weights"][i] == pytest.approx(expected["lexical_weights"][i], abs=1e-2)


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_a_padding_token_written_in_a_text_takes_no_place(family, tmp_path):
    folder = checkpoint_of(tmp_path, family, "cls")
    graph, packing = build_fp16(checkpoint := resolve_source(str(folder)), find_encoder(checkpoint))
    on_any_provider(graph).save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    texts = [[5, 9, 1, 77, 1, 1, 13], [8, 8, 1, 500]]
    feeds = pack(texts, padding_id=packing.padding_id)
    found = session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})[0]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    for text, vector in zip(texts, found, strict=True):
        with torch.inference_mode():
            ones = torch.ones(1, len(text))
            expected = model(torch.tensor([text]), attention_mask=ones).last_hidden_state[0, 0]
        np.testing.assert_allclose(vector, expected.numpy(), atol=5e-3)


def test_the_graph_is_packed_fp16_without_needless_biases(tmp_path):
    artifact, _ = exported(checkpoint_of(tmp_path, "bert", **WIDE), tmp_path)
    graph = load_graph(artifact.path / "model.fp16.onnx")
    operators = [node.op_type for node in graph.nodes]
    assert operators.count("PackedMultiHeadAttention") == 2
    assert operators.count("BiasGelu") == 2
    assert operators.count("SkipLayerNormalization") == 5
    assert not {"Attention", "MultiHeadAttention", "LayerNormalization", "Shape"} & set(operators)
    for node in graph.nodes:
        if node.op_type == "PackedMultiHeadAttention":
            assert list(node.input[3:]) == ["", "token_offset", "cumulative_lengths"]
            assert {attribute.name: attribute.i for attribute in node.attribute} == {"num_heads": 4}
    floats = {name: load().dtype for name, load in graph.weights.items() if load().dtype.kind == "f"}
    assert set(floats.values()) == {np.dtype(np.float16)}
    assert not {f"layer.{i}.{part}.bias" for i in (0, 1) for part in ("query", "key", "value")} & set(floats)
    assert {entry.type.tensor_type.elem_type for entry in graph.outputs} == {1}  # float32


def spoilt(folder, least):
    """A checkpoint with large biases and shifts, and scales of the norms down to the least."""
    model = transformers.AutoModel.from_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    for name, held in model.named_parameters():
        if name.endswith("bias"):
            held.data = torch.randn(held.shape, generator=draw) * (0.3 if "LayerNorm" in name else 1)
        elif "LayerNorm" in name:
            held.data = least + torch.rand(held.shape, generator=draw) * (1 - least)
            held.data[::2] *= -1
            held.data[0] = least
    model.save_pretrained(folder)


def query_biases(artifact):
    return [name for name in load_graph(artifact.path / "model.fp16.onnx").weights if name.endswith("query.bias")]


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize(("least", "carried"), [(0.3, (0, 1)), (1e-3, (1,)), (0.0, ())])
def test_weights_carry_the_queries_bias_where_fp16_allows(least, carried, tmp_path):
    checkpoint = checkpoint_of(tmp_path, "bert", **WIDE)
    spoilt(checkpoint, least)
    artifact, _ = exported(checkpoint, tmp_path)
    assert artifact.manifest.variants["fp16"].parity.cosine_min > 0.99999
    assert query_biases(artifact) == [f"layer.{i}.query.bias" for i in (0, 1) if i not in carried]


def carrier_of(scale, shift):
    held = {"n.weight": np.float32(scale), "n.bias": np.float32(shift)}
    return find_carrier(SimpleNamespace(hidden=len(scale)), lambda name: lambda: held[name], "n")


def test_no_bias_is_carried_less_exactly_than_fp16_rounds():
    """In few dimensions rounding alone spoils the sum that carries it, and so do scales of about 0 in many."""
    assert carrier_of(np.ones(32), np.zeros(32)) is None
    assert carrier_of(np.ones(128), np.zeros(128)) is not None
    assert carrier_of(np.r_[np.ones(127), 1e-7], np.zeros(128)) is None
    draw = np.random.default_rng(0)
    scale, shift = draw.uniform(0.1, 1.5, 384), draw.normal(0, 0.2, 384)
    carrier = carrier_of(scale, shift)
    z = draw.normal(size=(1000, 384))
    z = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    states = (z * scale.astype(np.float16) + carrier.raised).astype(np.float16)
    assert np.sqrt(((states @ carrier.ones - 1) ** 2).mean()) < 2**-11
    np.testing.assert_allclose(carrier.raised - carrier.lift, shift, atol=1e-7)


@pytest.mark.usefixtures("few_texts")
@pytest.mark.parametrize("family", ["roberta", "mpnet"])
@pytest.mark.parametrize("pooling", ["cls", "mean", None])
def test_lifted_states_change_nothing_whoever_reads_them(family, pooling, tmp_path):
    """A residual, attention with a bias, the last layer's first states, a score head."""
    head = {} if pooling else {"head": "ForSequenceClassification", "num_labels": 1}
    artifact, _ = exported(checkpoint_of(tmp_path, family, pooling, **head, **WIDE), tmp_path)
    assert query_biases(artifact) == []
    parity = artifact.manifest.variants["fp16"].parity
    assert parity.cosine_min > 0.99999 if pooling else parity.score_max_diff < 3e-3


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(len(TEXTS))), count=st.integers(1, len(TEXTS)))
def test_a_vector_depends_on_no_other_text(stand_in, order, count):
    """Of the stand-in within float32's rounding; on a GPU within fp16's (tests/test_gpu.py)."""
    alone = np.array([stand_in.encode(text) for text in TEXTS])
    some = list(order[:count])
    np.testing.assert_allclose(stand_in.encode([TEXTS[i] for i in some]), alone[some], atol=1e-5)


def test_single_queries_take_turns_on_all_gpus(on_a_gpu, monkeypatch):
    used, run = [], on_a_gpu._run_batch
    monkeypatch.setattr(on_a_gpu, "_run_batch", lambda *given: used.append(given[2]) or run(*given))
    second = Embedder(on_a_gpu._folder, "fp16", "cpu")._opened.sessions
    on_a_gpu._opened.sessions = on_a_gpu._opened.sessions[:1] + second
    for _ in range(4):
        on_a_gpu.encode("a text")
    assert used == [*on_a_gpu._opened.sessions] * 2


def test_a_query_alone_starts_no_thread(on_a_gpu, monkeypatch):
    monkeypatch.setattr("runtime.model.ThreadPoolExecutor", None)
    monkeypatch.setattr("runtime.lanes.ThreadPoolExecutor", None)
    monkeypatch.setattr(on_a_gpu._opened, "lanes", None)
    on_a_gpu.encode("a text")


def test_a_text_beyond_fp16_is_an_error_that_names_it_and_no_others_trouble(bert, tmp_path):
    """In mean pooling, which is a product, one text's infinity makes all vectors of its run NaN."""
    shutil.copytree(bert[1], folder := tmp_path / "infinite")
    graph = load_graph(bert[1] / "model.fp16.onnx")
    words = graph.weights["embeddings.word"]().copy()
    words[Embedder(bert[1], "fp16", "cpu")._tokenizer.encode(["zzz"])[0][1]] = np.inf
    graph.weights["embeddings.word"] = lambda: words
    graph.save(folder / "model.fp16.onnx")
    embedder = Embedder(folder, "fp16", "cpu", verify=False)
    assert np.isfinite(embedder.encode(TEXTS)).all()
    with pytest.raises(RunError, match="zzz' is beyond the range of fp16; pass variant='fp32'"):
        embedder.encode([*TEXTS[:4], "bread zzz", *TEXTS[4:]])


def test_a_run_planned_before_the_limit_fell_is_split_without_being_tried(stand_in, monkeypatch):
    rows = [[2, 5, 6, 3]] * 10
    batch, gate = Batch(np.arange(10), rows, None), stand_in._opened.gate
    whole = stand_in._run_batch(["sentence_embedding"], gate, stand_in._opened.sessions[0], batch)[0]
    monkeypatch.setattr(stand_in, "_tokens", 16)
    parts = stand_in._run_batch(["sentence_embedding"], gate, stand_in._opened.sessions[0], batch)[0]
    assert len(whole) == 1
    assert [len(run[0]) for run in parts] == [2, 3, 2, 3]
    np.testing.assert_allclose(np.concatenate([run[2][0] for run in parts]), whole[0][2][0], atol=1e-6)


def test_a_text_that_lacks_memory_beside_others_gets_all_of_it(on_a_gpu, monkeypatch):
    """As it does on a GPU whose memory the run at its side has taken (tests/test_gpu.py)."""
    run, running, most, lacked = on_a_gpu._run_whole, set(), 12, []

    def whole(outputs, session, batch, total, **options):
        running.add(batch[0][0])
        try:
            time.sleep(0.002)  # so that others come
            if total > most or (len(batch[0]) == 1 and len(running) > 1):
                lacked.append(len(batch[0]))
                raise OutOfMemoryError("no memory")
            return run(outputs, session, batch, total, **options)
        finally:
            running.discard(batch[0][0])

    expected = np.array([on_a_gpu.encode(text) for text in TEXTS[:3] * 20])
    monkeypatch.setattr(on_a_gpu, "_run_whole", whole)
    monkeypatch.setattr(on_a_gpu, "_tokens", 16)
    np.testing.assert_allclose(on_a_gpu.encode(TEXTS[:3] * 20), expected, atol=1e-5)
    assert 1 in lacked
    most = 2
    with pytest.raises(OutOfMemoryError, match="no memory"):
        on_a_gpu.encode(TEXTS)


def test_a_pack_that_lacks_memory_is_halved(on_a_gpu, monkeypatch):
    def scarce(ids, *rest):
        if len(ids) > 3:
            raise MemoryError
        return pack(ids, *rest)

    monkeypatch.setattr("runtime.model.AHEAD", 8)
    texts = TEXTS * 6
    expected = on_a_gpu.encode(texts)
    monkeypatch.setattr("runtime.model.pack", scarce)
    np.testing.assert_allclose(on_a_gpu.encode(texts), expected, atol=1e-5)


def test_a_graph_that_isnt_packed_runs_once_at_a_time_on_a_gpu(tiny_artifact, monkeypatch):
    """Of graphs that optimum traced, two streams can upset an operator."""
    embedder, running = Embedder(tiny_artifact, "fp32", device="cpu"), []
    expected = embedder.encode(TEXTS)
    embedder._devices = ("cuda:0",)
    embedder._opened.lanes = Lanes(embedder._opened.sessions, lasting=True)
    run = embedder._run_whole

    def whole(*given, **options):
        running.append(given)
        assert len(running) == 1
        time.sleep(0.001)
        try:
            return run(*given, **options)
        finally:
            running.pop()

    monkeypatch.setattr(embedder, "_run_whole", whole)
    with ThreadPoolExecutor(4) as callers:
        for found in callers.map(embedder.encode, [TEXTS, TEXTS[:1]] * 6):
            np.testing.assert_allclose(found, expected[: len(found)], atol=1e-6)


def test_a_text_that_lacks_memory_alone_gets_what_failed_runs_left_in_store(on_a_gpu, monkeypatch):
    run, given_back = on_a_gpu._run_whole, []

    def whole(*arguments, shrink=False):
        if not given_back:
            given_back.extend([True] * shrink)
            raise OutOfMemoryError("no memory")
        return run(*arguments, shrink=shrink)

    expected = on_a_gpu.encode("a river")
    monkeypatch.setattr(on_a_gpu, "_run_whole", whole)
    np.testing.assert_allclose(on_a_gpu.encode("a river"), expected, atol=1e-5)
    assert given_back == [True]


def test_a_gate_lets_one_alone_or_many_beside_each_other():
    gate, inside, seen = Gate(), [], []

    def go(number):
        for turn in range(50):
            with contextlib.suppress(ValueError), gate.entered(alone=(number + turn) % 5 == 0):
                inside.append(number)
                time.sleep(0.0002)
                seen.append((len(inside), (number + turn) % 5 == 0))
                inside.remove(number)
                if turn % 7 == 0:
                    raise ValueError

    threads = [Thread(target=go, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert all(count == 1 for count, alone in seen if alone)
    assert max(count for count, alone in seen if not alone) > 1


def test_who_is_interrupted_while_waiting_alone_keeps_nobody_out(monkeypatch):
    gate = Gate()

    def interrupted(_):
        raise KeyboardInterrupt

    with gate.entered():
        monkeypatch.setattr(gate._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), gate.entered(alone=True):
            pass
        monkeypatch.undo()
    with gate.entered(), gate.entered():
        pass
    with gate.entered(alone=True):
        pass


def test_a_small_run_that_lacks_memory_lowers_no_limit(stand_in, monkeypatch):
    run, tried = stand_in._run_whole, []

    def whole(*arguments, **options):
        tried.append(arguments)
        if len(tried) == 1:
            raise OutOfMemoryError("no memory")
        return run(*arguments, **options)

    limit, expected = stand_in._tokens, stand_in.encode(TEXTS)
    monkeypatch.setattr(stand_in, "_run_whole", whole)
    np.testing.assert_allclose(stand_in.encode(TEXTS), expected, atol=1e-5)
    assert len(tried) == 3
    assert stand_in._tokens == limit


def test_small_pieces_share_a_packed_run(on_a_gpu, monkeypatch):
    planned, first = [], []
    run = on_a_gpu._run_batch
    monkeypatch.setattr("runtime.model.AHEAD", 4)
    monkeypatch.setattr(on_a_gpu, "_tokens", 128)

    def noted(*given):
        (first if 0 in given[-1].places else planned).append(sum(map(len, given[-1].ids)))
        return run(*given)

    monkeypatch.setattr(on_a_gpu, "_run_batch", noted)
    texts = [TEXTS[i % len(TEXTS)] for i in range(200)]
    found = on_a_gpu.encode(texts)
    assert len(first) == 1  # for which the GPU waits
    assert max(planned) <= 128
    assert sum(tokens < 64 for tokens in planned) <= 1  # the last
    np.testing.assert_allclose(found, np.array([on_a_gpu.encode(text) for text in texts]), atol=1e-5)


def test_only_want_of_memory_halves_a_run(stand_in, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "runtime.model.pack",
        lambda ids, *_: tried.append(len(ids)) or {name: np.zeros(3, np.float64) for name in pack([[1]])},
    )
    limit = stand_in._tokens
    with pytest.raises(RunError, match=r"onnxruntime failed on 6 texts .* export the model again"):
        stand_in.encode(TEXTS)
    assert tried == [6]
    assert stand_in._tokens == limit


def test_auto_runs_a_variant_on_the_cpu_that_no_gpu_runs(tiny_artifact, edited, monkeypatch):
    monkeypatch.setattr("runtime.model.choose_devices", lambda device: ("cuda:0",))
    on_cpus = edited(tiny_artifact, lambda m: m["variants"]["fp32"].update(providers=["CPUExecutionProvider"]))
    assert Embedder(on_cpus).encode("a text").shape == (32,)
    with pytest.raises(ArtifactError, match="its fp32 doesn't run on cuda:0; pass another"):
        Embedder(on_cpus, device="cuda")
    assert Embedder(tiny_artifact, "int8").encode("a text").shape == (32,)
    with pytest.raises(ArtifactError, match="its int8 doesn't run on cuda:0"):
        Embedder(tiny_artifact, "int8", device="cuda")


def test_texts_are_tokenised_ahead_and_come_back_in_order(on_a_gpu, monkeypatch):
    monkeypatch.setattr("runtime.model.AHEAD", 4)
    monkeypatch.setattr(on_a_gpu, "_tokens", 64)
    texts = [f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(100)]
    found = on_a_gpu.encode(texts)
    expected = np.array([on_a_gpu.encode(text) for text in texts])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_texts_that_are_cut_are_logged_once_a_call(on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr("runtime.model.AHEAD", 4)
    with caplog.at_level(logging.WARNING, "runtime"):
        on_a_gpu.encode(["fine", "river " * 100] * 20)
    assert [record.getMessage() for record in caplog.records] == ["20 of 40 texts had more than 64 tokens and were cut"]


def test_a_text_that_fails_ahead_is_named_by_its_place(on_a_gpu, monkeypatch):
    monkeypatch.setattr("runtime.model.AHEAD", 4)
    with pytest.raises(ValueError, match="text 77 has a lone surrogate"):
        on_a_gpu.encode(["fine"] * 77 + ["\ud800"] + ["fine"] * 20)


def test_on_a_gpu_the_runtime_knows_which_token_ids_the_graph_knows(on_a_gpu):
    """CUDA takes an unknown one for a word without a meaning."""
    on_a_gpu.manifest = dataclasses.replace(on_a_gpu.manifest, vocab=100)
    with pytest.raises(ArtifactError, match=r"token id \d+ is not in the graph's vocabulary of 100"):
        on_a_gpu.encode(TEXTS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_cant_use_its_parents_gpu_and_says_so(on_a_gpu):
    on_a_gpu._opened.process += 1  # as it is in a child
    with pytest.raises(ProviderError, match="can't be used in a forked process; start it with multiprocessing's spawn"):
        on_a_gpu.encode("a text")


@pytest.mark.parametrize("family", ["bert", "roberta", "mpnet"])
def test_a_graph_fails_on_a_cpu_only_for_want_of_the_packed_attention(family, tmp_path):
    """ONNX Runtime has then checked all types, which the stand-in can't show."""
    folder = checkpoint_of(tmp_path, family)
    graph, _ = build_fp16(checkpoint := resolve_source(str(folder)), find_encoder(checkpoint))
    graph.save(tmp_path / "m.onnx")
    with pytest.raises(
        Exception, match=r"kernel for com\.microsoft\.PackedMultiHeadAttention|implementation for Packed"
    ):
        onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])


def test_fp16_on_a_cpu_is_an_error_that_names_what_runs_there(bert):
    with pytest.raises(ArtifactError, match="its fp16 doesn't run on cpu, only fp32 does"):
        Embedder(bert[0].path, "fp16", device="cpu")
    assert Embedder(bert[0].path, device="cpu").variant == "fp32"


def test_a_run_that_is_too_large_is_halved_until_it_fits(bert, start, tmp_path):
    """The stand-in's memory grows with the square of a run's tokens, so that halves fit where the whole doesn't."""
    code = """
import logging, resource, sys
import numpy as np
from runtime import Embedder
logging.basicConfig(format="%(message)s")
embedder = Embedder(sys.argv[1], device="cpu", threads=1)
texts = [f"a river of light and bread {i}" for i in range(300)]
expected = np.array([embedder.encode(text) for text in texts])
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 120_000_000, resource.RLIM_INFINITY))
for _ in range(2):
    print(np.abs(embedder.encode(texts) - expected).max(), embedder._tokens)
"""
    process = start("-c", code, bert[1], TOKENIZERS_PARALLELISM="false")
    printed, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    for line in printed.splitlines():
        difference, tokens = map(float, line.split())
        assert difference < 1e-5
        assert tokens < 2048
    assert error.count("runs are halved") == 1


@pytest.mark.parametrize(
    ("family", "pooling", "message"),
    [
        ("bert", "max", "fp16 doesn't do max pooling yet"),
        ("modernbert", "cls", "fp16 isn't built for 'modernbert' yet"),
    ],
)
def test_what_cant_be_packed_is_an_error_with_the_cure(family, pooling, message, tmp_path):
    if family == "modernbert":
        config = transformers.ModernBertConfig(
            **sizes(), pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
        )
        folder = make_checkpoint(tmp_path / family, config, pooling)
    else:
        folder = checkpoint_of(tmp_path, family, pooling)
    with pytest.raises(ExportError, match=f"{message}; leave it out with --variants fp32,int8"):
        export_model(str(folder), tmp_path / "out", ["fp16"])
    assert not (tmp_path / "out").exists()


def test_splade_in_fp16_is_an_error_with_the_cure(tmp_path):
    folder = make_splade(make_checkpoint(tmp_path / "splade", tiny_bert_config(), None, head="ForMaskedLM"))
    with pytest.raises(ExportError, match="fp16 doesn't do SPLADE yet"):
        export_model(str(folder), tmp_path / "out", ["fp16"])


def test_a_weight_beyond_fp16_is_an_error_that_names_it(tmp_path):
    folder = checkpoint_of(tmp_path, "bert")
    model = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = 1e6
    model.save_pretrained(folder)
    with pytest.raises(ExportError, match=r"weight layer\.1\.down\.weight is beyond fp16's range"):
        export_model(str(folder), tmp_path / "out", ["fp16"])


def test_packing_is_part_of_the_manifest(bert):
    manifest = json.loads((bert[0].path / "manifest.json").read_text("utf-8"))
    assert manifest["variants"]["fp16"]["packing"] == {"padding_id": None}
    assert manifest["variants"]["fp32"]["packing"] is None
    assert dataclasses.asdict(bert[0].manifest.variants["fp16"].packing) == {"padding_id": None}
