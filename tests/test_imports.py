"""Imports point one way, benchmarks → export → runtime, and the runtime stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"scipy", "usearch", "torch", "transformers", "optimum", "onnx", "export", "huggingface_hub", "safetensors"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh process holds after it ran ``code``."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def imported_by(package: str) -> set[str]:
    """Top-level modules that a package's files name in any import, at whatever depth of code."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found


def test_importing_runtime_loads_nothing_heavy():
    modules = loaded_by("import runtime")
    assert {"runtime", "onnxruntime", "tokenizers", "numpy"} <= modules
    assert not modules & HEAVY


def test_embedding_loads_nothing_heavy(tiny_artifact):
    modules = loaded_by(f"import runtime\nassert runtime.Embedder({str(tiny_artifact)!r}).encode('a text').any()")
    assert not modules & HEAVY


def test_runtime_names_only_its_three_dependencies_and_the_standard_library():
    dependencies = {"runtime", "onnxruntime", "tokenizers", "numpy"}
    optional = {"scipy", "usearch", "prometheus_client"}  # inside sparse_matrix and Retriever alone
    assert imported_by("runtime") - sys.stdlib_module_names == dependencies | optional


def test_export_builds_on_runtime_and_never_on_benchmarks():
    imports = imported_by("export")
    assert "runtime" in imports
    assert "benchmarks" not in imports


def test_every_public_name_can_be_imported():
    import runtime

    assert all(hasattr(runtime, name) for name in runtime.__all__)


@pytest.mark.parametrize("left", ["None", "types.ModuleType('onnxruntime')"])
def test_without_onnxruntime_the_import_says_what_to_install(left):
    """The second is what is left of two packages of which one was removed."""
    code = f"import sys, types; sys.modules['onnxruntime'] = {left}; import runtime"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("runtime.errors.ProviderError: onnxruntime")
    assert "install bge-onnx[cpu]" in message and "bge-onnx[gpu]" in message
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in message


@pytest.mark.parametrize("package", ["runtime", "export"])
def test_packages_have_no_side_effects_on_the_root_logger(package):
    code = f"import logging, {package}; assert not logging.root.handlers and logging.root.level == logging.WARNING"
    loaded_by(code)


def takes_less(limit: float, code: str, *arguments) -> bool:
    """Whether a script says of one of five tries that it took fewer seconds of CPU: other processes slow it down."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    runs = (subprocess.run(command, capture_output=True, text=True, check=True, timeout=120) for _ in range(5))
    return any(float(done.stdout) < limit for done in runs)


def test_importing_runtime_adds_at_most_150_ms_to_its_dependencies():
    code = "import time, numpy, onnxruntime; s = time.process_time(); import runtime; print(time.process_time() - s)"
    assert takes_less(0.15, code)


def test_what_few_need_is_not_imported():
    code = "import sys, runtime; print(sorted({'asyncio', 'importlib.metadata', 'usearch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n"


def test_a_cold_process_has_its_first_vector_within_a_second(minilm):
    code = "import sys, time, runtime; runtime.Embedder(sys.argv[1]).encode('a'); print(time.process_time())"
    assert takes_less(1, code, minilm)
