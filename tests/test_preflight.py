"""clipscale/preflight.py: what a command lacks is told before torch is asked for, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
from shards import picture, write_pairs, write_shard
from tiny import tiny_config, write_config

from clipscale.checkpoint import RunFolder
from clipscale.cli import main
from clipscale.errors import SharedError, UserError
from clipscale.preflight.checks import check_training
from clipscale.training.trainer import train
from clipscale.upstream import open_clip_files

COUNTED = ["data.sources.mine.urls=http://127.0.0.1:9/0.tar", "data.sources.mine.counts=counts.json"]
NAMED = ["model.vision=null", "model.text=null", "model.name=ViT-B-32"]
FOLDER = "eval.zeroshot.folder=tree"
WRONG = {  # words on top of a good training -> what the one line says
    "shard": (["data.sources.mine.urls=good/{0000..0003}.tar"], "'good/0002.tar' is not a file (and 1 more of 4)"),
    "glob": (["data.sources.mine.urls=good/x*.tar"], "no file matches the pattern"),
    "no source": (["data.sources.mine.weight=0", "data.sources.mine.urls=x"], "every data source has weight 0"),
    "batch": (["train.global_batch=64"], "16 usable samples an epoch, fewer than its 64 of a batch"),
    "model": (["model.vision=null", "model.text=null", "model.name=ViT-B-3"], "did you mean ViT-B-32"),
    "vision": (["model.vision.widht=3"], "did you mean model.vision.width?"),
    "text": (["model.text.haeds=3"], "did you mean model.text.heads?"),
    "init": (["model.init=nowhere.pt"], "model.init: no weights: 'nowhere.pt' is no file and no folder"),
    "tag": ([*NAMED, "model.init=opnai"], "is no file, no folder and no tag of ViT-B-32; did you mean openai?"),
    "resume": (["resume=nowhere"], "'nowhere' is neither a checkpoint nor the folder of a run"),
    "run.dir": (["run.dir=file/run"], "run.dir='file/run' cannot be made: "),
    "uids": (["data.sources.mine.select.uids=no.txt"], "uids 'no.txt' cannot be read"),
    "counts": (COUNTED, "counts 'counts.json' cannot be read"),
    "local counts": (["data.sources.mine.counts=counts.json"], "counts 'counts.json' cannot be read"),
    "validation": (["eval.validation.urls=no.tar"], "'no.tar' is not a file"),
    "names": ([FOLDER, "eval.zeroshot.classnames=no.txt"], "eval.zeroshot.classnames='no.txt' cannot be read"),
    "templates": ([FOLDER, "eval.zeroshot.templates=no.txt"], "eval.zeroshot.templates='no.txt' cannot be read"),
    "folder": (["eval.zeroshot.folder=nowhere"], "eval.zeroshot.folder 'nowhere' is not a folder"),
    "classes": (
        [FOLDER, "eval.zeroshot.classnames=imagenet"],
        "has 2 class folders, eval.zeroshot.classnames='imagenet' names 1000, and 'cat', 'dog' is none of them",
    ),
    "replay": (["replay.dir=file/x"], "replay.dir='file/x' cannot be made"),
    "device": (["device=cuda"], "device=cuda, but "),
    "drop": (["data.sampling=resampled", "data.epoch_boundary=drop"], "data.sampling=resampled has no epochs"),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The current folder: two shards of eight good pairs, a tree of two classes, a file in the way."""
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("good"), 2, 8, size=16)
    for name in ("cat", "dog"):
        Path("tree", name).mkdir(parents=True)
        Path("tree", name, "0.jpg").write_bytes(picture(0, 16, 16))
    Path("file").touch()
    return tmp_path


def files() -> set[str]:
    return {f"{path}" for path in Path().rglob("*") if path.suffix != ".index"}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_first_and_nothing_is_left(place, capsys, monkeypatch, case):
    words, said = WRONG[case]
    monkeypatch.setattr("clipscale.preflight.checks._has_driver", lambda: False)
    monkeypatch.setattr("clipscale.training.trainer.start_world", lambda device: pytest.fail("torch was asked"))
    config = write_config(place, "good/{0000..0001}.tar")
    before = files()
    assert main(["train", config, "run.dir=runs/new", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clipscale: error: ")
    assert err.count("\n") == 1
    assert said in err
    assert files() == before


def test_these_errors_come_without_torch(place):
    """Training, evaluation and indexing; in a process of its own, for this one has torch."""
    cases = ("shard", "batch", "model", "text", "init", "tag", "resume", "uids", "counts", "names", "folder", "device")
    Path("words.json").write_text(json.dumps([WRONG[case][0] for case in cases]))
    write_config(place, "good/{0000..0001}.tar")
    checkpoint = Path("run/checkpoints/step-000000004")
    checkpoint.mkdir(parents=True)
    held = RunFolder("held")
    code = """
import json, sys, time
from clipscale import preflight
from clipscale.cli import main
preflight._has_driver = lambda: False
for words in json.load(open("words.json")):
    assert main(["train", "tiny.yaml", "run.dir=runs/new", *words]) == 2
    assert "torch" not in sys.modules, words
begin = time.monotonic()
assert main(["train", "tiny.yaml", "run.dir=held"]) == 2
assert time.monotonic() - begin < 5, "a folder that is held"
assert "torch" not in sys.modules
for words in ["eval", "zeroshot", "nowhere"], ["eval", "zeroshot", "run"], ["index", "no/*.tar"], ["index", "no.tar"]:
    assert main(words) == 2
    assert "torch" not in sys.modules, words
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    held.close()
    assert done.returncode == 0, done.stderr
    assert f"run.dir='held' is in use by another process: process {os.getpid()} on " in done.stderr


def test_a_header_comes_after_all_that_can_refuse(place, capsys, monkeypatch):
    """Also what only a rank's own look at the data finds, and what the towers do not take."""
    late = ["eval.zeroshot.urls=labelled.tar", "eval.zeroshot.classnames=names.txt", "eval.zeroshot.templates=t.txt"]
    write_shard(Path("labelled.tar"), [("a", {"jpg": picture(0, 16, 16), "cls": b"2"})])
    Path("names.txt").write_text("cat\ndog")
    Path("t.txt").write_text("a {}")
    config = write_config(place, "good/{0000..0001}.tar")
    before = files()
    for words, said in (
        (["model.text.heads=3"], "must be divisible"),
        (late, "label 2 has no class name: there are 2 (0 to 1)"),
        (["loss.precision=tf32", "device=cpu"], "tf32"),
    ):
        assert main(["train", config, "run.dir=runs/new", *words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert "from the start" not in err
        assert files() == before
    Path("names.txt").write_text("cat\ndog\nowl\nfox")
    assert main(["train", config, *late]) == 0
    told = capsys.readouterr().err.splitlines()
    header, data, odd = (
        next(i for i, line in enumerate(told) if words in line)
        for words in (
            "from the start",
            "data: mine 16 pairs",
            "has 4 names, and no label of the pictures is above 2: 1",
        )
    )
    assert header > max(data, odd)


def test_notes_are_in_the_runs_log_too(place):
    config = tiny_config(place, "good/*.tar", "optim.warmup_samples=64")
    train(config)
    log = Path("run/run.log").read_text()
    assert log.count("warning: optim.warmup_samples=64 (8 steps) is no shorter than the run") == 1


def test_a_finished_run_wants_no_shards(place):
    config = tiny_config(place, "good/*.tar")
    train(config)
    for path in Path("good").glob("*"):
        path.unlink()
    assert train(config)[0].startswith("already complete")
    with pytest.raises(UserError, match="no file matches"):
        check_training(tiny_config(place, "good/*.tar", "train.samples=48"))
    with pytest.raises(UserError, match=r"resume=fresh, but .*step-000000004 exists"):
        check_training(tiny_config(place, "good/*.tar", "resume=fresh"))


def test_ranks_are_known_and_a_node_tells_once(place, monkeypatch):
    config = tiny_config(place, "good/*.tar")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SharedError, match=r"train\.global_batch=8 is not divisible by the 3 ranks"):
        check_training(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    missing = tiny_config(place, "no.tar")
    with pytest.raises(SharedError, match="is not a file"):
        check_training(missing)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of another node, which may lack what this one has
    with pytest.raises(UserError, match="is not a file") as error:
        check_training(missing)
    assert not isinstance(error.value, SharedError)
    assert check_training(config) == []
    assert not list(Path("good").glob("*.index"))  # ranks index when they have met, one for all


def test_a_checkpoint_is_evaluated_on_what_is_there(place, capsys):
    train(tiny_config(place, "good/*.tar"))
    for words, said in (
        ([], "no pictures to classify"),
        ([FOLDER, "eval.zeroshot.classnames=imagenet"], "has 2 class folders"),
        (["eval.zeroshot.urls=no.tar"], "'no.tar' is not a file"),
        ([FOLDER, "eval.zeroshot.templates=no.txt"], "cannot be read"),
        (["data.shapes={dir: shapes}", "eval.zeroshot.urls=shapes/*.tar"], "'shapes/*.tar': no file matches"),
    ):
        assert main(["eval", "zeroshot", "run", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_drawn_shapes_set_may_be_read_only(place, monkeypatch):
    """Only one that is to be drawn needs a place that can be written."""
    words = ["data.shapes={dir: shapes, train_samples: 8, image_size: 16}", "run.dir=here"]
    config = tiny_config(place, "shapes/train-*.tar", *words)
    monkeypatch.setattr("clipscale.preflight.checks.os.access", lambda path, mode: Path(path) == place)
    assert check_training(config) == []
    monkeypatch.setattr("clipscale.preflight.checks.os.access", lambda path, mode: Path(path).name == "good")
    config = tiny_config(place, "shapes/train-*.tar", words[0], "run.dir=good")
    assert check_training(config) == []
    with pytest.raises(UserError, match=r"data\.shapes\.dir='other' cannot be made: .* is not writable"):
        check_training(tiny_config(place, "other/*.tar", "data.shapes.dir=other", "run.dir=good"))


# --- the run's folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_was_not_kept_goes_and_nothing_else_does(tmp_path):
    folder = RunFolder(str(tmp_path / "a" / "b"))
    (tmp_path / "a" / "b" / "run.log").touch()
    folder.close()
    assert os.listdir(tmp_path) == []
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "mine").touch()
    RunFolder(str(tmp_path / "a" / "b")).close()
    assert os.listdir(tmp_path / "a" / "b") == ["mine"]
    kept = RunFolder(str(tmp_path / "a" / "c"))
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(str(tmp_path / "a" / "c"))
    kept.keep()
    kept.close()
    assert os.listdir(tmp_path / "a" / "c") == [".lock"]
    RunFolder(str(tmp_path / "a" / "c")).close()
    assert os.listdir(tmp_path / "a" / "c") == [".lock"]


def test_a_lock_that_was_removed_meanwhile_holds_nothing(tmp_path, monkeypatch):
    """The one that held it has gone, and its file too: a third process would make, and hold, a new one."""
    (tmp_path / "run").mkdir()

    def removed(file, how):
        (tmp_path / "run" / ".lock").unlink()

    monkeypatch.setattr("clipscale.files.fcntl.flock", removed)
    with pytest.raises(UserError, match="in use by another process"):
        RunFolder(str(tmp_path / "run"))


# --- open_clip's files ------------------------------------------------------------------------------------------------


def test_files_say_what_open_clip_says(monkeypatch):
    for kind in (open_clip.CLIPVisionCfg, open_clip.CLIPTextCfg):
        assert open_clip_files.fields_of(kind.__name__) == (*kind.__dataclass_fields__,)
    assert open_clip_files.imagenet_classes() == list(open_clip.IMAGENET_CLASSNAMES)
    templates = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert open_clip_files.imagenet_templates() == templates
    monkeypatch.setattr(open_clip_files, "_loaded", lambda: None)
    shipped = {name: open_clip_files.model_settings(name) for name in open_clip_files.known_models()}
    assert len(shipped) > 100
    assert shipped == {name: open_clip.get_model_config(name) for name in shipped}
    assert open_clip_files.model_settings("ViT-B-3") is None


def test_without_transformers_its_towers_say_how_to_get_it(place, monkeypatch):
    find = open_clip_files.importlib.util.find_spec
    monkeypatch.setattr(
        open_clip_files.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )
    for words in (
        ["model.vision=null", "model.text=null", "model.name=roberta-ViT-B-32"],
        ["model.vision=null", "model.text=null", "model.name=ViT-B-16-SigLIP"],
        ["model.text={hf_model_name: roberta-base}"],
    ):
        with pytest.raises(UserError, match=r"transformers is not installed; pip install 'clipscale\[hf\]'"):
            check_training(tiny_config(place, "good/*.tar", *words))


@pytest.mark.parametrize("folder", ["~/bert", "$HOME/bert"])
def test_a_text_tower_in_a_folder_that_is_not_written_out(place, folder):
    with pytest.raises(UserError, match=r"model\.text\.hf_model_name='.*': a name of Hugging Face's or a folder"):
        check_training(tiny_config(place, "good/*.tar", f"model.text={{hf_model_name: {folder}}}"))
