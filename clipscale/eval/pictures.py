"""Pictures for evaluation, in a fixed order: shards with captions or labels, or an ImageFolder tree.

pictures = ShardPictures(source)                       # or FolderPictures("imagenet/val")
for images, notes, valid in batches(pictures, range(0, 1000), batch=256, view=View.of(config, towers), threads=4):
    ...                                                 # uint8 [M, 3, S, S], list of M bytes, bool [M]
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from clipscale.data.bad import BadSample
from clipscale.data.source import Source
from clipscale.errors import require
from clipscale.eval.classes import KEY, hidden
from clipscale.eval.view import View

FOLDER_SUFFIXES = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")  # torchvision's IMG_EXTENSIONS


class EvalPictures(Protocol):
    """Picture i and the bytes beside it: a caption, or a label's decimal digits."""

    passed: Counter[str]  # what was found beside the pictures and is none of them, by kind

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, bytes]: ...


class ShardPictures:
    """The usable samples of a source, in the order of its shards."""

    def __init__(self, source: Source) -> None:
        self.source, self.passed = source, source.refused()
        self._cum = np.concatenate([[0], np.cumsum(source.counts)])

    def __len__(self) -> int:
        return self.source.samples

    def read(self, i: int) -> tuple[bytes, bytes]:
        shard = int(np.searchsorted(self._cum, i, side="right")) - 1
        sample = self.source.read(shard, i - int(self._cum[shard]))
        if self.source.need == "pairs":
            return sample.image, self.source.caption(sample.note, which=sample.which).encode()
        return sample.image, sample.note

    def notes(self) -> Iterator[bytes]:
        """The labels alone, or what captions are picked from, of those samples that can be read."""
        for shard, count in enumerate(self.source.counts.tolist()):
            for index in range(count):
                with suppress(OSError):
                    yield self.source.note(shard, index)


class FolderPictures:
    """An ImageFolder tree: one folder a class, pictures at any depth in it, of the formats that ImageFolder takes.

    Args:
        labels: class folder -> label.
        key: where the settings stand, for messages.
    """

    def __init__(self, root: str, labels: dict[str, int], key: str = KEY) -> None:
        self.passed: Counter[str] = Counter(
            "hidden" if hidden(entry.name) else "beside the class folders"
            for entry in os.scandir(root)
            if entry.name not in labels
        )
        self.empty: list[str] = []  # folders without a picture
        self._files: list[tuple[str, int]] = []
        for folder, label in labels.items():
            found = self._pictures(os.path.join(root, folder))
            self._files += [(path, label) for path in found]
            if not found:
                self.empty.append(folder)
        require(bool(self._files), f"{key}.folder {root!r} holds no {'/'.join(FOLDER_SUFFIXES)} in its folders")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, i: int) -> tuple[bytes, bytes]:
        path, label = self._files[i]
        return Path(path).read_bytes(), str(label).encode()

    def _pictures(self, folder: str) -> list[str]:
        found = []
        for place, folders, files in os.walk(folder, followlinks=True):
            self.passed.update("hidden" for name in folders if hidden(name))
            folders[:] = [name for name in folders if not hidden(name)]
            for name in files:
                suffix = os.path.splitext(name)[1].lower()
                if hidden(name):
                    self.passed["hidden"] += 1
                elif suffix.lstrip(".") in FOLDER_SUFFIXES:
                    found.append(os.path.join(place, name))
                else:
                    self.passed[suffix or "no suffix"] += 1
        return sorted(found)


def batches(
    pictures: EvalPictures, indices: Sequence[int], *, batch: int, view: View, threads: int
) -> Iterator[tuple[torch.Tensor, list[bytes], torch.Tensor]]:
    """(images uint8 [M, 3, S, S], notes, valid bool [M]) for `batch` indices at a time; M <= batch.

    The next ones are read and decoded while the caller is busy with these. A picture that cannot be decoded is zeros
    and not valid: the caller counts it.
    """

    def load(i: int) -> tuple[torch.Tensor | None, bytes]:
        try:
            image, note = pictures.read(i)
            return view(image), note
        except (BadSample, OSError):
            return None, b""

    with ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead = pool.map(load, indices[:batch])
        for start in range(0, len(indices), batch):
            loaded = list(ahead)
            ahead = pool.map(load, indices[start + batch : start + 2 * batch])
            images = torch.zeros(len(loaded), 3, view.side, view.side, dtype=torch.uint8)
            for slot, (image, _) in enumerate(loaded):
                if image is not None:
                    images[slot] = image
            valid = torch.tensor([image is not None for image, _ in loaded])
            yield images, [note for _, note in loaded], valid
