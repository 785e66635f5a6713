"""Downloads from a server on this machine: broken, repeated, damaged and refused ones."""

import dataclasses
import hashlib
import http.server
import re
import threading

import pytest

from ejmp import cli
from ejmp.catalog import CATALOG, Download, RemoteFile
from ejmp.data import cli as commands
from ejmp.fetch import fetch

DATA = bytes(range(256)) * 20_000
HASH = "sha256:" + hashlib.sha256(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """A server of DATA that supports Range; `/cut` breaks off, `/whole` ignores Range, `/challenge` answers 202."""

    requests: list = []  # noqa: RUF012, one list for all

    def do_GET(self):
        start = int(re.sub(r"\D", "", self.headers.get("Range") or "0") or 0)
        self.requests.append((self.path, start))
        if self.path == "/missing":
            self.send_error(404)
            return
        if start >= len(DATA):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(DATA)}")
            self.end_headers()
            return
        start = 0 if self.path == "/whole" else start
        self.send_response(202 if self.path == "/challenge" else 206 if start else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        self.end_headers()
        end = start + 1_500_000 if self.path == "/cut" else len(DATA)
        self.wfile.write(DATA[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Handler.requests.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_a_file_is_fetched_once(server, tmp_path):
    remote, seen = RemoteFile(url=f"{server}/file", name="file.bin", hash=HASH), []
    path = fetch(remote, tmp_path / "new" / "folder", lambda *progress: seen.append(progress))
    assert path.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert fetch(remote, tmp_path / "new" / "folder") == path
    assert Handler.requests == [("/file", 0)]
    assert [file.name for file in path.parent.iterdir()] == ["file.bin"]


def test_a_broken_download_goes_on(server, tmp_path):
    remote = RemoteFile(url=f"{server}/cut", name="file.bin", hash=HASH)
    for done in (1_500_000, 3_000_000, 4_500_000):
        with pytest.raises(OSError, match=f"broke after {done} of {len(DATA)} bytes; run it again to go on"):
            fetch(remote, tmp_path)
        assert (tmp_path / "file.bin.part").stat().st_size == done
        assert not (tmp_path / "file.bin").exists()
    assert fetch(remote, tmp_path).read_bytes() == DATA
    assert [start for _, start in Handler.requests] == [0, 1_500_000, 3_000_000, 4_500_000]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    assert fetch(RemoteFile(url=f"{server}/whole", name="file.bin", hash=HASH), tmp_path).read_bytes() == DATA


def test_a_part_that_is_all_there_is_taken(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(DATA)
    assert fetch(RemoteFile(url=f"{server}/file", name="file.bin", hash=HASH), tmp_path).read_bytes() == DATA


def test_a_wrong_hash_is_refused(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)  # of another file
    with pytest.raises(ValueError, match="hash"):
        fetch(RemoteFile(url=f"{server}/file", name="file.bin", hash=HASH), tmp_path)
    assert not list(tmp_path.iterdir())
    assert fetch(RemoteFile(url=f"{server}/file", name="file.bin", hash=HASH), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(("path", "reason"), [("missing", "Not Found"), ("challenge", "status 202")])
def test_other_answers_are_errors(server, tmp_path, path, reason):
    with pytest.raises(OSError, match=f"{reason}; run it again to go on, or fetch {server}/{path} by hand"):
        fetch(RemoteFile(url=f"{server}/{path}", name="file.bin"), tmp_path)


def test_offline_names_the_url_and_where_to_put_it(tmp_path):
    url = "http://127.0.0.1:9/file"
    with pytest.raises(OSError, match=re.escape(f"by hand and put it at {tmp_path / 'file.bin'}")) as error:
        fetch(RemoteFile(url=url, name="file.bin"), tmp_path)
    assert f"fetch {url} by hand" in str(error.value)


def test_the_licence_comes_first(server, tmp_path, capsys, monkeypatch):
    remote = RemoteFile(url=f"{server}/file", name="file.bin", size="5 MB", hash=HASH)
    entry = dataclasses.replace(CATALOG["ani1x"], licence="CC0", page="http://page")
    download = Download(name="set", format="ani1x", files=(remote,))
    monkeypatch.setattr(commands, "DOWNLOADS", {"set": (entry, download)})
    assert cli.main(["data", "fetch", "set", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "set: licence CC0; http://page"
    assert lines[1] == f"{remote.url} (5 MB; checked against sha256)"
    assert lines[2] == str(tmp_path / "file.bin")
    assert "--format ani1x" in lines[3]
    assert f"file.bin: {len(DATA)} of {len(DATA)} bytes" in err
