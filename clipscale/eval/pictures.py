"""Pictures for evaluation, in a fixed order, centre-cropped: shards with captions or labels, or an ImageFolder tree.

pictures = ShardPictures(source)                       # or FolderPictures("imagenet/val")
for images, notes, valid in batches(pictures, range(0, 1000), batch=256, side=224, threads=4, decoding=...):
    ...                                                 # uint8 [M, 3, S, S], list of M bytes, bool [M]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from clipscale.data.bad import BadSample
from clipscale.data.pixels.decode import Decoding, load_picture
from clipscale.data.shard.judge import IMAGE_SUFFIXES
from clipscale.data.source import Source
from clipscale.errors import require
from clipscale.eval.classes import class_folders


class EvalPictures(Protocol):
    """Picture i and the bytes beside it: a caption, or a label's decimal digits."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, bytes]: ...


class ShardPictures:
    """The usable samples of a source, in the order of its shards."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._cum = np.concatenate([[0], np.cumsum(source.counts)])

    def __len__(self) -> int:
        return self.source.samples

    def read(self, i: int) -> tuple[bytes, bytes]:
        shard = int(np.searchsorted(self._cum, i, side="right")) - 1
        sample = self.source.read(shard, i - int(self._cum[shard]))
        return sample.image, sample.note

    def notes(self) -> Iterator[bytes]:
        """The captions or labels alone, of those samples that can be read."""
        for shard, count in enumerate(self.source.counts.tolist()):
            for index in range(count):
                with suppress(OSError):
                    yield self.source.note(shard, index)


class FolderPictures:
    """An ImageFolder tree: one folder a class; labels count the folders in the order of their names."""

    def __init__(self, root: str) -> None:
        self.folders = class_folders(root)
        self._files = [
            (path, label)
            for label, name in enumerate(self.folders)
            for path in sorted(Path(root, name).rglob("*"))
            if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES
        ]
        require(bool(self._files), f"eval.zeroshot.folder {root!r} holds no {'/'.join(IMAGE_SUFFIXES)} in its folders")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, i: int) -> tuple[bytes, bytes]:
        path, label = self._files[i]
        return path.read_bytes(), str(label).encode()


def batches(
    pictures: EvalPictures, indices: Sequence[int], *, batch: int, side: int, threads: int, decoding: Decoding
) -> Iterator[tuple[torch.Tensor, list[bytes], torch.Tensor]]:
    """(images uint8 [M, 3, side, side], notes, valid bool [M]) for `batch` indices at a time; M <= batch.

    A picture that cannot be decoded is zeros and not valid: the caller counts it.
    """

    def load(i: int) -> tuple[torch.Tensor | None, bytes]:
        try:
            image, note = pictures.read(i)
            return load_picture(image, None, decoding, side), note
        except (BadSample, OSError):
            return None, b""

    with ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(indices), batch):
            loaded = list(pool.map(load, indices[start : start + batch]))
            images = torch.zeros(len(loaded), 3, side, side, dtype=torch.uint8)
            for slot, (image, _) in enumerate(loaded):
                if image is not None:
                    images[slot] = image
            valid = torch.tensor([image is not None for image, _ in loaded])
            yield images, [note for _, note in loaded], valid
