"""Bad input through the real command line: one clear line within seconds, or counted and masked; never a hang."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from shards import picture, write_pairs, write_shard
from tiny import write_config

from clipscale.cli import main

SECONDS = 30  # "within seconds", with room for a busy machine
IMPORT_SECONDS = 120  # the same for a process that imports torch first


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> str:
    """Two shards of eight good pairs."""
    return write_pairs(tmp_path_factory.mktemp("good"), 2, 8, size=16)


def train(urls: str, *words: str) -> list[str]:
    """The arguments of a tiny training in the current folder."""
    return ["train", write_config(Path.cwd(), urls), *words]


def the_error(stderr: str) -> str:
    """The last line, which must be the only error, without a traceback before it."""
    assert "Traceback" not in stderr
    errors = [line for line in stderr.splitlines() if line.startswith("clipscale: error: ")]
    assert stderr.splitlines()[-1:] == errors, stderr
    return errors[0]


def refused(capsys, arguments: list[str]) -> str:
    """The line with which the command ends, in this process."""
    start = time.monotonic()
    assert main(arguments) == 2
    assert time.monotonic() - start < SECONDS
    return the_error(capsys.readouterr().err)


def command(arguments: list[str], **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "clipscale", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def rows(name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path("run", name).read_text().splitlines()]


# --- as a process of its own ------------------------------------------------------------------------------------------


def test_an_unknown_key_as_a_command(good):
    process = command(train(good, "train.global_batc=3"))
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out) == (2, "")
    assert err == "clipscale: error: train.global_batc=3: unknown key; did you mean train.global_batch?\n"


def test_a_wrong_shard_path_as_a_command():
    process = command(train("nowhere/{0..3}.tar"))
    _, err = process.communicate(timeout=IMPORT_SECONDS)
    assert process.returncode == 2
    assert "'nowhere/0.tar' is not a file (and 3 more of 4); check the path" in the_error(err)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_130_and_the_run_goes_on_later(good, capsys):
    arguments = train(good, "train.samples=800_000", "checkpoint.every_steps=2")
    process = command(arguments)
    deadline = time.monotonic() + IMPORT_SECONDS
    while not any(Path().glob(f"run/checkpoints/step-{'[0-9]' * 9}/manifest.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    done = rows()[-1]["step"]
    said = f"clipscale: SIGINT: left after step {done}, which is saved; the same command goes on from there"
    assert err.splitlines()[-1] == said
    assert "Traceback" not in err
    assert main([*arguments, f"train.samples={8 * (done + 2)}"]) == 0
    assert "resuming after step" in capsys.readouterr().err
    assert [row["step"] for row in rows()] == list(range(1, done + 3))


# --- shards -----------------------------------------------------------------------------------------------------------


def captionless() -> None:
    write_shard(Path("bad.tar"), [(f"{i}", {"jpg": picture(i, 16, 16)}) for i in range(9)])


def gzipped() -> None:
    with tarfile.open("bad.tar", "w:gz"):
        pass


@pytest.mark.parametrize(
    ("make", "urls", "said"),
    [
        (None, "nowhere/*.tar", ["'nowhere/*.tar'", "no file matches"]),
        (None, "pipe:cat bad.tar", ["'pipe:cat bad.tar'", "refused"]),
        (lambda: write_shard(Path("bad.tar"), []), "bad.tar", ["(bad.tar)", "a picture and a caption (.txt)", "empty"]),
        (lambda: Path("bad.tar").touch(), "bad.tar", ["bad.tar", "cut short at byte 0"]),
        (lambda: Path("bad.tar").write_text("words " * 500), "bad.tar", ["bad.tar", "bad tar header at byte 0"]),
        (gzipped, "bad.tar", ["bad.tar", "gzip-compressed; shards must be plain tars"]),
        (captionless, "bad.tar", ["(bad.tar)", "a picture and a caption (.txt)", "no caption: 9"]),
        (lambda: write_shard(Path("bad.tar"), []), "{bad,bad}.tar", ["bad.tar' is named", "name each shard once"]),
        (lambda: Path("bad.tar").mkdir(), "bad.tar", ["'bad.tar'", "is not a file"]),
    ],
    ids=["glob", "pipe", "empty", "zero bytes", "text", "gzip", "captions", "twice", "folder"],
)
def test_shards_without_a_usable_sample(capsys, make, urls, said):
    if make is not None:
        make()
    message = refused(capsys, train(urls))
    for words in said:
        assert words in message


def cut_in_a_member(tar: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return tar[: members[6].offset_data + 100]  # inside the fourth picture


def cut_between_samples(tar: bytes, members: list[tarfile.TarInfo]) -> bytes:
    return tar[: members[6].offset]


@pytest.mark.parametrize("cut", [cut_in_a_member, cut_between_samples])
def test_a_cut_tar_trains_on_what_is_left_and_is_named(capsys, cut):
    write_pairs(Path("shards"), 2, 8, size=16)
    second = Path("shards/0001.tar")
    with tarfile.open(second) as tar:
        members = tar.getmembers()
    second.write_bytes(cut(second.read_bytes(), members))
    assert main(train("shards/*.tar")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert len(warnings) == 1
    assert "shards/0001.tar is damaged, 3 samples are usable: cut short at byte" in warnings[0]
    assert "data: mine 11 pairs" in Path("run/run.log").read_text()
    assert rows()[-1]["step"] == 4
    (fault,) = rows("faults.jsonl")
    assert (fault["kind"], fault["action"]) == ("data", "3 samples before the damage are used")
    assert fault["what"].startswith("source 'mine': shards/0001.tar is damaged: cut short at byte")
    assert main(train("shards/*.tar", "train.samples=40")) == 0
    assert rows("faults.jsonl") == [fault]  # the same damage, and no second fault


def test_only_broken_pictures(capsys):
    urls = write_pairs(Path("shards"), 1, 16, size=16, broken=range(16))
    message = refused(capsys, train(urls, "data.max_bad_fraction=0.9"))
    assert "8 of 8 samples could not be used (mine: broken picture: 8), more than data.max_bad_fraction=0.9" in message
    assert "mend the shards or raise the bound" in message
    assert not rows()  # no step was taken on nothing
    (fault,) = rows("faults.jsonl")  # broken pictures are counted, and the run's end is a fault
    assert (fault["kind"], fault["step"]) == ("error", 1)
    assert "the run ended: 8 of 8 samples could not be used" in fault["what"]


def test_some_broken_pictures_are_masked_counted_and_named(capsys):
    urls = write_pairs(Path("shards"), 2, 8, size=16, broken=[3, 9])
    assert main(train(urls, "data.max_bad_fraction=0.5")) == 0
    assert rows()[-1]["masked_samples"] == 4  # two epochs
    skipped = rows("skipped.jsonl")
    assert sorted(row["key"] for row in skipped) == ["000003", "000003", "000009", "000009"]
    assert {row["shard"] for row in skipped} == {"shards/0000.tar", "shards/0001.tar"}
    assert {row["cause"] for row in skipped} == {"broken picture"}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("masked sample 000009 of")]
    assert len(told) == 2
    assert "shards/0001.tar at position" in told[0]
    assert json.loads(next(Path().glob("run/checkpoints/*/state.json")).read_text())["skips"] == {
        "mine: broken picture": 4
    }


def test_more_broken_pictures_than_the_bound_end_the_run(capsys):
    urls = write_pairs(Path("shards"), 2, 8, size=16, broken=[3, 9])
    message = refused(capsys, train(urls))
    assert (
        "4 of 32 samples could not be used (mine: broken picture: 4), more than data.max_bad_fraction=0.05" in message
    )


def test_a_batch_larger_than_the_data(capsys, good):
    message = refused(capsys, train(good, "train.global_batch=64"))
    assert "16 usable samples" in message
    assert "lower train.global_batch, or set data.allow_repeats=true" in message


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gradcache.image_chunk=0"], ["gradcache.image_chunk=0", "at least 1"]),
        (["model.vision=null", "model.text=null", "model.name=ViT-B-3"], ["'ViT-B-3'", "did you mean ViT-B-32"]),
        (["model.name=ViT-B-3"], ["'ViT-B-3'", "set one of them to null"]),
        (["model.vision.widht=3"], ["model.vision.widht", "did you mean model.vision.width?"]),
        (["device=cuda"], ["device=cuda", "use device=auto or cpu"]),
        (["resume=nowhere"], ["'nowhere'", "neither a checkpoint nor the folder of a run"]),
        (["eval.validation.urls=nowhere.tar"], ["'nowhere.tar'", "is not a file"]),
        (["eval.zeroshot.urls=nowhere.tar"], ["'nowhere.tar'", "is not a file"]),
        (["loss.precision=tf32"], ["precision 'tf32' exists only on CUDA", "choose 'fp32'"]),
        (["loss.precision=fp64", "loss.engine=triton"], ["'triton' has no precision fp64", "choose 'auto' or 'torch'"]),
        (["data.streams=3"], ["data.streams=3", "train.global_batch=8", "choose a divisor"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_settings_that_cannot_be(capsys, monkeypatch, good, words, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    message = refused(capsys, train(good, *words))
    for part in said:
        assert part in message


def test_without_any_source(capsys, tmp_path):
    path = str(tmp_path / "none.yaml")
    Path(path).write_text("model: {name: ViT-S-32-alt}\nrun: {dir: run}")
    assert "set data.sources.<name>.urls to your shards" in refused(capsys, ["train", path])


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_in_the_way_damaged_or_of_another_model(capsys, good):
    assert main(train(good, "checkpoint.every_steps=2")) == 0
    capsys.readouterr()
    message = refused(capsys, train(good, "resume=fresh"))
    assert "resume=fresh, but " in message
    assert "step-000000004 exists; set another run.dir to start anew, or resume=auto to go on" in message
    message = refused(capsys, train(good, "model.embed_dim=8"))
    assert "the checkpoint does not fit the model of this config" in message

    newest, older = (Path(f"run/checkpoints/step-00000000{step}/model.safetensors") for step in (4, 2))
    newest.write_bytes(newest.read_bytes()[:-1])
    before = Path("run/metrics.jsonl").read_text()
    assert main(train(good)) == 0
    told = capsys.readouterr().err
    assert "warning: passing over a damaged checkpoint" in told
    assert "resuming after step 2" in told
    for ours, theirs in zip(rows(), map(json.loads, before.splitlines()), strict=True):
        assert (ours["step"], ours["loss"]) == (theirs["step"], theirs["loss"])  # the same way once more

    for model in (newest, older):
        model.write_bytes(model.read_bytes()[:-1])
    message = refused(capsys, train(good))
    assert "verifies" in message
    assert message.count("model.safetensors is not what was written") == 2
    assert "restore one, or set another run.dir" in message
    shutil.rmtree("run/checkpoints")
    assert "tells of a checkpoint after step 2, but there is none" in refused(capsys, train(good))
    assert main(train(good, "resume=fresh")) == 0
