import http.server
import os
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shards import picture, write_pairs, write_shard

from clipscale.data.shards import cache_folder, expand_urls, is_local, local_path
from clipscale.data.source import open_source
from clipscale.errors import UserError

# --- expand_urls ------------------------------------------------------------------------------------------------------


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
        ("https://host/a/{0..1}.tar::train-00.tar", ["https://host/a/0.tar", "https://host/a/1.tar", "train-00.tar"]),
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
        ("train-{00..01.tar", "is not a file|cannot expand"),
        ("${WDS_NO_SUCH_VARIABLE_", "is not a file|cannot expand"),
    ],
)
def test_refusals(folder, pattern, message):
    with pytest.raises(UserError, match=message):
        expand_urls(pattern)


@pytest.mark.parametrize(
    "pattern", ["pipe:touch ran", " pipe:touch ran", "PIPE:touch ran", "train-00.tar::pipe:touch ran"]
)
def test_pipes_are_refused_and_never_run(folder, pattern):
    with pytest.raises(UserError, match="pipes run shell commands"):
        open_source("mine", pattern, need="pairs", cache_dir=str(folder / "cache"))
    assert not (folder / "ran").exists()


def test_forty_thousand_shards_are_expanded_in_seconds():
    start = time.process_time()
    assert len(expand_urls("https://host/{00000..41454}.tar")) == 41_455
    with pytest.raises(UserError, match="2 times"):
        expand_urls("https://host/{00000..41454}.tar::https://host/41454.tar")
    assert time.process_time() - start < 5


def test_local_and_remote():
    assert [is_local(u) for u in ("a.tar", "/a/b:c.tar", "file:a.tar")] == [True] * 3
    assert [is_local(u) for u in ("http://h/a.tar", "s3://b/a.tar", "hf://x")] == [False] * 3


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "clipscale"
    assert cache_folder("mine") == Path("mine")


# --- remote shards ----------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """The files of the server's folder; names that begin with `cut-` break off in the middle of the body."""

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        name = self.path.rsplit("/", 1)[1]
        if not name.startswith("cut-"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(5000))

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path):
    """(url, folder, requests by path) of a server on this machine."""
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches http by curl, which is not installed")
    root = tmp_path / "served"
    root.mkdir()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: Handler(*args, directory=str(root))
    ) as running:
        running.requests = Counter()
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", root, running.requests
        running.shutdown()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_shards_of_one_name_in_two_folders_do_not_collide(server, tmp_path):
    url, root, requests = server
    for name in ("a", "b"):
        write_shard(root / name / "00.tar", [(name, {"jpg": picture(0, 8, 8), "txt": f"in {name}".encode()})])
    urls, cache = f"{url}/{{a,b}}/00.tar", str(tmp_path / "cache")
    for _ in range(2):
        source = open_source("mine", urls, need="pairs", cache_dir=cache)
        assert [source.read(shard, 0).note for shard in range(2)] == [b"in a", b"in b"]
        assert [Path(shard.path).name for shard in source.shards] == ["00.tar", "00.tar"]
    assert requests == {"/a/00.tar": 1, "/b/00.tar": 1}  # fetched once


def test_a_remote_shard_has_the_fingerprint_of_its_local_copy(server, tmp_path):
    url, root, _ = server
    urls = write_pairs(root, 2, 3)
    here = open_source("mine", urls, need="pairs")
    there = open_source("mine", f"{url}/{{0000..0001}}.tar", need="pairs", cache_dir=str(tmp_path / "cache"))
    assert here.fingerprint() == there.fingerprint()


@pytest.mark.parametrize("name", ["missing.tar", "cut-00.tar"])
def test_a_failed_fetch_is_one_clear_error_and_leaves_nothing(server, tmp_path, name):
    url, _, _ = server
    cache, start = tmp_path / "cache", time.monotonic()
    with pytest.raises(UserError, match=f"shard '{url}/{name}': cannot be fetched") as error:
        open_source("mine", f"{url}/{name}", need="pairs", cache_dir=str(cache))
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.tar", "s3://bucket/x.tar", "nonsense://x.tar"])
def test_no_server_and_unknown_schemes_are_clear_errors(tmp_path, url):
    with pytest.raises(UserError, match="cannot be fetched"):
        local_path(url, str(tmp_path))


def test_two_fetches_of_one_shard_at_once(server, tmp_path):
    url, root, _ = server
    (root / "big.tar").write_bytes(os.urandom(3 << 20))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: local_path(f"{url}/big.tar", str(tmp_path / "cache")), range(4)))
    (path,) = map(Path, paths)
    assert path.read_bytes() == (root / "big.tar").read_bytes()
    assert list(path.parent.iterdir()) == [path]
