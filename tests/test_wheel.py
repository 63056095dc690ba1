"""What is built from the tree: a wheel, a source distribution and its wheel, and an editable install. No network."""

import email
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from clipscale import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("clipscale", "configs", "tests", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
DATA = {
    f"clipscale/{path.relative_to(ROOT)}": path.read_bytes()
    for path in [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/templates/*")]
}

HISTOGRAM = "clipscale/bench/step/captions.json"


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def build(kind: str, tree: Path, output: Path) -> Path:
    """`kind`: wheel, sdist or editable."""
    output.mkdir()
    run("-c", f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])", str(output), cwd=tree)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The checkout, its link as a link."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, tree)
    assert (tree / "clipscale" / "configs").is_symlink()
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel") / "dist")


def contents(wheel: Path) -> dict[str, bytes]:
    """Regular files only: a link in a wheel is refused."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [item for item in archive.infolist() if (item.external_attr >> 16) & 0o170000 == 0o120000]
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_with_its_recipes_and_nothing_else(wheel):
    found = contents(wheel)
    code = {str(path.relative_to(ROOT)) for path in ROOT.glob("clipscale/**/*.py")}
    assert len(DATA) >= 4
    assert {name: found[name] for name in found if name.startswith("clipscale/configs/")} == DATA
    metadata = f"clipscale-{__version__}.dist-info/"
    assert {name for name in found if not name.startswith(metadata)} == code | {*DATA, HISTOGRAM}
    assert found[HISTOGRAM] == (ROOT / HISTOGRAM).read_bytes()
    assert found[f"{metadata}licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"clipscale = clipscale.cli:main" in found[f"{metadata}entry_points.txt"]


def test_the_metadata(wheel):
    metadata = email.message_from_bytes(contents(wheel)[f"clipscale-{__version__}.dist-info/METADATA"])
    assert (metadata["Name"], metadata["Version"]) == ("clipscale", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    assert {"test", "s3", "gcs"} <= set(metadata.get_all("Provides-Extra"))
    assert any(word.startswith("torch") for word in metadata.get_all("Requires-Dist"))
    assert len(metadata.get_all("Project-URL")) >= 2
    assert metadata.get_payload().startswith("# clipscale")


def test_the_installed_wheel_finds_its_recipes_from_any_folder(wheel, tmp_path):
    """Unpacked, which is what installing it does; the recipes and settings need the wheel's few light dependencies."""
    (tmp_path / "here").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from clipscale.cli import main
from clipscale.config.load import load_config
from clipscale.config.recipes import list_recipes
for name in list_recipes():
    load_config([name])
assert main(["recipes"]) == main(["config", "optim.lr"]) == 0
assert main(["train", "configs/quickstart.yaml"]) == 2
print(load_config(["cifar10"]).eval.zeroshot.templates)
"""
    out = run("-c", code, str(tmp_path / "site"), cwd=tmp_path / "here").splitlines()
    templates = tmp_path / "site" / "clipscale" / "configs" / "templates" / "photo.txt"
    assert out[-1] == str(templates)
    assert templates.read_bytes() == DATA["clipscale/configs/templates/photo.txt"]
    assert {line.split()[0] for line in out if line} >= {"quickstart", "cifar10", "vit_b32", "optim.lr"}


def test_a_source_distribution_gives_the_same_wheel(tree, wheel, tmp_path):
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert all(member.isreg() or member.isdir() for member in archive)
        names = archive.getnames()
        archive.extractall(tmp_path, filter="data")
    assert not [name for name in names if "/tests/" in name]
    unpacked = tmp_path / f"clipscale-{__version__}"
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == contents(wheel)


def test_an_editable_install_finds_the_tree(tree, tmp_path):
    with zipfile.ZipFile(build("editable", tree, tmp_path / "editable")) as archive:
        archive.extractall(tmp_path / "site")
    code = "import site, sys; site.addsitedir(sys.argv[1]); sys.path.append(sys.argv[2])"
    code += "; from clipscale.config import recipes; print(recipes.FOLDER, *recipes.list_recipes())"
    needs = sysconfig.get_path("purelib")  # as a plain folder: the clipscale that is installed there is not seen
    folder, *names = run("-I", "-S", "-c", code, str(tmp_path / "site"), needs, cwd=tmp_path).split()
    assert Path(folder) == tree / "configs"
    assert set(names) == {path.stem for path in ROOT.glob("configs/*.yaml")}
