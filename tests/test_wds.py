"""clipscale/eval/wds.py: sets as CLIP_benchmark keeps them, in a folder and below a URL."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from http_server import Fault
from shards import picture, write_shard
from tiny import save_run

from clipscale.config import ZeroShot
from clipscale.config.data import Data, Fetch
from clipscale.data.fetch.text import read_text
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.eval.suite import EvalSuite
from clipscale.eval.wds import below, open_wds
from clipscale.eval.zeroshot import check_task, load_task
from clipscale.preflight.checks import check_evaluation

NAMES, TEMPLATES = ["cat", "dog"], ["a photo of a {c}.", "{c}"]


@pytest.fixture
def place(tmp_path) -> Path:
    """Two shards of three pictures, names and templates."""
    root = tmp_path / "wds_pets"
    (root / "test").mkdir(parents=True)
    for shard in range(2):
        samples = [
            (f"s{shard}{i}", {"webp": picture(3 * shard + i, 16, 16, "WEBP"), "cls": b"%d" % (i % 2)}) for i in range(3)
        ]
        write_shard(root / "test" / f"{shard}.tar", samples)
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (root / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))
    return root


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(cache_dir=str(tmp_path / "cache"), fetch=Fetch(retries=0, backoff_seconds=0.01))


@pytest.fixture
def url(place, server) -> str:
    (server.folder / "wds_pets").symlink_to(place)
    return f"{server.url}/wds_pets"


@pytest.mark.needs("clip_benchmark")
def test_a_folder_is_read_as_clip_benchmark_reads_it(place, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", ModuleType("requests"))  # for what its other sets download
    builder = importlib.import_module("clip_benchmark.datasets.builder")
    theirs = builder.build_wds_dataset("wds/pets", lambda image: image.size, data_dir=str(place))
    task = load_task(ZeroShot(wds=str(place)), data)
    assert task.classnames == theirs.classes == NAMES
    assert task.templates == [template.replace("{c}", "{}") for template in theirs.templates]
    assert [int(task.pictures.read(i)[1]) for i in range(6)] == [label for _, label in theirs]
    assert check_task(task) == ""


def test_a_url_gives_the_same(place, url, data, server):
    near, far = (load_task(ZeroShot(wds=wds), data) for wds in (f"{place}/", url))
    assert (near.classnames, near.templates) == (far.classnames, far.templates) == (NAMES, ["a photo of a {}.", "{}"])
    assert [near.pictures.read(i) for i in range(6)] == [far.pictures.read(i) for i in range(6)]
    assert server.requests["/wds_pets/test/1.tar"] == 1


def test_own_settings_win_and_that_is_told(place, data, tmp_path):
    (tmp_path / "own.txt").write_text("Katze\nHund")
    task = load_task(ZeroShot(wds=str(place), classnames=str(tmp_path / "own.txt"), templates="imagenet"), data)
    assert (task.classnames, len(task.templates)) == (["Katze", "Hund"], 80)
    assert check_task(task) == (
        f"eval.zeroshot.classnames={tmp_path}/own.txt and eval.zeroshot.templates=imagenet in place of the set's own; "
        "null takes those"
    )


@pytest.mark.parametrize("where", ["folder", "url"])
def test_without_names_and_templates_they_are_imagenets(place, data, where, request):
    wds = str(place) if where == "folder" else request.getfixturevalue("url")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (place / name).unlink()
    task = load_task(ZeroShot(wds=wds), data)
    assert (len(task.classnames), len(task.templates)) == (1000, 80)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("test/nshards.txt", None, "has no test/nshards.txt, which says how many shards"),
        ("test/nshards.txt", "many", "test/nshards.txt holds 'many'; it must be the number of the shards"),
        ("test/nshards.txt", "3", r"test/2.tar' is not a file"),
        ("classnames.txt", "cat\n\ndog\n", "classnames.txt: line 2 is empty; take it out"),
        ("classnames.txt", "\n", "classnames.txt is empty; write one a line"),
        ("zeroshot_classification_templates.txt", "a photo\n", r"\['a photo'\] must hold '\{\}' once"),
        ("dataset_type.txt", "retrieval\n", r"is a set for retrieval .*set eval.retrieval.urls='.*/test/\*.tar'"),
    ],
)
def test_what_is_no_such_set_is_told_in_a_line(place, data, name, text, said):
    (place / name).unlink(missing_ok=True)
    if text is not None:
        (place / name).write_text(text)
    with pytest.raises(UserError, match=said) as error:
        load_task(ZeroShot(wds=str(place)), data)
    assert "\n" not in str(error.value)


def test_a_server_that_fails_is_no_set_without_names(url, data, server):
    server.faults["/wds_pets/classnames.txt"] = [Fault(status=503)] * 9
    with pytest.raises(UserError, match=re.escape(f"eval.zeroshot.wds='{url}': '{url}/classnames.txt' cannot be read")):
        open_wds(url, data)


def test_what_is_large_is_no_text(place, url, monkeypatch):
    monkeypatch.setattr("clipscale.data.fetch.text.MAX_BYTES", 4)
    with pytest.raises(UserError, match="8 bytes are no small text"):
        read_text(f"{url}/classnames.txt", Fetch())


def test_where_its_files_are():
    assert below("sets/a/", "x.txt") == "sets/a/x.txt"
    assert below("https://host/a?key=1", "x.txt") == "https://host/a/x.txt?key=1"
    page = "https://huggingface.co/datasets/me/wds_a/tree/main"
    assert below(page, "x.txt") == "https://huggingface.co/datasets/me/wds_a/resolve/main/x.txt"


def test_one_rank_reads_the_texts_and_passes_them_on(place, url, server, data, tmp_path, monkeypatch):
    towers, heard = save_run(tmp_path / "run"), [open_wds(url, data), ""]
    before = server.requests

    class Second(World):
        """Rank 1, which hears what rank 0 has found."""

        def each(self, work, *, patient=False):
            return work()

        def broadcast(self, item):
            assert item is None
            return heard.pop(0)

    monkeypatch.setenv("RANK", "1")
    words = [f"eval.zeroshot.wds={url}", f"data.cache_dir={tmp_path}/cache"]
    _, config, names = check_evaluation(str(tmp_path / "run"), "zeroshot", words)
    world = Second(1, 2, 1, torch.device("cpu"))
    suite = EvalSuite(config, towers, (4, 4), build_tokenizer(None, 8), world, names=names)
    assert (suite.failed, heard) == ({}, [])
    assert "/wds_pets/classnames.txt" in before
    assert set(server.requests - before) == {"/wds_pets/test/0.tar", "/wds_pets/test/1.tar"}  # each rank reads its own
