"""Is the exported model the original? transformers is the oracle, and the very code that production runs answers."""

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import spearmanr

from export.catalog import AUTO_CLASSES, M3_HEADS
from export.errors import ExportError, ParityError, first_line
from export.source import Checkpoint, load_tokenizer
from runtime import Embedder, Reranker
from runtime.hybrid import LexicalWeights, compute_lexical_matching_score
from runtime.manifest import Parity, load_manifest
from runtime.pooling import Floats

if TYPE_CHECKING:
    import torch

THRESHOLDS: dict[str, dict[str, float]] = {
    "fp32": {
        "cosine_mean": 0.99999,
        "cosine_min": 0.99999,
        "colbert_cosine_min": 0.99999,
        "sparse_max_diff": 1e-4,
        "score_max_diff": 1e-4,
        "score_spearman": 0.9999,
        "score_top_agreement": 0.99,
    },
    "int8": {
        "cosine_mean": 0.99,
        "cosine_min": 0.9,
        "colbert_cosine_mean": 0.98,
        "sparse_cosine_mean": 0.98,
        "score_spearman": 0.98,
        "score_top_agreement": 0.85,
    },
    "fp16": {
        "cosine_mean": 0.9999,
        "cosine_min": 0.999,
        "colbert_cosine_min": 0.999,
        "sparse_cosine_mean": 0.999,
        "score_spearman": 0.999,
        "score_top_agreement": 0.95,
    },
}
"""What each figure of a variant's parity must reach, at least, or at most where it is a difference (``…_diff``)."""

LONGEST = 2048
"""Tokens up to which positions are verified, and 50 more."""
QUERIES, PASSAGES, TOP = 8, 16, 5
"""Of a reranker: queries, passages that each is scored with, and how many of the best are compared."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model gives for each verification text, or pair of a reranker; empty what it doesn't give."""

    dense: list[Floats] = field(default_factory=list)
    lexical: list[LexicalWeights] = field(default_factory=list)
    colbert: list[Floats] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def verification_texts() -> list[str]:
    """The fixed texts on which parity is measured; none of them calibrates anything."""
    return files("export").joinpath("texts/verification.txt").read_text("utf-8").splitlines()


def long_text(texts: list[str], max_length: int, tokenizer: Any) -> str:  # noqa: ANN401
    """Of the texts, one past ``max_length``, so that truncation and late positions are verified too.

    Of more than ``LONGEST`` tokens it is for no model, since transformers' attention takes memory by their square.
    """
    tokens, words = min(max_length, LONGEST) + 50, itertools.cycle(" ".join(texts).split())
    text = " ".join(itertools.islice(words, tokens))
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return text[: offsets[:tokens][-1][1]]


def verification_pairs(texts: list[str]) -> list[tuple[str, str]]:
    """Eight queries, each the first half of a text, with the same passages, of which one holds the query.

    The last pair is the last text twice: of a long one, query and passage are both cut.
    """
    passages = texts[:: max(1, len(texts) // PASSAGES)][:PASSAGES]
    pairs = [(passage[: len(passage) // 2], other) for passage in passages[:QUERIES] for other in passages]
    return [*pairs[:-1], (texts[-1], texts[-1])]


def reference_answers(checkpoint: Checkpoint, texts: list[str]) -> Answers:
    """What transformers' own model and tokenizer give, one text or pair at a time, finished by torch as FlagEmbedding.

    Raises:
        ExportError: transformers can't load the checkpoint, or run it, or gives no numbers.
    """
    import torch  # slow to import
    import transformers

    transformers.logging.set_verbosity_error()
    spec, folder = checkpoint.spec, str(checkpoint.folder)
    answers = Answers()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        try:
            tokenizer = load_tokenizer(checkpoint)
            model = getattr(transformers, AUTO_CLASSES[spec.outputs[0]]).from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=not checkpoint.allow_pickle or None,
                trust_remote_code=False,
                **_thetas(checkpoint.config),
            )
        except Exception as error:  # transformers raises all sorts
            raise ExportError(
                f"{checkpoint.id}: transformers can't load it ({first_line(error)}), so nothing can be verified; "
                "mend the checkpoint"
            ) from error
        accepted = inspect.signature(model.eval().forward).parameters

        def ask(inputs: Any) -> "torch.Tensor":  # noqa: ANN401
            feeds = {name: torch.tensor([inputs[name]]) for name in inputs if name in accepted}
            try:
                first: torch.Tensor = model(**feeds)[0]
            except Exception as error:  # torch raises all sorts
                raise ExportError(
                    f"{checkpoint.id}: transformers can't run it ({first_line(error)}), so nothing can be verified; "
                    "mend the checkpoint, or free memory"
                ) from error
            return first

        if spec.kind == "reranker":
            for pair in verification_pairs(texts):
                answers.scores.append(float(ask(_pair_inputs(tokenizer, pair, spec.max_length or 512))[0, 0]))
            return _checked(checkpoint, answers)
        heads = _heads(checkpoint) if "token_weights" in spec.outputs else None
        skipped = special_ids(tokenizer)
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=spec.max_length)
            states = ask(inputs)[0]
            if spec.outputs == ("vocabulary_weights",):
                weights = torch.log1p(torch.relu(states)).amax(0)
                answers.lexical.append({str(i): float(weights[i]) for i in weights.nonzero()[:, 0].tolist()})
                continue
            answers.dense.append(_pooled(states, spec.pooling, spec.normalize).numpy())
            if heads:
                sparse, colbert = heads
                weights = torch.relu(sparse(states))[:, 0].tolist()
                best: LexicalWeights = {}
                for token, weight in zip(inputs["input_ids"], weights, strict=True):
                    if token not in skipped and weight > best.get(str(token), 0):
                        best[str(token)] = weight
                answers.lexical.append(best)
                answers.colbert.append(torch.nn.functional.normalize(colbert(states[1:]), dim=-1).numpy())
    return _checked(checkpoint, answers)


def _checked(checkpoint: Checkpoint, answers: Answers) -> Answers:
    """The answers; ``ExportError`` if one isn't a number, with which nothing could be compared."""
    weights = [np.array([*weights.values()]) for weights in answers.lexical]
    found = [*answers.dense, *answers.colbert, *weights, np.array(answers.scores)]
    if not all(np.isfinite(numbers).all() for numbers in found):
        raise ExportError(
            f"{checkpoint.id}: transformers itself gives NaN or infinity, so the weights are spoilt or too large "
            "for float32; train or download them again"
        )
    return answers


def _thetas(config: Mapping[str, Any]) -> dict[str, float]:
    """Bases of rotary positions, which transformers 5 writes where earlier ones, that they are asked of, don't look."""
    rope = config.get("rope_parameters") or {}
    if config.get("model_type") == "modernbert":
        names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
        return {names[kind]: given["rope_theta"] for kind, given in rope.items() if "rope_theta" in given}
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _pair_inputs(tokenizer: Any, pair: tuple[str, str], max_length: int) -> Any:  # noqa: ANN401
    """A pair as FlagEmbedding's ``FlagReranker`` cuts it, with the special tokens of ``tokenizer.json``.

    FlagReranker's ``prepare_for_model`` adds none where transformers has no class of its own for the tokenizer.
    """
    query, passage = (tokenizer.backend_tokenizer.encode(text, add_special_tokens=False) for text in pair)
    query.truncate(max_length * 3 // 4)
    passage.truncate(max(0, max_length - len(query) - tokenizer.num_special_tokens_to_add(pair=True)))
    whole = tokenizer.backend_tokenizer.post_process(query, passage)
    inputs = {"input_ids": whole.ids, "token_type_ids": whole.type_ids}
    return {name: inputs[name] for name in inputs if name in tokenizer.model_input_names}


def _pooled(states: "torch.Tensor", pooling: str | None, normalize: bool) -> "torch.Tensor":
    import torch

    match pooling:
        case "cls":
            vector = states[0]
        case "last_token":
            vector = states[-1]
        case "max":
            vector = states.amax(0)
        case _:
            vector = states.mean(0)
    return torch.nn.functional.normalize(vector, dim=0) if normalize else vector


def _heads(checkpoint: Checkpoint) -> list[Callable[["torch.Tensor"], "torch.Tensor"]]:
    """BGE-M3's sparse and multi-vector heads, by torch's own loader."""
    import torch

    heads = []
    for name in M3_HEADS:
        state = torch.load(checkpoint.folder / f"{name}.pt", map_location="cpu", weights_only=True)
        head = torch.nn.Linear(*reversed(state["weight"].shape))
        head.load_state_dict(state)
        if not all(torch.isfinite(parameter).all() for parameter in head.parameters()):
            raise ExportError(f"{checkpoint.folder / name}.pt: holds NaN or infinity; train or download it again")
        if head.in_features != checkpoint.spec.dim:
            raise ExportError(
                f"{checkpoint.folder / name}.pt: takes states of {head.in_features} dimensions where the model has "
                f"{checkpoint.spec.dim}; it is another model's, download them together"
            )
        heads.append(head.float())
    return heads


def special_ids(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """Ids that BGE-M3 gives no lexical weight, as FlagEmbedding chooses them; ``tokenizer`` is transformers'."""
    names = ("cls_token", "eos_token", "pad_token", "unk_token")
    special = tokenizer.special_tokens_map
    return sorted({tokenizer.convert_tokens_to_ids(special[name]) for name in names if name in special})


def runtime_answers(artifact: Path, variant: str, texts: list[str], device: str) -> Answers:
    """What the runtime gives with a variant of an artifact on a device."""
    manifest = load_manifest(artifact)
    if manifest.kind == "reranker":
        scores = Reranker(artifact, variant, device=device).compute_score(verification_pairs(texts))
        return Answers(scores=scores)  # type: ignore[arg-type]
    embedder, has = Embedder(artifact, variant, device=device), set(manifest.outputs)
    found = embedder.encode(
        texts,
        return_dense="last_hidden_state" in has,
        return_sparse=bool({"token_weights", "vocabulary_weights"} & has),
        return_colbert_vecs="token_vectors" in has,
    )
    if not isinstance(found, dict):
        return Answers(dense=list(found))
    dense, lexical, colbert = found["dense_vecs"], found["lexical_weights"], found["colbert_vecs"]
    return Answers(dense=[] if dense is None else list(dense), lexical=lexical or [], colbert=colbert or [])


def compare(reference: Answers, answers: Answers) -> Parity:
    """How close answers come to the reference."""
    dense = cosines(answers.dense, reference.dense)
    pairs = zip(answers.colbert, reference.colbert, strict=True)
    colbert = np.concatenate([np.empty(0), *(cosines(a, b) for a, b in pairs)])
    lexical = list(zip(answers.lexical, reference.lexical, strict=True))
    differences = [abs(a.get(token, 0) - b.get(token, 0)) for a, b in lexical for token in a.keys() | b.keys()]
    scores, expected = np.array(answers.scores), np.array(reference.scores)
    return Parity(
        texts=max(len(reference.dense), len(reference.lexical), len(reference.scores)),
        cosine_mean=float(dense.mean()) if dense.size else None,
        cosine_min=float(dense.min()) if dense.size else None,
        colbert_cosine_mean=float(colbert.mean()) if colbert.size else None,
        colbert_cosine_min=float(colbert.min()) if colbert.size else None,
        sparse_max_diff=float(max(differences, default=0)) if lexical else None,
        sparse_cosine_mean=float(np.mean([_sparse_cosine(a, b) for a, b in lexical])) if lexical else None,
        score_max_diff=float(np.abs(scores - expected).max()) if scores.size else None,
        score_spearman=float(spearmanr(scores, expected).statistic) if scores.size else None,
        score_top_agreement=_top_agreement(scores, expected) if scores.size else None,
    )


def _top_agreement(scores: np.ndarray, expected: np.ndarray) -> float:
    """The share of each query's best passages that are the original's, or as good as these within fp32's tolerance."""
    rows, found = expected.reshape(QUERIES, -1), np.argsort(-scores.reshape(QUERIES, -1), axis=1)[:, :TOP]
    least = np.sort(rows, axis=1)[:, -TOP] - 2 * THRESHOLDS["fp32"]["score_max_diff"]
    return float(np.mean(np.take_along_axis(rows, found, axis=1) >= least[:, None]))


def verify_variant(artifact: Path, variant: str, reference: Answers, texts: list[str], device: str = "cpu") -> Parity:
    """Ask the runtime, and compare.

    Args:
        artifact: The folder, complete but for its parity figures.
        variant: Which of its variants.
        reference: What the original answers.
        texts: The texts that it was asked.
        device: Where the variant runs.

    Raises:
        ParityError: A figure is below its threshold.
    """
    parity = compare(reference, runtime_answers(artifact, variant, texts, device))
    for name, limit in THRESHOLDS[variant].items():
        value = getattr(parity, name)
        if value is not None and not (value <= limit if name.endswith("_diff") else value >= limit):
            raise ParityError(
                f"{variant}: {name.replace('_', ' ')} to the original is {value:.6f} on {parity.texts} texts, where "
                f"{limit} is asked for; {_CURES[variant]}"
            )
    return parity


_CURES = {
    "fp32": "the graph or the tokenizer differs from the original, please report the model",
    "fp16": "the model needs more than fp16's range or precision, leave it out with --variants fp32,int8",
    "int8": "pass --calibration with a file of your own texts, or (an embedder's) --min-cosine 0.99, which keeps some "
    "linears in fp32, or leave int8 out with --variants fp32",
}


def _sparse_cosine(a: LexicalWeights, b: LexicalWeights) -> float:
    """Cosine of two texts' lexical weights; 1 of two that have none."""
    if not a and not b:
        return 1.0
    lengths = [math.sqrt(sum(weight * weight for weight in weights.values())) for weights in (a, b)]
    return float(compute_lexical_matching_score(a, b)) / max(math.prod(lengths), 1e-12)


def cosines(a: Sequence[Floats] | Floats, b: Sequence[Floats] | Floats) -> np.ndarray:
    """float64 ``(n,)`` of two times ``n`` vectors."""
    a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not a64.size:
        return np.empty(0)
    found: np.ndarray = (a64 * b64).sum(-1) / (np.linalg.norm(a64, axis=-1) * np.linalg.norm(b64, axis=-1))
    return found
