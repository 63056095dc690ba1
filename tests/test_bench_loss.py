"""`clipscale bench loss` and `clipscale bench plot`, as a person runs them: tiny, on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_words import printed_by

from clipscale import __version__
from clipscale.bench.common.stamp import commit
from clipscale.bench.loss import bench as loss_module
from clipscale.bench.loss.report import COLUMNS
from clipscale.cli import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--widths", "8", "--seconds", "0.01", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr("clipscale.bench.common.matmul._SIZE", {"cpu": 64, "cuda": 256})


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Folder, command and terminal output of one run with everything in it."""
    folder = tmp_path_factory.mktemp("bench")
    words = [
        "bench",
        "loss",
        *SMALL,
        "--batches",
        "16,64",
        "--precisions",
        "fp32,fp64",
        "--peers",
        "--error-limit",
        "32",
    ]
    words += ["--output", str(folder), "--name", "small"]
    smaller = {"clipscale.bench.common.matmul._SIZE": {"cpu": 64, "cuda": 256}}
    return folder, words, printed_by(words, **smaller)


def test_json_has_every_number_and_what_made_it(result):
    folder, words, _ = result
    document = json.loads((folder / "small.json").read_text())
    assert document["finished"]
    assert document["command"] == f"clipscale {' '.join(words)}"
    assert document["arguments"]["batches"] == [16, 64]
    assert document["arguments"]["seed"] == 0
    stamp = document["stamp"]
    assert (stamp["clipscale"], stamp["commit"], stamp["torch"]) == (__version__, commit(), torch.__version__)
    assert all(stamp[name] for name in ("date", "device", "triton", "cuda", "driver", "python"))
    assert [(case["precision"], case["batch"]) for case in document["cases"]] == [
        *(("fp32", 16), ("fp32", 64), ("fp64", 16), ("fp64", 64))
    ]
    contestants = {one["name"]: one for one in document["contestants"]}
    assert contestants["open_clip"]["version"][0].isdigit()
    assert contestants["siglip-kernel"]["operations"] == "6 B^2 D"
    assert any("plain torch" in note for note in document["notes"])
    for case in document["cases"]:
        rows = {row["contestant"]: row for row in case["rows"]}
        assert list(rows) == list(contestants)
        for name in ("clipscale", "clipscale (autograd)", "open_clip"):
            row = rows[name]
            assert row["status"] == "measured"
            assert row["engine"] == ("" if name == "open_clip" else "torch")
            assert row["both_ms"]["repeats"] == len(row["both_ms"]["all"]) >= 1
            assert row["flop"] == 8 * case["batch"] ** 2 * 8
            assert row["extra_bytes"] >= 0
            if case["batch"] > 32:
                assert row["error"] is None
            else:
                assert max(row["error"].values()) < (1e-5 if case["precision"] == "fp32" else 1e-13)


def test_table_is_the_same_on_the_terminal_and_in_markdown(result):
    folder, words, printed = result
    text = (folder / "small.md").read_text()
    document = json.loads((folder / "small.json").read_text())
    assert f"clipscale {' '.join(words)}" in text
    assert "| " + " | ".join(COLUMNS) + " |" in text
    assert "![small-time](small-time.png)" in text
    assert f"commit {document['stamp']['commit']}" in text
    assert printed.count("clipscale [torch]") == text.count("| clipscale [torch] |") == 4
    for line in printed.splitlines():
        if line.startswith("clipscale [torch] "):
            cells = line.removeprefix("clipscale [torch]").split()
            assert "| clipscale [torch] | " + " | ".join(cells) + " |" in text
    assert f"written: {folder}/small.json {folder}/small.md {folder}/small-time.png" in printed


def test_pictures_are_drawn_and_redrawn(result, tmp_path, capsys):
    folder, *_ = result
    copy = tmp_path / "small.json"
    copy.write_bytes((folder / "small.json").read_bytes())
    assert main(["bench", "plot", str(copy)]) == 0
    names = [f"small-{quantity}.png" for quantity in ("time", "memory")]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_is_wrong_with_its_file(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[]")
    for path, line in (("none.json", "cannot be read"), ("list.json", "not a result")):
        assert main(["bench", "plot", str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"clipscale: error: {tmp_path / path}: {line}")
        assert error.count("\n") == 1


def bench(tmp_path, *words):
    status = main(["bench", "loss", *SMALL, "--output", str(tmp_path), "--name", "x", *words])
    return status, json.loads((tmp_path / "x.json").read_text())


def test_without_matplotlib_there_are_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, document = bench(tmp_path, "--batches", "16,32")
    assert status == 0
    assert document["finished"]
    again = f"clipscale bench plot {tmp_path}/x.json"
    assert f"no pictures: pip install matplotlib, then {again}\n" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.md"]
    assert main(["bench", "plot", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err.startswith("clipscale: error: no pictures: pip install matplotlib")


def test_one_batch_makes_no_picture(tmp_path, capsys):
    assert bench(tmp_path, "--batches", "16")[0] == 0
    assert "no pictures: a curve wants two batches" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.png"))
    assert ".png" not in (tmp_path / "x.md").read_text()


def test_simulated_ranks_are_said_so(tmp_path):
    status, document = bench(tmp_path, "--batches", "17", "--ranks", "3", "--precisions", "fp64")
    assert status == 0
    assert document["ranks"] == {"real": 1, "simulated": 3}
    assert "3 simulated ranks on one device" in (tmp_path / "x.md").read_text()
    for row in document["cases"][0]["rows"]:
        assert max(row["error"].values()) < 1e-13


def test_a_failure_of_our_own_is_told_by_the_status(tmp_path):
    status, document = bench(tmp_path, "--batches", "16", "--engine", "torch,triton", "--precisions", "fp64")
    assert status == 1
    rows = {row["contestant"]: row for row in document["cases"][0]["rows"]}
    assert rows["clipscale torch"]["status"] == "measured"
    assert rows["clipscale triton"]["status"].startswith("failed: loss engine 'triton' has no precision fp64")


def test_cases_before_the_end_are_kept(tmp_path, monkeypatch, capsys):
    measure = loss_module._measure

    def until_32(team, options, budget, case, contestants):
        if case.batch == 32:
            raise KeyboardInterrupt
        return measure(team, options, budget, case, contestants)

    monkeypatch.setattr(loss_module, "_measure", until_32)
    words = ["bench", "loss", *SMALL, "--output", str(tmp_path), "--name", "x", "--batches", "16,32"]
    assert main(words) == 130
    assert "interrupted; the cases already measured are written" in capsys.readouterr().err
    document = json.loads((tmp_path / "x.json").read_text())
    assert not document["finished"]
    assert [case["batch"] for case in document["cases"]] == [16]
    assert "**Not finished**" in (tmp_path / "x.md").read_text()


def test_a_batch_that_does_not_fit_is_one_line(tmp_path, monkeypatch, capsys):
    def no_room(*arguments, **settings):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("clipscale.bench.loss.team.draw_pairs", no_room)
    words = ["bench", "loss", *SMALL, "--output", str(tmp_path), "--batches", "64"]
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(
        "clipscale: error: --batches: batch 64, width 8, fp32 does not fit into memory, its embeddings alone"
    )


def test_a_large_first_batch_is_preceded_by_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_module, "_PILOT", {"cpu": 16})
    words = ["--batches", "48,64", "--limit-seconds", "1e-9"]
    status, document = bench(tmp_path, *words)
    assert status == 0
    assert [case["batch"] for case in document["cases"]] == [48, 64]
    for case in document["cases"]:
        assert all(re.fullmatch(r"skipped: predicted \d+ s", row["status"]) for row in case["rows"])
    assert (tmp_path / "x-time.png").exists(), "a result without a single time can be drawn too"


def test_words_for_what_json_has_no_number_for(tmp_path, monkeypatch):
    monkeypatch.setattr("clipscale.bench.loss.case.errors", lambda *_: {"loss": float("inf"), "d_image": float("nan")})
    _, document = bench(tmp_path, "--batches", "16,32")
    assert document["cases"][0]["rows"][0]["error"] == {"loss": "inf", "d_image": "nan"}
    assert "| nan | - | inf | - |" in (tmp_path / "x.md").read_text()
    assert main(["bench", "plot", str(tmp_path / "x.json")]) == 0


def test_the_commit_can_be_told(monkeypatch):
    monkeypatch.setattr("clipscale.bench.common.stamp._ROOT", Path("/"))
    monkeypatch.setenv("CLIPSCALE_COMMIT", "0123abc")
    assert commit() == "0123abc"
    monkeypatch.delenv("CLIPSCALE_COMMIT")
    assert commit() == "unknown"


@pytest.mark.slow
def test_real_ranks_share_the_batch(tmp_path):
    """Under torchrun: rank 0 reports, and the gradients of all ranks are those of the whole batch."""
    words = ["bench", "loss", *SMALL, "--batches", "101", "--precisions", "fp64", "--peers"]
    words += ["--output", str(tmp_path), "--name", "x"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "clipscale"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["ranks"] == {"real": 2, "simulated": 1}
    assert document["command"].startswith("torchrun --nproc-per-node 2 -m clipscale bench loss")
    rows = {row["contestant"]: row for row in document["cases"][0]["rows"]}
    for name in ("clipscale", "clipscale (autograd)"):
        assert max(rows[name]["error"].values()) < 1e-13
    assert rows["inf-cl"]["status"] == "one rank only"
    assert done.stdout.count("batch 101") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", ["1", "3"])
def test_on_a_gpu(tmp_path, ranks):
    words = ["--batches", "2k,4099", "--precisions", "fp16", "--engine", "auto,torch", "--ranks", ranks]
    words += ["--widths", "256", "--seconds", "0.1", "--output", str(tmp_path), "--name", "x"]
    assert main(["bench", "loss", *words]) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert document["device"] == "cuda"
    for case in document["cases"]:
        for row in case["rows"]:
            assert row["status"] == "measured"
            assert row["extra_bytes"] > 0
            assert max(row["error"]["d_image"], row["error"]["d_text"]) < 5e-3
