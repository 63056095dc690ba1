"""clipscale/fit_tokenizer.py: a text tower's tokenizer, vocabulary and length come from one place and fit each other.

Hugging Face's parts are a tiny tower and a tokenizer of words, made here: nothing is fetched.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
from shards import write_pairs
from tiny import MODEL, tiny_config

from clipscale.config import Config, Model
from clipscale.data import tokenize as tokenize_module
from clipscale.errors import UserError
from clipscale.export.export import export_model
from clipscale.fit_tokenizer import fitting_tokenizer
from clipscale.towers import Towers, build_towers
from clipscale.training.trainer import train
from clipscale.upstream.open_clip_files import TokenizerChoice
from clipscale.weights.find import Found
from clipscale.weights.target import find_target

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
WORDS = ["number", "of", "shard", *(f"{i}" for i in range(10)), "a", "photo", "cat"]
LENGTH = 12


def towers_with(**text) -> Towers:
    """The tiny model with another text tower."""
    return build_towers(dataclasses.replace(MODEL, text=text))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """A folder with a tower of 514 positions, as Roberta's, and its tokenizer of 20 ids."""
    import tokenizers
    import transformers

    folder, vocabulary = tmp_path_factory.mktemp("parts"), {word: i for i, word in enumerate(SPECIAL + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    transformers.RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=514,
        pad_token_id=1,
    ).save_pretrained(folder)
    return folder


def described(parts: Path, **changes) -> dict:
    text = {"hf_model_name": str(parts), "hf_model_pretrained": False, "hf_proj_type": "linear"}
    return text | {"context_length": LENGTH} | changes


# --- Hugging Face's ---------------------------------------------------------------------------------------------------


@pytest.mark.needs("transformers")
def test_a_described_tower_gets_its_own_tokenizer_and_open_clips_length(parts):
    towers = towers_with(**described(parts))
    tokenize = fitting_tokenizer(towers)
    assert (towers.context_length, towers.vocabulary) == (LENGTH, len(SPECIAL + WORDS))
    assert tokenize(["a photo of"]).tolist() == [[0, 17, 18, 5, 2, *[1] * (LENGTH - 5)]]
    assert tokenize.name == str(parts)
    layer = "transformer.encoder.layer.0"
    dropouts = [f"{layer}.attention.self", f"{layer}.attention.output.dropout", f"{layer}.output.dropout"]
    assert towers.draws_by_chunk() == {"image": [], "text": ["transformer.embeddings.dropout", *dropouts]}
    assert pickle.loads(pickle.dumps(tokenize))(["cat"]).tolist() == tokenize(["cat"]).tolist()
    text = described(parts)
    del text["context_length"]
    assert towers_with(**text).context_length == 77  # not the tower's 514


@pytest.mark.needs("transformers")
def test_a_named_tower_of_514_positions_takes_open_clips_77(parts, monkeypatch):
    settings = open_clip.get_model_config("roberta-ViT-B-32")
    settings["text_cfg"] |= {"hf_model_name": str(parts), "hf_tokenizer_name": str(parts), "hf_model_pretrained": False}
    settings["vision_cfg"] = MODEL.vision
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mine", settings)
    towers = build_towers(Model(name="mine"))
    theirs = open_clip.get_tokenizer("mine")(["a photo of a cat"])
    assert theirs.shape == (1, towers.context_length) == (1, 77)
    assert torch.equal(fitting_tokenizer(towers)(["a photo of a cat"]), theirs)


@pytest.mark.needs("transformers")
def test_an_exported_tower_brings_its_tokenizer(parts, tmp_path):
    model = dataclasses.replace(MODEL, text=described(parts))
    torch.save(build_towers(model).model.state_dict(), tmp_path / "a.pt")
    export_model(Found("file", tmp_path / "a.pt"), Config(model=model), "open_clip", str(tmp_path / "out"))
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert tokenizer(["a photo of"]).tolist() == [[0, 17, 18, 5, 2, *[1] * (LENGTH - 5)]]
    config = find_target(str(tmp_path / "out"), [])[1]
    assert config.model.text["hf_tokenizer_name"] == str(tmp_path / "out")


@pytest.mark.needs("transformers")
def test_a_run_with_such_a_tower_learns_and_resumes(parts, tmp_path):
    urls = write_pairs(tmp_path / "pairs", 2, 8, size=16)
    text = ", ".join(f"{key}: {value}" for key, value in described(parts).items()).replace("False", "false")
    words = [f"model.text={{{text}, width: 32}}", "optim.lr=0.01"]
    train(tiny_config(tmp_path, urls, *words))
    train(tiny_config(tmp_path, urls, *words, "train.samples=48"))
    assert "resuming after step 4" in (tmp_path / "run" / "run.log").read_text()


@pytest.mark.needs("transformers")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"vocab_size": 10, "pool_type": "last"}, r"gives ids from 0 to 19, the text tower knows 0 to 9: they are not"),
        (
            {"pool_type": "argmax"},
            r"pool_type=argmax takes the highest id for the end of a text, here 2 in one and 19 in another",
        ),
        ({"pool_type": "eos", "eos_id": 7}, r"ends no text with model\.text\.eos_id=7"),
    ],
)
def test_open_clips_own_tower_with_a_tokenizer_that_does_not_fit(parts, text, said):
    towers = towers_with(**MODEL.text, hf_tokenizer_name=str(parts), **text)
    with pytest.raises(UserError, match=said):
        fitting_tokenizer(towers)


@pytest.mark.needs("transformers")
def test_open_clips_own_tower_with_a_tokenizer_that_fits(parts):
    text = {**MODEL.text, "hf_tokenizer_name": str(parts), "vocab_size": 20}
    for pooling in ({"pool_type": "last"}, {"pool_type": "eos", "eos_id": 2}):
        assert fitting_tokenizer(towers_with(**text, **pooling))(["cat"]).shape == (1, 8)


@pytest.mark.needs("transformers")
def test_a_tokenizer_that_is_not_there_names_its_setting(parts, tmp_path):
    towers = towers_with(**described(parts, hf_tokenizer_name=f"{tmp_path}/nowhere"))
    with pytest.raises(
        UserError, match=r"tokenizer of model\.text\.hf_tokenizer_name='.*nowhere' cannot be loaded"
    ) as error:
        fitting_tokenizer(towers)
    assert "\n" not in str(error.value)


# --- any --------------------------------------------------------------------------------------------------------------


def test_clips_own_are_what_they_were():
    tokenize = fitting_tokenizer(build_towers(MODEL))
    assert tokenize.name == "CLIP"
    assert torch.equal(tokenize(["a cat"]), open_clip.SimpleTokenizer(context_length=8)(["a cat"]))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (lambda captions: torch.zeros(len(captions), 9, dtype=torch.int64), r"makes \[4, 9\] tokens .* takes \[4, 8\]"),
        (lambda captions: torch.full((len(captions), 8), 49_408), "gives ids from 49408 to 49408"),
        (lambda captions: torch.full((len(captions), 8), -1), "gives ids from -1 to -1"),
        (lambda captions: captions["ids"], "does not take captions: TypeError"),
    ],
    ids=["length", "above", "below", "refuses"],
)
def test_what_a_tokenizer_makes_is_tried_first(monkeypatch, theirs, said):
    monkeypatch.setattr(tokenize_module, "_load", lambda choice: theirs)
    with pytest.raises(UserError, match=said):
        fitting_tokenizer(build_towers(MODEL))


def test_the_name_holds_all_that_decides_the_ids():
    assert TokenizerChoice(8).name == "CLIP"
    assert TokenizerChoice(8, model="ViT-B-32").name == "ViT-B-32"
    choice = TokenizerChoice(8, hugging_face="bert", mode="clips", options={"strip_sep_token": True, "clean": "lower"})
    assert choice.name == "bert clips clean=lower strip_sep_token=True"
