"""The layers of docs and design: who may import whom, how long files and functions are, which folders there are.

ground <- stages <- assembly <- entry points: an import goes downwards only, and a stage never reaches into another.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (  # from the bottom up; a unit is a file or a folder of clipscale/
    ("__init__", "errors", "config_data", "config", "config_load", "counter", "dist", "telemetry"),
    ("data", "towers", "loss"),
    ("gradcache", "parallel", "optim", "checkpoint", "eval"),
    ("train", "feed", "evaluate", "cli", "__main__", "bench", "plan"),
)
GROUND, TOP = 0, len(LAYERS) - 1
FOLDERS = {"clipscale", "configs", "data_tools", "tests", "slurm", "docs", ".ci", ".github"}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 400, 80, 120
SOURCES = sorted([*ROOT.glob("clipscale/**/*.py"), *ROOT.glob("data_tools/**/*.py")])


def name_of(path: Path) -> str:
    """clipscale/data/tar.py -> clipscale.data.tar"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


def unit_of(module: str) -> str:
    """clipscale.data.tar -> data; clipscale -> __init__; a module of data_tools -> data_tools."""
    parts = module.split(".")
    if parts[0] != "clipscale":
        return parts[0]
    return parts[1] if len(parts) > 1 else "__init__"


def layer_of(unit: str) -> int:
    return next(number for number, units in enumerate(LAYERS) if unit in units)


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that the code imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full, not relative"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("clipscale", "data_tools"))


def forbidden(module: str, code: str) -> list[str]:
    """What `module` imports and must not."""
    return [name for name in imported(ast.parse(code)) if not allowed(unit_of(module), unit_of(name))]


def allowed(unit: str, target: str) -> bool:
    if unit == target:
        return True
    if target == "data_tools" or unit == "errors":
        return False
    if unit == "data_tools":
        return target == "data" or layer_of(target) == GROUND
    own, other = layer_of(unit), layer_of(target)
    return other < own or own == other in (GROUND, TOP)


def test_every_unit_has_a_layer():
    units = {unit_of(module) for module in MODULES} - {"data_tools"}
    assert units <= {unit for layer in LAYERS for unit in layer}


def test_imports_go_downwards_only():
    wrong = {name_of(path): names for path in SOURCES if (names := forbidden(name_of(path), path.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("clipscale.errors", "from clipscale.counter import fold"),
        ("clipscale.config_data", "import clipscale.data.tar"),
        ("clipscale.counter", "import clipscale.data.tar"),
        ("clipscale.data.tar", "from clipscale.loss import contrastive_grads"),
        ("clipscale.towers", "def f():\n    from clipscale import data"),
        ("clipscale.loss.ring", "from clipscale.gradcache import embed"),
        ("clipscale.gradcache", "import clipscale.optim as o"),
        ("clipscale.eval.suite", "from clipscale.checkpoint import verify"),
        ("clipscale.checkpoint", "from clipscale import train"),
        ("clipscale.train", "from data_tools import make_shards"),
        ("data_tools.make_shards", "from clipscale.towers import Tower"),
        ("data_tools.make_shards", "from clipscale.train import train"),
    ],
)
def test_the_checker_catches(module, code):
    assert forbidden(module, code)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("clipscale.dist", "from clipscale.errors import require"),
        ("clipscale.data.tar", "from clipscale.data.index import Shard\nfrom clipscale import __version__"),
        ("clipscale.gradcache", "from clipscale.loss import contrastive_grads"),
        ("clipscale.eval.suite", "from clipscale.eval.zeroshot import load_task\nfrom clipscale.data import source"),
        ("clipscale.cli", "from clipscale.train import train\nimport torch"),
        ("data_tools.make_shards", "from clipscale.data.decode import decode\nfrom clipscale.config_data import Data"),
    ],
)
def test_the_checker_lets_pass(module, code):
    assert not forbidden(module, code)


def test_files_and_functions_are_short():
    long = []
    for path in SOURCES:
        code = path.read_text()
        if (lines := len(code.splitlines())) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES
                if (lines := node.end_lineno - node.lineno + 1) > limit:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


@pytest.mark.needs("git")
def test_top_level_folders():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {Path(line).parts[0] for line in tracked.stdout.splitlines() if "/" in line}
    assert folders <= FOLDERS
    missing = {name for name in FOLDERS if not name.startswith(".") and not (ROOT / name).is_dir()}
    assert not missing


def test_help_and_configuration_leave_torch_alone():
    """So that help, --print-config and mistakes answer at once."""
    code = """
import sys
import clipscale.config_load
from clipscale.cli import main
assert main(["train", "configs/quickstart.yaml", "--print-config"]) == 0
assert main(["train", "configs/quickstart.yaml", "gradcache.image_chunk=0"]) == 2
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
loaded = [name for name in ("torch", "open_clip", "webdataset") if name in sys.modules]
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
