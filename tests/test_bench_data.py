"""`clipscale bench data` as a person runs it, tiny; its words; what the status says."""

import json
import subprocess
import sys

import pytest
from bench_words import data_bench, printed_by

from clipscale import __version__
from clipscale.bench.common import turns
from clipscale.bench.data import bench, photos, soak, stages, transport
from clipscale.bench.data import ours as ours_module
from clipscale.bench.data.baseline import Baseline
from clipscale.bench.data.bench import bars
from clipscale.bench.data.options import PARTS
from clipscale.bench.data.report import tables
from clipscale.bench.data.stages import STAGES
from clipscale.cli import main

_SMALL_BASELINE = {"sample_shuffle": 8, "sample_shuffle_initial": 4}


@pytest.fixture(scope="module")
def small():
    """Everything a hundred times smaller than a person's run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photos, "photo", lambda number: photos._tiny_pictures()[number % 256])
        patch.setitem(photos._PER_SHARD, "photos", 16)
        patch.setitem(photos._PER_SHARD, "tiny", 100)
        patch.setattr(ours_module, "STEP", 32)
        patch.setattr(ours_module, "CHUNK", 16)
        patch.setattr(ours_module, "SLOTS_PER_JOB", 16)
        patch.setattr(bench, "Baseline", lambda *args, **options: Baseline(*args, **options, **_SMALL_BASELINE))
        patch.setattr(bench, "order_rows", lambda: [dict(_ORDER)])
        patch.setattr(bench, "_TINY_SAMPLES", 200)
        patch.setattr(bench, "_TRANSPORT_PICTURES", 16)
        patch.setattr(turns, "settle", lambda: None)
        patch.setattr(stages, "_WARM_PICTURES", 32)
        yield patch


_ORDER = {"layout": "default", "slice": 16384, "setup_ms": 4.0, "slice_cold_ms": 5.0, "slice_warm_ms": 3.0}
_ORDER |= {"memory_bytes": 2**20, "batch_shards": 300, "rank_shards": 30, "neighbours_over_chance": 1.25}


@pytest.fixture(scope="module")
def result(small, tmp_path_factory):
    """Folder, command and terminal output of one run with everything in it."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["bench", "data", "--samples", "64", "--rounds", "2", "--seconds", "0.05", "--batch", "8", "--workers", "2"]
    words += ["--image-size", "16", "--soak", "1000", "--model-rate", "500,vit=3000"]
    words += ["--cache-dir", str(folder / "cache"), "--output", str(folder), "--name", "small"]
    return folder, words, printed_by(words)


@pytest.mark.slow
def test_json_has_every_number_and_what_made_it(result):
    folder, words, _ = result
    document = json.loads((folder / "small.json").read_text())
    assert document["finished"]
    assert document["command"] == f"clipscale {' '.join(words)}"
    assert document["stamp"]["clipscale"] == __version__
    assert document["arguments"]["model_rates"] == {"500 images/s": 500.0, "vit": 3000.0}
    assert "64 synthetic photos in 4 shards" in document["notes"][0]
    assert "webdataset 1" in document["notes"][1]
    speed = {row["contestant"]: row for row in document["speed"]["rows"]}
    assert [*speed] == ["open_clip recipe", "open_clip recipe, uint8", "clipscale", "clipscale, inline"]
    for row in speed.values():
        for quantity in ("images_per_second", "cpu_us"):
            assert len(row[quantity]["all"]) == row[quantity]["repeats"] == 2
            first, second = row[quantity]["all"]
            one, two = speed["open_clip recipe"][quantity]["all"]
            assert row[f"{quantity}_to_recipe"] == pytest.approx((first / one + second / two) / 2)
    assert list(document["stages"]) == ["open_clip recipe", "clipscale"]
    for parts in document["stages"].values():
        assert set(parts) <= set(STAGES)
        assert all(value > 0 for value in parts.values())
    assert {"read", "decode", "crop and resize", "tokenize"} <= set.intersection(*map(set, document["stages"].values()))
    assert document["transport"]["bytes"] == 16 * 3 * 16 * 16
    assert {(row["shards"], row["hash"], row["samples"]) for row in document["index"]} == {
        *(("tiny members", "crc32", 200), ("tiny members", "sha256", 200)),
        *(("these", "crc32", 64), ("these", "sha256", 64)),
    }
    points = document["soak"]["points"]
    assert len(points) == 10
    assert points[-1]["samples"] >= 1000
    assert all(
        point[process]["resident_bytes"] > 2**20 for point in points for process in ("loader", "training process")
    )


@pytest.mark.slow
def test_nothing_is_left_but_the_shards_of_the_next_run(result):
    folder, *_ = result
    left = {path.name for path in (folder / "cache" / "bench").iterdir()}
    assert left == {"photos-64-v1", "tiny-200-v1"}


@pytest.mark.slow
def test_tables_are_the_same_on_the_terminal_and_in_markdown(result):
    folder, words, printed = result
    text = (folder / "small.md").read_text()
    document = json.loads((folder / "small.json").read_text())
    assert f"clipscale {' '.join(words)}" in text
    assert "![small](small.png)" in text
    assert (folder / "small.png").read_bytes().startswith(b"\x89PNG")
    found = tables(document)
    assert len(found) == 8, "speed, cores, stages, transport, index, order, soak, bars"
    for table in found:
        assert f"## {table.title}" in text
        assert table.title in printed
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in text
            assert "  ".join(row).split() in [line.split() for line in printed.splitlines()]
    cores = next(table for table in found if table.title.startswith("Cores"))
    rate = document["speed"]["rows"][2]["images_per_second"]["median"] / document["speed"]["cores"]
    assert [row[0] for row in cores.rows] == ["500 images/s", "vit, 3000 images/s"]
    assert cores.rows[1][3:] == [f"{3000 / rate:.1f}", f"{6000 / rate:.1f}"]


@pytest.mark.slow
def test_picture_is_redrawn(result, tmp_path, capsys):
    folder, *_ = result
    (tmp_path / "small.json").write_bytes((folder / "small.json").read_bytes())
    assert main(["bench", "plot", str(tmp_path / "small.json")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "small.png")]
    assert (tmp_path / "small.png").read_bytes() == (folder / "small.png").read_bytes()


def test_given_shards_and_one_part(small, tmp_path, capsys):
    urls = photos.photo_shards(tmp_path, 32)
    words = ["--urls", urls, "--parts", "index", "--cache-dir", str(tmp_path), "--output", str(tmp_path), "--name", "x"]
    assert main(["bench", "data", *words]) == 0
    document = json.loads((tmp_path / "x.json").read_text())
    assert "32 samples in 2 shards" in document["notes"][0]
    assert [name for name in PARTS if document[name]] == ["index"]
    assert "no pictures: they show the parts speed and stages" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_that_grows_is_told_by_the_status(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "BOUND_BYTES", 2**20)
    kept = []
    receive = soak.receive
    monkeypatch.setattr(soak, "receive", lambda batch: (kept.append(b"x" * 2**22), receive(batch)))
    words = ["--samples", "32", "--parts", "none", "--soak", "1000", "--cache-dir", str(tmp_path), "--name", "x"]
    assert main(["bench", "data", *words, "--output", str(tmp_path)]) == 1
    document = json.loads((tmp_path / "x.json").read_text())
    assert not document["soak"]["flat"]
    assert "not flat within 1.0 MiB" in capsys.readouterr().out


# --- bars -------------------------------------------------------------------------------------------------------------


def measured(*, speed: float, cpu: float, transport: float) -> dict:
    row = {"contestant": "clipscale", "images_per_second_to_recipe": speed, "cpu_us_to_recipe": cpu}
    return {
        "speed": {"rows": [row]},
        "transport": {"ratio": {"median": transport}},
        "order": [_ORDER],
        "soak": None,
    }


@pytest.mark.parametrize(
    ("numbers", "missed"),
    [
        ({"speed": 3.0, "cpu": 0.33, "transport": 0.33}, 0),
        ({"speed": 2.9, "cpu": 0.33, "transport": 0.33}, 1),
        ({"speed": 3.0, "cpu": 0.34, "transport": 0.33}, 1),
        ({"speed": 9.0, "cpu": 0.1, "transport": 0.34}, 1),
        ({"speed": 1.0, "cpu": 1.0, "transport": 1.0}, 3),
    ],
)
def test_bars(numbers, missed):
    assert sum(not bar["met"] for bar in bars(measured(**numbers))) == missed


@pytest.mark.parametrize(("check", "status"), [([], 0), (["--check"], 1)])
def test_a_bar_that_is_missed_is_told_by_the_status_where_asked(small, tmp_path, monkeypatch, check, status):
    for part, value in measured(speed=2.0, cpu=0.1, transport=0.1).items():
        monkeypatch.setattr(bench, f"measure_{part}", lambda *_, value=value, **__: value, raising=False)
    monkeypatch.setattr(bench, "tables", lambda document: [])
    monkeypatch.setattr(bench, "markdown", lambda document, pictures: "")
    words = ["--samples", "32", "--parts", "speed,transport", "--cache-dir", str(tmp_path), "--output", str(tmp_path)]
    assert main(["bench", "data", *words, "--name", "x", *check]) == status


# --- words ------------------------------------------------------------------------------------------------------------


def test_what_is_typed_arrives():
    plain = data_bench()
    assert (plain.urls, plain.samples, plain.parts, plain.batch, plain.workers) == (None, 8192, PARTS, 64, None)
    assert (plain.soak, plain.check) == (0, False)
    assert [*plain.model_rates.values()] == [500, 1000, 2000, 4000]
    words = ["--soak", "2m", "--parts", "none", "--workers", "3"]
    full = data_bench(*words)
    assert (full.soak, full.parts, full.workers) == (2 * 2**20, (), 3)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--samples 3", "--samples=3: at least 16 are needed"),
        ("--samples x", "--samples=x: not a size"),
        ("--parts speed,fast", "--parts=fast: unknown; choose from speed, stages, transport, index, order"),
        ("--parts none", "--parts=none without --soak: there is nothing to measure; name a part"),
        ("--parts index --check", "--check needs the parts speed and transport; add speed, transport to --parts"),
        ("--model-rate vit=fast", "--model-rate=vit=fast: must be images/s above 0, or name=images/s"),
        ("--model-rate -5", "--model-rate=-5: must be images/s above 0"),
        ("--batch 0", "--batch=0: must be a whole number of at least 1"),
        ("--seconds 0", "--seconds=0: must be a number above 0"),
        ("--soak many", "--soak=many: not a size"),
        ("--name a/b", "--name=a/b: a file name of letters, digits"),
        ("--urls https://host/x.tar", "--urls=https://host/x.tar: give local shards"),
        ("--urls nowhere.tar", "shard 'nowhere.tar' is not a file"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert main(["bench", "data", *words.replace("--model-rate -5", "--model-rate=-5").split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"clipscale: error: {line}")
    assert error.count("\n") == 1


def test_mistakes_are_answered_without_torch():
    code = (
        "import sys\n"
        "from clipscale.cli import main\n"
        "assert main(['bench', 'data', '--parts', 'x']) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_transport_names_are_those_of_its_rows():
    names = [one.name for one in _closed(transport._suppliers((4, 3, 8, 8)))]
    suffixed = [name + suffix for suffix in ("", transport.READ) for name in (transport.DATALOADER, transport.BLOCKS)]
    assert names == [*suffixed, transport.NUMBER]


def _closed(contestants):
    for one in contestants:
        one.close()
        yield one
