"""Write a checkpoint with random weights, whose speed is that of a trained one of its shape. For benchmarks."""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers

from export.source import resolve_source

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XLMR = LARGE | {"vocab_size": 30522, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 1}
QWEN3 = {"vocab_size": 151669, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128}
QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6}
SHAPES = {
    "base": lambda: transformers.BertModel(transformers.BertConfig()),  # the defaults are BERT-base's
    "large": lambda: transformers.BertModel(transformers.BertConfig(**LARGE)),
    "reranker-large": lambda: transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**XLMR)),
    "qwen3": lambda: transformers.Qwen3Model(transformers.Qwen3Config(**QWEN3)),
}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="is made")
parser.add_argument("--shape", choices=SHAPES, default="base", help="whose: base and large are bge's")
parser.add_argument("--tokenizer", default="all-minilm-l6-v2", help="the model whose tokenizer it gets")
options = parser.parse_args()

files = resolve_source(options.tokenizer).folder.glob("*token*")
folder = options.folder.with_name(f".{options.folder.name}.partial")  # what fails leaves no half of one
shutil.rmtree(folder, ignore_errors=True)
folder.mkdir(parents=True)
for file in files:
    shutil.copy(file, folder)
torch.manual_seed(0)
model = SHAPES[options.shape]()
model.save_pretrained(folder)
if options.shape == "reranker-large":  # it has no token types, which a BERT's tokenizer would give
    path = folder / "tokenizer_config.json"
    taken = {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | taken), "utf-8")
else:
    mode = "lasttoken" if options.shape == "qwen3" else "cls_token"
    pooling = {f"pooling_mode_{mode}": True, "word_embedding_dimension": model.config.hidden_size}
    kinds = "Transformer", "Pooling"
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    for name, content in {
        "1_Pooling/config.json": pooling,
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    }.items():
        (folder / name).write_text(json.dumps(content), "utf-8")
folder.rename(options.folder)
