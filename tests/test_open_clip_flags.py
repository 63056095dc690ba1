"""clipscale/upstream/open_clip_flags.py: every flag of open_clip has a row, and each row's key is a setting."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path

import pytest

from clipscale.cli import main
from clipscale.config.help import find_settings
from clipscale.upstream.open_clip_flags import FLAGS, explain, markdown_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "from_open_clip.md"


def test_every_flag_of_the_open_clip_that_is_installed_is_known():
    tree = ast.parse(Path(importlib.util.find_spec("open_clip_train").origin).with_name("params.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    flags = {call.args[0].value for call in calls if call.func.attr == "add_argument"}
    assert len(flags) > 80
    assert flags - FLAGS.keys() == set()


def test_what_a_flag_is_called_here_exists():
    for flag in FLAGS.values():
        for key in filter(None, flag.keys.split(", ")):
            assert find_settings(key), key
        assert flag.keys or flag.note


def test_the_page_holds_the_table_and_its_arithmetic_is_right():
    page = PAGE.read_text(encoding="utf-8")
    assert page.endswith(f"\n\n{markdown_table()}\n")
    batch, samples, warmup = 512 * 8 * 8, 32 * 10_000_000, 2_000 * 512 * 8 * 8
    for word in (f"train.global_batch={batch} ", f"train.samples={samples} ", f"optim.warmup_samples={warmup} "):
        assert word in page
    for number in (batch, samples, math.ceil(samples / batch), warmup, 10_000_000 // batch):
        assert f"{number:,}" in page


@pytest.mark.parametrize("word", ["--batch-size", "--batch-size=64", "batch_size", "batch-size"])
def test_a_flag_is_known_however_it_is_spelt(word):
    assert explain(word).startswith("open_clip's --batch-size is train.global_batch here: theirs is per GPU, ours over")


def test_other_words_are_not_explained():
    assert [explain(word) for word in ("global_batch", "64", "--print-config", "")] == [""] * 4


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.batch_size=64", "train.batch_size: unknown key; open_clip's --batch-size is train.global_batch here"),
        ("batch_size=64", "batch_size: unknown key; open_clip's --batch-size is train.global_batch here"),
        ("epochs=32", "epochs: unknown key; open_clip's --epochs is train.samples here"),
        ("local_loss=true", "open_clip's --local-loss has no setting here: no rank ever holds"),
        ("name=mine", "open_clip's --name is run.dir here"),
        ("optim.lrr=1", "did you mean optim.lr?"),
    ],
)
def test_a_config_word_that_open_clip_has_is_answered(capsys, word, told):
    assert main(["train", "quickstart", word]) == 2
    assert told.replace(word.partition("=")[0] + ":", f"{word}:", 1) in capsys.readouterr().err


def test_a_flag_on_the_command_line_is_answered(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "quickstart", "--lr", "1e-3", "--batch-size=64", "--grad-checkpointing", "--odd"])
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for part in ("--lr is optim.lr", "--batch-size is train.global_batch", "those of a chunk", "--odd"):
        assert part in told
