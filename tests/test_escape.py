"""clipscale/escape.py, and that every door to a terminal, a log or a page goes through it: keys, captions, paths and
errors that hold escape sequences, line ends, marks that turn the text, or bytes that are no UTF-8."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from shards import picture, write_shard
from tiny import tiny_config

from clipscale.cli import main
from clipscale.data.fetch.cache import _note, _noted
from clipscale.data.fetch.download import FetchError
from clipscale.data.load.fill import Skip
from clipscale.dist import World
from clipscale.errors import UserError
from clipscale.escape import escaped, one_line, printable, shown
from clipscale.progress import bar_on, progress_bar
from clipscale.shardkit.commands import run_script
from clipscale.telemetry.runlog import RunLog
from clipscale.tell import tell
from clipscale.training.feed import Skips
from clipscale.training.trainer import train

EVIL = "k\x1b[2J\x9b31m\x7f\u202eelif\u2066\u2028\u2029\x85\r\nclipscale: error: forged [/red]"
NO_UTF8 = os.fsdecode(b"caf\xe9\x1b[2J")  # a file's name


def is_safe(text: str) -> bool:
    """Lines that a terminal only shows."""
    odd = {unicodedata.category(sign) for sign in text.replace("\n", "")} & {"Cc", "Cs", "Zl", "Zp"}
    return not odd and not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(text)


def printed(capsys) -> tuple[list[str], list[str]]:
    """The lines of both streams, which must be safe and hold no forged one."""
    streams = capsys.readouterr()
    for text in streams:
        assert is_safe(text)
        assert "\nclipscale: error: forged" not in text
    return streams.out.splitlines(), streams.err.splitlines()


def test_what_is_escaped_and_what_is_not():
    every = "".join(map(chr, range(0x2_0000)))
    assert is_safe(escaped(every))
    assert "\n" not in escaped(every)
    escaped(every).encode()
    changed = [sign for sign in every if escaped(sign) != sign]
    assert len(changed) == 32 + 33 + 2 + 5 + 4 + 2048
    assert escaped("a\n\x1b\u202e\udce9\\") == r"a\n\x1b\u202e\udce9" + "\\"
    fine = "zwölf 一只猫\u3000قطة می\u200cخواهم 👩\u200d🚀 \ue000\u00a0\\n"
    assert escaped(fine) == shown(fine, 100) == printable(fine) == fine
    assert escaped(escaped(EVIL)) == escaped(EVIL)
    assert shown("two\nlines", 8) == r"two\nl..."
    assert printable("a\nb\udce9") == "a\nb\\udce9"
    assert one_line(UserError("a  b\n  c\x1b " + "x" * 3000)) == r"a b c\x1b " + "x" * 1990 + "..."


def test_a_tell_is_one_line_of_the_run_log_and_of_the_screen(tmp_path, capsys):
    with RunLog(str(tmp_path)):
        tell(EVIL)
        tell(NO_UTF8)
        tell(":skull: [red]")
    first, second, _ = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith(escaped(EVIL))
    assert second.endswith(r"caf\udce9\x1b[2J")
    assert printed(capsys)[1] == [escaped(EVIL), escaped(NO_UTF8), ":skull: [red]"]


def test_errors_of_both_doors(tmp_path, capsys):
    def fails(arguments) -> int:
        raise UserError(f"{NO_UTF8}: {EVIL}")

    command = SimpleNamespace(DESCRIPTION="", EXAMPLES="", LEFT="", add_arguments=lambda parser: None, run=fails)
    assert run_script(command, "x.py", []) == 2
    assert main(["shards", "make", str(tmp_path / EVIL / NO_UTF8), "--output", str(tmp_path / "out")]) == 2
    here, there = printed(capsys)[1]
    assert here.startswith(r"x.py: error: caf\udce9\x1b[2J: k\x1b[2J\x9b31m")
    assert there.startswith(f"clipscale: error: {tmp_path}/k\\x1b[2J")


def test_a_config_that_is_no_good(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text('"' + r"ev\e[2J\u202Eil\n" + '": 1\n')
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    assert r"ev\x1b[2J\u202eil" in printed(capsys)[1][0]


def test_bars(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        "clipscale.progress.bar_on", lambda _, left: bar_on(Console(file=screen, force_terminal=True), left)
    )
    with progress_bar(f"{NO_UTF8} {EVIL}") as progress:
        progress(1, 2)
    assert r"caf\udce9\x1b[2J k\x1b[2J\x9b31m" in screen.getvalue()
    screen.getvalue().encode()


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A shard with a name, keys and a suffix that are hostile: two good pairs, a picture that cannot be decoded, a
    sample without caption; cut short."""
    jpeg = picture(0, 16, 16)
    samples = [(f"{i}{EVIL}", {"jpg": jpeg, "txt": EVIL.encode()}) for i in range(2)]
    samples.append((f"2{EVIL}", {"jpg": jpeg[:200], "txt": b"x", "\x1b[2J[bold]": b"?"}))
    samples.append((f"3{EVIL}", {"jpg": jpeg}))
    path = write_shard(tmp_path / "set" / f"{NO_UTF8}.tar", samples)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(jpeg) + 100])
    return path


def test_index_check_and_inspect(hostile, tmp_path, capsys):
    urls = f"{hostile.parent}/*.tar"
    assert main(["index", urls]) == 0
    out, _ = printed(capsys)
    assert rf"{hostile.parent}/caf\udce9\x1b[2J.tar: 3 pairs usable" in out[0]
    assert any(r"not read, .\x1b[2j[bold]" in line for line in out)
    report = tmp_path / "report.json"
    assert main(["shards", "check", urls, "--jobs=1", "--json", str(report)]) == 1
    out, _ = printed(capsys)
    assert "broken picture" in "".join(out)
    group = json.loads(report.read_text())["duplicates"]["pairs"]["largest_groups"][0]
    assert group["first"][0]["key"] == f"0{EVIL}".split(".")[0]
    assert group["first"][0]["caption"] == EVIL
    for suffix in ("png", "html"):
        sheet = tmp_path / f"{NO_UTF8}.{suffix}"
        assert main(["shards", "inspect", str(hostile), "--output", str(sheet)]) == 0
        assert r"caf\udce9\x1b[2J" in printed(capsys)[0][0]
    page = sheet.read_text(encoding="utf-8")
    assert rf"<title>{hostile.parent}/caf\udce9\x1b[2J.tar</title>" in page


def test_packing(tmp_path, capsys):
    """File names that no UTF-8 can hold, that end lines, and that cut a line of refused.jsonl in two."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (NO_UTF8, EVIL.replace("/", "")):
        (folder / f"{name}.jpg").write_bytes(picture(0, 16, 16))
    (folder / "good.jpg").write_bytes(picture(0, 16, 16))
    (folder / "good.txt").write_text("x")
    out = tmp_path / NO_UTF8
    for prefix in ("train", "test"):
        assert main(["shards", "make", str(folder), "--output", str(out), "--prefix", prefix, "--jobs=1"]) == 0
        assert any(line.startswith(rf"{tmp_path}/caf\udce9\x1b[2J: 1 sample ") for line in printed(capsys)[0])
    lines = (out / "refused.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    names = [(row["prefix"], row["path"]) for row in map(json.loads, lines)]
    expected = [printable(f"{name}.jpg") for name in (NO_UTF8, EVIL.replace("/", ""))]
    assert names == [(prefix, name) for prefix in ("train", "test") for name in expected]


def test_masked_samples_in_a_run(hostile, tmp_path, capsys):
    """Its shard's name is no UTF-8; skipped.jsonl holds the exact key."""
    config = tiny_config(
        tmp_path, str(hostile.parent / "*.tar"), "data.allow_repeats=true", "data.max_bad_fraction=0.9"
    )
    train(config)
    _, err = printed(capsys)
    lines = (tmp_path / "run" / "run.log").read_text(encoding="utf-8").split("\n")[:-1]
    assert [line[20:] for line in lines] == err
    masked = [line for line in err if line.startswith(r"masked sample 2k\x1b[2J\x9b31m")]
    assert masked
    assert r"caf\udce9\x1b[2J.tar at position" in masked[0]
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {f"2{EVIL}".split(".")[0]}


def test_the_account_of_masked_samples(tmp_path, told):
    config = tiny_config(tmp_path, "x.tar", "data.max_bad_fraction=1.0")
    (tmp_path / "run").mkdir()
    skips = Skips(config, {}, World(0, 1, 0, "cpu"))
    skip = Skip(3, "mine", f"{NO_UTF8}.tar", EVIL, "cannot be read", f"HTTP 404 {EVIL}")
    skips.account(SimpleNamespace(skips=[skip]), masked=True, seen=10)
    assert len(told) == 1
    assert is_safe(told[0])
    (row,) = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert (json.loads(row)["key"], json.loads(row)["detail"]) == (EVIL, f"HTTP 404 {EVIL}")


def test_a_servers_words_do_not_forge_what_processes_tell_each_other():
    assert not _noted(_note(FetchError("HTTP 500 sorry\nmissing"))).missing
    assert _noted(_note(FetchError("HTTP 404", missing=True))).missing
    _note(FetchError(NO_UTF8)).encode()
