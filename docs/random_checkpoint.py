"""Write a checkpoint of bge-base's shape with random weights: its speed is that of a trained one. For benchmarks."""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from export.source import resolve_source

folder, like = Path(sys.argv[1]), resolve_source("all-minilm-l6-v2").folder
shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx", "onnx", "openvino"))
torch.manual_seed(0)
BertModel(BertConfig()).save_pretrained(folder)  # transformers' defaults are BERT-base's 12 layers of 768
for name, changes in {
    "1_Pooling/config.json": {"word_embedding_dimension": BertConfig().hidden_size},
    "sentence_bert_config.json": {"max_seq_length": BertConfig().max_position_embeddings},
}.items():
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
