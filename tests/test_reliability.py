"""docs/reliability.md says what is there: the files of a run's folder, their columns, and the tests that it names."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from shards import write_pairs
from tiny import tiny_config

from clipscale.cli import COMMANDS
from clipscale.config import Config
from clipscale.config.help import find_settings
from clipscale.data.load.fill import Skip
from clipscale.resilience.leaving import mark
from clipscale.telemetry.goodput import KINDS
from clipscale.telemetry.parts import PARTS, to_columns
from clipscale.training.trainer import train

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
ELSEWHERE = {"parts.png", "best", ".heartbeat", "rollbacks.jsonl", "ranks", "stacks-rank0.txt", "wandb", "wandb.json"}
"""Files of longer runs, a best checkpoint, no locks, a divergence, several ranks, a hang, of W&B."""


def table(text: str) -> list[list[str]]:
    """The cells of the first table in the text, without its head."""
    lines = re.search(r"^\|.*\n\|[- |]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


FILES = {row[0].strip("`").rstrip("/"): row for row in table(PAGE.partition("<!-- run-folder -->")[2])}


def columns(name: str) -> list[str]:
    return re.findall(r"`(\w+)`", FILES[name][2])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps on a broken picture and a cut shard, then back to the second and on, and told to stop."""
    folder = tmp_path_factory.mktemp("documented")
    urls = write_pairs(folder / "data", 4, 8, size=16, broken={3})
    shard = folder / "data" / "0003.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    words = ["checkpoint.every_steps=2", "data.max_bad_fraction=0.5", "data.max_refused_fraction=1"]
    train(tiny_config(folder, urls, *words))
    train(tiny_config(folder, urls, *words, f"resume={folder}/run/checkpoints/step-000000002"))
    mark(str(folder / "run"), step=4, why="SIGTERM")
    return folder / "run"


def rows(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_every_file_of_a_runs_folder_is_documented_and_every_documented_file_is_there(run):
    assert {path.name for path in run.iterdir()} == FILES.keys() - ELSEWHERE


@pytest.mark.parametrize("name", ["attempts.jsonl", "faults.jsonl", "skipped.jsonl"])
def test_columns_are_documented(run, name):
    assert {tuple(row) for row in rows(run, name)} == {tuple(columns(name))}


def test_keys_are_documented(run):
    interrupted, resumed = (json.loads((run / name).read_text()) for name in ("interrupted.json", "resumed.json"))
    assert list(interrupted) == columns("interrupted.json")
    assert [*resumed, "other", *resumed["rewind"]] == columns("resumed.json")


def test_columns_of_superseded_rows_are_documented(run):
    about, *steps = rows(run, "metrics.superseded.jsonl")
    assert list(about) == columns("metrics.superseded.jsonl")
    assert about["why"] == f"went back to {run}/checkpoints/step-000000002"
    assert [row["step"] for row in steps] == [3, 4]
    assert steps[0].keys() == rows(run, "metrics.jsonl")[0].keys()
    assert columns("skipped.jsonl") == list(Skip._fields)


def test_columns_of_metrics_are_in_the_readme(run):
    cells = [row[0] for row in table((ROOT / "README.md").read_text().partition("`<run.dir>/metrics.jsonl` has a")[2])]
    known = set(re.findall(r"`([\w/]+)`", " ".join(cells)))
    found = {name for row in rows(run, "metrics.jsonl") for name in row} - set(to_columns(dict.fromkeys(PARTS, 0.0)))
    assert found <= known


def test_every_kind_of_fault_that_the_code_reports_is_explained():
    code = "\n".join(path.read_text() for path in (ROOT / "clipscale").rglob("*.py"))
    found = set(re.findall(r'(?:report|record)_fault\(\s*"(\w+)"', code))
    assert {"data", "evaluation", "error"} <= found
    assert found <= {kind for row in table(PAGE.partition("<!-- kinds -->")[2]) for kind in re.findall(r"\w+", row[0])}


def test_every_part_of_a_runs_time_is_explained():
    parts = table(PAGE.partition("## Goodput")[2])
    assert [row[0].strip("`") for row in parts] == [name for name in KINDS if name != "steps"]


# --- the tests that the page names ------------------------------------------------------------------------------------

NAMED = re.compile(r"`([\w/]+\.py)::(test_\w+)`")


def test_every_fault_has_a_row():
    rows = table(PAGE.partition("<!-- faults -->")[2])
    assert [row[0] for row in rows if row[0]] == [str(number) for number in range(1, 22)]
    assert {len(row) for row in rows} == {6}
    for _, fault, *_, tests, _ in rows:
        assert NAMED.search(tests), fault


def test_every_test_that_the_page_names_is_there():
    for name, test in set(NAMED.findall(PAGE)):
        assert re.search(rf"^ *def {test}\(", (ROOT / "tests" / name).read_text(), re.MULTILINE), (name, test)


# --- what to do when --------------------------------------------------------------------------------------------------

ADVICE = (ROOT / "docs" / "what_to_do_when.md").read_text()
WORDS = re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", ADVICE + PAGE)


def test_settings_that_are_advised_exist():
    sections = "|".join(field.name for field in fields(Config))
    found = {key for words in WORDS for key in re.findall(rf"(?<![\w./])(?:{sections})\.\w[\w.]*\w", words)}
    assert len(found) > 15
    for key in found - FILES.keys():
        assert find_settings(key), key  # UserError: there is none


def test_commands_that_are_advised_exist():
    found = {command for words in WORDS for command in re.findall(r"\bclipscale (\w+)", words)}
    assert {"status", "train", "eval", "shards", "index"} <= found <= COMMANDS.keys()
