"""Small shards for the tests, good and bad."""

import io
import tarfile
from collections.abc import Container
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int, format: str = "JPEG") -> bytes:
    """A smooth coloured picture, as the bytes of a file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def write_shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar of (key, {suffix: bytes}), its members in the order given."""
    return write_tar(path, [(f"{key}.{suffix}", data) for key, sample in samples for suffix, data in sample.items()])


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_pairs(
    folder: Path, shards: int, per_shard: int, size: int = 32, seed: int = 0, broken: Container[int] = ()
) -> str:
    """Shards of (JPEG, caption) pairs; returns their URL pattern. `broken`: numbers of samples, counted over all
    shards, whose JPEG is cut short."""
    for shard in range(shards):
        samples = []
        for i in range(per_shard):
            number = shard * per_shard + i
            jpeg = picture(seed + number, size, size)
            jpeg = jpeg[: len(jpeg) // 2] if number in broken else jpeg
            samples.append((f"{number:06d}", {"jpg": jpeg, "txt": f"number {i} of shard {shard}".encode()}))
        write_shard(Path(folder) / f"{shard:04d}.tar", samples)
    return f"{folder}/{{0000..{shards - 1:04d}}}.tar"
