"""clipscale/config/recipes.py, and the files that a recipe names: found from any folder."""

from pathlib import Path

import pytest

from clipscale.cli import main
from clipscale.config.load import apply_overrides, config_from_yaml, dump_config, load_config
from clipscale.config.recipes import FOLDER, find_config, list_recipes
from clipscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
FILES = ["names.txt", "lists/templates.txt", "counts.json", "lists/uids.txt"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A YAML elsewhere that names all four kinds of files, all of them beside it."""
    folder = tmp_path / "there"
    (folder / "lists").mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("{}\n")
    (folder / "mine.yaml").write_text(
        "eval: {zeroshot: {classnames: names.txt, templates: lists/templates.txt}}\n"
        "data: {sources: {a.b: {urls: x.tar, counts: counts.json, select: {uids: lists/uids.txt}}}}\n"
    )
    return folder / "mine.yaml"


def named(config) -> list[str | None]:
    zeroshot, (source, *_) = config.eval.zeroshot, config.data.sources.values()
    return [zeroshot.classnames, zeroshot.templates, source.counts, source.select.uids]


# --- names ------------------------------------------------------------------------------------------------------------


def test_every_recipe_is_found_by_its_name():
    assert {"quickstart", "cifar10", "vit_b32"} <= set(list_recipes()) == {p.stem for p in ROOT.glob("configs/*.yaml")}
    for name in list_recipes():
        assert load_config([name]) == load_config([str(ROOT / "configs" / f"{name}.yaml")])
        assert load_config([name]).run.dir == f"runs/{name}"


def test_the_files_that_recipes_name_come_with_them():
    templates = load_config(["cifar10"]).eval.zeroshot.templates
    assert Path(templates) == FOLDER / "templates" / "photo.txt"
    assert Path(templates).read_text().count("{}") >= 1


def test_recipes_are_listed_with_what_they_are(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, what in list_recipes().items():
        assert len(what) > 20
        assert f"{name:{max(map(len, list_recipes()))}}  {what}\n" in out
    assert max(map(len, out.splitlines()[:-1])) <= 120
    assert str(FOLDER) in out.splitlines()[-1]


def test_a_file_here_wins_and_a_folder_does_not(here):
    (here / "quickstart").mkdir()
    assert Path(find_config("quickstart")) == FOLDER / "quickstart.yaml"
    (here / "vit_b32").write_text("seed: 77\n")
    assert find_config("vit_b32") == "vit_b32"
    assert load_config(["vit_b32"]).seed == 77


@pytest.mark.parametrize(
    ("argument", "hint"),
    [
        ("quckstart", "did you mean the recipe quickstart?"),
        ("configs/quickstart.yaml", "did you mean the recipe quickstart?"),
        ("quickstart.yaml", "did you mean the recipe quickstart?"),
        ("vit_b16", "did you mean the recipe vit_b32?"),
        ("zzz", "no recipe has this name; `clipscale recipes` lists"),
    ],
)
def test_what_is_neither_file_nor_recipe_is_one_line_with_the_nearest(argument, hint, capsys):
    assert main(["train", argument]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"clipscale: error: config {argument!r}: no such file")
    assert hint in told
    assert "`clipscale recipes` lists" in told
    assert told.count("\n") == 1


# --- the files a recipe names -----------------------------------------------------------------------------------------


def test_files_beside_a_recipe_are_found_and_stay_found(recipe, monkeypatch, tmp_path):
    config = load_config([str(recipe)])
    assert named(config) == [str(recipe.parent / file) for file in FILES]
    monkeypatch.chdir(tmp_path)  # the YAML by a relative path: what a checkpoint stores is absolute all the same
    assert named(load_config(["there/mine.yaml"])) == named(config)
    assert config_from_yaml(dump_config(config)) == config


def test_the_current_folder_comes_first_and_absolute_paths_stay(recipe, here):
    (here / "names.txt").write_text("one\n")
    recipe.write_text(recipe.read_text().replace("lists/templates.txt", "/nowhere/templates.txt"))
    classnames, templates, *_ = named(load_config([str(recipe)]))
    assert (classnames, templates) == ("names.txt", "/nowhere/templates.txt")


def test_imagenet_is_no_file_and_words_name_files_from_here(recipe):
    (recipe.parent / "imagenet").write_text("one\n")
    recipe.write_text("eval: {zeroshot: {classnames: imagenet}}\n")
    config = load_config([str(recipe), "eval.zeroshot.templates=lists/templates.txt"])
    assert (config.eval.zeroshot.classnames, config.eval.zeroshot.templates) == ("imagenet", "lists/templates.txt")
    assert apply_overrides(config, ["eval.zeroshot.classnames=names.txt"]).eval.zeroshot.classnames == "names.txt"


def test_each_file_is_beside_the_yaml_that_names_it(recipe, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "names.txt").write_text("two\n")
    other = tmp_path / "other" / "changes.yaml"
    other.write_text("seed: 5\n")
    assert named(load_config([str(recipe), str(other)])) == named(load_config([str(recipe)]))
    other.write_text("eval: {zeroshot: {classnames: names.txt}}\n")
    assert named(load_config([str(recipe), str(other)]))[0] == str(tmp_path / "other" / "names.txt")


def test_a_missing_file_is_told_with_both_places(recipe, here):
    from clipscale.data.shard.counts import declared_counts
    from clipscale.data.shard.uids import UidList
    from clipscale.eval.zeroshot import load_task

    for path in recipe.parent.rglob("*.[tj]*"):
        path.unlink()
    config = load_config([str(recipe)])
    both = f"cannot be read: no such file in {here}, nor beside the YAML that names it"
    for name, read in {
        "names.txt": lambda: load_task(config.eval.zeroshot, config.data),
        "lists/uids.txt": lambda: UidList.open("lists/uids.txt"),
        "counts.json": lambda: declared_counts("x", ["http://127.0.0.1/0.tar"], "counts.json", None, None),
    }.items():
        with pytest.raises(UserError) as error:
            read()
        assert f"{name!r} {both}" in str(error.value)
