"""`clipscale plan`: at once and without torch, in one line where it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clipscale.cli import main
from clipscale.config.load import load_config
from clipscale.forecast.curve import text_plot

ROOT = Path(__file__).resolve().parents[1]
PAPER = ["model.name=ViT-L-14", "gradcache.image_chunk=128", "gradcache.text_chunk=128"]

AT_ONCE = """
import sys, time
from clipscale.cli import main
status = main(sys.argv[1:])
print(status, time.process_time(), "torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(("pairs", "ranks"), [(4 << 20, 8), (12 << 20, 32)])
def test_the_setting_of_the_paper_fits_and_is_answered_at_once(pairs, ranks):
    words = ["plan", *PAPER, f"train.global_batch={pairs}", f"--ranks={ranks}", "--gpu=a800", "--scale"]
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    status, seconds, torch = done.stderr.split()
    assert (status, torch) == ("0", "False")
    assert float(seconds) < 3
    assert "of the 80.0GB of a GPU: fits" in done.stdout
    assert "limit: image tower" in done.stdout


@pytest.mark.slow
def test_a_tower_of_timm_s_is_built_within_seconds():
    words = ["plan", "model.name=ViT-SO400M-14-SigLIP", "train.global_batch=65536", "--ranks=64", "--gpu=h200"]
    done = subprocess.run([sys.executable, "-c", AT_ONCE, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    status, seconds, torch = done.stderr.splitlines()[-1].split()
    assert (status, torch) == ("0", "True")
    assert float(seconds) < 15
    assert "877M parameters (by building it without memory)" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.name=ViT-B-32", "--gpu=h101"], "--gpu=h101: no such GPU; did you mean h100"),
        (["model.name=ViT-B-32", "--gpu-memory=lots"], "--gpu-memory=lots: not a size; write bytes such as 24e9"),
        (["model.name=ViT-B-32", "--gpu-memory=-1"], "--gpu-memory=-1: not a size"),
        (["model.name=ViT-B-32", "--ranks=0", "--gpu=h100"], "--ranks=0 must be at least 1"),
        (["model.name=ViT-B-32", "--ranks=3", "--gpu=h100"], "train.global_batch=4096 is not divisible by the 3 ranks"),
        (
            ["model.name=ViT-B-32", "--tokens=78", "--gpu=h100"],
            "--tokens=78.0: a caption of this model has 1 to 77",
        ),
        (["model.name=ViT-B-33", "--gpu=h100"], "model.name='ViT-B-33' is no open_clip model; did you mean ViT-B-32"),
        (["--gpu=h100", "optim.lr=1"], "no model: set model.name"),
        (["model.name=ViT-B-32", "--gpu-memory=24g", "--scale"], "--scale is about a GPU's wires: say --gpu"),
        (["model.name=ViT-B-32", "optim.lrr=1", "--gpu=h100"], "did you mean optim.lr?"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words, told):
    assert main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_numbers_and_a_picture_are_written(tmp_path, capsys):
    numbers, picture = tmp_path / "plan.json", tmp_path / "rate.png"
    assert main(["plan", "vit_b32", "--gpu=h100", "--json", str(numbers), "--picture", str(picture)]) == 0
    answer = json.loads(numbers.read_text())
    assert answer["run"]["parameters"] == 151_277_313
    assert answer["memory"]["fits"]
    assert answer["schedule"][0].startswith("learning rate: rises to 0.001 at step 1,000")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert answer["schedule"][0] in capsys.readouterr().out
    assert main(["plan", "vit_b32", "--gpu=h100", "--picture", str(tmp_path / "rate.docx")]) == 2
    assert "--picture: no rate.docx" in capsys.readouterr().err


def test_memory_alone_tells_whether_a_run_fits(capsys):
    assert main(["plan", "vit_b32", "--ranks=8", "--gpu-memory=12g"]) == 0
    told = capsys.readouterr().out
    assert "of the 12.0GB of a GPU: does not fit" in told
    assert "smaller chunks fit" in told
    assert "pairs/s" not in told


def test_the_curve_is_drawn_as_high_as_the_rate():
    words = ["train.global_batch=10", "train.samples=640", "optim.schedule=constant", "optim.cooldown_steps=32"]
    *rows, axis, steps = text_plot(load_config([*words, "optim.warmup_steps=16"]))
    heights = [sum(" ▁▂▃▄▅▆▇█".index(row.ljust(75)[11 + step]) for row in rows) for step in range(64)]
    rising, flat, falling = heights[:16], heights[16:32], heights[32:]
    assert rising == [round(64 * (step + 1) / 16) for step in range(16)]
    assert flat == [64] * 16
    assert falling == [64 - 2 * step for step in range(32)]
    assert axis.endswith("+" + "-" * 64)
    assert steps.endswith("step 64 (640 samples)")
