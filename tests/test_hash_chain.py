"""Position, key, pixels and tokens: the same ordered chain whatever reads it, and however often that is killed."""

from __future__ import annotations

import itertools
import json
import random
import time
from pathlib import Path

import pytest
from consume import BATCH, chain, see
from forks import start
from shards import write_pairs

STEPS = 14  # two epochs and a bit


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    """12 shards of 16 pairs, two of them broken: 6.4 batches an epoch."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 12, 16, size=40, broken={5, 100})


def first_steps(urls: str, steps: int = STEPS, **how) -> list:
    return list(itertools.islice(see(urls, **how), steps))


@pytest.fixture(scope="module")
def expected(urls) -> list:
    return first_steps(urls, threads=1, chunk=BATCH)


def test_the_chain_is_of_all_samples_and_notices_any_change(expected):
    keys = [link[1] for step in expected for link in sorted(step)]
    assert sorted(keys[:192]) == sorted(keys[192:384]) == [f"{i:06d}" for i in range(192)]
    changed = [[list(link) for link in step] for step in expected]
    assert chain(changed) == chain(expected)
    for place, value in ((1, "x"), (2, 0), (3, 0)):
        changed = [[list(link) for link in step] for step in expected]
        changed[9][4][place] = value
        assert chain(changed) != chain(expected)
    swapped = [*expected[:3], expected[4], expected[3], *expected[5:]]
    assert chain(swapped) != chain(expected)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_ranks_and_threads_change_nothing(urls, expected, world, threads):
    assert chain(first_steps(urls, world=world, threads=threads, chunk=4)) == chain(expected)


@pytest.mark.parametrize("tier", ["host", "disk", "recompute"])
@pytest.mark.parametrize("world", [1, 3])
def test_replay_tiers_change_nothing(urls, expected, tmp_path, tier, world):
    assert chain(first_steps(urls, tier=tier, folder=str(tmp_path), world=world, chunk=3)) == chain(expected)


@pytest.mark.slow
def test_the_process_changes_nothing(urls, expected, tmp_path):
    found = first_steps(urls, mode="process", world=2, threads=4, chunk=4, tier="recompute")
    assert chain(found) == chain(expected)


def lines(path: Path) -> list[str]:
    """The whole ones."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.mark.slow
def test_killed_at_random_and_resumed_on_other_worlds_the_chain_is_the_same(urls, tmp_path):
    """SIGKILL to the reader alone: its loaders' processes must end by themselves."""
    out, chance = tmp_path / "seen.jsonl", random.Random(0)
    for world, mode in ((3, "inline"), (1, "process"), (5, "inline"), (2, "process")):
        whole = lines(out)
        out.write_text("".join(line + "\n" for line in whole))  # the line that the kill cut is written again
        target = len(whole) + chance.randrange(2, 12)
        code = "from consume import consume; consume(*sys.argv[1:])"
        with start(code, urls, out, len(whole), world, mode) as reader:
            deadline = time.monotonic() + 120
            while len(lines(out)) < target:
                assert not reader.ended(), reader.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            reader.kill()
    seen = [json.loads(line) for line in lines(out)]
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert chain([links for _, links in seen]) == chain(first_steps(urls, len(seen), threads=1, chunk=BATCH))
