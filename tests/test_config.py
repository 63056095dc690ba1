"""clipscale/config/settings.py and clipscale/config/load.py."""

import dataclasses
from pathlib import Path

import pytest

from clipscale.config import Config, Model, flat
from clipscale.config.data import Shapes, SourceSettings
from clipscale.config.load import apply_overrides, changed_keys, config_from_yaml, dump_config, load_config
from clipscale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TOWER = "{image_size: 16, patch_size: 8, width: 32, layers: 1, head_width: 16}"


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a config file and gives its path."""

    def write(text: str | bytes, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


def refusal(*arguments: str) -> str:
    """The one line with which `arguments` are refused."""
    with pytest.raises(UserError) as error:
        load_config(list(arguments))
    message = str(error.value)
    assert "\n" not in message
    return message


# --- shipped files, merging -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    config = load_config([str(path)])
    assert config.run.dir == f"runs/{path.stem}"
    assert config.data.sources
    assert config_from_yaml(dump_config(config)) == config


def test_shipped_configs_are_found():
    assert {"quickstart", "cifar10"} <= {path.stem for path in ROOT.glob("configs/*.yaml")}


def test_keys_that_scripts_outside_rely_on():
    config = load_config([str(ROOT / "configs" / "quickstart.yaml")])
    assert "shapes" in config.data.sources
    words = ["run.dir=x", "seed=3", "data.sources.shapes.urls=a.tar", "data.sources.shapes.weight=2"]
    words += ["train.global_batch=8", "train.samples=9", "gradcache.image_chunk=1", "gradcache.text_chunk=2"]
    words += ["loss.precision=fp32", "loss.engine=torch", "loss.tile=512", "eval.zeroshot.every_steps=4"]
    config = apply_overrides(config, words)
    assert (config.run.dir, config.seed) == ("x", 3)
    assert config.data.sources == {"shapes": SourceSettings("a.tar", 2.0)}
    assert (config.train.global_batch, config.train.samples, config.loss.precision) == (8, 9, "fp32")
    assert (config.loss.engine, config.loss.tile) == ("torch", 512)
    assert apply_overrides(config, ["loss.tile=null"]).loss.tile is None
    assert (config.gradcache.image_chunk, config.gradcache.text_chunk) == (1, 2)
    assert config.eval.zeroshot.every_steps == 4


def test_files_merge_from_left_to_right_and_words_come_last(yaml_file):
    one = yaml_file("train: {global_batch: 8, samples: 80}\ndata: {sources: {a: {urls: a.tar}}}", "one.yaml")
    two = yaml_file("train: {global_batch: 16}\nseed: 2\ndata: {sources: {b: {urls: b.tar, weight: 3}}}", "two.yaml")
    config = load_config(["seed=7", one, "optim.lr=0.5", two, "seed=9"])
    assert (config.train.global_batch, config.train.samples, config.seed, config.optim.lr) == (16, 80, 9, 0.5)
    assert config.data.sources == {"a": SourceSettings("a.tar", 1.0), "b": SourceSettings("b.tar", 3.0)}
    assert load_config([two, one]).train.global_batch == 8


def test_words_take_every_type():
    words = ["data.crop_scale=[0.5,1]", "train.grad_clip_norm=null", "data.shapes.seed=4", "run.dir=runs/a=b"]
    words += ["data.allow_repeats=true", "optim.lr=1e-3", "train.samples=1_000", "data.sources.x.urls='{00..09}.tar'"]
    config = load_config(words)
    assert config.data.crop_scale == (0.5, 1.0)
    assert config.train.grad_clip_norm is None
    assert config.data.shapes == Shapes(seed=4)
    assert (config.run.dir, config.data.allow_repeats, config.optim.lr) == ("runs/a=b", True, 1e-3)
    assert config.train.samples == 1000
    assert config.data.sources["x"].urls == "{00..09}.tar"


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(yaml_file):
    assert load_config([yaml_file("seed: 5", "a=b.yaml")]).seed == 5


def test_an_empty_file_changes_nothing(yaml_file):
    assert load_config([yaml_file("# only a comment\n")]) == Config()


# --- round trip, differences ------------------------------------------------------------------------------------------


def test_dump_and_load_give_the_same_config():
    words = [f"model.vision={TOWER}", "model.text={context_length: 8, width: 32}", "data.sources.s.urls=a b:'c'.tar"]
    words += ["data.shapes.dir=here", "optim.warmup_samples=100", f"seed={2**63 - 1}", "data.crop_scale=[0.1,0.7]"]
    config = load_config(words)
    assert config_from_yaml(dump_config(config)) == config
    assert apply_overrides(config, []) == config


def test_overrides_of_a_stored_config():
    stored = load_config(["eval.zeroshot.urls=a.tar", "data.sources.s.urls=s.tar"])
    changed = apply_overrides(stored, ["eval.zeroshot.urls=null", "eval.zeroshot.folder=val", "data.shapes.seed=1"])
    assert (changed.eval.zeroshot.urls, changed.eval.zeroshot.folder) == (None, "val")
    assert changed.data.shapes == Shapes(seed=1)
    assert stored.eval.zeroshot.urls == "a.tar"
    with pytest.raises(UserError, match=r"'runs/other' is no key\.path=value"):
        apply_overrides(stored, ["runs/other"])


def test_changed_keys_names_what_differs():
    old = load_config(["data.sources.a.urls=a.tar", "optim.lr=0.1"])
    new = load_config(["data.sources.a.urls=a.tar", "data.sources.b.urls=b.tar", "optim.lr=0.2", "data.shapes.seed=1"])
    assert changed_keys(old, old) == []
    changes = changed_keys(old, new)
    assert "optim.lr: 0.1 -> 0.2" in changes
    assert "data.sources.b.urls: None -> b.tar" in changes
    assert "data.shapes.seed: None -> 1" in changes
    source = [value for value in flat(dataclasses.asdict(SourceSettings(urls="b.tar"))).values() if value is not None]
    assert len(changes) == 1 + len(source) + len(dataclasses.fields(Shapes))


def test_warmup_in_samples_and_in_steps():
    assert load_config([]).warmup_samples == 0
    assert load_config(["optim.warmup_samples=100", "train.global_batch=8"]).warmup_samples == 100
    assert load_config(["optim.warmup_steps=5", "train.global_batch=8"]).warmup_samples == 40


# --- refusals: one line with the value, the rule and the fix ----------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("train.global_batc=3", "train.global_batch"),
        ("trian.global_batch=3", "train"),
        ("eval.zeroshot.evry_steps=3", "eval.zeroshot.every_steps"),
        ("data.sources.a.url=x", "data.sources.a.urls"),
        ("data.shapes.dri=x", "data.shapes.dir"),
        ("lr=3", "optim.lr"),  # the right name in the wrong place
        ("train.image_chunk=3", "gradcache.image_chunk"),
        ("batch=3", "eval.zeroshot.batch or eval.validation.batch or eval.retrieval.batch"),
    ],
)
def test_an_unknown_key_names_the_nearest(word, nearest, yaml_file):
    message = refusal(word)
    assert word in message
    assert f"unknown key; did you mean {nearest}?" in message
    *folders, key = word.split("=")[0].split(".")
    text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(folders)) + "  " * len(folders) + f"{key}: x"
    path = yaml_file(text)
    message = refusal(path)
    assert path in message
    assert f"did you mean {nearest}?" in message


def test_a_key_without_a_near_one_lists_what_there_is():
    assert "known here: run, seed, resume" in refusal("zzz=3")
    assert "known here: every_steps, every_minutes, keep" in refusal("checkpoint.zzz=3")


@pytest.mark.parametrize(
    "text", ["train: {samples: 1}\ntrain: {samples: 2}", "seed: 1\n\nseed: 1", "train:\n  samples: 1\n  samples: 2"]
)
def test_a_duplicate_key_is_refused(text, yaml_file):
    path = yaml_file(text)
    message = refusal(path)
    assert path in message
    assert "duplicate key" in message
    assert f"at line {len(text.splitlines())}" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- train\n- test", "a list; a config is a mapping"),
        ("just words", "just words: unknown key"),
        ("seed: 1\n\tdata: 2", "at line 2"),
        ("train: {samples: [1}", "at line 1"),
        (b"\xff\xfe\x00", "utf-8"),
        ("train: [1, 2]", "[1, 2]"),
        ("train: {samples: many}", "train.samples: Value 'many'"),
        ("data: {sources: {a: {weight: 1}}}", "data.sources.a.urls must be set"),
    ],
)
def test_files_that_are_no_config(text, said, yaml_file):
    path = yaml_file(text)
    message = refusal(path)
    assert said in message
    assert path in message or "must be set" in message


def test_a_long_word_is_a_word():
    word = f"data.sources.a.urls='{'x' * 300}.tar'"
    assert load_config([word]).data.sources["a"].urls == f"{'x' * 300}.tar"


def test_a_missing_file_and_a_folder(tmp_path):
    assert "config 'nowhere.yaml': no such file" in refusal("nowhere.yaml")
    assert "a folder" in refusal(str(tmp_path))


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("train.global_batch=many", "Integer"),
        ("train.global_batch=8.5", "Integer"),
        ("train.global_batch=true", "Integer"),
        ("train.global_batch=null", "'int'"),
        ("train.precision=fp31", "['auto', 'fp32', 'bf16', 'fp16']"),
        ("loss.engine=cuda", "['auto', 'triton', 'torch']"),
        ("data.accept_changes=perhaps", "bool"),
        ("data.crop_scale=[0.1]", "length 2"),
        ("data.crop_scale=0.5", "tuple"),
        ("data.crop_scale.0=0.5", "incompatible"),
        ("data.crop_ratio=[a,b]", "Float"),
        ("data.sources.a.urls=[a.tar,b.tar]", "string"),
        ("data.sources.a=a.tar", "its settings are data.sources.a.urls"),
        ("train=5", "its settings are train.global_batch"),
        ("train.global_batch=[1", "expected"),
    ],
)
def test_a_wrong_type_names_the_word_and_what_is_wanted(word, rule):
    message = refusal(word)
    assert word in message
    assert rule in message


@pytest.mark.parametrize(
    ("words", "value", "rule"),
    [
        (["gradcache.image_chunk=0"], "gradcache.image_chunk=0", "at least 1"),
        (["gradcache.text_chunk=-3"], "gradcache.text_chunk=-3", "at least 1"),
        (["train.global_batch=0"], "train.global_batch=0", "at least 1"),
        (["train.samples=0"], "train.samples=0", "at least 1"),
        (["train.grad_clip_norm=0"], "train.grad_clip_norm=0.0", "above 0, or null"),
        (["train.max_nonfinite_steps=0"], "train.max_nonfinite_steps=0", "at least 1"),
        (["data.threads=0"], "data.threads=0", "at least 1"),
        (["data.prefetch_steps=0"], "data.prefetch_steps=0", "at least 1"),
        (["data.max_pixels=0"], "data.max_pixels=0", "at least 1"),
        (["data.max_bad_fraction=1.5"], "data.max_bad_fraction=1.5", "[0, 1]"),
        (["data.max_refused_fraction=-1"], "data.max_refused_fraction=-1", "[0, 1]"),
        (["data.crop_scale=[0.9,0.5]"], "[0.9, 0.5]", "low <= high"),
        (["data.crop_scale=[0,1]"], "[0.0, 1.0]", "0 < low"),
        (["data.crop_ratio=[2,1]"], "[2.0, 1.0]", "low <= high"),
        (["data.block_shards=0"], "data.block_shards=0", "or null"),
        (["data.streams=3", "train.global_batch=8"], "data.streams=3", "choose a divisor, or null"),
        (["data.sources.a.urls=x", "data.sources.a.weight=-1"], "weight=-1.0", "not be negative"),
        (["data.sources.a.urls=x", "data.sources.a.weight=0"], "weight 0", "at least one above 0"),
        (["data.sources.a.urls=x", "data.sources.a.weight=inf"], "data.sources.a.weight=inf", "finite"),
        (["optim.lr=0"], "optim.lr=0.0", "above 0"),
        (["optim.lr=nan"], "optim.lr=nan", "above 0"),
        (["optim.weight_decay=inf"], "optim.weight_decay=inf", "finite"),
        (["optim.final_lr=1"], "optim.final_lr=1.0", "optim.lr=0.0005"),
        (["optim.betas=[0.9,1.0]"], "[0.9, 1.0]", "[0, 1)"),
        (["optim.eps=0"], "optim.eps=0.0", "above 0"),
        (["optim.warmup_steps=3", "optim.warmup_samples=4"], "optim.warmup_steps=3", "set one of them to null"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1", "not be negative"),
        (["optim.cooldown_steps=3", "optim.cooldown_samples=4"], "optim.cooldown_steps=3", "set one of them to null"),
        (["optim.cooldown_samples=-1"], "optim.cooldown_samples=-1", "not be negative"),
        (["optim.timescale_steps=0"], "optim.timescale_steps=0", "at least 1"),
        (["optim.cooldown_power=0"], "optim.cooldown_power=0.0", "above 0"),
        (["optim.lr_batch=0"], "optim.lr_batch=0", "at least 1"),
        (["optim.lr_rule=sqrt"], "optim.lr_rule=sqrt", "needs optim.lr_batch"),
        (["optim.schedule=rsqrt"], "optim.schedule=rsqrt", "needs optim.timescale_samples"),
        (
            ["train.samples=1000", "optim.warmup_samples=600", "optim.cooldown_samples=401"],
            "optim.warmup_*: 600 samples, optim.cooldown_*: 401",
            "longer than the run (train.samples=1,000)",
        ),
        (["loss.tile=0"], "loss.tile=0", "at least 1, or null"),
        (["checkpoint.every_steps=0"], "checkpoint.every_steps=0", "at least 1"),
        (["checkpoint.keep=0"], "checkpoint.keep=0", "at least 1"),
        (["run.log_every_steps=0"], "run.log_every_steps=0", "at least 1"),
        (["eval.zeroshot.batch=0"], "eval.zeroshot.batch=0", "at least 1"),
        (["eval.zeroshot.every_steps=-1"], "eval.zeroshot.every_steps=-1", "not be negative"),
        (["eval.zeroshot.urls=a", "eval.zeroshot.folder=b"], "eval.zeroshot.folder", "set one of them to null"),
        (["eval.validation.batch=0"], "eval.validation.batch=0", "at least 1"),
        (["seed=-1"], "seed=-1", "[0, 2^63)"),
        (["model.logit_scale_init=200"], "model.logit_scale_init=200.0", "model.logit_scale_max=100.0"),
        (["model.embed_dim=0"], "model.embed_dim=0", "at least 1"),
    ],
)
def test_impossible_values_and_combinations(words, value, rule):
    message = refusal(*words)
    assert value in message
    assert rule in message


def test_a_mixture_has_no_common_epoch_to_drop_the_rest_of():
    words = ["data.epoch_boundary=drop", "data.sources.a.urls=x", "data.sources.b.urls=y"]
    assert "use straddle" in refusal(*words)
    assert load_config([*words, "data.sources.b.weight=0"]).data.epoch_boundary == "drop"


def test_both_towers_are_described_or_neither():
    for word in (f"model.vision={TOWER}", "model.text={width: 32}"):
        assert "must be given together" in refusal(word)
    config = load_config([f"model.vision={TOWER}", "model.text={width: 32}", "model.vision.layers=2"])
    assert config.model.vision == {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    assert config.model.text == {"width": 32}
    assert load_config([]).model == Model()


def test_a_model_is_named_or_described_and_never_both():
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    message = refusal(quickstart, "model.name=ViT-B-3")
    assert "model.name='ViT-B-3'" in message
    assert "set one of them to null" in message
    config = load_config([quickstart, "model.name=ViT-B-32", "model.vision=null", "model.text=null"])
    assert (config.model.name, config.model.vision, config.model.text) == ("ViT-B-32", None, None)
    assert config_from_yaml(dump_config(config)) == config
