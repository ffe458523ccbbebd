"""One module an engine, each with the same few names.

``PACKAGES``, whose versions are recorded; ``VARIANTS``, by the kind of model, and ``CUDA``, those that run there; of
``embedder(job)``, ``sparse_embedder(job)`` and ``reranker(job)`` those that it can, which load ``job.source`` and
return what runs it; and ``PREPARED``, the variants that don't load a checkpoint as it is but a conversion of it, each
with the conversion's name. ``prepare(job)`` writes the conversion ``job.variant`` to ``job.source``. The package
itself is imported inside of these functions, so that the runner can read the rest without it.
"""

ENGINES = (
    "ours",
    "sentence_transformers",
    "flag_embedding",
    "optimum",
    "fastembed",
    "openvino",
    "flashrank",
    "compiled",
)
"""All of them."""

SAME_ANSWERS = ("no-probe", "int8-scheduled", "int8-throughput")
"""Variants that run what another of their engine runs in another way, so that their quality isn't measured."""
