"""The command line: a summary that can be used as it stands, and one line on stderr for whatever goes wrong."""

import json
import logging
import os
import re
import shutil
import signal
import sys

import pytest

from export.__main__ import STOPPED_BY, main
from export.catalog import load_catalog
from export.verify import THRESHOLDS
from runtime import Embedder

pytestmark = pytest.mark.usefixtures("few_texts")


@pytest.fixture(autouse=True)
def _process_state():
    """The command line sets a signal handler and a log level for its process, which here isn't its own."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPED_BY}  # under nohup, too
    level = logging.getLogger("runtime").level
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.getLogger("runtime").setLevel(level)


@pytest.fixture
def cli(capsys):
    """A function that runs the command line and returns exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_list_shows_each_model_in_full(cli):
    code, out, error = cli("--list")
    assert (code, error) == (0, "")
    rows = {line.split()[0]: line for line in out.splitlines()}
    for spec in load_catalog().values():
        assert f" {spec.hub} " in rows[spec.name]
        assert f" {spec.max_length} " in rows[spec.name] + " "
        assert (spec.pooling or "") in rows[spec.name]


def test_a_piped_list_isnt_cut_to_a_terminals_width(start):
    out, error = start("-m", "export", "--list").communicate(timeout=60)
    assert error == ""
    assert {spec.name for spec in load_catalog().values()} < {line.partition(" ")[0] for line in out.splitlines()}
    assert "…" not in out


def test_an_export_prints_figures_paths_and_how_to_use_it(cli, tiny_checkpoint, tmp_path):
    (tmp_path / "texts").write_text("one text\nand another\n")
    out = tmp_path / "out"
    code, printed, error = cli("--model", tiny_checkpoint, "--out", out, "--calibration", tmp_path / "texts")
    assert (code, error) == (0, "")
    assert "tiny-bert: 32 dimensions, 64 tokens, mean pooling, L2-normalised\nquery prompt: none\n" in printed
    for variant in ("fp32", "int8"):
        figures = (
            rf"^{variant} +\d\.\d MB +(0|1)\.\d{{6}} +(0|1)\.\d{{6}} +{re.escape(str(out))}/model\.{variant}\.onnx$"
        )
        assert re.search(figures, printed, re.MULTILINE)
    scope: dict = {}
    exec(printed[printed.index("from runtime") :], scope)
    assert scope["vectors"].shape == (2, 32)


def test_paths_below_the_working_folder_are_printed_short(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ("--query-prompt", "find\nin: ", "--passage-prompt", "")
    code, printed, _ = cli("--model", tiny_checkpoint, "--variants", " fp32 ,", "--pooling", "cls", *prompts)
    assert code == 0
    assert 'Embedder("artifacts/tiny-bert")' in printed
    assert " artifacts/tiny-bert/model.fp32.onnx" in printed
    assert "\nquery prompt: find\\nin: \n" in printed
    assert "- query prompt: `find\\nin: `\n" in (tmp_path / "artifacts" / "tiny-bert" / "README.md").read_text()
    embedder = Embedder("artifacts/tiny-bert")
    assert (embedder.manifest.pooling, embedder.manifest.prompts) == ("cls", {"query": "find\nin: "})
    assert (embedder.encode_queries("a river") == embedder.encode("find\nin: a river")).all()


def test_force_replaces_what_is_there(cli, tiny_checkpoint, tiny_artifact, copied):
    out = copied(tiny_artifact)
    arguments = ("--model", tiny_checkpoint, "--out", out, "--variants", "fp32")
    assert cli(*arguments)[0] == 1
    assert cli(*arguments, "--force")[0] == 0
    assert not (out / "model.int8.onnx").exists()


def error_line(result: tuple[int, str, str]) -> str:
    """The one line of an error, which is all that was printed."""
    code, out, error = result
    assert (code, out) == (1, "")
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "bge-bse"], "did you mean bge-base"),
        (["--model", "no such"], "python -m export --list"),
        (["--model", "./no-such"], "./no-such: no such folder"),
        (["--model", ""], "no model is named"),
        (["--model", "{tiny}", "--variants", "fp32", "--calibration", "/nowhere"], "leave out --calibration"),
        (["--model", "org/none"], "the hub can't be reached"),
        (["--model", "{tiny}", "--revision", "v1"], "leave out --revision"),
        (["--model", "{tiny}", "--variants", "fp64"], "variant 'fp64' is unknown"),
        (["--model", "{tiny}", "--variants", ","], "variant"),
        (["--model", "{tiny}", "--calibration", "/nowhere"], "/nowhere: can't be read"),
        (["--model", "{tiny}", "--out", "{tmp}"], "not an artifact|exists already"),
        (["--model", "{tmp}"], "no config.json"),
        (["--model", "{tiny}", "--out", "{file}/out"], "file: .*another --out"),
    ],
)
def test_each_error_is_one_line_with_its_cure(cli, tiny_checkpoint, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    places = {"tiny": tiny_checkpoint, "tmp": tmp_path, "file": tmp_path / "file"}
    line = error_line(cli(*(argument.format(**places) for argument in arguments)))
    assert re.search(said, line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


CONFIG, MODULES, POOLING = "config.json", "modules.json", "1_Pooling/config.json"
TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
XLMR = {"model_type": "xlm-roberta", "max_position_embeddings": 64}
MODERNBERT = {"model_type": "modernbert"}
CLASSIFIER = {"architectures": ["BertForSequenceClassification"]}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (CONFIG, {"model_type": None}, "model_type is None, not str"),
        (CONFIG, {"model_type": ["bert"]}, "model_type is"),
        (CONFIG, {"model_type": "__init__"}, "no family builds '__init__'"),
        (CONFIG, {"architectures": 5}, "architectures is 5, not list"),
        (CONFIG, {"architectures": [5], "hidden_size": "32"}, "hidden_size is '32', not int"),
        (CONFIG, {"num_hidden_layers": "2"}, "layers is '2', not a whole number from 1 up"),
        (CONFIG, {"num_hidden_layers": -1}, "layers is -1"),
        (CONFIG, {"num_attention_heads": 0}, "heads is 0"),
        (CONFIG, {"num_attention_heads": 7}, "7 attention heads can't share 32 dimensions"),
        (CONFIG, {"num_attention_heads": True}, "heads is True"),
        (CONFIG, {"layer_norm_eps": "small"}, "epsilon is 'small'"),
        (CONFIG, {"vocab_size": "1000"}, "vocab_size is '1000', not int"),
        (CONFIG, {"max_position_embeddings": "64"}, "max_position_embeddings is '64', not int"),
        (CONFIG, {"max_position_embeddings": -64}, "max length is -64"),
        (CONFIG, {**XLMR, "pad_token_id": None}, "pad_token_id is None, not int"),
        (CONFIG, {**XLMR, "pad_token_id": 70}, "max length is -7"),
        (CONFIG, {**MODERNBERT, "local_attention": "128"}, "window is '128', not a whole number from 0 up"),
        (CONFIG, {**MODERNBERT, "local_rope_theta": "1e4"}, "the theta '1e4', not a positive number"),
        (CONFIG, {**MODERNBERT, "rope_parameters": {"full_attention": 5}}, "config.json doesn't fit"),
        (CONFIG, {**CLASSIFIER, "id2label": 5}, "id2label is 5, not dict"),
        (CONFIG, {**CLASSIFIER, "num_labels": "1"}, "num_labels is '1', not int"),
        (MODULES, [{"path": ""}], "the module without a type can't be exported"),
        (MODULES, [5], "the module without a type can't be exported"),
        (MODULES, [{**TRANSFORMER, "path": 5}], "path is 5, not str"),
        (MODULES, [{**TRANSFORMER, "type": 5}], "type is 5, not str"),
        (POOLING, {"pooling_mode": 5}, "pooling_mode is 5, not str | list"),
        (POOLING, {"pooling_mode": [5]}, "pooling by 5 is not supported"),
        (POOLING, {"include_prompt": "no"}, "include_prompt is 'no', not bool"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, r"prompts is \['a'\], not dict"),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}, "query is 5, not str"),
        ("sentence_bert_config.json", {"max_seq_length": "256"}, "max_seq_length is '256'"),
        ("sentence_bert_config.json", {"max_seq_length": float("nan")}, "max length is nan"),
        ("sentence_bert_config.json", {"max_seq_length": -5}, "max length is -5"),
        ("sentence_bert_config.json", {"do_lower_case": 5}, "do_lower_case is 5, not bool"),
        ("tokenizer_config.json", {"model_max_length": "64"}, "model_max_length is '64'"),
        (INDEX, {}, "weight_map doesn't name files"),
        (INDEX, {"weight_map": {}}, "weight_map doesn't name files"),
        (INDEX, {"weight_map": ["model.safetensors"]}, "weight_map is"),
        (INDEX, {"weight_map": {"a": 5}}, "5 is missing"),
        (INDEX, {"weight_map": {"a": "../1/model.safetensors"}}, "weight_map doesn't name files"),
    ],
)
def test_a_malformed_checkpoint_is_one_line(cli, tiny_checkpoint, copied, tmp_path, file, content, said):
    path = copied(tiny_checkpoint) / file
    if path.exists() and isinstance(content, dict):
        content = json.loads(path.read_text("utf-8")) | content
    path.write_text(json.dumps(content), "utf-8")
    if file == INDEX:  # which isn't read where all is in one file
        (path.parent / "model.safetensors").unlink()
    arguments = ("--model", tmp_path / tiny_checkpoint.name, "--out", tmp_path / "out", "--variants", "fp32")
    assert re.search(said, error_line(cli(*arguments)))
    assert not (tmp_path / "out").exists()


WITHOUT = """
import runpy, sys
sys.modules[{name!r}] = None
sys.argv[1:] = ["--list"]
runpy.run_module("export", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["onnxruntime", "rich.console"])
def test_a_missing_dependency_is_one_line(start, name):
    process = start("-c", WITHOUT.format(name=name))
    out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error.count("\n")) == (1, "", 1)
    assert re.match(f"error: .*{name}.* install .*bge-onnx\\[cpu", error)


def test_a_missing_module_of_our_own_is_not_called_a_dependency(start):
    error = start("-c", WITHOUT.format(name="export.card")).communicate(timeout=60)[1]
    assert "ModuleNotFoundError" in error
    assert "pip install" not in error


def test_a_parity_error_is_one_line_too(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(THRESHOLDS, "fp32", {"cosine_mean": 1.5})
    line = error_line(cli("--model", tiny_checkpoint, "--out", tmp_path / "out", "--variants", "fp32"))
    assert "fp32: cosine mean to the original" in line
    assert list(tmp_path.iterdir()) == []


def test_brackets_in_a_name_are_not_taken_for_markup(cli, tmp_path):
    folder = tmp_path / "a [red]model"
    folder.mkdir()
    assert "a [red]model" in error_line(cli("--model", folder))


@pytest.mark.parametrize(
    "arguments",
    [[], ["--model"], ["--model", "a", "--list"], ["--model", "a", "--pooling", "sum"], ["--modle", "a"], ["a"]],
)
def test_bad_usage_exits_2_and_says_how(capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("usage: python -m export")
    assert "Traceback" not in error


def test_help_names_each_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert options == {
        *(
            "--help",
            "--model",
            "--list",
            "--out",
            "--variants",
            "--revision",
            "--pooling",
            "--query-prompt",
            "--passage-prompt",
            "--calibration",
            "--min-cosine",
        ),
        *("--allow-pickle", "--force"),
    }


def test_a_name_that_looks_like_markup_is_printed_as_it_is(cli, tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "model[v2]")
    code, out, error = cli("--model", folder, "--out", tmp_path / "[red]" / "[" / "b]", "--variants", "fp32")
    assert (code, error) == (0, "")
    assert "model[v2]: " in out and f"{tmp_path}/[red]/[/b]/model.fp32.onnx" in out


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_package_that_is_missed_along_the_way_is_named(cli, tiny_checkpoint, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, error = cli("--model", tiny_checkpoint, "--out", tmp_path / "out", "--variants", "fp32")
    assert (code, out) == (1, "")
    assert re.fullmatch(f"error: an export needs a package that can't be imported .*{package}.*; run: pip .*\n", error)


@pytest.mark.parametrize("signum", [signal.SIGINT, *STOPPED_BY])
def test_an_interrupt_exits_130_and_leaves_nothing(cli, tiny_checkpoint, tmp_path, monkeypatch, signum):
    import export.pipeline

    build = export.pipeline.build_graph

    def interrupted(checkpoint, encoder):
        os.kill(os.getpid(), signum)
        return build(checkpoint, encoder)

    def interrupted_again(folder, **options):
        if signum in STOPPED_BY:
            os.kill(os.getpid(), signum)
        return rmtree(folder, **options)

    rmtree = shutil.rmtree
    monkeypatch.setattr(export.pipeline, "build_graph", interrupted)
    monkeypatch.setattr(export.pipeline.shutil, "rmtree", interrupted_again)
    code, out, error = cli("--model", tiny_checkpoint, "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert error == "interrupted: nothing is left half written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_closes_doesnt_end_what_runs_under_nohup(cli):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    inside = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("export.__main__._list", lambda: inside.append(signal.getsignal(signal.SIGHUP)))
        cli("--list")
    assert inside == [signal.SIG_IGN] == [signal.getsignal(signal.SIGHUP)]
