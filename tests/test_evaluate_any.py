"""`clipscale eval` of any weights: a run, a checkpoint, a file, a tag and an exported folder score alike."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from shards import picture
from tiny import save_run

from clipscale.cli import main
from clipscale.config import Model
from clipscale.evaluate import evaluate_checkpoint

NAME = "ViT-test-eval"
SETTINGS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
CLASSES = ("ant", "cat", "dog", "fox", "owl", "yak")  # as folders are sorted


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of a model by name, its weights in each form, and a tree of six classes."""
    folder = tmp_path_factory.mktemp("place")
    (folder / f"{NAME}.json").write_text(json.dumps(SETTINGS))
    open_clip.add_model_config(folder / f"{NAME}.json")
    towers = save_run(folder / "run", Model(name=NAME))
    torch.save({"state_dict": towers.model.state_dict()}, folder / "epoch.pt")
    assert main(["export", str(folder / "run"), "--format", "open_clip", "--output", str(folder / "exported")]) == 0
    for label, name in enumerate(CLASSES):
        (folder / "tree" / name).mkdir(parents=True)
        for number in range(4):
            (folder / "tree" / name / f"{number}.jpg").write_bytes(picture(10 * label + number, 24, 30))
    (folder / "t.txt").write_text("a photo of a {}")
    return folder


@pytest.fixture
def words(place) -> list[str]:
    return [f"eval.zeroshot.folder={place / 'tree'}", f"eval.zeroshot.templates={place / 't.txt'}"]


def theirs(place: Path, **forced) -> float:
    """Top-1 by open_clip's own model, transform, tokenizer and classifier."""
    file = str(place / "exported/open_clip_model.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms(NAME, pretrained=file, **forced)
    model.eval()
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(NAME), CLASSES, [lambda name: f"a photo of a {name}"]
    )
    right = []
    for label, name in enumerate(CLASSES):
        for path in sorted((place / "tree" / name).iterdir()):
            with torch.no_grad():
                image = model.encode_image(preprocess(Image.open(path))[None], normalize=True)
            right.append((image @ classifier).argmax().item() == label)
    return sum(right) / len(right)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "exported", "local-dir", "tag"])
def test_every_target_gives_what_open_clip_gives(kind, place, words, capsys, monkeypatch):
    given = {
        "run": [str(place / "run")],
        "checkpoint": [str(place / "run/checkpoints/step-000000004")],
        "file": [str(place / "epoch.pt"), f"model.name={NAME}"],
        "exported": [str(place / "exported")],
        "local-dir": [f"local-dir:{place / 'exported'}"],
        "tag": [f"{NAME}:made_up"],
    }
    file = str(place / "exported/open_clip_model.safetensors")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, {"made_up": {"file": file}})
    monkeypatch.setattr("clipscale.weights.find.pretrained_tags", lambda name: ["made_up"])
    assert main(["eval", "zeroshot", *given[kind], *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 4  zeroshot/top1 ") is (kind in ("run", "checkpoint"))
    assert f"zeroshot/top1 {theirs(place):.4f}  " in out


def test_another_size_at_evaluation_is_open_clips_resized_load(place, words, told):
    scores = evaluate_checkpoint(str(place / "run"), "zeroshot", [*words, "model.image_size=32"])
    assert scores["zeroshot/top1"] == pytest.approx(theirs(place, force_image_size=32))
    assert any("1 resized (visual.positional_embedding 5 -> 17 positions)" in line for line in told)


def test_what_cannot_be_evaluated_is_one_line(place, words, capsys):
    (place / "empty").mkdir(exist_ok=True)
    vision, text = SETTINGS["vision_cfg"] | {"width": 48}, SETTINGS["text_cfg"]
    wider = [f"model.vision={json.dumps(vision)}", f"model.text={json.dumps(text)}", "model.embed_dim=16"]
    for given, said in (
        ([str(place / "nowhere")], "is no file and no folder"),
        ([str(place / "empty")], "is neither a checkpoint nor the folder of a run with checkpoints"),
        ([str(place / "epoch.pt")], "no model: set model.name"),
        (
            [str(place / "epoch.pt"), *wider],
            "the weights do not fit the model: of another shape: visual.class_embedding",
        ),
        (["ViT-B-32:opnai"], "no tag of ViT-B-32; did you mean openai?"),
        (["ViT-B-3:openai"], "is no file and no folder"),
    ):
        assert main(["eval", "zeroshot", *given, *words]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
