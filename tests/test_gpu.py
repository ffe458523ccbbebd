"""What only a GPU can show; run by ``make test-gpu`` where there is one, with onnxruntime-gpu."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from conftest import make_checkpoint, save_unigram, sizes, tiny_bert_config, tiny_xlmr_config

from export.pipeline import export_model
from runtime import Embedder, Reranker, session
from runtime.session import choose_devices

pytestmark = pytest.mark.gpu

WORDS = ["river", "stone", "light", "apple", "horse", "tower", "green", "table", "music", "bread"]
TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(i % 60 if i % 9 else i)) for i in range(500)]
"""From none to 495 words, most of them short."""
ADVERSARIAL = ["", " ", "\0", "a" * 5000, "😀" * 300, "[SEP]" * 300, "[PAD] [PAD]", "\u202e" + "ab" * 40, "é̂" * 200]

ROUNDING = 4e-3
"""Most that a number of a unit vector differs when its text runs with others: fp16's rounding, some layers on."""


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with warnings.catch_warnings():  # of torch, about a driver that is too old for it
        warnings.simplefilter("ignore")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available():
            pytest.skip("needs onnxruntime-gpu and a GPU")


def large(heads: int, positions: int = 512) -> dict[str, int]:
    """A size of 6 layers and 384 dimensions."""
    return sizes(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=heads,
        intermediate_size=1536,
        max_position_embeddings=positions,
    )


MODELS = {
    "bert, mean, heads of 32": ("mean", lambda: transformers.BertConfig(**large(12))),
    "bert, cls, heads of 64": ("cls", lambda: transformers.BertConfig(**large(6))),
    "roberta, last token, heads of 64": ("last_token", lambda: transformers.RobertaConfig(**large(6, 514))),
    "roberta, mean, heads of 128": ("mean", lambda: transformers.RobertaConfig(**large(3, 514))),
    "mpnet, mean, heads of 32": ("mean", lambda: transformers.MPNetConfig(**large(12, 514))),
    "mpnet, cls, heads of 64": ("cls", lambda: transformers.MPNetConfig(**large(6, 514))),
}
"""Random models of each kernel that attention may take: by head size, and with a bias."""


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """The artifact of one of them, for texts of 512 tokens."""
    pooling, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = make_checkpoint(folder / "model", config(), pooling, spread=0.01)
    (checkpoint / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    return export_model(str(checkpoint), folder / "out", ["fp32", "fp16"])


def cosines(a, b):
    return (a.astype(np.float64) * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_the_export_was_verified_on_the_gpu(exported):
    assert exported.manifest.variants["fp16"].verified_on == "CUDAExecutionProvider"


@pytest.mark.parametrize(("variant", "mean", "least"), [("fp16", 0.9999, 0.999), ("fp32", 0.999999, 0.999999)])
def test_vectors_are_those_of_the_cpu(exported, variant, mean, least):
    found = Embedder(exported.path, variant, device="cuda").encode(TEXTS + ADVERSARIAL)
    assert np.isfinite(found).all()
    near = cosines(found, Embedder(exported.path, "fp32", device="cpu").encode(TEXTS + ADVERSARIAL))
    assert near.mean() >= mean
    assert near.min() >= least


def test_auto_takes_fp16_on_the_gpu(exported):
    embedder = Embedder(exported.path)
    assert embedder.variant == "fp16"
    assert embedder._opened.sessions[0].get_providers()[0] == "CUDAExecutionProvider"


def test_all_operators_run_on_the_gpu(exported, tmp_path, monkeypatch):
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    monkeypatch.setattr(onnxruntime, "SessionOptions", lambda: options)
    embedder = Embedder(exported.path, "fp16", device="cuda")
    embedder.encode(TEXTS[:9])
    events = json.loads(Path(embedder._opened.sessions[0].end_profiling()).read_text())
    profile = [event for event in events if "op_name" in event.get("args", {})]
    assert any(event["args"].get("provider") == "CUDAExecutionProvider" for event in profile)
    assert not any("Memcpy" in event["args"]["op_name"] for event in profile)
    on_cpu = {event["args"]["op_name"] for event in profile if event["args"].get("provider") == "CPUExecutionProvider"}
    assert on_cpu <= ({"Gather", "Squeeze"} if exported.manifest.architecture == "mpnet" else set())  # of shapes


def test_a_vector_depends_on_its_company_no_more_than_fp16_rounds(exported):
    embedder = Embedder(exported.path, "fp16", device="cuda")
    together = embedder.encode(TEXTS)
    alone = np.array([embedder.encode(text) for text in TEXTS])
    assert np.abs(together - alone).max() <= ROUNDING
    assert cosines(together, alone).min() >= 0.9999


def test_a_reranker_and_bge_m3_agree_with_the_cpu(tmp_path):
    folder = make_checkpoint(
        tmp_path / "r", tiny_bert_config(num_labels=1), None, "ForSequenceClassification", spread=0.3
    )
    artifact = export_model(str(folder), tmp_path / "reranker", ["fp32", "fp16"]).path
    pairs = [("a river of light", text) for text in TEXTS[:100]]
    expected = Reranker(artifact, "fp32", device="cpu").compute_score(pairs)
    np.testing.assert_allclose(Reranker(artifact, device="cuda").compute_score(pairs), expected, atol=5e-2)
    folder = make_checkpoint(tmp_path / "m3", tiny_xlmr_config(), "cls", tokenizer=save_unigram)
    for name, width in (("sparse_linear", 1), ("colbert_linear", 32)):
        torch.save(torch.nn.Linear(32, width).state_dict(), folder / f"{name}.pt")
    parity = export_model(str(folder), tmp_path / "out", ["fp32", "fp16"]).manifest.variants["fp16"].parity
    assert min(parity.cosine_min, parity.colbert_cosine_min, parity.sparse_cosine_mean) > 0.999


def test_out_of_gpu_memory_halves_runs_and_goes_on(exported, monkeypatch, caplog):
    expected = Embedder(exported.path, "fp16", device="cuda").encode(TEXTS * 20)
    monkeypatch.setitem(session.CUDA_OPTIONS, "gpu_mem_limit", str(120 * 2**20))
    embedder = Embedder(exported.path, "fp16", device="cuda")
    assert np.abs(embedder.encode(TEXTS * 20) - expected).max() <= ROUNDING
    assert sum("runs are halved" in record.message for record in caplog.records) == 1


def test_callers_at_once_get_what_each_gets_alone(exported):
    embedder = Embedder(exported.path, "fp16", device="cuda")
    alone = np.array([embedder.encode(text) for text in TEXTS])
    with ThreadPoolExecutor(8) as pool:
        together = np.array(list(pool.map(embedder.encode, TEXTS)))
    assert np.abs(together - alone).max() <= ROUNDING


def test_several_gpus_share_the_work(exported):
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    assert choose_devices(gpus) == tuple(gpus)
    embedder = Embedder(exported.path, "fp16", device=gpus)
    assert len(embedder._opened.sessions) == len(gpus)
    alone = Embedder(exported.path, "fp16", device="cuda").encode(TEXTS)
    assert np.abs(embedder.encode(TEXTS) - alone).max() <= ROUNDING
