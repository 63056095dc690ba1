"""Several captions of a sample: which one it gives is drawn by position, with the stated weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from loading import LENGTH, read, tokenize
from shards import picture, write_shard
from tools import load_tool

from clipscale.cli import main
from clipscale.config import Retrieval, Validation
from clipscale.config.data import Data, SourceSettings
from clipscale.config.load import apply_overrides, config_from_yaml, dump_config, load_config
from clipscale.counter import fold, uniform
from clipscale.data.pipeline import Pipeline, build_pipeline
from clipscale.data.shard.captions import CaptionRule, Captions
from clipscale.data.shard.counts import refusing_settings
from clipscale.data.shard.select import Rules
from clipscale.data.source import Source, open_source
from clipscale.errors import UserError
from clipscale.eval.pictures import ShardPictures

JPEG = picture(0, 8, 8)
WEIGHTS = {"txt": 1.0, "json:recaption": 2.0, "json:more.list": 5.0}
SHARDS, PER_SHARD, BATCH = 3, 20, 12


def facts(**of_sample) -> bytes:
    return json.dumps(of_sample).encode()


def sample(i: int) -> dict[str, bytes]:
    """Of five: three with all captions, one with its .txt alone, one whose JSON has a recaption and nothing else."""
    recaption, both = facts(recaption=f"r{i}"), facts(recaption=f"r{i}", more={"list": [f"a{i}", f"b{i}"]})
    return [
        *[{"jpg": JPEG, "json": both, "txt": f"t{i}".encode()}] * 3,
        {"jpg": JPEG, "txt": f"t{i}".encode()},
        {"txt": b" \n", "json": recaption, "jpg": JPEG},
    ][i % 5]


@pytest.fixture(scope="module")
def urls(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recaptioned")
    for shard in range(SHARDS):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        write_shard(folder / f"{shard}.tar", [(f"{i:03d}", sample(i)) for i in numbers])
    return f"{folder}/{{0..{SHARDS - 1}}}.tar"


def opened(urls: str, weights: dict[str, float] = WEIGHTS, **settings) -> Source:
    return open_source("mine", SourceSettings(urls, caption_weights=weights, **settings), Data(), need="pairs")


def built(urls: str, weights: dict[str, float] = WEIGHTS, **settings) -> Pipeline:
    recorded, accept = settings.pop("recorded", None), settings.pop("accept_changes", False)
    source = SourceSettings(urls, caption_weights=weights, **{"captions": "random"} | settings)
    data = Data(sources={"mine": source}, streams=3, accept_changes=accept)
    how = {"image_size": 8, "context_length": LENGTH, "seed": 5, "global_batch": BATCH, "recorded": recorded}
    return build_pipeline(data, tokenize, **how)


def captions(pipe: Pipeline, steps: int, start: int = 0, **how) -> dict[int, tuple[str, str]]:
    """Position -> (key, caption)"""
    found = {}
    for batch in read(pipe, steps, BATCH, start * BATCH, **how):
        assert batch.valid.all()
        assert not batch.skips
        texts = ("".join(map(chr, row[row > 0][1:])) for row in batch.tokens)
        found |= dict(zip(batch.positions.tolist(), zip(batch.keys, texts, strict=True), strict=True))
    return found


# --- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [[True] * 3, [True, False, True], [False, True, True], [False, True, False]])
def test_draws_have_the_stated_shares(there):
    """Of 20,000 positions, each share within 4 standard deviations; what a sample lacks is never drawn."""
    rule, n = Captions.of(SourceSettings("x", caption_weights=WEIGHTS)), 20_000
    draws = uniform(fold(0, "caption member"), np.arange(n))
    counts = np.bincount([rule.choose(there, float(draw)) for draw in draws], minlength=3)
    shares = np.where(there, list(WEIGHTS.values()), 0)
    shares = shares / shares.sum()
    assert (np.abs(counts - n * shares) <= 4 * np.sqrt(n * shares * (1 - shares))).all()


def test_ends_of_the_draw():
    rule = Captions.of(SourceSettings("x", caption_weights={"a": 0.1, "b": 0.2, "c": 0.7}))
    last = 1 - 2.0**-53
    for there in ([True] * 3, [True, True, False], [False, True, False], [False, False, True]):
        numbers = [number for number, is_there in enumerate(there) if is_there]
        assert (rule.choose(there), rule.choose(there, last)) == (numbers[0], numbers[-1])


@pytest.fixture(scope="module")
def expected(urls) -> dict[int, tuple[str, str]]:
    """Of 50 steps: ten epochs."""
    return captions(built(urls), 50, chunk=BATCH, threads=1)


def test_a_sample_gives_one_of_those_it_has(urls, expected):
    kinds = np.zeros((5, 4))
    for key, text in expected.values():
        assert int(text[1:]) == int(key)
        kinds[int(key) % 5, "trab".index(text[0])] += 1
    assert kinds[3].tolist() == [120, 0, 0, 0]
    assert kinds[4].tolist() == [0, 120, 0, 0]
    shares = np.array([1, 2, 2.5, 2.5]) / 8  # of the list's two, each as often
    assert (np.abs(kinds[:3].sum(0) - 360 * shares) <= 4 * np.sqrt(360 * shares * (1 - shares))).all()
    by_epoch = {key: {text for k, text in expected.values() if k == key} for key in ("000", "001", "002")}
    assert all(len(texts) > 1 for texts in by_epoch.values())  # another one in another epoch


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_chunks_threads_and_resumes_change_nothing(urls, expected, world):
    pipe, found = built(urls), {}
    for rank in range(world):
        found |= captions(pipe, 12, world=world, rank=rank, chunk=2, threads=2)
    assert found == {position: expected[position] for position in range(12 * BATCH)}
    again = built(urls, recorded=json.loads(json.dumps(pipe.identity())))
    rest = captions(again, 7, start=43, world=world, chunk=3)
    assert len(rest) == 7 * BATCH // world
    assert rest.items() <= expected.items()


def test_one_caption_is_what_it_was(urls):
    """One in the mapping, or in `caption`: the same index, the same record of a run."""
    one, other = (
        open_source("mine", SourceSettings(urls, **how), Data(), need="pairs")
        for how in ({"caption": "txt"}, {"caption_weights": {"txt": 3.0}})
    )
    assert (one.fingerprint(), one.shards) == (other.fingerprint(), other.shards)
    assert one.samples == SHARDS * PER_SHARD * 4 // 5
    assert Captions.of(SourceSettings("x")).identity == CaptionRule.of("txt")
    assert built(urls, {"txt": 7.0}).identity()["caption"] == {"mine": ["txt", "random"]}


@pytest.mark.parametrize(
    "weights",
    [WEIGHTS | {"txt": 2.0}, dict(reversed(WEIGHTS.items())), {"txt": 1.0}, {"txt": 1.0, "json:recaption": 2}],
)
def test_other_weights_are_refused_at_a_resume(urls, weights):
    recorded = json.loads(json.dumps(built(urls).identity()))
    with pytest.raises(UserError, match=r"caption of mine: \[\[\['txt', 0.125\], \['json:recaption', 0.25\]"):
        built(urls, weights, recorded=recorded)
    built(urls, weights, recorded=recorded, accept_changes=True)
    built(urls, {name: 4 * weight for name, weight in WEIGHTS.items()}, recorded=recorded)  # the same shares


# --- the index --------------------------------------------------------------------------------------------------------

ODD = [
    ("all", {"jpg": JPEG, "txt": b"t", "json": facts(a="a")}),
    ("bad txt", {"jpg": JPEG, "txt": b"\xff", "json": facts(a="a")}),
    ("bad json", {"jpg": JPEG, "txt": b"t", "json": b"{"}),
    ("no txt", {"jpg": JPEG, "json": facts(a="a")}),
    ("none", {"jpg": JPEG}),
    ("no field", {"jpg": JPEG, "json": facts(b="b")}),
    ("empty", {"jpg": JPEG, "txt": b"", "json": facts(b="b")}),
    ("both bad", {"jpg": JPEG, "txt": b"\xff", "json": b"{"}),
]


@pytest.fixture
def odd(tmp_path) -> str:
    return str(write_shard(tmp_path / "odd.tar", ODD))


def test_a_sample_needs_one_of_them(odd):
    source = opened(odd, {"txt": 1.0, "json:a": 1.0})
    found = [(one.key, source.caption(one.note, 0, one.which)) for one in (source.read(0, i) for i in range(4))]
    assert found == [("all", "t"), ("bad txt", "a"), ("bad json", "t"), ("no txt", "a")]
    assert [source.read(0, i, 0.999).which for i in range(4)] == [1, 1, 0, 1]
    pictures = ShardPictures(source)  # a validation's: the first that is there
    assert [pictures.read(i)[1] for i in range(4)] == [b"t", b"a", b"t", b"a"]
    assert source.refused() == {"no caption": 2, "empty caption": 1, "caption is not UTF-8": 1}
    assert source.shards[0].captions == {"txt": 2, "json:a": 3}
    again = opened(odd, {"txt": 1.0, "json:a": 9.0})  # its weights are no matter of the index
    assert again.shards == source.shards
    assert again.fingerprint() != source.fingerprint()


def test_an_index_that_was_cut_is_built_again(odd):
    source = opened(odd, {"txt": 1.0, "json:a": 1.0})
    place = Path(source.shards[0].sidecar)
    whole, keys = place.read_bytes(), len("allbad txtbad jsonno txt")
    place.write_bytes(whole[: -keys - 1])
    assert opened(odd, {"txt": 1.0, "json:a": 1.0}).shards[0].samples == 4
    assert place.read_bytes() == whole


def test_what_is_there_of_each_is_told(odd, capsys, caplog):
    words = ["--caption", "txt", "--caption", "json:a"]
    assert main(["index", odd, *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 samples lack the caption txt, of 4; theirs is drawn from the others" in out
    assert "1 sample lacks the caption json:a, of 4; theirs" in out
    source = SourceSettings(odd, caption_weights={"txt": 1.0, "json:a": 2.0})
    found = open_source("x", source, Data(), need="pairs", track=lambda *_: pytest.fail("it is indexed"))
    assert found.samples == 4
    open_source("x", source, Data(), need="pairs", findings=True)
    assert "source 'x': 2 samples lack the caption txt, of 4" in caplog.text


def test_check_and_inspect_know_all_of_them(odd, tmp_path, capsys):
    words = [odd, "--caption=txt", "--caption=json:a"]
    assert load_tool("check_shards").main([*words, "--need=pairs", f"--broken={tmp_path / 'broken'}", "--jobs=1"]) == 1
    found = [json.loads(line) for line in (tmp_path / "broken").read_text().splitlines()]
    assert [(row["key"], row["cause"]) for row in found] == [
        ("bad txt", "caption is not UTF-8"),
        ("bad json", "broken JSON"),
        ("none", "no caption"),
        ("no field", "no caption"),
        ("empty", "empty caption"),
        ("both bad", "caption is not UTF-8"),
        ("both bad", "broken JSON"),
    ]
    page = tmp_path / "page.html"
    assert load_tool("inspect_shard").main([*words, f"--output={page}", "--samples=1"]) == 0
    assert "t\na" in page.read_text()


def test_counts_beside_the_shards_hold_where_every_txt_will_do():
    assert refusing_settings(Rules(caption=("json:a", "txt"))) == ""
    assert refusing_settings(Rules(caption=("json:a", "json:b"))) == "caption=json:a or json:b"


# --- settings ---------------------------------------------------------------------------------------------------------

MINE = "data.sources.mine"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{}", "caption_weights={} names no caption; write each with its weight"),
        ("{txt: 0}", "caption_weights has txt: 0.0; a weight must be above 0"),
        ("{txt: 1, json:a: -2}", "caption_weights has json:a: -2.0; a weight must be above 0"),
        ("{txt: .inf}", "caption_weights has txt: inf; a weight must be above 0"),
        ("{txt: .nan}", "caption_weights has txt: nan; a weight must be above 0"),
        ("{txt: much}", "Value 'much' of type 'str' could not be converted to Float"),
        ("{txt: 1, 'json:': 1}", "a name in a source's caption_weights='json:' must be a member's suffix"),
        ("{'': 1}", "a name in a source's caption_weights='' must be a member's suffix"),
        (
            "{yaml:a: 1}",
            "a name in a source's caption_weights='yaml:a' is no member's suffix, such as txt, and no json:",
        ),
        ("{1: 1}", "a name in it is 1 as YAML reads it; put the name in quotes"),
    ],
)
def test_bad_weights_are_one_clear_line(value, message):
    with pytest.raises(UserError) as told:
        load_config([f"{MINE}.urls=a.tar", f"{MINE}.caption_weights={value}"])
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_caption_beside_them_is_refused():
    with pytest.raises(UserError, match="caption='json:a' and its caption_weights are both set"):
        load_config([f"{MINE}.urls=a.tar", f"{MINE}.caption=json:a", f"{MINE}.caption_weights={{txt: 1}}"])


def test_captions_that_no_sample_has(urls, tmp_path):
    with pytest.raises(UserError, match=r"none of its 60 usable samples has the caption json:recaptoin; mend its name"):
        built(urls, {"txt": 1.0, "json:recaption": 1.0, "json:recaptoin": 2.0})
    with pytest.raises(
        UserError, match=r"holds a sample with a picture and a caption \(\.text or json:x\); found: no c"
    ):
        opened(urls, {"text": 1.0, "json:x": 1.0})


def test_they_survive_a_stored_config_and_are_what_a_validation_reads():
    config = load_config([f"{MINE}.urls=a.tar", f"{MINE}.caption_weights={{json:a.b: 2, txt: 1}}"])
    assert config.data.sources["mine"].caption_shares == {"json:a.b": 2 / 3, "txt": 1 / 3}
    assert config_from_yaml(dump_config(config)) == config
    held_out = config.held_out(Validation(urls="v.tar"))
    assert held_out == SourceSettings("v.tar", caption_weights={"json:a.b": 2.0, "txt": 1.0})
    assert config.held_out(Validation(urls="v.tar", caption="txt")) == SourceSettings("v.tar")
    assert config.held_out(Retrieval(urls="r.tar")) == SourceSettings("r.tar")
    other = apply_overrides(config, ["data.sources.b={urls: b.tar, caption_weights: {txt: 1, json:a.b: 2}}"])
    assert other.held_out(Validation(urls="v.tar")) == SourceSettings("v.tar")  # they do not agree
