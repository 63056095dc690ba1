"""What all processes of a run hold together does not grow with the batch: pixels wait on the disk, chunk by chunk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from shards import write_pairs
from tiny import MODEL, write_config

SMALL, LARGE = 4_096, 65_536
WORDS = [
    *("model.vision.image_size=32", "data.loader=process", "data.allow_repeats=true", "data.prefetch_bytes=8000000"),
    *("gradcache.image_chunk=256", "gradcache.text_chunk=256"),
]
PER_PAIR = 36 * MODEL.embed_dim + 20 * MODEL.text["context_length"]  # bytes: embeddings and gradients; tokens


HOLD = """
import subprocess, sys
from clipscale.bench.common.processes import held_bytes
before = held_bytes()
mine = bytearray(b"x") * (64 * 2**20)
code = "import sys; x = bytearray(b'x') * (32 * 2**20); print(flush=True); sys.stdin.read()"
with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as child:
    child.stdout.readline()
    print(held_bytes() - before)
    child.stdin.close()
"""


def test_memory_of_a_process_and_its_children_counts_each_page_once():
    done = subprocess.run([sys.executable, "-c", HOLD], capture_output=True, text=True, check=True)
    assert 94 * 2**20 < int(done.stdout) < 130 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_the_disk_tier_memory_is_flat_in_the_batch(tmp_path):
    """201 MB of pictures against 13: a tier that held them would take a fifth more."""
    urls = write_pairs(tmp_path / "data", 8, 128, size=32)
    most = {}
    for batch in (SMALL, LARGE):
        folder = tmp_path / str(batch)
        folder.mkdir()
        words = [f"train.global_batch={batch}", f"train.samples={batch}", "replay.kind=disk"]
        command = [sys.executable, str(Path(__file__).with_name("step_memory.py")), write_config(folder, urls)]
        done = subprocess.run([*command, *WORDS, *words, f"replay.dir={folder}"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        most[batch] = int(done.stdout.splitlines()[-1]) - batch * PER_PAIR
    assert most[LARGE] <= 1.1 * most[SMALL], most
