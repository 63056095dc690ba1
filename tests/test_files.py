"""clipscale/files.py: files are whole or not there; rows; hashes."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import zlib

import pytest

from clipscale import files
from clipscale.errors import UserError
from clipscale.files import append_rows, cache_folder, hash_file, keep_rows, synced_file, whole_file, write_file


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """What was synced so far: "file" or "folder"."""
    done, sync = [], os.fsync

    def fsync(file: int) -> None:
        if threading.current_thread() is threading.main_thread():  # a download of an earlier test may end meanwhile
            done.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        sync(file)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return done


def test_a_file_has_its_name_once_it_is_whole(tmp_path, synced):
    path = tmp_path / "a.txt"
    with whole_file(path) as file:
        file.write("ä")
        assert not path.exists()
    assert path.read_bytes() == "ä".encode()
    assert synced == ["file", "folder"]
    with whole_file(path, "wb", sync=False) as file:
        file.write(b"\x00")
    assert path.read_bytes() == b"\x00"
    assert len(synced) == 2
    assert [*tmp_path.iterdir()] == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def fail() -> None:
        with whole_file(path) as file:
            file.write("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_several_may_write_one_file_at_once(tmp_path):
    path, begun = tmp_path / "a.txt", threading.Barrier(4)

    def write(text: str) -> None:
        with whole_file(path) as file:
            begun.wait(10)
            file.write(text)

    threads = [threading.Thread(target=write, args=(f"{i}" * 100_000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in {f"{i}" * 100_000 for i in range(4)}
    assert [*tmp_path.iterdir()] == [path]


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "a.txt", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_synced_file_is_new(tmp_path, synced):
    with synced_file(tmp_path / "a", "wb") as file:
        file.write(b"1")
    assert synced == ["file"]
    with pytest.raises(FileExistsError), synced_file(tmp_path / "a", "wb"):
        pass


def test_a_row_that_a_crash_cut_short_is_dropped(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    append_rows(path, [{"step": 1}, {"step": 2}])
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    keep_rows(path, lambda row: row["step"] != 1)
    assert path.read_text() == '{"step": 2}\n'
    keep_rows(tmp_path / "none.jsonl", lambda row: True)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("size", [0, 5, (1 << 20) + 7])
def test_hashes(tmp_path, size):
    path, data = tmp_path / "a", os.urandom(size)
    path.write_bytes(data)
    full = {"bytes": size, "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert hash_file(path, crc32=True, sha256=True) == full
    assert hash_file(path, sha256=True) == full | {"crc32": None}
    file = os.open(path, os.O_RDONLY)
    try:
        os.lseek(file, size // 2, os.SEEK_SET)
        assert hash_file(file, crc32=True) == full | {"sha256": None}
        assert os.lseek(file, 0, os.SEEK_CUR) == size // 2
    finally:
        os.close(file)


def test_without_a_home_folder_it_says_what_to_set(monkeypatch):
    """HOME is not set, and the user has no entry in the system's list: a container with a bare user number."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with pytest.raises(UserError, match=r"HOME is not set, .*; set data\.cache_dir to a folder, or .* XDG_CACHE_HOME"):
        cache_folder(None)
    assert cache_folder("there").parts == ("there",)


def test_where_copies_are_kept(monkeypatch, tmp_path):
    assert cache_folder("there").parts == ("there",)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "clipscale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "clipscale"
