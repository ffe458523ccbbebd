"""What people read of an artifact: its figures, how to use it, and its ``README.md``."""

from runtime.manifest import Manifest, Parity, Variant

_USES = {
    "embedder": 'from runtime import Embedder\ne = Embedder("{path}")\n{call}',
    "reranker": 'from runtime import Reranker\nr = Reranker("{path}")\n{call}',
}
_CALLS = {
    "last_hidden_state": 'vectors = e.encode(["a text", "another"])',
    "vocabulary_weights": 'weights = e.encode(["a text"], return_dense=False, return_sparse=True)["lexical_weights"]',
    "logits": 'best = r.rank("a query", ["a passage", "another"])',
}


def usage(manifest: Manifest, path: str) -> str:
    """The three lines of Python that use an artifact."""
    return _USES[manifest.kind].format(path=path, call=_CALLS[manifest.outputs[0]])


def figures(parity: Parity) -> dict[str, str]:
    """What was measured against the original, by a short name."""
    cells = {
        "cosine mean": parity.cosine_mean,
        "min": parity.cosine_min,
        "token vectors mean": parity.colbert_cosine_mean,
        "token vectors min": parity.colbert_cosine_min,
        "sparse mean": parity.sparse_cosine_mean,
        "sparse max diff": parity.sparse_max_diff,
        "score max diff": parity.score_max_diff,
        "Spearman": parity.score_spearman,
        "top 5": parity.score_top_agreement,
    }
    return {name: f"{value:.6f}" for name, value in cells.items() if value is not None}


def one_line(prompt: str) -> str:
    """A prompt as it is shown."""
    return prompt.replace("\n", "\\n")


def summary(manifest: Manifest) -> str:
    """What the model is, in a line."""
    pooling = f", {manifest.pooling} pooling" if manifest.pooling else ""
    what = "one score" if manifest.kind == "reranker" else f"{manifest.dim} dimensions"
    return f"{what}, {manifest.max_length} tokens{pooling}{', L2-normalised' if manifest.normalize else ''}"


def quantization(variant: Variant) -> str:
    """How a variant is quantised, with how many linears aren't."""
    kept = f"; {len(variant.fp32_linears)} linears in fp32" if variant.fp32_linears else ""
    return f"{variant.quantization or 'none'}{kept}"


def model_card(manifest: Manifest) -> str:
    """A model card in Markdown: what the model is, how to use it, and how true its variants are."""
    source = manifest.source
    parities = {name: figures(variant.parity) for name, variant in manifest.variants.items() if variant.parity}
    names = next(iter(parities.values()))
    rows = "\n".join(
        f"| {name} | {manifest.files[variant.data or variant.file].size / 1e6:.1f} MB | "
        f"{' | '.join(parities[name].values())} | {quantization(variant)} |"
        for name, variant in manifest.variants.items()
    )
    prompts = "".join(f"- {kind} prompt: `{one_line(text)}`\n" for kind, text in manifest.prompts.items())
    return f"""# {manifest.name}

An ONNX {manifest.kind} exported by bge-onnx from `{source.id}`{f" at `{source.revision}`" if source.revision else ""}.
The original's licence applies.

```python
{usage(manifest, ".")}
```

- {summary(manifest)}
{prompts}
Against the original:

| variant | size | {" | ".join(names)} | quantisation |
|---|---|{"---|" * len(names)}---|
{rows}
"""
