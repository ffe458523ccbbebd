"""An export writes exactly one verified artifact, or nothing at all."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_checkpoint, tiny_bert_config

import export.pipeline
from export.errors import ExportError, ParityError
from export.pipeline import TOOLS, export_model
from export.source import load_tokenizer, resolve_source
from export.verify import LONGEST, QUERIES, THRESHOLDS, TOP, Answers, compare, long_text, verification_texts
from runtime.manifest import load_manifest

pytestmark = pytest.mark.usefixtures("few_texts")

FILES = ["README.md", "manifest.json", "model.fp32.onnx", "model.int8.onnx", "tokenizer.json"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_folder_holds_what_the_manifest_lists_and_nothing_else(tiny_artifact):
    assert names(tiny_artifact) == FILES
    assert names(tiny_artifact.parent) == [tiny_artifact.name]
    assert tiny_artifact.stat().st_mode & 0o777 == 0o755


def test_the_manifest_tells_size_and_checksum_of_each_file(tiny_artifact):
    manifest = load_manifest(tiny_artifact)
    assert sorted(manifest.files) == ["model.fp32.onnx", "model.int8.onnx", "tokenizer.json"]
    for name, file in manifest.files.items():
        assert (file.size, file.sha256) == ((tiny_artifact / name).stat().st_size, sha256(tiny_artifact / name))


def test_the_manifest_describes_the_model_and_its_source(tiny_artifact, tiny_checkpoint):
    manifest = load_manifest(tiny_artifact)
    assert (manifest.format_version, manifest.name, manifest.kind) == (2, "tiny-bert", "embedder")
    assert (manifest.architecture, manifest.dim, manifest.max_length) == ("bert", 32, 64)
    assert (manifest.pooling, manifest.normalize, manifest.prompts) == ("mean", True, {})
    assert (manifest.source.id, manifest.source.origin, manifest.source.revision) == ("tiny-bert", "folder", None)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest.source.checksums.keys()
    for name, checksum in manifest.source.checksums.items():
        assert checksum == sha256(tiny_checkpoint / name)
    assert manifest.tools.keys() == set(TOOLS)
    assert all(version[0].isdigit() for version in manifest.tools.values())


def test_each_variant_has_its_parity_above_the_threshold(tiny_artifact):
    manifest = load_manifest(tiny_artifact)
    assert list(manifest.variants) == ["fp32", "int8"]
    for name, variant in manifest.variants.items():
        assert variant.file == f"model.{name}.onnx"
        assert variant.parity.texts == len(verification_texts()) + 1  # and a long one
        assert variant.parity.cosine_mean >= THRESHOLDS[name]["cosine_mean"]
        assert variant.parity.cosine_mean >= variant.parity.cosine_min >= THRESHOLDS[name]["cosine_min"]
        assert variant.parity.cosine_mean <= 1 + 1e-9
    fp32, int8 = manifest.variants.values()
    assert fp32.parity.cosine_min > int8.parity.cosine_min  # they were measured, each for itself
    assert (fp32.quantization, "W8A8" in int8.quantization) == (None, True)
    assert ("CUDAExecutionProvider" in fp32.providers, int8.providers) == (True, ("CPUExecutionProvider",))


def test_the_card_shows_how_to_use_the_model_and_its_figures(tiny_artifact):
    card, manifest = (tiny_artifact / "README.md").read_text("utf-8"), load_manifest(tiny_artifact)
    assert card.startswith("# tiny-bert\n")
    assert "from runtime import Embedder" in card
    assert "32 dimensions, 64 tokens, mean pooling, L2-normalised" in card
    for name, variant in manifest.variants.items():
        assert (
            f"| {name} | {manifest.files[variant.file].size / 1e6:.1f} MB | {variant.parity.cosine_mean:.6f} |" in card
        )


def test_no_verification_text_calibrates():
    from export.calibrate import calibration_texts

    assert not set(verification_texts()) & set(calibration_texts())
    assert len(set(verification_texts())) == len(verification_texts()) >= 50


@pytest.fixture(scope="module")
def dressed(tmp_path_factory):
    """The artifact of a checkpoint with everything that may stand beside weights, and the steps that were told."""
    folder = tmp_path_factory.mktemp("dressed")
    checkpoint = make_checkpoint(folder / "Tiny", tiny_bert_config(hidden_act="gelu_new"), pooling="cls")
    types = ("Transformer", "Pooling")
    modules = [{"path": "1_Pooling" * i, "type": f"sentence_transformers.models.{t}"} for i, t in enumerate(types)]
    for name, content in {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 20},
        "config_sentence_transformers.json": {"prompts": {"query": "find: ", "document": "text: "}},
    }.items():
        (checkpoint / name).write_text(json.dumps(content))
    (checkpoint / "LICENSE.txt").write_text("Do as you like.")
    (checkpoint / "train.py").write_text("")
    steps = []
    variants = ["fp32"]
    artifact = export_model(str(checkpoint), folder / "out", variants, progress=lambda *step: steps.append(step))
    return artifact, steps


def test_pooling_prompts_length_and_normalisation_are_the_checkpoints(dressed):
    manifest = dressed[0].manifest
    assert (manifest.pooling, manifest.normalize, manifest.max_length) == ("cls", False, 20)
    assert manifest.prompts == {"query": "find: ", "passage": "text: "}
    assert {"modules.json", "sentence_bert_config.json"} <= manifest.source.checksums.keys()


def test_the_licence_goes_along_and_is_checksummed(dressed):
    path, manifest = dressed[0].path, dressed[0].manifest
    assert names(path) == ["LICENSE.txt", "README.md", "manifest.json", "model.fp32.onnx", "tokenizer.json"]
    assert (path / "LICENSE.txt").read_text() == "Do as you like."
    assert manifest.files["LICENSE.txt"].sha256 == sha256(path / "LICENSE.txt")


def test_gelu_new_and_an_unnormalised_model_pass_verification(dressed):
    assert dressed[0].manifest.variants["fp32"].parity.cosine_min > 0.99999
    assert load_manifest(dressed[0].path) == dressed[0].manifest


def test_progress_is_told_from_nothing_to_nearly_all(dressed):
    shares = [share for _, share in dressed[1]]
    assert shares == sorted(shares)
    assert (shares[0], 0.9 < shares[-1] <= 1) == (0.0, True)
    assert all(step for step, _ in dressed[1])


@pytest.mark.parametrize("changes", [{"hidden_act": "relu"}, {"hidden_act": "silu"}, {"type_vocab_size": 1}])
def test_other_activations_and_one_token_type_pass_verification(tmp_path, changes):
    checkpoint = make_checkpoint(tmp_path / "m", tiny_bert_config(**changes), pooling="max")
    artifact = export_model(str(checkpoint), tmp_path / "out", ["fp32"])
    assert artifact.manifest.variants["fp32"].parity.cosine_min > 0.99999


def test_only_the_variants_asked_for_are_written(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact = export_model(str(tiny_checkpoint), variants=["int8"], pooling="cls")
    assert artifact.path == tmp_path / "artifacts" / "tiny-bert"
    assert names(artifact.path) == [name for name in FILES if "fp32" not in name]
    assert (list(artifact.manifest.variants), artifact.manifest.pooling) == (["int8"], "cls")


def test_the_users_own_texts_calibrate(tiny_checkpoint, tiny_artifact, tmp_path):
    (tmp_path / "texts").write_text("one text\nand another\nand a third\n")
    artifact = export_model(str(tiny_checkpoint), tmp_path / "out", ["int8"], calibration=tmp_path / "texts")
    assert "calibrated on 3 texts" in artifact.manifest.variants["int8"].quantization
    assert (artifact.path / "model.int8.onnx").read_bytes() != (tiny_artifact / "model.int8.onnx").read_bytes()


# Refusals


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_variant_below_its_threshold_is_an_error_with_figures_and_cure_and_leaves_nothing(
    tiny_checkpoint, tmp_path, monkeypatch, variant
):
    monkeypatch.setitem(THRESHOLDS, variant, {"cosine_min": 0.5, "cosine_mean": 1.5})
    texts = tmp_path / "texts" if variant == "int8" else None
    (tmp_path / "texts").write_text("one text\nand another\n")
    cure = {"fp32": "please report the model", "int8": "--calibration"}[variant]
    with pytest.raises(ParityError, match=rf"{variant}: cosine mean .* is [01]\.\d+ .* 1.5 is asked for; .*{cure}"):
        export_model(str(tiny_checkpoint), tmp_path / "very" / "deep" / "out", [variant], calibration=texts)
    assert names(tmp_path) == ["texts"]


def test_wrong_pooling_is_caught_by_verification(tiny_checkpoint, tmp_path, monkeypatch):
    def mistaken(checkpoint, texts):
        spec = dataclasses.replace(checkpoint.spec, pooling="cls")
        return reference(dataclasses.replace(checkpoint, spec=spec), texts)

    reference = export.pipeline.reference_answers
    monkeypatch.setattr(export.pipeline, "reference_answers", mistaken)
    with pytest.raises(ParityError, match="fp32: cosine"):
        export_model(str(tiny_checkpoint), tmp_path / "out", ["fp32"])
    assert names(tmp_path) == []


def test_an_existing_folder_is_left_alone_without_force(tiny_checkpoint, tiny_artifact, copied):
    out = copied(tiny_artifact)
    before = contents(out)
    with pytest.raises(ExportError, match=f"{out}: exists already; pass --force"):
        export_model(str(tiny_checkpoint), out)
    assert contents(out) == before
    assert names(out.parent) == [out.name]


def test_force_replaces_an_artifact_and_leaves_no_sibling(tiny_checkpoint, tiny_artifact, copied):
    out = copied(tiny_artifact)
    (out / "stray").touch()
    export_model(str(tiny_checkpoint), out, ["fp32"], force=True)
    assert names(out) == [name for name in FILES if "int8" not in name]
    assert names(out.parent) == [out.name]


def test_force_takes_an_empty_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert export_model(str(tiny_checkpoint), tmp_path / "out", ["fp32"], force=True).path == tmp_path / "out"
    assert names(tmp_path) == ["out"]


def test_a_failed_replacement_keeps_the_old_artifact(tiny_checkpoint, tiny_artifact, copied, monkeypatch):
    out = copied(tiny_artifact)
    before = contents(out)
    monkeypatch.setitem(THRESHOLDS, "fp32", {"cosine_mean": 1.5})
    with pytest.raises(ParityError):
        export_model(str(tiny_checkpoint), out, ["fp32"], force=True)
    assert contents(out) == before
    assert names(out.parent) == [out.name]


def test_a_link_is_followed_and_stays_a_link(tiny_checkpoint, tiny_artifact, copied):
    folder = copied(tiny_artifact)
    link = folder.parent / "link"
    link.symlink_to(folder.name)
    assert export_model(str(tiny_checkpoint), link, ["fp32"], force=True).path == link
    assert names(folder) == [name for name in FILES if "int8" not in name]
    assert link.is_symlink()
    assert names(folder.parent) == ["link", folder.name]


def test_a_link_that_leads_nowhere_is_an_error(tiny_checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ExportError, match="link: a link that leads nowhere; remove it"):
        export_model(str(tiny_checkpoint), tmp_path / "link", ["fp32"], force=True)
    assert names(tmp_path) == ["link"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_force_never_replaces_what_isnt_an_artifact(tiny_checkpoint, tmp_path, kind):
    out = tmp_path / "precious"
    thesis = out if kind == "file" else out / "thesis.txt"
    thesis.parent.mkdir(exist_ok=True)
    thesis.write_text("years of work")
    with pytest.raises(ExportError, match=f"{out}: not an artifact, so --force won't replace it"):
        export_model(str(tiny_checkpoint), out, force=True)
    assert thesis.read_text() == "years of work"


MANIFESTS = ['{"manifest_version": 3, "name": "a browser extension"}', "5", "null", '"format_version"', "{"]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_force_never_replaces_a_folder_whose_manifest_isnt_ours(tiny_checkpoint, tmp_path, manifest):
    out = tmp_path / "extension"
    out.mkdir()
    (out / "manifest.json").write_text(manifest)
    with pytest.raises(ExportError, match="not an artifact"):
        export_model(str(tiny_checkpoint), out, ["fp32"], force=True)
    assert names(out) == ["manifest.json"]


@pytest.mark.parametrize("variants", [["fp64"], ["fp32", "INT8"], [""]])
def test_an_unknown_variant_is_an_error_before_any_work(tiny_checkpoint, tmp_path, variants):
    with pytest.raises(ExportError, match=f"variant '{variants[-1]}' is unknown; it is any of fp32, int8"):
        export_model(str(tiny_checkpoint), tmp_path / "out", variants)
    assert names(tmp_path) == []


@pytest.mark.parametrize("variants", [[], ["fp32", "fp32"]])
def test_no_variant_is_an_error_and_one_named_twice_is_one(tiny_checkpoint, tmp_path, variants):
    if not variants:
        with pytest.raises(ExportError, match="variant"):
            export_model(str(tiny_checkpoint), tmp_path / "out", variants)
        assert names(tmp_path) == []
    else:
        assert list(export_model(str(tiny_checkpoint), tmp_path / "out", variants).manifest.variants) == ["fp32"]


def test_a_tokenizer_with_more_words_than_the_model_is_a_clean_error(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "m", tiny_bert_config(vocab_size=300))
    with pytest.raises(ExportError, match="m: its tokenizer has ids up to 999 where the model has 300 words"):
        export_model(str(checkpoint), tmp_path / "out", ["fp32"])
    assert names(tmp_path) == ["m"]


def test_calibration_texts_without_int8_are_an_error_not_ignored(tiny_checkpoint, tmp_path):
    with pytest.raises(ExportError, match="texts: calibrates int8, which isn't asked for; leave out --calibration"):
        export_model(str(tiny_checkpoint), tmp_path / "out", ["fp32"], calibration=tmp_path / "texts")


def test_a_folder_called_licence_is_no_licence(tiny_checkpoint, copied, tmp_path):
    folder = copied(tiny_checkpoint)
    (folder / "LICENSE").mkdir()
    (folder / "LICENSES").mkdir()
    artifact = export_model(str(folder), tmp_path / "out", ["fp32"])
    assert names(artifact.path) == [name for name in FILES if "int8" not in name]


@pytest.mark.parametrize("lowercase", [True, False])
def test_lower_casing_that_the_tokenizer_doesnt_do_is_an_error(tiny_checkpoint, copied, tmp_path, lowercase):
    folder = copied(tiny_checkpoint)
    (folder / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    for name, key in (("tokenizer.json", "normalizer"), ("tokenizer_config.json", None)):
        settings = json.loads((folder / name).read_text("utf-8"))
        (settings[key] if key else settings).update({"lowercase" if key else "do_lower_case": lowercase})
        (folder / name).write_text(json.dumps(settings), "utf-8")
    if lowercase:
        export_model(str(folder), tmp_path / "out", ["fp32"])
    else:
        with pytest.raises(ExportError, match="sentence_bert_config.json: do_lower_case is true"):
            export_model(str(folder), tmp_path / "out", ["fp32"])


UNKNOWN = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
MODEL = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}


@pytest.mark.parametrize(
    ("config", "tokenizer", "said"),
    [
        ({"auto_map": UNKNOWN["auto_map"]}, {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, None),
        (
            MODEL,
            {},
            r"config.json: its auto_map names code .*evil.Evil.* is never run; .* without the auto_map",
        ),
        ({"auto_map": {"AutoModelForMaskedLM": "evil.Evil"}}, {}, None),  # an embedder isn't loaded with it
        (UNKNOWN, {}, "no family builds 'evil' .* custom code"),
        (UNKNOWN, {"tokenizer_class": None}, "custom code"),
        ({}, {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}, "custom code"),
    ],
)
def test_code_in_a_checkpoint_never_runs_whatever_the_user_answers(
    tiny_checkpoint, copied, tmp_path, monkeypatch, config, tokenizer, said
):
    folder, proof = copied(tiny_checkpoint), tmp_path / "proof"
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        settings = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(settings | changes), "utf-8")
    if said:
        with pytest.raises(ExportError, match=said):
            export_model(str(folder), tmp_path / "out", ["fp32"])
    else:
        export_model(str(folder), tmp_path / "out", ["fp32"])
    assert not proof.exists()


def test_a_checkpoint_without_tokenizer_is_a_clean_error(tiny_checkpoint, copied, tmp_path):
    folder = copied(tiny_checkpoint)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match="tiny-bert: no fast tokenizer .* add its tokenizer.json"):
        export_model(str(folder), tmp_path / "out", ["fp32"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["TokenizersBackend", "BertTokenizer", "BertTokenizerFast"])
def test_a_tokenizer_saved_by_transformers_5_is_read(name, tiny_checkpoint, tiny_artifact, copied, tmp_path):
    settings = copied(tiny_checkpoint) / "tokenizer_config.json"
    new = {"tokenizer_class": name, "extra_special_tokens": ["[MASK]"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | new))
    artifact = export_model(str(settings.parent), tmp_path / "out", ["fp32"])
    for file in ("model.fp32.onnx", "tokenizer.json"):
        assert (artifact.path / file).read_bytes() == (tiny_artifact / file).read_bytes()


def test_a_tokenizer_that_cuts_on_the_left_is_refused(tiny_checkpoint, copied, tmp_path):
    settings = copied(tiny_checkpoint) / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    with pytest.raises(ExportError, match="tiny-bert: its tokenizer cuts texts on the left"):
        export_model(str(settings.parent), tmp_path / "out", ["fp32"])


def test_a_text_past_the_max_length_is_verified_too(tiny_checkpoint, tmp_path, monkeypatch):
    """Only late positions differ, and only what is cut: no short text would show it."""
    build = export.pipeline.build_graph

    def spoil(checkpoint, encoder):
        graph = build(checkpoint, encoder)
        table = graph.weights["embeddings.position"]().copy()
        table[-1, 0] += 9
        graph.weights["embeddings.position"] = lambda: table
        return graph

    monkeypatch.setattr(export.pipeline, "build_graph", spoil)
    monkeypatch.setattr(export.pipeline, "verification_texts", lambda: ["a short text", "and another"])
    with pytest.raises(ParityError, match="fp32: cosine .* on 3 texts"):
        export_model(str(tiny_checkpoint), tmp_path / "out", ["fp32"])


@pytest.mark.parametrize("max_length", [16, 64, 2048, 8192])
def test_the_long_text_has_about_fifty_tokens_more_than_the_limit(tiny_checkpoint, max_length):
    tokenizer = load_tokenizer(resolve_source(str(tiny_checkpoint)))
    tokens = len(tokenizer(long_text(["a b", "中文中文"], max_length, tokenizer))["input_ids"])
    assert min(max_length, LONGEST) + 40 < tokens <= min(max_length, LONGEST) + 52


@pytest.mark.parametrize(("apart", "agreement"), [(0.00002, 1), (0.01, 1 - 1 / (QUERIES * TOP))])
def test_passages_that_fp32_tells_apart_by_chance_count_as_the_same(apart, agreement):
    """Two of random weights were, and failed a test once in a hundred runs."""
    scores = np.tile(np.arange(16.0), (QUERIES, 1))
    fifth, sixth = 16 - TOP, 15 - TOP
    scores[0, sixth] = scores[0, fifth] - apart
    original = Answers(scores=scores.ravel().tolist())
    scores[0, [fifth, sixth]] = scores[0, [sixth, fifth]]
    assert compare(original, Answers(scores=scores.ravel().tolist())).score_top_agreement == agreement
