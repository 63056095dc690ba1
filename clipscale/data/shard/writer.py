"""Write WebDataset shards: plain tar files in which neighbouring members with one key form a sample.

    with ShardWriter("shards/train", samples_per_shard=10_000) as shards:
        shards.write("000000000", {"jpg": jpeg_bytes, "txt": "a red circle", "cls": 3})
        shards.write("000000001", {"png": png_bytes, "txt": "a blue star", "json": {"width": 32}})
    print(shards.paths)             # [shards/train-0000.tar]

Equal samples give equal bytes: times, owners and modes are fixed and a sample's members come in one order (image,
caption, label, metadata). webdataset's own TarWriter sorts members by name, which puts the label before the image and
the caption last; tarfile takes 4 times as long for a member (18 against 4.6 us), so headers are made here. A shard is
written to `<name>.partial`, synced and renamed: a file called `*.tar` is always whole.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipscale.files import sync_folder

EXTENSIONS = ("jpg", "png", "webp", "txt", "cls", "json")  # also the order of a sample's members

# USTAR (no extended headers) has 100 characters for a name, which leaves this for the key and its folders.
MAX_KEY_CHARACTERS = 100 - len(".json")

_BLOCK_BYTES = 512
_RECORD_BYTES = 20 * _BLOCK_BYTES  # archives end at a multiple of this, as tar's own do


def shard_sizes(total_samples: int, num_shards: int) -> list[int]:
    """Samples of each shard when `total_samples` fill exactly `num_shards` shards: sizes differ by at most one."""
    if not 1 <= num_shards <= total_samples:
        raise ValueError(f"{num_shards} shards for {total_samples} samples: need between 1 and the number of samples")
    small, larger = divmod(total_samples, num_shards)
    return [small + (shard < larger) for shard in range(num_shards)]


class ShardWriter:
    """Context manager that fills `<prefix>-0000.tar`, `<prefix>-0001.tar`, ... one after another.

    prefix: path of the shards without number and ending; its folder is created. Without a name (`folder/`): 0000.tar.
    samples_per_shard: a number (every shard but the last holds that many), or one number for each shard
        (see `shard_sizes`); then exactly that many samples must be written.
    digits: least width of the shard number.

    Leaving the block by an exception keeps the shards that were complete and removes the unfinished one.
    """

    def __init__(self, prefix: str | os.PathLike, *, samples_per_shard: int | Sequence[int], digits: int = 4):
        self.sizes = None if isinstance(samples_per_shard, int) else list(samples_per_shard)
        self.samples_per_shard = samples_per_shard
        if min(self.sizes or [1], default=1) < 1 or (self.sizes is None and samples_per_shard < 1):
            raise ValueError(f"samples_per_shard is {samples_per_shard}: a shard needs at least 1 sample")
        folder, self.name = os.path.split(os.fspath(prefix))
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.digits = digits
        self.paths: list[Path] = []  # complete shards
        self.samples = 0
        self._file = None
        self._room = 0  # samples the open shard still takes
        self._last_key = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is not None:
            self._abandon()
            return
        if self._file is not None:
            self._finish()
        if self.sizes is not None and self.samples != sum(self.sizes):
            raise ValueError(f"{self.samples} samples written to {self.name}, not the {sum(self.sizes)} promised")

    def write(self, key: str, sample: Mapping[str, bytes | str | int | dict]) -> None:
        """Append one sample. `sample` maps extensions to values: images as bytes, `txt` and `cls` as str, int or
        bytes, `json` as a dict or bytes."""
        check_key(key)
        if key == self._last_key:
            raise ValueError(f"key {key!r} was just written: a reader would take both for one sample")
        unknown = sorted(set(sample) - set(EXTENSIONS))
        if unknown:
            raise ValueError(f"sample {key}: unknown extension {unknown[0]!r}; known: {', '.join(EXTENSIONS)}")
        members = [(f"{key}.{extension}", encode(sample[extension])) for extension in EXTENSIONS if extension in sample]
        if self._file is None:
            self._start()
        for name, data in members:
            self._file.write(header(name, len(data)))
            self._file.write(data)
            self._file.write(bytes(-len(data) % _BLOCK_BYTES))
        self._last_key = key
        self.samples += 1
        self._room -= 1
        if self._room == 0:
            self._finish()

    def _start(self) -> None:
        number = len(self.paths)
        if self.sizes is not None and number == len(self.sizes):
            raise ValueError(f"more than the {sum(self.sizes)} samples promised for {self.name}")
        self._room = self.samples_per_shard if self.sizes is None else self.sizes[number]
        self._path = self.folder / shard_name(self.name, number, self.digits)
        self._partial = self._path.with_name(self._path.name + ".partial")
        self._file = open(self._partial, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by _finish or _abandon

    def _finish(self) -> None:
        self._file.write(bytes(2 * _BLOCK_BYTES))  # the end-of-archive marker
        self._file.write(bytes(-self._file.tell() % _RECORD_BYTES))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)
        sync_folder(self.folder)
        self.paths.append(self._path)
        self._file = None

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            self._file = None


def shard_name(name: str, number: int, digits: int) -> str:
    """train, 3, 4 -> train-0003.tar; without a name 0003.tar."""
    return f"{name}-{number:0{digits}d}.tar" if name else f"{number:0{digits}d}.tar"


def header(name: str, size: int) -> bytes:
    """A USTAR header with mode 644 and nothing that varies between runs: time 0, owner 0, no names, no devices.

    Format: https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
    """
    assert len(name) <= 100, name
    assert size < 8**11, size
    fields = (
        name.encode("ascii").ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"0" * 11
        + b"\0",
        b"0".ljust(101, b"\0") + b"ustar\00000".ljust(_BLOCK_BYTES - 257, b"\0"),
    )
    checksum = sum(fields[0]) + sum(fields[1]) + 8 * ord(" ")
    return fields[0] + b"%06o\0 " % checksum + fields[1]


def check_key(key: str) -> None:
    """A key must survive webdataset's grouping (everything up to the first dot of the file name) and USTAR's limits."""
    name = key.rpartition("/")[2]
    if not name or "." in name or not key.isascii() or len(key) > MAX_KEY_CHARACTERS:
        raise ValueError(
            f"key {key!r}: needs 1 to {MAX_KEY_CHARACTERS} ASCII characters and no dot in its last part "
            "(readers split key and extension at the first dot)"
        )


def encode(value: bytes | str | int | dict) -> bytes:
    """The bytes of one member: bytes as they are, numbers in decimal, text in UTF-8, dicts as one line of JSON."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return str(value).encode("utf-8")
