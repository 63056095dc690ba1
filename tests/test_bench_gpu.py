"""`clipscale bench gpu`: its parts at tiny sizes, the time they get, what becomes of those that hang or crash; bars.

What surrounds the parts is tried with commands that take no time: small Python programs.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import alive, wait_until

from clipscale.bench.gpu import bench, parts
from clipscale.bench.gpu.bars import bars
from clipscale.bench.gpu.bench import bench_gpu, run_parts
from clipscale.bench.gpu.found import loss_rows, own_rows, pytest_rows
from clipscale.bench.gpu.measure import measure
from clipscale.bench.gpu.options import GpuBench, gpu_options
from clipscale.bench.gpu.parts import PARTS, Part, limit_seconds
from clipscale.cli import main, parse
from clipscale.dist import start_world

ROOT = Path(__file__).resolve().parents[1]
STAMP = dict.fromkeys(("date", "device", "clipscale", "commit", "torch", "triton", "cuda", "driver", "python"), "?")
MILLION_PARTS = ("image forward", "text forward", "loss", "image backward", "text backward", "optimizer")
HANGS = """
import subprocess, sys, time
for own_session in (False, True):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=own_session)
print("hangs", flush=True)
time.sleep(600)
"""


def python(name: str, *codes: str, **more) -> Part:
    """A part that is small programs; {folder} in them is where its files go. Its rows: those of <name>.jsonl there."""

    def commands(place):
        return [[sys.executable, "-c", code.replace("{folder}", str(place.folder))] for code in codes]

    return Part(name, f"what {name} is", 60, 1, commands, lambda folder: own_rows(folder / f"{name}.jsonl"), **more)


def writes(name: str, row: dict) -> str:
    return f"open('{{folder}}/{name}.jsonl', 'a').write({json.dumps(row)!r} + chr(10))"


def document() -> dict:
    return {"format": 1, "name": "x", "command": "c", "finished": False, "stamp": STAMP, "device": "cpu"}


def run(chosen: list[Part], output: Path, seconds: float = 60) -> tuple[int, dict]:
    status = run_parts(chosen, document(), output, time.monotonic() + seconds)
    return status, json.loads((output / "x.json").read_text())


def ends(result: dict) -> dict[str, tuple[str, str]]:
    return {part["name"]: (part["status"], part["note"]) for part in result["parts"]}


def descendants_of_hangs(folder: Path) -> list[int]:
    """The processes of HANGS that still live, by the code that they run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "cwd").readlink().as_posix().encode()
        except OSError:
            continue
        if b"time.sleep(600)" in words and str(folder).encode() in words and alive(int(entry.name)):
            found.append(int(entry.name))
    return found


def test_a_part_that_hangs_is_stopped_with_all_it_started_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hangs = python("hangs", writes("hangs", {"what": "a", "value": 1}) + HANGS)
    status, result = run([hangs, python("good", writes("good", {"what": "b", "value": 2}))], tmp_path, seconds=6)
    assert status == 1
    found = {part["name"]: part for part in result["parts"]}
    assert (found["hangs"]["status"], found["hangs"]["note"]) == ("stopped", "not done after 3 s")
    assert found["hangs"]["rows"] == [{"what": "a", "value": 1}], "what it had measured is kept"
    assert 2.5 < found["hangs"]["seconds"] < 6
    assert (found["good"]["status"], found["good"]["rows"]) == ("measured", [{"what": "b", "value": 2}])
    assert (tmp_path / "x-parts" / "hangs.log").read_text() == "hangs\n"
    wait_until(lambda: not descendants_of_hangs(tmp_path), seconds=10)
    assert "hangs" in capsys.readouterr().out
    assert "| hangs | 3 | 3 | stopped: not done after 3 s |" in (tmp_path / "x.md").read_text()


def test_a_part_that_crashes_is_told(tmp_path):
    crashes = python("crashes", writes("crashes", {"value": 1}) + "\nraise ValueError('an illegal access')")
    dies = python("dies", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    absent = python("absent", "", missing=lambda: "there is no such thing here")
    lenient = python("lenient", "raise SystemExit(1)", fine=(0, 1))
    status, result = run([crashes, dies, absent, lenient], tmp_path)
    assert status == 1
    assert ends(result) == {
        "crashes": ("failed", "status 1, ValueError: an illegal access"),
        "dies": ("failed", "status -11, "),
        "absent": ("not there", "there is no such thing here"),
        "lenient": ("measured", ""),
    }
    assert result["parts"][0]["rows"] == [{"value": 1}]
    assert result["finished"]


def test_a_command_that_fails_does_not_keep_its_part_from_the_next(tmp_path):
    several = python("several", "raise SystemExit(3)", "raise SystemExit(4)", writes("several", {"value": 1}))
    status, result = run([several], tmp_path)
    assert (status, ends(result)) == (1, {"several": ("failed", "status 3, ")})
    assert result["parts"][0]["rows"] == [{"value": 1}]


def test_results_are_on_the_disk_after_each_part(tmp_path):
    looks = python("looks", "import shutil; shutil.copy('{folder}/../x.json', '{folder}/looks.copy')")
    run([python("first", writes("first", {"value": 7})), looks], tmp_path)
    seen = json.loads((tmp_path / "x-parts" / "looks.copy").read_text())
    assert not seen["finished"]
    assert [(part["status"], part["rows"]) for part in seen["parts"]] == [
        ("measured", [{"value": 7}]),
        ("not begun", []),
    ]


def test_an_earlier_run_leaves_nothing_to_the_next(tmp_path):
    for _ in range(2):
        _, result = run([python("a", writes("a", {"value": 1}))], tmp_path)
        assert result["parts"][0]["rows"] == [{"value": 1}]
    _, result = run([python("a", "raise SystemExit(3)")], tmp_path)
    assert result["parts"][0]["rows"] == []


def test_what_does_not_fit_any_more_is_left_out(tmp_path):
    status, result = run([python("late", "")], tmp_path, seconds=0.5)
    assert (status, ends(result)) == (0, {"late": ("left out", "0 s left")})


def test_a_part_gets_its_share_of_what_is_left():
    first, second = (Part(name, "", share, 30, None, None) for name, share in (("a", 100), ("b", 300)))
    assert limit_seconds(first, [second], 800, "cuda") == 200
    assert limit_seconds(second, [], 790, "cuda") == 790, "what the first left over"
    assert limit_seconds(first, [second], 60, "cuda") == 30, "no less than its least"
    assert limit_seconds(first, [second], 29, "cuda") is None
    assert limit_seconds(first, [second], 29, "cpu") == 29 / 4


def test_the_shares_are_of_the_usual_minutes():
    assert sum(part.share_seconds for part in PARTS) == 60 * parts.MINUTES
    assert all(part.least_seconds <= part.share_seconds for part in PARTS)


INTERRUPTED = """
import sys
from clipscale.bench.gpu import bench, options
from clipscale.bench.gpu.found import own_rows
from clipscale.bench.gpu.parts import Part
from clipscale.cli import main

def python(name, code):
    return Part(name, "", 60, 1, lambda place: [[sys.executable, "-c", code.replace("FOLDER", str(place.folder))]],
                lambda folder: own_rows(folder / (name + ".jsonl")))

bench._ask_device = lambda device: {"kind": "cpu", "name": "x", "stamp": dict.fromkeys(KEYS, "?")}
bench.PARTS = options.PARTS = (python("one", "open('FOLDER/one.jsonl', 'w').write('{\\"value\\": 1}')"),
                               python("two", "import time; print('up', flush=True); time.sleep(600)"),
                               python("three", ""))
sys.exit(main(["bench", "gpu", "--output", OUTPUT]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_was_measured(tmp_path, number):
    code = INTERRUPTED.replace("OUTPUT", repr(str(tmp_path))).replace("KEYS", repr(tuple(STAMP)))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    log = tmp_path / "x-parts" / "two.log"
    try:
        wait_until(lambda: log.exists() and log.read_text() == "up\n", seconds=60)
        process.send_signal(number)
        assert process.wait(30) == 130
    finally:
        process.kill()
    result = json.loads((tmp_path / "x.json").read_text())
    assert [part["status"] for part in result["parts"]] == ["measured", "interrupted", "not begun"]
    assert result["parts"][0]["rows"] == [{"value": 1}]
    assert not result["finished"]
    wait_until(lambda: not descendants_of_hangs(tmp_path), seconds=10)


def test_the_command_itself_leaves_the_device_to_its_parts():
    code = "import sys, clipscale.bench.gpu.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize("part", ["device", "towers", "pinned", "million"])
def test_a_part_at_tiny_sizes(part):
    with start_world("cpu") as world:
        rows = list(measure(part, world))
    if part == "towers":
        assert [(row["model"], row["tower"]) for row in rows] == [("tiny", "image"), ("tiny", "text")]
        assert all(row["GFLOP a sample"] > 0 and row["samples/s"] > 0 and row["of matmul"] > 0 for row in rows)
    elif part == "million":
        assert [row["pairs"] for row in rows] == [4, 8]
        for row in rows:
            spent = {name.removesuffix(" s"): value for name, value in row.items() if name.endswith(" s")}
            assert spent.pop("step") == pytest.approx(sum(spent.values()))
            assert spent.keys() >= set(MILLION_PARTS)
    else:
        assert len(rows) >= 2
        assert all(row["value"] for row in rows)


def test_the_pieces_of_the_loss():
    """In the interpreter where there is no GPU, and at full size where there is one."""
    with start_world("auto") as world:
        rows = list(measure("pieces", world))
    pieces = [row["piece"].split()[0] for row in rows]
    assert pieces[:3] == ["addmm", "addmm", "G"]
    assert pieces[-2:] == ["merge", "all"]
    assert {"logsumexp", "gradient"} == set(pieces[3:-2])
    whole = rows[-1]
    assert whole["ms"] >= sum(row["ms"] for row in rows[:2])
    assert whole["of matmul"] == pytest.approx(whole["TFLOP/s"] / (rows[0]["TFLOP/s"] / rows[0]["of matmul"]))


@pytest.mark.slow
def test_one_part_by_the_command(tmp_path, capsys):
    words = ["bench", "gpu", "--device", "cpu", "--only", "pinned", "--minutes", "10"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("gpu-*.json")
    result = json.loads(file.read_text())
    assert result["finished"]
    assert result["command"] == f"clipscale {' '.join(words)} --output {tmp_path}"
    assert ends(result) == {"pinned": ("measured", "")}
    assert any(row["what"].startswith("copy a chunk") and row["value"] > 0 for row in result["parts"][0]["rows"])
    assert result["bars"] == [], "no part was asked for that has one"
    assert str(file) in capsys.readouterr().out
    assert "the figures mean nothing" in file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_the_whole_hour_at_tiny_sizes(tmp_path):
    options = GpuBench(30.0, tuple(part.name for part in PARTS), "cpu", str(tmp_path), "x")
    status = bench_gpu(options, "clipscale bench gpu")
    result = json.loads((tmp_path / "x.json").read_text())
    found = ends(result)
    assert found == dict.fromkeys((part.name for part in PARTS), ("measured", ""))
    assert status == 0
    assert all(part["rows"] for part in result["parts"])
    rows = {part["name"]: part["rows"] for part in result["parts"]}
    assert all(row["compilation s"] > 0 and row["samples/s"] > 0 for row in rows["compiled"])
    assert [row["note"] for row in rows["large-loss"]] == ["measured"] * 2
    tests = {row["what"]: row["value"] for row in rows["tests"]}
    assert tests["passed"] > 5
    assert tests["failed"] == tests["error"] == 0


def test_without_the_tests_that_part_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "_ROOT", tmp_path)
    assert "not in the installed package" in next(part for part in PARTS if part.name == "tests").missing()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--only device,mattmul", "--only=mattmul: unknown; choose from device, tests, pieces"),
        ("--minutes 0", "--minutes=0: must be a number above 0"),
        ("--device tpu", "--device=tpu: unknown; choose from auto, cuda, cpu"),
        ("--name a/b", "--name=a/b: a file name of letters"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert main(["bench", "gpu", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"clipscale: error: {line}")
    assert printed.err.count("\n") == 1


def test_under_torchrun_it_is_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="start it without torchrun"):
        bench_gpu(GpuBench(1.0, (), "cpu", "out", None), "")


def test_a_device_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    code = "print('device=cuda, but torch finds no GPU here'); raise SystemExit(2)"
    monkeypatch.setattr(bench, "_stamp_command", lambda *_: [sys.executable, "-c", code])
    with pytest.raises(ValueError, match="--device=cuda: device=cuda, but torch finds no GPU here"):
        bench_gpu(GpuBench(1.0, (), "cuda", str(tmp_path), None), "")


def test_the_parts_are_listed(capsys):
    assert main(["bench", "gpu", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in PARTS]


def test_parts_run_in_their_own_order():
    assert gpu_options(parse(["bench", "gpu", "--only", "towers,device"])[1]).only == ("device", "towers")


# --- what the parts found ---------------------------------------------------------------------------------------------

LOG = """
tests/test_a.py::test_one PASSED                                         [ 50%]
tests/test_a.py::test_two[a b] FAILED                                    [100%]
=========================== short test summary info ============================
FAILED tests/test_a.py::test_two[a b] - assert 1 == 2
tests/test_b.py::test_three SKIPPED (needs an optional component: NVIDIA GPU) [ 50%]
tests/test_b.py::test_four ERROR
"""


def test_what_pytest_printed(tmp_path):
    assert pytest_rows(tmp_path) == []
    (tmp_path / "tests.log").write_text(LOG)
    assert pytest_rows(tmp_path) == [
        {"what": "passed", "value": 1},
        {"what": "failed", "value": 1},
        {"what": "error", "value": 1},
        {"what": "skipped", "value": 1},
        {"what": "tests/test_a.py::test_two[a b]", "value": "failed", "note": "assert 1 == 2"},
        {"what": "tests/test_b.py::test_four", "value": "error", "note": ""},
    ]


def test_a_row_that_was_cut_short_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"value": 1}\n{"val')
    assert own_rows(tmp_path / "a.jsonl") == [{"value": 1}]
    (tmp_path / "a.json").write_text('{"cases": [')
    assert loss_rows(tmp_path / "a.json") == []


def loss_row(contestant: str, batch: int, both: float, precision: str = "fp16", **more) -> dict:
    row = {"contestant": contestant, "batch": batch, "precision": precision, "both ms": both, "note": "measured"}
    return row | {"TFLOP/s": 500.0, "of matmul": 0.7, "extra MB": 540.0} | more


def part(name: str, rows: list[dict], status: str = "measured", note: str = "") -> dict:
    return {"name": name, "status": status, "note": note, "rows": rows}


def tower_row(model: str, tower: str, gflop: float, share: float) -> dict:
    return {"model": model, "tower": tower, "samples/s": share, "GFLOP a sample": gflop, "of matmul": share}


def step_row(contestant: str, batch: int, seconds: float, ratio: float | None) -> dict:
    return {"model": "ViT-B-32", "batch": batch, "contestant": contestant, "step s": seconds, "of open_clip": ratio}


REACHED = [
    part("device", [{"what": "product fp16 8192^3", "value": 764.0, "unit": "TFLOP/s"}]),
    part(
        "tests", [{"what": "passed", "value": 34}, *({"what": w, "value": 0} for w in ("failed", "error", "skipped"))]
    ),
    part(
        "loss",
        [
            loss_row("clipscale", 2**14, 5.0),
            loss_row("clipscale", 2**14, 5.0, "bf16"),
            loss_row("open_clip", 2**14, 6.0, "bf16"),
            loss_row("open_clip, autocast", 2**14, 9.0, "bf16"),
            loss_row("clipscale", 2**16, 48.0, **{"TFLOP/s": 547.0, "of matmul": 0.805}),
            loss_row("inf-cl", 2**16, 1626.0),
            loss_row("memeff", 2**16, 190.0),
            loss_row("siglip-kernel", 2**16, 39.0, **{"TFLOP/s": 502.0}),
        ],
    ),
    part("large-loss", [loss_row("clipscale", 2**20, 12485.0, **{"extra MB": 571.0}), {**loss_row("a", 1, 1)}]),
    part("towers", [tower_row("ViT-B-16", "image", 140.0, 0.6), tower_row("ViT-B-16", "text", 24.0, 0.5)]),
    part("compiled", [tower_row("ViT-L-14", "image", 651.0, 0.5), tower_row("ViT-L-14", "text", 53.0, 0.5)]),
    part("step", [step_row("clipscale, kept graphs", 2**15, 6.0, 1.6), step_row("open_clip", 2**15, 9.0, None)]),
    part("million", [{"pairs": 2**16, "step s": 19.0}, {"pairs": 2**20, "step s": 300.0}]),
]


def test_the_bars():
    found = {bar["what"]: bar for bar in bars(REACHED)}
    assert {what: bar["met"] for what, bar in found.items() if bar["met"] is not True} == {
        "ViT-L-14's towers, of the plain product": False
    }
    assert {what: bar["reached"] for what, bar in found.items()} == {
        "plain fp16 product, TFLOP/s": "764.0",
        "tests that fail": "0 of 34",
        "loss at 64k pairs, of the plain product": "0.8050",
        "the same, as far as it was hoped": "0.8050",
        "times as fast as open_clip's dense loss, bf16, from 16k on": "1.200 at 16k",
        "times as fast as inf-cl at 64k and 256k": "33.88 at 64k",
        "times as fast as memeff at 64k and 256k": "3.958 at 64k",
        "rate beside siglip-kernel's at 64k, each on its own arithmetic": "1.090",
        "extra MB of the loss, less 32 bytes a pair": "539.5 at 16k, 537.9 at 64k, 537.4 at 1m",
        "seconds of the loss at a million pairs": "12.48",
        "ViT-B-16's towers, of the plain product": "0.5829 eager",
        "ViT-L-14's towers, of the plain product": "0.5000 compiled",
        "times as fast as open_clip's accumulation, ViT-B-32, 32k pairs": "1.600",
        "seconds of a step of 1,048,576 pairs, ViT-B-32": "300.0",
    }
    assert all(bool(bar["next"]) == (bar["met"] is False) for bar in found.values())


def test_a_bar_that_was_not_measured_says_why():
    slow = part("loss", [loss_row("clipscale", 2**16, 48.0)], "stopped", "not done after 90 s")
    cut = part("tests", [{"what": w, "value": int(w == "passed")} for w in ("passed", "failed", "error", "skipped")])
    found = {bar["what"]: bar for bar in bars([slow, cut | {"status": "stopped", "note": "not done after 9 s"}])}
    assert "plain fp16 product, TFLOP/s" not in found, "its part was not asked for"
    assert found["loss at 64k pairs, of the plain product"]["met"], "what was measured before it was stopped counts"
    inf_cl = found["times as fast as inf-cl at 64k and 256k"]
    assert inf_cl["reached"] == "not measured (loss: stopped: not done after 90 s; large-loss: not asked for)"
    assert (inf_cl["met"], inf_cl["next"]) == (None, "")
    assert (found["tests that fail"]["met"], found["tests that fail"]["reached"]) == (
        *(None, "0 of 1, so far (tests: stopped: not done after 9 s)"),
    )


@pytest.mark.parametrize("slower", [math.nan, 70.0])
def test_a_bar_can_be_missed(slower):
    rows = [loss_row("clipscale", 2**16, 48.0), loss_row("memeff", 2**16, slower)]
    (missed,) = (bar for bar in bars([part("loss", rows)]) if "memeff" in bar["what"])
    assert missed["met"] is False
    assert missed["next"]
