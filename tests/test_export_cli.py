"""The command line: a summary that can be used as it stands, and one line on stderr for whatever goes wrong."""

import logging
import os
import re
import signal

import pytest

from export.__main__ import main
from export.catalog import load_catalog
from export.verify import THRESHOLDS
from runtime import Embedder

pytestmark = pytest.mark.usefixtures("few_texts")


@pytest.fixture(autouse=True)
def _process_state():
    """The command line sets a signal handler and a log level for its process, which here isn't its own."""
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("runtime").level
    yield
    signal.signal(signal.SIGTERM, handler)
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
    assert "tiny-bert: 32 dimensions, 64 tokens, mean pooling, L2-normalised" in printed
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
    code, printed, _ = cli("--model", tiny_checkpoint, "--variants", " fp32 ,", "--pooling", "cls")
    assert code == 0
    assert 'Embedder("artifacts/tiny-bert")' in printed
    assert " artifacts/tiny-bert/model.fp32.onnx" in printed
    assert Embedder("artifacts/tiny-bert").manifest.pooling == "cls"


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
        *("--help", "--model", "--list", "--out", "--variants", "--revision", "--pooling", "--calibration"),
        *("--allow-pickle", "--force"),
    }


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_130_and_leaves_nothing(cli, tiny_checkpoint, tmp_path, monkeypatch, signum):
    import export.pipeline

    build = export.pipeline.build_graph

    def interrupted(checkpoint):
        os.kill(os.getpid(), signum)
        return build(checkpoint)

    monkeypatch.setattr(export.pipeline, "build_graph", interrupted)
    code, out, error = cli("--model", tiny_checkpoint, "--out", tmp_path / "out")
    assert (code, out) == (130, "")
    assert error == "interrupted: nothing was written\n"
    assert list(tmp_path.iterdir()) == []
