"""CamemBERT."""

from export.families.roberta import FAMILY

__all__ = ["FAMILY"]
