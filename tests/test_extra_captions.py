"""Captions in extra shards, joined to a source's samples by key or uid."""

import json
import os
from pathlib import Path

import pytest
from loading import LENGTH, read, tokenize
from shards import picture, write_shard

from clipscale.cli import main
from clipscale.config import Validation
from clipscale.config.data import Data, Extra, SourceSettings
from clipscale.config.load import config_from_yaml, dump_config, load_config
from clipscale.data.pipeline import Pipeline, build_pipeline
from clipscale.data.source import Source, open_source
from clipscale.errors import UserError

JPEG = picture(0, 8, 8)
WEIGHTS = {"txt": 1.0, "extra:txt": 1.0, "extra:json:long.list": 2.0}
SHARDS, PER_SHARD, BATCH = 2, 12, 8


def facts(i: int, **more) -> bytes:
    return json.dumps({"uid": f"u{i}", **more}).encode()


def recaption(i: int) -> dict[str, bytes]:
    return {"json": facts(i, long={"list": [f"a{i}", f"b{i}"]}), "txt": f"e{i}".encode()}


def write(folder: Path, key: str = "{:03d}") -> dict[str, str]:
    """Shards and their extra ones, whose samples lie in another order; the first of each shard has no extra .txt, the
    six last have none at all."""
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        own = [(f"{i:03d}", {"jpg": JPEG, "txt": f"t{i}".encode(), "json": facts(i)}) for i in numbers]
        extra = [(key.format(i), recaption(i)) for i in reversed(numbers[:6])]
        del extra[-1][1]["txt"]
        write_shard(folder / f"{shard}.tar", own)
        write_shard(folder / f"recap-{shard}.tar", [*extra, ("stranger", recaption(999))])
    return {"urls": f"{folder}/{{0..{SHARDS - 1}}}.tar", "extra": f"{folder}/recap-{{0..{SHARDS - 1}}}.tar"}


@pytest.fixture(scope="module")
def by_key(tmp_path_factory) -> dict[str, str]:
    return write(tmp_path_factory.mktemp("key"))


def settings(places: dict[str, str], uid_field: str = "__key__", weights: dict[str, float] = WEIGHTS) -> SourceSettings:
    extra = Extra(places["extra"], uid_field)
    return SourceSettings(places["urls"], captions="random", caption_weights=weights, extra=extra)


def opened(places: dict[str, str], **how) -> Source:
    return open_source("mine", settings(places, **how), Data(), need="pairs")


def all_captions(source: Source) -> list[set[str]]:
    """Of each sample, all that it can give."""
    found = []
    for shard, count in enumerate(source.counts.tolist()):
        for index in range(count):
            samples = [source.read(shard, index, draw / 8) for draw in range(8)]
            assert {sample.image for sample in samples} == {JPEG}
            found.append({source.caption(one.note, draw, one.which) for one in samples for draw in range(2)})
    return found


EXPECTED = [
    {f"t{i}"} | ({f"a{i}", f"b{i}"} if i % PER_SHARD < 6 else set()) | ({f"e{i}"} if 0 < i % PER_SHARD < 6 else set())
    for i in range(SHARDS * PER_SHARD)
]


def test_they_are_joined_by_key(by_key, caplog):
    source = open_source("mine", settings(by_key), Data(), need="pairs", findings=True)
    assert all_captions(source) == EXPECTED
    assert "14 samples lack the caption extra:txt, of 24; theirs is drawn from the others" in caplog.text
    assert "12 samples lack the caption extra:json:long.list, of 24" in caplog.text
    again = open_source("mine", settings(by_key), Data(), need="pairs", track=lambda *_: pytest.fail("it is indexed"))
    assert again.fingerprint() == source.fingerprint()


def test_they_are_joined_by_a_field_of_the_json(tmp_path):
    places = write(tmp_path, key="x{:03d}")
    assert all_captions(opened(places, uid_field="uid")) == EXPECTED
    nothing = opened(places)  # no key is the same
    assert all_captions(nothing) == [{f"t{i}"} for i in range(SHARDS * PER_SHARD)]
    assert nothing.shards[0].captions == {"txt": 12, "extra:txt": 0, "extra:json:long.list": 0}


def test_each_set_of_extra_shards_has_an_index_of_its_own(tmp_path, monkeypatch):
    places, other = write(tmp_path / "a"), write(tmp_path / "b", key="x{:03d}")
    mixed = {**places, "extra": other["extra"]}
    assert all_captions(opened(places)) == EXPECTED
    assert all_captions(opened(mixed)) != EXPECTED
    monkeypatch.chdir(tmp_path / "a")
    relative = settings({**places, "extra": "recap-{0..1}.tar"})
    for source in (relative, settings(mixed)):
        open_source("mine", source, Data(), need="pairs", track=lambda *_: pytest.fail("it is indexed"))


def built(places: dict[str, str], **how) -> Pipeline:
    data = Data(sources={"mine": settings(places)}, streams=2)
    ours = {"image_size": 8, "context_length": LENGTH, "seed": 5, "global_batch": BATCH}
    return build_pipeline(data, tokenize, **ours, **how)


def test_ranks_and_resumes_change_nothing(by_key):
    def tokens(pipe: Pipeline, steps: int, start: int = 0, **how) -> dict[int, list[int]]:
        batches = read(pipe, steps, BATCH, start * BATCH, **how)
        assert all(batch.valid.all() for batch in batches)
        return {int(p): row.tolist() for batch in batches for p, row in zip(batch.positions, batch.tokens, strict=True)}

    pipe = built(by_key)
    expected = tokens(pipe, 6)
    assert len({chr(row[1]) for row in expected.values()}) == 4  # t, e, a, b
    for world in (2, 4):
        ranks = [tokens(pipe, 6, world=world, rank=rank, chunk=2) for rank in range(world)]
        assert {position: row for found in ranks for position, row in found.items()} == expected
    recorded = json.loads(json.dumps(pipe.identity()))
    assert tokens(built(by_key, recorded=recorded), 2, start=4).items() <= expected.items()


def test_an_extra_shard_that_changes(tmp_path):
    """Its time alone: indexed again, and the same. Its bytes: other content. While it is read: never another text."""
    places = write(tmp_path)
    source, recap = opened(places), tmp_path / "recap-0.tar"
    recorded = json.loads(json.dumps(built(places).identity()))
    os.utime(recap, ns=(1, 1))
    with pytest.raises(OSError, match=r"its extra shard .*recap-0.tar changed since this run began"):
        source.read(0, 3, 0.9)
    assert source.read(0, 3).note == b"t3"  # its own is not touched by that
    assert opened(places).fingerprint() == source.fingerprint()
    recap.write_bytes(recap.read_bytes().replace(b"e3", b"E3"))
    assert all_captions(opened(places))[3] == {"t3", "E3", "a3", "b3"}
    with pytest.raises(UserError, match="content of mine"):
        built(places, recorded=recorded)


# --- what cannot be joined --------------------------------------------------------------------------------------------


def test_shards_that_do_not_go_together(by_key, tmp_path):
    for extra, message in [
        (by_key["extra"].replace("{0..1}", "0"), r"extra.urls names 1 shard and urls 2: they go together one to one"),
        ("https://host/recap-{0..1}.tar", r"extra shard 'https://host/recap-0.tar' is not local; fetch"),
        (f"{tmp_path}/none-{{0..1}}.tar", r"none-0.tar' is not a file"),
    ]:
        with pytest.raises(UserError, match=message) as told:
            opened({**by_key, "extra": extra})
        assert "\n" not in str(told.value)


def test_samples_that_occur_twice(tmp_path):
    places = write(tmp_path)
    twice = [("003", recaption(3)), ("004", recaption(4)), ("003", recaption(5))]
    write_shard(tmp_path / "recap-1.tar", twice)
    with pytest.raises(UserError, match=r"1.tar': its extra shard .*recap-1.tar holds '003' twice, by which extra cap"):
        opened(places)
    own = [("a", {"jpg": JPEG, "txt": b"a", "json": facts(1)}), ("b", {"jpg": JPEG, "txt": b"b", "json": facts(1)})]
    write_shard(tmp_path / "1.tar", own)
    with pytest.raises(UserError, match=r"1.tar': it holds 'u1' twice, by which extra captions are joined"):
        opened(places, uid_field="uid")


def test_a_damaged_extra_shard(tmp_path):
    places = write(tmp_path)
    recap = tmp_path / "recap-0.tar"
    recap.write_bytes(recap.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"its extra shard .*recap-0.tar is damaged: cut short at byte 2000"):
        opened(places)


def test_extra_captions_that_no_sample_has(tmp_path):
    with pytest.raises(UserError, match="none of its 24 usable samples has the caption extra:txt"):
        built(write(tmp_path, key="x{:03d}"))


# --- settings ---------------------------------------------------------------------------------------------------------

MINE = "data.sources.mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption_weights={txt: 1, extra:txt: 1}"], "caption_weights has extra:txt, and its extra is null; name the"),
        (["extra.urls=b.tar"], "extra is set, and its caption_weights has no caption of it"),
        (
            ["extra.urls=b.tar", "caption_weights={txt: 1}"],
            "extra is set, and its caption_weights has no caption of it",
        ),
        (["extra.urls=b.tar", "caption_weights={extra:txt: 1}"], "has captions of the extra shards only; name one of"),
        (["extra.urls=b.tar", "caption_weights={txt: 1, 'extra:': 1}"], "caption_weights='' must be a member's suffix"),
        (["extra.uid_field=uid"], "data.sources.mine.extra.urls must be set"),
    ],
)
def test_bad_settings_are_one_clear_line(words, message):
    with pytest.raises(UserError) as told:
        load_config([f"{MINE}.urls=a.tar", *(f"{MINE}.{word}" for word in words)])
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_stored_config_and_a_validation():
    """A validation reads its own shards alone."""
    words = ["extra.urls=b.tar", "caption_weights={extra:txt: 2, json:a: 1, txt: 1}"]
    config = load_config([f"{MINE}.urls=a.tar", *(f"{MINE}.{word}" for word in words)])
    assert config_from_yaml(dump_config(config)) == config
    held_out = config.held_out(Validation(urls="v.tar"))
    assert held_out == SourceSettings("v.tar", caption_weights={"json:a": 1.0, "txt": 1.0})


def test_the_index_command_makes_the_index_of_a_run(by_key, tmp_path, capsys):
    words = ["--index-dir", str(tmp_path), "--extra", by_key["extra"]]
    assert main(["index", by_key["urls"], *words, *(f"--caption={name}" for name in WEIGHTS)]) == 0
    assert "14 samples lack the caption extra:txt" in " ".join(capsys.readouterr().out.split())
    data = Data(index_dir=str(tmp_path))
    found = open_source("x", settings(by_key), data, need="pairs", track=lambda *_: pytest.fail("it is indexed"))
    assert found.samples == 24
