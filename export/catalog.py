"""``models.yaml``: the models known by a short name, and what a checkpoint folder says about itself."""

import dataclasses
import difflib
import functools
import json
import logging
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from export.errors import ExportError
from runtime.manifest import Kind, Output, Pooling

logger = logging.getLogger(__name__)

NO_PROMPTS: Mapping[str, str] = types.MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What must be known of a model beside its weights; None where nothing says.

    Attributes:
        name: Short name, also the artifact folder's.
        hub: Hugging Face hub id.
        kind: ``embedder`` or ``reranker``.
        architecture: transformers' ``model_type``.
        pooling: Of an embedder.
        normalize: Whether its vectors are L2-normalised.
        dim: Length of a vector.
        max_length: Tokens, special ones included.
        prompts: Text before a ``query`` or a ``passage``.
        package: An importable package that carries the weights.
        outputs: What its graph gives, which the checkpoint says; in ``models.yaml``, where it must be more than one.
    """

    name: str
    hub: str | None = None
    kind: Kind = "embedder"
    architecture: str | None = None
    pooling: Pooling | None = None
    normalize: bool = True
    dim: int | None = None
    max_length: int | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    package: str | None = None
    outputs: tuple[Output, ...] = ("last_hidden_state",)


PASSAGES = ("document", "passage", "corpus")
"""sentence-transformers' names of a passage's prompt; the first that there is wins."""
SENTENCE_CONFIGS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""sentence-transformers' names of what holds a model's max length; the first that isn't empty wins."""
OBEYED = (
    *("processing_kwargs", "query_length", "document_length", "query_expansion"),
    *("config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"),
)
"""What sentence-transformers obeys in the same file, we don't, and vectors may depend on."""
M3_HEADS = ("sparse_linear", "colbert_linear")
"""Files of BGE-M3 (with ``.pt``), which give it sparse and multi-vector outputs beside the dense one."""


AUTO_CLASSES: dict[Output, str] = {
    "last_hidden_state": "AutoModel",
    "logits": "AutoModelForSequenceClassification",
    "vocabulary_weights": "AutoModelForMaskedLM",
}
"""What transformers loads a model with, by its first output."""


@functools.cache
def load_catalog() -> dict[str, ModelSpec]:
    """All rows of ``models.yaml`` by short name; it lies in the wheel's ``export/`` or at the repository's root."""
    here = Path(__file__).parent
    path = next(p for p in (here / "models.yaml", here.parent / "models.yaml") if p.exists())
    rows = yaml.safe_load(path.read_text("utf-8"))
    for row in rows.values():
        if "outputs" in row:
            row["outputs"] = tuple(row["outputs"])
    return {name: ModelSpec(name=name, **row) for name, row in rows.items() if not name.startswith(".")}


def find_model(model: str) -> ModelSpec | None:
    """The row with this short name, hub id, or last part of a hub id, upper and lower case alike."""
    wanted = model.casefold()
    for spec in load_catalog().values():
        hub = (spec.hub or "").casefold()
        if wanted in (spec.name, hub, hub.rpartition("/")[2]):
            return spec
    return None


def suggest(model: str) -> str:
    """The nearest short names, as the end of an error message."""
    near = difflib.get_close_matches(model.casefold(), load_catalog(), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}? " if near else ""


def describe_checkpoint(
    spec: ModelSpec, folder: Path, pooling: Pooling | None = None, prompts: Mapping[str, str] = NO_PROMPTS
) -> ModelSpec:
    """Complete a model's spec with what its checkpoint says; the checkpoint wins over ``models.yaml``.

    Reads ``config.json`` and sentence-transformers' ``modules.json``, ``1_Pooling/config.json``,
    ``sentence_bert_config.json`` and ``config_sentence_transformers.json``.

    Args:
        spec: The catalog's row, or a bare name.
        folder: The checkpoint.
        pooling: The user's word, which wins over both.
        prompts: Of a ``query`` or a ``passage``; likewise, each by itself.

    Raises:
        ExportError: A file isn't valid JSON or is missing, a module can't be expressed, the checkpoint brings code of
            its own, nothing names an embedder's pooling, or a user's word is for what the model hasn't.
    """
    config = read_json(folder / "config.json")
    modules = _modules(folder)
    _check_sentence_config(folder)
    is_reranker = "Pooling" not in modules and _has_head(config, "ForSequenceClassification")
    kind: Kind = "reranker" if is_reranker or spec.kind == "reranker" else "embedder"
    outputs = _outputs(folder, kind, modules, config)
    if custom := (config.take("auto_map", dict) or {}).get(AUTO_CLASSES[outputs[0]]):
        raise ExportError(
            f"{config.path}: its auto_map names code of its own for the model ({custom!s:.60}), which is never run; if "
            "transformers' own class gives the same, export a local copy without the auto_map"
        )
    if method := (config.take("quantization_config", dict) or {}).get("quant_method"):
        raise ExportError(f"{config.path}: its weights are quantised ({method!s:.60}); export the model before that")
    if len(outputs) < len(spec.outputs):
        heads = " and ".join(f"{head}.pt" for head in M3_HEADS)
        raise ExportError(
            f"{folder}: {spec.name} gives more than dense vectors, but {heads} are missing; download them to its folder"
        )
    pools = "last_hidden_state" in outputs
    if pooling and not pools:
        raise ExportError(f"{folder}: gives {outputs[0]}, which nothing pools; leave out --pooling")
    if prompts and kind == "reranker":
        raise ExportError(f"{folder}: a reranker, which has no prompts; leave out --query-prompt and --passage-prompt")
    chosen = (pooling or _declared_pooling(folder, modules) or spec.pooling) if pools else None
    if pools and chosen is None:
        cure = "; a SPLADE says what it is once sentence-transformers' SparseEncoder has loaded and saved it"
        splade = cure if _has_head(config, "ForMaskedLM") else ""
        raise ExportError(
            f"{folder}: nothing says how this embedder pools (no 1_Pooling/config.json, no row in models.yaml), and a "
            "guess would be silently wrong; pass --pooling cls, mean, last_token or max, as its model card says (and "
            f"--query-prompt, if it was trained with a query instruction){splade}"
        )
    declared = _declared_prompts(folder, kind, prompts)
    chosen_prompts = {name: text for name, text in {**(declared or spec.prompts), **prompts}.items() if text}
    for name, text in chosen_prompts.items():
        if text != text.encode("utf-8", "replace").decode():
            raise ExportError(f"{folder}: its {name} prompt {text!a:.60} isn't valid Unicode; pass it in UTF-8")
    return dataclasses.replace(
        spec,
        kind=kind,
        architecture=config.take("model_type", str, ""),
        pooling=chosen,
        normalize=pools and ("Normalize" in modules if modules else spec.normalize),
        dim=_dim(config, outputs),
        outputs=outputs,
        max_length=_max_length(spec, folder, config),
        prompts=chosen_prompts,
    )


def _declared_prompts(folder: Path, kind: Kind, given: Mapping[str, str]) -> dict[str, str]:
    """sentence-transformers' prompts under our names; a default one is warned of, unless both were ``given``.

    Raises:
        ExportError: A reranker puts one into every pair, or the same file cuts all vectors.
    """
    path = folder / "config_sentence_transformers.json"
    settings = read_json(path, {})
    if dim := settings.take("truncate_dim", int):
        raise ExportError(
            f"{path}: its truncate_dim cuts every vector to {dim} dimensions, which isn't exported; remove it from a "
            f"local copy, and pass truncate_dim={dim} to encode (which brings vectors to unit length again)"
        )
    prompts = Settings(path, settings.take("prompts", dict) or {})
    passage = next((key for key in PASSAGES if key in prompts), None)
    names = {key: "passage" if key in PASSAGES else key for key in prompts if key == passage or key not in PASSAGES}
    declared = {name: text for key, name in names.items() if (text := prompts.take(key, str))}
    always = prompts.get(settings.take("default_prompt_name", str))
    if always and kind == "reranker":
        raise ExportError(
            f"{path}: its default_prompt_name puts {always!r:.60} into every pair, which can't be exported yet; "
            "without it the scores would be wrong"
        )
    if declared and kind == "embedder" and "query" not in {*declared, *given}:
        logger.warning(
            "%s: none of its prompts (%s) is called query, so encode_queries puts none; --query-prompt sets one",
            path,
            ", ".join(declared),
        )
    if always and len(given) < 2:
        logger.warning(
            "%s: sentence-transformers' encode puts its default prompt %r before every text, ours none; encode_queries "
            "and encode_corpus put prompts, which --query-prompt and --passage-prompt set",
            path,
            always,
        )
    return declared


def _has_head(config: "Settings", ending: str) -> bool:
    """Whether a model was saved with a head, by how transformers calls its class."""
    return any(str(name).endswith(ending) for name in config.take("architectures", list) or ())


def _modules(folder: Path) -> dict[str, str]:
    """Class name → folder of sentence-transformers' modules, refusing those that would change the vectors."""
    path = folder / "modules.json"
    entries = [Settings(path, entry if isinstance(entry, dict) else {}) for entry in read_json(path, [])]
    modules = {}
    for entry in entries:
        name = entry.take("type", str, "without a type")
        if name.startswith("sentence_transformers."):  # a class of the checkpoint's own may end alike
            name = name.rpartition(".")[2]
        modules[name] = entry.take("path", str, "")
    if unknown := modules.keys() - {"Transformer", "Pooling", "Normalize", "MLMTransformer", "SpladePooling"}:
        raise ExportError(
            f"{path}: the module {min(unknown)} can't be exported yet, only Transformer, Pooling "
            "and Normalize; without it the vectors would be wrong"
        )
    return modules


def _outputs(folder: Path, kind: Kind, modules: dict[str, str], config: "Settings") -> tuple[Output, ...]:
    """What the graph of a checkpoint gives.

    Raises:
        ExportError: A reranker with several labels, a SPLADE that pools as none of ours does, or one of BGE-M3's heads
            without the other.
    """
    if kind == "reranker":
        names = config.take("id2label", dict)
        labels = config.take("num_labels", int, 2) if names is None else len(names)  # 2 is transformers' default
        if labels != 1:
            raise ExportError(f"{folder}: a classifier of {labels} labels; a reranker has 1, so this isn't one")
        return ("logits",)
    if "SpladePooling" in modules:
        if further := modules.keys() & {"Normalize", "Pooling"}:
            raise ExportError(
                f"{folder / 'modules.json'}: a SPLADE with the module {min(further)} can't be exported yet; without it "
                "the weights would be wrong"
            )
        path = folder / modules["SpladePooling"] / "config.json"
        settings = read_json(path)
        if (settings.get("pooling_strategy", "max"), settings.get("activation_function", "relu")) != ("max", "relu"):
            raise ExportError(f"{path}: only max pooling of relu activations can be exported; see docs/families.md")
        if config.get("tie_word_embeddings") is False:
            raise ExportError(
                f"{config.path}: tie_word_embeddings is false, and a SPLADE with an output matrix of its own can't be "
                "exported yet; with its word embeddings the weights would be wrong"
            )
        return ("vocabulary_weights",)
    heads = [folder / f"{head}.pt" for head in M3_HEADS]
    match [head.name for head in heads if head.exists()]:
        case [_, _]:
            return ("last_hidden_state", "token_weights", "token_vectors")
        case [one]:
            other = next(head.name for head in heads if head.name != one)
            raise ExportError(f"{folder}: has {one} but not {other}; add that, or remove {one} from a local copy")
    return ("last_hidden_state",)


def _dim(config: "Settings", outputs: tuple[Output, ...]) -> int | None:
    match outputs[0]:
        case "logits":
            return 1
        case "vocabulary_weights":
            return config.take("vocab_size", int)
    names = ("hidden_size", "dim", "d_model", "n_embd")
    dim = next((config.take(name, int) for name in names if config.get(name)), None)
    if dim is None:
        raise ExportError(f"{config.path}: none of {', '.join(names)} says how long its vectors are; add hidden_size")
    return dim


def _declared_pooling(folder: Path, modules: dict[str, str]) -> Pooling | None:
    path = folder / modules.get("Pooling", "1_Pooling") / "config.json"
    settings = read_json(path, {})
    if not settings.take("include_prompt", bool, True):
        raise ExportError(
            f"{path}: include_prompt is false, and pooling without a prompt's tokens can't be exported yet; with "
            "them the vectors would be wrong"
        )
    names = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last_token"}
    names |= {"cls": "cls", "mean": "mean", "max": "max"}  # as sentence-transformers writes them since 5.2
    flags = [
        key.removeprefix("pooling_mode_") for key, on in settings.items() if key.startswith("pooling_mode_") and on
    ]
    modes = settings.take("pooling_mode", str | list, flags)
    modes = [modes] if isinstance(modes, str) else modes
    if not modes:
        return None
    if len(modes) > 1 or str(modes[0]) not in names:
        chosen = " + ".join(map(str, modes))
        raise ExportError(f"{path}: pooling by {chosen} is not supported, only by {', '.join(names)}")
    return cast(Pooling, names[modes[0]])


def sentence_config(folder: Path) -> "Settings":
    """What sentence-transformers says of a model's texts: their length, and if they are lower-cased."""
    found = (read_json(folder / name, {}) for name in SENTENCE_CONFIGS)
    return next(filter(None, found), Settings(folder / SENTENCE_CONFIGS[0], {}))


def _check_sentence_config(folder: Path) -> None:
    """Refuse what sentence-transformers obeys beside a length and lower case, and would give something else."""
    settings = sentence_config(folder)
    modalities = settings.take("modality_config", dict) or {}
    if "message" in modalities:
        raise ExportError(
            f"{settings.path}: its modality_config has message, so sentence-transformers puts texts through the chat "
            "template, which can't be exported yet, and without it the vectors would be wrong; if the model was "
            "trained without, remove message from a local copy"
        )
    text = modalities.get("text")
    output = text.get("method_output_name") if isinstance(text, dict) else None
    changes = [name for name in OBEYED if settings.get(name)]
    if changes or output not in (None, "last_hidden_state", "logits"):
        raise ExportError(
            f"{settings.path}: its {(changes or ['modality_config'])[0]} can't be exported yet, and without it the "
            "vectors may be wrong; if it changes nothing, remove it from a local copy"
        )


def _max_length(spec: ModelSpec, folder: Path, config: "Settings") -> int:
    """The checkpoint's own limit, else the catalog's, never more than it has positions.

    Raises:
        ExportError: It isn't a number, or leaves no room for a token.
    """
    positions = config.take("max_position_embeddings", int) or 512
    if config.get("model_type") in ("roberta", "xlm-roberta", "mpnet", "camembert"):
        pad = 1 if config["model_type"] == "mpnet" else config.take("pad_token_id", int, 1)  # as transformers
        positions -= pad + 1  # their positions start behind the padding id
    limits = (
        sentence_config(folder).take("max_seq_length", int | float),
        spec.max_length,
        read_json(folder / "tokenizer_config.json", {}).take("model_max_length", int | float),
    )
    limit = min(next((limit for limit in limits if limit is not None), positions), positions)
    if not limit >= 1:  # nor is NaN
        raise ExportError(
            f"{folder}: its max length is {limit}, which leaves no room for a token; mend max_seq_length in "
            "sentence_bert_config.json, model_max_length in tokenizer_config.json or config.json's positions"
        )
    return int(limit)


class Settings(dict[str, Any]):
    """A JSON file's object, whose values can be taken with a check of their type."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        """Values as they were read of a file, which errors name."""
        super().__init__(values)
        self.path = path

    def take(self, key: str, kind: type | types.UnionType, default: Any = None) -> Any:  # noqa: ANN401
        """A value of a type, or ``default`` where there is none; a null is none only if ``default`` is None.

        Raises:
            ExportError: It is of another type.
        """
        value = self.get(key, default)
        if value is default or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
            return value
        wanted = getattr(kind, "__name__", kind)
        raise ExportError(f"{self.path}: {key} is {value!r:.60}, not {wanted}; mend it in a local copy")


def read_json(path: Path, default: Any = None) -> Any:  # noqa: ANN401
    """The content of a JSON file, or ``default`` where there is none: ``Settings`` unless the default is no object.

    Raises:
        ExportError: It isn't JSON or holds another type, or is missing without a default.
    """
    wanted = dict if default is None else type(default)
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, wanted):
            raise ValueError(f"it holds {type(content).__name__}, not {wanted.__name__}")
    except FileNotFoundError:
        content = default
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: can't be read ({error}); download the checkpoint again") from None
    if content is None:
        raise ExportError(f"{path}: no such file; is this a transformers checkpoint?")
    return Settings(path, content) if isinstance(content, dict) else content


POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
