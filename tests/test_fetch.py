"""Downloads from a server of our own: whole, cut off, gone on with, damaged, refused."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import threading
from pathlib import Path

import pytest
from terminal import one_line, run

from sparta_kernels import data
from sparta_kernels.data import fetch

CONTENT = {name: os.urandom(size) for name, size in (("a.bin", 300_000), ("b.bin", 50_000), ("other.bin", 70_000))}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, by Range too; `server.how` says what goes wrong."""

    def do_GET(self):
        how, name = self.server.how, self.path.rpartition("/")[2]
        self.server.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if how.get("status"):
            return self.send_error(how["status"])
        content = how.get("content", {}).get(name, CONTENT.get(name))
        if content is None:
            return self.send_error(404)
        tag = how.get("tag", '"1"')
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and how.get("ranges", True) and self.headers.get("If-Range") in (None, tag):
            start = int(wanted[1])
            if start >= len(content):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + how.get('shift', 0)}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        if how.get("length", True):
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = how["cuts"].pop(0) if how.get("cuts") else len(content)
        self.wfile.write(content[start : max(start, stop)])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def _server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(_server, monkeypatch):
    """The server, serving well, as the place where two data sets are published."""
    _server.how, _server.requests = {}, []
    url = f"http://127.0.0.1:{_server.server_port}"
    files = {
        name: fetch.File(name, f"{url}/{name}", len(content), hashlib.sha256(content).hexdigest())
        for name, content in CONTENT.items()
    }
    monkeypatch.setattr(
        fetch, "FILES", {"digits": (), "cifar10": (files["a.bin"],), "svhn": (files["a.bin"], files["b.bin"])}
    )
    monkeypatch.setattr(fetch, "OTHER_FILES", {"cifar10": (files["other.bin"],)})
    monkeypatch.setattr(fetch, "TIMEOUT", 5.0)
    monkeypatch.setenv("no_proxy", "*")
    _server.url = url
    return _server


def _file():
    return fetch.FILES["cifar10"][0]


def _whole(root, name="a.bin"):
    assert (root / name).read_bytes() == CONTENT[name]
    return sorted(os.listdir(root))


def test_published_files():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    assert tuple(fetch.FILES) == tuple(data.DATASETS)
    for file in [file for files in (*fetch.FILES.values(), *fetch.OTHER_FILES.values()) for file in files]:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"https?://[a-z0-9.]+/.*", file.url)
        assert file.url.endswith(f"/{file.name}")
        assert file.size > 10**7
        assert f"| `{file.name}` | {file.size:,} | `{file.sha256}` |" in page


def test_download(server, tmp_path):
    seen = []
    assert fetch.download(_file(), tmp_path, lambda file, done: seen.append((file.name, done))) == tmp_path / "a.bin"
    assert _whole(tmp_path) == ["a.bin"]
    assert seen[0] == ("a.bin", 0)
    assert seen[-1] == ("a.bin", 300_000)
    assert seen == sorted(seen)
    assert fetch.is_there(_file(), tmp_path)
    (tmp_path / "a.bin").write_bytes(CONTENT["a.bin"][:-1] + bytes([CONTENT["a.bin"][-1] ^ 1]))
    assert not fetch.is_there(_file(), tmp_path)


def test_two_at_once(server, tmp_path):
    """Both would append to one file, which then is not what was published, and is removed."""
    refused = []

    def second(*_):
        with pytest.raises(BlockingIOError, match=rf"a\.bin is in use by process {os.getpid()} on") as error:
            fetch.download(_file(), tmp_path)
        refused.append(error)

    fetch.download(_file(), tmp_path, second)
    assert refused
    assert _whole(tmp_path) == ["a.bin"]


def test_a_lost_connection_is_made_again(server, tmp_path):
    server.how = {"cuts": [100_000, 250_000]}
    fetch.download(_file(), tmp_path)
    assert _whole(tmp_path) == ["a.bin"]
    assert [(wanted, tag) for _, wanted, tag in server.requests] == [
        (None, None),
        ("bytes=100000-", '"1"'),
        ("bytes=250000-", '"1"'),
    ]


def test_weak_tags_promise_nothing(server, tmp_path):
    server.how = {"cuts": [100_000], "tag": 'W/"1"'}
    fetch.download(_file(), tmp_path)
    assert server.requests[1:] == [("/a.bin", "bytes=100000-", None)]
    assert _whole(tmp_path) == ["a.bin"]


def test_a_later_call_goes_on(server, tmp_path):
    server.how = {"cuts": [10_000, 20_000, 30_000, 40_000, 50_000]}
    with pytest.raises(
        data.DataError, match=r"closed early; 0\.1 of 0\.3 MB are kept in .*a\.bin\.part: the same command"
    ):
        fetch.download(_file(), tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT["a.bin"][:50_000]
    seen = []
    fetch.download(_file(), tmp_path, lambda _, done: seen.append(done))
    assert seen[0] == 50_000
    assert server.requests[-1][1] == "bytes=50000-"
    assert _whole(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(
    "how",
    [
        {"ranges": False},  # a server that knows of none
        {"tag": '"2"'},  # the file is another now
        {"shift": 1},  # an answer to another question
    ],
)
def test_what_cannot_be_gone_on_with_starts_again(server, tmp_path, how):
    server.how = {"cuts": [10_000, 10_000]}  # the second brings nothing
    with pytest.raises(data.DataError):
        fetch.download(_file(), tmp_path)
    (tmp_path / "a.bin.part").write_bytes(bytes(10_000))  # not the beginning of the file as it is now
    server.how, server.requests[:] = how, []
    fetch.download(_file(), tmp_path)
    assert server.requests[0][1:] == ("bytes=10000-", '"1"')
    assert _whole(tmp_path) == ["a.bin"]


def test_parts_of_unknown_origin(server, tmp_path):
    part = tmp_path / "a.bin.part"
    part.write_bytes(CONTENT["a.bin"][:123])
    server.how = {"tag": ""}
    fetch.download(_file(), tmp_path)
    assert server.requests == [("/a.bin", "bytes=123-", None)]
    assert _whole(tmp_path) == ["a.bin"]
    part.write_bytes(CONTENT["a.bin"])  # cut off between the last byte and the renaming
    fetch.download(_file(), tmp_path)
    assert len(server.requests) == 1
    part.write_bytes(bytes(300_001))
    fetch.download(_file(), tmp_path)
    assert server.requests[1:] == [("/a.bin", None, None)]
    server.how = {"content": {"a.bin": b"short"}}  # HTTP 416, then another file
    part.write_bytes(bytes(100))
    with pytest.raises(data.DataError, match="must have 300000 bytes, but the server has 5"):
        fetch.download(_file(), tmp_path)
    assert _whole(tmp_path) == ["a.bin"]


def test_wrong_content(server, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")
    wrong = bytearray(CONTENT["a.bin"])
    wrong[7] ^= 1
    for how, words in (
        ({"content": {"a.bin": bytes(wrong)}}, "what arrived is not a.bin: its sha256"),
        ({"content": {"a.bin": b"<html>"}}, "must have 300000 bytes, but the server has 6"),
        ({"content": {"a.bin": CONTENT["a.bin"] + b"x"}, "length": False}, "what arrived is not a.bin"),
    ):
        server.how = how
        with pytest.raises(data.DataError, match=words):
            fetch.download(_file(), tmp_path)
        assert os.listdir(tmp_path) == ["a.bin"]
        assert (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize("status", [403, 404, 500])
def test_refusals(server, tmp_path, status):
    (tmp_path / "a.bin.part").write_bytes(b"kept")
    server.how = {"status": status}
    with pytest.raises(data.DataError, match=f"HTTP {status} .*; give another place with --url, or put the file into"):
        fetch.download(_file(), tmp_path)
    assert os.listdir(tmp_path) == ["a.bin.part"]
    assert len(server.requests) == 1


def test_no_server(tmp_path):
    file = fetch.File("a.bin", "http://127.0.0.1:9/a.bin", 3, "0" * 64)
    with pytest.raises(data.DataError, match=r"127\.0\.0\.1:9/a\.bin: .*refused; nothing was kept"):
        fetch.download(file, tmp_path)
    assert not os.listdir(tmp_path)


def test_full_disk(server, tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    os.symlink("/dev/full", tmp_path / "a.bin.part")
    with pytest.raises(OSError, match=r"cannot write .*a\.bin\.part: No space left on device; .*are kept") as caught:
        fetch.download(_file(), tmp_path)
    assert not isinstance(caught.value, data.DataError)
    assert not (tmp_path / "a.bin").exists()


def test_urls(server):
    url, (a, b) = "https://mirror.org/sets/", fetch.FILES["svhn"]
    assert [file.url for file in fetch.files("svhn")] == [a.url, b.url]
    moved = fetch.files("svhn", url)
    assert [file.url for file in moved] == [f"{url}a.bin", f"{url}b.bin"]
    assert [file.sha256 for file in moved] == [a.sha256, b.sha256]
    assert [file.name for file in fetch.files("svhn", f"{url}b.bin")] == ["b.bin"]
    (other,) = fetch.files("cifar10", f"{url}other.bin?download=1")
    assert (other.name, other.url, other.size) == ("other.bin", f"{url}other.bin?download=1", 70_000)
    for wrong in ("mirror.org", "file:///etc/passwd", "ftp://mirror.org/a.bin", "http://", ""):
        with pytest.raises(ValueError, match="url must begin with http"):
            fetch.files("svhn", wrong)
    with pytest.raises(ValueError, match="name must be one of digits, cifar10, svhn"):
        fetch.files("mnist")


# ---- the command -------------------------------------------------------------------------------------------


def test_command(server, tmp_path, capsys):
    root = tmp_path / "new" / "folder"
    result = run("data", "fetch", "svhn", "--root", root)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("checksum right") == 2
    assert _whole(root) == ["a.bin", "b.bin"]
    assert _whole(root, "b.bin")
    server.requests.clear()
    result = run("data", "fetch", "svhn", "--root", root)
    assert (result.exit_code, result.stdout.count("there already, and whole")) == (0, 2)
    assert server.requests == []

    (root / "b.bin").write_bytes(b"damaged")
    result = run("data", "fetch", "svhn", "--root", root, "--url", f"{server.url}/mirror")
    assert "b.bin is not b.bin as published and will be replaced" in result.stderr
    assert [path for path, *_ in server.requests] == ["/mirror/b.bin"]
    assert _whole(root, "b.bin")

    assert run("data", "fetch", "cifar10", "--root", root, "--url", f"{server.url}/other.bin").exit_code == 0
    assert _whole(root, "other.bin")
    assert "nothing to fetch" in run("data", "fetch", "digits", "--root", root).stdout

    server.how = {"status": 404}
    code, err = one_line(["data", "fetch", "cifar10", "--root", tmp_path], capsys)
    assert (code, err.count("\n")) == (1, 1)
    assert "HTTP 404" in err


def test_ctrl_c_keeps_what_arrived(server, tmp_path, capsys, monkeypatch):
    transfer = fetch._transfer

    def interrupt(file, done):
        if done > 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_transfer", lambda file, part, _: transfer(file, part, interrupt))
    code, err = one_line(["data", "fetch", "cifar10", "--root", tmp_path], capsys)
    assert code == 130
    assert re.search(r"interrupted; [\d.]+ of 0\.3 MB are kept in .*a\.bin\.part: the same command goes on", err)
    kept = (tmp_path / "a.bin.part").read_bytes()
    assert kept
    assert CONTENT["a.bin"].startswith(kept)
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnist", "--root", "{tmp}"], "Invalid value for NAME: must be one of digits, cifar10"),
        (["svhn"], "--root"),
        (["svhn", "--root", "{tmp}/file"], "--root: cannot make the folder"),
        (["svhn", "--root", "{tmp}", "--url", "file:///x"], "--url: must begin with http:// or https://"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, words):
    (tmp_path / "file").touch()
    code, err = one_line(["data", "fetch", *(part.format(tmp=tmp_path) for part in arguments)], capsys)
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert os.listdir(tmp_path) == ["file"]


def test_info(tmp_path, monkeypatch):
    result = run("data", "info", "--json", tmp_path / "info.json")
    assert result.exit_code == 0, result.output
    for words in ("tiny-imagenet", "cifar-10-python.tar.gz (170 MB)", "crop 4, flip", "73257", "sparta data fetch"):
        assert words in result.stdout
    facts = {row["name"]: row for row in json.loads((tmp_path / "info.json").read_text())}
    assert facts.keys() == data.DATASETS.keys()
    assert facts["svhn"]["files"][1]["bytes"] == 64_275_384
    assert facts["tiny-imagenet"]["shape"] == [3, 64, 64]
