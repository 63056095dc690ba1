"""Several evaluations by one code: eval/suite.py in training, `clipscale eval` apart from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shards import picture, write_pairs, write_shard
from spawn import run_ranks
from tiny import MODEL, tiny_config

from clipscale.cli import main
from clipscale.config import Config
from clipscale.config.load import apply_overrides, config_from_yaml, dump_config, load_config
from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.eval.classifier import Classifiers
from clipscale.eval.suite import EvalSuite
from clipscale.schedule import evaluations_due, others_left
from clipscale.towers import build_towers
from clipscale.training.trainer import train


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Pairs whose captions are in JSON alone, three small sets of labelled pictures, and their names."""
    root = tmp_path_factory.mktemp("evaluations")
    json_pairs = [
        (f"{i}", {"jpg": picture(i, 16, 16), "json": json.dumps({"words": f"number {i}"}).encode()}) for i in range(16)
    ]
    write_shard(root / "json.tar", json_pairs)
    write_pairs(root / "pairs", 2, 8, size=16)
    for name, labels in (("a", [0, 1, 2] * 5), ("b", [2] * 4)):
        samples = [(f"{i}", {"png": picture(i, 16, 16, "PNG"), "cls": b"%d" % c}) for i, c in enumerate(labels)]
        write_shard(root / f"{name}.tar", samples)
    (root / "names.txt").write_text("cat\ndog\nowl")
    (root / "templates.txt").write_text("{}\na {}")
    (root / "two.txt").write_text("owl\ndog")
    return root


def words(place: Path, *names: str) -> list[str]:
    """A zero-shot set for each name, of the shard of that name."""
    return [
        f"eval.zeroshot_sets.{name}={{urls: {place}/{name}.tar, classnames: {place}/names.txt, "
        f"templates: {place}/templates.txt}}"
        for name in names
    ]


def rows(run: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(place, tmp_path_factory) -> Config:
    """Four steps with two sets and a validation, each of its own times."""
    sets = words(place, "a", "b")
    sets += ["eval.zeroshot_sets.b.every_steps=2", f"eval.validation_sets.held.urls={place}/json.tar"]
    sets += ["eval.validation_sets.held.every_samples=24", "data.sources.mine.caption=json:words"]
    config = tiny_config(tmp_path_factory.mktemp("trained"), f"{place}/json.tar", *sets, "optim.lr=0.1")
    train(config)
    return config


def test_each_set_has_its_own_times_and_columns(trained):
    found = [
        {key.rpartition("/")[0] for key in row if key.endswith(("/top1", "/image_accuracy"))}
        for row in rows(trained.run.dir)
    ]
    assert found == [set(), {"b"}, {"held"}, {"a", "b", "held"}]
    last = rows(trained.run.dir)[-1]
    assert (last["a/pictures"], last["b/pictures"], last["b/classes_seen"], last["held/pairs"]) == (15, 4, 1, 16)
    assert last["held/batch"] == 16


def test_standalone_gives_what_training_gave(trained, capsys):
    last = rows(trained.run.dir)[-1]
    assert main(["eval", "zeroshot", trained.run.dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 4", f"a/top1 {last['a/top1']:.4f}"],
        ["step 4", f"b/top1 {last['b/top1']:.4f}"],
    ]
    assert main(["eval", "validation", trained.run.dir]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"step 4  held/loss {last['held/loss']:.4f}  held/image_accuracy ")
    assert "  held/pairs 16  held/batch 16  " in out
    assert "held: 16 pairs in batches of 16: loss and accuracy depend on both (by chance the loss is 2.77)" in err


def test_one_that_lacks_its_shards_keeps_no_other_from_being_made(trained, place, capsys):
    gone = "eval.validation_sets.held.urls=gone.tar"
    assert main(["eval", "zeroshot", trained.run.dir, gone]) == 0  # another kind is not looked at
    assert main(["eval", "validation", trained.run.dir, gone]) == 2
    capsys.readouterr()
    assert main(["eval", "zeroshot", trained.run.dir, "eval.zeroshot_sets.a.urls=gone.tar"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"step 4  b/top1 {rows(trained.run.dir)[-1]['b/top1']:.4f}")
    assert out.count("\n") == 1
    assert "clipscale: error: a: shard 'gone.tar' is not a file" in err
    both = [f"eval.zeroshot_sets.{name}.urls=gone.tar" for name in "ab"]
    assert main(["eval", "zeroshot", trained.run.dir, *both]) == 2
    assert capsys.readouterr().out == ""


def test_a_file_of_scores_for_each_set(trained, tmp_path, capsys):
    assert main(["eval", "zeroshot", trained.run.dir, "--json", str(tmp_path / "all.json")]) == 2
    assert "2 sets (a, b) want a file each; put {dataset} into its name" in capsys.readouterr().err
    assert main(["eval", "zeroshot", trained.run.dir, "--json", str(tmp_path / "{dataset}.json")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert json.loads((tmp_path / "b.json").read_text())["dataset"] == "b"


def test_a_file_of_classes_and_the_worst_confusions(trained, tmp_path, capsys):
    command = ["eval", "zeroshot", trained.run.dir, "eval.zeroshot_sets.b.urls=null", "--classes"]
    assert main([*command, str(tmp_path / "a.json")]) == 0
    scores, *lines = capsys.readouterr().out.splitlines()
    table = json.loads((tmp_path / "a.json").read_text())
    assert [row["name"] for row in table["classes"]] == ["cat", "dog", "owl"]
    assert sum(row["pictures"] for row in table["classes"]) == 15
    right = sum(row["right_top1"] for row in table["classes"])
    assert f"a/top1 {right / 15:.4f}" in scores
    assert sum(row["pictures"] for row in table["confusions"]) == 15 - right > 0
    assert lines[0] == f"most often confused, of {15 - right} pictures in another class than their own:"
    assert len(lines) == 1 + len(table["confusions"])
    for option in ("--classes", "--json"):
        assert main(["eval", "zeroshot", trained.run.dir, option, str(tmp_path / "no" / "{dataset}.json")]) == 2
        assert f"{tmp_path}/no' is no folder; make it first" in capsys.readouterr().err
    assert main(["eval", "zeroshot", trained.run.dir, "--classes", str(tmp_path / "all.json")]) == 2
    assert "2 sets (a, b) want a file each" in capsys.readouterr().err


def test_captions_of_a_validation_are_read_as_the_sources_are(place):
    """As all sources that are trained on have it, unless it says something itself."""
    config = load_config(["quickstart", f"eval.validation.urls={place}/json.tar"])
    assert config.held_out(config.eval.validation).caption == "txt"
    one = apply_overrides(config, ["data.sources.shapes.caption=json:words", "data.sources.shapes.captions=first"])
    assert (one.held_out(one.eval.validation).caption, one.held_out(one.eval.validation).captions) == (
        "json:words",
        "first",
    )
    two = apply_overrides(one, ["data.sources.other.urls=x.tar"])
    assert two.held_out(two.eval.validation).caption == "txt"
    own = apply_overrides(two, ["eval.validation.caption=json:other"])
    assert own.held_out(own.eval.validation).caption == "json:other"


def evaluate(rank: int, size: int, place: str, chunk: int) -> tuple[dict[str, float], dict[str, dict]]:
    """Scores, and the tables of classes."""
    config = config_from_yaml(
        dump_config(tiny_config(Path(place), f"{place}/pairs/*.tar", *words(Path(place), "a", "b")))
    )
    config = apply_overrides(
        config,
        [
            *(f"eval.validation.urls={place}/pairs/*.tar", "eval.validation.batch=6"),
            *(f"eval.zeroshot_sets.a.batch={chunk}", f"eval.zeroshot_sets.b.subset={place}/two.txt"),
        ],
    )
    towers = build_towers(MODEL, seed=1)
    with torch.no_grad():
        for parameter in towers.encoder_parameters():
            parameter.mul_(3)  # so that predictions differ between pictures
    world = World(rank, size, rank, torch.device("cpu"))
    suite = EvalSuite(config, towers, (chunk, chunk), build_tokenizer(None, 8), world)
    return suite.run_all(), suite.details()


@pytest.mark.parametrize("ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_the_result_is_the_same_for_any_number_of_ranks_and_any_chunk(place, ranks):
    alone, tables = evaluate(0, 1, str(place), 100)
    assert {row["pictures"] for row in tables["a"]["classes"]} == {5}
    assert [row["pictures"] for row in tables["b"]["classes"]] == [0, 4]
    assert 0 < alone["a/top1"] < 1
    assert alone["a/pictures"] == 15
    assert alone["validation/pairs"] == 12
    for found, its_tables in [evaluate(0, 1, str(place), 4), *run_ranks(evaluate, ranks, str(place), 3)]:
        assert its_tables == tables
        assert found == pytest.approx(alone, rel=1e-5)
        exact = {key: value for key, value in alone.items() if not key.endswith("/loss")}
        assert {key: found[key] for key in exact} == exact


def test_sets_of_the_same_names_and_templates_share_a_classifier(place, monkeypatch):
    made, real = [], Classifiers._made
    monkeypatch.setattr(Classifiers, "_made", lambda self, *of: made.append(of) or real(self, *of))
    scores, _ = evaluate(0, 1, str(place), 100)
    assert {"a/top1", "b/top1"} < scores.keys()
    assert made == [(["cat", "dog", "owl"], ["{}", "a {}"])]


# --- settings ---------------------------------------------------------------------------------------------------------


def test_times_in_samples(place):
    config = load_config(
        ["quickstart", "train.global_batch=100", *words(place, "a"), "eval.zeroshot_sets.a.every_samples=250"]
    )
    config = apply_overrides(config, ["eval.validation.urls=null", "eval.zeroshot.urls=null"])
    due = [step for step in range(1, 12) if evaluations_due(config, step, 11)]
    assert due == [3, 5, 8, 10, 11]  # the first steps that have seen 250, 500, 750, 1,000 samples, and the last
    assert others_left(config, 0, 11)["a"] in (4, 5)  # for the time that is left


def test_settings_from_before_there_were_sets_load_as_they_are():
    old = "eval: {zeroshot: {urls: a.tar, classnames: imagenet, every_steps: 5}, validation: {urls: b.tar, batch: 16}}"
    config = config_from_yaml(old)
    assert list(config.eval.evaluations()) == ["validation", "zeroshot"]
    assert (config.eval.zeroshot.every_steps, config.eval.validation.batch) == (5, 16)
    assert evaluations_due(config, 5, 100) == ["zeroshot"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["eval.zeroshot_sets.zeroshot.urls=a.tar"],
            "'zeroshot' cannot be the name of a set: a word without '/', other",
        ),
        (["eval.validation_sets.seconds.urls=a.tar"], "'seconds' cannot be the name of a set"),
        (["eval.zeroshot_sets={a/b: {urls: a.tar}}"], "'a/b' cannot be the name of a set"),
        (["eval.zeroshot_sets.a.urls=a.tar", "eval.validation_sets.a.urls=a.tar"], "'a' is the name of two sets"),
        (["eval.zeroshot.every_steps=3", "eval.zeroshot.every_samples=3"], "are both set; set one of them to 0"),
        (["eval.validation.every_samples=-1"], "eval.validation.every_samples=-1 must not be negative"),
        (["eval.validation.caption='json:'"], "eval.validation.caption='json:' must be a member's suffix, such as txt"),
    ],
)
def test_settings_that_cannot_be_are_told(changes, said):
    with pytest.raises(UserError) as error:
        load_config(["quickstart", *changes])
    assert said in str(error.value)


def test_messages_name_the_set(trained, capsys):
    changes = ["eval.zeroshot_sets.a.classnames=no.txt", "eval.zeroshot_sets.b.urls=null"]
    assert main(["eval", "zeroshot", trained.run.dir, *changes]) == 2
    assert "eval.zeroshot_sets.a.classnames='no.txt' cannot be read" in capsys.readouterr().err
