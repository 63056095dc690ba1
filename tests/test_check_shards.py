"""data_tools/check_shards.py, clipscale/shardkit/checks.py, totals.py and tally.py."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from http_server import serve
from PIL import Image
from processes import wait_until
from shards import picture, write_pairs, write_shard, write_tar
from tools import FOLDER, load_tool

from clipscale.shardkit.tally import Digests, Numbers


@pytest.fixture
def check(tmp_path, capsys, monkeypatch):
    """check(*arguments) -> (exit status, report, findings, what was printed)."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> tuple[int, dict, list[dict], str]:
        report, broken = tmp_path / "report.json", tmp_path / "broken.jsonl"
        options = ["--json", str(report), "--broken", str(broken), "--jobs=1"]
        status = load_tool("check_shards").main([*map(str, arguments), *options])
        printed = capsys.readouterr().out
        return status, json.loads(report.read_text()), list(map(json.loads, broken.read_text().splitlines())), printed

    return run


def test_clean_shards(check, tmp_path):
    urls = write_pairs(tmp_path / "set", shards=3, per_shard=5, size=40)
    status, report, findings, printed = check(urls)
    assert (status, findings) == (0, [])
    assert "15 samples in 3 shards" in printed
    assert "nothing found" in printed
    assert (report["samples"], report["usable"], report["members"]) == (15, 15, 30)
    jpegs = [len(picture(i, 40, 40)) for i in range(15)]
    assert report["sizes"]["picture bytes"] == pytest.approx(
        {"min": min(jpegs), "median": np.median(jpegs), "max": max(jpegs), "mean": np.mean(jpegs)}
    )
    assert report["sizes"]["width"] == {"min": 40, "median": 40, "max": 40, "mean": 40}
    assert report["sizes"]["caption characters"]["max"] == len("number 0 of shard 0")
    assert [shard["bytes"] for shard in report["by_shard"]] == [
        path.stat().st_size for path in sorted((tmp_path / "set").iterdir())
    ]
    assert report["samples_per_second"] > 0


def test_every_fault_is_found_with_its_place(check, tmp_path):
    good, text = picture(0, 30, 20), b"a caption"
    members = [
        ("good.jpg", good),
        ("good.txt", "größer".encode()),
        ("cut.jpg", good[: len(good) // 2]),
        ("cut.txt", text),
        ("gif.jpg", b"GIF89a" + bytes(50)),
        ("gif.txt", text),
        ("huge.jpg", picture(1, 90, 90)),
        ("huge.txt", text),
        ("alone.jpg", good),
        ("words.txt", text),
        ("latin.jpg", good),
        ("latin.txt", b"caf\xe9"),
        ("blank.jpg", good),
        ("blank.txt", b" \n"),
        ("label.jpg", good),
        ("label.cls", b"cat"),
        ("number.jpg", good),
        ("number.cls", b"17"),
        ("json.jpg", good),
        ("json.txt", text),
        ("json.json", b"{broken"),
        ("more.jpg", good),
        ("more.txt", text),
        ("more.pyd", b"cos\nsystem\n(S'true'\ntR."),
        ("../../etc/x.jpg", good),
        ("../../etc/x.txt", text),
        ("good.jpg", good),
        ("good.txt", text),
    ]
    path = write_tar(tmp_path / "bad.tar", members)
    status, report, findings, printed = check(path, "--max-pixels=8000")
    assert status == 1
    expected = {
        "broken picture": "cut.jpg",
        "not JPEG, PNG or WebP": "gif.jpg",
        "too many pixels": "huge.jpg",
        "neither caption nor label": "alone.jpg",
        "no picture": "words.txt",
        "caption is not UTF-8": "latin.txt",
        "empty caption": "blank.txt",
        "label is not a number": "label.cls",
        "broken JSON": "json.json",
        "member that is not read": "more.pyd",
        "key leads out of its folder": "../../etc/x.jpg",
        "key occurs twice": "good.jpg",
    }
    assert {row["cause"]: row["member"] for row in findings} == expected
    assert len(findings) == len(expected)
    assert report["findings"] == dict.fromkeys(expected, 1)
    assert (report["samples"], report["usable"]) == (14, 2)
    with tarfile.open(path) as tar:  # offsets as another reader has them
        offsets = {member.name: member.offset_data for member in tar.getmembers()[:-2]}
    for row in findings:
        assert row["shard"] == str(path)
        assert row["key"] == row["member"].rpartition(".")[0]
        assert row["cause"] == "key occurs twice" or row["offset"] == offsets[row["member"]]
    for cause in expected:
        assert f"│ {cause} " in printed
    assert report["members_not_read"] == {"pyd": 1}


def test_need(check, tmp_path):
    good = picture(0, 30, 20)
    samples = [("a", {"jpg": good, "txt": b"x"}), ("b", {"jpg": good, "cls": b"1"})]
    path = write_shard(tmp_path / "x.tar", samples)
    assert check(path)[0] == 0
    assert [(row["key"], row["cause"]) for row in check(path, "--need=pairs")[2]] == [("b", "no caption")]
    assert [(row["key"], row["cause"]) for row in check(path, "--need=labelled")[2]] == [("a", "no label")]
    found = check(path, "--caption=json:text")
    assert [(row["key"], row["cause"]) for row in found[2]] == [("a", "neither caption nor label")]


def test_cut_and_unreadable_archives(check, tmp_path):
    write_pairs(tmp_path / "set", shards=1, per_shard=6)
    data = (tmp_path / "set/0000.tar").read_bytes()
    with tarfile.open(tmp_path / "set/0000.tar") as tar:
        third = tar.getmembers()[4].offset
    (tmp_path / "set/boundary.tar").write_bytes(data[:third])
    (tmp_path / "set/inside.tar").write_bytes(data[: third + 700])
    (tmp_path / "set/gzip.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "set/empty.tar").write_bytes(b"")
    status, report, findings, _ = check(tmp_path / "set/*.tar")
    assert status == 1
    found = {Path(row["shard"]).name: row["detail"] for row in findings if row["cause"] == "damaged archive"}
    assert found.keys() == {"boundary.tar", "inside.tar", "gzip.tar", "empty.tar"}
    assert found["boundary.tar"] == f"cut short at byte {third}: no end-of-archive marker"
    assert "inside 000002.jpg" in found["inside.tar"]
    assert {Path(s["shard"]).name: s["samples"] for s in report["by_shard"]} == {
        **{"0000.tar": 6, "boundary.tar": 2, "inside.tar": 2},
        **{"gzip.tar": 0, "empty.tar": 0},
    }


def test_zeros_that_were_never_filled_are_found(check, tmp_path):
    write_pairs(tmp_path / "set", shards=1, per_shard=40)
    path = tmp_path / "set/0000.tar"
    data = path.read_bytes()
    third = data.index(b"000002.jpg")
    path.write_bytes(data[:third] + bytes(len(data) - third))
    (tmp_path / "set/zeros.tar").write_bytes(bytes(len(data)))
    status, report, findings, printed = check(tmp_path / "set/*.tar")
    assert (status, report["findings"], report["usable"]) == (1, {"damaged archive": 2}, 2)
    told = "cut short at byte {}: {} bytes follow, all zeros: never filled"
    assert [row["detail"] for row in findings] == [told.format(third, len(data) - third), told.format(0, len(data))]
    assert "nothing found" not in printed


def test_duplicates_over_shards(check, tmp_path):
    def sample(key: int, seed: int, caption: str) -> tuple[str, dict[str, bytes]]:
        return f"{key:03}", {"jpg": picture(seed, 20, 20), "txt": caption.encode()}

    rows = [(i, i, f"caption {i}") for i in range(30)]
    rows += [
        (30, 3, "caption 3"),
        (31, 3, "other"),
        (32, 99, "caption 5"),
        (33, 98, " caption 5\n"),
        (34, 4, "caption 5"),
    ]
    samples = [sample(*row) for row in rows]
    write_shard(tmp_path / "a.tar", samples[:17])
    write_shard(tmp_path / "b.tar", samples[17:])
    status, report, _, printed = check(tmp_path / "*.tar")
    assert status == 0  # told, but no finding
    for name, contents in (
        ("pictures", [hashlib.sha256(s["jpg"]).digest() for _, s in samples]),
        ("captions", [s["txt"].strip() for _, s in samples]),
        ("pairs", [(s["jpg"], s["txt"].strip()) for _, s in samples]),
    ):
        counts, found = Counter(contents), report["duplicates"][name]
        assert (found["distinct"], found["surplus"]) == (len(counts), len(samples) - len(counts)), name
        assert [group["copies"] for group in found["largest_groups"]] == sorted(
            (count for count in counts.values() if count > 1), reverse=True
        )
    (triple, double) = report["duplicates"]["pictures"]["largest_groups"]
    assert [(Path(place["shard"]).name, place["key"]) for place in triple["first"]] == [
        ("a.tar", "003"),
        ("b.tar", "030"),
        ("b.tar", "031"),
    ]
    assert [place["key"] for place in double["first"]] == ["004", "034"]
    assert report["duplicates"]["captions"]["largest_groups"][0]["first"][0]["caption"] == "caption 5"
    assert "caption 5" in printed


def test_hostile_text_stays_text_on_the_terminal(check, tmp_path):
    evil = "\x1b[2J[red]gone[/red]\u202e"
    samples = [(f"{i}\x1b]0;title\x07", {"jpg": picture(i, 20, 20), "txt": evil.encode()}) for i in range(3)]
    write_shard(tmp_path / "x.tar", [*samples, ("broken\x1b[1m", {"jpg": b"\x1b[31m", "txt": evil.encode()})])
    status, _, _, printed = check(tmp_path / "x.tar")
    assert status == 1
    assert not set(printed) & {"\x1b", "\x07", "\u202e"}
    assert r"\x1b[2J[red]gone[/red]\u202e" in printed


def test_processes_and_remote_shards_find_the_same(check, tmp_path, capsys):
    write_pairs(tmp_path / "set", shards=4, per_shard=6, broken={2, 3, 20})
    _, report, findings, _ = check(tmp_path / "set/*.tar")
    assert [row["key"] for row in findings] == ["000002", "000003", "000020"]
    with serve(tmp_path / "set") as server:
        urls = f"{server.url}/{{0000..0003}}.tar"
        status, remote, found, _ = check(urls, "--cache-dir", tmp_path / "cache", "--jobs=3")
        lost, _, more, _ = check(urls.replace("0003", "0004"), "--cache-dir", tmp_path / "cache")
        (tmp_path / "set/0005.tar").write_bytes((tmp_path / "set/0000.tar").read_bytes()[:-12_000])
        _, _, cut, _ = check(f"{server.url}/0005.tar", "--cache-dir", tmp_path / "cache")
    assert status == lost == 1
    assert [row | {"shard": Path(row["shard"]).name} for row in found] == [
        row | {"shard": Path(row["shard"]).name} for row in findings
    ]
    assert Path(re.search(r"\(its copy: (.*)\)", cut[-1]["detail"])[1]).parent == tmp_path / "cache" / "shards"
    assert remote["sizes"] == report["sizes"]
    assert more[-1]["cause"] == "shard cannot be read"
    assert "404" in more[-1]["detail"]


def test_wrong_arguments_are_one_line_and_status_2(tmp_path, capsys):
    tool = load_tool("check_shards")
    write_pairs(tmp_path, shards=1, per_shard=1)
    for arguments, message in [
        ([str(tmp_path / "gone-*.tar")], "no file matches"),
        ([str(tmp_path / "0000.tar")] * 2, "is named 2 times"),
        ([str(tmp_path / "0000.tar"), "--json", str(tmp_path / "no/where.json")], "is no folder"),
    ]:
        assert tool.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("check_shards.py: error: ")
        assert message in line
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert stop.value.code == 0
    assert "python data_tools/check_shards.py 'data/train-*.tar'" in capsys.readouterr().out


def test_ctrl_c_leaves_nothing(tmp_path):
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)).save(jpeg, "JPEG")
    samples = [(f"{i:03}", {"jpg": jpeg.getvalue(), "txt": b"x"}) for i in range(60)]
    for i in range(6):
        write_shard(tmp_path / f"set/{i}.tar", samples)
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, FOLDER / "check_shards.py", tmp_path / "set/*.tar", "--scratch", tmp_path / "scratch"]
    command += ["--json", tmp_path / "report.json", "--broken", tmp_path / "broken.jsonl", "--jobs=2"]
    done = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(tmp_path.glob("*.partial")))
    done.send_signal(signal.SIGINT)
    assert "interrupted, nothing was written" in done.communicate(timeout=300)[1]
    assert done.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scratch", "set"]
    assert list((tmp_path / "scratch").iterdir()) == []


# --- figures on disk --------------------------------------------------------------------------------------------------


def test_numbers(tmp_path):
    numbers = Numbers(tmp_path / "x")
    assert numbers.summary() is None
    values = np.random.default_rng(0).integers(0, 2**40, 1001)
    for part in np.array_split(values, 7):
        numbers.add(part)
    assert numbers.summary() == {
        "min": values.min(),
        "median": np.median(values),
        "max": values.max(),
        "mean": pytest.approx(values.mean()),
    }


def test_digests_group_as_a_dictionary_does(tmp_path):
    random = np.random.default_rng(1)
    contents = random.integers(0, 256, (300, 16), dtype=np.uint8)
    contents[:20, :8] = contents[20:40, :8]  # equal halves
    contents[40:60, 8:] = contents[60:80, 8:]
    drawn = np.minimum(random.geometric(0.01, 2000), 300) - 1
    digests = Digests(tmp_path / "x")
    for start in range(0, 2000, 300):
        digests.add(contents[drawn[start : start + 300]], np.arange(start, min(start + 300, 2000)))
    found = digests.repeated(largest=25, places=4)
    places: dict[bytes, list[int]] = {}
    for number, content in enumerate(drawn):
        places.setdefault(contents[content].tobytes(), []).append(number)
    assert (found.distinct, found.surplus) == (len(places), 2000 - len(places))
    expected = sorted((-len(numbers), numbers[:4]) for numbers in places.values() if len(numbers) > 1)[:25]
    assert [(-group.copies, group.numbers) for group in found.groups] == expected
