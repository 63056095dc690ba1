"""clipscale/data/shard/counts.py and source.py: what files beside remote shards count, against what is usable."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
from http_server import Fault, Server
from loading import read, tokenize
from shards import picture, write_shard
from tiny import tiny_config

from clipscale.config.data import Data, Fetch, Select, SourceSettings
from clipscale.data.bad import BadSample
from clipscale.data.pipeline import build_pipeline
from clipscale.data.source import Source, open_source
from clipscale.errors import UserError
from clipscale.preflight.prepare import prepare_files
from clipscale.training.trainer import train

SHARDS = "{0000..0002}.tar"
SCORES = Select(score_field="similarity", min_score=0.3)


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(
        cache_dir=str(tmp_path / "cache"), fetch=Fetch(stall_seconds=2, retries=1, backoff_seconds=0.05), index_jobs=1
    )


def write_images(
    folder: Path, shards: int = 3, per_shard: int = 12, *, empty: Callable[[int, int], bool] = lambda shard, i: False
) -> None:
    """As img2dataset writes them: every fifth download failed, and is a gap in the keys; a .json beside each picture;
    `successes` counts what the tar holds. `empty(shard, i)`: a .txt without text, as of a caption that was missing."""
    for shard in range(shards):
        samples = []
        for i in (i for i in range(per_shard) if i % 5 != 3):
            caption = None if empty(shard, i) else f"caption {i} of {shard}"
            facts = {"key": f"{shard:05d}{i:04d}", "caption": caption, "similarity": i % 4 / 5, "status": "success"}
            parts = {"jpg": picture(100 * shard + i, 16 + i, 20), "json": json.dumps(facts).encode()}
            samples.append((facts["key"], parts | {"txt": (caption or "").encode()}))
        write_shard(folder / f"{shard:04d}.tar", samples)
        write_statistics(folder, shard, len(samples), count=per_shard)


def write_statistics(folder: Path, shard: int, successes: int, count: int = 12) -> None:
    facts = {"count": count, "successes": successes, "failed_to_download": count - successes, "failed_to_resize": 0}
    (folder / f"{shard:04d}_stats.json").write_text(json.dumps(facts))


def opened(urls: object, data: Data, need: str = "pairs", **settings) -> Source:
    findings, recorded = settings.pop("findings", True), settings.pop("recorded", None)
    ahead = settings.pop("ahead", False)
    source = SourceSettings(str(urls), **settings)
    return open_source("mine", source, data, need=need, findings=findings, recorded=recorded, ahead=ahead)


def read_all(source: Source) -> list[tuple[str, bytes, bytes]]:
    return [tuple(source.read(s, i)) for s in range(len(source.shards)) for i in range(source.counts[s])]


def masked(source: Source) -> list[tuple[str, str]]:
    """(key, cause) of every sample that cannot be used."""
    found = []
    for s in range(len(source.shards)):
        for i in range(source.counts[s]):
            try:
                source.read(s, i)
            except BadSample as bad:
                found.append((source.where(s, i)[1], bad.cause))
    return found


def tars(server: Server) -> list[str]:
    return sorted(path for path in server.requests if path.endswith(".tar"))


# --- remote and local are the same ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "0000.tar is declared to hold 10 samples, 8 are usable (empty caption: 2), so no declared number is"),
        ({"select": SCORES}, "select.score_field=similarity, select.min_score=0.3 decides how many samples are usable"),
        ({"select": Select(min_side=20)}, "select.min_side=20 decides"),
        ({"select": Select(max_aspect=1.2)}, "select.max_aspect=1.2 decides"),
        ({"select": Select(check="decode")}, "select.check=decode decides"),
        ({"caption": "json:caption"}, "caption=json:caption decides"),
        ({"select": Select(uids="uids.txt", uid_field="key")}, "select.uids=uids.txt decides"),
    ],
    ids=["plain", "scores", "min_side", "max_aspect", "decode", "json", "uids"],
)
def test_an_img2dataset_set_is_the_same_from_afar(server, data, tmp_path, monkeypatch, told, settings, says):
    """Score selection, empty captions, failed downloads: the same samples and the same refusals, by no manual step."""
    monkeypatch.chdir(tmp_path)
    Path("uids.txt").write_text("000000001\n000010002\n000020004\n")
    write_images(server.folder, empty=lambda shard, i: i in (2, 7))
    here = opened(server.folder / SHARDS, data, **settings)
    assert not any("indexed first" in line for line in told)
    there = opened(f"{server.url}/{SHARDS}", data, **settings)
    lines = [line for line in told if "indexed first" in line]
    assert len(lines) == 1
    assert lines[0].startswith("source 'mine': 3 remote shards to be indexed first: ")
    assert says in lines[0]
    again = opened(f"{server.url}/{SHARDS}", data, **settings)
    assert len([line for line in told if "indexed first" in line]) == 1  # all are indexed now: nothing more to tell
    for source in (there, again):
        assert (source.counts == here.counts).all()
        assert source.refused() == here.refused() != {}
        assert source.fingerprint() == here.fingerprint()
        assert read_all(source) == read_all(here)
    assert set(server.requests.values()) == {1}


def test_labels_are_not_what_is_counted(server, data):
    samples = [(f"{i}", {"jpg": picture(i, 16, 16), "txt": b"x"} | ({"cls": b"1"} if i else {})) for i in range(4)]
    write_shard(server.folder / "0000.tar", samples)
    write_statistics(server.folder, 0, 4)
    assert opened(f"{server.url}/0000.tar", data, "labelled").counts.tolist() == [3]


def test_a_run_on_img2dataset_sets_ends_well(server, tmp_path, told):
    """By score and as it is; nothing is masked, and nothing but the command was needed."""
    write_images(server.folder, per_shard=24, empty=lambda shard, i: i in (2, 7))
    urls = f"{server.url}/{SHARDS}"
    words = (f"data.cache_dir={tmp_path}/cache", "data.index_jobs=1", "train.samples=64")
    scores = "data.sources.scores.select={score_field: similarity, min_score: 0.3}"
    train(tiny_config(tmp_path, urls, *words, f"data.sources.scores.urls={urls}", scores))
    assert len([line for line in told if "3 remote shards to be indexed first" in line]) == 2
    log = (tmp_path / "run" / "run.log").read_text()
    assert "data: mine 51 pairs, scores 21 pairs" in log
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


# --- what only shows later --------------------------------------------------------------------------------------------


def test_what_a_later_shard_lacks_has_its_true_cause_and_key(server, data):
    write_images(server.folder, empty=lambda shard, i: shard == 1 and i in (2, 7))
    source = opened(f"{server.url}/{SHARDS}", data)
    assert source.counts.tolist() == [10, 10, 10]
    assert tars(server) == ["/0000.tar"]
    assert [source.where(1, i)[1] for i in (8, 9)] == ["number 8", "number 9"]
    with pytest.raises(BadSample) as error:
        source.read(1, 9)
    assert str(error.value) == "empty caption: 10 samples were declared, 8 are usable (empty caption: 2)"
    expected = [("000010002", "empty caption"), ("000010007", "empty caption")]
    assert masked(source) == expected
    assert masked(pickle.loads(pickle.dumps(source))) == expected
    assert server.requests["/0001.tar"] == 1
    shutil.rmtree(Path(data.cache_dir, "shards"))
    assert masked(opened(f"{server.url}/{SHARDS}", data)) == expected  # by the indexes that are there
    server.faults["/0001.tar"] = repeat(Fault(status=503))
    shutil.rmtree(Path(data.cache_dir, "shards"))
    with pytest.raises(OSError, match=r"0001.tar, number 9: .*503"):
        opened(f"{server.url}/{SHARDS}", data).read(1, 9)


def test_its_slot_says_so(server, data):
    write_images(server.folder, empty=lambda shard, i: shard == 1 and i == 7)
    data = replace(data, sources={"mine": SourceSettings(f"{server.url}/{SHARDS}")})
    pipe = build_pipeline(data, tokenize, image_size=16, context_length=24, seed=1, global_batch=30)
    batch = read(pipe, 1, 30)[0]
    assert batch.valid.sum() == 29
    assert [skip[1:] for skip in batch.skips] == [
        (
            *("mine", f"{server.url}/0001.tar", "000010007", "empty caption"),
            "empty caption: 10 samples were declared, 9 are usable (empty caption: 1)",
        )
    ]


@pytest.mark.parametrize("how", ["cut", "stale"])
def test_fewer_than_declared_for_another_reason(server, data, how):
    write_images(server.folder, empty=lambda shard, i: shard == 1 and i == 7)
    if how == "stale":
        write_statistics(server.folder, 1, 12)
    else:
        tar = (server.folder / "0001.tar").read_bytes()
        (server.folder / "0001.tar").write_bytes(tar[: tar.index(b"000010010.jpg")])
    source = opened(f"{server.url}/{SHARDS}", data)
    found = masked(source)
    assert found[0] == ("000010007", "empty caption")
    assert found[1:] == [(f"number {i}", "fewer than declared") for i in range(source.counts[1] - 2, source.counts[1])]
    with pytest.raises(BadSample, match="cut short at byte" if how == "cut" else "12 samples were declared, 9 are"):
        source.read(1, source.counts[1] - 1)


def test_own_counts_are_taken_at_their_word_and_the_selection_is_told(server, data, tmp_path, told):
    write_images(server.folder)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({f"{i:04d}.tar": 10 for i in range(3)}))
    source = opened(f"{server.url}/{SHARDS}", data, counts=str(counts), select=SCORES)
    assert tars(server) == []
    assert len(told) == 1
    assert f"counts '{counts}' declares 30 samples of 3 remote shards, and select.score_field=similarity" in told[0]
    lost = masked(source)
    assert [key for key, _ in lost[:3]] == ["000000000", "000000001", "000000004"]
    assert {cause for _, cause in lost} == {"score out of bounds"}
    told.clear()
    opened(f"{server.url}/{SHARDS}", data, counts=str(counts))
    assert told == []


# --- a start and the starts after it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
def test_later_starts_decide_as_the_first(server, data, late):
    """Whatever was indexed meanwhile, and with nothing but the indexes left."""
    write_images(server.folder, empty=lambda shard, i: i == 7 and (shard == 1 or not late))
    urls = f"{server.url}/{SHARDS}"
    first = opened(urls, data)
    assert first.counts.tolist() == ([10, 10, 10] if late else [9, 9, 9])
    masked(first)
    shutil.rmtree(Path(data.cache_dir, "shards"))
    before = tars(server)
    for recorded in (None, first.fingerprint()):
        assert opened(urls, data, recorded=recorded).fingerprint() == first.fingerprint()
    assert tars(server) == before
    assert max(server.requests[path] for path in before) == 1


@pytest.mark.parametrize("settings", [{}, {"caption": "json:caption"}], ids=["first shard differs", "rules"])
def test_a_run_that_began_with_declared_numbers_keeps_to_them(server, data, tmp_path, settings, told):
    """A checkpoint of a version that believed them, and one whose shards were indexed in the meantime."""
    write_images(server.folder, empty=lambda shard, i: shard == 0 and i == 7)
    urls = f"{server.url}/{SHARDS}"
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({f"{i:04d}.tar": 10 for i in range(3)}))
    began = opened(urls, data, counts=str(counts), **settings).fingerprint()
    told.clear()
    resumed = opened(urls, data, recorded=began, **settings)
    assert (resumed.counts.tolist(), resumed.fingerprint()) == ([10, 10, 10], began)
    assert tars(server) == told == []
    indexed = opened(urls, data, ahead=True, **settings)
    assert opened(urls, data, recorded=began, **settings).fingerprint() == began
    assert opened(urls, data, recorded=indexed.fingerprint(), **settings).counts.tolist() == [9, 10, 10]
    assert opened(urls, data, recorded="another", **settings).counts.tolist() == [9, 10, 10]


def test_a_checkpoint_goes_on_with_declared_numbers(server, tmp_path):
    """Its shards were indexed by hand meanwhile; without it, a new run has another order."""
    write_images(server.folder)
    urls = f"{server.url}/{SHARDS}"
    config = tiny_config(tmp_path, urls, f"data.cache_dir={tmp_path}/cache", "data.index_jobs=1")
    build = partial(build_pipeline, config.data, tokenize, image_size=16, context_length=24, seed=1, global_batch=8)
    recorded = build().identity()
    opened(urls, config.data, ahead=True)
    requests = [server.requests[path] for path in tars(server)]
    prepare_files(config, recorded)
    assert build(recorded=recorded).identity() == recorded
    assert [server.requests[path] for path in tars(server)] == requests
    assert build().identity() != recorded


# --- files of every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shard", "successes"), [(0, 9), (0, 11), (0, 0), (2, 0)])
def test_stale_statistics(server, data, shard, successes):
    """Fewer or more than the tar holds. That a shard holds nothing is always looked at: nothing would ever show it."""
    write_images(server.folder)
    write_statistics(server.folder, shard, successes)
    source = opened(f"{server.url}/{SHARDS}", data)
    assert source.counts.tolist() == [10, 10, 10]
    assert source.fingerprint() == opened(server.folder / SHARDS, data).fingerprint()


def test_an_empty_shard_is_one(server, data):
    write_images(server.folder)
    write_shard(server.folder / "0000.tar", [])
    write_statistics(server.folder, 0, 0)
    source = opened(f"{server.url}/{SHARDS}", data)
    assert source.counts.tolist() == [0, 10, 10]
    assert tars(server) == ["/0000.tar", "/0001.tar"]  # the first with a sample is looked at too


@pytest.mark.parametrize("content", ["{", "[]", '{"successes": -1}', '{"count": 12}'])
@pytest.mark.parametrize("shard", [0, 1])
def test_damaged_statistics(server, data, content, shard):
    write_images(server.folder)
    (server.folder / f"{shard:04d}_stats.json").write_text(content)
    source = opened(f"{server.url}/{SHARDS}", data)
    assert source.counts.tolist() == [10, 10, 10]
    assert read_all(source) == read_all(opened(server.folder / SHARDS, data))


@pytest.mark.parametrize("folder", ["a", "b"])
def test_one_shard_of_each_folder_is_looked_at(server, data, folder, told):
    for name in ("a", "b"):
        write_images(server.folder / name, empty=lambda shard, i, name=name: name == folder and i == 7)
    urls = f"{server.url}/{{a,b}}/{SHARDS}"
    source = opened(urls, data, findings=False)
    assert source.fingerprint() == opened(f"{server.folder}/{{a,b}}/{SHARDS}", data, findings=False).fingerprint()
    assert len(told) == 1
    assert f"6 remote shards to be indexed first: {server.url}/{folder}/0000.tar is declared to hold 10" in told[0]


def test_folders_whose_numbers_hold(server, data, told):
    write_images(server.folder / "a")
    write_images(server.folder / "b")
    for path in (server.folder / "b").glob("*.json"):
        path.unlink()
    (server.folder / "b" / "sizes.json").write_text(json.dumps({f"{i:04d}.tar": 10 for i in range(3)}))
    assert opened(f"{server.url}/{{a,b}}/{SHARDS}", data).samples == 60
    assert tars(server) == ["/a/0000.tar", "/b/0000.tar"]
    assert told == []


def test_local_remote_and_piped_shards_together(server, tmp_path, data, told):
    """Only what is remote and declared can be doubted; what is not declared is indexed first anyway."""
    write_images(server.folder, shards=4)
    write_images(tmp_path / "here", shards=1, empty=lambda shard, i: i == 7)
    data = replace(data, allow_pipe=True)
    urls = f"{tmp_path}/here/0000.tar::{server.url}/{{0000..0002}}.tar::pipe:cat {server.folder}/0003.tar"
    source = opened(urls, data, findings=False)
    assert source.counts.tolist() == [9, 10, 10, 10, 10]
    assert [bool(shard.sidecar) for shard in source.shards] == [True, False, False, False, True]
    assert told == []
    assert tars(server) == ["/0000.tar"]
    write_images(tmp_path / "here", shards=1)
    assert len(opened(urls, data, findings=False, recorded=source.fingerprint()).changes()) == 1
    os.unlink(server.folder / "0001_stats.json")
    source = opened(urls, data, findings=False, select=SCORES)
    assert [bool(shard.sidecar) for shard in source.shards] == [True] * 5
    assert len(told) == 1
    assert "4 remote shards to be indexed first: select.score_field" in told[0]


def test_a_first_shard_that_cannot_be_had_is_an_error(server, data):
    write_images(server.folder)
    os.unlink(server.folder / "0000.tar")
    with pytest.raises(UserError, match=r"shard 'http.*0000.tar': .*404"):
        opened(f"{server.url}/{SHARDS}", data)
