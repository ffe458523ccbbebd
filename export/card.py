"""The ``README.md`` of an artifact."""

from runtime.manifest import Manifest


def usage(path: str) -> str:
    """The three lines of Python that use an artifact."""
    return f'from runtime import Embedder\ne = Embedder("{path}")\nvectors = e.encode(["a text", "another"])'


def model_card(manifest: Manifest) -> str:
    """A model card in Markdown: what the model is, how to use it, and how true its variants are."""
    source = manifest.source
    rows = "\n".join(
        f"| {name} | {manifest.files[variant.file].size / 1e6:.1f} MB | {variant.parity.cosine_mean:.6f} | "
        f"{variant.parity.cosine_min:.6f} | {variant.quantization or 'none'} |"
        for name, variant in manifest.variants.items()
        if variant.parity
    )
    prompts = "".join(f"- {kind} prompt: `{text}`\n" for kind, text in manifest.prompts.items())
    return f"""# {manifest.name}

An ONNX {manifest.kind} exported by bge-onnx from `{source.id}`{f" at `{source.revision}`" if source.revision else ""}.
The original's licence applies.

```python
{usage(".")}
```

- {manifest.dim} dimensions, at most {manifest.max_length} tokens, {manifest.pooling} pooling\
{", L2-normalised" if manifest.normalize else ""}
{prompts}
| variant | size | cosine to the original, mean | min | quantisation |
|---|---|---|---|---|
{rows}
"""
