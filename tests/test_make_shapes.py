"""clipscale/data/shapes/, data/shard/writer.py and data_tools/make_shapes.py."""

import errno
import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from tools import load_tool

from clipscale.data.shapes import make as shapes
from clipscale.data.shapes import pictures as shape_pictures
from clipscale.data.shapes.make import make_shapes
from clipscale.data.shapes.pictures import CLASS_NAMES, CLASSES, COLOURS, HELD_OUT, SEEN, SHAPES, draw_attributes
from clipscale.data.shard.writer import ShardWriter, shard_sizes
from clipscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"train_samples": 300, "validation_samples": 40, "test_samples": 128, "shards": 3}


def read_shards(folder: Path, split: str) -> list[dict[str, bytes]]:
    """Samples as webdataset's own reader groups them, undecoded."""
    samples = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        samples += list(wds.WebDataset(str(path), shardshuffle=False))
    return samples


def texts(samples: list[dict]) -> list[str]:
    return [sample["txt"].decode("utf-8") for sample in samples]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return make_shapes(tmp_path_factory.mktemp("shapes") / "set", **SMALL)


# --- the set on disk --------------------------------------------------------------------------------------------------


def test_files_counts_and_members(small):
    assert sorted(path.name for path in small.iterdir()) == [
        "classnames.txt",
        "shapes.json",
        "templates.txt",
        "test-0000.tar",
        "train-0000.tar",
        "train-0001.tar",
        "train-0002.tar",
        "unseen.txt",
        "validation-0000.tar",
    ]
    train, validation, test = (read_shards(small, split) for split in shape_pictures.SPLITS)
    assert [len(train), len(validation), len(test)] == [300, 40, 128]
    assert [sample["__key__"] for sample in train] == [f"{index:09d}" for index in range(300)]
    for sample in train + validation:
        assert {"jpg", "txt"} == {name for name in sample if not name.startswith("__")}
    for index, sample in enumerate(test):
        picture = Image.open(io.BytesIO(sample["jpg"]))
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (32, 32), "RGB")
        assert sample["cls"] == str(index % 64).encode()
    with tarfile.open(small / "test-0000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:3]] == ["000000000.jpg", "000000000.txt", "000000000.cls"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_class_files(small):
    names = (small / "classnames.txt").read_text().splitlines()
    assert names == list(CLASS_NAMES)
    assert len(set(names)) == 64
    unseen = (small / "unseen.txt").read_text().splitlines()
    assert unseen == [names[label] for label in HELD_OUT]
    assert len(unseen) == 8
    seen = [name.split() for name in names if name not in unseen]
    assert {colour for colour, _ in seen} == set(COLOURS)
    assert {shape for _, shape in seen} == set(SHAPES)
    templates = (small / "templates.txt").read_text().splitlines()
    assert len(templates) >= 3
    assert all(template.count("{}") == 1 for template in templates)


def test_classes_are_balanced_in_test_and_held_out_in_training(small):
    labels = Counter(int(sample["cls"]) for sample in read_shards(small, "test"))
    assert labels == dict.fromkeys(range(64), 2)
    # Many more than on disk, without pictures: every seen class occurs, no unseen one does.
    for split in ("train", "validation"):
        drawn = Counter(draw_attributes(0, split, 0, 20_000).label.tolist())
        assert set(drawn) == set(SEEN)
        assert max(drawn.values()) < 1.5 * min(drawn.values())
    for text in texts(read_shards(small, "train") + read_shards(small, "validation")):
        assert not any(set(CLASS_NAMES[label].split()) <= words(text) for label in HELD_OUT), text


def words(text: str) -> set[str]:
    return set(text.replace(",", " ").split())


def test_equal_arguments_give_equal_bytes_in_another_process(small, tmp_path):
    code = f"from clipscale.data.shapes.make import make_shapes; make_shapes({str(tmp_path / 'again')!r}, **{SMALL!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert hashes(tmp_path / "again") == hashes(small)


def test_pictures_do_not_depend_on_the_batch_and_differ_by_seed_and_split():
    whole = shape_pictures.render(draw_attributes(3, "train", 0, 50), 32)
    pieces = [shape_pictures.render(draw_attributes(3, "train", first, 7), 32) for first in range(0, 49, 7)]
    np.testing.assert_array_equal(whole[:49], np.concatenate(pieces))
    assert (
        shape_pictures.captions(draw_attributes(3, "train", 20, 2))
        == shape_pictures.captions(draw_attributes(3, "train", 0, 50))[20:22]
    )
    for other in (draw_attributes(4, "train", 0, 50), draw_attributes(3, "validation", 0, 50)):
        assert (shape_pictures.render(other, 32) != whole).any(axis=(1, 2, 3)).all()


def test_pixels_and_captions_are_those_of_version_1():
    """Found equal under numpy 1.26, 2.4 and 2.5, with and without AVX. A change here needs another shapes.VERSION."""
    assert shapes.VERSION == 1
    digest = hashlib.sha256()
    for split in ("train", "test"):
        attributes = draw_attributes(11, split, 0, 2000)
        digest.update(shape_pictures.render(attributes, 32).tobytes())
        digest.update("\n".join(shape_pictures.captions(attributes)).encode())
    assert digest.hexdigest().startswith("fab91eb6103f12be")


def test_png(tmp_path):
    arguments = {"train_samples": 4, "validation_samples": 2, "test_samples": 2, "shards": 1, "image_size": 40}
    folder = make_shapes(tmp_path / "png", image_format="png", seed=5, **arguments)
    pixels = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in read_shards(folder, "train")]
    np.testing.assert_array_equal(np.stack(pixels), shape_pictures.render(draw_attributes(5, "train", 0, 4), 40))


def test_shuffled_captions_change_places_and_nothing_else(small, tmp_path):
    folder = make_shapes(tmp_path / "control", shuffle_captions=True, **SMALL)
    straight, shuffled = read_shards(small, "train"), read_shards(folder, "train")
    assert [sample["jpg"] for sample in straight] == [sample["jpg"] for sample in shuffled]
    assert Counter(texts(straight)) == Counter(texts(shuffled))
    label = draw_attributes(0, "train", 0, 300).label
    right = [set(CLASS_NAMES[k].split()) <= words(text) for k, text in zip(label, texts(shuffled), strict=True)]
    assert np.mean(right) < 4 / len(SEEN)
    for split in ("validation", "test"):
        assert hashes(folder)[f"{split}-0000.tar"] == hashes(small)[f"{split}-0000.tar"]


# --- building: again, interrupted, side by side -----------------------------------------------------------------------


def test_a_finished_set_is_left_alone(small):
    before = {path.name: path.stat().st_mtime_ns for path in small.iterdir()}
    calls = []
    assert make_shapes(small, **SMALL, progress=lambda done, total: calls.append(done)) == small
    assert calls == []
    assert {path.name: path.stat().st_mtime_ns for path in small.iterdir()} == before


def test_other_arguments_are_refused_by_name(small):
    with pytest.raises(UserError, match=r"seed 0 there, 1 asked for.*another folder"):
        make_shapes(small, **SMALL, seed=1)
    with pytest.raises(UserError, match="train_samples 300 there, 301 asked for"):
        make_shapes(small, **{**SMALL, "train_samples": 301})


@pytest.mark.parametrize(
    ("name", "value"),
    [("train_samples", 0), ("shards", 301), ("image_size", 8), ("seed", -1), ("image_format", "gif"), ("shards", 0)],
)
def test_bad_arguments_name_themselves(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is '?{value}"):
        make_shapes(tmp_path / "set", **{**SMALL, name: value})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_nothing_and_is_rebuilt(small, tmp_path):
    class Stop(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 200:
            raise Stop

    with pytest.raises(Stop):
        make_shapes(tmp_path / "set", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []

    # A half-written folder, as a copy that was cut short leaves it: other bytes, a shard too many, no shapes.json.
    (tmp_path / "set").mkdir()
    for name in ("train-0000.tar", "train-0009.tar", "train-0009.tar.index", "classnames.txt"):
        (tmp_path / "set" / name).write_bytes(b"half")
    calls = []
    make_shapes(tmp_path / "set", **SMALL, progress=lambda done, total: calls.append((done, total)))
    assert hashes(tmp_path / "set") == hashes(small)
    assert calls[-1] == (468, 468)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_what_a_killed_builder_left_is_removed_at_once_and_a_living_one_is_not(tmp_path):
    """By its lock, whatever the clocks say."""
    dead, older, living = (tmp_path / f".set.building-{name}" for name in ("dead", "older", "living"))
    (dead / "set").mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "set" / "train-0000.tar").write_bytes(b"half")
    older.mkdir()  # of a version without locks
    (older / "train-0000.tar").write_bytes(b"half")
    living.mkdir()
    os.utime(living, (0, 0))
    with open(living / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make_shapes(tmp_path / "set", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "set"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """The set is built; what may be another's is left alone."""

    def refuse(*_) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (tmp_path / ".set.building-other").mkdir()
    monkeypatch.setattr(fcntl, "flock", refuse)
    make_shapes(tmp_path / "set", **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".set.building-other", "set"]


def test_foreign_files_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex.*new or empty folder"):
        make_shapes(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="is a file"):
        make_shapes(tmp_path / "thesis.tex", **SMALL)


def test_several_processes_at_once(small, tmp_path):
    code = "import sys; from clipscale.data.shapes.make import make_shapes; sys.stdin.read(1); "
    code += f"make_shapes({str(tmp_path / 'set')!r}, **{SMALL!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT) for _ in range(3)]
    for process in processes:  # all have been started: let them go together
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert hashes(tmp_path / "set") == hashes(small)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- pictures and captions --------------------------------------------------------------------------------------------


def test_the_shape_has_the_named_colour_and_stands_out():
    attributes = draw_attributes(1, "test", 0, 1280)
    pixels, inside = (
        shape_pictures.render(attributes, 32).astype(np.float64),
        shape_pictures.coverage(attributes, 32) == 1,
    )
    outside = shape_pictures.coverage(attributes, 32) == 0
    assert (inside.sum(axis=(1, 2)) >= 8).all()  # even small crescents have a body
    mean = (pixels * inside[..., None]).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))[:, None]
    around = (pixels * outside[..., None]).sum(axis=(1, 2)) / outside.sum(axis=(1, 2))[:, None]
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    nearest = np.linalg.norm(mean[:, None] - palette, axis=-1).argmin(axis=1)
    np.testing.assert_array_equal(nearest, attributes.label // len(SHAPES))
    assert np.linalg.norm(mean - around, axis=-1).min() > 50
    assert len({picture.tobytes() for picture in pixels.astype(np.uint8)}) == 1280


def test_shapes_differ_and_are_never_cut():
    inside = shape_pictures.coverage(draw_attributes(2, "test", 0, 1280), 128)
    border = np.concatenate([inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]], axis=1)
    assert border.max() == 0
    # Silhouettes brought to one place and scale: two of a kind overlap more than two of different kinds.
    upright = {
        name: shape_pictures._DISTANCES[name](*np.meshgrid(np.linspace(-1.1, 1.1, 64), np.linspace(1.1, -1.1, 64))) < 0
        for name in SHAPES
    }
    for first in SHAPES:
        for second in SHAPES:
            union, common = upright[first] | upright[second], upright[first] & upright[second]
            assert first == second or common.sum() / union.sum() < 0.85, (first, second)


def test_positions_and_sizes_are_where_the_words_say():
    attributes = draw_attributes(6, "train", 0, 2000)
    inside = shape_pictures.coverage(attributes, 64) > 0.5
    axis = (np.arange(64) + 0.5) / 64

    def middle(occupied: np.ndarray) -> np.ndarray:
        """Halfway between the first and the last occupied row or column, [n]."""
        return np.array([(axis[line].min() + axis[line].max()) / 2 for line in occupied])

    column, row = middle(inside.any(axis=1)), middle(inside.any(axis=2))
    for number, ((right, down), names) in enumerate(shape_pictures.POSITIONS):
        chosen = attributes.position == number
        for direction, centre, low, high in ((right, column, "left", "right"), (down, row, "top", "bottom")):
            moved = centre[chosen] - 0.5
            if direction == 0:
                assert (np.abs(moved) < 0.06).all(), names
            else:
                assert (moved * direction > 0.07).all(), names
                assert any({-1: low, 1: high}[direction] in name for name in names)
    radius = [attributes.radius[attributes.size == size] for size in range(3)]
    assert radius[0].max() < radius[1].min() < radius[1].max() < radius[2].min()


def test_captions_name_colour_and_shape_in_varied_wording():
    attributes = draw_attributes(0, "train", 0, 4000)
    own = shape_pictures.captions(attributes)
    forms = set()
    for label, text in zip(attributes.label, own, strict=True):
        colour, shape = CLASSES[label]
        assert words(text) & set(COLOURS) == {colour}, text
        assert words(text) & set(SHAPES) == {shape}, text
        assert (f"an {colour}" in text) <= (colour == "orange"), text
        assert f"a {colour}" not in text or colour != "orange", text
        forms.add(text.replace(colour, "C").replace(shape, "S").replace("an C", "a C"))
    assert len(shape_pictures.PLAIN_CAPTIONS + shape_pictures.DETAILED_CAPTIONS) >= 12
    assert len(forms) > 300
    assert len(set(own)) > 1500
    assert (
        0.1 < np.mean([text.endswith(("paper", "ground", "gray", "dark", "sand")) for text in own]) < 0.3
    )  # half tell no detail


# --- the writer -------------------------------------------------------------------------------------------------------


def test_shard_writer_splits_names_and_orders(tmp_path):
    with ShardWriter(tmp_path / "new" / "x", samples_per_shard=2) as writer:
        for index in range(5):
            writer.write(f"{index:09d}", {"json": {"b": 1, "a": "ü"}, "cls": 7, "txt": "ü", "webp": b"w"})
    assert [path.name for path in writer.paths] == ["x-0000.tar", "x-0001.tar", "x-0002.tar"]
    assert [len(list(wds.WebDataset(str(path), shardshuffle=False))) for path in writer.paths] == [2, 2, 1]
    sample = read_shards(tmp_path / "new", "x")[4]
    assert (sample["webp"], sample["txt"], sample["cls"]) == (b"w", "ü".encode(), b"7")
    assert json.loads(sample["json"]) == {"a": "ü", "b": 1}
    with tarfile.open(writer.paths[0]) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["webp", "txt", "cls", "json"] * 2
    assert shard_sizes(10, 4) == [3, 3, 2, 2]


def test_shard_writer_refuses_what_would_mislead_readers(tmp_path):
    with pytest.raises(ValueError, match="4 shards for 3 samples"):
        shard_sizes(3, 4)
    with pytest.raises(ValueError, match="at least 1 sample"):
        ShardWriter(tmp_path / "x", samples_per_shard=0)
    for key in ("", "a.b", "a/", "ü", "k" * 96):
        with pytest.raises(ValueError, match="key"), ShardWriter(tmp_path / "x", samples_per_shard=9) as writer:
            writer.write(key, {"txt": "t"})
    with ShardWriter(tmp_path / "twice" / "x", samples_per_shard=9) as writer:
        writer.write("a", {"txt": "t"})
        with pytest.raises(ValueError, match="just written"):
            writer.write("a", {"jpg": b"j"})
    with pytest.raises(ValueError, match="'jpeg'"), ShardWriter(tmp_path / "x", samples_per_shard=9) as writer:
        writer.write("a", {"jpeg": b"j"})
    assert [path.name for path in tmp_path.iterdir()] == ["twice"]  # the unfinished shard went with the exception
    with (
        pytest.raises(ValueError, match="not the 3 promised"),
        ShardWriter(tmp_path / "x", samples_per_shard=[2, 1]) as w,
    ):
        w.write("a", {"txt": "t"})


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path, capsys):
    tool = load_tool("make_shapes")
    arguments = [
        str(tmp_path / "set"),
        "--train-samples=64",
        "--validation-samples=8",
        "--test-samples=64",
        "--shards=2",
    ]
    assert tool.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "136 pictures" in out
    assert "64 classes, 8 of them never in training; 4 shards" in out
    assert tool.main(arguments) == 0
    assert "already complete" in capsys.readouterr().out
    assert tool.main([*arguments, "--seed", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert error.startswith("make_shapes.py: error:")
    assert "seed 0 there, 1 asked for" in error


def test_command_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        load_tool("make_shapes").main(["--help"])
    assert stop.value.code == 0
    assert "python data_tools/make_shapes.py shapes" in capsys.readouterr().out
