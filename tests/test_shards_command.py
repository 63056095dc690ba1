"""`clipscale shards` and the scripts of data_tools/: one work, one set of texts, two doors; destination.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from shards import picture, write_pairs
from tools import FOLDER, load_tool

from clipscale.cli import main
from clipscale.shardkit.commands import run_script
from clipscale.shardkit.destination import building
from clipscale.tell import tell

SCRIPTS = {
    "make": "make_shards",
    "check": "check_shards",
    "inspect": "inspect_shard",
    "imagenet": "imagenet_shards",
    "emoji": "make_emoji",
}


@pytest.fixture
def source(tmp_path) -> Path:
    """Five pictures of a class with captions beside them, and one without."""
    folder = tmp_path / "source" / "n00000001"
    folder.mkdir(parents=True)
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(picture(i, 20, 30))
        (folder / f"{i}.txt").write_text(f"number {i}")
    (folder / "5.txt").unlink()
    return folder.parent


def by_both(words: list[str], status: int, capsys) -> tuple[str, str]:
    """What the command and then the script print; the folders they write to end in 0 and 1."""
    printed = []
    for number, door in enumerate((lambda words: main(["shards", *words]), lambda words: script(*words))):
        assert door([word.replace("OUT", f"out{number}") for word in words]) == status
        printed.append(capsys.readouterr().out)
    return tuple(printed)


def script(action: str, *words: str) -> int:
    return load_tool(SCRIPTS[action]).main([*words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("action", "samples"), [("make", 5), ("imagenet", 6)])
def test_both_doors_pack_the_same_bytes(source, tmp_path, capsys, action, samples):
    by_command, by_script = by_both([action, str(source), "--output", f"{tmp_path}/OUT", "--jobs=1"], 0, capsys)
    assert contents(tmp_path / "out0") == contents(tmp_path / "out1")
    assert f"out0: {samples} samples in train-0000.tar" in by_command
    assert f"out1: {samples} samples in train-0000.tar" in by_script


def test_both_doors_check_and_show_alike(tmp_path, capsys):
    urls = write_pairs(tmp_path / "set", shards=1, per_shard=3, size=16)
    shard = tmp_path / "set" / "0000.tar"
    _, by_script = by_both(["check", urls, "--jobs=1"], 0, capsys)
    assert "3 samples in 1 shard, " in by_script
    by_both(["inspect", str(shard), "--output", f"{tmp_path}/OUT.png"], 0, capsys)
    assert (tmp_path / "out0.png").read_bytes() == (tmp_path / "out1.png").read_bytes()
    shard.write_bytes(shard.read_bytes()[:3000])
    by_command, _ = by_both(["check", urls, "--jobs=1", "--broken", f"{tmp_path}/OUT.jsonl"], 1, capsys)
    assert "damaged archive" in by_command
    assert (tmp_path / "out0.jsonl").read_bytes() == (tmp_path / "out1.jsonl").read_bytes() != b""


def test_mistakes_are_one_line_in_the_name_of_the_door(source, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_pairs(tmp_path, shards=1, per_shard=1, size=16)
    for words, told in [
        (["make", str(tmp_path / "empty"), "--output", str(tmp_path / "out")], "no usable sample"),
        (["check", str(tmp_path / "gone-*.tar")], "no file matches"),
        (["inspect", str(tmp_path / "0000.tar"), "--output", str(tmp_path / "no" / "sheet.png")], "No such file"),
        (["imagenet", str(source), "--output", str(tmp_path / "out"), "--first-label=0"], "belong to --val-labels"),
    ]:
        assert (main(["shards", *words]), script(*words)) == (2, 2)
        here, there = capsys.readouterr().err.splitlines()
        assert here.startswith("clipscale: error: ")
        assert told in here
        assert there.startswith(f"{SCRIPTS[words[0]]}.py: error: ")
        assert told in there


@pytest.mark.parametrize("action", SCRIPTS)
def test_help_is_the_same_but_for_the_name_of_the_door(action, capsys):
    texts = []
    for door in (lambda: main(["shards", action, "--help"]), lambda: script(action, "--help")):
        with pytest.raises(SystemExit) as stop:
            door()
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    here, there = (text[text.index("\n\n") :] for text in texts)  # after the usage, which breaks at other places
    name = f"{SCRIPTS[action]}.py"
    assert here.replace(f"clipscale shards {action} ", f"python data_tools/{name} ") == there
    assert "PROGRAM" not in here
    assert f"python data_tools/{name} " in there
    assert (FOLDER / name).is_file()


def test_a_script_passes_on_what_is_told_and_what_was_interrupted(capsys):
    def stopped(arguments) -> int:
        tell("a.tar is damaged")
        raise KeyboardInterrupt

    command = SimpleNamespace(
        DESCRIPTION="", EXAMPLES="", LEFT="nothing was written", add_arguments=lambda parser: None, run=stopped
    )
    assert run_script(command, "x.py", []) == 130
    assert capsys.readouterr().err.splitlines() == ["x.py: a.tar is damaged", "x.py: interrupted, nothing was written"]


# --- destination ------------------------------------------------------------------------------------------------------


def test_files_move_in_together_and_replace_the_old_ones(tmp_path):
    old = [tmp_path / "a-0.tar", tmp_path / "a-1.tar"]
    for path in (*old, tmp_path / "b-0.tar"):
        path.write_text("old")
    (tmp_path / ".a.building").mkdir()
    (tmp_path / ".a.building" / "a-7.tar").write_text("left by a killed run")
    with building(tmp_path, "a", old) as build:
        (build / "a-0.tar").write_text("new")
        assert old[0].read_text() == "old"
    assert contents(tmp_path) == {"a-0.tar": b"new", "b-0.tar": b"old"}


def test_a_block_that_fails_or_makes_nothing_leaves_the_old_files(tmp_path):
    (tmp_path / "a-0.tar").write_text("old")

    def fails() -> None:
        with building(tmp_path, "a", [tmp_path / "a-0.tar"]) as build:
            (build / "a-0.tar").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert contents(tmp_path) == {"a-0.tar": b"old"}
    with building(tmp_path, "a", [tmp_path / "a-0.tar"]):
        pass
    assert contents(tmp_path) == {"a-0.tar": b"old"}
