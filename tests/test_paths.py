"""clipscale/paths.py, and that every setting and option that means a path says so."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
from shards import picture, write_shard

from clipscale.cli import COMMANDS, main, parse
from clipscale.config import Config
from clipscale.config.help import find_settings
from clipscale.config.load import apply_overrides, config_from_yaml, dump_config, load_config
from clipscale.config.read import _inner, _kind, read_file, read_word
from clipscale.errors import UserError
from clipscale.paths import PathKind, local_path, path_option, shard_urls, shards_option, weights_option
from clipscale.shardkit.commands import cifar10, describe, make, run_script, shapes
from clipscale.shardkit.commands.options import path as whole_path
from clipscale.shardkit.commands.options import positive

# A name or a comment that says: a path.
NAMES = re.compile(r"(^|_)(dir|folder|file|path|urls?|uids|counts|classnames|templates|resume)$")
NUMBERS = (int, positive)  # of shards, and such
COMMENTS = re.compile(r"\b(folder|file|path|shards with|where .* go)\b")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder; `~` and some variables are what they are not elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", "/u/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("BUCKET", "s3://bucket")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOT_SET", raising=False)
    return tmp_path / "here"


# --- one path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("runs/q", "runs/q"),
        ("~/runs/q", "/u/me/runs/q"),
        ("~", "/u/me"),
        ("$HOME/q", "/u/me/q"),
        ("${SCRATCH}/q-$HOME", "/scratch/me/q-/u/me"),
        ("a/~/b", "a/~/b"),
        ("file:q", "q"),
        ("file:///x/y", "/x/y"),
        ("FILE://localhost/x", "/x"),
        ("file:~/q", "/u/me/q"),
        ("a:b", "a:b"),
        ("2024-01-05T10:00/q", "2024-01-05T10:00/q"),
        ("./s3:/b", "./s3:/b"),
        ("5$", "5$"),
        ("$5 $(x) ${", "$5 $(x) ${"),  # no variables
        (" a b ", " a b "),
    ],
)
def test_a_local_path(text, path):
    assert local_path(text) == path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3://b/q", "a URL (s3:...), and this must be a path on a disk of this machine"),
        ("gs://b/q", "a URL (gs:...)"),
        ("hf://datasets/b", "a URL (hf:...)"),
        ("https://me:word@h/q?token=abc", "a URL (https:...)"),
        ("S3:/b/q", "a URL (S3:...)"),
        ("gs:b/q", "a URL (gs:...)"),
        ("pipe:cat x", "a URL (pipe:...)"),
        ("nas:/data", "a name that holds a colon: ./nas:..."),
        ("$BUCKET/q", "a URL (s3:...)"),
        (" s3://b/q", "a URL (s3:...)"),
        ("file://nas/data", "names the host 'nas'; a file of this machine: file:///<path>"),
        ("$NOT_SET/q", "'$NOT_SET/q': the variable NOT_SET is not set"),
        ("a/${NOT_SET}", "the variable NOT_SET is not set"),
        ("$EMPTY/q", "the variable EMPTY is empty"),
        ("${HOME:-x}", "'${HOME:-x}' is no variable; write $NAME or ${NAME}"),
        ("~no-such-user/q", "~no-such-user has no home folder here"),
        ("", "an empty path"),
        ("  ", "an empty path"),
    ],
)
def test_what_is_no_local_path(text, why):
    with pytest.raises(UserError) as error:
        local_path(text)
    assert why in str(error.value)
    assert "\n" not in str(error.value)
    assert "word" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "urls"),
    [
        ("~/s/{00..09}.tar", "/u/me/s/{00..09}.tar"),
        ("a.tar::~/b.tar:: ${SCRATCH}/{a,b}/*.tar", "a.tar::/u/me/b.tar::/scratch/me/{a,b}/*.tar"),
        ("file:~/a:b.tar", "file:/u/me/a:b.tar"),
        ("{$SCRATCH,$HOME}/*.tar", "{/scratch/me,/u/me}/*.tar"),
        ("$BUCKET/{0..9}.tar", "s3://bucket/{0..9}.tar"),
        ("https://h/x.tar?k=$HOME&s=${SCRATCH}~", "https://h/x.tar?k=$HOME&s=${SCRATCH}~"),  # a secret, not ours
        ("pipe:cat $HOME/x::~/a", "pipe:cat $HOME/x::/u/me/a"),  # the shell's
        ("", ""),
    ],
)
def test_shards(text, urls):
    assert shard_urls(text) == urls


def test_shards_of_a_variable_that_is_not_set():
    with pytest.raises(UserError, match=r"^'\$NOT_SET/b\.tar': the variable NOT_SET is not set$"):
        shard_urls("https://h/x?token=abc::$NOT_SET/b.tar")


# --- settings ---------------------------------------------------------------------------------------------------------


def declared() -> dict[str, PathKind | None]:
    """Every setting, and which path its type says it is."""
    keys = [setting.key for section in find_settings() for setting in section.settings]
    return {key: _kind(reduce(_inner, key.split("."), Config))[1] for key in keys}


def test_every_setting_that_sounds_like_a_path_is_declared_as_one():
    kinds = declared()
    assert sum(kind is not None for kind in kinds.values()) >= 14
    for section in find_settings():
        for setting in section.settings:
            text = setting.type in ("str", "str | null")
            sounds = NAMES.search(setting.key.rpartition(".")[2]) or COMMENTS.search(setting.comment)
            if text and sounds and kinds[setting.key] is None:
                raise AssertionError(f"{setting.key}: give it LocalPath, LocalFile or ShardUrls ({setting.comment})")


def named(key: str) -> str:
    """A name is that of the section, for no two sections may use the same."""
    return key.replace("<name>", key.partition(".<name>")[0].rpartition(".")[2])


PATHS = [(named(key), kind) for key, kind in declared().items() if kind is not None]


def value_of(config: Config | dict, key: str) -> str:
    value = config
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def yaml_of(key: str, value: str) -> str:
    Path("path.yaml").write_text("{" + ": {".join(key.split(".")) + f": '{value}'" + "}" * (key.count(".") + 1))
    return "path.yaml"


@pytest.mark.parametrize(("key", "kind"), PATHS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_path_setting_is_expanded_and_checked(key, kind):
    assert value_of(read_word(f"{key}=~/a"), key) == "/u/me/a"
    assert value_of(read_file(yaml_of(key, "${SCRATCH}/a")), key) == "/scratch/me/a"
    with pytest.raises(UserError, match=rf"^{re.escape(key)}: '\$NOT_SET/a': the variable NOT_SET is not set$"):
        read_word(f"{key}=$NOT_SET/a")
    if kind.read is not shard_urls:
        with pytest.raises(UserError, match=rf"^{re.escape(key)}: a URL \(s3:\.\.\.\)"):
            read_word(f"{key}=s3://b/q")
        with pytest.raises(UserError, match=rf"^{re.escape(key)}: a URL \(gs:\.\.\.\)"):
            read_file(yaml_of(key, "gs://b/q"))
    else:
        assert value_of(read_word(f"{key}=s3://b/q?k=$T"), key) == "s3://b/q?k=$T"


SECOND = tuple(
    f"{its}.{key}" for its in ("eval.zeroshot", "eval.zeroshot_sets.zeroshot_sets") for key in ("folder", "wds")
)
"""Instead of urls."""


def test_the_resolved_config_shows_the_paths_that_are_used():
    words = [f"{key}=$HOME/{i}" for i, (key, _) in enumerate(PATHS) if key not in SECOND]
    words.append("data.sources.sources.caption_weights={txt: 1, 'extra:txt': 1}")  # or its extra shards are for nothing
    config = apply_overrides(load_config(words), ["resume=~/r"])  # eval takes the same words
    for i, (key, _) in enumerate(PATHS):
        if key not in (*SECOND, "resume"):
            assert value_of(config, key) == f"/u/me/{i}"
            assert f"{key.rpartition('.')[2]}: /u/me/{i}\n" in dump_config(config)
    assert config.resume == "/u/me/r"
    for word, said in (("run.dir=s3://b", "run.dir: a URL"), ("run.dir=$NOT_SET", "run.dir: '$NOT_SET': the variable")):
        with pytest.raises(UserError) as error:
            load_config([word])
        assert str(error.value).startswith(said)
    with pytest.raises(UserError, match=r"^config 'path\.yaml': run\.dir: a URL"):
        load_config([yaml_of("run.dir", "s3://b")])


def test_words_that_are_no_paths_stay():
    config = load_config(["resume=fresh", "eval.zeroshot.classnames=imagenet"])
    assert (config.resume, config.eval.zeroshot.classnames) == ("fresh", "imagenet")


def test_a_stored_config_is_taken_as_it_stands():
    old = "run: {dir: 's3://b/$NOT_SET/${x}'}\ndata: {sources: {a: {urls: ~/a.tar}}, cache_dir: 5}"
    config = config_from_yaml(old)
    assert (config.run.dir, config.data.sources["a"].urls, config.data.cache_dir) == (
        "s3://b/$NOT_SET/${x}",
        "~/a.tar",
        "5",
    )
    assert config_from_yaml(dump_config(config)) == config
    changed = apply_overrides(config, ["eval.zeroshot.folder=~/val"])
    assert (changed.run.dir, changed.eval.zeroshot.folder) == (config.run.dir, "/u/me/val")


def test_a_config_file_is_a_path_too(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    Path("mine.yaml").write_text("seed: 7")
    assert load_config(["~/mine.yaml"]).seed == load_config(["$HOME/mine.yaml"]).seed == 7
    for word, why in (("s3://b/mine.yaml", "a URL"), ("$NOT_SET/a.yaml", "variable NOT_SET is not set")):
        with pytest.raises(UserError, match=f"^config {re.escape(repr(word))}: .*{why}"):
            load_config([word])


# --- options ----------------------------------------------------------------------------------------------------------


def options() -> Iterator[tuple[str, argparse.Action]]:
    """Every option that takes a word, of every command of clipscale and of the scripts of data_tools/."""

    def inside(name: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    yield from inside(f"{name} {word}", inner)
            elif action.nargs != 0:
                yield name, action

    for name in COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"clipscale.cli.{name}").add_arguments(parser)
        yield from inside(name, parser)
    for command in (cifar10, shapes):
        parser = argparse.ArgumentParser()
        describe(parser, command, "script")
        yield from inside(command.__name__, parser)


def test_every_option_that_sounds_like_a_path_is_read_as_one():
    sounds = re.compile(r"\b(dir|file|folder|shards?|urls|output|source|scratch|checkpoint|uids|result)\b")
    words = [(name, f"{action.metavar} {action.dest}".lower().replace("_", " "), action) for name, action in options()]
    paths = [(name, action) for name, word, action in words if sounds.search(word) and action.type not in NUMBERS]
    assert len(paths) >= 25
    for name, action in paths:
        assert action.type in (path_option, shards_option, weights_option, whole_path), (name, action.dest)


@pytest.mark.parametrize("output", ["s3://b/q", "gs://b/q", "hf://b/q", "$NOT_SET/q"])
def test_shards_go_to_no_folder_that_a_url_names(output, here, capsys):
    for run in (
        lambda: run_script(make, "make_shards.py", ["captions.csv", "--output", output]),
        lambda: main(["shards", "make", "captions.csv", "--output", output]),
        lambda: main(["shards", "inspect", "a.tar", "--output", f"{output}.png"]),
        lambda: main(["bench", "data", "--output", output]),
        lambda: main(["train", "quickstart", f"run.dir={output}"]),
        lambda: main(["eval", "zeroshot", output]),
    ):
        try:
            status = run()
        except SystemExit as end:
            status = end.code
        assert status == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "a URL (" in error or "the variable NOT_SET is not set" in error
    assert not list(here.iterdir())


def test_options_are_expanded():
    words = shlex.split(
        "index ~/{a,b}.tar https://h/x?k=$HOME --index-dir $SCRATCH/i --cache-dir ~/c --uids file:///u.npy"
    )
    arguments = parse(words)[1]
    assert arguments.shards == ["/u/me/{a,b}.tar", "https://h/x?k=$HOME"]
    assert (arguments.index_dir, arguments.cache_dir, arguments.uids) == ("/scratch/me/i", "/u/me/c", "/u.npy")
    assert parse(["shards", "make", "~/a.csv", "--output", "~/s"])[1].output == Path("/u/me/s")
    assert parse(["eval", "zeroshot", "~/runs/a"])[1].checkpoint == "/u/me/runs/a"


def test_shards_below_home_are_indexed(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    write_shard(here / "a.tar", [("0", {"jpg": picture(0, 8, 8), "txt": b"a"})])
    assert main(["index", "~/*.tar", "--index-dir", "$HOME/index"]) == 0
    assert {path.name for path in here.iterdir()} == {"a.tar", "index"}
