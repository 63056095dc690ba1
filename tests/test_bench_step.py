"""`clipscale bench step`: words, captions, what it counts, a tiny run, and the losses of open_clip's own loop."""

import json

import pytest
import tiny
import torch
from bench_words import printed_by, step_bench
from torch import nn

from clipscale.bench.step import trainee as trainee_module
from clipscale.bench.step.bench import _for_device
from clipscale.bench.step.captions import draw_captions, read_lengths, tokens_of
from clipscale.bench.step.case import Budget, Case
from clipscale.bench.step.contestants import DENSE, KEPT, NOTHING_KEPT, OPEN_CLIP, Shape
from clipscale.bench.step.flops import not_towers, tower_flops
from clipscale.bench.step.parity import Track, compare, follow, own_maker
from clipscale.bench.step.peers import open_clip_step
from clipscale.bench.step.report import COLUMNS, PARTS, cells, tower_cells
from clipscale.bench.step.towers import moved_bytes
from clipscale.bench.step.trainee import build_trainee, draw_batch, model_config
from clipscale.cli import main
from clipscale.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Folder, command and terminal output of one run with everything in it."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["bench", "step", "--models", "small", "--batches", "4,8", "--image-chunk", "2", "--text-chunk", "4"]
    words += ["--peers", "--parity", "--seconds", "0.05", "--device", "cpu", "--output", str(folder), "--name", "small"]
    smaller = {
        "clipscale.bench.step.trainee._SMALL": tiny.MODEL,
        "clipscale.bench.common.matmul._SIZE": {"cpu": 64},
        "clipscale.bench.step.parity.STEPS": 2,
        "clipscale.bench.common.turns.settle": lambda: None,
    }
    return folder, words, printed_by(words, **smaller)


@pytest.mark.slow
def test_json_has_every_number_and_what_made_it(result):
    folder, words, _ = result
    document = json.loads((folder / "small.json").read_text())
    assert document["finished"]
    assert document["command"] == f"clipscale {' '.join(words)}"
    assert document["arguments"]["batches"] == [4, 8]
    assert any("mean 13.5, median 12" in note for note in document["notes"])
    assert [case["batch"] for case in document["steps"]] == [4, 8]
    for case in document["steps"]:
        rows = {row["contestant"]: row for row in case["rows"]}
        assert list(rows) == [NOTHING_KEPT, KEPT, OPEN_CLIP, DENSE]
        assert {row["status"] for row in rows.values()} == {"measured"}
        assert all(row["loss"] == pytest.approx(rows[DENSE]["loss"], abs=1e-5) for row in rows.values())
        for row in rows.values():
            assert row["samples_per_second"]["repeats"] == len(row["samples_per_second"]["all"]) >= 1
            assert row["step_seconds"]["median"] > 0
            assert row["peak_bytes"] >= max(row["peak_bytes_by_part"].values(), default=1)
        assert rows[OPEN_CLIP]["to_open_clip"] == rows[DENSE]["to_full_batch"] == 1.0
        assert rows[NOTHING_KEPT]["to_open_clip"] > 0
        assert [row["kept_share"] for row in rows.values()] == [0.0, 1.0, 0.0, 0.0]
        for name in (NOTHING_KEPT, KEPT):
            assert set(rows[name]["peak_bytes_by_part"]) == set(rows[name]["seconds_by_part"]) == set(PARTS)
            assert 0 < sum(rows[name]["seconds_by_part"].values()) < 3 * max(rows[name]["step_seconds"]["all"])
        assert rows[NOTHING_KEPT]["tokens_per_caption"] == 8
        assert {spread["repeats"] for spread in (case["text"][name] for name in ("own_us", "full_us"))} != {0}
        assert case["text"]["length"] == 8
    assert [*document["parity"]] == ["small"]
    assert document["parity"]["small"]["met"]
    assert document["parity"]["small"]["steps"] == len(document["parity"]["small"]["losses"]["open_clip"]) == 2


@pytest.mark.slow
def test_flops_are_those_that_are_run(result):
    """Everything forward, backward, and forward once more where it is recomputed: three units, and four."""
    folder, *_ = result
    for case in json.loads((folder / "small.json").read_text())["steps"]:
        flop = {row["contestant"]: row["tower_flop"] for row in case["rows"]}
        assert 1.3 < flop[OPEN_CLIP] / flop[DENSE] < 1.4
        assert flop[KEPT] < flop[NOTHING_KEPT]


@pytest.mark.slow
def test_table_is_the_same_on_the_terminal_and_in_markdown(result):
    folder, words, printed = result
    text, document = (folder / "small.md").read_text(), json.loads((folder / "small.json").read_text())
    assert f"clipscale {' '.join(words)}" in text
    assert "| " + " | ".join(COLUMNS) + " |" in text
    assert "![small-speed](small-speed.png)" in text
    for case in document["steps"]:
        for row in case["rows"]:
            line = cells(case, row)
            assert "| " + " | ".join(line) + " |" in text
            assert "  ".join(line).split() in [line.split() for line in printed.splitlines()]
    assert "small: 2 steps of 4 pairs in float32, against open_clip's own loop: equal" in printed
    assert "- small: 2 steps of 4 pairs in float32" in text
    for line in ("Text tower, both passes", "nothing kept, time by part: image forward"):
        assert printed.count(line) == text.count(line) == 2
    assert f"written: {folder}/small.json {folder}/small.md {folder}/small-speed.png" in printed


@pytest.mark.slow
def test_pictures_are_redrawn(result, tmp_path, capsys):
    folder, *_ = result
    (tmp_path / "small.json").write_bytes((folder / "small.json").read_bytes())
    assert main(["bench", "plot", str(tmp_path / "small.json")]) == 0
    names = ["small-speed.png", "small-memory.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# --- the same losses --------------------------------------------------------------------------------------------------


def test_losses_are_those_of_open_clips_own_loop():
    """And the comparison finds a gradient of the scale that is as many times too large as there are chunks, which is
    what open_clip's accumulation makes of it."""
    trainee = build_trainee(tiny.MODEL, device=CPU, precision="fp32", seed=0)
    batches = [draw_batch(trainee, 8, read_lengths(None), distinct=8, seed=step) for step in range(20)]
    theirs = follow(trainee, batches, lambda batch: open_clip_step(trainee, batch, chunk=8))
    few = Track(theirs.losses[:4], theirs.scale_gradients[:4])
    assert len({*theirs.losses}) == 20
    own = compare(follow(trainee, batches, own_maker(trainee, Shape(2, 4, 0))), theirs)
    assert own["met"], own
    assert own["loss_difference"] <= 1e-5
    kept = compare(follow(trainee, batches[:4], own_maker(trainee, Shape(2, 4, 1 << 40))), few)
    assert kept["met"], kept
    wrong = compare(follow(trainee, batches[:4], lambda batch: open_clip_step(trainee, batch, chunk=2)), few)
    assert not wrong["met"]
    assert wrong["scale_gradient_difference"] == pytest.approx(3, rel=1e-3), "four chunks: four times the gradient"


def test_losses_that_differ_are_not_met():
    trainee = build_trainee(tiny.MODEL, device=CPU, precision="fp32", seed=0)
    batches = [draw_batch(trainee, 4, read_lengths(None), distinct=4, seed=step) for step in range(2)]
    own = follow(trainee, batches, own_maker(trainee, Shape(2, 4, 0)))
    assert compare(own, own)["met"]
    assert not compare(own._replace(losses=[own.losses[0], own.losses[1] + 2e-5]), own)["met"]


# --- what is counted and drawn ----------------------------------------------------------------------------------------


def test_operations_are_counted_but_for_the_losss():
    layer, inputs = nn.Linear(5, 7), torch.ones(3, 5)

    def step():
        outputs = layer(inputs)
        with not_towers(times=3):
            loss = (outputs @ outputs.T).sum()
        loss.backward()

    once = 2 * 3 * 5 * 7
    assert tower_flops(lambda: layer(inputs)) == once
    assert tower_flops(step) == 2 * once, "forward, and backward to the weight; the inputs want none"


def test_attention_on_a_cpu_is_counted():
    q = torch.ones(2, 3, 11, 8, requires_grad=True)
    forward = 2 * (2 * 3 * 11 * 11 * 8) * 2

    def both():
        nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()

    assert tower_flops(lambda: nn.functional.scaled_dot_product_attention(q, q, q)) == forward
    assert tower_flops(both) == 3.5 * forward


def test_own_captions_are_what_their_file_says():
    lengths = read_lengths(None)
    with open(trainee_module.__file__.replace("trainee.py", "captions.json"), encoding="utf-8") as file:
        told = json.load(file)
    number = sum(lengths.captions.values())
    assert sum(n * count for n, count in lengths.captions.items()) / number == pytest.approx(told["mean"], abs=0.01)
    assert lengths.quantile(0.5) == told["median"] == 12
    assert max(lengths.captions) == 77
    assert "Drawn, not counted" in lengths.source


def test_captions_are_as_the_tokenizer_makes_them():
    tokens_NL = draw_captions(read_lengths(None), 500, length=32, vocabulary=49408, seed=3)
    lengths_N = tokens_of(tokens_NL)
    assert (tokens_NL[:, 0] == 49406).all()
    assert (tokens_NL.max(dim=1).values == 49407).all()
    assert lengths_N.min() >= 3
    assert lengths_N.max() == 32
    assert 11 <= lengths_N.double().median() <= 13
    after = torch.arange(32) >= lengths_N[:, None]
    assert (tokens_NL[after] == 0).all()
    assert (tokens_NL[~after] > 0).all()
    assert torch.equal(tokens_NL, draw_captions(read_lengths(None), 500, length=32, vocabulary=49408, seed=3))


@pytest.mark.parametrize("content", ["[]", '{"source": "x"}', '{"source": "x", "captions": {"2": 1}}', "{"])
def test_a_histogram_that_is_none_is_one_line(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"^--captions=.*captions.json: .*"):
        read_lengths(str(path))


def test_models_are_found_by_their_names():
    assert model_config("small").vision["image_size"] == 112
    assert model_config("cifar10").embed_dim == 64
    assert model_config("ViT-B-32").name == "ViT-B-32"


def test_the_budget_knows_a_step_from_the_batch_before():
    budget, shape = Budget(seconds=10, limit_seconds=100), Shape(64, 64, 0)
    case = Case("small", 512, shape)
    assert not budget.refusal(case, "x")
    budget.record(case, "x", 30.0)
    assert not budget.refusal(Case("small", 1024, shape), "x")
    assert budget.refusal(Case("small", 2048, shape), "x") == "skipped: predicted 120 s"
    assert [budget.rounds(seconds) for seconds in (0.1, 2.0, 4.0, 21.0)] == [9, 5, 3, 1]


# --- words ------------------------------------------------------------------------------------------------------------


def test_what_is_typed_arrives():
    plain = step_bench()
    assert (plain.models, plain.batches, plain.image_chunk, plain.keep_bytes) == (None, None, None, "auto")
    assert (plain.peers, plain.parity, plain.precision) == (False, False, "auto")
    filled = _for_device(plain, CPU)
    assert (filled.models, filled.batches, filled.image_chunk, filled.precision) == (("small",), (256, 512), 64, "fp32")
    full = step_bench("--models", "small, cifar10", "--batches", "1k,512", "--keep-bytes", "3m", "--parity")
    assert (full.models, full.batches, full.keep_bytes, full.parity) == (
        ("small", "cifar10"),
        (512, 1024),
        3 << 20,
        True,
    )
    assert _for_device(full, CPU).batches == (512, 1024)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--batches 1", "--batches=1: a batch of 1 is too small; give at least 2 pairs"),
        ("--batches 1x", "--batches=1x: not a size"),
        ("--models ,", "--models=,: an empty name"),
        ("--image-chunk 0", "--image-chunk=0: must be a whole number of at least 1"),
        ("--text-chunk x", "--text-chunk=x: must be a whole number of at least 1"),
        ("--keep-bytes all", "--keep-bytes=all: not a size"),
        ("--precision tf32", "--precision=tf32: unknown; choose from auto, fp32, bf16, fp16"),
        ("--precision fp16 --device cpu", "--precision=fp16 wants a GPU"),
        ("--seconds 0", "--seconds=0: must be a number above 0"),
        ("--models ViT-B-33 --device cpu", "model.name='ViT-B-33' is no open_clip model; did you mean ViT-B-32"),
        ("--captions none.json --device cpu", "--captions=none.json: cannot be used"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert main(["bench", "step", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"clipscale: error: {line}")
    assert printed.err.count("\n") == 1


# --- the towers alone -------------------------------------------------------------------------------------------------


def test_towers_alone(tmp_path):
    """Each switch has a row where it does something, and what is counted falls as it must."""
    words = ["bench", "step", "--towers", "--models", "small", "--image-chunk", "2", "--text-chunk", "2"]
    words += ["--seconds", "0.01", "--device", "cpu", "--output", str(tmp_path), "--name", "small"]
    smaller = {"clipscale.bench.step.trainee._SMALL": tiny.MODEL, "clipscale.bench.common.turns.settle": lambda: None}
    printed = printed_by(words, **smaller)
    document = json.loads((tmp_path / "small.json").read_text())
    assert document["finished"]
    page = (tmp_path / "small.md").read_text()
    for found in document["towers"]:
        for tower, rows in found["rows"].items():
            assert f"## small, {tower} tower, 2 samples, {found['precision']}" in page
            for line in tower_cells(rows):
                assert "| " + " | ".join(line) + " |" in page
                assert "  ".join(line).split() in [each.split() for each in printed.splitlines()]
    moved = {
        (found["precision"], tower): {row["way"]: row["moved_bytes"] for row in rows}
        for found in document["towers"]
        for tower, rows in found["rows"].items()
    }
    last = "clipscale, checkpoint_blocks"
    assert [*moved["fp32", "image"]] == ["open_clip", "fast_attention", "clipscale", last]
    assert [*moved["bf16", "text"]] == [
        *("open_clip", "fast_attention", "fast_norms", "residual=bf16", "clipscale", "clipscale, residual=bf16", last)
    ]
    for rows in moved.values():
        assert rows["clipscale"] <= rows["fast_attention"] < rows["open_clip"]
        assert rows[last] > rows["clipscale"]
    image, text = moved["bf16", "image"], moved["bf16", "text"]
    assert image["fast_norms"] < image["open_clip"]
    assert text["fast_norms"] == text["open_clip"], "the captions' stream is float32 there"
    assert text["clipscale, residual=bf16"] < text["clipscale"]


def test_a_known_pass_is_counted():
    """Two adds of 12 bytes each in and out, forwards; a view costs nothing."""
    x = torch.ones(3)
    assert moved_bytes(lambda: (x + x.view(3)) + 1) == 2 * 36 - 12


def test_towers_take_no_steps():
    with pytest.raises(UserError, match=r"^--towers measures no steps; leave --peers out, or --towers$"):
        step_bench("--towers", "--peers")
