"""clipscale/data/pipeline.py: what a position means, what may change at a resume, and what is refused at the start."""

import json
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shards import write_pairs, write_shard

from clipscale.config.data import AugmentSettings, Data, Select, SourceSettings
from clipscale.data.order.order import rank_positions
from clipscale.data.pipeline import Pipeline, build_pipeline
from clipscale.data.tokenize import build_tokenizer
from clipscale.errors import UserError

TOKENIZE = build_tokenizer(None, 8)
SIZES = {"a": (2, 12), "b": (3, 20), "c": (1, 30)}  # shards, samples of each


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {name: write_pairs(folder / name, *size, size=8, seed=ord(name)) for name, size in SIZES.items()}


def build(sources: dict[str, SourceSettings], batch: int = 8, **kwargs) -> Pipeline:
    ours = {"image_size": 16, "context_length": 8, "seed": 5, "position": 0, "recorded": None}
    ours |= {key: kwargs.pop(key) for key in ours.keys() & kwargs.keys()}
    tokenize = kwargs.pop("tokenize", TOKENIZE)
    return build_pipeline(Data(sources=sources, **kwargs), tokenize, global_batch=batch, **ours)


def weighted(urls: dict[str, str], **weights: float) -> dict[str, SourceSettings]:
    return {name: SourceSettings(urls=urls[name], weight=weight) for name, weight in weights.items()}


def saved(pipe: Pipeline) -> dict:
    return json.loads(json.dumps(pipe.identity()))


def places(pipe: Pipeline, start: int, stop: int) -> list[tuple[str, int, int, int]]:
    """(source, epoch, shard, index) of each position."""
    source, *rest = (column.tolist() for column in pipe.locate(np.arange(start, stop)))
    return [(pipe.sources[i].name, *place) for i, *place in zip(source, *rest, strict=True)]


# --- weights that change at a resume ----------------------------------------------------------------------------------


def assert_whole_epochs(found: list[tuple[str, int, int, int]]) -> None:
    """Each source's epochs follow each other and hold each of its samples once; the last one is under way."""
    assert max(Counter(found).values()) == 1
    for name, (shards, per_shard) in SIZES.items():
        epochs = [epoch for of, epoch, _, _ in found if of == name]
        assert epochs == sorted(epochs)
        assert {Counter(epochs)[epoch] for epoch in range(epochs[-1])} == {shards * per_shard}


def test_weights_change_at_a_resume_and_every_epoch_stays_whole(urls, told):
    found: list[tuple[str, int, int, int]] = []
    position, recorded = 0, None
    plan = [
        ({"a": 1.0, "b": 3.0}, 14_327),
        ({"a": 1.0, "b": 1.0}, 20_011),  # other weights
        ({"a": 1.0, "b": 1.0, "c": 2.0}, 20_750),  # a source more
        ({"a": 1.0, "b": 0.0, "c": 2.0}, 41_000),  # one switched off
        ({"a": 2.0, "b": 0.0, "c": 4.0}, 43_003),  # the same in other numbers
        ({"a": 1.0, "b": 2.0, "c": 2.0}, 90_000),  # and on again
    ]
    for weights, stop in plan:
        pipe = build(weighted(urls, **weights), position=position, recorded=recorded)
        found += places(pipe, position, stop)
        position, recorded = stop, saved(pipe)
    assert_whole_epochs(found)
    assert [segment["start"] for segment in recorded["mixture"]] == [0, 14_327, 20_011, 20_750, 43_003]
    assert told == [
        "mixture: a 50.00%, b 50.00% from position 14,327 on; a 25.00%, b 75.00% before",
        "mixture: a 25.00%, b 25.00%, c 50.00% from position 20,011 on; a 50.00%, b 50.00% before",
        "mixture: a 33.33%, c 66.67% from position 20,750 on; a 25.00%, b 25.00%, c 50.00% before",
        "mixture: a 20.00%, b 40.00%, c 40.00% from position 43,003 on; a 33.33%, c 66.67% before",
    ]
    shares = Counter(name for name, *_ in found[-40_000:])
    assert all(abs(shares[name] - share) < 10_000 * 0.01 for name, share in {"a": 8000, "b": 16_000}.items())


def test_positions_before_a_change_keep_their_meaning(urls):
    first = build(weighted(urls, a=1, b=3))
    second = build(weighted(urls, b=1, a=1), position=12_345, recorded=saved(first))
    assert places(second, 0, 12_345) == places(first, 0, 12_345)
    assert places(second, 12_345, 13_000) != places(first, 12_345, 13_000)
    older = build(weighted(urls, a=1, b=3), position=9_000, recorded=saved(second))  # an older place, the newer journal
    assert saved(older)["mixture"] == saved(first)["mixture"]
    assert places(older, 9_000, 20_000) == places(first, 9_000, 20_000)


def test_one_source_becomes_a_mixture_and_one_again(urls):
    alone = build(weighted(urls, b=1), 12, streams=4)
    assert alone.streams == 4
    mixed = build(weighted(urls, b=1, a=1), 12, position=24, recorded=saved(alone))
    assert mixed.identity()["streams"]["b"] == 4
    again = build(weighted(urls, b=1, a=0), 10, position=48, recorded=saved(mixed))  # 4 streams need not divide 10 now
    found = places(alone, 0, 24) + places(mixed, 24, 48) + places(again, 48, 48 + 170)
    assert again.streams == 1
    of_b = [place for place in found if place[0] == "b"]
    assert len({place[2:] for place in of_b[:60]}) == 60  # an epoch of b
    assert len({place[2:] for place in of_b[60:120]}) == 60


def test_the_same_weights_change_nothing(urls, told):
    first = saved(build(weighted(urls, a=1, b=3)))
    told.clear()
    again = build(weighted(urls, b=6, c=0, a=2), position=777, recorded=first)
    assert saved(again) == first
    assert list(saved(again)["mixture"][0]["quota"]) == ["a", "b"]  # the recorded order of sources is what counts
    assert told == []


def test_a_source_that_vanishes(urls, tmp_path):
    sources = weighted(urls, a=1, b=1)
    moving = write_pairs(tmp_path, 1, 20, size=8)
    recorded = saved(build(sources | {"m": SourceSettings(urls=moving)}))
    with pytest.raises(UserError, match=r"drawn from source 'm', which data\.sources no longer has; .* with weight=0"):
        build(sources, position=500, recorded=recorded)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        build(sources | {"m": SourceSettings(urls=moving)}, position=500, recorded=recorded)
    gone = build(
        sources | {"m": SourceSettings(urls=moving, weight=0)}, position=500, recorded=recorded
    )  # its files unread
    assert {name for name, *_ in places(gone, 500, 2000)} == {"a", "b"}
    after = saved(gone)
    assert after["content"] == recorded["content"]  # remembered, for the day that it comes back
    assert saved(build(sources, position=900, recorded=after)) == after  # no longer asked for
    write_pairs(tmp_path, 1, 21, size=8)
    with pytest.raises(UserError, match="content of m: "):
        build(sources | {"m": SourceSettings(urls=moving)}, position=900, recorded=after)


def test_a_source_that_comes_back_has_its_own_order_again(urls):
    recorded = saved(build(weighted(urls, a=1, b=1), streams=2))
    off = saved(build(weighted(urls, a=1, b=0), position=100, recorded=recorded))
    back = build(weighted(urls, a=1, b=1), position=200, recorded=off, streams=5)
    assert back.identity()["streams"] == {"a": 2, "b": 2}
    added = build(weighted(urls, a=1, c=1), position=200, recorded=off, streams=5)
    assert added.identity()["streams"] == {"a": 2, "b": 2, "c": 5}


def test_streams_of_a_mixture_need_not_divide_its_share_of_a_batch(tmp_path):
    many = {name: SourceSettings(urls=write_pairs(tmp_path / name, 24, 1, size=8)) for name in ("m", "n")}
    assert build(many, 46, allow_repeats=True).identity()["streams"] == {"m": 5, "n": 5}  # 23 // 4
    assert build({"m": many["m"]}, 23).identity()["streams"] == {"m": 1}


def test_batches_of_ranks_keep_to_few_streams(urls):
    pipe = build(weighted(urls, a=1, b=2), 120, streams=4, allow_repeats=True)
    for world in (1, 2, 3, 5, 8):
        parts = [pipe.rank_positions(240, 120, world=world, rank=rank) for rank in range(world)]
        assert {len(part) for part in parts} == {120 // world}
        assert sorted(np.concatenate(parts)) == list(range(240, 360))
    source, ordinal = pipe.mixture.locate(pipe.rank_positions(240, 120, world=8, rank=3))
    assert len(set(zip(source, ordinal % np.array([24, 60])[source] % 4, strict=True))) <= 3  # of 8
    alone = build(weighted(urls, b=1), 60, streams=4)
    assert alone.rank_positions(60, 60, world=3, rank=1).tolist() == [
        *rank_positions(60, 60, world=3, rank=1, streams=4)
    ]


# --- records ----------------------------------------------------------------------------------------------------------


def as_of_old(pipe: Pipeline) -> dict:
    """As the versions before the journal recorded it."""
    now = saved(pipe)
    keys = ("seed", "streams", "block_shards", "epoch_length", "content")
    return {
        **{key: now[key] for key in keys},
        "quota": [*now["mixture"][0]["quota"].values()],
        "crop": now["crop"],
        "image_size": now["image_size"],
        "decoders": {name: now["decoders"][name] for name in ("simplejpeg", "pillow", "torch")},
    }


def test_an_old_record_goes_on(urls):
    first = build(weighted(urls, b=1), streams=4)
    again = build(weighted(urls, b=1), position=800, recorded=as_of_old(first))
    assert places(again, 800, 3000) == places(first, 800, 3000)
    assert saved(again) == saved(first)
    changed = build(weighted(urls, a=1, b=1), position=800, recorded=as_of_old(first))
    assert [segment["start"] for segment in saved(changed)["mixture"]] == [0, 800]
    for change in ({"exif": "apply"}, {"sampling": "resampled"}, {"seed": 6}):
        with pytest.raises(UserError, match=f"{next(iter(change))}: "):
            build(weighted(urls, b=1), position=800, recorded=as_of_old(first), **change)


def test_an_old_record_of_a_mixture_is_refused_unless_accepted(urls):
    sources, recorded = weighted(urls, a=1, b=3), as_of_old(build(weighted(urls, a=1, b=3)))
    with pytest.raises(UserError, match="dealt a mixture's positions out in another way"):
        build(sources, position=800, recorded=recorded)
    assert build(sources, position=800, recorded=recorded, accept_changes=True).mixture.quota == {"a": 2500, "b": 7500}


def test_the_recorded_facts(urls):
    assert saved(build(weighted(urls, a=1, b=0)))["mixture"] == [{"start": 0, "quota": {"a": 10_000}, "base": {"a": 0}}]
    keys = "seed sampling block_shards streams epoch_length content caption mixture crop exif scaled_decode max_pixels"
    others = "augment image_size context_length tokenizer decoders"
    assert [*saved(build(weighted(urls, a=1)))] == f"{keys} {others}".split()
    assert [*saved(build(weighted(urls, a=1)))["decoders"]] == ["simplejpeg", "pillow", "torch", "open_clip_torch"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed: 5 -> 6"),
        ({"sampling": "resampled"}, "sampling: epochs -> resampled"),
        ({"crop_scale": (0.5, 1.0)}, "crop: "),
        ({"exif": "apply"}, "exif: ignore -> apply"),
        ({"scaled_decode": True}, "scaled_decode: False -> True"),
        ({"max_pixels": 1000}, "max_pixels: 50000000 -> 1000"),
        ({"augment": AugmentSettings(flip=0.5)}, "augment: "),
        ({"image_size": 32}, "image_size: 16 -> 32"),
        ({"context_length": 9}, "context_length: 8 -> 9"),
        ({"tokenize": build_tokenizer("ViT-B-32", 8)}, "tokenizer: CLIP -> ViT-B-32"),
    ],
)
def test_what_would_change_pixels_or_tokens_is_refused_unless_accepted(urls, change, named):
    recorded = saved(build(weighted(urls, a=1)))
    with pytest.raises(UserError, match=named) as told:
        build(weighted(urls, a=1), position=16, recorded=recorded, **change)
    assert "\n" not in str(told.value)
    build(weighted(urls, a=1), position=16, recorded=recorded, accept_changes=True, **change)


def test_another_version_of_a_decoder_is_refused(urls):
    recorded = saved(build(weighted(urls, a=1)))
    recorded["decoders"]["pillow"] = "1.0"
    with pytest.raises(UserError, match=r"decoders of pillow: 1\.0 -> "):
        build(weighted(urls, a=1), position=16, recorded=recorded)


def test_another_caption_is_refused(urls):
    recorded = saved(build(weighted(urls, a=1)))
    with pytest.raises(UserError, match=r"caption of a: \['txt', 'whole'\] -> \['txt', 'first'\]"):
        build({"a": SourceSettings(urls=urls["a"], captions="first")}, position=16, recorded=recorded)


def test_another_seed_that_is_accepted_takes_the_journal_along(urls):
    """A cut cycle was dealt by the old seed: nothing can be exact then, but the run goes on."""
    first = saved(build(weighted(urls, a=1, b=3)))
    cut = saved(build(weighted(urls, a=1, b=1), position=1234, recorded=first))
    other = build(weighted(urls, a=1, b=1), position=2000, recorded=cut, seed=6, accept_changes=True)
    assert len(places(other, 2000, 5000)) == 3000


def test_a_pipeline_goes_to_another_process(urls):
    pipe = build(weighted(urls, a=1, b=3))
    again = pickle.loads(pickle.dumps(pipe))
    assert again.identity() == pipe.identity()
    assert again.sources[1].read(2, 3) == pipe.sources[1].read(2, 3)
    for mine, theirs in zip(pipe.locate(np.arange(500)), again.locate(np.arange(500)), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert again.tokenize(["a cat"]).tolist() == pipe.tokenize(["a cat"]).tolist()


# --- repeats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["epochs", "resampled"])
@pytest.mark.parametrize("weights", [{"b": 1.0}, {"a": 1.0, "b": 2.5}])
def test_repeats_equal_brute_force(urls, sampling, weights):
    pipe = build(weighted(urls, **weights), 16, sampling=sampling)
    found = []
    for start in range(0, 16 * 40, 16):
        found.append(16 - len({(name, *place) for name, _, *place in places(pipe, start, start + 16)}))
        assert pipe.repeats(start, 16) == found[-1]
    assert any(found)
    assert not all(found)


@pytest.mark.parametrize("weights", [{"b": 1.0}, {"a": 1.0, "b": 1.0}])
def test_repeats_are_not_searched_for_where_there_can_be_none(urls, monkeypatch, weights):
    pipe, starts = build(weighted(urls, **weights), 14), range(0, 840, 14)
    straddling = []
    for start in starts:
        epochs = {(name, epoch) for name, epoch, _, _ in places(pipe, start, start + 14)}
        straddling += [start] * (len(epochs) > len({name for name, _ in epochs}))
    searched = []

    def locate(_pipe, positions):
        searched.append(int(positions[0]))
        return [np.zeros_like(positions)] * 4

    monkeypatch.setattr(Pipeline, "locate", locate)
    for start in starts:
        pipe.repeats(start, 14)
    assert searched == straddling
    assert 0 < len(searched) < 40


# --- what is refused at the start, and what is not --------------------------------------------------------------------


def test_the_same_samples_under_two_names_are_told(urls, tmp_path, told):
    folder, mine = Path(urls["a"]).parents[1], tmp_path
    for number, shard in ((0, "a/0000.tar"), (1, "a/0001.tar"), (2, "a/0001.tar"), (3, "b/0000.tar")):
        shutil.copy(folder / shard, mine / f"{number}.tar")
    pipe = build({"mine": SourceSettings(f"{mine}/{{0..3}}.tar"), "b": SourceSettings(urls["b"])})
    assert [source.samples for source in pipe.sources] == [12 * 3 + 20, 3 * 20]
    advice = "and come twice as often as others; name each shard once, and let weights say what comes more often"
    assert told == [
        f"source 'mine': the samples of shard {mine}/2.tar are those of {mine}/1.tar again, {advice}",
        f"sources 'mine' and 'b': the samples of shard {folder}/b/0000.tar are those of {mine}/3.tar again, {advice}",
    ]
    told.clear()
    (tmp_path / "uids.txt").write_text("000000\n000001\n")
    parts = {"rest": SourceSettings(urls["a"]), "b": SourceSettings(urls["b"])}
    parts["few"] = SourceSettings(urls["a"], select=Select(uids=str(tmp_path / "uids.txt"), uid_field="__key__"))
    parts["lines"] = SourceSettings(urls["a"], captions="first")
    build(parts)
    assert not [line for line in told if "samples of another" in line]  # other samples, or other captions


def test_one_sample_and_one_shard(tmp_path):
    one = {"one": SourceSettings(urls=write_pairs(tmp_path / "one", 1, 1, size=8))}
    with pytest.raises(UserError, match="has 1 usable sample an epoch, fewer than its 8"):
        build(one)
    for sampling in ("epochs", "resampled"):
        pipe = build(one, allow_repeats=True, sampling=sampling)
        assert pipe.repeats(0, 8) == 7
        assert [place[2:] for place in places(pipe, 0, 8)] == [(0, 0)] * 8
    few = build({"few": SourceSettings(urls=write_pairs(tmp_path / "few", 1, 16, size=8))}, 16)
    parts = [few.rank_positions(0, 16, world=8, rank=rank) for rank in range(8)]  # fewer shards than ranks
    assert len({place for part in parts for place in zip(*few.locate(part), strict=True)}) == 16


def test_refusals(urls):
    with pytest.raises(UserError, match=r"no training data: set data\.sources"):
        build({})
    with pytest.raises(UserError, match="every data source has weight 0"):
        build(weighted(urls, a=0, b=0))
    with pytest.raises(UserError, match="source 'b': its weight=1e-06 is under one sample in 10,000"):
        build(weighted(urls, a=1, b=1e-6))
    with pytest.raises(UserError, match="source 'a' has 24 usable samples an epoch, fewer than its 25"):
        build(weighted(urls, a=1, b=1), 50)
    with pytest.raises(UserError, match=r"train\.global_batch=14 is not divisible by the 4 streams"):
        build(weighted(urls, a=1), 14, streams=4)
    with pytest.raises(UserError, match=r"epoch_boundary=drop .* data\.sampling=resampled has no epochs; use straddle"):
        build(weighted(urls, a=1), sampling="resampled", epoch_boundary="drop")
    assert build(weighted(urls, a=1), 48, sampling="resampled").repeats(0, 48) >= 24  # no epoch, so none too short


PAIR = {"jpg": b"picture", "txt": b"x"}


def test_more_refused_or_lost_samples_than_the_bound_end_the_run(tmp_path):
    samples = [(f"{i:03}", PAIR if i % 4 else {"jpg": b"picture"}) for i in range(80)]
    path = write_shard(tmp_path / "x.tar", samples)
    mine = {"mine": SourceSettings(urls=str(path))}
    told = (
        r"source 'mine': 20 of its 80 samples cannot be used \(no caption: 20\), more than data\.max_{}_fraction={}; "
    )
    with pytest.raises(UserError, match=told.format("bad", 0.05)):
        build(mine)
    with pytest.raises(UserError, match=told.format("refused", 0.24)):
        build(mine, max_refused_fraction=0.24, max_bad_fraction=1)
    recorded = saved(build(mine, max_bad_fraction=0.25))
    assert saved(build(mine, recorded=recorded)) == recorded  # a run from before goes on
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"040.jpg")])
    both = (
        r"50 of its 80 samples cannot be used \(lost with .* damaged shard: 40, no caption: 10\), .*fraction=0.05; mend"
    )
    with pytest.raises(UserError, match=both):
        build(mine)
    with pytest.raises(UserError, match="content of mine"):
        build(mine, recorded=recorded)
    with pytest.raises(UserError, match=both):
        build(mine, recorded=recorded, accept_changes=True)
    assert build(mine, max_refused_fraction=0.625).sources[0].samples == 30


def test_what_a_selection_removes_on_purpose_is_no_fault(tmp_path):
    samples = [(f"{i:03}", PAIR | {"json": json.dumps({"s": i} if i % 2 else {}).encode()}) for i in range(80)]
    samples[7] = ("007", {"txt": b"x"})
    urls = str(write_shard(tmp_path / "x.tar", samples))
    few = {"few": SourceSettings(urls=urls, select=Select(score_field="s", min_score=60))}
    assert build(few).sources[0].samples == 10
    (tmp_path / "keys.txt").write_text("\n".join(key for key, _ in samples[:9]))
    listed = SourceSettings(urls=urls, select=Select(uids=str(tmp_path / "keys.txt"), uid_field="__key__"))
    assert build({"listed": listed}).sources[0].samples == 8
    with pytest.raises(UserError, match=r"1 of its 80 samples cannot be used \(no picture: 1\)"):
        build({"listed": listed}, max_bad_fraction=0.01)


def test_resampled_sources_are_recorded_with_their_blocks(urls):
    recorded = saved(build(weighted(urls, a=1), sampling="resampled"))
    assert (recorded["sampling"], recorded["block_shards"]) == ("resampled", 8)
    again = build(weighted(urls, a=1), sampling="resampled", position=80, recorded=recorded, block_shards=2)
    assert saved(again) == recorded
    with pytest.raises(UserError, match="sampling: resampled -> epochs"):
        build(weighted(urls, a=1), position=80, recorded=recorded)
