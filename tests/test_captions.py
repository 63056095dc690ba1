"""clipscale/data/shard/captions.py: which text of a sample is its caption."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipscale.data.shard.captions import CAPTION_FAULTS, CaptionError, CaptionRule

LINES = b"\n  a dog \r\n\n a brown dog\n\n"
NESTED = json.dumps(
    {"caption": {"long": ["  ", "ein Hund", "собака "], "short": "dog\n"}, "n": 3, "none": None}
).encode()


@pytest.mark.parametrize(
    ("caption", "policy", "note", "draw", "text"),
    [
        ("txt", "whole", b" a dog\n", 0, "a dog"),
        ("txt", "whole", LINES, 5, "a dog \r\n\n a brown dog"),
        ("TXT", "first", LINES, 5, "a dog"),
        (".txt", "random", LINES, 4, "a dog"),
        ("en.txt", "random", LINES, 2**64 - 1, "a brown dog"),
        ("json:caption.long", "whole", NESTED, 0, "ein Hund\nсобака"),
        ("json:caption.long", "first", NESTED, 0, "ein Hund"),
        ("json:caption.long", "random", NESTED, 7, "собака"),
        ("json:caption.short", "whole", NESTED, 0, "dog"),
        ("json:caption.short", "random", NESTED, 12, "dog"),
    ],
)
def test_picked(caption, policy, note, draw, text):
    assert CaptionRule.of(caption, policy).pick(note, draw) == text


@pytest.mark.parametrize(
    ("caption", "note", "cause"),
    [
        ("txt", b" \n\t ", "empty caption"),
        ("txt", b"", "empty caption"),
        ("txt", bytes(40), "empty caption"),  # a hole in the file
        ("txt", b" \0\n\0 ", "empty caption"),
        ("txt", "café".encode("latin-1"), "caption is not UTF-8"),
        ("txt", b"x" * 70_000, "caption above 64 KiB"),
        ("json:caption.short.x", NESTED, "no caption"),
        ("json:no", NESTED, "no caption"),
        ("json:none", NESTED, "no caption"),
        ("json:n", NESTED, "caption is not text"),
        ("json:caption", NESTED, "caption is not text"),
        ("json:a", b'{"a": ["x", 3]}', "caption is not text"),
        ("json:a", b'{"a": []}', "empty caption"),
        ("json:a", b'{"a": ["", " "]}', "empty caption"),
        ("json:a", b"[1, 2]", "no caption"),
        ("json:a", b'{"a": "x"', "broken JSON"),
        ("json:a", b"\xff\xfe\xfa", "broken JSON"),
        ("json:a", b"[" * 100_000, "broken JSON"),  # would overflow the stack
        ("json:a", b'{"a": ' + b"9" * 100_000 + b"}", "broken JSON"),  # would take minutes to become a number
        ("json:a", b'{"a": "\\ud800"}', "caption is not UTF-8"),  # half of a surrogate pair
        ("json:a", b'{"a": "' + b"x" * 70_000 + b'"}', "caption above 64 KiB"),
        ("json:a", b'{"a": "x", "b": "' + b"x" * (1 << 20) + b'"}', "JSON above 1 MiB"),
    ],
)
@pytest.mark.parametrize("policy", ["whole", "first", "random"])
def test_refused(caption, note, cause, policy):
    with pytest.raises(CaptionError) as error:
        CaptionRule.of(caption, policy).pick(note, 1)
    assert str(error.value) == cause
    assert cause in CAPTION_FAULTS


@given(st.lists(st.text(max_size=5), max_size=5), st.integers(0, 2**64 - 1))
def test_every_policy_finds_a_caption_or_none_does(texts, draw):
    """So that what the index let pass under one policy is there under another."""
    for caption, note in (("json:a", json.dumps({"a": texts}).encode()), ("txt", "\n".join(texts).encode())):
        found = []
        for policy in ("whole", "first", "random"):
            try:
                found.append(CaptionRule.of(caption, policy).pick(note, draw))
            except CaptionError:
                found.append(None)
        assert all(found) or not any(found)
        if all(found) and caption != "txt":
            assert found[1] == next(text.strip() for text in texts if text.strip())
            assert found[2] in [text.strip() for text in texts]


def test_random_takes_each_alike():
    rule = CaptionRule.of("json:a", "random")
    note = json.dumps({"a": ["x", "y", "z"]}).encode()
    assert [rule.pick(note, draw) for draw in range(6)] == ["x", "y", "z"] * 2
