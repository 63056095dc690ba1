"""clipscale/config/help.py and `clipscale config`: every setting, from the dataclasses and their comments."""

import dataclasses
from dataclasses import dataclass

import pytest
import yaml

from clipscale.cli import main
from clipscale.config import EVALUATIONS, Config, Eval, Retrieval, Validation, ZeroShot, flat
from clipscale.config.data import Data, Extra, Shapes, SourceSettings
from clipscale.config.help import _notes, find_settings, with_comments
from clipscale.config.load import config_from_yaml, dump_config, load_config
from clipscale.config.recipes import list_recipes

WHOLE = Config(
    data=Data(sources={"<name>": SourceSettings("")}, shapes=Shapes()),
    eval=Eval(zeroshot_sets={"<name>": ZeroShot()}),
)
MORE = [  # a name is that of one set only
    Config(eval=Eval(validation_sets={"<name>": Validation()})),
    Config(eval=Eval(retrieval_sets={"<name>": Retrieval()})),
]


def told(capsys, *words: str) -> str:
    assert main(["config", *words]) == 0
    return capsys.readouterr().out


def refused(capsys, key: str) -> str:
    assert main(["config", key]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def settings() -> dict:
    return {setting.key: setting for section in find_settings() for setting in section.settings}


# --- completeness -----------------------------------------------------------------------------------------------------


def test_every_setting_is_there_with_its_default(settings, capsys):
    leaves = {key: value for config in (WHOLE, *MORE) for key, value in flat(dataclasses.asdict(config)).items()}
    leaves |= flat(dataclasses.asdict(Extra()), ".data.sources.<name>.extra")
    leaves = {key: value for key, value in leaves.items() if value != {}}
    mappings = {"data.sources", "optim.lr_scales", "optim.options", *(f"eval.{kind}_sets" for kind in EVALUATIONS)}
    assert set(settings) == {*leaves, "data.shapes", *mappings}
    for key, value in leaves.items():
        if key not in ("data.sources.<name>.urls", "data.sources.<name>.extra.urls"):
            shown = yaml.safe_load(settings[key].default)
            value = list(value) if isinstance(value, tuple) else value
            shown = float(shown) if isinstance(value, float) else shown
            assert shown == (pytest.approx(value, rel=1e-5) if isinstance(value, float | list) else value), key
    rows = [line.split() for line in told(capsys).splitlines()]
    for setting in settings.values():
        start = [setting.key, "=", *setting.default.split()] if setting.default else [setting.key, "must", "be", "set"]
        assert any(row[: len(start)] == start for row in rows), setting.key


def test_every_setting_has_a_comment_and_every_section_says_what_it_is_about(settings):
    assert not [key for key, setting in settings.items() if not setting.comment], "write a comment behind these"
    assert not [section.key for section in find_settings() if section.key and not section.about]


def test_types_are_those_of_yaml(settings):
    types = {
        "seed": "int",
        "train.grad_clip_norm": "float | null",
        "data.allow_pipe": "bool",
        "data.exif": "ignore | apply",
        "data.crop_scale": "[float, float]",
        "model.vision": "mapping | null",
        "data.sources": "mapping",
        "data.shapes": "mapping | null",
        "data.sources.<name>.select.uids": "str | null",
    }
    assert {key: settings[key].type for key in types} == types


def test_comments_are_found_behind_and_above():
    @dataclass
    class Thing:
        """What it is.

        More of it.
        """

        # not a comment of a field: a line lies between

        # one line
        # and another
        one: int = 1  # and behind
        two: str = "#"  # with a # in both
        three: tuple[int, int] = (
            1,
            2,
        )  # at its end
        four: int = 4

        def five(self) -> None:
            six: int = 6  # no field
            print(six)

    about, comments = _notes(Thing)
    assert about == "What it is."
    assert comments == {
        "one": "one line and another and behind",
        "two": "with a # in both",
        "three": "at its end",
        "four": "",
    }


# --- clipscale config -------------------------------------------------------------------------------------------------


def test_a_section_a_setting_and_everything(capsys):
    whole, fetch = told(capsys), told(capsys, "data.fetch")
    assert fetch in whole
    assert len(fetch.splitlines()) == 1 + len(dataclasses.fields(WHOLE.data.fetch))
    assert fetch.startswith("data.fetch: How remote shards come into the local cache.\n  data.fetch.stall_seconds")
    one = told(capsys, "train.global_batch").splitlines()
    assert len(one) == 2
    assert one[1].split(maxsplit=4) == ["train.global_batch", "=", "4096", "int", "pairs a step, over all ranks"]
    assert "eval.validation: " in told(capsys, "eval")


def test_the_settings_of_a_source_by_its_own_name(capsys):
    source = told(capsys, "data.sources.mine")
    assert source == told(capsys, "data.sources.<name>")
    assert "data.sources.<name>.select.min_side" in source
    assert "must be set" in told(capsys, "data.sources.mine.urls")


def test_lines_fit_and_comments_wrap_below_themselves(capsys):
    lines = told(capsys).splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if line != line.rstrip()]
    first = next(i for i, line in enumerate(lines) if line.startswith("  data.augment.flip "))
    column = lines[first].index("share of")
    assert lines[first + 1][:column].isspace()
    assert not lines[first + 1][column].isspace()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.globl_batch", "did you mean train.global_batch?"),
        ("data.fech", "did you mean data.fetch?"),
        ("lr", "did you mean optim.lr?"),
        ("weight", "did you mean data.sources.<name>.weight?"),
        ("train.global", "did you mean train.global_batch?"),  # a part of a name is none
        ("model.vision.width", "did you mean model.vision"),
        ("zzz", "`clipscale config` lists them all"),
    ],
)
def test_an_unknown_key_is_one_line_with_the_nearest(key, nearest, capsys):
    message = refused(capsys, key)
    assert message.startswith(f"clipscale: error: {key!r} is no setting and no section; ")
    assert nearest in message
    assert message.count("\n") == 1


# --- --print-config ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_with_comments_loads_to_the_same(name, capsys):
    assert main(["train", name, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert config_from_yaml(printed) == load_config([name])
    lines = printed.splitlines()
    assert "  global_batch: " in printed
    assert next(line for line in lines if "global_batch:" in line).endswith("  # pairs a step, over all ranks")
    assert next(line for line in lines if line.startswith("  fetch:")).endswith("come into the local cache.")
    assert len([line for line in lines if "#" in line]) > 80


@pytest.mark.parametrize(
    "text",
    [
        "a # b",
        "'",
        '"# "',
        ": #",
        "x " * 100,
        "# " * 100,
        "two\nlines # here\n",
        "\u2028\x85é",
        "",
        "- a",
        "|",
        "{a}",
        "  ",
    ],
)
def test_odd_values_keep_their_comments_apart(text, tmp_path):
    config = Config(data=Data(sources={"odd # name": SourceSettings(text, caption="x" * 150)}, cache_dir=text))
    printed = with_comments(dump_config(config))
    assert config_from_yaml(printed) == config
    assert "# shards: braces, globs, several joined by '::'" in printed
    assert "# copies of remote shards" in printed
