"""The shapes set on disk: drawn pictures of one coloured shape each, with captions, as WebDataset shards.

    make_shapes("shapes", train_samples=20_000)      # about five seconds; at once when it is already there

Equal arguments give equal bytes on every machine (shape_pictures.py says why), and a folder is either whole or rebuilt.
"""

import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from clipscale.data.shapes.pictures import (
    CLASS_NAMES,
    HELD_OUT,
    SPLITS,
    ZERO_SHOT_TEMPLATES,
    captions,
    draw_attributes,
    render,
    shuffled_captions,
)
from clipscale.data.shard.writer import ShardWriter, shard_sizes
from clipscale.errors import UserError, reason
from clipscale.files import lock_file, write_file

VERSION = 1  # raise it with every change that alters pixels, captions or files: older folders are then refused
_PIXELS_PER_BATCH = 2**17  # 128 pictures of side 32: the working set stays in the cache


def make_shapes(
    folder: str | os.PathLike,
    *,
    train_samples: int = 20_000,
    validation_samples: int = 1_024,
    test_samples: int = 2_560,
    image_size: int = 32,
    shards: int = 8,
    seed: int = 0,
    shuffle_captions: bool = False,
    image_format: str = "jpg",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Build the set in `folder`, or return at once when it is there already. Returns the folder.

    Writes `shards` files train-NNNN.tar, validation-0000.tar (other pictures of the training classes), test-NNNN.tar
    (all classes, with `.cls`), classnames.txt (line number = label, from 0), unseen.txt (classes never in training),
    templates.txt (zero-shot templates), and last shapes.json (the arguments).

    image_format: "jpg" (quality 95, no chroma subsampling) or "png".
    shuffle_captions: the control experiment: training captions change places, so that nothing can be learned.
    progress: called as progress(samples written, samples in all).

    The set is built in a folder beside and moved into place, so several processes may call this at once and an
    interrupted build leaves nothing that looks finished.

    Raises:
        UserError: a bad argument, a folder that holds a set made with other arguments or files that are not of such a
            set, or that cannot be written.
    """
    arguments = {
        "version": VERSION,
        "train_samples": train_samples,
        "validation_samples": validation_samples,
        "test_samples": test_samples,
        "image_size": image_size,
        "shards": shards,
        "seed": seed,
        "shuffle_captions": shuffle_captions,
        "image_format": image_format,
    }
    _check_arguments(arguments)
    folder = Path(os.path.abspath(folder))
    if _is_complete(folder, arguments):
        return folder
    _check_foreign_files(folder)
    try:
        _build(folder, arguments, progress)
    except OSError as error:
        raise UserError(f"the shapes set cannot be written to {folder}: {reason(error)}") from error
    return folder


def _build(folder: Path, arguments: dict, progress: Callable[[int, int], None] | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _building_place(folder) as place:
        build = place / "set"
        build.mkdir()
        _write_set(build, arguments, progress)
        _publish(build, folder, arguments)


@contextmanager
def _building_place(folder: Path) -> Iterator[Path]:
    """A locked folder beside `folder`, removed at the end; those of builders that were killed are removed first."""
    for place in folder.parent.glob(f".{folder.name}.building-*"):
        lock = _try_lock(place)
        if lock is not None:  # its builder is dead
            shutil.rmtree(place, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:  # another builder may take a folder that is not locked yet for a leftover
        place = folder.with_name(f".{folder.name}.building-{uuid.uuid4().hex}")
        place.mkdir()
        lock = _try_lock(place, new=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)


def _try_lock(place: Path, *, new: bool = False) -> int | None:
    """Hold a builder's folder while the descriptor is open; None: its builder holds it, or it is gone.

    new: one's own, which is one's own too on a file system without locks, where nobody else's is ever touched.
    """
    try:
        lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    except OSError:  # another user's
        if new:
            raise
        return None
    try:
        held = lock_file(lock, place / "lock")
    except OSError:
        held = new
    if held:
        return lock
    os.close(lock)
    return None


def _check_arguments(arguments: dict) -> None:
    for name in ("train_samples", "validation_samples", "test_samples"):
        if arguments[name] < 1:
            raise UserError(f"{name} is {arguments[name]}: must be at least 1")
    if not 1 <= arguments["shards"] <= arguments["train_samples"]:
        raise UserError(f"shards is {arguments['shards']}: must be 1 to train_samples ({arguments['train_samples']})")
    if not 16 <= arguments["image_size"] <= 4096:
        raise UserError(f"image_size is {arguments['image_size']}: must be 16 to 4096 pixels")
    if not 0 <= arguments["seed"] < 2**64:
        raise UserError(f"seed is {arguments['seed']}: must be 0 to 2^64 - 1")
    if arguments["image_format"] not in ("jpg", "png"):
        raise UserError(f"image_format is {arguments['image_format']!r}: must be 'jpg' or 'png'")


def _is_complete(folder: Path, arguments: dict) -> bool:
    """True: the folder holds this very set. False: it holds none. UserError: it holds another."""
    try:
        found = json.loads((folder / "shapes.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        found = {}
    if found == arguments:
        return True
    found = found if isinstance(found, dict) else {}
    names = [name for name in {**arguments, **found} if found.get(name) != arguments.get(name)]
    differences = ", ".join(f"{name} {found.get(name)} there, {arguments.get(name)} asked for" for name in names)
    raise UserError(
        f"{folder} holds a shapes set made with other arguments ({differences}): "
        "use another folder, ask for the same, or delete this folder"
    )


_OWN_FILE = re.compile(r"(train|validation|test)-\d+\.tar(\..+)?|(classnames|unseen|templates)\.txt|shapes\.json.*")


def _check_foreign_files(folder: Path) -> None:
    """What is to be rebuilt may hold files of an earlier attempt and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: the shapes set needs a folder")
    foreign = sorted(p.name for p in folder.iterdir() if not _OWN_FILE.fullmatch(p.name)) if folder.is_dir() else []
    if foreign:
        raise UserError(f"{folder} holds {foreign[0]!r}, which is not of a shapes set: name a new or empty folder")


def _write_set(build: Path, arguments: dict, progress: Callable[[int, int], None] | None) -> None:
    seed, samples = arguments["seed"], {split: arguments[f"{split}_samples"] for split in SPLITS}
    sizes = {"train": shard_sizes(samples["train"], arguments["shards"]), "validation": [samples["validation"]]}
    texts = shuffled_captions(seed, samples["train"]) if arguments["shuffle_captions"] else None
    done = 0
    for split in SPLITS:
        with ShardWriter(build / split, samples_per_shard=sizes.get(split, 10_000)) as writer:
            batch = max(1, _PIXELS_PER_BATCH // arguments["image_size"] ** 2)
            for first in range(0, samples[split], batch):
                attributes = draw_attributes(seed, split, first, min(batch, samples[split] - first))
                pixels = render(attributes, arguments["image_size"])
                own = captions(attributes) if texts is None or split != "train" else texts[first : first + batch]
                for row, text in enumerate(own):
                    sample = {arguments["image_format"]: _encode(pixels[row], arguments["image_format"]), "txt": text}
                    if split == "test":
                        sample["cls"] = int(attributes.label[row])
                    writer.write(f"{first + row:09d}", sample)
                done += len(own)
                if progress is not None:
                    progress(done, sum(samples.values()))
    write_file(build / "classnames.txt", "".join(f"{name}\n" for name in CLASS_NAMES))
    write_file(build / "unseen.txt", "".join(f"{CLASS_NAMES[label]}\n" for label in HELD_OUT))
    write_file(build / "templates.txt", "".join(f"{template}\n" for template in ZERO_SHOT_TEMPLATES))
    write_file(build / "shapes.json", json.dumps(arguments, indent=2) + "\n")


def _encode(pixels: np.ndarray, image_format: str) -> bytes:
    if image_format == "jpg":
        return simplejpeg.encode_jpeg(pixels, quality=95, colorspace="RGB", colorsubsampling="444")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _publish(build: Path, folder: Path, arguments: dict) -> None:
    """Move a finished build into place. Whoever comes second finds an equal set and drops its own."""
    try:
        os.rename(build, folder)  # also replaces an empty folder
        return
    except OSError:
        if not folder.is_dir():
            raise
    if _is_complete(folder, arguments):
        return
    # A half-written folder. Equal arguments give equal files, so two processes may do this side by side.
    _check_foreign_files(folder)
    new = sorted(path.name for path in build.iterdir())
    for path in folder.iterdir():
        if path.name not in new:
            path.unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == "shapes.json"):
        os.replace(build / name, folder / name)
