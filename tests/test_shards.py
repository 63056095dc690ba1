import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipscale.data.fetch.urls import expand_urls, is_local, masked
from clipscale.errors import UserError
from clipscale.files import cache_folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("train-00.tar", "train-01.tar", "train-02.tar", "extra-00.tar", "deep/er/x.tar", "odd[1].tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train-00.tar", ["train-00.tar"]),
        ("train-{00..02}.tar", ["train-00.tar", "train-01.tar", "train-02.tar"]),
        ("train-{02,00}.tar", ["train-02.tar", "train-00.tar"]),  # the order given
        ("train-*.tar", ["train-00.tar", "train-01.tar", "train-02.tar"]),
        ("{extra,train}-*.tar", ["extra-00.tar", "train-00.tar", "train-01.tar", "train-02.tar"]),
        ("train-0[12].tar", ["train-01.tar", "train-02.tar"]),
        ("train-0?.tar::extra-00.tar", ["train-00.tar", "train-01.tar", "train-02.tar", "extra-00.tar"]),
        (" train-00.tar :: extra-00.tar ", ["train-00.tar", "extra-00.tar"]),
        ("deep/**/*.tar", ["deep/er/x.tar"]),
        ("file:train-00.tar", ["train-00.tar"]),
        ("odd[1].tar", ["odd[1].tar"]),
        ("FILE:train-00.tar", ["train-00.tar"]),
        ("./train-00.tar", ["./train-00.tar"]),
        ("https://host/a/{0..1}.tar::train-00.tar", ["https://host/a/0.tar", "https://host/a/1.tar", "train-00.tar"]),
        ("HTTP://host/{a,b}?t=1&u=*", ["HTTP://host/a?t=1&u=*", "HTTP://host/b?t=1&u=*"]),  # no glob in a URL
        ("hf://datasets/me/set/{0..1}.tar", ["hf://datasets/me/set/0.tar", "hf://datasets/me/set/1.tar"]),
    ],
)
def test_expansion(folder, pattern, names):
    assert expand_urls(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "names no shard"),
        ("::", "names no shard"),
        ("no-such.tar", "shard 'no-such.tar' is not a file; check the path"),
        ("train-{01..04}.tar", r"shard 'train-03.tar' is not a file \(and 1 more of 4\)"),
        ("deep", "shard 'deep' is not a file"),
        ("none-*.tar", "shards 'none-\\*.tar': no file matches"),
        ("train-00.tar::train-*.tar", r"train-00.tar' is named 2 times"),
        ("train-00.tar::./train-00.tar", r"train-00.tar' is named 2 times"),
        ("https://h/0.tar::https://h/0.tar", "'https://h/0.tar' is named 2 times"),
        ("ftp://h/0.tar", "'ftp:' is no scheme that is read; use a path, file:, http://, https://, s3://"),
        ("train-00.tar::c:/x.tar", r"'c:' is no scheme .* \(a path with a colon: file:<path>\)"),
        ("data:,x", "'data:' is no scheme"),
        ("http:/h/0.tar", "no host or bucket follows; write http://<host or bucket>/<path>"),
        ("https:///0.tar", "no host or bucket follows"),
        ("s3:0.tar", "no host or bucket follows"),
        (
            "https://me:word@h/0.tar?t=abc::https://me:word@h/0.tar?t=abc",
            r"\*@h/0.tar\?t=\*\*\*' is named 2 times",
        ),
        ("train-{00..01.tar", "is not a file|cannot expand"),
        ("${WDS_NO_SUCH_VARIABLE_", "is not a file|cannot expand"),
    ],
)
def test_refusals(folder, pattern, message):
    with pytest.raises(UserError, match=message):
        expand_urls(pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-0*.tar", "'train-00.tar' and 'train-09.tar' are one file"),
        ("train-00.tar::hard.tar", "'train-00.tar' and 'hard.tar' are one file"),
        ("train-00.tar::a/../deep/er/x.tar::deep/er/x.tar", "x.tar' is named 2 times"),
        ("link/x.tar::deep/er/x.tar", "'link/x.tar' and 'deep/er/x.tar' are one file"),
        ("deep/**/*.tar::link/*.tar", "'deep/er/x.tar' and 'link/x.tar' are one file"),
    ],
)
def test_one_file_under_two_names_is_refused(folder, pattern, message):
    Path("train-09.tar").symlink_to("train-00.tar")
    Path("hard.tar").hardlink_to("train-00.tar")
    Path("link").symlink_to("deep/er")
    Path("a").mkdir()
    with pytest.raises(UserError, match=f"{message}.*; name each shard once"):
        expand_urls(pattern)


def test_files_that_a_file_system_numbers_badly_are_not_one(folder, monkeypatch):
    Path("train-09.tar").symlink_to("train-00.tar")
    real = os.stat

    def stat(*args, **kwargs) -> os.stat_result:
        mode, _, device, *rest = real(*args, **kwargs)
        return os.stat_result((mode, 0, device, *rest))

    monkeypatch.setattr(os, "stat", stat)
    assert expand_urls("train-0[0-2].tar") == ["train-00.tar", "train-01.tar", "train-02.tar"]
    with pytest.raises(UserError, match=r"train-00\.tar' and 'train-09\.tar' are one file"):
        expand_urls("train-0*.tar")


@pytest.mark.parametrize(
    "pattern", ["pipe:touch ran", " pipe:touch ran", "PIPE:touch ran", "train-00.tar::pipe:touch ran"]
)
def test_pipes_are_refused_and_never_run(folder, pattern):
    with pytest.raises(UserError, match=r"pipes run shell commands and are refused; data\.allow_pipe=true"):
        expand_urls(pattern)
    assert not (folder / "ran").exists()


def test_a_glob_does_not_mean_the_indexes_that_lie_beside_shards(folder):
    Path("train-00.tar.index").write_bytes(b"")
    assert expand_urls("train-0*") == ["train-00.tar", "train-01.tar", "train-02.tar"]


def test_forty_thousand_shards_are_expanded_in_seconds():
    start = time.process_time()
    assert len(expand_urls("https://host/{00000..41454}.tar")) == 41_455
    with pytest.raises(UserError, match="2 times"):
        expand_urls("https://host/{00000..41454}.tar::https://host/41454.tar")
    assert time.process_time() - start < 5


@pytest.mark.parametrize("word", ["a", "token", "token ", "=", "&a=", "a@", "://"])
def test_masking_a_long_line_of_a_hostile_server_takes_no_time(word):
    start = time.process_time()
    masked("HTTP 302 to ftp://h/?" + word * (65_000 // len(word)))
    assert time.process_time() - start < 2


def test_clients_are_imported_by_those_who_need_them():
    code = """
import sys
from clipscale.data.fetch.cache import ShardCache
from clipscale.data.fetch.urls import expand_urls
assert expand_urls("https://host/x.tar::pipe:cat x.tar", allow_pipe=True)
print([name for name in ("fsspec", "urllib.request", "ssl", "numpy", "torch", "webdataset") if name in sys.modules])
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_local_and_remote():
    assert [is_local(u) for u in ("a.tar", "/a/b:c.tar", "./b:c.tar", "file:a.tar", "File:/a.tar")] == [True] * 5
    assert [is_local(u) for u in ("http://h/a.tar", "s3://b/a.tar", "hf://x", "pipe:cat /a", "c:a")] == [False] * 5


def test_file_urls(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    for start in ("file:", "file://"):
        assert expand_urls(f"{start}{tmp_path}/a.tar") == [f"{tmp_path}/a.tar"]


def test_pipes_where_they_are_allowed(folder):
    assert expand_urls("pipe:cat {0..1}.tar", allow_pipe=True) == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("scheme", "client", "package"), [("s3", "s3fs", "clipscale[s3]"), ("gs", "gcsfs", "clipscale[gcs]")]
)
def test_a_client_that_is_not_installed_is_named_at_the_start(monkeypatch, scheme, client, package):
    monkeypatch.setitem(sys.modules, client, None)
    monkeypatch.delitem(fsspec.registry, scheme, raising=False)
    with pytest.raises(UserError) as error:
        expand_urls(f"{scheme}://bucket/{{0..3}}.tar")
    assert str(error.value) == (
        f"shards '{scheme}://bucket/3.tar': the client for {scheme}:// is not installed; pip install '{package}'"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a/b@c.tar", "https://host/a/b@c.tar"),
        ("https://me:word@host/x.tar", "https://***@host/x.tar"),
        ("https://me:w@rd@host/x.tar", "https://***@host/x.tar"),
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("https://h/x?X-Amz-Signature=ab%2Fc&Expires=3", "https://h/x?X-Amz-Signature=***&Expires=***"),
        ("https://h/x?abc", "https://h/x?***"),
        ("https://h/x?a=b=c&&d=", "https://h/x?a=***&&***"),
        ("cannot open 'https://h/x?sig=abc': no", "cannot open 'https://h/x?sig=***': no"),
        ("<urlopen https://u:p@h/x?a=b>, https://v:q@h/y", "<urlopen https://***@h/x?a=***>, https://***@h/y"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' https://h/x",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/x",
        ),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/x -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp s3://b/x -"),
        ("train-0?.tar::a/b[1]*.tar", "train-0?.tar::a/b[1]*.tar"),  # a glob is no query
    ],
)
def test_masked(text, shown):
    assert masked(text) == shown
    assert masked(shown) == shown


@settings(max_examples=100, deadline=None)
@given(
    secret=st.text("abcXYZ019-_%.~+/=", min_size=6).map(lambda text: f"S{text}S"),
    around=st.sampled_from(["{}", "'{}'", "error: {}, again", "({})", "{}::train-?.tar", "<{}>: why"]),
)
def test_no_secret_is_shown(secret, around):
    for url in (f"https://me:{secret.replace('/', '')}@h/x", f"https://h/x?k={secret}&l=2", f"https://h/x?{secret}"):
        shown = masked(around.format(url))
        assert secret not in shown
        assert secret.replace("/", "") not in shown
        assert "://" in shown


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "clipscale"
    assert cache_folder("mine") == Path("mine")
