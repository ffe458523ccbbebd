"""Where checkpoints come from: a local folder, an installed package or the hub, with weights read lazily."""

import errno
import functools
import hashlib
import importlib.util
import logging
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes  # noqa: F401  lets numpy, and so safetensors, read bfloat16
import numpy as np
import safetensors
import tokenizers

from export.catalog import (
    M3_HEADS,
    NO_PROMPTS,
    SENTENCE_CONFIGS,
    ModelSpec,
    Settings,
    describe_checkpoint,
    find_model,
    read_json,
    suggest,
)
from export.errors import ExportError, first_line
from export.graph import Loader
from runtime.manifest import TOKENIZER, Pooling, Source
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

METADATA = (
    "config.json",
    "adapter_config.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "modules.json",
    "*Pooling/config.json",
    *SENTENCE_CONFIGS,
    "config_sentence_transformers.json",
    "LICENSE*",
    "*_linear.pt",
)
SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLE = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
"""A download's that have nothing to do with the network."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine's disk, and what is known about it."""

    spec: ModelSpec
    folder: Path
    origin: Literal["hub", "folder", "package"]
    id: str
    revision: str | None
    allow_pickle: bool

    @property
    def config(self) -> Settings:
        """``config.json``."""
        config: Settings = read_json(self.folder / "config.json")
        return config

    def weights(self) -> dict[str, Loader]:
        """A loader for each tensor; one that isn't called is never read."""
        weights = {_modern(name): load for path in self.weight_files() for name, load in _open(path).items()}
        for head in M3_HEADS:
            if (path := self.folder / f"{head}.pt").exists():
                weights |= {f"{head}.{name}": load for name, load in _open(path).items()}
        return weights

    def weight_files(self) -> list[Path]:
        """The files that hold the weights.

        Raises:
            ExportError: There are none, a shard is missing or lies elsewhere, or they are pickles and weren't allowed.
        """
        files = self._listed(SAFETENSORS[0])
        if not (missing := [path for path in files if not path.exists()]):
            return files
        pickles = self._listed(PICKLE[0])
        lacking = [path for path in pickles if not path.exists()]
        if pickles == lacking:
            raise ExportError(
                f"{self.id}: {missing[0].name} is missing; the checkpoint needs safetensors weights "
                "(if it has only pytorch_model.bin, pass --allow-pickle)"
            )
        if not self.allow_pickle:
            raise ExportError(
                f"{self.id}: its only weights are a pickle ({pickles[0].name}), which can run code when loaded; pass "
                "--allow-pickle to read it with torch's weights_only loader, or convert it to safetensors"
            )
        if lacking:
            raise ExportError(f"{self.id}: {lacking[0].name} is missing; download the checkpoint again")
        return pickles

    def _listed(self, whole: str) -> list[Path]:
        """The file that holds all weights, which transformers prefers, or those that an index lists instead."""
        index, names = self.folder / f"{whole}.index.json", [whole]
        if index.exists() and not (self.folder / whole).exists():
            names = sorted({str(name) for name in read_json(index).take("weight_map", dict, {}).values()})
        if not names or any(Path(name).name != name for name in names):
            raise ExportError(f"{index}: its weight_map doesn't name files beside it; download the checkpoint again")
        return [self.folder / name for name in names]

    def provenance(self) -> Source:
        """The source as the manifest records it, with the SHA-256 of every file that an export reads."""
        files = {path for pattern in METADATA for path in self.folder.glob(pattern) if path.is_file()}
        files |= set(self.weight_files())
        checksums = {path.relative_to(self.folder).as_posix(): _sha256(path) for path in sorted(files)}
        return Source(id=self.id, origin=self.origin, revision=self.revision, checksums=checksums)


def resolve_source(
    model: str,
    *,
    revision: str | None = None,
    pooling: Pooling | None = None,
    prompts: Mapping[str, str] = NO_PROMPTS,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Find a checkpoint and bring it to this machine's disk.

    Args:
        model: A short name of ``models.yaml``, a local folder, or a hub id, tried in this order.
        revision: A branch, tag or commit of the hub; always asks the hub.
        pooling: Overrides what the checkpoint and the catalog say.
        prompts: Those of a ``query`` or a ``passage`` do, too; an empty one is none.
        allow_pickle: Accept ``pytorch_model.bin`` where there are no safetensors.

    Raises:
        ExportError: Nothing of that name, a hub that can't be reached, or an incomplete checkpoint.
    """
    if not model:
        raise ExportError("no model is named; run python -m export --list for all short names")
    known = find_model(model)
    folder = Path(os.path.expanduser(model))  # which, as those below, raises nothing
    if os.path.isdir(folder) and not (known and known.name == model.casefold()):
        if revision:
            raise ExportError(f"{model}: a local folder has no revision; leave out --revision")
        folder = folder.resolve()
        source_id = _folder_id(folder)
        original = find_model(source_id)  # which a local copy of it may not tell the prompts of
        if original and source_id != folder.name:  # in the hub's cache, so it is no other model of that name
            spec = original
        else:
            spec = ModelSpec(name=source_id.rpartition("/")[2], prompts=original.prompts if original else {})
        origin = "folder"
    elif model.startswith((".", "/", "~")):
        raise ExportError(
            f"{model}: {'not a' if os.path.exists(folder) else 'no such'} folder; pass a checkpoint's, or a hub id"
        )
    elif known and not revision and (packaged := _package_folder(known)):
        spec, origin, source_id, folder = known, "package", f"{known.package} ({known.hub})", packaged
    elif known or re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        source_id = (known and known.hub) or model
        spec = known or ModelSpec(name=model.rpartition("/")[2].casefold(), hub=model)
        folder, origin = _download(source_id, revision, allow_pickle), "hub"
        revision = folder.name  # the cache names a snapshot's folder after its commit
    else:
        raise ExportError(
            f"{model}: neither a short name of models.yaml nor a folder nor a hub id; {suggest(model)}"
            "run python -m export --list for all names"
        )
    if os.path.exists(folder / "adapter_config.json"):  # which transformers, without peft, leaves out in silence
        raise ExportError(
            f"{source_id}: adapter_config.json makes it a LoRA (or other) adapter; merge it into its base model with "
            "peft's merge_and_unload, save that with its tokenizer, and export the folder; if it is merged, delete the "
            "file"
        )
    if not os.path.isfile(folder / "config.json"):
        raise ExportError(f"{source_id}: no config.json in {folder}; is this a transformers checkpoint?")
    checkpoint = Checkpoint(
        spec=describe_checkpoint(spec, folder, pooling, prompts),
        folder=folder,
        origin=origin,  # type: ignore[arg-type]
        id=source_id,
        revision=revision,
        allow_pickle=allow_pickle,
    )
    checkpoint.weight_files()
    return checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> "transformers.PreTrainedTokenizerFast":
    """The checkpoint's fast tokenizer, converted if it has only a vocabulary; it neither cuts nor pads.

    Raises:
        Exception: Of any sort, as transformers does.
    """
    import transformers  # slow to import

    if checkpoint.config.get("model_type") != "mistral":  # of whose pattern it warns with any large vocabulary
        transformers.logging.set_verbosity_error()
    folder = checkpoint.folder
    settings = read_json(folder / "tokenizer_config.json", {})
    whole = (folder / "tokenizer.json").exists()
    changed: dict[str, Any] = {}
    if whole and isinstance(settings.get("extra_special_tokens"), list):
        changed = {"extra_special_tokens": {}}  # transformers 5 lists them, which 4 can't read; tokenizer.json has them
    if whole and settings.get("tokenizer_class") == "TokenizersBackend":  # as transformers 5 calls the class
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, **changed)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, use_fast=True, trust_remote_code=False, **changed
        )
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check_end(checkpoint: Checkpoint, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that texts end as the model was trained: where they are pooled by their last token, that is the vector.

    Args:
        checkpoint: What the tokenizer is of.
        tokenizer: As transformers loads it.

    Raises:
        ExportError: Its files say something else, or code of its own may do so.
    """
    settings = read_json(checkpoint.folder / "tokenizer_config.json", {})
    end, saved = tokenizer.encode("a").ids[-1], checkpoint.folder / TOKENIZER
    ends = tokenizer.encode("a", add_special_tokens=False).ids[-1] != end
    cause, cure = "", "without that, whose tokenizer.json has the end of text in its post_processor"
    if settings.get("auto_map"):
        cause = "its auto_map names code of its own, which is never run"
    elif settings.take("add_eos_token", bool) and not ends:
        cause = "it has add_eos_token, which transformers doesn't do"
    elif saved.exists() and Tokenizer(saved, 512).encode(["a"])[0][-1] != end:
        cause, cure = "transformers ends texts otherwise than tokenizer.json", "with the add_eos_token that is meant"
    if cause:
        raise ExportError(f"{settings.path}: {cause}, and the last token makes the vector; export a local copy {cure}")
    if not ends:
        logger.warning(
            "%s: its tokenizer puts no token behind a text, and the last token makes the vector; if it was trained "
            "with one, its texts need that at their end",
            checkpoint.id,
        )


def _folder_id(folder: Path) -> str:
    """What a local folder is called; one of the hub's cache, which is called after a commit, as the hub calls it."""
    cached = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return cached.removeprefix("models--").replace("--", "/", 1) if cached.startswith("models--") else folder.name


def _package_folder(spec: ModelSpec) -> Path | None:
    """The ``model`` folder of an installed package, found without importing the package (which pulls in torch)."""
    found = importlib.util.find_spec(spec.package) if spec.package else None
    folder = Path(found.origin).parent / "model" if found and found.origin else None
    return folder if folder and (folder / "config.json").is_file() else None


def _download(hub_id: str, revision: str | None, allow_pickle: bool) -> Path:
    """The hub's snapshot folder in its cache; one request asks if it is whole, unless ``HF_HUB_OFFLINE`` is set."""
    from huggingface_hub import constants, errors, snapshot_download  # reads HF_* variables at import

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*METADATA, *SAFETENSORS]))
        if allow_pickle and not any(folder.glob("*.safetensors")):
            snapshot_download(hub_id, revision=folder.name, allow_patterns=list(PICKLE))
        return folder
    except errors.RevisionNotFoundError:
        raise ExportError(f"{hub_id}: the hub has no revision {revision!r}; see its page's history for one") from None
    except errors.GatedRepoError:
        raise ExportError(f"{hub_id}: gated; accept its terms on the hub and run: hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise ExportError(
            f"{hub_id}: the hub has no such model (or it is private: run hf auth login); {suggest(hub_id)}"
            "run python -m export --list for all names"
        ) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            place = error.filename or constants.HF_HUB_CACHE
            raise _disk_error(hub_id, place, os.strerror(error.errno).lower()) from None
        raise ExportError(
            f"{hub_id}: the hub can't be reached and the model is not in its cache ({type(error).__name__}); check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, or download the model elsewhere and pass its folder"
        ) from None
    except RuntimeError as error:  # hf_xet's, of its own storage servers, or of the disk
        if "os error" in str(error):
            raise _disk_error(hub_id, constants.HF_HUB_CACHE, first_line(error)) from None
        raise ExportError(
            f"{hub_id}: can't be downloaded ({first_line(error)}); set HF_HUB_DISABLE_XET=1, or download the model "
            "elsewhere and pass its folder"
        ) from None
    except errors.HFValidationError as error:
        raise ExportError(f"{hub_id}: not a valid hub id ({error})") from None


def _disk_error(hub_id: str, place: str, cause: str) -> ExportError:
    return ExportError(
        f"{hub_id}: can't be downloaded to {place} ({cause}); free some space, or set HF_HOME to another place"
    )


def _open(path: Path) -> Mapping[str, Loader]:
    if path.suffix in (".bin", ".pt"):
        import torch

        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            return {name: functools.partial(_numpy, tensor) for name, tensor in state.items()}
        except Exception as error:  # torch and pickle raise all sorts on a spoilt or malicious file
            raise ExportError(
                f"{path}: not a plain checkpoint of tensors ({first_line(error)}); convert it to safetensors"
            ) from None
    try:
        with safetensors.safe_open(path, framework="numpy") as stream:
            return {name: functools.partial(_read, path, name) for name in stream.keys()}  # noqa: SIM118  not a mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise ExportError(f"{path}: not a whole safetensors file ({error}); download it again") from None


def _read(path: Path, name: str) -> np.ndarray:
    """One tensor; the file is opened anew for each, since what stays mapped would count as this process's memory."""
    with safetensors.safe_open(path, framework="numpy") as stream:
        tensor: np.ndarray = stream.get_tensor(name)
        return tensor


def _numpy(tensor: Any) -> np.ndarray:  # noqa: ANN401
    """A torch tensor as float32."""
    return tensor.float().numpy()


def _modern(name: str) -> str:
    """Checkpoints from before 2019 call LayerNorm's parameters gamma and beta, as transformers still accepts."""
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name))


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
