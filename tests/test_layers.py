"""The rooms of clipscale/ and their laws: who may import whom, what a room must not touch, how long files are.

A room is a folder or a file. An import goes downwards only: ground <- stages <- assembly <- entry points, and inside
data/ load -> pipeline -> source -> shard -> pixels -> bad, beside order, tokenize, fetch and shapes.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TELEMETRY = {
    f"telemetry.{name}"
    for name in ("board", "faults", "goodput", "growing", "parts", "parts_picture", "runlog", "wandb_board")
}
UPSTREAM = {f"upstream.{name}" for name in ("open_clip_files", "open_clip_flags", "timm_files")}
RESILIENCE = {f"resilience.{name}" for name in ("beats", "injection", "leaving", "watchdog")}
GROUND = {
    *("__init__", "errors", "counter", "escape", "words", "paths", "tell", "files", "progress", "pool", "dist"),
    *("config", "launch", "schedule", "remembered", "device", "deterministic"),
    *("counter_torch", "bits"),
    *("telemetry", *TELEMETRY, "resilience", *RESILIENCE, "upstream", *UPSTREAM),
}
STAGES = {"data", "towers", "loss"}
ASSEMBLY = {"step", "parallel", "optim", "checkpoint", "fit_tokenizer", "eval"}
ENTRIES = {"training", "resilience.wishes", "evaluate", "library", "status"}
# What a room may import beside itself and (where nothing else is said) the ground.
LAWS: dict[str, set[str]] = {
    **dict.fromkeys(GROUND, GROUND),
    "errors": set(),
    "counter": set(),
    "counter_torch": set(),
    "bits": set(),
    "escape": {"errors"},
    "words": set(),
    "paths": {"errors"},
    "tell": {"errors", "escape"},
    "upstream": set(),
    "upstream.open_clip_flags": set(),
    "upstream.timm_files": {"errors"},
    "telemetry": set(),
    "telemetry.faults": {"tell"},
    "resilience": set(),
    "resilience.injection": {"errors"},
    "files": {"errors"},
    "data": set(),
    "data.bad": set(),
    "data.order": {"counter", "errors"},
    "data.tokenize": GROUND,
    "data.fetch": GROUND,
    "data.pixels": GROUND | {"data.bad"},
    "data.shard": GROUND | {"data.bad", "data.pixels", "data.fetch"},
    "data.shapes": GROUND | {"data.shard"},
    "data.source": GROUND | {"data.bad", "data.pixels", "data.fetch", "data.shard"},
}
LAWS["data.pipeline"] = LAWS["data.source"] | {"data.source", "data.order", "data.tokenize"}
LAWS["data.load"] = LAWS["data.pipeline"] | {"data.pipeline"}
DATA = {room for room in LAWS if room.startswith("data.")}
LAWS |= {
    "shardkit": GROUND | {"data", *DATA},
    "towers": GROUND,
    "loss": GROUND,
    **dict.fromkeys(ASSEMBLY, GROUND | STAGES | DATA),
    "guard": GROUND | STAGES | DATA | {"step", "checkpoint"},
    "weights": GROUND | {"towers", "checkpoint"},
    "export": GROUND | {"towers", "weights", "fit_tokenizer"},
    "forecast": GROUND | {"data.load", "towers", "step"},
    "preflight": GROUND | DATA | {"checkpoint", "eval", "optim", "weights"},
    **dict.fromkeys(ENTRIES, GROUND | STAGES | DATA | ASSEMBLY | {"guard", "weights", "preflight"} | ENTRIES),
    "bench.common": GROUND,
    "bench.loss": GROUND | {"loss", "bench.common"},
    "bench.data": GROUND | DATA | {"bench.common"},
    "bench.step": GROUND | STAGES | DATA | ASSEMBLY | {"bench.common"},
    "bench.eval": GROUND | STAGES | DATA | ASSEMBLY | {"bench.common", "bench.data", "bench.step"},
    "bench.gpu": GROUND | {"data.load", "towers", "loss", "step", "bench.common", "bench.loss", "bench.step"},
    "bench": GROUND | {"bench.common", "bench.loss", "bench.data", "bench.step"},
    "data_tools": GROUND | {"shardkit"},
}
BENCHES = {room for room in LAWS if room.split(".")[0] == "bench"}
LAWS["cli"] = {*LAWS} - {"data_tools", *BENCHES}
LAWS["cli.bench"] = GROUND | {"cli", *BENCHES - {"bench.common"}}  # nothing else looks at the benchmarks
LAWS["__main__"] = {"cli"}
# What these rooms must leave alone, of the standard library and of others.
FORBIDDEN = {
    "data.order": {"os", "io", "pathlib", "shutil", "subprocess", "socket", "torch", "open"},
    "data.pixels": {"os", "pathlib", "shutil", "subprocess", "socket", "urllib", "open"},
    "data.fetch": {"PIL", "simplejpeg", "torch", "tarfile", "webdataset"},
    "data.bad": {"torch", "numpy", "open"},
    "progress": {"torch"},
    "files": {"torch"},
    "paths": {"torch"},
    "pool": {"torch"},
    "telemetry.parts_picture": {"torch"},
    "tell": {"torch"},
    "telemetry.goodput": {"torch"},
    "resilience.beats": {"torch"},
    "status": {"torch"},
    "guard.health": {"torch"},
}
FOLDERS = {"clipscale", "configs", "data_tools", "tests", "slurm", "docs", ".ci", ".github"}
MOST_DATA_ROOMS = 10
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 400, 80, 120
SOURCES = sorted([*ROOT.glob("clipscale/**/*.py"), *ROOT.glob("data_tools/**/*.py")])


def name_of(path: Path) -> str:
    """clipscale/data/shard/tar.py -> clipscale.data.shard.tar"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path) for path in SOURCES}


@cache
def room_of(module: str) -> str:
    """clipscale.data.shard.tar -> data.shard; clipscale -> __init__; a module of data_tools -> data_tools."""
    parts = module.split(".")
    if parts[0] != "clipscale":
        return parts[0]
    inner = ".".join(parts[1:]) or "__init__"
    while inner not in LAWS:
        inner, dot, _ = inner.rpartition(".")
        assert dot, f"{module} lies in no room: give it a law"
    return inner


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
    """What `module` imports or calls and must not."""
    tree, room = ast.parse(code), room_of(module)
    wrong = [name for name in imported(tree) if room_of(name) not in LAWS[room] | {room}]
    return wrong + sorted(touched(tree) & FORBIDDEN.get(room, set()))


def touched(tree: ast.AST) -> set[str]:
    """Top-level packages that the code imports, and `open` where it calls it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("open")
    return found


def test_no_law_lets_imports_go_in_a_circle():
    """A room below another never sees it; entry points may see each other, the ground is looked at file by file."""
    for room, below in LAWS.items():
        for other in below - ENTRIES - GROUND - {room}:
            assert room not in LAWS[other], (room, other)


def test_the_ground_has_no_circle():
    arrows = {
        room: {
            room_of(name)
            for path in SOURCES
            if room_of(name_of(path)) == room
            for name in imported(ast.parse(path.read_text()))
        }
        - {room}
        for room in GROUND
    }
    while arrows:
        lowest = {room for room, below in arrows.items() if not below}
        assert lowest, f"a circle among {sorted(arrows)}"
        arrows = {room: below - lowest for room, below in arrows.items() if room not in lowest}


def test_data_has_few_rooms():
    rooms = {room_of(name) for name in MODULES if name.startswith("clipscale.data.")}
    assert rooms == DATA
    assert len(rooms) <= MOST_DATA_ROOMS


def test_imports_go_downwards_only():
    wrong = {name_of(path): names for path in SOURCES if (names := forbidden(name_of(path), path.read_text()))}
    assert not wrong


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("clipscale.errors", "from clipscale.counter import fold"),
        ("clipscale.config.data", "import clipscale.data.shard.tar"),
        ("clipscale.counter", "import clipscale.data.shard.tar"),
        ("clipscale.counter", "from clipscale.counter_torch import draw"),
        ("clipscale.data.order.mixture", "from clipscale.files import write_file"),
        ("clipscale.data.order.order", "open('x')"),
        ("clipscale.data.pixels.decode", "import os"),
        ("clipscale.data.pixels.decode", "from clipscale.data.shard.tar import list_members"),
        ("clipscale.data.fetch.cache", "from PIL import Image"),
        ("clipscale.data.fetch.cache", "from clipscale.data.shard.index import Index"),
        ("clipscale.data.shard.tar", "from clipscale.loss import contrastive_grads"),
        ("clipscale.data.shard.tar", "from clipscale.data import source"),
        ("clipscale.data.source", "from clipscale.data.pipeline import Share"),
        ("clipscale.data.pipeline", "from clipscale.data.load.loader import Loader"),
        ("clipscale.data.load.fill", "from clipscale.shardkit import checks"),
        ("clipscale.towers", "def f():\n    from clipscale import data"),
        ("clipscale.loss.ring", "from clipscale.step.gradcache import TwoPasses"),
        ("clipscale.step.gradcache", "import clipscale.optim as o"),
        ("clipscale.eval.suite", "from clipscale.checkpoint import verify"),
        ("clipscale.checkpoint", "from clipscale import training"),
        ("clipscale.training.trainer", "from data_tools import make_shards"),
        ("clipscale.training.trainer", "from clipscale.shardkit.packing import pack"),
        ("clipscale.forecast.memory", "from clipscale.bench.common.memory import watched"),
        ("clipscale.step.planning", "from clipscale.forecast.memory import memory_of"),
        ("clipscale.cli", "from clipscale.bench.loss.options import add_loss_arguments"),
        ("clipscale.bench.common.turns", "from clipscale.bench.loss.team import Team"),
        ("clipscale.bench.common.spread", "from clipscale.loss import contrastive_grads"),
        ("clipscale.bench.loss.plots", "from clipscale.bench.data.plots import draw"),
        ("clipscale.bench.data.report", "from clipscale.bench.loss import report"),
        ("clipscale.bench.loss.inputs", "from clipscale.data.pipeline import Pipeline"),
        ("clipscale.bench.loss.measure", "from clipscale.bench.gpu.timing import timed"),
        ("clipscale.bench.eval.measure", "from clipscale.bench.gpu.timing import timed"),
        ("clipscale.bench.gpu.parts", "from clipscale.data.source import Source"),
        ("clipscale.bench.redraw", "from clipscale.loss import contrastive_grads"),
        ("data_tools.make_shards", "from clipscale.towers import Tower"),
        ("data_tools.make_shards", "from clipscale.data.pixels.decode import decode"),
    ],
)
def test_the_checker_catches(module, code):
    assert forbidden(module, code)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("clipscale.dist", "from clipscale.errors import require"),
        ("clipscale.data.shard.tar", "from clipscale.data.shard.index import Shard\nfrom clipscale import __version__"),
        ("clipscale.data.load.loader", "from clipscale.data import source\nimport os"),
        ("clipscale.step.gradcache", "from clipscale.loss import contrastive_grads"),
        ("clipscale.eval.suite", "from clipscale.eval.zeroshot import load_task\nfrom clipscale.data import source"),
        ("clipscale.bench.loss.case", "from clipscale.bench.common.spread import Spread\nimport clipscale.loss.tiles"),
        ("clipscale.bench.redraw", "from clipscale.bench.data import plots"),
        ("clipscale.cli.bench", "from clipscale.bench.redraw import redraw"),
        ("clipscale.cli", "from clipscale.training.trainer import train\nimport torch"),
        ("data_tools.make_shards", "from clipscale.shardkit import packing\nfrom clipscale.config.data import Data"),
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
    """So that help, --print-config and mistakes answer at once: every command and every script of data_tools."""
    code = """
import runpy
import sys
from pathlib import Path
import clipscale.config.load
from clipscale.cli import COMMANDS, main
from clipscale.shardkit import commands

def ends_well(work, *arguments, **settings):
    try:
        work(*arguments, **settings)
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
    loaded = [name for name in ("torch", "open_clip", "webdataset") if name in sys.modules]
    assert not loaded, (arguments, loaded)

assert main(["train", "configs/quickstart.yaml", "--print-config"]) == 0
assert main(["train", "configs/quickstart.yaml", "gradcache.image_chunk=0"]) == 2
assert main(["recipes"]) == main(["config"]) == 0
for name in commands.COMMANDS:
    output = ["--output", "no-such/out.png"] if name != "check" else []
    assert main(["shards", name, "no-such.tar", *output]) == 2
below = [["eval", "zeroshot"], *(["shards", name] for name in commands.COMMANDS)]
for words in [[], *([name] for name in COMMANDS if name != "bench"), *below]:
    ends_well(main, [*words, "--help"])
assert "clipscale.bench" not in sys.modules  # its options are read by its own command alone
for words in ["bench"], ["bench", "loss"], ["bench", "data"], ["bench", "eval"], ["bench", "gpu"], ["bench", "plot"]:
    ends_well(main, [*words, "--help"])
for script in Path("data_tools").glob("*.py"):
    sys.argv = [str(script), "--help"]
    ends_well(runpy.run_path, str(script), run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
