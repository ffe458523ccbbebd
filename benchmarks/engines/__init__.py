"""One module an engine, each with the same few names.

``PACKAGES``, whose versions are recorded; ``VARIANTS``, by the kind of model; ``embedder(job)`` and ``reranker(job)``,
which load ``job.source`` and return what runs it; and ``PREPARED``, the variants that don't load a checkpoint as it is,
but what ``prepare(job)`` has written to ``job.source``. The package itself is imported inside of these functions, so
that the runner can read the rest without it.
"""

ENGINES = ("ours", "sentence_transformers", "flag_embedding", "optimum", "fastembed", "openvino", "flashrank")
"""All of them."""
