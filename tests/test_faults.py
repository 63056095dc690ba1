"""Every fault costs the samples that it hits, named and counted, and not a bit of any other."""

from __future__ import annotations

import json
import re
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from http_server import Fault, serve
from loading import Copy, open_loader, read, take, tokenize
from shards import picture, write_pairs, write_shard
from tiny import tiny_config

from clipscale.config.data import Data, Fetch, SourceSettings
from clipscale.data.pipeline import Pipeline, build_pipeline
from clipscale.errors import UserError
from clipscale.training.trainer import train

pytestmark = pytest.mark.timeout(120)
FETCH = Fetch(stall_seconds=0.5, retries=3, backoff_seconds=0.01, again_seconds=100.0)


def pipe_of(source: SourceSettings, batch: int, folder: Path, fetch: Fetch = FETCH) -> Pipeline:
    """Whole pictures, so that a sample looks the same at any position."""
    data = Data(
        sources={"mine": source},
        cache_dir=str(folder / "cache"),
        fetch=fetch,
        crop_scale=(1.0, 1.0),
        crop_ratio=(1.0, 1.0),
        epoch_boundary="drop",
    )
    return build_pipeline(data, tokenize, image_size=24, context_length=24, seed=5, global_batch=batch)


def by_key(batch: Copy) -> dict[str, tuple]:
    found = {}
    for i, key in enumerate(batch.keys):
        if batch.valid[i]:
            found[key] = (batch.images[i].numpy().tobytes(), tuple(batch.tokens[i].tolist()))
    return found


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_broken_pictures(tmp_path):
    """Sixteen samples; each fault in one of them."""
    whole = [picture(i, 32, 32) for i in range(16)]
    scan = whole[5].index(b"\xff\xda")
    faults = {
        2: whole[2][: len(whole[2]) * 2 // 3],
        5: whole[5][: scan + 30] + bytes(byte ^ 0x55 for byte in whole[5][scan + 30 : -2]) + whole[5][-2:],
        7: b"",
        9: whole[9][:4] + b"\0" * 60 + whole[9][64:],
        11: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    batches = []
    for name, pictures in (("clean", {}), ("faulty", faults)):
        samples = [(f"{i:02d}", {"jpg": pictures.get(i, whole[i]), "txt": b"number %d" % i}) for i in range(16)]
        urls = str(write_shard(tmp_path / f"{name}.tar", samples))
        batches.append(read(pipe_of(SourceSettings(urls=urls), 16, tmp_path), 1, 16)[0])
    clean, faulty = batches
    assert clean.keys == faulty.keys
    assert {int(skip.key) for skip in faulty.skips} == set(faults)
    assert all(skip.shard == f"{tmp_path}/faulty.tar" for skip in faulty.skips)
    causes = {int(skip.key): skip.cause for skip in faulty.skips}
    assert causes[11] == "not JPEG, PNG or WebP"
    assert causes[2] == causes[5] == causes[9] == "broken picture"
    good = faulty.valid
    assert good.sum() == 16 - len(faults)
    assert torch.equal(faulty.images[good], clean.images[good])
    assert torch.equal(faulty.tokens[good], clean.tokens[good])


# --- tars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "samples", "says"),
    [
        ("in a member", 5, r"cut short at byte \d+, inside 000035.jpg"),
        ("at a boundary", 5, r"cut short at byte \d+: no end-of-archive marker"),
        ("bad header", 5, r"bad tar header at byte \d+: checksum does not match"),
        ("empty", 0, r"cut short at byte 0"),
    ],
)
def test_damaged_tars(tmp_path, fault, samples, says, told):
    """Three shards of ten; the damage is at the sixth sample of the last."""
    urls = write_pairs(tmp_path, 4, 10, size=32)
    clean = by_key(read(pipe_of(SourceSettings(urls=urls), 40, tmp_path), 1, 40)[0])
    shard = tmp_path / "0003.tar"
    data = shard.read_bytes()
    header = data.index(b"000035.jpg")
    changed = {
        "in a member": data[: header + 700],
        "at a boundary": data[:header],
        "bad header": data[:header] + b"?" + data[header + 1 :],
        "empty": b"",
    }[fault]
    shard.write_bytes(changed)
    usual = {"crop_scale": (1, 1), "crop_ratio": (1, 1), "max_refused_fraction": 1}
    data = Data(sources={"mine": SourceSettings(urls=urls)}, **usual)
    total = 30 + samples
    pipe = build_pipeline(data, tokenize, image_size=24, context_length=24, seed=5, global_batch=total)
    assert pipe.sources[0].samples == total
    batch = read(pipe, 1, total)[0]
    found = by_key(batch)
    assert not batch.skips
    assert len(found) == total
    assert found.items() <= clean.items()
    damage = [line for line in told if "is damaged" in line]
    assert len(damage) == 1
    assert re.search(says, damage[0])
    assert f"{shard} is damaged, {samples} samples are usable" in damage[0]


# --- the network ------------------------------------------------------------------------------------------------------


def declared(folder: Path, url: str, shards: int, per_shard: int) -> SourceSettings:
    counts = folder / "counts.json"
    counts.write_text(json.dumps({f"{i:04d}.tar": per_shard for i in range(shards)}))
    return SourceSettings(urls=f"{url}/{{0000..{shards - 1:04d}}}.tar", counts=str(counts))


def test_faults_of_the_network(tmp_path):
    """Seven remote shards of ten; what mends itself costs nothing, what does not costs its shard."""
    write_pairs(tmp_path / "data", 7, 10, size=32)
    with serve(tmp_path / "data") as server:
        source = declared(tmp_path, server.url, 7, 10)
        clean = read(pipe_of(source, 70, tmp_path / "one"), 1, 70)[0]
        assert not clean.skips
        server.faults = {
            "/0001.tar": repeat(Fault(status=404)),
            "/0002.tar": [Fault(status=503)] * 3,
            "/0003.tar": [Fault(send_bytes=3000)],
            "/0004.tar": repeat(Fault(send_bytes=3000, then="stall")),
            "/0005.tar": repeat(Fault(before="stall")),
            "/0006.tar": [Fault(before="close"), Fault(send_bytes=100, then="stall")],
        }
        faulty = read(pipe_of(source, 70, tmp_path / "two"), 1, 70)[0]
        lost = {int(skip.shard[-8:-4]) for skip in faulty.skips}
        assert lost == {1, 4, 5}
        assert len(faulty.skips) == 30
        for skip in faulty.skips:
            number = int(skip.shard[-8:-4])
            assert skip.shard == f"{server.url}/{number:04d}.tar"
            assert skip.cause == "cannot be read"
            assert skip.shard in skip.detail
            assert ("404" if number == 1 else "0.5 s") in skip.detail
        assert server.requests["/0001.tar"] == 2  # once for each pipeline: the failure is remembered
        assert server.requests["/0004.tar"] == 1 + 1 + FETCH.retries
    good = faulty.valid
    assert good.sum() == 40
    assert (faulty.positions == clean.positions).all()
    assert torch.equal(faulty.images[good], clean.images[good])
    assert torch.equal(faulty.tokens[good], clean.tokens[good])


def test_a_run_over_remote_shards_stops_with_the_table_when_too_much_is_lost(tmp_path):
    write_pairs(tmp_path / "data", 4, 8, size=16)
    with serve(tmp_path / "data") as server:
        source = declared(tmp_path, server.url, 4, 8)
        words = (f"data.sources.mine.counts={source.counts}", f"data.cache_dir={tmp_path}/cache", "data.loader=inline")
        fetch = ("data.fetch.stall_seconds=0.5", "data.fetch.retries=1", "data.fetch.backoff_seconds=0.01")
        train(tiny_config(tmp_path, source.urls, *words, *fetch))
        server.faults["/0002.tar"] = repeat(Fault(status=500))
        words = (*words[:1], f"data.cache_dir={tmp_path}/other-cache", f"run.dir={tmp_path}/again")
        with pytest.raises(UserError, match=r"of 32 samples could not be used \(mine: cannot be read: 8\)"):
            train(tiny_config(tmp_path, source.urls, *words, *fetch))
    log = (tmp_path / "again" / "run.log").read_text()
    assert "8  mine: cannot be read" in log
    assert f"{server.url}/0002.tar" in log
    shard, end = map(json.loads, (tmp_path / "again" / "faults.jsonl").read_text().splitlines())
    assert (shard["kind"], end["kind"]) == ("data", "error")  # a row for the shard, not for each sample
    assert re.match(rf"shard {server.url}/0002\.tar, first at position \d+: .*HTTP 500", shard["what"])


def test_an_outage_costs_what_is_read_meanwhile_and_no_more(tmp_path, told):
    """A server that fails, then serves error pages, then heals: each sample masked meanwhile is counted, and after the
    first one that could be read none is."""
    write_pairs(tmp_path / "data", 4, 8, size=16)
    outage = [Fault(status=503)] * 5 + [Fault(body=b"<html>busy</html>")] * 4
    fetch = Fetch(retries=1, backoff_seconds=0.01, again_seconds=0.001)
    with serve(tmp_path / "data") as server:
        pipe = pipe_of(declared(tmp_path, server.url, 4, 8), 8, tmp_path, fetch)
        server.faults["/0002.tar"] = outage
        loader, batches = open_loader(pipe, 8, threads=1), []
        while len(told) < 2:  # it fails, it is back
            batches.append(take(loader))
        batches += [take(loader) for _ in range(12)]
        loader.close()
        assert server.requests["/0002.tar"] == len(outage) + 1
    skips = [skip for batch in batches for skip in batch.skips]
    assert {(skip.shard, skip.cause) for skip in skips} == {(f"{server.url}/0002.tar", "cannot be read")}
    for cause in ("HTTP 503 Service Unavailable", "it is no tar: it begins with b'<html>busy"):
        assert any(cause in skip.detail for skip in skips)
    begin, end = told
    assert "0002.tar fails, its samples are masked until it is back: HTTP 503" in begin
    assert re.search(rf"0002\.tar is read again after \d+ s; samples masked meanwhile: {len(skips)}$", end)
    positions = np.arange(len(batches) * 8)
    of_the_shard = positions[pipe.locate(positions)[2] == 2]
    assert sorted(skip.position for skip in skips) == of_the_shard[: len(skips)].tolist()
    assert 0 < len(skips) < len(of_the_shard)


def test_the_loader_process_reads_remote_shards(tmp_path):
    write_pairs(tmp_path / "data", 4, 10, size=32)
    with serve(tmp_path / "data") as server:
        pipe = pipe_of(declared(tmp_path, server.url, 4, 10), 20, tmp_path)
        here = read(pipe, 4, 20)
        loader = open_loader(pipe, 20, mode="process")
        there = [take(loader) for _ in range(4)]
        loader.close()
        assert [batch.chain() for batch in here] == [batch.chain() for batch in there]
        assert max(server.requests.values()) == 1


def test_a_cache_too_small_for_the_order_is_told(tmp_path):
    """Eight shards: one block a stream wants them all, two streams of one shard want three and one to be sure."""
    write_pairs(tmp_path / "data", 8, 10, size=32)
    urls = "{url}/{{0000..0007}}.tar"
    with serve(tmp_path / "data") as server:
        size = (tmp_path / "data" / "0000.tar").stat().st_size
        for streams, block, wanted in ((1, None, 8), (2, 1, 4)):
            for shards, enough in ((wanted - 1, False), (wanted, True)):
                data = Data(
                    sources={"mine": SourceSettings(urls=urls.format(url=server.url))},
                    cache_dir=str(tmp_path / "cache"),
                    cache_bytes=shards * size + size // 2,
                    streams=streams,
                    block_shards=block,
                )
                pipe = build_pipeline(data, tokenize, image_size=24, context_length=24, seed=5, global_batch=20)
                told = pipe.sources[0].cache_shortage(pipe.orders[0].block_samples())
                assert (told == "") == enough
                assert enough or f"reads about {wanted} shards by turns" in told
        batch = read(pipe, 1, 20)[0]
        assert batch.valid.all()
