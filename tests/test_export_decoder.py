"""Decoders as embedders: transformers' vectors, the same bits in any batch, and memory that grows as a text does."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import graph_of, int8_of, make_checkpoint, save_bytes, sizes

from export import pipeline
from export.errors import ExportError
from export.families import find_family
from export.pipeline import export_model
from runtime import BgeOnnxError, Embedder
from runtime.session import create_session

pytestmark = pytest.mark.usefixtures("few_texts")

SIZES = sizes(hidden_size=64, num_key_value_heads=2, max_position_embeddings=512)
CONFIGS = {
    "qwen2": lambda **changes: transformers.Qwen2Config(**SIZES | changes),
    "qwen3": lambda **changes: transformers.Qwen3Config(**SIZES | {"head_dim": 32} | changes),
    "mistral": lambda **changes: transformers.MistralConfig(**SIZES | changes),
}
SHAPES = [
    *((family, {}) for family in CONFIGS),
    ("qwen3", {"attention_bias": True, "rope_theta": 1e6}),
    ("qwen2", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    ("mistral", {"sliding_window": 7, "head_dim": 48, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {"hidden_size": 48, "num_attention_heads": 5, "num_key_value_heads": 5}),
]
BLOCKS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
BLOCKS |= {"max_position_embeddings": 1300}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A function that makes a decoder's checkpoint, once for each, which pools by its last token."""
    made = {}

    def make(family: str, pooling: str | None = "last_token", head: str = "Model", **changes):
        key = family, pooling, head, *changes.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / family
            made[key] = make_checkpoint(folder, CONFIGS[family](**changes), pooling, head, tokenizer=save_bytes)
        return made[key]

    return make


def opened(graph, path):
    """A session of a graph."""
    graph.save(path)
    return create_session(path, "cpu", 2)


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_a_decoder_is_built_and_has_the_vectors_of_transformers(checkpoint, tmp_path, family, changes):
    artifact = export_model(str(checkpoint(family, **changes)), tmp_path / "out")
    manifest = artifact.manifest
    assert manifest.variants["fp32"].parity.cosine_min > 0.99999
    assert manifest.variants["int8"].parity.cosine_mean > 0.99
    dim = changes.get("hidden_size", 64)
    assert (manifest.kind, manifest.pooling, manifest.dim) == ("embedder", "last_token", dim)
    assert Embedder(artifact.path).encode(["a text", ""]).shape == (2, dim)


@pytest.mark.parametrize(
    ("family", "changes", "tokens"),
    [
        *((*shape, tokens) for shape in SHAPES for tokens in (1, 2, 17, 300)),
        *(("mistral", BLOCKS | {"sliding_window": window}, 1200) for window in (None, 500, 1100)),  # of flash attention
    ],
)
def test_all_states_are_those_of_transformers_in_any_batch(checkpoint, tmp_path, family, changes, tokens):
    folder = checkpoint(family, **changes)
    ids = np.random.default_rng(tokens).integers(0, 900, (3, tokens))
    session = opened(graph_of(folder)[0], tmp_path / "m.onnx")
    ours = session.run(None, {"input_ids": ids})[0]
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs = model(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    for i in range(3):
        np.testing.assert_array_equal(session.run(None, {"input_ids": ids[i : i + 1]})[0][0], ours[i])


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_checkpoint_is_that_of_its_decoder(checkpoint, tmp_path, tied):
    folder = checkpoint("qwen3", head="ForCausalLM", tie_word_embeddings=tied)
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].parity.cosine_min > 0.99999


@pytest.mark.parametrize(("family", "changes"), SHAPES)
def test_pooled_by_its_last_token_it_makes_no_other_last_states_and_the_same_bits_in_any_batch(
    checkpoint, tmp_path, family, changes
):
    folder = checkpoint(family, **changes)
    fp32, draw = graph_of(folder, "last_token")[0], np.random.default_rng(0)
    texts = [(draw.integers(0, 900, 30).tolist(), [0] * 30) for _ in range(60)]
    int8 = int8_of(fp32, texts)
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in int8.nodes) == 7 * 2
    assert not any(node.op_type == "Gemm" for node in int8.nodes)
    normed = {node.output[0] for node in int8.nodes if node.op_type == "SimplifiedLayerNormalization"}
    assert not any(node.op_type == "Mul" and normed.intersection(node.input) for node in int8.nodes)  # none to smooth
    whole = opened(graph_of(folder)[0], tmp_path / "whole.onnx")
    fp32, int8 = opened(fp32, tmp_path / "fp32.onnx"), opened(int8, tmp_path / "int8.onnx")
    for count, tokens in ((1, 1), (5, 7), (2, 60), (3, 300)):
        ids = draw.integers(0, 900, (count, tokens))
        states, vectors, rounded = (session.run(None, {"input_ids": ids})[0] for session in (whole, fp32, int8))
        np.testing.assert_allclose(vectors, states[:, -1], atol=1e-5)
        for session, together in ((fp32, vectors), (int8, rounded)):
            alone = [session.run(None, {"input_ids": ids[i : i + 1]})[0][0] for i in range(count)]
            np.testing.assert_array_equal(together, alone)


def test_int8_keeps_texts_whose_first_token_is_ten_thousand_times_as_large_behind_the_gate(checkpoint, tmp_path):
    """As a trained decoder's is; here the first dimension is that of token 1 alone, and the gate opens by it."""
    folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "large")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        match name.split(".")[-2]:
            case "embed_tokens":
                weight[:, 0], weight[1] = 0, np.eye(64)[0]
            case "gate_proj" | "up_proj":
                weight[:] = np.where(np.arange(64), 10 * weight, 20)
            case "v_proj":
                weight[:, 0] = 0
            case "o_proj" | "down_proj":
                weight[0] = 0
    safetensors.numpy.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    fp32, draw = graph_of(folder)[0], np.random.default_rng(0)
    texts = [([1, *draw.integers(2, 900, 30).tolist()], [0] * 31) for _ in range(60)]
    int8 = int8_of(fp32, texts)
    fed = {"input_ids": np.array([ids for ids, _ in texts])}
    found = [opened(graph, tmp_path / f"{i}.onnx").run(None, fed)[0][:, 1:] for i, graph in enumerate((fp32, int8))]
    a, b = (states / np.linalg.norm(states, axis=-1, keepdims=True) for states in found)
    assert (a * b).sum(-1).mean() > 0.99
    assert (a * b).sum(-1).min() > 0.95


def test_a_text_that_is_cut_keeps_its_end_as_transformers_does(checkpoint, tmp_path):
    folder = checkpoint("qwen3")
    embedder = Embedder(export_model(str(folder), tmp_path / "out", ["fp32"]).path)
    text = "ein Brot, größer als das Maß " * 9
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, truncation=True)["input_ids"]
    assert (len(ids), ids[-1]) == (64, 256)
    assert embedder.count_tokens(text) > 64
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        theirs = torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0, -1], dim=0)
    np.testing.assert_allclose(embedder.encode(text), theirs, atol=1e-5)


@pytest.fixture
def spoilt(checkpoint, tmp_path):
    """A function that copies a decoder's checkpoint and changes its tokenizer's files."""

    def change(settings: dict, template: object = None):
        folder = shutil.copytree(checkpoint("qwen3"), tmp_path / "spoilt")
        for name, changes in (("tokenizer_config.json", settings), ("tokenizer.json", {"post_processor": template})):
            content = json.loads((folder / name).read_text()) | changes
            (folder / name).write_text(json.dumps(content))
        return folder

    return change


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "its auto_map names code"),
        ({"add_eos_token": True}, "add_eos_token, which transformers doesn't do"),
    ],
)
def test_a_tokenizer_that_may_end_texts_otherwise_is_refused(spoilt, tmp_path, settings, says):
    folder = spoilt(settings, BYTES)
    with pytest.raises(ExportError, match=f"tokenizer_config.json: .*{says}.* the last token makes the vector"):
        export_model(str(folder), tmp_path / "out", ["fp32"])


def test_so_is_one_whose_class_ends_them_otherwise_than_its_file(spoilt, tmp_path, monkeypatch):
    folder = spoilt({}, BYTES)
    ended = json.loads((folder / "tokenizer.json").read_text())
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256], "tokens": ["<|endoftext|>"]}}
    ended["post_processor"] = {"type": "TemplateProcessing", "single": template, "pair": template}
    ended["post_processor"]["special_tokens"] = special
    load = pipeline.load_tokenizer

    def load_and_end(checkpoint):  # as LlamaTokenizerFast's template replaces that of the file
        loaded = load(checkpoint)
        (folder / "tokenizer.json").write_text(json.dumps(ended))
        return loaded

    monkeypatch.setattr(pipeline, "load_tokenizer", load_and_end)
    with pytest.raises(ExportError, match="transformers ends texts otherwise than tokenizer.json"):
        export_model(str(folder), tmp_path / "out", ["fp32"])


def test_a_tokenizer_without_an_end_is_warned_of_and_an_empty_text_is_zeros(spoilt, tmp_path, caplog):
    artifact = export_model(str(spoilt({}, BYTES)), tmp_path / "out", ["fp32"])
    assert "puts no token behind a text" in caplog.text
    vectors = Embedder(artifact.path).encode(["a text", ""])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0], atol=1e-6)


def test_its_config_is_read_as_transformers_5_writes_it_too(checkpoint, tmp_path):
    folder = checkpoint("qwen3", rope_theta=5e5)
    settings = json.loads((folder / "config.json").read_text())
    theta = settings.pop("rope_theta")
    saved = shutil.copytree(folder, tmp_path / folder.name)
    rope = {"rope_type": "default", "rope_theta": theta}
    (saved / "config.json").write_text(json.dumps(settings | {"rope_parameters": rope}))
    graphs = [export_model(str(x), tmp_path / f"{i}", ["fp32"]).path for i, x in enumerate((folder, saved))]
    assert (graphs[0] / "model.fp32.onnx").read_bytes() == (graphs[1] / "model.fp32.onnx").read_bytes()


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "positions .*yarn"),
        ("qwen2", {"rope_scaling": {"type": "dynamic"}, "rope_parameters": {"rope_theta": 1e4}}, "positions .*dynamic"),
        ("mistral", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "positions .*linear"),
        ("qwen3", {"is_causal": False}, "tokens see those behind"),
        ("qwen2", {"use_bidirectional_attention": True}, "tokens see those behind"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "layers local"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layers local"),
        ("mistral", {"hidden_act": "tanh"}, "hidden_act is 'tanh'"),
        ("qwen3", {"head_dim": 24}, "24 dimensions, not a multiple of 16"),
        ("qwen2", {"num_key_value_heads": 3}, "share 3 keys"),
        ("qwen2", {"num_key_value_heads": "2"}, "key_heads is '2'"),
        ("mistral", {"sliding_window": 0}, "window is 0"),
        ("qwen3", {"rope_theta": -1}, "theta -1"),
        ("qwen3", {"rope_theta": math.nan}, "theta nan"),
    ],
)
def test_what_cant_be_built_is_refused_in_a_line(checkpoint, tmp_path, family, changes, says):
    folder = shutil.copytree(checkpoint(family), tmp_path / family)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(ExportError, match=says):
        export_model(str(folder), tmp_path / "out", ["fp32"])
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_layer_local_change_nothing():
    for family, changes in (
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": ["full_attention"] * 2}),
        ("mistral", {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}),
    ):
        read, settings = find_family(family).config, CONFIGS[family]().to_dict()
        assert read(settings | changes) == read(settings)


def test_a_decoder_that_scores_is_refused(checkpoint, tmp_path):
    folder = checkpoint("qwen3", None, "ForSequenceClassification", num_labels=1, pad_token_id=256)
    with pytest.raises(ExportError, match="logits can't be built of a decoder"):
        export_model(str(folder), tmp_path / "out", ["fp32"])


def test_a_decoder_is_for_cpus(checkpoint, tmp_path):
    folder = str(checkpoint("qwen2"))
    with pytest.raises(ExportError, match=r"leave it out with --variants fp32,int8$"):
        export_model(folder, tmp_path / "out", ["fp16"])
    artifact = export_model(folder, tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].providers == ("CPUExecutionProvider",)
    assert Embedder(artifact.path, device="auto").encode("a text").shape == (64,)
    with pytest.raises(BgeOnnxError, match="cuda"):  # the variant doesn't run there, or nothing does
        Embedder(artifact.path, device="cuda")


MEMORY = """
import re, sys
import numpy as np
import onnxruntime

def peak():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read())[1]) / 1000

options = onnxruntime.SessionOptions()
options.enable_mem_pattern = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"input_ids": np.ones((1, 16), np.int64)})
before = peak()
session.run(None, {"input_ids": np.ones((1, 4096), np.int64)})
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_long_text_takes_no_memory_by_the_square_of_its_tokens_nor_by_its_layers(tmp_path):
    config = CONFIGS["qwen3"](num_hidden_layers=24, max_position_embeddings=4096, num_key_value_heads=4)
    folder = make_checkpoint(tmp_path / "m", config, "last_token", tokenizer=save_bytes)
    graph_of(folder, "last_token")[0].save(tmp_path / "m.onnx")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "m.onnx")]
    took = float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)
    # All scores of a layer would be 268 MB, all layers' keys and values 101 MB.
    assert took < 50
