"""clipscale/cli/ and clipscale/evaluate.py: what a person types, and what comes back."""

import errno
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from shards import picture, write_pairs, write_shard
from tiny import write_config
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from clipscale import __version__
from clipscale.cli import main
from clipscale.config.load import config_from_yaml, load_config
from clipscale.config.recipes import list_recipes

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with training shards, and labelled pictures in shards of three classes."""
    root = tmp_path_factory.mktemp("cli")
    write_pairs(root / "pairs", 2, 8, size=16)
    labels = [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]  # of unequal numbers, so that even a constant answer scores its own
    labelled = [(f"{i}", {"png": picture(50 + i, 16, 16, "PNG"), "cls": b"%d" % c}) for i, c in enumerate(labels)]
    write_shard(root / "test.tar", labelled)
    (root / "names.txt").write_text("red circle\nblue star\npink ring\n")
    (root / "templates.txt").write_text("{}\na photo of the {}\n")
    return root


@pytest.fixture(scope="module")
def arguments(place) -> list[str]:
    """A tiny training with both evaluations, the zero-shot one every two steps."""
    zeroshot = {"urls": "test.tar", "classnames": "names.txt", "templates": "templates.txt"}
    words = [f"eval.zeroshot.{key}={place / name}" for key, name in zeroshot.items()]
    words += [
        "optim.lr=0.1",
        "eval.zeroshot.every_steps=2",
        f"eval.validation.urls={place}/pairs/0001.tar",
        "eval.validation.batch=8",
    ]
    return ["train", write_config(place, f"{place}/pairs/*.tar"), *words]


@pytest.fixture(scope="module")
def trained(place, arguments) -> Path:
    """The folder of that run, after its end."""
    assert main(arguments) == 0
    return place / "run"


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "example"),
    [
        ([], "clipscale train quickstart"),
        (["train"], "clipscale train quickstart train.global_batch=4096"),
        (["eval"], "clipscale eval zeroshot runs/quickstart"),
        (["eval", "zeroshot"], "clipscale eval zeroshot runs/quickstart"),
        (["index"], "clipscale index 'shards/{0000..0999}.tar'"),
        (["recipes"], "clipscale train quickstart --print-config"),
        (["config"], "clipscale config train.global_batch"),
    ],
)
def test_help_shows_an_example(capsys, words, example):
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    assert example in capsys.readouterr().out


def test_the_recipes_and_files_that_help_names_are_there(capsys):
    for words in ([], ["train"], ["eval", "zeroshot"], ["index"], ["recipes"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    out = capsys.readouterr().out
    files = {word for word in out.replace("=", " ").split() if word.startswith("configs/")}
    assert files
    assert all((ROOT / name).is_file() for name in files), files
    recipes = set(re.findall(r"clipscale train ([a-z]\w*)", out))
    assert {"quickstart", "vit_b32"} <= recipes <= set(list_recipes())


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"clipscale {__version__}"


@pytest.mark.parametrize("words", [[], ["train"], ["eval"], ["eval", "zeroshot"], ["index"], ["fly"]])
def test_arguments_that_are_missing_or_unknown(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: clipscale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "quickstart"], "did you mean train?"),
        (["shards", "mkae"], "did you mean make?"),
        (["eval", "zeroshto"], "did you mean zeroshot?"),
        (["bench", "lsos"], "did you mean loss?"),
        (["train", "quickstart", "--print-confg"], "arguments: --print-confg; did you mean --print-config?"),
        (["shards", "make", "a.csv", "--output", "b", "--jbos=2"], "--jbos=2; did you mean --jobs or --json?"),
        (["quickstart"], "'quickstart' is a recipe: `clipscale train quickstart` trains it"),
    ],
)
def test_a_misspelt_command_is_answered_with_the_nearest(capsys, words, told):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(told)


def test_a_misspelt_recipe_is_answered_with_the_nearest(capsys):
    assert main(["train", "quikstart"]) == 2
    assert "did you mean the recipe quickstart?" in capsys.readouterr().err


# --- errors -----------------------------------------------------------------------------------------------------------


def test_under_torchrun_its_summary_has_our_line(tmp_path, monkeypatch):
    """Read as torchrun reads it. The status stays."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert main(["train", "quickstart", "train.lrr=3"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    summary = str(ChildFailedError("clipscale", {0: failure}))
    assert "traceback : clipscale: error: train.lrr=3: unknown key; " in summary
    assert "To enable traceback" not in summary


@pytest.mark.parametrize(("local_rank", "told"), [("0", True), ("1", False)])
def test_a_wrong_setting_is_told_by_the_first_rank_of_a_node(capsys, monkeypatch, local_rank, told):
    for name, value in (("RANK", "3"), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert main(["train", "quickstart", "train.lrr=3"]) == 2
    assert ("error on rank 3: train.lrr=3: unknown key" in capsys.readouterr().err) == told


def test_under_torchrun_its_summary_has_the_traceback_of_a_fault_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("clipscale.cli.recipes.run", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["recipes"])
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert "ZeroDivisionError" in str(ChildFailedError("clipscale", {0: failure}))


def test_a_file_that_cannot_be_used_is_one_line(capsys, monkeypatch):
    def refuse(*_) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/there/run.log")

    monkeypatch.setattr("clipscale.cli.recipes.run", refuse)
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == "clipscale: error: /there/run.log: Permission denied\n"


# --- train ------------------------------------------------------------------------------------------------------------


def test_print_config_shows_what_would_run_and_loads_back(capsys, tmp_path):
    words = [write_config(tmp_path, "shards/{0..9}.tar"), "optim.lr=0.125", "data.sources.more.urls=x.tar"]
    assert main(["train", *words, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert config_from_yaml(printed) == load_config(words)
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config([str(tmp_path / "printed.yaml")]) == load_config(words)
    assert not (tmp_path / "run").exists()


def test_the_run_folder_holds_the_resolved_config(trained, arguments):
    config = load_config(arguments[1:])
    assert config_from_yaml((trained / "config.yaml").read_text()) == config
    assert config_from_yaml(next(trained.glob("checkpoints/*/config.yaml")).read_text()) == config
    assert any((trained / "tensorboard").iterdir())


def test_metrics_have_a_row_a_step_with_what_scripts_rely_on(trained):
    found = rows(trained)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["samples"] for row in found] == [8, 16, 24, 32]
    for row in found:
        for name in ("loss", "logit_scale", "grad_norm", "samples_per_second"):
            assert np.isfinite(row[name])
            assert row[name] > 0
        assert ("zeroshot/top1" in row) == (row["step"] in (2, 4))
        assert ("validation/loss" in row) == (row["step"] == 4)
    assert 0 <= found[-1]["zeroshot/top1"] <= found[-1]["zeroshot/top5"] == 1  # of three classes


def test_a_finished_run_says_so_and_changes_nothing(trained, arguments, capsys):
    def state() -> dict[str, tuple[int, bytes]]:
        files = [path for path in (trained / "checkpoints").rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before, metrics = state(), (trained / "metrics.jsonl").read_text()
    assert len(before) == 5
    assert main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("already complete: nothing to do; 32 samples seen")
    assert len(out) == 3
    assert f"zero-shot top-1 {rows(trained)[-1]['zeroshot/top1']:.4f}" in out[1]
    assert str(trained / "checkpoints") in out[2]
    assert state() == before
    assert (trained / "metrics.jsonl").read_text() == metrics


def test_the_end_says_in_three_lines_what_was_learned_and_where_it_lies(place, arguments, capsys):
    assert main([*arguments, f"run.dir={place / 'other'}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[0].startswith("trained 4 steps in 0:0")
    assert out[1].startswith("learned: loss ")
    assert f"tensorboard --logdir {place / 'other' / 'tensorboard'}" in out[2]


# --- eval -------------------------------------------------------------------------------------------------------------


def test_eval_zeroshot_gives_what_training_gave(trained, capsys):
    last = rows(trained)[-1]
    expected = f"step 4  zeroshot/top1 {last['zeroshot/top1']:.4f}  zeroshot/top5 {last['zeroshot/top5']:.4f}"
    for place in (trained, trained / "checkpoints" / "step-000000004"):
        assert main(["eval", "zeroshot", str(place)]) == 0
        assert capsys.readouterr().out.startswith(expected)


def test_eval_zeroshot_writes_what_clip_benchmark_writes(trained, place, tmp_path, capsys):
    assert main(["eval", "zeroshot", str(trained), "--json", str(tmp_path / "scores.json")]) == 0
    out = capsys.readouterr().out
    assert "  zeroshot/pictures 12  zeroshot/classes 3  zeroshot/classes_seen 3  zeroshot/passed_over 0  " in out
    found, last = json.loads((tmp_path / "scores.json").read_text()), rows(trained)[-1]
    assert found == {
        "dataset": str(place / "test.tar"),
        "model": "model.vision, model.text",
        "pretrained": str(trained / "checkpoints" / "step-000000004"),
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": last["zeroshot/top1"],
            "acc5": None,  # of three classes
            "mean_per_class_recall": last["zeroshot/mean_per_class_recall"],
        },
        "language": "en",
    }


def test_eval_zeroshot_takes_other_pictures(trained, place, capsys):
    same = [f"eval.zeroshot.urls={place / 'test.tar'}", "eval.zeroshot.batch=5", "gradcache.text_chunk=1"]
    assert main(["eval", "zeroshot", str(trained), *same]) == 0
    assert f"zeroshot/top1 {rows(trained)[-1]['zeroshot/top1']:.4f}" in capsys.readouterr().out
    assert main(["eval", "zeroshot", str(trained), "eval.zeroshot.urls=null"]) == 2
    assert "no pictures to classify: add eval.zeroshot.wds=" in capsys.readouterr().err
    assert main(["eval", "zeroshot", str(trained), "train.lrr=3"]) == 2
    assert capsys.readouterr().err.startswith("clipscale: error: train.lrr=3: unknown key")
    assert main(["eval", "zeroshot", str(place)]) == 2
    assert "neither a checkpoint nor the folder of a run" in capsys.readouterr().err


# --- index ------------------------------------------------------------------------------------------------------------


def test_index_prints_counts(tmp_path, capsys):
    write_pairs(tmp_path / "good", 2, 8, size=16)
    samples = [(f"{i}", {"jpg": picture(i, 16, 16), "txt": b"ok"}) for i in range(3)]
    samples += [("3", {"jpg": picture(3, 16, 16)}), ("4", {"txt": b"alone"}), ("5", {"jpg": b"x", "txt": b" "})]
    odd = write_shard(tmp_path / "odd.tar", samples)
    with tarfile.open(odd) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    odd.write_bytes(odd.read_bytes()[:end])  # no end-of-archive marker
    assert main(["index", f"{tmp_path}/good/*.tar", str(odd), "--index-dir", str(tmp_path / "index")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"{odd}: 3 pairs usable: cut short at byte")
    table = {cause.strip(): number.strip() for _, cause, number, *_ in (row.split("│") for row in out if "│" in row)}
    assert table == {"refused, no caption": "1", "refused, no picture": "1", "refused, empty caption": "1"}
    assert out[-1].startswith("3 shards, 19 usable pairs, fingerprint ")
    assert len([*(tmp_path / "index").iterdir()]) == 3
    assert main(["index", f"{tmp_path}/good/*.tar", str(odd), "--index-dir", str(tmp_path / "index")]) == 0
    assert capsys.readouterr().out.splitlines() == out  # read, not built again: the same


def test_a_run_indexes_what_has_no_index(tmp_path):
    config = write_config(tmp_path, write_pairs(tmp_path / "pairs", 2, 8, size=16))
    assert main(["train", config, "train.samples=8"]) == 0
    assert len([*(tmp_path / "pairs").glob("*.tar.index")]) == 2


@pytest.mark.parametrize(("code", "status"), [(errno.ENOSPC, 2), (errno.EDQUOT, 2), (errno.EIO, None)])
def test_a_full_disk_is_one_line(monkeypatch, capsys, code, status):
    """The system does not say which file it was that did not fit."""

    def run(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("clipscale.cli.recipes.run", run)
    if status is None:
        with pytest.raises(OSError, match=os.strerror(code)):
            main(["recipes"])
    else:
        assert main(["recipes"]) == status
        assert capsys.readouterr().err == f"clipscale: error: {os.strerror(code)}\n"
