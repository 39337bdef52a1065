"""What users see, and what the house forbids: names at the root, a lean import, who may import whom, no assert on input."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import offramp

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "offramp"
FILES = sorted(SOURCE.rglob("*.py"))

NAMES = {
    "attach", "fit", "record", "calibrate", "compile", "report", "export_draft", "export_onnx", "load", "load_plan",
    "Confidence", "Entropy", "Patience",
    "MeanCost", "Risk", "Latency", "PeakCost",
    "LatencyMode", "ThroughputMode", "QuotaMode", "Plain", "Verify", "Accept",
    "LanguageModel", "MultiExit", "Trace", "Plan", "OfframpError", "systems",
}  # fmt: skip

MODEL_LIBRARIES = {"timm", "transformers", "diffusers"}
OPTIONAL = {
    "accelerate", "datasets", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pandas", "PIL", "pyarrow", "scipy", "sklearn",
    "torchvision", "fastapi", "uvicorn", "pynvml",
} | MODEL_LIBRARIES  # fmt: skip


def test_public_names_are_pinned() -> None:
    """A change here is a change for users: it belongs in the changelog."""
    assert set(offramp.__all__) == NAMES
    assert len(offramp.__all__) == len(NAMES) <= 29
    assert all(hasattr(offramp, name) for name in NAMES)


def test_every_plan_can_be_saved_and_loaded_again() -> None:
    plans = get_args(get_type_hints(offramp.load_plan)["return"])
    assert {plan.__name__ for plan in plans} == {"Plan", "DenoisingPlan", "SpeculationPlan", "AcceptPlan"}
    assert all(callable(plan.save) and callable(plan.load) for plan in plans)


def test_public_names_are_documented() -> None:
    for name in NAMES:
        text = inspect.getdoc(getattr(offramp, name)) or ""
        assert len(text) > 20, f"offramp.{name} says nothing about itself"


def test_two_latencies_are_told_apart() -> None:
    assert offramp.Latency(p95_ms=5).p95_ms == 5
    assert offramp.LatencyMode(batch_size=8).batch_size == 8


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert offramp.__version__ == project["version"]


def test_import_is_lean() -> None:
    code = (
        "import json, logging, sys, torch; before = set(sys.modules); settings = (torch.get_num_threads(), torch.get_default_dtype());"
        "handlers = len(logging.getLogger().handlers);"
        "import offramp;"
        "print(json.dumps({'loaded': sorted({m.partition('.')[0] for m in set(sys.modules) - before}),"
        "'cuda': torch.cuda.is_initialized(), 'same': settings == (torch.get_num_threads(), torch.get_default_dtype()),"
        "'handlers': len(logging.getLogger().handlers) - handlers}))"
    )
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not OPTIONAL & set(found["loaded"])
    assert not found["cuda"], "importing offramp started CUDA"
    assert found["same"], "importing offramp changed torch's settings"
    assert found["handlers"] == 0, "importing offramp configured logging"


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Module name, line and whether it happens on import of the file, for every import statement and literal ``import_module``."""
    tree = ast.parse(path.read_text())
    checking = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    guarded = {id(n) for node in checking for n in ast.walk(node)}
    inside = {id(n) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(node)}
    for node in ast.walk(tree):
        lazy = id(node) in inside or id(node) in guarded
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, not lazy
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno, not lazy
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno, not lazy
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "optional")) and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield first.value, node.lineno, not lazy


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_optional_packages_are_imported_inside_functions(path: Path) -> None:
    found = [f"{module}, line {line}" for module, line, eager in imports(path) if eager and module.partition(".")[0] in OPTIONAL]
    assert not found, f"{path.name} needs optional packages on import: {found}"


def test_a_model_library_is_imported_in_the_file_named_after_it() -> None:
    """The shell loads models and tokenizers by the user's own specification (`timm:...`, `hf:...`); nothing else may."""
    wrong = [
        f"{path.relative_to(SOURCE)} imports {module}, line {line}"
        for path in FILES
        for module, line, _ in imports(path)
        if (top := module.partition(".")[0]) in MODEL_LIBRARIES and path.stem != top and SOURCE / "cli" not in path.parents
    ]
    assert not wrong


def test_budget_does_not_know_networks() -> None:
    wrong = [
        f"{path.name}, line {line}"
        for path in (SOURCE / "budget").glob("*.py")
        for module, line, _ in imports(path)
        if module == "torch.nn" or module.startswith("torch.nn.")
    ]
    assert not wrong, f"budget is array code, no network: {wrong}"


def test_core_needs_torch_and_safetensors_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "safetensors", "numpy"}
    wrong = [
        f"{path.name} imports {module}"
        for path in (SOURCE / "core").glob("*.py")
        for module, _, _ in imports(path)
        if module.partition(".")[0] not in allowed and not module.startswith("offramp.core")
    ]
    assert not wrong


def test_nothing_is_unpickled() -> None:
    calls = ("torch.load", "pickle.load", "pickle.loads", "joblib.load")
    wrong = [
        f"{path.relative_to(SOURCE)}, line {node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in calls
    ]
    assert not wrong


def test_user_input_is_not_asserted() -> None:
    """``assert x is not None`` narrows a type for the checker; anything else should raise an error that says what to do."""
    wrong = [
        f"{path.relative_to(SOURCE)}, line {node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and not ast.unparse(node.test).endswith("is not None")
    ]
    assert not wrong
