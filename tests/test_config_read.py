"""clipscale/config/read.py: text is taken as it stands, and what YAML would bend is refused or put right."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.cli import main
from clipscale.config import Config, Model, Run
from clipscale.config.data import Data, SourceSettings
from clipscale.config.load import apply_overrides, config_from_yaml, dump_config, load_config
from clipscale.errors import UserError

TOWERS = ["model.vision={width: 32}", "model.text={width: 32}"]
TEXTS = ["2024_01_05", "0123456", "on", "NO", "run #2", "5e10012", "7e44001", "1e5", "12:30", "0x1f", ".5", "null2"]
TEXTS += ["Null", "true", "a: b", "- a", "{a", "[a", "{a: b}", "!x", "&x", "*x", "a=b", "%", "@x", "'it's'", "'a' 'b'"]


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    return write


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_word_for_text_is_the_text(text):
    words = [f"run.dir={text}", f"model.name={text}", f"data.sources.a.urls={text}", f"data.cache_dir={text}"]
    config = load_config(words)
    assert config == apply_overrides(Config(), words)
    assert (config.run.dir, config.model.name, config.data.cache_dir) == (text, text, text)
    assert config.data.sources["a"].urls == text
    assert config_from_yaml(dump_config(config)) == config


def test_braces_of_shards_as_the_readme_has_them():
    for urls in ("{train,extra}/*.tar", "{0000..0999}.tar", "a/{0..9}.tar::{b,c}.tar", "[ab]*.tar"):
        assert load_config([f"data.sources.mine.urls={urls}"]).data.sources["mine"].urls == urls


def test_two_commit_hashes_are_two_runs():
    assert load_config(["run.dir=5e10012"]).run.dir != load_config(["run.dir=7e44001"]).run.dir


def test_null_is_none_where_that_can_be():
    assert load_config(["data.cache_dir=null", "model.name=null"]) == Config()
    assert load_config(["data.cache_dir='null'"]).data.cache_dir == "null"
    assert "run.dir=null" in refusal("run.dir=null")


@pytest.mark.parametrize(("word", "text"), [("'a b'", "a b"), ('"a b"', "a b"), (r'"a\tb"', "a\tb"), ("'''a'", "'a")])
def test_quotes_round_a_word_are_those_of_yaml(word, text):
    assert load_config([f"model.name={word}"]).model.name == text


def test_an_empty_word():
    assert load_config(["model.name="]).model.name == ""
    assert refusal("run.dir=").startswith("run.dir: '' is an empty path")


def test_what_is_no_text_is_yaml_as_ever():
    words = [
        "data.crop_scale=[0.5,1]",
        "data.exif=apply",
        "data.allow_pipe=on",
        "train.grad_clip_norm=null",
        "seed=1_0",
    ]
    words += [
        "data.sources={a: {urls: '1e5'}}",
        *TOWERS,
        "model.text.layers=2",
        "model.text.pool=last",
        "model.text.on=on",
    ]
    config = load_config(words)
    assert (config.data.crop_scale, config.data.exif, config.data.allow_pipe) == ((0.5, 1.0), "apply", True)
    assert (config.train.grad_clip_norm, config.seed, config.data.sources["a"].urls) == (None, 10, "1e5")
    assert config.model.text == {"width": 32, "layers": 2, "pool": "last", "on": True}


@pytest.mark.parametrize("name", ["1e5", "on", "0123", "2024_01"])
def test_names_of_sources_are_text_too(name, yaml_file):
    assert list(load_config([f"data.sources.{name}.urls=x"]).data.sources) == [name]
    quoted = yaml_file(f"data: {{sources: {{'{name}': {{urls: x}}}}}}")
    assert list(load_config([quoted]).data.sources) == [name]
    assert list(config_from_yaml(dump_config(load_config([quoted]))).data.sources) == [name]
    said = refusal(yaml_file(f"data: {{sources: {{{name}: {{urls: x}}}}}}"))
    assert "mine.yaml': data.sources: a name in it is " in said
    assert "put the name in quotes" in said


def test_a_name_with_a_dot():
    for word in ("data.sources[a.b].urls=x", r"data.sources.a\.b.urls=1e5"):
        assert list(load_config([word]).data.sources) == ["a.b"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("run: {dir: 2024_01_05}", "run.dir", "20240105"),
        ("run: {dir: 0123456}", "run.dir", "42798"),
        ("run:\n  dir: on", "run.dir", "True"),
        ("run: {dir: 5e10012}", "run.dir", "inf"),
        ("data: {sources: {a: {urls: 12}}}", "data.sources.a.urls", "12"),
        ("data: {sources: {a: {urls: x, select: {uid_field: 1.5}}}}", "data.sources.a.select.uid_field", "1.5"),
        ("model: {name: 1e3}", "model.name", "1000.0"),
    ],
)
def test_a_file_with_something_else_where_text_is_meant(text, key, value, yaml_file):
    path = yaml_file(text)
    assert refusal(path) == f"config {path!r}: {key}: {value} as YAML reads it, and text is wanted; put it in quotes"


def test_a_mapping_in_a_word_is_held_to_the_same():
    assert "data.sources.a.urls: 5 as YAML reads it" in refusal("data.sources.a={urls: 5}")


def test_text_of_a_file(yaml_file):
    config = load_config([yaml_file("run: {dir: '0123456'}\nmodel: {name: ~}\ndata: {cache_dir: null}")])
    assert config == Config(run=Run(dir="0123456"))


@pytest.mark.parametrize(("text", "why"), [("5", "no mapping of keys"), ("- a", "a list; a config is a mapping")])
def test_a_file_that_holds_no_mapping(text, why, yaml_file):
    assert why in refusal(yaml_file(text))


def test_an_old_checkpoint_keeps_what_was_made_of_its_words():
    assert config_from_yaml("run: {dir: inf}\nmodel: {name: 1000.0}").run.dir == "inf"
    assert config_from_yaml("run: {dir: 20240105}").run.dir == "20240105"


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "written", "number"),
    [("train.samples", "400e6", 400_000_000), ("train.samples", "1.28e7", 12_800_000), ("loss.tile", "1e3", 1000)],
)
def test_a_whole_number_with_an_exponent(key, written, number, yaml_file):
    section, name = key.split(".")
    for config in (load_config([f"{key}={written}"]), load_config([yaml_file(f"{section}: {{{name}: {written}}}")])):
        value = getattr(getattr(config, section), name)
        assert (value, type(value)) == (number, int)


@pytest.mark.parametrize("written", ["1.5", "1e-1", "inf", ".inf", "'400e6'", "true"])
def test_what_no_whole_number_equals(written, yaml_file):
    assert "Integer" in refusal(f"train.samples={written}")
    assert "Integer" in refusal(yaml_file(f"train: {{samples: {written}}}"))


def test_a_number_that_a_float_may_have_bent():
    assert "seed: 1e+17 is too large to be exact; write its digits out" in refusal("seed=1e17")


@pytest.mark.parametrize("written", ["0400", "-010", "1:30"])
def test_a_number_of_base_8_or_60_is_refused(written, yaml_file):
    assert f"{written} (line 1) is a number of base 8 or 60 to YAML" in refusal(f"train.samples={written}")
    assert f"{written} (line 2) is a number of base 8 or 60" in refusal(yaml_file(f"train:\n  samples: {written}\n"))
    assert "base 8 or 60" in refusal(f"model.text={{hf_model_name: {written}}}")


@pytest.mark.parametrize("written", ["0", "'0400'", "0.5", "10"])
def test_other_numbers_are_as_ever(written):
    assert load_config([f"seed={written}" if "." not in written else f"optim.lr={written}"])


def test_one_value_for_a_section(yaml_file):
    assert "model: model=ViT-B-32 gives a section one value; its settings are model.name, " in refusal("model=ViT-B-32")
    assert "run: run=5 gives a section one value; its settings are run.dir, run.log_every_steps" in refusal(
        yaml_file("run: 5")
    )


# --- dollars ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["https://h/x?k=${T}&l=$U", "https://h/${x", r"https://h/\${a}\\${b}${c", "pipe:echo ${a:-b}"]
)
def test_a_dollar_in_text_is_a_dollar(text, yaml_file):
    config = load_config([f"data.sources.a.urls={text}", f"model.name={text}"])
    assert (config.data.sources["a"].urls, config.model.name) == (text, text)
    assert load_config([yaml_file(dump_config(config))]) == config
    assert apply_overrides(config_from_yaml(dump_config(config)), ["seed=0"]) == config


def test_no_setting_refers_to_another(yaml_file):
    for said in (refusal("train.samples=${seed}"), refusal(yaml_file("train: {samples: '${seed}'}"))):
        assert "train.samples: '${seed}': no variable and no other setting can stand here; write the value" in said
    assert "'???' says that nothing is set" in refusal("model.name=???")


@settings(max_examples=10, deadline=None)
@given(*[st.text("\\${}ab:?. '\"#~%|\n*[],é\u2028", max_size=8)] * 4)
def test_any_text_comes_back(run_dir, name, urls, field):
    source = SourceSettings(urls + "x", caption=field + "x")
    config = Config(
        Run(dir=f"{run_dir}x"),
        data=Data(sources={name: source}),
        model=Model(vision={urls: [field]}, text={"a": {field: run_dir}}),
    )
    assert config_from_yaml(dump_config(config)) == config
    assert apply_overrides(config, ["seed=1"]) == dataclasses.replace(config, seed=1)


def test_the_resolved_config_shows_the_words(capsys):
    assert main(["train", "quickstart", "run.dir=0123", "train.samples=4e5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "  dir: '0123'" in printed
    assert "  samples: 400000 " in printed
