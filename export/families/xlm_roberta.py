"""XLM-R: bge-m3, bge-reranker-*, multilingual-e5, bce."""

from export.families.roberta import FAMILY

__all__ = ["FAMILY"]
