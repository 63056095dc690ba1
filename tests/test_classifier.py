"""clipscale/eval/classifier.py against open_clip's classifier, and what is kept of it against what is made anew."""

from __future__ import annotations

import open_clip
import pytest
import torch
from test_walks import make_towers

from clipscale.data.tokenize import build_tokenizer
from clipscale.dist import World
from clipscale.eval.classifier import Classifiers
from clipscale.upstream.open_clip_files import imagenet_classes, imagenet_templates

NAMES = [
    "red circle",
    "grey {odd} ring",
    "a moon that is seen through the many thin and yellow branches of an old tree late at night",
    *(f"kind {i}" for i in range(13)),
]
TEMPLATES = ["a photo of the {}.", "{}", "one {} on gravel, " + "and some more words, " * 7]
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
TOKENIZE = build_tokenizer(None, 77)


class Counted:
    """The walk of a suite, which notes how much goes through the tower."""

    def __init__(self) -> None:
        self.chunks: list = []

    def __call__(self, chunks):
        for rows in chunks:
            self.chunks.append(rows)
            yield rows


class Encoder:
    """Our towers where open_clip expects a model; at full length."""

    def __init__(self, towers) -> None:
        self.towers = towers

    def encode_text(self, tokens: torch.Tensor, normalize: bool) -> torch.Tensor:
        assert normalize
        return self.towers.text(tokens)


@pytest.fixture(scope="module")
def towers():
    towers = make_towers()
    with torch.no_grad():
        for parameter in towers.model.parameters():
            parameter.mul_(2)
    return towers


def made(towers, chunk: int = 8, world: World = ALONE, walk=iter) -> torch.Tensor:
    return Classifiers(towers, TOKENIZE, chunk, world, walk).of(NAMES, TEMPLATES)


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_it_is_open_clips(towers, chunk):
    lambdas = [lambda name, template=template: template.replace("{}", name) for template in TEMPLATES]
    towers.model.eval()
    theirs = open_clip.build_zero_shot_classifier(Encoder(towers), TOKENIZE, NAMES, lambdas).T
    towers.model.train()
    ours = made(towers, chunk)
    assert ours.shape == (16, 16)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert towers.model.training


def test_prompts_go_by_length_and_each_chunk_is_cut_at_its_longest(towers):
    walk = Counted()
    made(towers, 8, walk=walk)
    lengths = TOKENIZE([template.replace("{}", name) for name in NAMES for template in TEMPLATES]).argmax(1) + 1
    assert sorted(slot for rows in walk.chunks for slot in rows.slots.tolist()) == list(range(len(lengths)))
    assert {rows.length for rows in walk.chunks} == {16, 32, 48, 64}
    for rows in walk.chunks:
        assert rows.length - 16 < lengths[rows.slots].max() <= rows.length


@pytest.mark.slow
def test_nearly_all_of_imagenets_prompts_are_short():
    """docs/evaluation.md says so: 158 of 80,000 are longer than the shortest shape, as open_clip 3.3 has them."""
    longer = sum(
        int((TOKENIZE([template.replace("{}", name) for template in imagenet_templates()]).argmax(1) >= 16).sum())
        for name in imagenet_classes()
    )
    assert longer < 0.005 * 80_000


def test_with_the_rounding_the_full_length_gives_the_same_bits(towers, monkeypatch):
    by_length = made(towers)
    monkeypatch.setattr(towers.text, "cut", None)
    assert torch.equal(made(towers), by_length)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_shares_add_up_to_the_same_bits(towers, ranks):
    class Share(World):
        """One rank of several, whose sum is only noted down."""

        def total(self, values: torch.Tensor) -> torch.Tensor:
            shares.append(values)
            return values

        def each(self, work):
            return work()

        def gather(self, item, *, patient=False):
            return [item]

    shares: list[torch.Tensor] = []
    made(towers, 2, Share(0, 1, 0, ALONE.device))
    whole = shares.pop()
    for rank in range(ranks):
        made(towers, 2, Share(rank, ranks, 0, ALONE.device))
    assert torch.equal(sum(shares), whole)
    assert all(share.any() for share in shares)


def test_it_is_kept_until_the_weights_names_or_templates_are_others(towers):
    walk = Counted()
    classifiers = Classifiers(towers, TOKENIZE, 8, ALONE, walk)

    def of(names, templates) -> int:
        """Prompts that went through the tower."""
        walk.chunks.clear()
        classifiers.of(names, templates)
        return sum(rows.size for rows in walk.chunks)

    assert [of(NAMES, TEMPLATES), of(list(NAMES), tuple(TEMPLATES))] == [48, 0]
    assert [of(NAMES[:2], TEMPLATES), of(NAMES, TEMPLATES[:1]), of(NAMES[::-1], TEMPLATES)] == [6, 16, 48]
    assert of(NAMES, TEMPLATES) == 0
    assert torch.equal(classifiers.of(NAMES, TEMPLATES), made(towers))
    with torch.no_grad():
        towers.model.logit_scale.add_(1)  # no part of it
        assert of(NAMES, TEMPLATES) == 0
        towers.model.text.ln_final.bias.data[3] += 1e-3  # a change that no version counter sees
    assert [of(NAMES, TEMPLATES), of(NAMES[:2], TEMPLATES), of(NAMES, TEMPLATES)] == [48, 6, 0]
    assert torch.equal(classifiers.of(NAMES, TEMPLATES), made(towers))


def test_a_rank_that_lost_it_makes_it_with_all_others(towers):
    class Forgetful(World):
        def gather(self, item, *, patient=False):
            return [item, False] if isinstance(item, bool) else [item]

    walk = Counted()
    classifiers = Classifiers(towers, TOKENIZE, 8, Forgetful(0, 1, 0, ALONE.device), walk)
    first = classifiers.of(NAMES, TEMPLATES)
    walk.chunks.clear()
    assert torch.equal(classifiers.of(NAMES, TEMPLATES), first)
    assert walk.chunks
