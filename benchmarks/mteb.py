"""Any MTEB task for our ``Embedder``, where ``mteb`` is installed and its data can be had."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.engines.ours import PACKAGES
from benchmarks.errors import DataError, EngineError
from benchmarks.results import Figure, Journal, Result
from benchmarks.worker import versions
from runtime import Embedder


def measure_mteb(embedder: Embedder, name: str, journal: Journal) -> list[Result]:
    """The main score (×100) of an MTEB task's test split.

    Args:
        embedder: What is measured.
        name: A task's, such as ``STSBenchmark``.
        journal: Gets the result.

    Returns:
        The result; none if the journal has it already.

    Raises:
        EngineError: ``mteb`` isn't installed.
        DataError: There is no such task, or its data can't be had.
    """
    model, settings = embedder.manifest.name, {"task": name}
    result = Result(
        benchmark="mteb", engine="ours", variant=embedder.variant, model=model, settings=settings, figures={}
    )
    if result in journal:
        return []
    try:
        import mteb
    except ImportError as missing:
        raise EngineError(f"--mteb {name}: {missing.name} isn't installed; run: pip install mteb") from None
    try:
        task = mteb.get_task(name)
        task.load_data()
    except KeyError:
        raise DataError(f"--mteb {name}: is no task of mteb {mteb.__version__}; see mteb.get_tasks()") from None
    except Exception as error:  # the hub's, its client's and the data set's own
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"--mteb {name}: its data can't be had ({cause}); is the hub reachable?") from None
    scores = mteb.evaluate(mteb_encoder(embedder), task, cache=None, show_progress_bar=False)
    figures = {"main score": Figure.of(100 * float(scores[0].get_score()))}
    return [journal.add(result.filled(figures, versions((*PACKAGES, "mteb"))))]


def mteb_encoder(embedder: Embedder) -> Any:  # noqa: ANN401  mteb may not be there
    """Our embedder by mteb's ``EncoderProtocol``: queries and documents get their prompts, other texts none."""
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty({"name": f"bge-onnx/{embedder.manifest.name}", "revision": "local"})

        def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> NDArray[np.float32]:  # noqa: ANN401
            texts = [text for batch in inputs for text in batch["text"]]
            by_type = {"query": embedder.encode_queries, "document": embedder.encode_corpus}
            encode = by_type.get(getattr(prompt_type, "value", ""), embedder.encode)
            return np.asarray(encode(texts), np.float32)

    return Encoder()
