"""`clipscale index`: its options are the rules of the index, and what was left out is told."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from http_server import serve
from shards import picture, write_shard

from clipscale.cli import main, parse
from clipscale.cli.index import index_settings
from clipscale.config.data import Data, Select, SourceSettings
from clipscale.data.source import open_source


@pytest.fixture
def shards(tmp_path) -> str:
    """Ten pairs of rising size and score, in two shards; JSON captions; a member that is not read."""
    samples = []
    for i in range(10):
        facts = {"caption": f"number {i}", "uid": f"{i:032x}", "score": i / 10}
        parts = {"jpg": picture(i, 10 + i, 20), "json": json.dumps(facts).encode(), "txt": b"x", "cls": b"1"}
        samples.append((f"{i}", parts | ({"pyd": b"?"} if i < 3 else {})))
    write_shard(tmp_path / "0.tar", samples[:6])
    write_shard(tmp_path / "1.tar", samples[6:])
    return str(tmp_path / "{0..1}.tar")


def run(capsys, *words: str) -> tuple[dict[str, tuple[str, str]], str]:
    """({what was left out: (count, shards)}, the last line)"""
    assert main(["index", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    return {cause: (count, places) for cause, count, places in cells}, lines[-1]


def test_every_option_is_a_rule_and_a_run_with_the_same_settings_finds_its_index(shards, tmp_path, capsys):
    pairs = [(0, i) for i in range(2, 10)]
    np.save(tmp_path / "uids.npy", np.array(pairs, "u8,u8"))
    words = ["--check", "decode", "--hash", "sha256", "--jobs", "2", "--index-dir", str(tmp_path / "index")]
    words += [
        "--caption",
        "json:caption",
        "--min-side",
        "14",
        "--max-aspect",
        "1.4",
        "--uids",
        str(tmp_path / "uids.npy"),
    ]
    words += ["--score-field", "score", "--min-score", "0.35", "--max-score", "0.8"]
    found, last = run(capsys, shards, *words)
    assert found == {
        "refused, score out of bounds": ("3", "2"),  # 2 and 3; 9
        "refused, uid not in the list": ("2", "1"),
        "refused, picture too long": ("1", "1"),  # number 4, of 14 x 20; none is left that is too small
        "not read, .pyd": ("3", "1"),
    }
    source, data, need = index_settings(parse(["index", shards, *words])[1])
    opened = open_source("x", source, data, need=need, track=lambda *_: pytest.fail("it is indexed"))
    assert [opened.read(0, i).key for i in range(1)] + [opened.read(1, i).key for i in range(3)] == ["5", "6", "7", "8"]
    assert all(shard.sha256 for shard in opened.shards)
    assert last == f"2 shards, 4 usable pairs, fingerprint {opened.fingerprint()}"
    assert run(capsys, shards, *words) == (found, last)


def test_defaults_are_a_sources_own(shards, capsys):
    source, data, need = index_settings(parse(["index", shards])[1])
    assert (source, data, need) == (SourceSettings(shards), Data(), "pairs")
    assert source.select == Select()


def test_max_pixels_are_those_of_the_config(shards, capsys):
    words = ["--check", "decode", "--max-pixels", "320"]
    found, _ = run(capsys, shards, *words)
    assert found["refused, too many pixels"] == ("3", "1")  # from 17 x 20 on
    data = Data(max_pixels=320)
    source = SourceSettings(shards, select=Select(check="decode"))
    assert open_source("x", source, data, need="pairs", track=lambda *_: pytest.fail("it is indexed")).samples == 7


def test_labelled_pictures(shards, capsys):
    found, last = run(capsys, shards, "--need", "labelled")
    assert found == {"not read, .pyd": ("3", "1")}
    assert last.startswith("2 shards, 10 usable labelled pictures, fingerprint ")


def test_current_indexes_are_counted_without_torch(shards, capsys):
    _, last = run(capsys, shards)
    code = """
import sys
from clipscale.cli import main
assert main(["index", sys.argv[1]]) == 0
print([name for name in ("torch", "open_clip", "webdataset", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code, shards], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-2:] == [last, "[]"], done.stderr


def test_a_changed_shard_is_named(shards, tmp_path, capsys):
    _, first = run(capsys, shards)
    path = tmp_path / "1.tar"
    path.write_bytes(path.read_bytes().replace(b"number 7", b"number x"))
    assert main(["index", shards]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = path.stat().st_size
    told = rf"{path}: changed since it was indexed last: {size} bytes, crc32 \w{{8}} -> {size} bytes, crc32 \w{{8}}"
    assert re.fullmatch(told, lines[0])
    assert lines[-1] != first


def test_copies_under_two_names_are_told(shards, tmp_path, capsys):
    (tmp_path / "2.tar").write_bytes((tmp_path / "1.tar").read_bytes())
    assert main(["index", shards, str(tmp_path / "2.tar")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "again" in line)
    assert line.startswith(
        f"source 'index': the samples of shard {tmp_path}/2.tar are those of {tmp_path}/1.tar again, and come twice"
    )


def test_refused_samples_are_named_on_request(shards, tmp_path, capsys):
    path = tmp_path / "1.tar"
    write_shard(path, [("a", {"jpg": b"x"}), ("b", {"jpg": b"x", "txt": b"\xff"}), ("c", {"jpg": b"x", "txt": b"x"})])
    run(capsys, shards)  # they need not be indexed for it
    for words, place in (
        ([f"--refused={tmp_path}/mine.jsonl"], tmp_path / "mine.jsonl"),
        (["--refused"], tmp_path / "refused.jsonl"),
        (["--refused", "--index-dir", str(tmp_path / "index")], tmp_path / "index" / "refused.jsonl"),
    ):
        assert main(["index", shards, *words]) == 0
        assert f"2 refused samples listed in {place}" in capsys.readouterr().out.splitlines()
        rows = [json.loads(line) for line in place.read_text().splitlines()]
        assert [(row["shard"], row["key"], row["cause"]) for row in rows] == [
            (str(path), "a", "no caption"),
            (str(path), "b", "caption is not UTF-8"),
        ]
    assert main(["index", shards, f"--refused={tmp_path}/none/x.jsonl"]) == 2
    assert f"{tmp_path}/none is no folder" in capsys.readouterr().err
    before = path.read_bytes()
    assert main(["index", "--refused", str(path), str(tmp_path / "0.tar")]) == 2  # the shard is not overwritten
    assert "must end in .jsonl" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_remote_shards_are_compared_with_their_server_and_fetched_anew_on_request(shards, tmp_path, capsys):
    with serve(tmp_path) as server:
        words = [f"{server.url}/1.tar", "--cache-dir", str(tmp_path / "cache")]
        _, first = run(capsys, *words)
        path = tmp_path / "1.tar"
        path.write_bytes(path.read_bytes().replace(b"number 7", b"number x"))
        _, changed = run(capsys, *words)
        assert changed != first
        server.log.clear()
        assert run(capsys, *words, "--refresh")[1] == changed
        assert [headers.get("if-none-match") for _, headers in server.log] == [None]
        path.write_bytes(path.read_bytes()[:-12_000])  # no end marker any more
        assert main(["index", *words]) == 0
        told = capsys.readouterr().out.splitlines()
    (copy,) = (tmp_path / "cache" / "shards").glob("*.tar")
    assert re.fullmatch(rf"{server.url}/1.tar: \d pairs usable: cut short .* \(its copy: {copy}\)", told[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "data.index_jobs=0 must be at least 1"),
        (["--min-score", "1"], "belong together"),
        (["--max-aspect", "0.5"], "at least 1"),
        (["--uids", "no-such.txt"], "uids 'no-such.txt' cannot be read"),
        (["--caption", "json:"], "must be a member's suffix"),
    ],
)
def test_mistakes_are_one_line(shards, capsys, words, message):
    assert main(["index", shards, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not [*Path(shards).parent.glob("*.index")]
